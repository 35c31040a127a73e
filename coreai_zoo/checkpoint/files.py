"""Lazy reading of a Hugging Face checkpoint: `config.json` and safetensors, one block of rows at a time.

Opening reads headers only, and checks all that headers can tell: that every file lies in the directory, is as long as
its header says, holds no tensor twice, and agrees with the index. Values stay in memory-mapped files until
`Checkpoint.read_rows` asks for them. Pickles are never loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from coreai_zoo.dtypes import as_matrix
from coreai_zoo.errors import BadInput, listing

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""
MAX_JSON_BYTES = 256_000_000
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
_QUANTIZED_DTYPE = re.compile(r"u?int[48]|float[468]_.*")
# Names that GPTQ, AWQ, compressed-tensors and fp8 checkpoints use. Bare "scale" is not among them: models have those.
_QUANTIZED_KEY = re.compile(
    r"(.*\.)?(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_zero_point|\w+_scale_inv|SCB)"
)
_QUANTIZED_CONFIG = ("quantization_config", "compression_config", "quantization")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_USE_ORIGINAL = "Pre-quantized weights are not supported: use the original bf16 checkpoint."


Stamp = tuple[str, str, int, int, int]
"""Path, hash of the header, size and times of a file. While it has the same stamp its content is taken to be the same;
with another, it has to be read to know."""


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


# ---------------------------------------------------------------------------------------------------------------------
# JSON and paths
# ---------------------------------------------------------------------------------------------------------------------


def _load_json(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object whose keys are unique.

    Raises:
        BadInput: when `data` is not UTF-8, not JSON, not an object, or names a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise BadInput(f"{what} names {listing(twice)} twice.")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise BadInput(f"{what} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{what} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BadInput(f"{what} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise BadInput(f"{path} is {size:,} bytes, more than the {MAX_JSON_BYTES:,} that are read of a JSON file.")
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    return _load_json(data, str(path))


def _check_directory(directory: Path) -> None:
    if not directory.exists():
        raise BadInput(f"The checkpoint directory {directory} does not exist.", "Check the path.")
    if not directory.is_dir():
        raise BadInput(
            f"The checkpoint {directory} is not a directory.", "Give the folder that holds config.json and the weights."
        )


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` of a checkpoint and nothing else.

    Raises:
        BadInput: when the directory or the file is missing, unreadable, or not a JSON object in UTF-8.
    """
    _check_directory(directory)
    path = directory / CONFIG
    if not path.is_file():
        raise BadInput(
            f"{directory} has no {CONFIG}.", "A Hugging Face checkpoint has one beside its weights; check the path."
        )
    return _read_json(path)


