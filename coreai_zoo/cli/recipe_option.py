"""The option `--recipe` of every command that designs a bundle, and the recipes that do not fit a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from coreai_zoo.cli.completion import complete_recipe
from coreai_zoo.commands import print_text


def recipe_option(help_: str, *names: str, multiple: bool = False) -> Callable[[Any], Any]:
    """The option, which takes the name of a recipe or a file.

    Args:
        help_: what it is for.
        names: of the parameter, where that is not `recipe`.
        multiple: whether it may be repeated.
    """
    return click.option("--recipe", *names, metavar="R", multiple=multiple, help=help_, shell_complete=complete_recipe)


def print_misfits(misfits: Mapping[str, str]) -> None:
    """Say of each recipe that does not fit a model why."""
    for name, reason in misfits.items():
        print_text(f"\n{name} is not for this model: {reason}")
