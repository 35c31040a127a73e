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
    tokens_per_second,
)
from coreai_zoo.errors import BadInput, did_you_mean
from coreai_zoo.planning.plan import Plan

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
    """The chip of that name, in capitals or not."""
    for chip in CHIPS:
        if chip.name.lower() == name.lower():
            return chip
    hint = f"{did_you_mean(name, [chip.name for chip in CHIPS], 3)} Of any other machine, pass the bandwidth:"
    raise BadInput(f"No chip is called {name!r}.", f"{hint} --bandwidth GB/s, and with --contracts also --tflops N.")


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


def describe_model(plan: Plan) -> dict[str, Any]:
    """What is planned, whatever its contract."""
    design = plan.design
    return {
        "name": plan.name,
        "entry": design.entry.name if design.entry else None,
        "status": design.entry.status if design.entry else None,
        "overlay": design.model.overlay.name,
        "plugin": design.model.plugin,
        "recipe": design.recipe.name,
        "published_name": design.recipe.published_name,
        "target": str(design.request.target) if design.request.target else None,
    }


def describe_bundle(plan: Plan) -> dict[str, Any]:
    """The bundle of a contract, and what a machine has to hold and read for it."""
    return {
        "bundle": plan.design.name,
        "contract": plan.design.contract.name,
        "backend": plan.design.backend.name,
        "asset_bytes": plan.asset,
        "tokenizer_bytes": plan.tokenizer,
        "bundle_bytes": plan.bundle,
        "decode": {
            "read_per_token": plan.read,
            "dense_read_per_token": plan.dense_read,
            "state_growth_per_position": plan.growth,
        },
        "states": {"context": plan.context, "bytes": plan.state_bytes, "by_name": dict(plan.states)},
    }


def describe_efficiency(machines: Machines) -> dict[str, Any]:
    """The share of the bandwidth that decode reaches, and who says so."""
    return {"share": machines.efficiency, "source": machines.efficiency_source}


def describe_decode(plan: Plan, chip: Chip, efficiency: float) -> dict[str, Any]:
    """A machine, and how fast it decodes."""
    return {
        "name": chip.name,
        "bandwidth_gb_per_second": chip.bandwidth,
        "fits_from_gib": chip.smallest_memory(plan.resident),
        "tokens_per_second": tokens_per_second(plan.read, chip.bandwidth),
        "tokens_per_second_at_efficiency": tokens_per_second(plan.read, chip.bandwidth, efficiency),
        "tokens_per_second_dense_read": tokens_per_second(plan.dense_read, chip.bandwidth),
    }
