"""What kind of change a difference is, and what to run next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from attrs import frozen

from coreai_zoo.errors import listing
from coreai_zoo.review.diff import GRAPH, NUMERICS, SIGNATURE, WEIGHTS, Difference, Section

KINDS = {
    "none": "nothing that was compared has changed",
    "metadata": "what is computed is the same, and only what is said about it has changed",
    "graph": "the graph changed, and not one bit of a logit did: a numerics-neutral graph change",
    "weights": "stored values or their formats changed",
    "numerics": "other numbers come out",
    "signature": "states or signature changed: what calls this has to change too",
}
"""The kinds of change and what each means, the one that weighs least first."""


@frozen
class Next:
    """Commands that are worth running after a change.

    Attributes:
        verify: those that check the form of B.
        gate: those that judge the numbers of B.
        goldens: those that write the golden graphs, where A and B are the code at two revisions.
    """

    verify: tuple[str, ...] = ()
    gate: tuple[str, ...] = ()
    goldens: tuple[str, ...] = ()


@frozen
class ChangeVerdict:
    """The verdict on a difference.

    Attributes:
        kind: a key of `KINDS`; where several hold, the one that weighs most.
        reason: one sentence without its full stop.
        commands: to run next, in their order; none where there is nothing to do.
    """

    kind: str
    reason: str
    commands: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether anything differs."""
        return self.kind != "none"

    def __str__(self) -> str:
        then = f"Next: {', then '.join(f'`{command}`' for command in self.commands)}." if self.commands else ""
        return f"Verdict: {self.kind}. {self.reason[:1].upper()}{self.reason[1:]}. {then or 'Nothing to do.'}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return attrs.asdict(self)


def judge(found: Difference, commands: Next) -> ChangeVerdict:
    """Say what kind of change a difference is."""
    changed = _names(found, lambda section: bool(section.changes))
    signature = [name for name in changed if name.startswith(SIGNATURE)]
    graph = _names(found, lambda section: bool(section.changes) and section.about == GRAPH)
    weights = _names(found, lambda section: bool(section.changes) and section.about == WEIGHTS)
    numerics = _names(found, lambda section: bool(section.changes) and section.about == NUMERICS)
    missing = next((section.missing for section in found.sections if section.about == NUMERICS), None)
    goldens = commands.goldens if graph else ()
    if signature:
        return ChangeVerdict("signature", KINDS["signature"], (*commands.verify, *commands.gate, *goldens))
    if numerics:
        return ChangeVerdict("numerics", KINDS["numerics"], (*commands.gate, *goldens))
    if graph and missing is not None:
        reason = f"the graph changed, and whether other numbers come out was not seen: {missing}"
        return ChangeVerdict("numerics", reason, (*commands.gate, *goldens))
    if weights:
        seen = "no logit did where both were run" if missing is None else f"logits were not compared: {missing}"
        return ChangeVerdict("weights", f"{KINDS['weights']}, and {seen}", (*commands.gate, *goldens))
    if graph:
        return ChangeVerdict("graph", KINDS["graph"], goldens or commands.verify)
    if changed:
        return ChangeVerdict("metadata", f"{KINDS['metadata']}: {listing(changed)}", commands.verify)
    return ChangeVerdict("none", KINDS["none"], ())


def _names(found: Difference, chosen: Callable[[Section], bool]) -> list[str]:
    return [section.name for section in found.sections if chosen(section)]
