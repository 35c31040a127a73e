"""`zoo chat`: a conversation with a bundle."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click
from attrs import asdict

from coreai_zoo import interruption
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import find_bundle
from coreai_zoo.cache import cache_folder
from coreai_zoo.cli.completion import complete_bundle
from coreai_zoo.cli.generation import chosen_sampling, interpreter_note, rates, sampling_options, shows_progress
from coreai_zoo.commands import Headed, plugins_of, say_next
from coreai_zoo.errors import BadInput, argument, did_you_mean, zoo_command
from coreai_zoo.json_files import write_json
from coreai_zoo.progress import Reporter

if TYPE_CHECKING:
    from coreai_zoo.bundle.conversation import Conversation, Said


@click.command("chat", cls=Headed, headings={"system": "The conversation", "temperature": "Sampling"})
@click.argument("bundle", metavar="BUNDLE", shell_complete=complete_bundle)
@click.option("--system", metavar="TEXT", help="An instruction before all turns.")
@click.option("--no-think", is_flag=True, help="Have the model answer without thinking.")
@click.option("-n", "--max-tokens", type=click.IntRange(1), help="At most so many in an answer.  [default: any number]")
@sampling_options
@click.pass_context
def chat(
    ctx: click.Context, /, bundle: str, system: str | None, no_think: bool, max_tokens: int | None, **options: Any
) -> None:
    """Talk to a bundle, turn by turn, in its own chat template.

    BUNDLE is a path or a name, as for `zoo gate`. An answer comes as it is generated, with thinking dimmed on a
    terminal. Ctrl-C ends the answer and not the conversation; Ctrl-D leaves. A line that begins with a slash is a
    command: /help lists them. How fast prompt and answer went is told after each answer, on stderr. A turn goes on
    from what the last one left in the model's states, so that only what is new is read.

    How tokens are sampled is what the checkpoint says, option by option; where it says nothing, the most probable
    token is taken. Where stdin is no terminal, each of its lines is a message,
    and Ctrl-C ends it all.

    \b
    Example:
        zoo chat qwen3.6-27b
        zoo chat qwen3.6-27b --system "Answer in one sentence." --no-think --temperature 0.7
        zoo chat qwen3.6-27b < messages.txt
    """
    from coreai_zoo.bundle.conversation import Conversation
    from coreai_zoo.bundle.verify import backend_of, require_asset

    plugins = plugins_of(ctx)
    opened = Bundle.open(find_bundle(bundle, plugins))
    backend = backend_of(opened, plugins.backends())
    require_asset(opened)
    sampling, remarks = chosen_sampling(opened, options)
    on_terminal = sys.stdin is not None and sys.stdin.isatty()
    with Conversation.open(opened, backend, sampling, system=system, think=not no_think) as conversation:
        hello = f"{opened.title}, a context of {opened.max_context:,} tokens. /help lists commands, Ctrl-D leaves."
        for line in ([hello] if on_terminal else []) + [*remarks, interpreter_note(backend)]:
            if line:
                click.echo(line, err=True)
        talk = _Talk(conversation, max_tokens, on_terminal=on_terminal)
        for line in _typed() if on_terminal else _piped():
            if not talk.take(line):
                break
    if talk.refused and not on_terminal:  # nobody has seen it
        ctx.exit(BadInput.exit_code)
    say_next("measure how fast it is", zoo_command("bench", argument(bundle)))


# ---------------------------------------------------------------------------------------------------------------------
# What the user says
# ---------------------------------------------------------------------------------------------------------------------


def _piped() -> Iterator[str]:
    for line in sys.stdin or ():
        yield line.rstrip("\r\n")


def _typed() -> Iterator[str]:
    """Lines that are typed, edited and remembered from one conversation to the next."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # Where stdout is a file, what is typed is shown on the terminal nevertheless.
    session: PromptSession[str] = PromptSession(history=_history(), output=create_output(always_prefer_tty=True))
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:  # the line is cleared
            continue
        except EOFError:
            return


