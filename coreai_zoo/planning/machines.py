"""Machines as people write them, a chip and its memory, and what fits in one: for `zoo list --for` and `zoo plan`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from attrs import frozen

from coreai_zoo.build.chips import CHIPS, EFFICIENCY, Chip, gpu_bytes, tokens_per_second
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.dtypes import size
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, did_you_mean, letters
from coreai_zoo.planning.plan import Plan, plans_by_recipe
from coreai_zoo.plugins import Plugins

_MEMORY = re.compile(r"(?<![\d.])(\d+)[\s-]*(?:gib|gb|g)\b", re.IGNORECASE)
_OTHER_UNIT = re.compile(r"\d\s*(?:t|m|k)i?b\b", re.IGNORECASE)
_BARE = re.compile(r"(?<![\w.-])(\d+)(?![\w.-])")  # a number by itself: neither M4 nor 32-core
_IDLE_WORDS = re.compile(
    r"\b(?:apple|macbook|mac|mini|studio|air|ram|memory|with|and|silicon|of|unified)\b", re.IGNORECASE
)
_MOST_MEMORY = 4096  # GiB; more is a typing error


@frozen
class Machine:
    """A machine that somebody has.

    Attributes:
        chip: its chip; None where only the memory was named.
        memory: in GiB.
    """

    chip: Chip | None
    memory: int

    @property
    def gpu_bytes(self) -> int:
        """Bytes that its GPU may hold; see `chips.GPU_SHARE_SOURCE`."""
        return gpu_bytes(self.memory)

    def __str__(self) -> str:
        return f"{self.chip.name}, {self.memory} GB" if self.chip else f"{self.memory} GB"


@frozen
class Fit:
    """A bundle that fits in a machine.

    Attributes:
        plan: of the bundle.
        context: the most positions that fit beside it.
        rate: tokens per second that it would decode, at the usual share of the bandwidth; None without a chip.
    """

    plan: Plan
    context: int
    rate: float | None


def find_chip(name: str) -> Chip:
    """The chip of that name, however its letters, spaces and signs are written.

    Raises:
        BadInput: when there is none, with the nearest names.
    """
    for chip in CHIPS:
        if letters(chip.name) == letters(name):
            return chip
    raise BadInput(f"No chip is called {name!r}.", did_you_mean(name.strip(), [chip.name for chip in CHIPS], 3))


def parse_machine(text: str) -> Machine:
    """The machine that a text names: a chip and a memory in any order, or a memory alone.

    "M4 Pro 48GB", "48 GiB, m4-pro" and "Apple M4 Pro 48" are one. Of a chip that is sold with one memory,
    that need not be said. A chip that is sold with two bandwidths is told by its memory.

    Raises:
        BadInput: when there is no such chip, no memory is named, or the chip is not sold with it.
    """
    if _OTHER_UNIT.search(text):
        raise BadInput(f"{text!r} names a memory in another unit than GB.", 'An example: "M4 Pro 48GB".')
    pattern = _MEMORY if _MEMORY.search(text) else _BARE
    memories = {int(found) for found in pattern.findall(text)}
    if len(memories) > 1 or any(not 1 <= memory <= _MOST_MEMORY for memory in memories):
        raise BadInput(f"{text!r} does not name the memory of one machine.", 'An example: "M4 Pro 48GB".')
    name = _IDLE_WORDS.sub(" ", pattern.sub(" ", text)).strip(" ,;:/-")
    if not name and not memories:
        raise BadInput(f"{text!r} names neither a chip nor a memory.", 'An example: "M4 Pro 48GB".')
    if not name:
        return Machine(None, memories.pop())
    chip = find_chip(name)
    if not memories:
        if len(chip.memory) > 1:
            raise BadInput(
                f"The {chip.name} is sold with {_sizes(chip)}.",
                f'Say how much it has: "{chip.name} {chip.memory[0]}GB".',
            )
        return Machine(chip, chip.memory[0])
    return Machine(_sold_with(chip, memory := memories.pop()), memory)


def _sold_with(chip: Chip, memory: int) -> Chip:
    """The chip, or that of the same name with fewer cores, that is sold with so much memory."""
    kin = [chip, *(other for other in CHIPS if other.name.startswith(f"{chip.name},"))]
    for each in kin:
        if memory in each.memory:
            return each
    sold = "; ".join(f"the {each.name} with {_sizes(each)}" for each in kin)
    raise BadInput(f"No {chip.name} with {memory} GB is known.", f"Sold are {sold}. The memory alone will do, too.")


def _sizes(chip: Chip) -> str:
    *others, last = [str(memory) for memory in chip.memory]
    return f"{', '.join(others)} or {last} GB" if others else f"{last} GB"


def fitting(
    entries: Iterable[Entry], machine: Machine, plugins: Plugins
) -> tuple[Mapping[str, tuple[Fit, ...]], Mapping[str, str]]:
    """What fits of each entry, by every recipe and its own contract; and of those of which nothing does, why.

    Raises:
        PluginError: as `plan` does.
    """
    found: dict[str, tuple[Fit, ...]] = {}
    reasons: dict[str, str] = {}
    for entry in entries:
        try:
            plans, _ = plans_by_recipe(BuildRequest(entry.name, dry=True), plugins)
        except BadInput as error:
            reasons[entry.name] = error.message
            continue
        fits = [_fit(made, machine) for made in plans.values()]
        found[entry.name] = tuple(fit for fit in fits if fit.context)
        if not found[entry.name]:
            least = min(plans.values(), key=lambda made: made.resident)
            reasons[entry.name] = f"the smallest, {least.design.recipe.name}, is {size(least.asset)} of asset alone"
    return found, reasons


def _fit(plan: Plan, machine: Machine) -> Fit:
    rate = None if machine.chip is None else tokens_per_second(plan.read, machine.chip.bandwidth, EFFICIENCY)
    return Fit(plan, plan.context_within(machine.gpu_bytes), rate)
