"""Candidates: what is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from attrs import frozen

from coreai_zoo.backends import Backend, drain
from coreai_zoo.bundle import Bundle
from coreai_zoo.gates import Activations


@frozen
class AssetCandidate:
    """The bundle's own asset on its runtime, token by token, states carried."""

    bundle: Bundle
    backend: Backend
    on_step: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        """Which runtime."""
        return f"{self.bundle.asset.name} on the {self.backend.runtime} runtime"

    def run(self, tokens: Sequence[int]) -> Activations:
        """Teacher-forced logits in float16."""
        rows = []
        with self.backend.stepper(self.bundle.asset, self.bundle.signature, capacity=len(tokens)) as stepper:
            for row in drain(stepper, tokens):
                rows.append(row)
                self.on_step()
        return Activations(np.stack(rows))
