"""The `zoo` command: the frame that every command runs in.

Answers come without torch: a command's module is imported when it runs, and its line of help stands in `COMMANDS`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.metadata
import io
import os
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from coreai_zoo import __version__, interruption
from coreai_zoo.commands import plugins_of
from coreai_zoo.disk import NO_SPACE, no_space
from coreai_zoo.errors import ZooError, did_you_mean, failure_line, tell_failure_as
from coreai_zoo.plugins import Plugins

COMMANDS: Mapping[str, tuple[str, str]] = types.MappingProxyType(
    {
        "list": ("coreai_zoo.cli.list:list_entries", "What there is to build."),
        "show": ("coreai_zoo.cli.show:show", "Everything that is known of a model."),
        "plan": ("coreai_zoo.cli.plan:plan", "What a bundle would hold, need and run at, from a config alone."),
        "catalogue": (
            "coreai_zoo.cli.catalogue:catalogue",
            "Write everything that could be built as a page, and as JSON.",
        ),
        "recipes": ("coreai_zoo.cli.recipes:recipes", "In what ways weights can be stored."),
        "show-recipe": ("coreai_zoo.cli.recipes:show_recipe", "Print the file of a recipe, ready to be edited."),
        "build": ("coreai_zoo.cli.build:build", "Build a bundle."),
        "new": ("coreai_zoo.cli.new:new", "Write an entry for a checkpoint."),
        "run": ("coreai_zoo.cli.run:run", "Generate text with a bundle, on the runtime of this machine."),
        "chat": ("coreai_zoo.cli.chat:chat", "Talk to a bundle, turn by turn, in its own chat template."),
        "bench": ("coreai_zoo.cli.bench:bench", "Measure how fast a bundle reads and writes on this machine."),
        "gate": ("coreai_zoo.cli.gate:gate", "Compare a bundle with Hugging Face, position by position."),
        "verify": (
            "coreai_zoo.cli.verify:verify",
            "Check a bundle's files, metadata, tokenizer, functions and weights, and, if it is small, real steps.",
        ),
        "sensitivity": (
            "coreai_zoo.cli.sensitivity:sensitivity",
            "Rank a model's weights by what quantizing them costs for each byte that it saves.",
        ),
        "diff": (
            "coreai_zoo.cli.diff:diff",
            "What differs between two bundles, entries, recipes or revisions of the code.",
        ),
        "check": ("coreai_zoo.cli.check:check", "Everything that has to hold before a change is merged."),
        "publish": ("coreai_zoo.cli.publish:publish", "Upload a bundle to the Hugging Face hub, with its card."),
        "plugins": ("coreai_zoo.cli.plugins:list_plugins", "Which plugins are installed and what each brings."),
        "doctor": ("coreai_zoo.cli.doctor:doctor", "What this machine and installation can and cannot do."),
    }
)
"""The host's commands in the order of `zoo --help`: where each is, and its first line of help."""

SECTIONS: Mapping[str, str] = types.MappingProxyType(
    {
        "list": "Find and plan",
        "build": "Build",
        "run": "Use",
        "gate": "Check",
        "publish": "Share",
        "plugins": "This installation",
    }
)
"""By the name of a command the heading in `zoo --help` above it and those that follow it."""

_COMPLETE = "_ZOO_COMPLETE"  # where click's scripts for shells say what they ask for

# ---------------------------------------------------------------------------------------------------------------------
# Frame
# ---------------------------------------------------------------------------------------------------------------------


