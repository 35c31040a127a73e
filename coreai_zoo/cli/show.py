"""`zoo show`: everything that is known of an entry."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import attrs
import click

from coreai_zoo.catalogue import find_entry, find_recipe
from coreai_zoo.commands import json_option, plugins_of, print_json, print_rows
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput
from coreai_zoo.plugins import Plugins
from coreai_zoo.recipes import QuantizationSpec


def _recipe_by_role(entry: Entry, plugins: Plugins) -> dict[str, str | None]:
    """How a weight of each role is stored; of an entry that states too little to know its roles, of each kind."""
    from coreai_zoo.build.design import design
    from coreai_zoo.build.request import BuildRequest

    specs: Mapping[str, QuantizationSpec | None] = find_recipe(entry.recipe, plugins).specs
    with contextlib.suppress(BadInput):
        specs = design(BuildRequest(entry.name, dry=True), plugins, entry).stored_roles
    return {role: None if spec is None else str(spec) for role, spec in specs.items()}


@click.command("show")
@click.argument("name", metavar="ENTRY")
@json_option
@click.pass_context
def show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Everything that is known of an entry.

    What is not known is not shown, nor guessed; an entry is `unverified` until its facts and revision were compared
    with the published checkpoint. The recipe's table says how a weight of each role is stored.

    \b
    Example:
        zoo show qwen3.6-27b
    """
    entry, plugin = find_entry(name, plugins_of(ctx))
    recipe = _recipe_by_role(entry, plugins_of(ctx))
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
