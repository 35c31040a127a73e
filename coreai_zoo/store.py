"""The weight store: quantized weights on disk, one tensor at a time, resumable after any interruption.

A tensor `name` is the files `name.data`, `name.scales` and `name.zero_points` (the last two when it is quantized), raw
little-endian values in row order, and one line in `journal.jsonl`. Files are written under another name, synced and
renamed; the line follows, synced as well. So a line vouches for its files, and a crash costs at most one tensor.

A tensor is computed again when its recipe, its transform or the values of its sources changed. Values are hashed while
they are read; later a source counts as unchanged while its file has the same path, header, size and times, and is
hashed again, without computing anything, when it has not.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from attrs import asdict, define, evolve, field, frozen

from coreai_zoo.checkpoint import Checkpoint
from coreai_zoo.errors import BadInput, EnvironmentLacks
from coreai_zoo.overlay import QuantizationSpec
from coreai_zoo.quantize import (
    QUANTIZER_VERSION,
    QuantizedRows,
    blocks_per_row,
    chunk_rows,
    has_zero_points,
    pack_int4,
    quantize_rows,
    workers,
)
from coreai_zoo.weights import PlannedTensor, WeightPlan

if TYPE_CHECKING:
    import numpy as np
    import torch

JOURNAL = "journal.jsonl"
PARTIAL = ".partial"
STORE_VERSION = 1
"""Raised when the layout of the files changes."""

_KINDS = ("data", "scales", "zero_points")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_T = TypeVar("_T")

Progress = Callable[[PlannedTensor, int], None]


@frozen
class StoredFile:
    """A file of the store: its size in bytes and the SHA-256 of its content."""

    path: Path
    bytes: int
    sha256: str


@frozen
class StoredTensor:
    """A finished tensor of the store.

    Attributes:
        name: of the parameter.
        role: one of `overlay.ROLES`.
        shape: of the parameter.
        dtype: of the plain values, or of the scales.
        quantization: how it is quantized, or None.
        source_digest: SHA-256 over the SHA-256 of each chunk of the source values, as stored in the checkpoint.
        files: by kind: `data`, `scales`, `zero_points`.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    quantization: QuantizationSpec | None
    source_digest: str
    files: Mapping[str, StoredFile]

    @property
    def columns(self) -> int:
        """Size of the last axis, 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    def data(self) -> np.memmap[Any, Any]:
        """Plain values [shape] in `dtype`; integers [shape] int8 or uint8; or 4-bit pairs [rows, columns / 2] uint8."""
        if self.quantization is None:
            return self._map("data", self.dtype, self.shape)
        if self.quantization.bits == 4:
            return self._map("data", "uint8", (-1, self.columns // 2))
        return self._map("data", self.quantization.dtype, self.shape)

    def scales(self) -> np.memmap[Any, Any]:
        """Scales [*shape[:-1], blocks] in `dtype`.

        Raises:
            ValueError: when the tensor is not quantized.
        """
        return self._map("scales", self.dtype, (*self.shape[:-1], self._blocks()))

    def zero_points(self) -> np.memmap[Any, Any] | None:
        """Zero points [*shape[:-1], blocks], at 4 bits packed in pairs [ceil(count / 2)] uint8; None when all zero."""
        if "zero_points" not in self.files or self.quantization is None:
            return None
        if self.quantization.bits == 4:
            return self._map("zero_points", "uint8", (-1,))
        return self._map("zero_points", self.quantization.dtype, (*self.shape[:-1], self._blocks()))

    def _blocks(self) -> int:
        if self.quantization is None:
            raise ValueError(f"{self.name} is not quantized")
        return blocks_per_row(self.columns, self.quantization)

    def _map(self, kind: str, dtype: str, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
        import numpy as np

        # Copy-on-write: torch.from_numpy warns about arrays that it must not write to, and nothing may reach the file.
        flat: np.memmap[Any, Any] = np.memmap(self.files[kind].path, dtype=dtype, mode="c")
        return flat.reshape(shape)  # type: ignore[return-value]


@frozen
class FillReport:
    """What `WeightStore.fill` did.

    Attributes:
        computed: tensors that were read, converted and written.
        reused: tensors that were there already.
        bytes_written: of the computed tensors.
    """

    computed: int
    reused: int
    bytes_written: int


# ---------------------------------------------------------------------------------------------------------------------
# Journal
# ---------------------------------------------------------------------------------------------------------------------


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(value: object) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()


class _Journal:
    """One JSON object per line, each with a checksum of its own; the last line of a name counts.

    A line that is torn or damaged is as good as absent: its tensor is computed again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[str, dict[str, Any]] = {}
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            entry = self._parse(line)
            if entry is None:
                continue
            if entry.get("forgotten"):
                self.entries.pop(entry["name"], None)
            else:
                self.entries[entry["name"]] = entry

    @staticmethod
    def _parse(line: bytes) -> dict[str, Any] | None:
        try:
            entry = json.loads(line)
            intact = line.endswith(b"\n") and entry.pop("check") == _digest(entry) and isinstance(entry["name"], str)
        except (ValueError, KeyError, AttributeError, RecursionError):
            return None
        return entry if intact else None

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line and wait until it is on disk."""
        line = _canonical({**entry, "check": _digest(entry)}) + b"\n"
        with self._path.open("ab") as file:
            if file.tell() and not self._ends_in_newline():
                line = b"\n" + line  # closes a torn line, which stays damaged and is ignored
            file.write(line)
            _sync(file)
        self.entries[entry["name"]] = entry

    def forget(self, name: str) -> None:
        """Withdraw the entry of `name`, before its files are replaced: else a crash between the replacement and the new
        entry would leave the old entry vouching for new files.
        """
        if name in self.entries:
            self.append({"name": name, "forgotten": True})
            del self.entries[name]

    def _ends_in_newline(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    # A rename is on disk only when its directory is. Windows cannot open directories, and needs no such thing.
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Turn a failure to write into an error that a user can act on."""
    try:
        yield
    except BrokenPipeError:
        raise  # of the terminal that shows the progress, not of the store
    except OSError as error:
        if error.errno in _NO_SPACE:
            free = shutil.disk_usage(directory).free if directory.exists() else 0
            raise EnvironmentLacks(
                f"There is no space left for the weight store {directory} ({error.strerror}; {free:,} bytes are free).",
                "Free some space or choose another work directory, then run the same command again: finished tensors "
                "are kept.",
            ) from error
        raise BadInput(
            f"The weight store {directory} cannot be used: {error.strerror or error} ({error.filename or directory}).",
            "Choose a work directory that you may write to.",
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Writing one tensor
# ---------------------------------------------------------------------------------------------------------------------


@define
class _Output:
    """A file being written, under its partial name, hashed on the way."""

    path: Path
    file: BinaryIO
    size: int = 0
    sha256: Any = field(factory=hashlib.sha256)

    def write(self, data: memoryview) -> None:
        self.sha256.update(data)
        self.size += self.file.write(data)


@define
class _TensorWriter:
    """Writes the files of one tensor in the order of its rows."""

    directory: Path
    name: str
    kinds: tuple[str, ...]
    outputs: dict[str, _Output] = field(factory=dict)
    # A zero point that waits for its pair: rows with an odd number of blocks end within a byte.
    carry: torch.Tensor | None = None

    def open(self, stack: ExitStack) -> None:
        for kind in self.kinds:
            path = self.directory / f"{self.name}.{kind}"
            unfinished = path.with_name(path.name + PARTIAL)
            stack.callback(unfinished.unlink, missing_ok=True)
            self.outputs[kind] = _Output(path, stack.enter_context(unfinished.open("wb")))

    def write(self, kind: str, values: torch.Tensor) -> None:
        self.outputs[kind].write(_bytes_of(values))

    def write_quantized(self, quantized: QuantizedRows, spec: QuantizationSpec) -> None:
        self.write("data", quantized.codes)
        self.write("scales", quantized.scales)
        if quantized.zero_points is not None:
            self._write_zero_points(quantized.zero_points.flatten(), spec)

    def _write_zero_points(self, values: torch.Tensor, spec: QuantizationSpec) -> None:
        import torch

        if spec.bits == 4:
            if self.carry is not None:
                values = torch.cat((self.carry, values))
            even = len(values) // 2 * 2
            self.carry = values[even:].clone() if even < len(values) else None
            values = pack_int4(values[:even])
        self.write("zero_points", values)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Put the files in place; the sizes and hashes for the journal."""
        import torch

        if self.carry is not None:
            self.write("zero_points", pack_int4(torch.cat((self.carry, torch.zeros_like(self.carry)))))
        for output in self.outputs.values():
            _sync(output.file)
            os.replace(output.file.name, output.path)
        for kind in set(_KINDS) - set(self.kinds):
            (self.directory / f"{self.name}.{kind}").unlink(missing_ok=True)
        _sync_directory(self.directory)
        return {
            kind: {"bytes": output.size, "sha256": output.sha256.hexdigest()} for kind, output in self.outputs.items()
        }


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row order, without a copy when it is contiguous."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


@frozen
class _Chunk:
    """Rows `start` to `stop` of the checkpoint tensor `key`; their elements are handled by one worker."""

    key: str
    start: int
    stop: int


def _chunks(planned: PlannedTensor) -> Iterator[_Chunk]:
    """The rows of a planned tensor in order."""
    step = chunk_rows(planned.columns)
    for source in planned.sources:
        rows = source.stop - source.start
        for start in range(0, rows, step):
            yield _Chunk(source.key, start, min(start + step, rows))


@frozen
class _Result:
    """What became of a chunk: the hash of its source, and plain values or integers (at 4 bits in pairs)."""

    source: bytes
    plain: torch.Tensor | None = None
    quantized: QuantizedRows | None = None


def _process(planned: PlannedTensor, checkpoint: Checkpoint, chunk: _Chunk) -> _Result:
    """Read, hash, convert and quantize a chunk."""
    rows = checkpoint.read_rows(chunk.key, chunk.start, chunk.stop)
    source = hashlib.sha256(_bytes_of(rows)).digest()
    values = _convert(planned, rows, chunk)
    if planned.quantization is None:
        return _Result(source, plain=values)
    quantized = quantize_rows(values, planned.quantization)
    if not quantized.scales.isfinite().all():
        raise BadInput(
            f"{chunk.key} has values of both signs in one block whose distance overflows {planned.dtype} "
            f"(rows {chunk.start} to {chunk.stop}).",
            "Use a recipe with a symmetric scheme.",
        )
    if planned.quantization.bits == 4:
        quantized = evolve(quantized, codes=pack_int4(quantized.codes))
    return _Result(source, quantized=quantized)


def _in_order(jobs: Iterable[Callable[[], _T]]) -> Iterator[_T]:
    """The results of jobs that the workers run, in order, with only a few of them waiting at a time."""
    pool, ahead = workers(), 2 * max(2, os.cpu_count() or 1)
    waiting: deque[Future[_T]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


def _convert(planned: PlannedTensor, rows: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
    """Checkpoint values to values of the parameter: float32, transform, cast.

    Raises:
        BadInput: when a value is not finite, before or after.
    """
    import torch

    transform = planned.transform
    # A transform may work in place, and a float32 source is a view of the checkpoint.
    values = rows.to(torch.float32, copy=transform is not None)
    if transform is not None:
        values = transform.apply(values)
        if values.shape != rows.shape or values.dtype != torch.float32:
            raise ValueError(f"transform {transform.name!r} gave {tuple(values.shape)} {values.dtype}")
    cast = values.to(getattr(torch, planned.dtype))
    low, high = torch.aminmax(cast)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise _not_finite(planned, rows, values, cast, chunk)
    return cast


def _not_finite(
    planned: PlannedTensor, rows: torch.Tensor, values: torch.Tensor, cast: torch.Tensor, chunk: _Chunk
) -> BadInput:
    """Says which value is not finite, and whether the checkpoint, the transform or the narrower dtype made it so."""
    import torch

    def first(tensor: torch.Tensor) -> tuple[int, int]:
        row, column = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
        return row, column

    if not torch.isfinite(rows).all():
        row, column = first(rows)
        return BadInput(
            f"The checkpoint holds {rows[row, column].item()} in {chunk.key} at row {chunk.start + row}, "
            f"column {column}.",
            "Download it again, or use another revision.",
        )
    row, column = first(cast)
    where = f"{chunk.key} at row {chunk.start + row}, column {column}"
    if planned.transform is not None and not torch.isfinite(values).all():
        row, column = first(values)
        return BadInput(
            f"The transform {planned.transform.name!r} turns {rows[row, column].item()} of {where} into "
            f"{values[row, column].item()}.",
            "The checkpoint's values are outside of what the overlay expects.",
        )
    return BadInput(
        f"The value {values[row, column].item():g} of {where} overflows {planned.dtype}, whose largest value is "
        f"{torch.finfo(cast.dtype).max:g} (parameter {planned.name}).",
        "This checkpoint cannot be stored in that dtype.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------------------------------


def _fingerprint(planned: PlannedTensor, checkpoint: Checkpoint) -> str:
    """Everything but values that determines a stored tensor."""
    sources = [
        [source.key, source.start, source.stop, list(info.shape), info.dtype]
        for source in planned.sources
        for info in [checkpoint.tensors[source.key]]
    ]
    return _digest(
        {
            "versions": [STORE_VERSION, QUANTIZER_VERSION],
            "shape": list(planned.shape),
            "dtype": planned.dtype,
            "quantization": asdict(planned.quantization) if planned.quantization else None,
            "transform": planned.transform.name if planned.transform else None,
            "sources": sources,
        }
    )


def _stamps(planned: PlannedTensor, checkpoint: Checkpoint) -> list[list[Any]]:
    stamps = {tuple(checkpoint.stamp(source.key)) for source in planned.sources}
    return [list(stamp) for stamp in sorted(stamps)]


def _hash_sources(planned: PlannedTensor, checkpoint: Checkpoint) -> str:
    """The digest of the source values, as `WeightStore._stream` makes it."""

    def hash_chunk(chunk: _Chunk) -> bytes:
        return hashlib.sha256(_bytes_of(checkpoint.read_rows(chunk.key, chunk.start, chunk.stop))).digest()

    digest = hashlib.sha256()
    for part in _in_order(partial(hash_chunk, chunk) for chunk in _chunks(planned)):
        digest.update(part)
    return digest.hexdigest()


class WeightStore:
    """Tensors in a directory, filled from a checkpoint and read back as memory maps.

    Args:
        directory: where the store is, or will be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._loaded: _Journal | None = None

    @property
    def _journal(self) -> _Journal:
        if self._loaded is None:
            with _explained(self.directory):
                self._loaded = _Journal(self.directory / JOURNAL)
        return self._loaded

    def fill(self, plan: WeightPlan, checkpoint: Checkpoint, progress: Progress | None = None) -> FillReport:
        """Make every tensor of `plan` present, computing only those that are not.

        Args:
            plan: what to store.
            checkpoint: where the values are.
            progress: called with a tensor and the number of its elements that were finished since the last call.

        Raises:
            BadInput: for a value that is not finite or overflows, an unreadable checkpoint, or a directory that cannot
                be written.
            EnvironmentLacks: when the disk is full. Finished tensors stay, and another call goes on from them.
        """
        with _explained(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for stale in self.directory.glob(f"*{PARTIAL}"):
                stale.unlink()
        computed = written = 0
        for planned in plan.tensors:
            if self._is_current(planned, checkpoint):
                if progress:
                    progress(planned, planned.parameters)
                continue
            with _explained(self.directory):
                written += self._compute(planned, checkpoint, progress)
            computed += 1
        return FillReport(computed, len(plan.tensors) - computed, written)

    def __getitem__(self, name: str) -> StoredTensor:
        """The finished tensor called `name`.

        Raises:
            KeyError: when the store does not hold it.
        """
        entry = self._journal.entries[name]
        spec = entry["quantization"]
        return StoredTensor(
            name,
            entry["role"],
            tuple(entry["shape"]),
            entry["dtype"],
            QuantizationSpec(**spec) if spec else None,
            entry["source_digest"],
            {
                kind: StoredFile(self.directory / f"{name}.{kind}", file["bytes"], file["sha256"])
                for kind, file in entry["files"].items()
            },
        )

    def __contains__(self, name: object) -> bool:
        return name in self._journal.entries

    def damaged(self, name: str) -> bool:
        """Read the files of `name` in full; whether one differs from what was written."""
        for file in self[name].files.values():
            sha256 = hashlib.sha256()
            if not file.path.is_file():
                return True
            with file.path.open("rb") as content:
                while block := content.read(1 << 20):
                    sha256.update(block)
            if sha256.hexdigest() != file.sha256:
                return True
        return False

    def discard(self, name: str) -> None:
        """Forget `name`, so that the next `fill` computes it again."""
        with _explained(self.directory):
            self._journal.forget(name)

    # -- one tensor

    def _is_current(self, planned: PlannedTensor, checkpoint: Checkpoint) -> bool:
        """Whether the store holds what computing `planned` would give."""
        entry = self._journal.entries.get(planned.name)
        if entry is None or entry["fingerprint"] != _fingerprint(planned, checkpoint):
            return False
        for kind, file in entry["files"].items():
            path = self.directory / f"{planned.name}.{kind}"
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                return False
        stamps = _stamps(planned, checkpoint)
        if entry["stamps"] == stamps and entry["role"] == planned.role:
            return True
        if entry["source_digest"] != _hash_sources(planned, checkpoint):
            return False
        with _explained(self.directory):
            self._journal.append({**entry, "stamps": stamps, "role": planned.role})
        return True

    def _compute(self, planned: PlannedTensor, checkpoint: Checkpoint, progress: Progress | None) -> int:
        """Compute and store one tensor; the bytes written."""
        if not _SAFE_NAME.fullmatch(planned.name):
            raise BadInput(f"The parameter name {planned.name!r} cannot be a file name.", "Rename it in the overlay.")
        spec = planned.quantization
        kinds = _KINDS[: 1 if spec is None else 3 if has_zero_points(spec) else 2]
        with ExitStack() as stack:
            writer = _TensorWriter(self.directory, planned.name, kinds)
            writer.open(stack)
            source_digest = self._stream(planned, checkpoint, writer, progress)
            self._journal.forget(planned.name)
            files = writer.finish()
        self._journal.append(
            {
                "name": planned.name,
                "fingerprint": _fingerprint(planned, checkpoint),
                "stamps": _stamps(planned, checkpoint),
                "source_digest": source_digest,
                "role": planned.role,
                "shape": list(planned.shape),
                "dtype": planned.dtype,
                "quantization": asdict(planned.quantization) if planned.quantization else None,
                "files": files,
            }
        )
        return sum(int(file["bytes"]) for file in files.values())

    def _stream(
        self, planned: PlannedTensor, checkpoint: Checkpoint, writer: _TensorWriter, progress: Progress | None
    ) -> str:
        """Compute and write a tensor chunk by chunk; the digest of its source values."""
        digest = hashlib.sha256()
        for result in _in_order(partial(_process, planned, checkpoint, chunk) for chunk in _chunks(planned)):
            digest.update(result.source)
            if result.plain is not None:
                writer.write("data", result.plain)
                elements = result.plain.numel()
            else:
                assert result.quantized is not None and planned.quantization is not None
                writer.write_quantized(result.quantized, planned.quantization)
                elements = result.quantized.codes.numel() * (8 // planned.quantization.bits)
            if progress:
                progress(planned, elements)
        return digest.hexdigest()
