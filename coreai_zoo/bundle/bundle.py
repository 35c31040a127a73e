"""A bundle on disk (Apple's LanguageBundle): what an engine loads, and the record of how it was made.

<name>/
metadata.json       what Apple's loader parses (metadata_version 0.2)
<name>.aimodel/     the asset; its suffix is the backend's
tokenizer/          the checkpoint's own files
README.md           model card
build.json          everything that determined the bytes, and the SHA-256 of every file
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

import attrs
from attrs import frozen

from coreai_zoo.bundle.layout import BUILD_SCHEMA
from coreai_zoo.checkpoint.strict_json import read_object
from coreai_zoo.contracts import CONTRACTS
from coreai_zoo.engine import ENGINES, Engine
from coreai_zoo.errors import BadInput, CheckFailed, listing, near_paths
from coreai_zoo.signature import Axis, InputSpec, StateSpec, TensorSpec, TraceSpec

# ---------------------------------------------------------------------------------------------------------------------
# Signatures, as build.json records them
# ---------------------------------------------------------------------------------------------------------------------


def signature_record(spec: TraceSpec) -> dict[str, Any]:
    """A `TraceSpec` as JSON."""
    return {
        "inputs": [attrs.asdict(tensor, filter=lambda _, value: value is not None) for tensor in spec.inputs],
        "states": [attrs.asdict(state) for state in spec.states],
        "outputs": [attrs.asdict(tensor) for tensor in spec.outputs],
        "axes": {name: attrs.asdict(axis) for name, axis in spec.axes.items()},
    }


def read_signature(record: Mapping[str, Any]) -> TraceSpec:
    """The `TraceSpec` that `signature_record` wrote."""
    return TraceSpec(
        inputs=tuple(InputSpec(**tensor) for tensor in record["inputs"]),
        states=tuple(StateSpec(**state) for state in record["states"]),
        outputs=tuple(TensorSpec(**tensor) for tensor in record["outputs"]),
        axes={name: Axis(**axis) for name, axis in record["axes"].items()},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _of_today(build: dict[str, Any]) -> dict[str, Any]:
    """A record in today's schema. In schema 1 a bundle had one function, and its inputs were known by their order."""
    try:
        if build.get("schema") != 1:
            return build
        function = build["function"]
        tokens, positions = function["inputs"]
        fixed = isinstance(positions["shape"][1], int)
        inputs = [{**tokens, "holds": "tokens"}, {**positions, "holds": "new_positions" if fixed else "positions"}]
    except (KeyError, TypeError, ValueError, IndexError):
        return build  # damaged; `open` says so
    return {**build, "schema": BUILD_SCHEMA, "functions": {"main": {**function, "inputs": inputs}}}


# The fields of build.json that the commands which take a bundle rely on.
_RECORDED: Mapping[str, type | tuple[type, ...]] = {
    "name": str,
    "backend": str,
    "layers": int,
    "max_context": int,
    "entry": (dict, NoneType),
    "source": dict,
    "functions": dict,
    "files": dict,
}

# What some of them read where it is there: tables, and of those whose values are tables, the fields of each.
_ALSO: Mapping[str, Mapping[str, type]] = {
    "facts": {},
    "recipe": {},
    "roles": {"name": str, "meaning": str, "kind": str},
    "weights": {"parameters": int},
}


def _wrong(build: Mapping[str, Any]) -> Iterator[str]:
    """What of a record is missing or of another type."""
    yield from (key for key, kind in _RECORDED.items() if key not in build or not isinstance(build[key], kind))
    for key, fields in _ALSO.items():
        table = build.get(key) or {}
        rows = table.values() if isinstance(table, dict) and fields else ()
        whole = all(
            isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in fields.items())
            for row in rows
        )
        if not isinstance(table, dict) or not whole:
            yield key


def no_bundle_at(path: str | Path) -> BadInput:
    """The error for a path that is not there, as it was written."""
    return BadInput(f"There is no bundle at {path}.", near_paths(Path(path)) or "`zoo build` prints where it put one.")


_RECORDS = {
    "build.json": frozenset({"schema", "zoo", "files"}),
    "metadata.json": frozenset({"metadata_version", "kind", "assets"}),
}
"""What every version of the zoo has written into a bundle's records; of a damaged bundle one has to be readable."""

MOVE_AWAY = "Move it away, or choose another folder with -o DIR."