def member(directory: Path, name: object, where: str) -> Path:
    """The file called `name` in `directory`.

    Raises:
        BadInput: when `name` is not a plain relative name, or leads out of the directory. The `blobs` folder of a
            Hugging Face cache counts as inside, since its snapshots consist of links into it.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise BadInput(f"{where} names {name!r}, which is not a file name.")
    root = directory.resolve()
    inside = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    path = directory / name
    target = path.resolve()
    outside = not any(target.is_relative_to(folder) for folder in inside)
    if Path(name).is_absolute() or ".." in Path(name).parts or outside:
        raise BadInput(
            f"{where} names {name!r}, which leads outside of {directory}.", "Only files of the checkpoint are read."
        )
    return path


# ---------------------------------------------------------------------------------------------------------------------
# safetensors headers
# ---------------------------------------------------------------------------------------------------------------------


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


def _read_header_bytes(path: Path) -> tuple[bytes, os.stat_result]:
    """The header with its length prefix, and the file's status, both from one open file."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) == 8 and length > MAX_HEADER_BYTES:
                raise BadInput(
                    f"{path} is not a safetensors file: its header would be {length:,} bytes, the limit is "
                    f"{MAX_HEADER_BYTES:,}.",
                    "Download it again.",
                )
            if len(prefix) < 8 or 8 + length > status.st_size:
                raise BadInput(f"{path} is truncated: it ends within its header.", "Download it again.")
            return prefix + file.read(length), status
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        BadInput: naming the file, when it is unreadable, truncated or inconsistent, or was written by MLX.
    """
    raw, status = _read_header_bytes(path)
    entries = _load_json(raw[8:], f"The header of {path}")
    metadata = entries.pop("__metadata__", None) or {}
    if isinstance(metadata, dict) and metadata.get("format") == "mlx":
        raise BadInput(
            f"{path} was converted for MLX, which keeps the names but changes layouts and values.",
            "Use the original Hugging Face checkpoint.",
        )
    problems = [f"{key} {problem}" for key, entry in entries.items() if (problem := _check_entry(entry))]
    if problems:
        raise BadInput(f"{path} is corrupt: {listing(problems, 4)}.", "Download it again.")
    _check_layout(path, entries, status.st_size - len(raw))
    tensors = {}
    for key, entry in entries.items():
        start, stop = (len(raw) + offset for offset in entry["data_offsets"])
        tensors[key] = TensorInfo(key, tuple(entry["shape"]), _DTYPES[entry["dtype"]][0], path, (start, stop))
    sha256 = hashlib.sha256(raw).hexdigest()
    stamp = (str(path.resolve()), sha256, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return Header(path, status.st_size, sha256, stamp, tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Which files
# ---------------------------------------------------------------------------------------------------------------------


def has_weights(directory: Path) -> bool:
    """Whether there are weights beside the config that could be opened, complete or not."""
    return any(directory.glob("*.safetensors"))


def _no_weights(directory: Path) -> BadInput:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return BadInput(
            f"{directory} has no safetensors weights, only {listing(pickles, 4)}: pickles can run code and are never "
            "loaded.",
            "Use a revision with safetensors, or convert the checkpoint where you trust it.",
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return BadInput(
            f"{directory} has {listing(gguf, 4)} only: GGUF weights are quantized already and cannot be used.",
            "Use the original Hugging Face checkpoint in bf16.",
        )
    stray = [name for name in names if name.endswith(".safetensors")]
    if stray:
        return BadInput(
            f"{directory} has {listing(stray, 4)} but neither {SINGLE} nor {INDEX}.", f"Download {INDEX} as well."
        )
    return BadInput(
        f"{directory} has no weights: neither {SINGLE} nor {INDEX}.", "Check the path, or download the checkpoint."
    )


def read_index(directory: Path) -> dict[str, str]:
    """`weight_map` of the index: key to file name, every name checked. The files themselves may be missing.

    Raises:
        BadInput: when the index cannot be read, or names what is no safetensors file of the checkpoint.
    """
    path = directory / INDEX
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{path} has no weight_map from tensors to files.", "Download it again.")
    for name in weight_map.values():
        if not isinstance(name, str):
            member(directory, name, str(path))  # which says so
    names = sorted(set(weight_map.values()))
    for name in names:
        member(directory, name, str(path))
    wrong = [name for name in names if not name.endswith(".safetensors")]
    if wrong:
        raise BadInput(f"{path} names {listing(wrong)}: only .safetensors files are read.")
    return weight_map


def _require_shards(directory: Path, names: Collection[str]) -> None:
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise BadInput(
            f"{directory} lacks {len(missing)} of the {len(names)} files that {INDEX} names: {listing(missing, 200)}.",
            "Download them.",
        )


def _check_index(directory: Path, weight_map: Mapping[str, str], headers: Iterable[Header]) -> None:
    """Compare the index with the headers of the files that it names.

    Raises:
        BadInput: for a tensor in two files, in another file than the index says, in none, or in no index.
    """
    found: dict[str, list[str]] = {}
    for header in headers:
        for key in header.tensors:
            found.setdefault(key, []).append(header.file.relative_to(directory).as_posix())
    twice = [f"{key} (in {' and '.join(files)})" for key, files in sorted(found.items()) if len(files) > 1]
    if twice:
        raise BadInput(f"{directory} holds tensors more than once: {listing(twice, 6)}.", "Keep one shard of each.")
    absent = [f"{key} (not in {name})" for key, name in sorted(weight_map.items()) if found.get(key) != [name]]
    extra = [f"{key} (in {found[key][0]} only)" for key in sorted(set(found) - set(weight_map))]
    if absent or extra:
        raise BadInput(
            f"{directory / INDEX} and the shards disagree: {listing(absent + extra, 6)}.",
            "The files are of different downloads or were edited; download the checkpoint again.",
        )


def _open_headers(directory: Path) -> list[Header]:
    single, index = (directory / SINGLE).is_file(), (directory / INDEX).is_file()
    if single and index:
        raise BadInput(
            f"{directory} has both {SINGLE} and {INDEX}: it is not clear which one is meant.", "Keep one of them."
        )
    if single:
        return [read_header(member(directory, SINGLE, str(directory)))]
    if not index:
        raise _no_weights(directory)
    weight_map = read_index(directory)
    names = sorted(set(weight_map.values()))
    _require_shards(directory, names)
    headers = [read_header(directory / name) for name in names]
    _check_index(directory, weight_map, headers)
    return headers


def _refuse_quantized(directory: Path, config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> None:
    sections = {"": config, **{name: part for name, part in config.items() if isinstance(part, dict)}}
    for name, section in sections.items():
        for key in _QUANTIZED_CONFIG:
            if section.get(key):
                method = section[key].get("quant_method") if isinstance(section[key], dict) else None
                where = f"{name}.{key}" if name else key
                raise BadInput(f"{directory / CONFIG} has a {where}{f' ({method})' if method else ''}.", _USE_ORIGINAL)
    quantized = [
        f"{tensor.key} ({tensor.dtype})"
        for tensor in tensors
        if _QUANTIZED_DTYPE.fullmatch(tensor.dtype) or _QUANTIZED_KEY.fullmatch(tensor.key)
    ]
    if quantized:
        raise BadInput(f"{directory} holds quantized tensors: {listing(quantized, 6)}.", _USE_ORIGINAL)


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint
# ---------------------------------------------------------------------------------------------------------------------


@define
class Checkpoint:
    """An opened checkpoint: its config and its tensors, whose values are read on demand.

    Attributes:
        directory: where it is.
        config: `config.json`.
        tensors: every tensor, sorted by key.
        headers: one per safetensors file, sorted by name.
    """

    directory: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    headers: tuple[Header, ...]
    _files: dict[Path, Any] = field(factory=dict, init=False, repr=False)

    @cached_property
    def _stamps(self) -> Mapping[Path, Stamp]:
        return {header.file: header.stamp for header in self.headers}

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Open the checkpoint in `directory`, reading its config and headers.

        Raises:
            BadInput: for anything missing, unreadable, inconsistent, outside of the directory, or quantized already.
        """
        config = read_config(directory)
        headers = tuple(_open_headers(directory))
        tensors = {key: tensor for header in headers for key, tensor in header.tensors.items()}
        _refuse_quantized(directory, config, tensors.values())
        return cls(directory, config, MappingProxyType(dict(sorted(tensors.items()))), headers)

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Read rows of a tensor seen as a matrix (see `TensorInfo.rows`).

        Args:
            key: of the tensor.
            start: first row.
            stop: one past the last row.

        Returns:
            [stop - start, columns] in the stored dtype, on the CPU. It may be a view of the mapped file: do not write.

        Raises:
            KeyError: when there is no such tensor.
            IndexError: when the rows are not all in the tensor.
            BadInput: when the file cannot be read any more, or has changed since it was opened.
        """
        import torch
        from safetensors import SafetensorError

        info = self.tensors[key]
        if not 0 <= start <= stop <= info.rows:
            raise IndexError(f"rows {start}..{stop} of {key}, which has {info.rows}")
        try:
            file = self._file(info.file)
            if len(info.shape) < 2:
                tensor: torch.Tensor = file.get_tensor(key).reshape(1, info.columns)
                return tensor[start:stop]
            blocks = _row_blocks(file.get_slice(key), info.shape, start, stop)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise BadInput(f"{info.file} cannot be read at tensor {key}: {error}.", "Download it again.") from error
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _file(self, path: Path) -> Any:
        # Reading a mapped file that someone has cut short kills the process, so its size is looked at each time.
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != self._stamps[path][2:4]:
            raise BadInput(f"{path} has changed since the build began.", "Leave the checkpoint alone and build again.")
        # One mapping per file until it is released: opening one parses its header again.
        file = self._files.get(path)
        if file is None:
            from safetensors import safe_open

            file = self._files[path] = safe_open(path, framework="pt", device="cpu")
        return file

    def release(self) -> None:
        """Unmap the files, so that what was read of them no longer counts as this process's memory.

        What is still in use of them stays mapped; reading goes on as before.
        """
        self._files.clear()

    def evict(self, keys: Iterable[str]) -> None:
        """Also give back the memory in which the system keeps some tensors: nobody reads the weights twice.

        What is written next takes their place. In a virtual machine that has not used all of its memory yet, fresh
        memory is ten times slower to write to. A file of which a view is still in use keeps its memory.
        """
        self.release()
        if not hasattr(os, "posix_fadvise"):
            return
        for path, tensors in groupby((self.tensors[key] for key in keys), key=lambda tensor: tensor.file):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                for start, stop in (tensor.span for tensor in tensors):
                    os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def stamp(self, key: str) -> Stamp:
        """The stamp of the file that holds `key`."""
        return self._stamps[self.tensors[key].file]

    def identity(self) -> dict[str, Any]:
        """The identity of the checkpoint, as far as it shows without reading weights.

        Returns:
            `config_sha256` and, per file, its `size` and the SHA-256 of its header. Two fine-tunes of one model may
            have the same identity; the weight store hashes the values.
        """
        files = {
            header.file.relative_to(self.directory).as_posix(): {"size": header.size, "header_sha256": header.sha256}
            for header in self.headers
        }
        config = (self.directory / CONFIG).read_bytes()
        return {"config_sha256": hashlib.sha256(config).hexdigest(), "files": files}


def _row_blocks(tensor: Any, shape: tuple[int, ...], start: int, stop: int) -> list[torch.Tensor]:
    """Rows `start` to `stop` of a safetensors slice of rank 2 or more, as [rows, columns] blocks in order.

    A slice takes one range per axis, so rows that begin or end within an index of axis 0 are read index by index.
    """
    per_index = math.prod(shape[1:-1])
    if len(shape) == 2 or (per_index and start % per_index == 0 and stop % per_index == 0):
        first, last = (start, stop) if len(shape) == 2 else (start // per_index, stop // per_index)
        return [tensor[first:last].reshape(-1, shape[-1])]
    blocks = []
    while start < stop:
        index, row = divmod(start, per_index)
        end = min(stop, (index + 1) * per_index)
        last = end - index * per_index
        if len(shape) == 3:
            block = tensor[index : index + 1, row:last]
        else:
            # Rank 4 and more is small (convolutions): one index is read whole, then cut.
            block = tensor[index : index + 1].reshape(-1, shape[-1])[row:last]
        blocks.append(block.reshape(-1, shape[-1]))
        start = end
    return blocks
