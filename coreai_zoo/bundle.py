"""The LanguageBundle on disk: what an engine loads, and the record of how it was made.

<name>/
metadata.json       what Apple's loader parses (metadata_version 0.2)
<name>.aimodel/     the asset; its suffix is the backend's
tokenizer/          the checkpoint's own files
README.md           model card
build.json          everything that determined the bytes, and the SHA-256 of every file
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import field, frozen

from coreai_zoo.card import CARD, without_measurements
from coreai_zoo.checkpoint import member
from coreai_zoo.digest import file_sha256
from coreai_zoo.errors import BadInput, CheckFailed, listing
from coreai_zoo.overlay import Axis, StateSpec, TensorSpec, TraceSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

METADATA_VERSION = "0.2"
BUILD_SCHEMA = 1

# Written after the build, by gates: outside the digest, so that a gated bundle still verifies.
GATE_FOLDER = "gate"

# Registered in swift-transformers, so that a Mac can load them.
TOKENIZER_CLASSES = ("Qwen2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend")

# Classes of newer transformers that engines do not know yet, and the one that the same tokenizer.json works as: the
# engine reads everything else from that file.
_TOKENIZER_ALIASES = {"Qwen3_5Tokenizer": "Qwen2Tokenizer"}

_TOKENIZER_FILES = {
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "chat_template.jinja": False,
    "chat_template.json": False,
    "special_tokens_map.json": False,
    "added_tokens.json": False,
    "vocab.json": False,
    "merges.txt": False,
}


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def source_date_epoch() -> int:
    """Seconds since 1970 that a bundle carries as its date: SOURCE_DATE_EPOCH, else 0, so that rebuilds are equal.

    Raises:
        BadInput: when SOURCE_DATE_EPOCH is no such number.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "0")
    try:
        seconds = int(given)
        build_date(seconds)
    except (ValueError, OverflowError, OSError) as error:
        raise BadInput(f"SOURCE_DATE_EPOCH is {given!r}, not seconds since 1970.") from error
    return seconds


def build_date(seconds: int) -> str:
    """Seconds since 1970 as the date that `metadata.json` carries."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def tokenizer_files(checkpoint: Path) -> list[Path]:
    """The checkpoint's tokenizer files: names that we know, never names that a file gives.

    Raises:
        BadInput: when one is a link that leads out of the checkpoint: what it points to would be published.
    """
    return [member(checkpoint, name, str(checkpoint)) for name in _TOKENIZER_FILES if (checkpoint / name).is_file()]


def check_tokenizer(checkpoint: Path, vocab_size: int) -> dict[str, Any]:
    """Read the checkpoint's `tokenizer_config.json` and check that an engine can use the tokenizer.

    Raises:
        BadInput: when a file is missing or unreadable, the class is unknown to engines, or a token id is out of range.
    """
    missing = [name for name, required in _TOKENIZER_FILES.items() if required and not (checkpoint / name).is_file()]
    if missing:
        raise BadInput(f"{checkpoint} has no {' and no '.join(missing)}.", "A bundle needs the checkpoint's tokenizer.")
    tokenizer_files(checkpoint)
    config = read_object(checkpoint / "tokenizer_config.json")
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if name not in (*TOKENIZER_CLASSES, *_TOKENIZER_ALIASES):
        raise BadInput(
            f"tokenizer_class in {checkpoint / 'tokenizer_config.json'} is {config.get('tokenizer_class')!r}, which "
            f"the runtime does not know.",
            f"It knows {listing(list(TOKENIZER_CLASSES))}.",
        )
    highest = max(load_tokenizer(checkpoint).get_vocab(with_added_tokens=True).values(), default=-1)
    if highest < 0 or highest >= vocab_size:
        raise BadInput(
            f"The tokenizer in {checkpoint} has token ids up to {highest}, but the model's vocabulary is {vocab_size}."
        )
    return config


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in `directory`.

    Raises:
        BadInput: when there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise BadInput(f"{path} cannot be read as a tokenizer: {error}.") from error


def copy_tokenizer(checkpoint: Path, destination: Path) -> None:
    """Copy the checkpoint's tokenizer files to `destination`, its class under a name that engines know."""
    destination.mkdir()
    for path in tokenizer_files(checkpoint):
        shutil.copyfile(path, destination / path.name)
    config = read_object(destination / "tokenizer_config.json")
    alias = _TOKENIZER_ALIASES.get(str(config.get("tokenizer_class", "")).removesuffix("Fast"))
    if alias is not None:
        write_json(destination / "tokenizer_config.json", {**config, "tokenizer_class": alias})


@frozen
class Description:
    """What a bundle says about itself; see `metadata`."""

    name: str
    asset: str
    vocab_size: int
    max_context_length: int
    hf_id: str | None
    hf_revision: str | None
    compression: str
    states: Mapping[str, str]
    date: str
    user_data: Mapping[str, str] = field(factory=dict)


