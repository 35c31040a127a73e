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
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from attrs import define, field, frozen
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from coreai_zoo.backend import Constant
from coreai_zoo.dtypes import bits_of, packed_bytes
from coreai_zoo.errors import PluginError


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

# MILBlob's StorageFormat.hpp. The file begins with the number of its tensors and a version. A tensor is described by
# sentinel, data type, size in bytes, offset of the data, and how many bits of the last byte are not used. All are
# aligned, and what comes last is not padded.
_HEAD, _STORAGE_VERSION = struct.Struct("<II"), 2
_BLOB, _SENTINEL = struct.Struct("<IIQQQ"), 0xDEADBEEF
_ALIGNMENT = 64
_STORED = {
    "float16": 1,
    "float32": 2,
    "uint8": 3,
    "int8": 4,
    "int16": 6,
    "uint16": 7,
    "int4": 8,
    "uint4": 11,
    "int32": 14,
    "uint32": 15,
}
"""MILBlob's data types by numpy's names: BlobDataType.hpp."""

_DTYPES: Mapping[int, str] = {
    MIL_pb2.BOOL: "bool",
    MIL_pb2.FLOAT16: "float16",
    MIL_pb2.FLOAT32: "float32",
    MIL_pb2.INT4: "int4",
    MIL_pb2.INT8: "int8",
    MIL_pb2.INT16: "int16",
    MIL_pb2.INT32: "int32",
    MIL_pb2.UINT4: "uint4",
    MIL_pb2.UINT8: "uint8",
    MIL_pb2.UINT16: "uint16",
    MIL_pb2.UINT32: "uint32",
}


class Damaged(Exception):
    """The package is not what a build wrote; the message says in what."""


@frozen
class TensorType:
    """Shape of a value, in elements, and their dtype: numpy's name of it, `int4` or `uint4`."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes that a value takes in the file of the weights."""
        return packed_bytes(self.shape, self.dtype)

    def __str__(self) -> str:
        """The type as a backend-independent program spells it."""
        return f"tensor<{'x'.join([*map(str, self.shape), self.dtype])}>"


@frozen
class Stored:
    """The value of a constant that is an array.

    Attributes:
        type: what it is an array of.
        bytes: of all elements, as they are stored: two of 4 bits share one, the first in the low half.
    """

    type: TensorType
    bytes: memoryview

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The elements: a view, or integers of 4 bits as int8 or uint8, each in a byte of its own."""
        if bits_of(self.type.dtype) >= 8:
            return np.frombuffer(self.bytes, self.type.dtype).reshape(self.type.shape)
        import torch

        from coreai_zoo.weights.formats import unpacked_rows

        elements = unpacked_rows(torch.from_numpy(np.array(self.bytes)), self.type.dtype)
        return elements[: math.prod(self.type.shape)].numpy().reshape(self.type.shape)


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
        """The value of a constant: text, or an array, see `Stored.array`.

        Raises:
            Damaged: when it is neither, or the file does not hold it.
        """
        if (
            value.WhichOneof("value") == "immediateValue"
            and value.immediateValue.tensor.WhichOneof("value") == "strings"
        ):
            return str(value.immediateValue.tensor.strings.values[0])
        return self.stored(value).array

    def stored(self, value: Any) -> Stored:
        """The value of a constant that is an array, mapped where it is in the file of the weights.

        Raises:
            Damaged: when it is text, or the file does not hold it.
        """
        kind = tensor_type(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            return Stored(kind, self._blob(value.blobFileValue.offset, kind))
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field is None:
            raise Damaged("a constant has no value")
        values = getattr(tensor, field).values
        return Stored(kind, memoryview(values if field == "bytes" else np.array(values, kind.dtype).tobytes()))

    def _blob(self, offset: int, kind: TensorType) -> memoryview:
        """The bytes of a stored constant, whose description is at `offset` of the file."""
        size = kind.bytes
        if offset + _BLOB.size > len(self._weights):
            raise Damaged(f"{WEIGHT_FILE} is too short")
        sentinel, storage, stored, start, _ = _BLOB.unpack_from(self._weights, offset)
        described = (sentinel, storage, stored) == (_SENTINEL, _STORED.get(kind.dtype), size)
        if not described or start + size > len(self._weights):
            raise Damaged(f"{WEIGHT_FILE} has no {kind.dtype} of {size:,} bytes at byte {offset:,}")
        return self._weights[start : start + size]

    @cached_property
    def _weights(self) -> memoryview:
        with (self.path / "Data" / WEIGHT_FILE).open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@define
class WeightFile:
    """The file of the weights as it is laid out, in place of coremltools' `BlobWriter`, which writes what is there.

    Attributes:
        pieces: see `Layout`: what is known, and names of weights.
        sizes: bytes of each weight, by name.
    """

    sizes: dict[str, int] = field(factory=dict)
    _blobs: list[bytes | str] = field(factory=list)
    _end: int = _ALIGNMENT
    _count: int = 0

    @property
    def pieces(self) -> tuple[bytes | str, ...]:
        """See `Layout`: what is known, and names of weights."""
        head = _HEAD.pack(self._count, _STORAGE_VERSION)
        return (head.ljust(_ALIGNMENT, b"\0"), *self._blobs)

    def add_room(self, name: str, weight: Constant) -> int:
        """Leave room for a weight; where its description is.

        Raises:
            PluginError: when it has a dtype that is not stored.
        """
        if weight.dtype not in _STORED:
            raise PluginError(f"A weight is {weight.dtype}, which the Core ML backend does not store.")
        self.sizes[name] = weight.bytes
        unused = 8 * weight.bytes - math.prod(weight.shape) * bits_of(weight.dtype)
        return self._add(_STORED[weight.dtype], name, weight.bytes, unused)

    def _add(self, kind: int, content: bytes | str, size: int, unused: int = 0) -> int:
        place = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        start = place + _ALIGNMENT
        head = _BLOB.pack(_SENTINEL, kind, size, start, unused).ljust(_ALIGNMENT, b"\0")
        self._blobs += [bytes(place - self._end) + head, content]
        self._end = start + size
        self._count += 1
        return place

    # What coremltools calls for the constants of a program.

    def write_fp16_data(self, values: np.ndarray[Any, Any]) -> int:
        """Add float16 values, seen as uint16."""
        return self._add(_STORED["float16"], values.tobytes(), values.nbytes)

    def write_float_data(self, values: np.ndarray[Any, Any]) -> int:
        """Add float32 values."""
        return self._add(_STORED["float32"], values.tobytes(), values.nbytes)

    def __getattr__(self, name: str) -> Callable[[np.ndarray[Any, Any]], int]:
        """`write_int8_data` and the like: the method that adds values of a dtype."""
        dtype = name.removeprefix("write_").removesuffix("_data")
        if name != f"write_{dtype}_data" or dtype not in _STORED:
            raise AttributeError(name)
        return lambda values: self._add(_STORED[dtype], values.tobytes(), values.nbytes)


def specification(model: Any) -> dict[str, bytes]:
    """The files of a package beside that of its weights, by path."""
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
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    return {f"Data/{MODEL}": model.SerializeToString(deterministic=True), "Manifest.json": text.encode()}
