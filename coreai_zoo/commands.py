"""What a subcommand of `zoo` is built from, the host's or a plugin's: options, tables, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from coreai_zoo.plugins import Plugins, default_plugins

if TYPE_CHECKING:
    from rich.table import Table


def plugins_of(ctx: click.Context) -> Plugins:
    """The installed plugins, or those that a test passed as `obj`."""
    given = ctx.find_object(Plugins)
    return given if given is not None else default_plugins()


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(value: object) -> None:
    """Print `value` for a program; what JSON does not know is printed as text."""
    click.echo(json.dumps(value, indent=2, default=str))


def new_table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the style of every command."""
    from rich import box
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    if table.columns:
        table.columns[0].no_wrap = True  # the name that the row is about is never cut
    return table


def print_table(table: Table) -> None:
    """Print a table: as wide as the terminal, or as it wants where there is none."""
    from rich.console import Console

    # A pipe has no width: give the table what it wants rather than cut a line that a program will read.
    width = None if sys.stdout.isatty() else 200
    # Names, paths and messages are printed as they are: "[...]" in them is no markup.
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)


def print_rows(rows: Sequence[tuple[str, object]], title: str | None = None) -> None:
    """Print pairs of a name and a value as a table without a header."""
    table = new_table("", "", title=title)
    table.show_header = False
    for name, value in rows:
        table.add_row(name, str(value))
    print_table(table)
