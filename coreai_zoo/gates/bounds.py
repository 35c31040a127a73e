"""A verdict's measures against the bounds of its recipe. Damage that flips nothing is damage all the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from attrs import evolve, frozen

from coreai_zoo.bounds import Bounds
from coreai_zoo.gates.rule import Position, Verdict


@frozen
class BoundCheck:
    """One measure against its bound.

    Attributes:
        name: the measure.
        value: what was found; infinite where logits were not finite.
        limit: the bound.
        at_least: whether the bound is a lower one.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Whether the bound is kept."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        value, limit = ((f"{number:.6f}" if self.at_least else f"{number:.3g}") for number in (self.value, self.limit))
        return f"{self.name} is {value}, {'at least' if self.at_least else 'at most'} {limit} is allowed"


def broken(checks: Iterable[BoundCheck]) -> list[str]:
    """The bounds that are not kept, a phrase each."""
    return [str(check) for check in checks if not check.passed]


def check_bounds(verdict: Verdict, bounds: Bounds) -> tuple[BoundCheck, ...]:
    """A candidate's measures on one prompt against its recipe's bounds."""
    positions = verdict.positions
    # A swapped expert is another computation: such positions are held to a looser bound, and all to the median.
    gap = bounds.router_gap or 0.0
    firm = [position for position in positions if not position.near_tie(gap)]
    near = [position for position in positions if position.near_tie(gap)]
    checks = [
        BoundCheck("median relative error", median_error(positions), bounds.median_error),
        BoundCheck("median KL", float(np.median([p.kl_divergence for p in positions])), bounds.median_kl),
    ]
    if firm:
        checks += [
            BoundCheck("largest relative error", max(p.relative_error for p in firm), bounds.error),
            BoundCheck("lowest cosine", min(p.cosine for p in firm), bounds.cosine, at_least=True),
            BoundCheck("largest KL", max(p.kl_divergence for p in firm), bounds.kl),
        ]
    if near:
        largest = max(p.relative_error for p in near)
        checks.append(BoundCheck("largest relative error at router near-ties", largest, bounds.near_tie_error))
    if verdict.hidden_error is not None:
        largest = max(verdict.hidden_error)
        checks.append(BoundCheck("largest hidden-state error of a layer", largest, bounds.hidden_error))
    return tuple(checks)


def check_control(verdict: Verdict, control: Verdict, bounds: Bounds, plain: Bounds) -> tuple[BoundCheck, ...]:
    """The candidate's error against its control's, and the control against the bounds of an unquantized bundle.

    The second is what finds a mistake in the decoder under the noise of coarse integers: the control shares it.

    Args:
        verdict: the candidate's.
        control: its control's.
        bounds: what the candidate is held to.
        plain: the bounds of an unquantized bundle in PyTorch, which the control is held to.
    """
    found, theirs = median_error(verdict.positions), median_error(control.positions)
    ratio = found / theirs if theirs else math.inf if found else 1.0
    return (
        BoundCheck("median relative error over the control's", ratio, bounds.over_control),
        *(evolve(check, name=f"control: {check.name}") for check in check_bounds(control, plain)),
    )


def median_error(positions: Sequence[Position]) -> float:
    """Median relative error over positions."""
    return float(np.median([position.relative_error for position in positions]))
