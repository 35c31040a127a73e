"""What all plugins bring, by name: entries, recipes, contracts, backends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from coreai_zoo.contracts import Contract
from coreai_zoo.entry import Entry, load_entry
from coreai_zoo.errors import BadInput, PluginError, ZooError, did_you_mean
from coreai_zoo.recipe_files import read_recipe
from coreai_zoo.recipes import Recipe

if TYPE_CHECKING:
    from coreai_zoo.backend import Backend
    from coreai_zoo.plugins import Plugins


_T = TypeVar("_T")

# ---------------------------------------------------------------------------------------------------------------------
# Entries
# ---------------------------------------------------------------------------------------------------------------------


def load_entries(plugins: Plugins) -> Mapping[str, tuple[Entry, str]]:
    """Every entry of every plugin, by name, each with the name of the plugin that brought it.

    Raises:
        BadInput: when an entry file is bad, unless that is tolerated; the plugin is named.
        PluginError: when two files have one name, unless that is tolerated, naming both plugins and files.
    """
    entries: dict[str, tuple[Entry, str]] = {}
    files: dict[str, Path] = {}
    for plugin, path in plugins.entries():
        try:
            with plugins.attribute_errors(plugin, "zoo_entries"):
                entry = load_entry(path)
        except ZooError as error:
            plugins.tolerate(error, "zoo_entries")
            continue
        if entry.name in entries:
            dispute = PluginError(
                f"the entry {entry.name!r} is there twice: from plugin {entries[entry.name][1]!r} "
                f"({files[entry.name]}) and from plugin {plugin!r} ({path}).",
                "Rename one, or uninstall one of the plugins.",
            )
            plugins.tolerate(dispute, "zoo_entries", entry.name)
            continue
        entries[entry.name] = (entry, plugin)
        files[entry.name] = path
    return dict(sorted(entries.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> tuple[tuple[str, int], ...]:
    """Sorts names as people do: 9b before 27b."""
    return tuple((text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name))


def find_entry(name: str, plugins: Plugins) -> tuple[Entry, str]:
    """The entry called `name` and the plugin that brought it; or of a file `name`, which no plugin brings.

    Raises:
        BadInput: when there is none, with the nearest names.
        PluginError: when two plugins bring it.
    """
    if name.endswith(".toml"):
        return load_entry(Path(name)), f"none: the file {name}"
    entries = load_entries(plugins)
    plugins.require_undisputed("zoo_entries", name)
    if name in entries:
        return entries[name]
    hint = did_you_mean(name, entries, 3, 0.5)
    if not entries:
        hint = "No plugin brings any entry: `zoo plugins` shows what is installed."
    raise plugins.not_found(f"no entry is called {name!r}.", hint)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes, contracts, backends
# ---------------------------------------------------------------------------------------------------------------------


def is_file(recipe: str | Recipe | None) -> bool:
    """Whether what was asked for is the file of a recipe."""
    return isinstance(recipe, str) and recipe.endswith(".toml")


def recipe_path(name: str) -> Path:
    """The file of a recipe; a home that nobody has stays as it is written."""
    path = Path(name)
    with suppress(RuntimeError):
        path = path.expanduser()
    return path


def find_recipe(name: str | Recipe, plugins: Plugins) -> Recipe:
    """The recipe called `name`, or in a file of that name when it ends with `.toml`; a recipe is found at once.

    Raises:
        BadInput: when there is none, with the nearest names, or the file is bad.
        PluginError: when two plugins bring it.
    """
    if isinstance(name, Recipe):
        return name
    if is_file(name):
        return read_recipe(recipe_path(name))
    if name not in plugins.recipes() and ("/" in name or Path(name).exists()):
        raise BadInput(f"There is no recipe {name!r}.", "The file of a recipe ends in .toml.")
    return _find("recipe", name, plugins.recipes(), plugins)


def find_contract(name: str, plugins: Plugins) -> Contract:
    """The contract called `name`; raises as `find_recipe` does."""
    return _find("contract", name, plugins.contracts(), plugins)


def find_backend(name: str, plugins: Plugins) -> Backend:
    """The backend called `name`; raises as `find_recipe` does."""
    return _find("backend", name, plugins.backends(), plugins)


def _find(kind: str, name: str, there: Mapping[str, _T], plugins: Plugins) -> _T:
    plugins.require_undisputed(f"zoo_{kind}s", name)
    if name in there:
        return there[name]
    raise plugins.not_found(f"There is no {kind} {name!r}.", did_you_mean(name, there, 3, 0.4))
