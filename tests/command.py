"""The command line, run in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from coreai_zoo.cli.app import cli
from coreai_zoo.plugins import Plugins


def zoo(*arguments: object, plugins: Plugins | None = None) -> Result:
    """`zoo` with these arguments; with the installed plugins, or with those that are given."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], obj=plugins, prog_name="zoo")
