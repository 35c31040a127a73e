"""Headroom: how far the largest values of a model are from the largest number of half precision, 65,504.

Most bundles compute in half precision. The oracle does in float32, so it shows how large the values are where a bundle
would only show an infinity. No verdict hangs on it: what overflows on these prompts fails them, and what comes near may
overflow on others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from attrs import frozen

LARGEST_HALF = 65504.0
"""The largest finite number of half precision."""

LITTLE = 4.0
"""Below this factor the headroom is little: two more bits in one activation and it is gone."""


@frozen
class Headroom:
    """The largest value of one place, over all prompts.

    Attributes:
        where: the place: the path of a module in the oracle's model, a state of one, the residual stream after it.
        value: the largest |value|.
    """

    where: str
    value: float

    @property
    def factor(self) -> float:
        """How many times larger the value could be; 0 where it is no finite number, infinite where it is 0."""
        if not math.isfinite(self.value):
            return 0.0
        return LARGEST_HALF / self.value if self.value else math.inf

    @property
    def little(self) -> bool:
        """Whether half precision is too near."""
        return self.factor < LITTLE


def headroom(peaks: Iterable[Mapping[str, float] | None], compute_dtype: str = "float16") -> tuple[Headroom, ...]:
    """The headroom of each place over the prompts with these peaks, the least first.

    There is none to tell of what computes in bfloat16 or float32, whose largest numbers are the oracle's own.
    """
    if compute_dtype != "float16":
        return ()
    largest: dict[str, Headroom] = {}
    for found in peaks:
        for where, value in (found or {}).items():
            one = Headroom(where, value)
            largest[where] = min(largest.get(where, one), one, key=lambda each: each.factor)
    return tuple(sorted(largest.values(), key=lambda each: each.factor))


def headroom_record(places: tuple[Headroom, ...]) -> dict[str, Any] | None:
    """Headroom as the transcript has it; None where the oracle did not show its values."""
    if not places:
        return None
    return {
        "largest_half": LARGEST_HALF,
        "little": LITTLE,
        "statement": statement(places),
        "warning": warning(places),
        "places": [
            {"where": each.where, "value": each.value, "factor": each.factor, "little": each.little} for each in places
        ],
    }


def statement(places: tuple[Headroom, ...]) -> str:
    """The place with the least headroom, as a clause."""
    least = places[0]
    if not least.factor:
        return f"the oracle itself computes a value that is not finite ({least.where})"
    return (
        f"the largest value of the oracle is {_number(least.value)} ({least.where}), with a factor of "
        f"{_number(least.factor)} to {LARGEST_HALF:,.0f}, the largest number of half precision"
    )


def warning(places: tuple[Headroom, ...]) -> str | None:
    """A sentence on the places with little headroom; None where there is none."""
    near = [each for each in places if each.little]
    if not near:
        return None
    return (
        f"Little room is left in {len(near)} of {len(places)} places, where the factor to {LARGEST_HALF:,.0f} is below "
        f"{LITTLE:g}: another prompt may overflow half precision. A bundle of contract dynamic-bf16 is computed "
        "in bfloat16, which has the range of float32."
    )


def _number(value: float) -> str:
    """Three digits, without an exponent where the number is large."""
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.3g}"
