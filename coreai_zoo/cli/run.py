"""`zoo run`: text from a bundle."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from coreai_zoo.backend import Interpreting
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import find_bundle
from coreai_zoo.cli.completion import complete_bundle
from coreai_zoo.commands import Number, plugins_of
from coreai_zoo.engine import PREFILL
from coreai_zoo.progress import Reporter

if TYPE_CHECKING:
    from coreai_zoo.bundle.generate import Pace


@click.command("run")
@click.argument("bundle", metavar="BUNDLE", shell_complete=complete_bundle)
@click.option("-p", "--prompt", required=True, help="Text to continue.")
@click.option("-n", "--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="At most so many.")
@click.option("--chat", is_flag=True, help="Treat the prompt as a user's message, in the bundle's chat template.")
@click.option("--temperature", type=Number(0), default=0.0, show_default=True, help="0: most probable token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampler.")
@click.pass_context
def run(
    ctx: click.Context, bundle: str, prompt: str, new_tokens: int, chat: bool, temperature: float, seed: int
) -> None:
    """Generate text with a bundle, on the runtime of this machine.

    On Linux that is a slow CPU interpreter: fine for samples and slices. BUNDLE is a path or a name, as for `zoo
    gate`. The prompt is read as an engine reads it: by the bundle's function `prefill` where it has one, all but the
    last token. It is printed once it has been read, and the answer as it comes. How fast both went is told at the end,
    on stderr.

    \b
    Example:
        zoo run qwen3.6-27b --chat -p "Hello!"
        zoo run exports/qwen3_6_27b_sample_decode_int8hu_block32_sym -p "def main(" -n 40
    """
    from coreai_zoo.bundle.generate import Pace, Sampling, chat_prompt, generate
    from coreai_zoo.bundle.verify import backend_of, require_asset

    plugins = plugins_of(ctx)
    opened = Bundle.open(find_bundle(bundle, plugins))
    backend = backend_of(opened, plugins.backends())
    require_asset(opened)
    pace, shown = Pace(), "" if chat else prompt
    read = chat_prompt(opened, prompt) if chat else prompt
    report = Reporter(silent=not _shows_progress())
    _print(shown, generate(opened, backend, read, new_tokens, Sampling(temperature, seed), pace, report))
    for line in _rates(pace):
        click.echo(line, err=True)
    if sys.platform != "darwin" or isinstance(backend, Interpreting):
        click.echo("An interpreter ran this: its rates say nothing about a Mac.", err=True)


def _shows_progress() -> bool:
    return sys.stderr.isatty()


def _print(prompt: str, pieces: Iterator[str]) -> None:
    """Print the prompt and what follows, once there is something: whatever goes wrong before, nothing is printed."""
    first = next(pieces, "")
    try:
        for text in itertools.chain((prompt, first), pieces):
            click.echo(text, nl=False)
            sys.stdout.flush()
    finally:
        click.echo()


def _rates(pace: Pace) -> Iterator[str]:
    """Prompt and answer apart, a line each."""
    calls = _counted(pace.prefill_calls, "call")
    by = f"all but the last token by {PREFILL} in {calls}" if pace.prefill_calls else "token by token"
    yield f"prompt: {_rate(pace.prompt_tokens, 'token', pace.prompt_seconds)}, {by}"
    # The first token of an answer takes no step, and the token that ends it is not one of its own.
    if pace.steps:
        took = f"; {_rate(pace.steps, 'step', pace.answer_seconds)}"
    else:
        took = ", which came with the prompt: no rate" if pace.answer_tokens else ": it ended at once"
    yield f"answer: {_counted(pace.answer_tokens, 'token')}{took}"


def _rate(count: int, what: str, seconds: float) -> str:
    return f"{_counted(count, what)} in {seconds:.2f} s, {count / seconds:.1f} {what}s/s"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
