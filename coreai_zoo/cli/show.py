"""`zoo show`: everything that is known of an entry."""

from __future__ import annotations

import attrs
import click

from coreai_zoo.catalogue import find_entry
from coreai_zoo.commands import json_option, plugins_of, print_json, print_rows
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, listing


def _recipe_by_role(entry: Entry) -> dict[str, str | None]:
    from coreai_zoo.recipes import RECIPES

    if entry.recipe not in RECIPES:
        raise BadInput(
            f"entry {entry.name!r} asks for the recipe {entry.recipe!r}, which does not exist.",
            f"There are: {listing([*RECIPES])}.",
        )
    return {role: None if spec is None else str(spec) for role, spec in RECIPES[entry.recipe].roles.items()}


@click.command("show")
@click.argument("name", metavar="ENTRY")
@json_option
@click.pass_context
def show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Everything that is known of an entry.

    What is not known is not shown, nor guessed; an entry is `unverified` until its facts and revision were compared
    with the published checkpoint. The recipe's table says how a weight of each role is stored; a plugin may have a
    policy of its own for the head, which is known once a checkpoint is there.

    \b
    Example:
        zoo show qwen3.6-27b
    """
    entry, plugin = find_entry(name, plugins_of(ctx))
    recipe = _recipe_by_role(entry)
    if as_json:
        described = attrs.asdict(entry) | {"facts": entry.facts.stated, "plugin": plugin, "recipe_by_role": recipe}
        print_json(described)
        return
    rows: list[tuple[str, object]] = [
        ("title", entry.title),
        ("summary", entry.summary),
        ("checkpoint", f"{entry.hf_id} at {entry.hf_revision or 'an unknown revision'}" if entry.hf_id else "local"),
        ("model types", ", ".join(entry.model_type)),
        ("licence", entry.licence or "unknown"),
        ("status", entry.status),
        ("recipe", entry.recipe),
        ("contract", entry.contract),
        ("max context", entry.bundle.max_context),
        ("sample", f"{entry.sample.path} in {entry.sample.package}" if entry.sample else "none"),
        ("plugin", plugin),
    ]
    print_rows(rows, title=entry.name)
    facts = [
        (fact, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value)
        for fact, value in entry.facts.stated.items()
    ]
    print_rows(facts, title="facts")
    print_rows([(role, spec or "not quantized") for role, spec in recipe.items()], title=f"recipe {entry.recipe}")
