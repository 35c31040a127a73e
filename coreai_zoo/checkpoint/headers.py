"""The headers of safetensors files: which tensors a file holds, and whether it is as long as its header says."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from coreai_zoo.checkpoint.originals import NotOriginal
from coreai_zoo.checkpoint.pointers import refuse_pointer
from coreai_zoo.checkpoint.strict_json import parse_object
from coreai_zoo.dtypes import as_matrix
from coreai_zoo.errors import BadInput, listing

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""
MAX_RANK = 16

# safetensors name: (torch name, bits per element)
_DTYPES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "U16": ("uint16", 16),
    "I16": ("int16", 16),
    "U32": ("uint32", 32),
    "I32": ("int32", 32),
    "U64": ("uint64", 64),
    "I64": ("int64", 64),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F32": ("float32", 32),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4_e2m1", 4),
    "I4": ("int4", 4),
    "U4": ("uint4", 4),
}

Stamp = tuple[str, str, int, int, int]
"""Path, hash of the header, size and times of a file. While it has the same stamp its content is taken to be the same;
with another, it has to be read to know. One that is streamed has the hash that the hub states in the place of its path,
and no times: its content is known while it is not on this machine."""


@frozen
class TensorInfo:
    """One tensor as its file's header describes it.

    Attributes:
        key: its name in the checkpoint.
        shape: sizes; `()` is a scalar.
        dtype: the torch name without prefix, for example `bfloat16`.
        file: the safetensors file that holds it.
        span: its first byte in the file, and one past its last.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    span: tuple[int, int] = (0, 0)

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix whose rows run along the last axis; a vector or scalar is one row."""
        return as_matrix(self.shape)[0]

    @property
    def columns(self) -> int:
        """Size of the last axis, 1 for a scalar."""
        return as_matrix(self.shape)[1]

    def bytes_of(self, rows: int) -> int:
        """Bytes that some of its rows take in the file."""
        start, stop = self.span
        return (stop - start) * rows // max(1, self.rows)


@frozen
class Header:
    """The header of one safetensors file.

    Attributes:
        file: the file.
        size: bytes of the whole file.
        sha256: of the header, its length prefix included.
        stamp: as it was when it was opened.
        tensors: what it holds, by key.
    """

    file: Path
    size: int
    sha256: str
    stamp: Stamp
    tensors: Mapping[str, TensorInfo]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_entry(entry: object) -> str | None:
    """What is wrong with the header's entry of one tensor, seen alone, or None."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "needs dtype, shape and data_offsets"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        return f"has an unknown dtype {entry['dtype']!r}"
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        return "has a shape that is not a short list of sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        return "has data_offsets that are not two positions"
    bits = math.prod(shape) * _DTYPES[entry["dtype"]][1]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        return f"has data_offsets {offsets} that do not fit its shape {shape} and dtype {entry['dtype']}"
    return None


def _check_layout(path: Path, entries: Mapping[str, Any], data_bytes: int) -> None:
    """Check that the tensors fill the data section end to end.

    Raises:
        BadInput: for an overlap, a gap, or an end that is not the end of the file.
    """
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != position:
            raise BadInput(f"{path} is corrupt: tensor {key} starts at byte {start} of the data, expected {position}.")
        position = stop
    if position > data_bytes:
        raise BadInput(
            f"{path} is truncated: its header describes {position:,} bytes of tensors, the file holds {data_bytes:,}.",
            "Download it again.",
        )
    if position < data_bytes:
        raise BadInput(f"{path} is corrupt: {data_bytes - position:,} bytes at its end belong to no tensor.")


def header_bytes(path: Path, start: bytes, size: int) -> int:
    """Bytes of the header of a safetensors file, its length prefix included.

    Args:
        path: the file, for an error.
        start: its first 8 bytes or more; all that there are of a shorter file.
        size: bytes of the whole file.

    Raises:
        BadInput: when it can be no such file.
    """
    if size == 0:
        raise BadInput(f"{path} is empty.", "Download it again.")
    refuse_pointer(path, start[:64])
    length = int.from_bytes(start[:8], "little")
    if len(start) >= 8 and length > MAX_HEADER_BYTES:
        raise BadInput(
            f"{path} is not a safetensors file: its header would be {length:,} bytes, the limit is "
            f"{MAX_HEADER_BYTES:,}.",
            "Download it again.",
        )
    if len(start) < 8 or 8 + length > size:
        raise BadInput(f"{path} is truncated: it ends within its header.", "Download it again.")
    return 8 + length


def _read_header_bytes(path: Path) -> tuple[bytes, os.stat_result]:
    """The header with its length prefix, and the file's status, both from one open file."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            length = header_bytes(path, file.read(64), status.st_size)
            file.seek(0)
            return file.read(length), status
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        BadInput: naming the file, when it is unreadable, truncated or inconsistent, or was written by MLX.
    """
    raw, status = _read_header_bytes(path)
    return parse_header(path, raw, str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def parse_header(path: Path, raw: bytes, identity: str, size: int, modified: int = 0, changed: int = 0) -> Header:
    """Check a header.

    Args:
        path: its file, which need not be there.
        raw: the header with its length prefix.
        identity: what tells the file from others in its stamp.
        size: bytes of the whole file.
        modified: time of the stamp, in nanoseconds.
        changed: the other one.

    Raises:
        BadInput: see `read_header`.
    """
    entries = parse_object(raw[8:], f"The header of {path}")
    metadata = entries.pop("__metadata__", None) or {}
    if isinstance(metadata, dict) and metadata.get("format") == "mlx":
        raise NotOriginal(f"{path} was converted for MLX, which keeps the names but changes layouts and values.")
    problems = [f"{key} {problem}" for key, entry in entries.items() if (problem := _check_entry(entry))]
    if problems:
        raise BadInput(f"{path} is corrupt: {listing(problems, 4)}.", "Download it again.")
    _check_layout(path, entries, size - len(raw))
    tensors = {}
    for key, entry in entries.items():
        start, stop = (len(raw) + offset for offset in entry["data_offsets"])
        tensors[key] = TensorInfo(key, tuple(entry["shape"]), _DTYPES[entry["dtype"]][0], path, (start, stop))
    sha256 = hashlib.sha256(raw).hexdigest()
    return Header(path, size, sha256, (identity, sha256, size, modified, changed), tensors)
