"""A bundle by what a user calls it (its path, its own name, or that of what it was built from), and its checkpoint."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from coreai_zoo.bundle.bundle import Bundle, no_bundle_at
from coreai_zoo.bundle.layout import EXPORTS
from coreai_zoo.catalogue import find_entry, load_entries
from coreai_zoo.checkpoint.hub import find_cached
from coreai_zoo.errors import BadInput, ZooError, listing, near_names
from coreai_zoo.json_files import read_object
from coreai_zoo.names import slug
from coreai_zoo.plugins import Plugins

_SHOWN = 6  # of the bundles that one name fits


def find_bundle(text: str, plugins: Plugins) -> Path:
    """The folder that `text` means: a path that exists, or else the one bundle of that name.

    Raises:
        BadInput: when several bundles have that name, listing them, or none, with the nearest names.
    """
    found = named_bundle(text)
    if found is not None:
        return found
    if os.sep in text:
        raise no_bundle_at(text)
    raise BadInput(f"There is no bundle {text!r}, neither here nor in {EXPORTS}/.", _hint(text, plugins))


def named_bundle(text: str) -> Path | None:
    """As `find_bundle`, but None where there is none.

    A bundle's own name is its folder's. Where that fits none, `text` may be the name or title of the entry that it was
    built from, or that model's repository on the hub.

    Raises:
        BadInput: when several bundles have that name, listing them.
    """
    exists = os.path.exists(text)  # noqa: PTH110  # false where a name is too long to be one, which pathlib raises for
    if exists and (os.sep in text or text.startswith(".") or (Path(text) / "metadata.json").is_file()):
        return Path(text)
    there = list(_folders())
    found = [folder for folder in there if folder.name == text] or [
        folder for folder in there if slug(text) in map(slug, _names(folder))
    ]
    if len(found) > 1:
        raise BadInput(
            f"{text!r} fits {len(found)} bundles: {listing([str(folder) for folder in found], _SHOWN)}.",
            "Give the path of one.",
        )
    # A checkpoint's folder that a bundle is named after is not what is meant, unless nothing else can be.
    return found[0] if found else Path(text) if exists else None


def bundle_names() -> list[str]:
    """The names of all bundles that `find_bundle` finds without a path."""
    return list(dict.fromkeys(folder.name for folder in _folders()))


def _folders() -> Iterator[Path]:
    """The bundles below `exports` and in the current folder, each once, hidden ones (half-built) left out."""
    seen = set()
    for parent in (EXPORTS, Path()):
        with contextlib.suppress(OSError):  # there is none, or it may not be looked at
            for folder in sorted(parent.iterdir()):
                if not folder.name.startswith(".") and (folder / "build.json").is_file():
                    if folder.resolve() not in seen:
                        yield folder
                    seen.add(folder.resolve())


def _names(folder: Path) -> list[str]:
    """The names of what a bundle was built from, as its record has them; none of a record that cannot be read."""
    try:
        record = read_object(folder / "build.json")
    except BadInput:
        return []
    # Before schema 2, all of them were the entry's.
    entry, origin = (part if isinstance(part := record.get(key), dict) else {} for key in ("entry", "origin"))
    names = (record.get("label"), record.get("title"), origin.get("hf_id"), *map(entry.get, ("name", "title", "hf_id")))
    return [name for name in names if isinstance(name, str)]


def _hint(text: str, plugins: Plugins) -> str:
    try:
        entries = list(load_entries(plugins))
    except ZooError:  # a broken plugin is no answer to the question which bundle was meant
        entries = []
    for entry in entries:
        if slug(entry) == slug(text):
            return f"Make one: `zoo build {entry}`."
    names = bundle_names()
    # Entries are no bundles: only those are named that may be meant.
    hint = near_names(text, [*names, *entries]) or (f"There are {listing(names)}." if names else "")
    return f"{hint} `zoo build NAME` makes a bundle of an entry.".lstrip()


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint of a bundle
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_of(bundle: Bundle, plugins: Plugins, given: Path | None) -> Path:
    """The folder of the checkpoint that `bundle` was built from: as given, the sample's, or one in the hub's cache.

    Raises:
        BadInput: when it is none of them.
    """
    if given is not None:
        return given
    if bundle.build.get("sample"):
        return find_entry(str(bundle.entry), plugins)[0].sample_directory()
    hf_id, revision = bundle.origin.get("hf_id"), bundle.origin.get("revision")
    cached = find_cached(str(hf_id), str(revision)) if hf_id and revision else None
    if cached is None:
        where, hint = "where it is was not recorded", "Pass it with --checkpoint DIR."
        if fetching := fetch_command(bundle):  # of a streamed build nothing stays
            where = f"{hf_id} at {revision} is not in the Hugging Face cache"
            hint = f"`{fetching}` fetches it; or pass it with --checkpoint DIR."
        raise BadInput(f"The checkpoint of {bundle.directory.name} is not at hand: {where}.", hint)
    return cached


def fetch_command(bundle: Bundle) -> str | None:
    """The command that fetches the checkpoint of `bundle` to where `checkpoint_of` looks; None where no hub has it."""
    hf_id, revision = bundle.origin.get("hf_id"), bundle.origin.get("revision")
    return shlex.join(["hf", "download", str(hf_id), "--revision", str(revision)]) if hf_id and revision else None