def metadata(description: Description) -> dict[str, Any]:
    """The content of `metadata.json`, as Apple's loader parses it and published bundles carry it."""
    source = {"model_definition": "torch", "hf_model_id": description.hf_id, "hf_revision": description.hf_revision}
    return {
        "metadata_version": METADATA_VERSION,
        "kind": "llm",
        "name": description.name,
        "assets": {"main": description.asset},
        "language": {
            "tokenizer": description.hf_id or description.name,
            "vocab_size": description.vocab_size,
            "max_context_length": description.max_context_length,
            "embedded_tokenizer": True,
            "function_map": {"main": ["main"]},
            "states": dict(description.states),
        },
        "source": {key: value for key, value in source.items() if value is not None},
        "compression": description.compression,
        "compilation": {"date": description.date, "targets": []},
        "user_data": dict(description.user_data),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_sizes(bundle: Path) -> dict[str, int]:
    """Size of every file that `file_digests` looks at, by relative path, without reading one."""
    return {path.relative_to(bundle).as_posix(): path.stat().st_size for path in sorted(_files(bundle))}


def file_digests(bundle: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of the bundle but `build.json` itself and what gates add, by relative path.

    What gates add is their folder, and their block in the card, which is hashed without it.
    """
    digests: dict[str, dict[str, Any]] = {}
    for path in sorted(_files(bundle)):
        if not path.is_file():  # a link to nowhere
            digests[path.relative_to(bundle).as_posix()] = {"bytes": 0, "sha256": None}
            continue
        if path == bundle / CARD:
            built = without_measurements(path.read_bytes())
            digests[CARD] = {"bytes": len(built), "sha256": hashlib.sha256(built).hexdigest()}
            continue
        digests[path.relative_to(bundle).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return digests


def _files(bundle: Path) -> Iterator[Path]:
    for path in bundle.rglob("*"):
        parts = path.relative_to(bundle).parts
        if (path.is_file() or path.is_symlink()) and parts != ("build.json",) and parts[0] != GATE_FOLDER:
            yield path


# ---------------------------------------------------------------------------------------------------------------------
# The function's signature, as build.json records it
# ---------------------------------------------------------------------------------------------------------------------


def signature_record(spec: TraceSpec) -> dict[str, Any]:
    """A `TraceSpec` as JSON."""
    return {
        "inputs": [attrs.asdict(tensor) for tensor in spec.inputs],
        "states": [attrs.asdict(state) for state in spec.states],
        "outputs": [attrs.asdict(tensor) for tensor in spec.outputs],
        "axes": {name: attrs.asdict(axis) for name, axis in spec.axes.items()},
    }


def read_signature(record: Mapping[str, Any]) -> TraceSpec:
    """The `TraceSpec` that `signature_record` wrote."""
    return TraceSpec(
        inputs=tuple(TensorSpec(**tensor) for tensor in record["inputs"]),
        states=tuple(StateSpec(**state) for state in record["states"]),
        outputs=tuple(TensorSpec(**tensor) for tensor in record["outputs"]),
        axes={name: Axis(**axis) for name, axis in record["axes"].items()},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------

# What the commands that take a bundle rely on.
_RECORDED = {
    "name": str,
    "backend": str,
    "layers": int,
    "max_context": int,
    "entry": dict,
    "source": dict,
    "function": dict,
    "files": dict,
}


@frozen
class Bundle:
    """A bundle on disk, its two records read.

    Attributes:
        directory: where it is.
        metadata: content of `metadata.json`.
        build: content of `build.json`.
    """

    directory: Path
    metadata: Mapping[str, Any]
    build: Mapping[str, Any]

    @classmethod
    def open(cls, directory: Path) -> Bundle:
        """Read the records of a bundle.

        Raises:
            BadInput: when `directory` is not a bundle of this zoo.
        """
        if not directory.is_dir():
            raise BadInput(f"There is no bundle at {directory}.", "`zoo build` prints where it put one.")
        absent = [name for name in ("metadata.json", "build.json") if not (directory / name).is_file()]
        if absent:
            raise BadInput(f"{directory} is not a bundle of this zoo: it has no {' and no '.join(absent)}.")
        build = read_object(directory / "build.json")
        if build.get("schema") != BUILD_SCHEMA:
            raise BadInput(f"{directory / 'build.json'} has schema {build.get('schema')!r}, not {BUILD_SCHEMA}.")
        wrong = [key for key, kind in _RECORDED.items() if not isinstance(build.get(key), kind)]
        if wrong:
            raise BadInput(
                f"{directory / 'build.json'} is damaged: {listing(wrong)} missing or of another type.",
                "Build the bundle again.",
            )
        return cls(directory, read_object(directory / "metadata.json"), build)

    @property
    def asset(self) -> Path:
        """The asset that holds the function."""
        try:
            asset = str(self.metadata["assets"]["main"])
        except (KeyError, TypeError):
            raise CheckFailed(f"metadata.json of {self.directory} names no main asset.") from None
        if Path(asset).name != asset:
            raise CheckFailed(f"metadata.json of {self.directory} names the asset {asset!r}, not a plain name.")
        return self.directory / asset

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's directory."""
        return self.directory / "tokenizer"

    @property
    def signature(self) -> TraceSpec:
        """The function's signature as it was built."""
        try:
            signature = read_signature(self.build["function"])
            if not signature.outputs:
                raise ValueError("it has no output")
            return signature
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckFailed(f"build.json of {self.directory} has no readable signature: {error}.") from error

    @property
    def max_context(self) -> int:
        """Positions that the bundle allows."""
        return int(self.build["max_context"])


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        BadInput: when it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a JSON object.")
    return content
