"""What `zoo plan` says of machines, and what its two forms for programs have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attrs import frozen

from coreai_zoo.build.chips import (
    CHIPS,
    EFFICIENCY,
    EFFICIENCY_SOURCE,
    MEASURED,
    SYSTEM,
    TFLOPS_SOURCE,
    Chip,
)
from coreai_zoo.errors import BadInput
from coreai_zoo.planning.machines import find_chip

NOT_KNOWN = "not known"


@frozen
class Machines:
    """The machines that rates are predicted for, and the share of their bandwidth that decode reaches.

    Attributes:
        chips: the machines; none for a target whose chips are not known, and where none was named.
        efficiency: the share.
        efficiency_source: where it comes from.
        tflops_source: where the chips' arithmetic comes from; None where it is known of none.
    """

    chips: tuple[Chip, ...]
    efficiency: float
    efficiency_source: str
    tflops_source: str | None

    @property
    def at_efficiency(self) -> str:
        """The share in words."""
        return f"at {100 * self.efficiency:.3g} %"

    def leave_out(self, measured_on: str) -> bool:
        """Whether what was measured on this chip says nothing of these, all of them being known by name."""
        known, shown = ({chip.name for chip in chips} for chips in (CHIPS, self.chips))
        return bool(shown) and shown <= known and measured_on in known - shown


def find_machines(given: Mapping[str, Any], *, measured: bool) -> Machines:
    """The machines that the options of `zoo plan` name, or else every one that is known and that the target may be.

    Args:
        given: the options by name.
        measured: whether these are only the ones that prompts were measured on.

    Raises:
        BadInput: when options contradict each other, or there is no such chip.
    """
    bandwidth, tflops, names, efficiency = (given[name] for name in ("bandwidth", "tflops", "chips", "efficiency"))
    target = given["target"]
    if bandwidth is None and tflops is not None:
        raise BadInput("--tflops is of the machine that --bandwidth is of.", "Pass both, or --chip NAME.")
    if bandwidth is not None and names:
        raise BadInput("--bandwidth is of another machine than --chip.", "Pass one of the two.")
    if bandwidth is not None:
        chips: tuple[Chip, ...] = (Chip(f"{bandwidth:g} GB/s", bandwidth, (), tflops),)
    elif names:
        chips = tuple(dict.fromkeys(_chip(name) for name in names))
    elif target is not None and target.name != SYSTEM:
        chips = ()
    else:
        chips = tuple(_chip(name) for name in MEASURED) if measured else CHIPS
    listed = TFLOPS_SOURCE if bandwidth is None else "--tflops"
    return Machines(
        chips=chips,
        efficiency=efficiency or EFFICIENCY,
        efficiency_source="--efficiency" if efficiency else EFFICIENCY_SOURCE,
        tflops_source=listed if any(chip.tflops is not None for chip in chips) else None,
    )


def _chip(name: str) -> Chip:
    """The chip of that name; of one that is not known the bandwidth will do."""
    try:
        return find_chip(name)
    except BadInput as error:
        hint = f"{error.hint} Of any other machine, pass the bandwidth:"
        raise BadInput(error.message, f"{hint} --bandwidth GB/s, and with --contracts also --tflops N.") from error


NO_MACHINES = f"The chips that are known run {SYSTEM}: to see rates, name one with --chip, or the target's --bandwidth."


def fits_from(chip: Chip, resident: int) -> str:
    """The smallest memory of a chip that holds so many bytes, in words; empty where its sizes are not known."""
    if not chip.memory:
        return ""
    smallest = chip.smallest_memory(resident)
    return "does not" if smallest is None else f"{smallest} GB"


def figure(value: float | None) -> str:
    """A rate or a time in words: with one decimal, or as many as it takes to show two digits that count."""
    if value is None:
        return NOT_KNOWN
    decimals = 1 if value >= 1 or not value else min(1 - math.floor(math.log10(value)), 9)
    return f"{value:,.{decimals}f}"


# ---------------------------------------------------------------------------------------------------------------------
# For programs
# ---------------------------------------------------------------------------------------------------------------------


def describe_efficiency(machines: Machines) -> dict[str, Any]:
    """The share of the bandwidth that decode reaches, and who says so."""
    return {"share": machines.efficiency, "source": machines.efficiency_source}
