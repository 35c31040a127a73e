"""`zoo recipes` and `zoo show-recipe`: in what ways weights can be stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from coreai_zoo.build.request import DEFAULT_RECIPE, BuildRequest
from coreai_zoo.catalogue import find_recipe, load_entries
from coreai_zoo.cli.completion import complete_entry, complete_recipe
from coreai_zoo.cli.recipe_option import print_misfits
from coreai_zoo.commands import Column, json_option, new_table, plugins_of, print_json, print_table, say_next
from coreai_zoo.dtypes import size
from coreai_zoo.errors import argument, zoo_command
from coreai_zoo.planning.plan import Plan, plans_by_recipe
from coreai_zoo.recipe_files import as_toml, content_of
from coreai_zoo.recipes import Recipe


@click.command("recipes")
@click.argument("model", required=False, shell_complete=complete_entry)
@json_option
@click.pass_context
def recipes(ctx: click.Context, model: str | None, as_json: bool) -> None:
    """In what ways weights can be stored.

    MODEL is an entry, a repository on the hub or a folder: of it the bits per parameter and the bytes are added up.
    Without one, the bits are those of the integers with their scales, the fewest and the most.

    \b
    Example:
        zoo recipes
        zoo recipes qwen3.6-27b
    """
    plugins = plugins_of(ctx)
    known = plugins.recipes()
    plans, misfits = ({}, {}) if model is None else plans_by_recipe(BuildRequest(model, dry=True), plugins)
    if as_json:
        print_json([_described(recipe, plans.get(name), misfits.get(name)) for name, recipe in known.items()])
        return
    _print(known, plans, misfits)
    if model is not None:
        say_next("compare them", zoo_command("plan", argument(model), "--compare"))
    elif DEFAULT_RECIPE in known:
        say_next("write one of your own", f"{zoo_command('show-recipe', DEFAULT_RECIPE)} > mine.toml")


@click.command("show-recipe")
@click.argument("recipe", shell_complete=complete_recipe)
@json_option
@click.pass_context
def show_recipe(ctx: click.Context, recipe: str, as_json: bool) -> None:
    """Print the file of a recipe, ready to be edited.

    An edited copy is taken by --recipe FILE. docs/recipes.md says what each key means.

    \b
    Example:
        zoo show-recipe int8hu > mine.toml
        zoo plan qwen3.6-27b --recipe mine.toml
    """
    found = find_recipe(recipe, plugins_of(ctx))
    if as_json:
        print_json(_described(found, None, None))
    else:
        click.echo(as_toml(found), nl=False)
        model = next(iter(load_entries(plugins_of(ctx))), "MODEL")
        say_next("see what an edited copy gives", zoo_command("plan", model, "--recipe", "mine.toml"))


def _print(known: Mapping[str, Recipe], plans: Mapping[str, Plan], misfits: Mapping[str, str]) -> None:
    columns = [Column("bits", number=True), *([Column("asset", number=True)] if plans else [])]
    table = new_table(
        "recipe", *columns, Column("in a bundle's name", drop=2), "what it does", Column("quality", drop=1)
    )
    for name, recipe in known.items():
        if name in misfits:
            continue
        figures = [f"{plans[name].bits:.2f}", size(plans[name].asset)] if name in plans else [_bits(recipe)]
        table.add_row(name, *figures, recipe.published_name, recipe.description, recipe.quality or "not measured")
    print_table(table)
    print_misfits(misfits)


def _bits(recipe: Recipe) -> str:
    bits = sorted({f"{spec.bits_per_weight:.2f}" for spec in recipe.quantizations}, key=float) or ["16.00"]
    return bits[0] if len(bits) == 1 else f"{bits[0]} to {bits[-1]}"


def _described(recipe: Recipe, plan: Plan | None, misfit: str | None) -> dict[str, Any]:
    figures = {} if plan is None else {"bits": plan.bits, "asset_bytes": plan.asset, "read_per_token": plan.read}
    reason = {} if misfit is None else {"misfit": misfit}
    return {"name": recipe.name, "published_name": recipe.published_name, **content_of(recipe), **figures, **reason}
