"""Candidates: what is judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from coreai_zoo.backend import Backend, drain
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.gate import Activations


@frozen
class AssetCandidate:
    """The bundle's own asset on its runtime, token by token, states carried.

    Attributes:
        keep_in: folder for the tokens and logits of each run, which the bundle's owner compares a device with; None to
            keep nothing.
    """

    bundle: Bundle
    backend: Backend
    on_step: Callable[[], None] = lambda: None
    keep_in: Path | None = None

    @property
    def name(self) -> str:
        """Which runtime."""
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
            self._keep(np.array(tokens, np.int32), logits, self.keep_in)
        return Activations(logits)

    @staticmethod
    def _keep(tokens: np.ndarray[Any, Any], logits: np.ndarray[Any, Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(tokens.tobytes()).hexdigest()[:8]
        np.savez(folder / f"logits-{name}.npz", tokens=tokens, logits=logits)
