"""Whether a bundle that is asked for is there already, and would come out the same: told without reading a weight.

Everything that determines a bundle is in its build.json, and nearly all of it follows from the design. What does not is
which values the checkpoint holds. Of a commit on the hub that is known; of a folder it is remembered how its files
looked when the bundle was built (name, size, times), outside of the bundle, whose bytes say nothing of this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve

from coreai_zoo.build.design import Design, design
from coreai_zoo.build.record import describe
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.build.source import commit_of
from coreai_zoo.bundle.bundle import Bundle, require_replaceable
from coreai_zoo.bundle.card import CARD
from coreai_zoo.bundle.layout import card_digest
from coreai_zoo.cache import cache_folder
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.tokenizer import tokenizer_files
from coreai_zoo.dates import source_date_epoch
from coreai_zoo.errors import BadInput, PluginError, ZooError, listing
from coreai_zoo.json_files import read_object, write_json
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter

# What of build.json a design without weights does not say, and what is said of the checkpoint, which is compared apart.
_NOT_COMPARED = {"schema", "request", "command", "source", "files", "dropped", "notes", "facts", "tokenizer"}
_OF_CHECKPOINT = {"origin", "licence", "language", "compared", "title"}

_WORDS = {
    "zoo": "the version of the zoo",
    "versions": "the versions of the toolchain",
    "overlay": "the code of the overlay or its rewrites",
    "entry": "the entry",
    "source_date_epoch": "the date (SOURCE_DATE_EPOCH)",
    "max_context": "the context",
    "weights": "how the weights are stored",
    "roles": "how the weights are stored",
    "recipe": "the recipe",
    "functions": "the signature",
    "origin": "what is known of the checkpoint's origin",
    "licence": "what is known of the licence",
    "language": "the languages that its card names",
}


def find_existing(request: BuildRequest, plugins: Plugins, report: Reporter) -> Bundle | None:
    """The bundle that a request asks for, where it is there and a build would give the same; None where none is there.

    Raises:
        BadInput: when there is one that would differ, with everything that differs.
    """
    if request.force:
        return None
    try:
        planned = design(evolve(request, dry=True), plugins, report=report)
    except (BadInput, PluginError):  # the build itself tells it better
        return None
    directory = request.output / planned.name
    if not directory.is_dir() or directory.is_symlink():
        return None
    try:
        bundle = Bundle.open(directory)
    except (ZooError, OSError) as error:
        require_replaceable(directory)
        said = error.message if isinstance(error, ZooError) else f"{error.filename}: {error.strerror}."
        raise BadInput(f"{directory} exists and is no bundle: {said}", _HINT) from error
    differing = [*dict.fromkeys(_differences(bundle, planned))]
    same = _same_checkpoint(bundle, planned, report)
    if same is False:
        differing.append("the checkpoint")
    if differing:
        raise BadInput(f"{directory} is there already, and a build would differ in {listing(differing)}.", _HINT)
    if same is None:
        raise BadInput(
            f"{directory} is there already; whether it was built from these weights is not known, for it was built "
            "elsewhere or what was remembered of it is gone.",
            _HINT,
        )
    return bundle


_HINT = "Pass --force to build it anew, or another folder with -o DIR."


def remember(destination: Path, bundle: Path, checkpoint: Checkpoint) -> None:
    """Remember how the files of a checkpoint looked from which a bundle was built that will be at a path."""
    path = _memory(destination)
    with contextlib.suppress(OSError):  # a cache that cannot be written to costs a build later, not this one
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"build": _build_digest(bundle), "stamps": _stamps(checkpoint)})


# ---------------------------------------------------------------------------------------------------------------------
# What differs
# ---------------------------------------------------------------------------------------------------------------------


def _differences(bundle: Bundle, planned: Design) -> Iterator[str]:
    """What a build of the design would do otherwise than the one that made a bundle, one phrase each."""
    recorded = bundle.build
    today = json.loads(json.dumps({**describe(planned), "source_date_epoch": source_date_epoch()}))
    # Of a commit on the hub nothing can have changed, and the entry alone does not say it.
    of_folder = planned.source.directory is not None and planned.source.hub is None
    for key in sorted((set(today) | set(recorded)) - _NOT_COMPARED - (set() if of_folder else _OF_CHECKPOINT)):
        if today.get(key) != recorded.get(key):
            yield _WORDS.get(key, key)
    yield from _changed_files(bundle)


def _changed_files(bundle: Bundle) -> Iterator[str]:
    """Files of a bundle that are not there, or not as long as they were built."""
    for name, file in bundle.build["files"].items():
        path = bundle.directory / name
        if not path.is_file() or _size(path) != file["bytes"]:
            yield f"{name}, which is damaged"


def _size(path: Path) -> int:
    """Bytes of a file of a bundle; of the card without what a gate has added."""
    return int(card_digest(path.read_bytes())["bytes"]) if path.name == CARD else path.stat().st_size


def _same_checkpoint(bundle: Bundle, planned: Design, report: Reporter) -> bool | None:
    """Whether a bundle was built from the checkpoint that a build would take; None where that is not known."""
    origin, directory = bundle.origin, planned.source.directory
    wanted = commit_of(planned.source, planned.entry, report)
    if wanted is not None:
        return wanted == (origin.get("hf_id"), origin.get("revision"))
    assert directory is not None  # without weights to fetch there is a folder
    checkpoint = Checkpoint.open(directory)
    if any(bundle.build["source"].get(key) != value for key, value in checkpoint.identity().items()):
        return False
    try:
        remembered = read_object(_memory(bundle.directory))
    except BadInput:
        return None
    if remembered.get("build") != _build_digest(bundle.directory):
        return None
    return bool(remembered.get("stamps") == json.loads(json.dumps(_stamps(checkpoint))))


def _memory(bundle: Path) -> Path:
    name = hashlib.sha256(str(bundle.resolve()).encode()).hexdigest()
    return cache_folder() / "built" / f"{name}.json"


def _build_digest(bundle: Path) -> str:
    return hashlib.sha256((bundle / "build.json").read_bytes()).hexdigest()


def _stamps(checkpoint: Checkpoint) -> Mapping[str, Any]:
    config = hashlib.sha256((checkpoint.directory / "config.json").read_bytes()).hexdigest()
    folder = checkpoint.directory
    others = [(path.relative_to(folder).as_posix(), path.stat()) for path in tokenizer_files(folder)]
    return {
        "config": config,
        "files": [header.stamp for header in checkpoint.headers],
        "tokenizer": [(name, status.st_size, status.st_mtime_ns) for name, status in others],
    }