class ZooGroup(click.Group):
    """Imports a command when it runs, adds those of plugins, and turns errors into one paragraph and an exit code."""

    debug = False

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """The host's commands in their order, then the plugins'."""
        return [*COMMANDS, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now if it is one of the host's."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with plugins' commands added first, and the nearest for a name that is none."""
        self._add_plugin_commands(ctx)
        name, known = click.utils.make_str(args[0]), self.list_commands(ctx)
        if not (ctx.resilient_parsing or name.startswith("-") or name in known):
            ctx.fail(f"No such command {name!r}. {did_you_mean(name, known)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands; only plugins' are loaded for it."""
        self._add_plugin_commands(ctx)
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, (_target, help_line) in COMMANDS.items():
            if name in SECTIONS:
                rows = sections.setdefault(SECTIONS[name], [])
            rows.append((name, help_line))
        of_plugins = [(name, self.commands[name].get_short_help_str(limit=80)) for name in sorted(self.commands)]
        for heading, rows in {**sections, "Commands of plugins": of_plugins}.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands that begin with `incomplete`, without importing them, and the options before a command."""
        self._add_plugin_commands(ctx)
        lines = {name: help_line for name, (_target, help_line) in COMMANDS.items()}
        lines |= {name: self.commands[name].get_short_help_str(limit=80) for name in sorted(self.commands)}
        found = [CompletionItem(name, help=line) for name, line in lines.items() if name.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def _add_plugin_commands(self, ctx: click.Context) -> None:
        # The host's commands are not in `self.commands`, so that holds plugins' only, from this run on.
        self.commands.clear()
        plugins_of(ctx).register_commands(self)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run and exit: 0 fine, 1 a check failed, 2 bad usage or input, 3 the environment lacks something.

        130 stands for an interruption, as in a shell.
        """
        self.debug = False
        tell_failure_as(None)
        if os.environ.get(_COMPLETE, "").endswith("_complete"):
            sys.stderr = io.StringIO()  # a shell that completes shows it in the middle of the line
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except (ZooError, click.ClickException, click.Abort) as error:
            if not standalone_mode or (self.debug and isinstance(error, ZooError)):
                raise
            exit_with(error)
        except OSError as error:
            if error.errno not in NO_SPACE or not standalone_mode or self.debug:
                raise
            exit_with(no_space(error, Path(tempfile.gettempdir())))
        if not standalone_mode:
            return result
        # Without standalone mode, click hands back the code of `ctx.exit(code)`.
        sys.exit(result if isinstance(result, int) else 0)


def exit_with(error: ZooError | click.ClickException | click.Abort) -> NoReturn:
    """End the process with what went wrong in one paragraph, and the exit code that says so."""
    if isinstance(error, click.UsageError):
        error.show()
        sys.exit(2)
    if isinstance(error, click.ClickException):
        click.echo(f"error: {error.format_message()}", err=True)
        sys.exit(2)
    if isinstance(error, ZooError):
        click.echo(failure_line(error), err=True)
        sys.exit(error.exit_code)
    click.echo(failure_line(KeyboardInterrupt()), err=True)  # click turns it into Abort
    sys.exit(interruption.EXIT_CODE)


def _set_debug(ctx: click.Context, _option: click.Parameter, debug: bool) -> None:
    if isinstance(ctx.command, ZooGroup):
        ctx.command.debug = debug


def _leave_out(ctx: click.Context, _option: click.Parameter, names: tuple[str, ...]) -> None:
    if names:
        ctx.obj = Plugins.discover(without=names)


@click.group(
    cls=ZooGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="Example: zoo build qwen3.6-27b --sample",
)
@click.option("--debug", is_flag=True, is_eager=True, expose_value=False, callback=_set_debug, help="Show tracebacks.")
@click.option(
    "--without",
    metavar="PLUGIN",
    multiple=True,
    is_eager=True,
    expose_value=False,
    callback=_leave_out,
    help="Leave out a plugin, a broken one for example; may be repeated.",
)
@click.version_option(__version__, prog_name="zoo")
def cli() -> None:
    """Turn Hugging Face checkpoints into verified Core AI bundles."""


def main() -> NoReturn:
    """Run `zoo` with the arguments of this process."""
    # The interpreter looks for circles among all that torch and a traced decoder are made of once more before it ends.
    atexit.register(gc.freeze)
    cli.main(prog_name="zoo")
    raise AssertionError("main exits by itself in standalone mode")
