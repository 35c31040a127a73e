"""`zoo show`: everything that is known of a model."""

from __future__ import annotations

from typing import Any

import attrs
import click

from coreai_zoo.build.design import Design, design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.build.source import find_subject
from coreai_zoo.catalogue import find_entry, find_recipe
from coreai_zoo.cli.completion import complete_entry
from coreai_zoo.commands import json_option, plugins_of, print_json, print_rows, say_next
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, argument, zoo_command
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.recipes import QuantizationSpec, Rule, stored_text


@click.command("show")
@click.argument("model", shell_complete=complete_entry)
@json_option
@click.pass_context
def show(ctx: click.Context, model: str, as_json: bool) -> None:
    """Everything that is known of a model.

    MODEL is an entry, a repository on the Hugging Face hub, of which config.json and the index are fetched, or a
    folder. What is not known is not shown, nor guessed; an entry is `unverified` until its facts and revision were
    compared with the published checkpoint. The recipe's table says how a weight of each role is stored.

    \b
    Example:
        zoo show qwen3.6-27b
        zoo show ~/a-checkpoint
    """
    plugins = plugins_of(ctx)
    entry = find_subject(model, plugins).entry
    if entry is None:
        found = design(BuildRequest(model, dry=True), plugins, report=Reporter(silent=as_json))
        known, rows, facts, stored = _of_checkpoint(found), _rows_of_checkpoint(found), found.facts, _stored(found)
        title, name = found.label, found.recipe.name
    else:
        stored = _recipe_by_role(entry, plugins)
        plugin = find_entry(model, plugins)[1] if model.endswith(".toml") else find_entry(entry.name, plugins)[1]
        known, rows, facts = (
            {**attrs.asdict(entry), "plugin": plugin},
            _rows_of_entry(entry, plugin),
            entry.facts.stated,
        )
        title, name = entry.name, entry.recipe
    if as_json:
        print_json({**known, "facts": dict(facts), "recipe_by_role": stored})
        return
    print_rows(rows, title=title)
    print_rows([(fact, _plain(value)) for fact, value in facts.items()], title="facts")
    print_rows([(role, spec or "not quantized") for role, spec in stored.items()], title=f"recipe {name}")
    say_next("see what it needs", zoo_command("plan", argument(model)))


def _recipe_by_role(entry: Entry, plugins: Plugins) -> dict[str, str | None]:
    """How a weight of each role is stored; of an entry that states too little to know its roles, each rule."""
    recipe = find_recipe(entry.recipe, plugins)
    try:
        return _stored(design(BuildRequest(entry.name, dry=True), plugins, entry))
    except BadInput:
        return {str(rule).removeprefix("role "): _undecided(rule) for rule in recipe.rules}


def _undecided(rule: Rule) -> str | None:
    """How a rule stores its weights while no config is at hand, by which an overlay decides."""
    if rule.overlay_decides and rule.spec is not None:
        return f"{rule.spec.dtype}, as the overlay decides when it sees a config"
    return None if rule.spec is None else str(rule.spec)


def _stored(found: Design) -> dict[str, str | None]:
    return {role: _text(specs) for role, specs in found.weights.stored_as().items()}


def _text(specs: tuple[QuantizationSpec | None, ...]) -> str | None:
    return None if specs == (None,) else stored_text(specs)


def _rows_of_entry(entry: Entry, plugin: str) -> list[tuple[str, object]]:
    return [
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


def _of_checkpoint(found: Design) -> dict[str, Any]:
    return {
        "name": found.label,
        "model_type": [found.model.model_type],
        "origin": attrs.asdict(found.source.origin),
        "licence": found.source.licence.id,
        "recipe": found.recipe.name,
        "contract": found.contract.name,
        "overlay": found.model.overlay.name,
        "plugin": found.model.plugin,
        "notes": list(found.notes),
    }


def _rows_of_checkpoint(found: Design) -> list[tuple[str, object]]:
    return [
        ("origin", found.source.origin),
        ("model type", found.model.model_type),
        ("licence", found.source.licence.id or "unknown"),
        ("recipe", found.recipe.name),
        ("contract", found.contract.name),
        ("max context", found.max_context),
        ("overlay", f"{found.model.overlay.name} of plugin {found.model.plugin}"),
        *(("note", note) for note in found.notes),
    ]


def _plain(value: object) -> object:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
