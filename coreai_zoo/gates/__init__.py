"""Gates: does a bundle compute what its checkpoint computes?

An oracle gives reference logits (Hugging Face's own modules), a candidate gives the bundle's, a rule compares them
position by position. The three know nothing of each other; `teacher_forced` puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from attrs import frozen

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from coreai_zoo.bundle import Bundle


@frozen
class OracleOutput:
    """What the reference computed.

    Attributes:
        logits: float32 [positions, V].
        router_margins: per position the smallest gap, over all layers, between the router logits of the last chosen and
            the first rejected expert, float32 [positions]; None for a model without a router.
    """

    logits: np.ndarray[Any, Any]
    router_margins: np.ndarray[Any, Any] | None


class Candidate(Protocol):
    """Something that turns tokens into logits and is to be judged."""

    @property
    def name(self) -> str:
        """For the report."""

    def logits(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        """Teacher-forced logits after each token, [positions, V]."""


@frozen
class GateResult:
    """Outcome of one gate.

    Attributes:
        gate: its name.
        passed: the verdict.
        summary: one line.
    """

    gate: str
    passed: bool
    summary: str


@runtime_checkable
class Gate(Protocol):
    """A check that a plugin adds through `zoo_gates`."""

    @property
    def name(self) -> str:
        """For the report."""

    def run(self, bundle: Bundle, checkpoint: Path) -> GateResult:
        """Judge `bundle` against the checkpoint that it was built from."""
