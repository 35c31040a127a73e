"""Entries written from a checkpoint's `config.json`: `zoo new`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from coreai_zoo.build.design import design
from coreai_zoo.build.model import Model, compare_facts, read_model
from coreai_zoo.build.request import DEFAULT_CONTEXT, DEFAULT_CONTRACT, DEFAULT_RECIPE, BuildRequest
from coreai_zoo.build.source import Source, find_source, find_subject
from coreai_zoo.catalogue import load_entries
from coreai_zoo.checkpoint.folder import CONFIG
from coreai_zoo.entry import Entry, Sample, load_entry
from coreai_zoo.errors import BadInput
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.toml_files import toml_lines

ENTRIES = Path("zoo_entries")
"""The folder that entries go to where there is one."""

_NOT_A_VALUE = "?"  # stands for a field's value to see whether anything reads it


def locate(text: str, plugins: Plugins, report: Reporter) -> tuple[Source, Entry | None]:
    """The checkpoint that `text` names, and its entry if it has one; of a repository config and index are fetched.

    Raises:
        BadInput: when it names none.
        EnvironmentLacks: when the hub cannot be reached.
    """
    subject = find_subject(text, plugins)
    return find_source(subject, BuildRequest(text, dry=True), plugins, report), subject.entry


# ---------------------------------------------------------------------------------------------------------------------
# The entry
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Draft:
    """An entry that is not written yet, and what was found on the way.

    Attributes:
        name: name of the entry.
        text: content of the file.
        model: what the overlay makes of the config.
        unread: fields of the config that the overlay does not look at.
        weights: whether the headers of the weights fit: None without weights, else a phrase.
        fits: False when there are weights and they do not fit.
        twin: an entry whose every fact this model has, or None.
        unknown: what the entry leaves out because it is not known.
    """

    name: str
    text: str
    model: Model
    unread: tuple[str, ...]
    weights: str | None
    fits: bool
    twin: Entry | None
    unknown: tuple[str, ...]


def draft(name: str, source: Source, plugins: Plugins, like: Entry | None = None) -> Draft:
    """The draft of the entry `name` for a checkpoint.

    Args:
        name: of the entry.
        source: the checkpoint.
        plugins: for overlays and entries.
        like: the entry that the checkpoint is of, where that is known.

    Raises:
        BadInput: when there is such an entry, the name is that of a file, nobody claims the architecture, or its
            overlay cannot use the config.
    """
    entries = load_entries(plugins)
    if name in entries:
        raise BadInput(f"There is an entry {name!r} already, from plugin {entries[name][1]!r}.", "Choose another name.")
    if name.endswith(".toml"):
        raise BadInput(f"{name!r} would always be taken for a file.", "Choose a name without .toml.")
    model = read_model(source.hf_config, plugins)
    twin = like or next((entry for entry, _ in entries.values() if _is_twin(entry, model)), None)
    weights, fits = _weights(source, plugins)
    stated = {"hf_id": source.origin.hf_id, "hf_revision": source.origin.revision, "licence": source.licence.id}
    if like is not None and source.directory is None:  # nothing was looked at but the entry
        stated = {key: getattr(like, key) for key in stated}
    return Draft(
        name=name,
        text=_toml(name, source, model, stated, twin.sample if twin else None),
        model=model,
        unread=tuple(unread_fields(model)),
        weights=weights,
        fits=fits,
        twin=twin,
        unknown=tuple(what for what, value in stated.items() if value is None),
    )


def _is_twin(entry: Entry, model: Model) -> bool:
    return model.model_type in entry.model_type and not compare_facts(entry, model.facts)


def _weights(source: Source, plugins: Plugins) -> tuple[str | None, bool]:
    """What the headers of the weights or their index say, and whether the overlay's table fits them."""
    if source.directory is None:
        return None, True
    try:
        found = design(BuildRequest(checkpoint=source.directory, dry=True), plugins, source=source)
        tensors = source.tensors(found.opened)
    except BadInput as error:
        return str(error), False
    if tensors is None:
        return None, True
    dropped = len(found.weights.dropped)
    return f"all {len(tensors)} tensors have a place; {dropped} are left out on purpose", True