def require_replaceable(directory: Path) -> None:
    """Refuse a folder whose place a bundle may not take: something is in it, and one record of a bundle is not.

    Raises:
        BadInput: for that, or when it cannot be looked into.
    """
    try:
        seen = {path.name for path in directory.iterdir()} - {".DS_Store"}
    except OSError as error:
        raise BadInput(f"{directory} exists and cannot be looked into: {error.strerror}.", MOVE_AWAY) from error
    if seen and not any(_has(directory / name, keys) for name, keys in _RECORDS.items()):
        raise BadInput(f"{directory} exists and is no bundle, so it is never replaced.", MOVE_AWAY)


def _has(record: Path, keys: frozenset[str]) -> bool:
    """Whether a record is there with these keys."""
    with contextlib.suppress(BadInput):
        return keys <= read_object(record).keys()
    return False


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
        if directory.is_file():
            raise BadInput(f"{directory} is a file, and a bundle is a folder.", "`zoo build` prints where it put one.")
        if not directory.is_dir():
            raise no_bundle_at(directory)
        absent = [name for name in ("metadata.json", "build.json") if not (directory / name).is_file()]
        if absent:
            raise BadInput(f"{directory} is not a bundle of this zoo: it has no {' and no '.join(absent)}.")
        build = _of_today(read_object(directory / "build.json"))
        if build.get("schema") not in (1, BUILD_SCHEMA):
            raise BadInput(f"{directory / 'build.json'} has schema {build.get('schema')!r}, not {BUILD_SCHEMA}.")
        wrong = list(_wrong(build))
        if wrong:
            raise BadInput(
                f"{directory / 'build.json'} is damaged: {listing(wrong)} missing or of another type.",
                "Build the bundle again.",
            )
        return cls(directory, read_object(directory / "metadata.json"), build)

    @property
    def asset(self) -> Path:
        """The asset that holds the functions."""
        try:
            asset = str(self.metadata["assets"]["main"])
        except (KeyError, TypeError):
            raise CheckFailed(f"metadata.json of {self.directory} names no main asset.") from None
        if Path(asset).name != asset:
            raise CheckFailed(f"metadata.json of {self.directory} names the asset {asset!r}, not a plain name.")
        return self.directory / asset

    @property
    def asset_bytes(self) -> int:
        """Bytes of the asset, as recorded."""
        of_asset = f"{self.asset.name}/"
        return sum(record["bytes"] for path, record in self.build["files"].items() if path.startswith(of_asset))

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer."""
        return self.directory / "tokenizer"

    @cached_property
    def functions(self) -> Mapping[str, TraceSpec]:
        """The signature of each function as it was built; the first one decodes."""
        try:
            functions = {name: read_signature(record) for name, record in self.build["functions"].items()}
            if not functions or not next(iter(functions.values())).outputs:
                raise ValueError("no function gives logits")
            return functions
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckFailed(f"build.json of {self.directory} has no readable signature: {error}.") from error

    @property
    def decode(self) -> str:
        """Name of the function that decodes."""
        return next(iter(self.functions))

    @property
    def signature(self) -> TraceSpec:
        """The signature of the function that decodes."""
        return self.functions[self.decode]

    @property
    def compute_dtype(self) -> str:
        """What it computes in: the dtype of its caches, half precision where it has none."""
        return next((state.dtype for state in self.signature.states if state.kind == "kv_cache"), "float16")

    @property
    def engine(self) -> Engine | None:
        """The engine whose rules the bundle is held against; None where its contract is for another one.

        Raises:
            CheckFailed: when it is one whose rules this zoo does not know.
        """
        contract = self.build.get("contract")
        contract = contract if isinstance(contract, dict) else {}
        if "engine" not in contract:  # a record of before contracts said so
            known = CONTRACTS.get(str(contract.get("name")))
            return known.engine if known else None
        name = contract["engine"]
        if name is not None and name not in ENGINES:
            raise CheckFailed(f"{self.directory} is for the engine {name!r}, whose rules this zoo does not know.")
        return None if name is None else ENGINES[name]

    @property
    def entry(self) -> str | None:
        """Name of the entry that it was built as; None where it was built without one."""
        return str(self.build["entry"].get("name")) if self.build["entry"] else None

    @property
    def title(self) -> str:
        """The model's name."""
        recorded = self.build["entry"] or {}
        return str(self.build.get("title") or recorded.get("title") or self.build["name"])

    @property
    def origin(self) -> Mapping[str, Any]:
        """Repository and commit that its checkpoint is of, `hf_id` and `revision`, as far as they were known."""
        if isinstance(origin := self.build.get("origin"), dict):
            return origin
        # Schema 1 knew them as the entry's.
        recorded = self.build["entry"] or {}
        return {"hf_id": recorded.get("hf_id"), "revision": self.build["source"].get("hf_revision")}

    @property
    def max_context(self) -> int:
        """Positions that the bundle allows."""
        return int(self.build["max_context"])
