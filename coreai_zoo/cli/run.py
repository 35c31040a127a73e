"""`zoo run`: text from a bundle."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import asdict, frozen

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import find_bundle
from coreai_zoo.cli.completion import complete_bundle
from coreai_zoo.cli.generation import (
    chosen_sampling,
    interpreter_note,
    rate,
    rates,
    sampling_options,
    shows_progress,
)
from coreai_zoo.commands import Headed, plugins_of, say_next
from coreai_zoo.errors import BadInput, argument, zoo_command
from coreai_zoo.json_files import read_text
from coreai_zoo.progress import Reporter

if TYPE_CHECKING:
    from coreai_zoo.bundle.generate import Limits, Pace, Piece
    from coreai_zoo.bundle.sampling import Sampling


@click.command(
    "run",
    cls=Headed,
    headings={
        "prompt": "The prompt",
        "max_tokens": "The answer",
        "temperature": "Sampling",
        "as_json": "What is printed",
    },
)
@click.argument("bundle", metavar="BUNDLE", shell_complete=complete_bundle)
@click.option("-p", "--prompt", help="Text to continue.")
@click.option("-f", "--file", type=click.Path(dir_okay=False, path_type=Path), help="A file with that text.")
@click.option("--chat", is_flag=True, help="Treat the prompt as a user's message, in the bundle's chat template.")
@click.option(
    "-n", "--max-tokens", "--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="At most so many."
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print events, one JSON object a line, as they come.")
@click.pass_context
def run(
    ctx: click.Context,
    /,
    bundle: str,
    prompt: str | None,
    file: Path | None,
    max_tokens: int,
    stop: tuple[str, ...],
    chat: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate text with a bundle, on the runtime of this machine.

    On Linux that is a slow CPU interpreter: fine for samples and slices. BUNDLE is a path or a name, as for `zoo
    gate`. The prompt is the text of -p, of a file, or of a pipe, whose last newline does not count. It is read as an
    engine reads it: by the bundle's function `prefill` where it has one, all but the last token. It is printed once
    it has been read, and the answer as it comes. How fast both went is told at the end, on stderr.

    How tokens are sampled is what the checkpoint says, option by option; where it says nothing, the most probable
    token is taken.

    \b
    Example:
        zoo run qwen3.6-27b --chat -p "Hello!"
        zoo run qwen3.6-27b -f story.txt --max-tokens 200 --temperature 0.7 --stop "The end"
        zoo run exports/qwen3_6_27b_sample_decode_int8hu_block32_sym -p "def main(" -n 40
    """
    from coreai_zoo.bundle.generate import Limits, Pace, chat_prompt, generate
    from coreai_zoo.bundle.verify import backend_of, require_asset
    from coreai_zoo.checkpoint.chat_template import find_chat_template

    if "" in stop:
        raise BadInput("--stop is empty.", "Leave it out: it ends an answer before a text that is none.")
    plugins = plugins_of(ctx)
    opened = Bundle.open(find_bundle(bundle, plugins))
    backend = backend_of(opened, plugins.backends())
    text = _prompt(prompt, file)
    require_asset(opened)
    sampling, remarks = chosen_sampling(opened, options)
    limits, pace = Limits(max_tokens, stop), Pace()
    read = chat_prompt(opened, text) if chat else text
    report = Reporter(silent=as_json or not shows_progress())
    pieces = generate(opened, backend, read, limits, sampling, pace, report)
    if as_json:
        _print_events(_Events(opened, limits, sampling, remarks), pieces, pace)
        return
    for remark in remarks:
        click.echo(remark, err=True)
    _print("" if chat else text, (piece.text for piece in pieces))
    for line in (*rates(pace), interpreter_note(backend)):
        if line:
            click.echo(line, err=True)
    if find_chat_template(opened.tokenizer) is None:
        say_next("measure how fast it is", zoo_command("bench", argument(bundle)))
    else:
        say_next("talk to it", zoo_command("chat", argument(bundle)))


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------


def _prompt(text: str | None, file: Path | None) -> str:
    """The prompt, from the one place where there is one.

    Raises:
        BadInput: when there is none, there are two, or it cannot be read.
    """
    if text is not None and file is not None:
        raise BadInput("There are two prompts: one in -p and one in -f.", "Give one of them.")
    if text is not None:
        return text
    if file is not None and str(file) != "-":
        return _without_last_newline(read_text(file, "The prompt"))
    if sys.stdin is None or sys.stdin.isatty():
        raise BadInput("There is no prompt.", 'Give one with -p "...", with -f FILE, or from a pipe.')
    try:
        return _without_last_newline(sys.stdin.buffer.read().decode("utf-8"))
    except (OSError, UnicodeError) as error:
        raise BadInput(f"The prompt on stdin cannot be read as UTF-8 text: {error}.") from error


def _without_last_newline(text: str) -> str:
    """A text without the one newline at its end that editors and `echo` put there."""
    return text.removesuffix("\n").removesuffix("\r")


# ---------------------------------------------------------------------------------------------------------------------
# What is answered
# ---------------------------------------------------------------------------------------------------------------------


def _print(prompt: str, pieces: Iterator[str]) -> None:
    """Print the prompt and what follows, once there is something: whatever goes wrong before, nothing is printed."""
    first = next(pieces, "")
    try:
        for text in itertools.chain((prompt, first), pieces):
            click.echo(text, nl=False)
            sys.stdout.flush()
    finally:
        click.echo()


@frozen
class _Events:
    """What the first event says of a run."""

    bundle: Bundle
    limits: Limits
    sampling: Sampling
    remarks: Sequence[str]

    def start(self) -> dict[str, object]:
        """The first event, without what is known when the prompt has been read."""
        return {
            "bundle": self.bundle.directory.name,
            "max_tokens": self.limits.tokens,
            "max_context": self.bundle.max_context,
            "stop": list(self.limits.texts),
            "sampling": asdict(self.sampling),
            "remarks": list(self.remarks),
        }


def _print_events(events: _Events, pieces: Iterator[Piece], pace: Pace) -> None:
    """Print what happens for a program: `start`, a `token` for each with the text that is certain by then, `end`."""
    _event("start", **events.start())
    for piece in pieces:
        _event("token", id=piece.token, text=piece.text)
    _event(
        "end",
        reason=pace.reason,
        prompt_tokens=pace.prompt_tokens,
        prefill_calls=pace.prefill_calls,
        prompt_seconds=pace.prompt_seconds,
        prompt_rate=rate(pace.prompt_tokens, pace.prompt_seconds),
        answer_tokens=pace.answer_tokens,
        steps=pace.steps,
        answer_seconds=pace.answer_seconds,
        answer_rate=rate(pace.steps, pace.answer_seconds),
    )


def _event(event: str, **fields: object) -> None:
    click.echo(json.dumps({"event": event, **fields}))
    sys.stdout.flush()