def _toml(name: str, source: Source, model: Model, stated: Mapping[str, str | None], sample: Sample | None) -> str:
    facts = {fact: value for fact, value in model.facts.items() if isinstance(value, bool | int | float | str)}
    called = source.origin.hf_id or (source.directory.resolve().name if source.directory else name)
    context = min(DEFAULT_CONTEXT, int(model.facts["max_context_length"]))
    first = ("ffn", "parameters", "layers", "hidden_size", "vocab_size", "max_context_length")
    ordered = {fact: facts[fact] for fact in (*first, *facts) if fact in facts}
    head = {
        "name": name,
        "title": called.rpartition("/")[2],
        "summary": f"A {facts['ffn']} model of {facts['layers']} layers.",
        "model_type": [model.model_type],
        **{key: value for key, value in stated.items() if value is not None},
        "recipe": DEFAULT_RECIPE,
        "contract": DEFAULT_CONTRACT,
        "status": "unverified",
    }
    sections = [
        f"# Written by `zoo new` from the {CONFIG} of {called}.",
        *toml_lines(head),
        "",
        "[facts]",
        *toml_lines(ordered),
        *(("", "[sample]", *toml_lines({"package": sample.package, "path": sample.path})) if sample else ()),
        "",
        "[bundle]",
        *toml_lines({"max_context": context}),
    ]
    return "\n".join(sections) + "\n"


def write_draft(draft: Draft, folder: Path | None, *, force: bool) -> Path:
    """Write an entry into `folder`, once it has been read back as a build will read it; the path of the file.

    Args:
        draft: the entry.
        folder: where to; None for `ENTRIES` where there is one, else the working directory.
        force: whether to replace a file that is there.

    Raises:
        BadInput: when the file is there already, is no valid entry, or cannot be written.
    """
    if folder is None:
        folder = ENTRIES if ENTRIES.is_dir() else Path()
    path = folder / f"{draft.name}.toml"
    if os.path.exists(path) and not force:  # noqa: PTH110  # false where the name is too long
        raise BadInput(f"{path} exists.", "Pass --force to replace it, or another folder with -o DIR.")
    if Path(draft.name).name != draft.name:
        raise BadInput(f"{draft.name!r} is not a name but a path.", "Choose the folder with -o DIR.")
    partial = folder / f".{draft.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(draft.text, encoding="utf-8")
        try:
            load_entry(partial)
        except BadInput as error:
            error.message = error.message.replace(str(partial), str(path))
            raise
        partial.replace(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}.", "Choose another folder with -o DIR.") from error
    finally:
        with contextlib.suppress(OSError):  # there is none, or its name was too long for one
            partial.unlink()
    return path


# ---------------------------------------------------------------------------------------------------------------------
# What the overlay looks at
# ---------------------------------------------------------------------------------------------------------------------


def unread_fields(model: Model) -> Iterator[str]:
    """Dotted names of the config's fields that make no difference to what the overlay reads.

    Each field in turn gets a value that cannot be right: where the overlay neither complains nor comes to another
    config, it does not look at the field.
    """
    hf_config = {key: value for key, value in model.hf_config.items() if key != "model_type"}  # the claim looks at it
    yield from _unread(model, hf_config, ())


def _unread(model: Model, fields: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    for key, value in fields.items():
        here = (*path, key)
        if not _matters(model, here):
            yield ".".join(here)
        elif isinstance(value, Mapping):
            yield from _unread(model, value, here)


def _matters(model: Model, path: tuple[str, ...]) -> bool:
    try:
        changed: bool = model.overlay.read_config(_replaced(model.hf_config, path)) != model.config
    except Exception:  # noqa: BLE001  # whatever it raises, it has looked
        return True
    return changed


def _replaced(fields: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    key, *rest = path
    return {**fields, key: _replaced(fields[key], tuple(rest)) if rest else _NOT_A_VALUE}


# ---------------------------------------------------------------------------------------------------------------------
# An architecture that nobody claims
# ---------------------------------------------------------------------------------------------------------------------

# In the order in which a plugin is written; what each is for is its own docstring's first line.
NEEDED_HOOKS = ("zoo_claim_overlay", "zoo_weight_map", "zoo_entries")
USUAL_HOOKS = ("zoo_extra_states", "zoo_layer_rewrites", "zoo_head_quantization")


def is_claimed(hf_config: Mapping[str, Any], plugins: Plugins) -> bool:
    """Whether a plugin claims the config's architecture.

    Raises:
        PluginError: when several do.
    """
    try:
        plugins.claim_overlay(str(hf_config.get("model_type")), hf_config)
    except BadInput:
        return False
    return True
