"""An `.mlpackage` on disk: its manifest, its ML Program, and the file of its weights.

    Manifest.json
    Data/com.apple.CoreML/model.mlmodel         the program, a protobuf message
    Data/com.apple.CoreML/weights/weight.bin    the weights, each 64-byte aligned after a 64-byte description

Reading maps the weights. Writing leaves the package as coremltools would, but for three things that would make two
builds of one model differ: identifiers in the manifest are derived from what they identify, protobuf maps are written
sorted, and no date or machine is recorded.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import mmap
import struct
import uuid
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from attrs import define, frozen
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within the block, nothing that coremltools says reaches the user's terminal.

    While it is imported and while it converts, it advises on versions and on other packages, and shows progress bars.
    """
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


with quietly():
    from coremltools.proto import MIL_pb2, Model_pb2

FOLDER = "com.apple.CoreML"
MODEL, WEIGHTS = f"{FOLDER}/model.mlmodel", f"{FOLDER}/weights"
WEIGHT_FILE = f"{WEIGHTS}/weight.bin"
NAMES = "coreai_zoo.constants"
"""Key of the model's user-defined metadata. Its value is a JSON object: the state of the decoder that each constant or
unpacked weight holds; of a quantized weight, the state of its integers."""

# MILBlob's StorageFormat.hpp: sentinel, data type, size in bytes, offset of the data.
_BLOB, _SENTINEL = struct.Struct("<IIQQ"), 0xDEADBEEF

_DTYPES: Mapping[int, str] = {
    MIL_pb2.BOOL: "bool",
    MIL_pb2.FLOAT16: "float16",
    MIL_pb2.FLOAT32: "float32",
    MIL_pb2.INT8: "int8",
    MIL_pb2.INT16: "int16",
    MIL_pb2.INT32: "int32",
    MIL_pb2.UINT8: "uint8",
    MIL_pb2.UINT16: "uint16",
    MIL_pb2.UINT32: "uint32",
}


class Damaged(Exception):
    """The package is not what a build wrote; the message says in what."""


@frozen
class TensorType:
    """Shape and numpy dtype of a value."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        """The type as a backend-independent program spells it."""
        return f"tensor<{'x'.join([*map(str, self.shape), self.dtype])}>"


def tensor_type(value_type: Any) -> TensorType:
    """The type of a tensor, or of the tensor that a state holds.

    Raises:
        Damaged: when the value is neither, or has a size that is not fixed.
    """
    if value_type.WhichOneof("type") == "stateType":
        value_type = value_type.stateType.wrappedType
    if value_type.WhichOneof("type") != "tensorType":
        raise Damaged(f"a value has the type {value_type.WhichOneof('type')}")
    tensor = value_type.tensorType
    if any(size.WhichOneof("dimension") != "constant" for size in tensor.dimensions):
        raise Damaged("a value has a size that is not fixed")
    if tensor.dataType not in _DTYPES:
        raise Damaged(f"a value has the data type {MIL_pb2.DataType.Name(tensor.dataType)}")
    return TensorType(tuple(size.constant.size for size in tensor.dimensions), _DTYPES[tensor.dataType])


@define(slots=False)  # for what is cached
class Package:
    """A package that was read.

    Attributes:
        path: its folder.
        model: its specification.
    """

    path: Path
    model: Any

    @classmethod
    def open(cls, path: Path) -> Package:
        """Read the specification; the weights are mapped when the first one is asked for.

        Raises:
            Damaged: when a part is missing or cannot be parsed.
            OSError: when a file cannot be read.
        """
        try:
            manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
            root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged("Manifest.json names no root model") from error
        if root != MODEL:
            raise Damaged(f"the root model is {root!r}, not {MODEL!r}")
        model = Model_pb2.Model()
        try:
            model.ParseFromString((path / "Data" / MODEL).read_bytes())
        except DecodeError as error:
            raise Damaged(f"{MODEL} is no Core ML specification") from error
        if model.WhichOneof("Type") != "mlProgram":
            raise Damaged(f"it holds a {model.WhichOneof('Type')}, not an ML Program")
        return cls(path, model)

    @property
    def function(self) -> Any:
        """The function `main`.

        Raises:
            Damaged: when there is none, or there are several forms of it.
        """
        functions = self.model.mlProgram.functions
        if "main" not in functions or len(functions["main"].block_specializations) != 1:
            raise Damaged("it has no function main, or several forms of it")
        return functions["main"]

    @property
    def block(self) -> Any:
        """The operations and outputs of `main`; raises as `function` does."""
        (block,) = self.function.block_specializations.values()
        return block

    @property
    def names(self) -> dict[str, str]:
        """The state of the decoder that each constant of the program or unpacked weight holds.

        Raises:
            Damaged: when the package does not say.
        """
        try:
            names = json.loads(self.model.description.metadata.userDefined[NAMES])
        except ValueError as error:
            raise Damaged("it does not say which parameters its constants are") from error
        return dict(names)

    def value(self, value: Any) -> np.ndarray[Any, Any] | str:
        """The value of a constant: text, or an array, which is a view of the mapped file where it is stored there.

        Raises:
            Damaged: when it is neither, or the file does not hold it.
        """
        if value.WhichOneof("value") == "blobFileValue":
            kind = tensor_type(value.type)
            return np.frombuffer(self._blob(value.blobFileValue.offset, kind), kind.dtype).reshape(kind.shape)
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field is None:
            raise Damaged("a constant has no value")
        values = getattr(tensor, field).values
        if field == "strings":
            return str(values[0])
        kind = tensor_type(value.type)
        array = np.frombuffer(values, kind.dtype) if field == "bytes" else np.array(values, kind.dtype)
        return array.reshape(kind.shape)

    def array(self, value: Any) -> np.ndarray[Any, Any]:
        """The value of a constant that is an array.

        Raises:
            Damaged: when it is text, or the file does not hold it.
        """
        found = self.value(value)
        if isinstance(found, str):
            raise Damaged(f"a weight is the text {found!r}")
        return found

    def _blob(self, offset: int, kind: TensorType) -> memoryview:
        """The bytes of a stored constant, whose description is at `offset` of the file."""
        size = math.prod(kind.shape) * np.dtype(kind.dtype).itemsize
        if offset + _BLOB.size > len(self._weights):
            raise Damaged(f"{WEIGHT_FILE} is too short")
        sentinel, _, stored, start = _BLOB.unpack_from(self._weights, offset)
        if sentinel != _SENTINEL or stored != size or start + size > len(self._weights):
            raise Damaged(f"{WEIGHT_FILE} has no tensor of {size:,} bytes at byte {offset:,}")
        return self._weights[start : start + size]

    @cached_property
    def _weights(self) -> memoryview:
        with (self.path / "Data" / WEIGHT_FILE).open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def write_specification(path: Path, model: Any) -> None:
    """Complete a package in whose weights folder the weights are already."""
    (path / "Data" / MODEL).write_bytes(model.SerializeToString(deterministic=True))
    entries = {
        str(uuid.uuid5(uuid.NAMESPACE_URL, item)).upper(): {
            "author": FOLDER,
            "description": f"CoreML Model {what}",
            "name": item.rpartition("/")[2],
            "path": item,
        }
        for item, what in ((MODEL, "Specification"), (WEIGHTS, "Weights"))
    }
    (root, *_) = entries
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
    # In the very form that coremltools gives it: opening a package rewrites its manifest.
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")
