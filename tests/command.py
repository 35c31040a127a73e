"""The command line, run in this process."""

from __future__ import annotations

from collections.abc import Iterator

import click
from click.testing import CliRunner, Result

from coreai_zoo.cli.app import COMMANDS, cli
from coreai_zoo.plugins import Plugins


def zoo(*arguments: object, plugins: Plugins | None = None, stdin: str | bytes | None = None) -> Result:
    """`zoo` with these arguments; with the installed plugins, or with those that are given."""
    texts = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli, texts, input=stdin, obj=plugins, prog_name="zoo")


def commands() -> Iterator[click.Command]:
    """Every command of `zoo`."""
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        yield command
