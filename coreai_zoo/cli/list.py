"""`zoo list`: what there is to build."""

from __future__ import annotations

import click

from coreai_zoo.catalogue import load_entries
from coreai_zoo.commands import Column, json_option, new_table, plugins_of, print_json, print_table


def _billions(parameters: int | None) -> str:
    return "unknown" if parameters is None else f"{parameters / 1e9:.1f} B"


@click.command("list")
@json_option
@click.pass_context
def list_entries(ctx: click.Context, as_json: bool) -> None:
    """What there is to build.

    \b
    Example:
        zoo list
        zoo list --json | jq '.[].name'
    """
    entries = load_entries(plugins_of(ctx))
    if as_json:
        print_json(
            [
                {
                    "name": entry.name,
                    "ffn": entry.facts.ffn,
                    "parameters": entry.facts.parameters,
                    "recipe": entry.recipe,
                    "contract": entry.contract,
                    "status": entry.status,
                    "plugin": plugin,
                }
                for entry, plugin in entries.values()
            ]
        )
        return
    table = new_table(
        "entry",
        Column("FFN", drop=1),
        Column("parameters", number=True),
        Column("recipe", drop=3),
        Column("contract", drop=4),
        Column("status", drop=2),
        Column("plugin", drop=5),
    )
    for entry, plugin in entries.values():
        row = (entry.facts.ffn, _billions(entry.facts.parameters), entry.recipe, entry.contract, entry.status, plugin)
        table.add_row(entry.name, *row)
    print_table(table)
