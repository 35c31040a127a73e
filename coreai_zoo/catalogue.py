"""The entries of all plugins: what there is to build."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coreai_zoo.entry import Entry, load_entry
from coreai_zoo.errors import BadInput, PluginError, listing

if TYPE_CHECKING:
    from coreai_zoo.plugins import Plugins


def load_entries(plugins: Plugins) -> Mapping[str, tuple[Entry, str]]:
    """Every entry of every plugin, by name, each with the name of the plugin that brought it.

    Raises:
        BadInput: when an entry file is bad; the plugin is named.
        PluginError: when two files have one name, naming both plugins and files.
    """
    entries: dict[str, tuple[Entry, str]] = {}
    files: dict[str, Path] = {}
    for plugin, path in plugins.entries():
        with plugins.attribute_errors(plugin, "zoo_entries"):
            entry = load_entry(path)
        if entry.name in entries:
            raise PluginError(
                f"the entry {entry.name!r} is there twice: from plugin {entries[entry.name][1]!r} "
                f"({files[entry.name]}) and from plugin {plugin!r} ({path}).",
                "Rename one, or uninstall one of the plugins.",
            )
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
    """
    if name.endswith(".toml"):
        return load_entry(Path(name)), f"none: the file {name}"
    entries = load_entries(plugins)
    if name in entries:
        return entries[name]
    near = difflib.get_close_matches(name.lower(), entries, n=3, cutoff=0.5)
    if near:
        hint = f"Did you mean {' or '.join(near)}?"
    elif entries:
        hint = f"There are: {listing(list(entries))}."
    else:
        hint = "No plugin brings any entry: `zoo plugins` shows what is installed."
    raise BadInput(f"no entry is called {name!r}.", hint)
