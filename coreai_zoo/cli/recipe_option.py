"""The option `--recipe` of every command that designs a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from coreai_zoo.cli.completion import complete_recipe


def recipe_option(help_: str, *names: str, multiple: bool = False) -> Callable[[Any], Any]:
    """The option, which takes the name of a recipe or a file.

    Args:
        help_: what it is for.
        names: of the parameter, where that is not `recipe`.
        multiple: whether it may be repeated.
    """
    return click.option("--recipe", *names, metavar="R", multiple=multiple, help=help_, shell_complete=complete_recipe)