def _history() -> Any:
    """The lines of earlier conversations, in a file that nobody else can read; where it cannot be kept, this one's."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = cache_folder() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_APPEND | os.O_CREAT | os.O_RDWR, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


class _Talk:
    """Answers lines, and obeys those that are commands.

    Attributes:
        refused: whether a line had no answer, or could not be obeyed.
    """

    def __init__(self, conversation: Conversation, max_tokens: int | None, *, on_terminal: bool) -> None:
        self._conversation = conversation
        self._max_tokens = max_tokens
        self._on_terminal = on_terminal
        self._saved: set[Path] = set()
        self.refused = False

    def take(self, line: str) -> bool:
        """Answer a line or obey it; whether the conversation goes on."""
        if not line.strip():
            return True
        try:
            if not line.startswith("/"):
                self._answer(line)
                return True
            name, _, argument = line[1:].partition(" ")
            if name in _LEAVE:
                return False
            if name not in _COMMANDS:
                known = [f"/{each}" for each in (*_COMMANDS, *_LEAVE)]
                raise BadInput(f"There is no command /{name}.", f"{did_you_mean(f'/{name}', known)} {_MESSAGE}")
            _COMMANDS[name][2](self, argument.strip())
        except BadInput as error:
            self.refused = True
            click.echo(f"error: {error}", err=True)
        return True

    def _answer(self, message: str) -> None:
        from coreai_zoo.bundle.generate import Limits, Pace

        pace, report = Pace(), Reporter(silent=not shows_progress())
        # Whoever types ends an answer by Ctrl-C. A script that is interrupted ends.
        listening = interruption.noted() if self._on_terminal else nullcontext(lambda: False)
        with listening as interrupted:
            limits = Limits(self._max_tokens, interrupted=interrupted)
            _print(self._conversation.answer(message, limits, pace, report))
        for line in rates(pace):
            click.echo(click.style(line, dim=True), err=True)
        if pace.reason == "context":
            context = self._conversation.bundle.max_context
            click.echo(
                f"The context of {context:,} tokens is full: the answer was cut. /reset begins anew; a bundle that is "
                "built with a larger --max-context has room for more.",
                err=True,
            )

    # -- commands

    def reset(self, _argument: str) -> None:
        """Forget all turns."""
        self._conversation.reset()
        click.echo("All turns are forgotten.", err=True)

    def save(self, argument: str) -> None:
        """Write the conversation to a file."""
        path = Path(argument.removeprefix("-f ").strip()).expanduser()
        if not argument or argument == "-f":
            raise BadInput("/save needs the name of a file.", "Type /save FILE.")
        if path.exists() and path.resolve() not in self._saved and not argument.startswith("-f "):
            raise BadInput(f"{path} is there already.", f"/save -f {path} writes over it.")
        conversation = self._conversation
        content = {
            "bundle": conversation.bundle.directory.name,
            "sampling": asdict(conversation.choose.sampling),
            "messages": conversation.messages,
        }
        try:
            write_json(path, content)
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {error.strerror}.") from error
        self._saved.add(path.resolve())
        turns = len(conversation.turns) // 2
        click.echo(f"{turns} turn{'' if turns == 1 else 's'} saved in {path}.", err=True)

    def system(self, argument: str) -> None:
        """Give another instruction."""
        if not argument:
            click.echo(f"The instruction: {self._conversation.system or 'none'}", err=True)
            return
        self._conversation.instruct(None if argument == "-" else argument)
        kept = ". The turns so far are kept: /reset forgets them." if self._conversation.turns else "."
        click.echo(f"{'No instruction' if argument == '-' else 'Another instruction'} from now on{kept}", err=True)

    def help(self, _argument: str) -> None:
        """List the commands."""
        lines = {f"/{name} {argument}".rstrip(): text for name, (argument, text, _) in _COMMANDS.items()}
        lines[f"/{_LEAVE[0]}"] = "leave, as Ctrl-D does"
        for name, text in lines.items():
            click.echo(f"{name:<16}{text}", err=True)
        click.echo(f"Ctrl-C ends an answer, or clears the line. {_MESSAGE}", err=True)


_COMMANDS = MappingProxyType[str, tuple[str, str, Callable[[_Talk, str], None]]](
    {
        "reset": ("", "forget all turns; the instruction stays", _Talk.reset),
        "save": ("FILE", "write all turns to a JSON file; -f FILE writes over one that is there", _Talk.save),
        "system": ("TEXT", "give another instruction; - takes it away, nothing says what it is", _Talk.system),
        "help": ("", "list the commands", _Talk.help),
    }
)
_LEAVE = ("exit", "quit")
_MESSAGE = "A message that begins with a slash has a space before it."


# ---------------------------------------------------------------------------------------------------------------------
# What is answered
# ---------------------------------------------------------------------------------------------------------------------


def _print(answer: Iterator[Said]) -> None:
    """Print an answer as it comes, thinking dimmed on a terminal; nothing where something is wrong before it begins."""
    begun = False
    try:
        for said in answer:
            begun = True
            click.echo(click.style(said.text, dim=True) if said.thinking else said.text, nl=False)
            sys.stdout.flush()
    finally:
        if begun:
            click.echo()
