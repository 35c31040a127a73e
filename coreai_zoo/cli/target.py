"""The option `--target` of every command that has `--contract`."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from coreai_zoo.commands import plugins_of
from coreai_zoo.errors import BadInput, ZooError
from coreai_zoo.systems import System


class _SystemType(click.ParamType[System]):
    """A system by its name and version, `macos27.2`."""

    name = "system"

    def convert(self, value: str | System, param: click.Parameter | None, ctx: click.Context | None) -> System:
        if isinstance(value, System):
            return value
        try:
            return System.parse(value)
        except BadInput as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """The systems that a contract begins with."""
        try:
            contracts = plugins_of(ctx).contracts().values()
        except ZooError:  # a shell shows nothing but completions
            return []
        names = dict.fromkeys(system.target for contract in contracts for system in contract.systems)
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


target_option = click.option(
    "--target",
    type=_SystemType(),
    metavar="SYSTEM",
    help="System of the machine, such as macos27.0, macos27.2, macos15 or ios18: chooses contract and backend where "
    "they are not given, and refuses those that it does not run.",
)
