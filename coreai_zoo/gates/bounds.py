"""Bounds on the measures of a gate: damage that flips nothing on a prompt is damage all the same.

Each bound is the largest value that the two shipped samples, untouched, show on any built-in prompt, times a factor
that is stated here; docs/gate.md has the table. There is a set for each class of recipes, by the coarsest integers that
it stores, and for each arithmetic: a runtime may sum in half precision, PyTorch does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from attrs import evolve, frozen

from coreai_zoo.gates.rule import Position, Verdict

MEASURED_LAYERS = 8
"""Depth of the samples. Errors of layers add up like independent noise: with the square root of the depth."""

MEDIAN_FACTOR = 1.5
"""On medians over positions, which vary little from prompt to prompt."""

EXTREME_FACTOR = 2.0
"""On largest values, which vary more."""

Arithmetic = Literal["torch", "runtime"]


@frozen
class Bounds:
    """What a candidate may show. Errors are relative, see `rule.Position.relative_error`.

    Attributes:
        name: of the class of recipes.
        arithmetic: of what runs it.
        median_error: median relative error over positions.
        error: largest relative error, but for router near-ties.
        near_tie_error: the same at router near-ties, where an expert may have been swapped.
        cosine: lowest cosine, but for router near-ties.
        median_kl: median KL over positions, in nats.
        kl: largest KL, but for router near-ties.
        hidden_error: largest over layers of the median over positions, see `rule.Verdict.hidden_error`.
        over_control: median relative error over that of the fp16 control.
        router_gap: oracle gap of a router, in router logits, below which errors may swap an expert; None without one.
        layers: depth of the model that they are for.
    """

    name: str
    arithmetic: Arithmetic
    median_error: float
    error: float
    near_tie_error: float
    cosine: float
    median_kl: float
    kl: float
    hidden_error: float
    over_control: float
    router_gap: float | None = None
    layers: int = MEASURED_LAYERS

    def for_depth(self, layers: int) -> Bounds:
        """The bounds of a deeper model than the samples; a shallower one is held to the samples'.

        Errors grow with the square root of the depth, KL and 1 - cosine with their squares.
        """
        growth = max(1.0, layers / MEASURED_LAYERS)
        root = math.sqrt(growth)
        return evolve(
            self,
            median_error=self.median_error * root,
            error=self.error * root,
            cosine=1 - (1 - self.cosine) * growth,
            median_kl=self.median_kl * growth,
            kl=self.kl * growth,
            hidden_error=self.hidden_error * root,
            layers=layers,
        )


Kind = Literal["dense", "routed"]

ROUTER_GAPS: Mapping[str, float] = MappingProxyType({"fp16": 0.005, "int8": 0.02, "int4": 0.1})
"""Below this gap between the last chosen and the first rejected expert, errors of that size may swap the two."""

# Columns as in `Bounds`, cosine as its distance to 1. Only what runs in PyTorch shows layers.
_MEASURED: Mapping[tuple[str, Arithmetic, Kind], tuple[float, ...]] = MappingProxyType(
    {
        #                             median    largest   near-tie  1 - cos   med. KL   KL        hidden    / control
        ("fp16", "torch", "dense"): (8.53e-04, 5.11e-03, 0, 7.80e-06, 3.16e-06, 3.71e-05, 1.26e-03, 1.00),
        # Medians and hidden states are those of the form for a fixed context on `spanish`, which swaps one expert more.
        ("fp16", "torch", "routed"): (3.71e-03, 4.44e-02, 1.53e-01, 3.52e-04, 3.62e-05, 5.06e-03, 5.44e-03, 1.00),
        ("fp16", "runtime", "dense"): (3.76e-03, 1.14e-02, 0, 4.47e-05, 6.94e-05, 4.58e-04, 0, 4.64),
        ("fp16", "runtime", "routed"): (5.68e-03, 2.92e-02, 1.60e-01, 4.24e-04, 6.94e-05, 1.15e-03, 0, 4.45),
        ("int8", "torch", "dense"): (7.77e-03, 3.63e-02, 0, 5.39e-04, 1.66e-04, 2.09e-03, 9.64e-03, 9.11),
        ("int8", "torch", "routed"): (9.96e-03, 8.39e-02, 3.03e-01, 1.36e-03, 2.83e-04, 3.80e-02, 1.14e-02, 10.7),
        ("int8", "runtime", "dense"): (8.04e-03, 4.17e-02, 0, 6.74e-04, 2.12e-04, 5.01e-03, 0, 9.89),
        ("int8", "runtime", "routed"): (1.08e-02, 3.58e-02, 3.01e-01, 3.58e-04, 5.24e-04, 1.89e-03, 0, 11.2),
        # In PyTorch the hidden states of two prompts only; the rest as on the runtime.
        ("int4", "torch", "dense"): (1.06e-01, 5.88e-01, 0, 1.40e-01, 1.39e-02, 1.18e-01, 1.26e-01, 125),
        ("int4", "torch", "routed"): (9.61e-02, 7.15e-01, 7.15e-01, 1.70e-01, 1.32e-02, 1.20e-01, 2.70e-01, 115),
        ("int4", "runtime", "dense"): (1.06e-01, 5.88e-01, 0, 1.40e-01, 1.38e-02, 1.18e-01, 0, 125),
        # At its router gap no position of the sample is firm: the near-ties' values for all.
        ("int4", "runtime", "routed"): (9.61e-02, 7.15e-01, 7.15e-01, 1.70e-01, 1.32e-02, 1.20e-01, 0, 115),
    }
)
"""The largest over all built-in prompts that were run on that sample; scripts/measure_bounds.py tells them."""


def of_class(name: str, arithmetic: Arithmetic, kind: Kind = "dense") -> Bounds:
    """The bounds of a class of recipes at the samples' depth: what was measured times the factors.

    KL and 1 - cosine are squares of errors, and their factors squares.
    """
    median, largest, near_tie, distance, median_kl, kl, hidden, ratio = _MEASURED[name, arithmetic, kind]
    return Bounds(
        name,
        arithmetic,
        median_error=median * MEDIAN_FACTOR,
        error=largest * EXTREME_FACTOR,
        near_tie_error=near_tie * EXTREME_FACTOR,
        cosine=1 - distance * EXTREME_FACTOR**2,
        median_kl=median_kl * MEDIAN_FACTOR**2,
        kl=kl * EXTREME_FACTOR**2,
        hidden_error=hidden * MEDIAN_FACTOR,
        over_control=ratio * MEDIAN_FACTOR,
        router_gap=ROUTER_GAPS[name] if kind == "routed" else None,
    )


def of_recipe(
    roles: Mapping[str, Mapping[str, Any] | None], layers: int, arithmetic: Arithmetic, kind: Kind = "dense"
) -> Bounds:
    """The bounds of a bundle: of its coarsest integers, for its depth.

    Args:
        roles: of `build.json`: how each role is stored, None where it is not quantized.
        layers: depth of the model.
        arithmetic: of what runs it.
        kind: whether its layers choose experts.
    """
    bits = {int(str(spec["dtype"]).lstrip("uint")) for spec in roles.values() if spec is not None}
    return of_class(f"int{min(bits)}" if bits else "fp16", arithmetic, kind).for_depth(layers)


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class BoundCheck:
    """One measure against its bound.

    Attributes:
        name: of the measure.
        value: what was found; infinite where logits were not finite.
        limit: the bound.
        at_least: whether the value must not be below the bound, instead of not above.
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


