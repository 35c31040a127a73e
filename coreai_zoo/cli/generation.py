"""What the commands have in common that have a bundle write: options of sampling, and what is told of its rates."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from coreai_zoo.backend import Backend, Interpreting
from coreai_zoo.commands import Number
from coreai_zoo.engine import PREFILL

if TYPE_CHECKING:
    from coreai_zoo.bundle.bundle import Bundle
    from coreai_zoo.bundle.generate import Pace
    from coreai_zoo.bundle.sampling import Sampling

_Command = TypeVar("_Command", bound=Callable[..., object])

_OPTIONS = (
    click.option("--temperature", type=Number(0), help="0: the most probable token."),
    click.option(
        "--top-p", type=Number(0, min_open=True, max=1), help="Sample of these most probable tokens together."
    ),
    click.option("--top-k", type=click.IntRange(0), help="Sample of so many tokens at most; 0: of all."),
    click.option("--min-p", type=Number(0, 1), help="Sample of tokens with this part of the highest probability."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the sampler."),
)
_NAMES = ("temperature", "top_p", "top_k", "min_p")


def sampling_options(command: _Command) -> _Command:
    """Give a command the options of sampling, whose defaults are the checkpoint's; see `chosen_sampling`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chosen_sampling(bundle: Bundle, options: dict[str, Any]) -> tuple[Sampling, list[str]]:
    """The sampling that the options of a command ask for, and what there is to say of its defaults, a sentence each.

    Args:
        bundle: says what its checkpoint says.
        options: the values of `sampling_options`; None for what was not given.
    """
    from coreai_zoo.bundle.sampling import sampling_of, sentence, stated_by

    stated = stated_by(bundle)
    given = {name: options[name] for name in _NAMES if options[name] is not None}
    sampling = sampling_of(stated.values, given, options["seed"])
    said = sentence(sampling, stated.values, given)
    return sampling, [*(f"{fault}." for fault in stated.faults), *([said] if said else [])]


def shows_progress() -> bool:
    """Whether there is somebody to watch how far a prompt is read."""
    return sys.stderr.isatty()


def rates(pace: Pace) -> Iterator[str]:
    """Prompt and answer apart, a line each."""
    calls = _counted(pace.prefill_calls, "call")
    by = f"all but the last token by {PREFILL} in {calls}" if pace.prefill_calls else "token by token"
    before = ""
    if pace.held:
        before = f", behind {_counted(pace.held, 'token')} that the states hold"
    elif pace.forgotten:
        before = ", all of the conversation: it does not begin with what the states had read"
    yield f"prompt: {_rate(pace.prompt_tokens, 'token', pace.prompt_seconds)}, {by}{before}"
    if pace.reason == "interrupted" and not pace.answer_tokens:
        yield "answer: none, for you ended it"
        return
    # The first token of an answer takes no step, and the token that ends it is not one of its own.
    if pace.steps:
        took = f"; {_rate(pace.steps, 'step', pace.answer_seconds)}"
    else:
        took = ", which came with the prompt: no rate" if pace.answer_tokens else ": it ended at once"
    yield f"answer: {_counted(pace.answer_tokens, 'token')}{took}{_ENDS.get(pace.reason, '')}"


_ENDS: Mapping[str | None, str] = MappingProxyType(
    {"length": "; cut there, as --max-tokens says", "stop-text": "; ended before the text of a --stop"}
)
"""What is said of the end of an answer that its model did not end itself; a full context takes a sentence."""


def rate(count: int, seconds: float) -> float | None:
    """So many a second; None where there was nothing to measure."""
    return count / seconds if count and seconds else None


def _rate(count: int, what: str, seconds: float) -> str:
    a_second = rate(count, seconds)
    shown = "no rate" if a_second is None else f"{a_second:.1f} {what}s/s"
    return f"{_counted(count, what)} in {seconds:.2f} s, {shown}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def interpreter_note(backend: Backend) -> str:
    """That rates of this machine are not those of a device, as a sentence; empty where they are."""
    if sys.platform == "darwin" and not isinstance(backend, Interpreting):
        return ""
    return "An interpreter runs this: its rates say nothing about a Mac."
