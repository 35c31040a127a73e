"""`zoo plugins`: which plugins are installed and what each brings."""

from __future__ import annotations

import attrs
import click

from coreai_zoo.catalogue import load_entries
from coreai_zoo.commands import Column, json_option, new_table, plugins_of, print_json, print_table, say_next
from coreai_zoo.errors import zoo_command
from coreai_zoo.plugins import GROUP


@click.command("plugins")
@json_option
@click.pass_context
def list_plugins(ctx: click.Context, as_json: bool) -> None:
    """Which plugins are installed and what each brings.

    \b
    Example:
        zoo plugins
    """
    plugins = plugins_of(ctx)
    entries: dict[str, list[str]] = {}
    for entry, plugin in load_entries(plugins).values():
        entries.setdefault(plugin, []).append(entry.name)
    backends: dict[str, list[str]] = {}
    for plugin, backend in plugins.backends_with_plugins().values():
        backends.setdefault(plugin, []).append(backend.name)
    described = [
        attrs.asdict(info) | {"entries": entries.get(info.name, []), "backends": backends.get(info.name, [])}
        for info in plugins.info()
    ]
    if as_json:
        print_json(described)
        return
    table = new_table("plugin", Column("from", drop=2), "entries", "backends", Column("hooks", drop=1))
    for row in described:
        source = f"{row['distribution']} {row['version']}" if row["distribution"] else row["module"]
        table.add_row(row["name"], source, *(", ".join(row[key]) for key in ("entries", "backends", "hooks")))
    print_table(table)
    if not described:
        click.echo(f"No package advertises a plugin in the entry-point group {GROUP!r}.")
    say_next("see what there is to build", zoo_command("list"))
