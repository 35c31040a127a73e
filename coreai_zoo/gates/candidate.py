"""The candidate that is the bundle itself: its asset on the runtime of this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from attrs import frozen

from coreai_zoo.backend import Backend, drain
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.gate import Activations


@frozen
class AssetCandidate:
    """A bundle's own asset on its runtime, token by token, states carried.

    Attributes:
        on_step: called after each token.
        keep_in: folder for the tokens and logits of each run, to compare a device with; None to keep nothing.
    """

    bundle: Bundle
    backend: Backend
    on_step: Callable[[], None] = lambda: None
    keep_in: Path | None = None

    @property
    def name(self) -> str:
        """The asset and its runtime, for the report."""
        return f"{self.bundle.asset.name} on the {self.backend.runtime} runtime"

    def run(self, tokens: Sequence[int]) -> Activations:
        """Teacher-forced logits in float16."""
        rows = []
        with self.backend.stepper(self.bundle.asset, self.bundle.functions, capacity=len(tokens)) as stepper:
            for row in drain(stepper, tokens):
                rows.append(row)
                self.on_step()
        logits = np.stack(rows)
        if self.keep_in is not None:
            self.keep_in.mkdir(parents=True, exist_ok=True)
            fed = np.array(tokens, np.int32)
            name = hashlib.sha256(fed.tobytes()).hexdigest()[:8]
            np.savez(self.keep_in / f"logits-{name}.npz", tokens=fed, logits=logits)
        return Activations(logits)