def check_bounds(verdict: Verdict, bounds: Bounds) -> tuple[BoundCheck, ...]:
    """A candidate's measures on one prompt against its recipe's bounds."""
    return tuple(_checks(verdict, bounds))


def _checks(verdict: Verdict, bounds: Bounds) -> Iterator[BoundCheck]:
    positions = verdict.positions
    # A swapped expert is another computation: such positions are held to a looser bound, and all to the median.
    gap = bounds.router_gap or 0.0
    firm = [position for position in positions if not position.near_tie(gap)]
    near = [position for position in positions if position.near_tie(gap)]
    yield BoundCheck("median relative error", median_error(positions), bounds.median_error)
    yield BoundCheck("median KL", float(np.median([p.kl_divergence for p in positions])), bounds.median_kl)
    if firm:
        yield BoundCheck("largest relative error", max(p.relative_error for p in firm), bounds.error)
        yield BoundCheck("lowest cosine", min(p.cosine for p in firm), bounds.cosine, at_least=True)
        yield BoundCheck("largest KL", max(p.kl_divergence for p in firm), bounds.kl)
    if near:
        largest = max(p.relative_error for p in near)
        yield BoundCheck("largest relative error at router near-ties", largest, bounds.near_tie_error)
    if verdict.hidden_error is not None:
        yield BoundCheck("largest hidden-state error of a layer", max(verdict.hidden_error), bounds.hidden_error)


def check_control(verdict: Verdict, control: Verdict, bounds: Bounds) -> tuple[BoundCheck, ...]:
    """The candidate's error against its control's, and the control against the bounds of an unquantized bundle.

    The second is what finds a mistake in the decoder under the noise of coarse integers: the control shares it.
    """
    found, theirs = median_error(verdict.positions), median_error(control.positions)
    ratio = found / theirs if theirs else math.inf if found else 1.0
    control_checks = _checks(
        control, of_class("fp16", "torch", "dense" if bounds.router_gap is None else "routed").for_depth(bounds.layers)
    )
    return (
        BoundCheck("median relative error over the control's", ratio, bounds.over_control),
        *(evolve(check, name=f"control: {check.name}") for check in control_checks),
    )


def median_error(positions: Sequence[Position]) -> float:
    """Median relative error over positions."""
    return float(np.median([position.relative_error for position in positions]))


def table() -> str:
    """All bounds at the samples' depth as a Markdown table; docs/gate.md holds it."""
    header = ("recipe", "runs in", "model", "median error", "largest", "at near-ties", "cosine", "median KL", "KL")
    lines = ["| " + " | ".join((*header, "hidden state", "over control")) + " |", "|" + " --- |" * 11]
    for name, arithmetic, kind in _MEASURED:
        bounds = of_class(name, arithmetic, kind)
        cells = [name, arithmetic, kind, f"{bounds.median_error:.2g}", f"{bounds.error:.2g}"]
        cells += [f"{bounds.near_tie_error:.2g}" if kind == "routed" else "-", f"{bounds.cosine:.6g}"]
        cells += [f"{bounds.median_kl:.1e}", f"{bounds.kl:.1e}"]
        cells += [f"{bounds.hidden_error:.2g}" if arithmetic == "torch" else "-", f"{bounds.over_control:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
