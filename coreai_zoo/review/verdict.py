"""The verdict on a difference: what kind of change it is, and what to run next."""

from __future__ import annotations

from attrs import frozen

from coreai_zoo.errors import listing
from coreai_zoo.review.diff import GRAPH, NUMERICS, SIGNATURE, WEIGHTS, Difference

KINDS = {
    "none": "nothing that was compared has changed",
    "metadata": "what is computed is the same, and only what is said about it has changed",
    "graph": "the graph changed, and not one bit of what comes out did: a numerics-neutral graph change",
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
        unseen: what was not looked at although a change may show there, as the rest of a sentence.
        beyond: those that look at it.
    """

    verify: tuple[str, ...] = ()
    gate: tuple[str, ...] = ()
    goldens: tuple[str, ...] = ()
    unseen: str = ""
    beyond: tuple[str, ...] = ()


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


def judge(difference: Difference, commands: Next) -> ChangeVerdict:
    """Say what kind of change a difference is."""
    changed = [section for section in difference.sections if section.changes]
    about = {section.about for section in changed}
    missing = next((section.missing for section in difference.sections if section.about == NUMERICS), None)
    goldens = commands.goldens if GRAPH in about else ()
    if any(section.name.startswith(SIGNATURE) for section in changed):
        return ChangeVerdict("signature", KINDS["signature"], (*commands.verify, *commands.gate, *goldens))
    if NUMERICS in about:
        return ChangeVerdict("numerics", KINDS["numerics"], (*commands.gate, *goldens))
    if GRAPH in about and missing is not None:
        reason = f"the graph changed, and whether other numbers come out was not seen: {missing}"
        return ChangeVerdict("numerics", reason, (*commands.gate, *goldens))
    if WEIGHTS in about:
        seen = "no logit did where both were run" if missing is None else f"logits were not compared: {missing}"
        return ChangeVerdict("weights", f"{KINDS['weights']}, and {seen}", (*commands.gate, *goldens))
    if GRAPH in about:
        return ChangeVerdict("graph", KINDS["graph"], goldens or commands.verify)
    if changed:
        names = listing([section.name for section in changed])
        return ChangeVerdict("metadata", f"{KINDS['metadata']}: {names}", commands.verify)
    return ChangeVerdict("none", KINDS["none"] + commands.unseen, commands.beyond)
