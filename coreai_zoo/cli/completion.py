"""What a shell completes beside commands and options: names of entries and bundles, and files."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from coreai_zoo.bundle.find import bundle_names
from coreai_zoo.catalogue import load_entries
from coreai_zoo.commands import plugins_of
from coreai_zoo.errors import ZooError


def complete_entry(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The entries that begin with `incomplete`, each with its title; where none does, files."""
    try:
        entries = [entry for entry, _plugin in load_entries(plugins_of(ctx)).values()]
    except ZooError:  # a shell shows nothing but completions
        entries = []
    found = [CompletionItem(entry.name, help=entry.title) for entry in entries if entry.name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def complete_recipe(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The recipes that begin with `incomplete`, each with what it does; where none does, files."""
    try:
        recipes = [*plugins_of(ctx).recipes().values()]
    except ZooError:
        recipes = []
    found = [
        CompletionItem(recipe.name, help=recipe.description) for recipe in recipes if recipe.name.startswith(incomplete)
    ]
    return found or [CompletionItem(incomplete, type="file")]


def complete_bundle(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The bundles whose names begin with `incomplete`; where none does, folders."""
    found = [CompletionItem(name) for name in bundle_names() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="dir")]
