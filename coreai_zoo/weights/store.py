"""The weight store: quantized weights on disk, one tensor at a time, resumable after any interruption.

A tensor `name` is the files `name.data`, `name.scales` and `name.zero_points` (the last two when it is quantized), raw
little-endian values in row order, and one line in `journal.jsonl`. Files are written under another name, synced and
renamed; the line follows, synced as well. So a line vouches for its files. Syncing goes on while the next tensor is
computed: a crash costs the tensor being computed and the one that waits for the disk, or a few small ones that do.

The directory is the store's own: tensors that a plan does not name are removed from it.

A tensor is computed again when the values of its sources or anything else that makes its bytes changed: what is asked
for, and the code that makes it (see `ingredients`). Values are hashed while they are read; later a source counts as
unchanged while its file has the same path, header, size and times, and is hashed again, without computing anything,
when it has not (or when a full check is asked for).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache, cached_property, partial
from importlib import metadata as distributions
from itertools import chain
from pathlib import Path
from threading import BoundedSemaphore, Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self, get_args

from attrs import asdict, define, field, frozen

from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.headers import Stamp
from coreai_zoo.digest import source_digests
from coreai_zoo.errors import NO_SPACE, BadInput, EnvironmentLacks
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.weights.convert import (
    Chunk,
    Result,
    bytes_of,
    chunks_of,
    convert_chunk,
    effect_digest,
    run_in_order,
    storage_digest,
)
from coreai_zoo.weights.formats import ArrayKind, Format, pack_int4
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan
from coreai_zoo.weights.quantizer import QUANTIZER_VERSION, QuantizedRows

if TYPE_CHECKING:
    import numpy as np
    import torch

JOURNAL = "journal.jsonl"
PARTIAL = ".partial"
STORE_VERSION = 1
"""Raised when the layout of the files changes."""
IN_FLIGHT = 8
"""Small tensors that may wait to be synced; a large one waits alone."""
LARGE_BYTES = 4 * 2**20
"""From this size on a tensor is large: writing it takes longer than waiting for the disk."""
EVICT_BYTES = 128 * 2**20
"""So much is read of a checkpoint before the system is told that it need not keep it."""

_KINDS: tuple[str, ...] = get_args(ArrayKind)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")

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
        role: name of one of the weight map's roles.
        shape: of the parameter.
        dtype: of the plain values, or of the scales.
        quantization: how it is quantized, or None.
        source_digest: SHA-256 over the SHA-256 of each chunk of the source values, as stored in the checkpoint.
        files: by kind: `data`, `scales`, `zero_points`.
        read_transposed: see `Format.read_transposed`.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    quantization: QuantizationSpec | None
    source_digest: str
    files: Mapping[str, StoredFile]
    read_transposed: bool = False

    @cached_property
    def format(self) -> Format:
        """How it lies in memory."""
        return Format(self.shape, self.dtype, self.quantization, self.read_transposed)

    def array(self, kind: ArrayKind) -> np.memmap[Any, Any]:
        """One of its arrays, mapped: in `StoredArray.memory_shape` and `memory_dtype`.

        Raises:
            KeyError: when it has no such array.
        """
        import numpy as np

        array = self.format.arrays[kind]
        # Copy-on-write: torch.from_numpy warns about arrays that it must not write to, and nothing may reach the file.
        flat: np.memmap[Any, Any] = np.memmap(self.files[kind].path, dtype=array.memory_dtype, mode="c")
        return flat.reshape(array.memory_shape)  # type: ignore[return-value]


@frozen
class FillReport:
    """The outcome of `WeightStore.fill`.

    Attributes:
        computed: tensors that were read, converted and written.
        reused: tensors that were there already.
        bytes_written: of the computed tensors.
        repaired: names of those among the computed that were there, but damaged.
        removed: names of tensors that the plan does not name and that were removed.
    """

    computed: int
    reused: int
    bytes_written: int
    repaired: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


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
        self._lock = Lock()
        self.entries: dict[str, dict[str, Any]] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        self._lines = len(lines)
        for line in lines:
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

    def append(self, *entries: dict[str, Any]) -> None:
        """Add lines and wait until they are on disk."""
        with self._lock:
            self._write(entries)
            self.entries |= {entry["name"]: entry for entry in entries}

    def forget(self, *names: str) -> None:
        """Withdraw entries, before their files are replaced: else a crash between the replacement and the new entry
        would leave the old entry vouching for new files.
        """
        with self._lock:
            known = [name for name in names if name in self.entries]
            if known:
                self._write([{"name": name, "forgotten": True} for name in known])
                for name in known:
                    del self.entries[name]

    def compact(self) -> None:
        """Rewrite the file without the lines that no longer count, when they are the greater part."""
        with self._lock:
            if self._lines <= 100 + 2 * len(self.entries):
                return
            shorter = self._path.with_name(self._path.name + PARTIAL)
            with shorter.open("wb") as file:
                file.writelines(map(self._line, self.entries.values()))
                _sync(file)
            os.replace(shorter, self._path)
            _sync_directory(self._path.parent)
            self._lines = len(self.entries)

    @staticmethod
    def _line(entry: dict[str, Any]) -> bytes:
        return _canonical({**entry, "check": _digest(entry)}) + b"\n"

    def _write(self, entries: Sequence[dict[str, Any]]) -> None:
        lines = b"".join(map(self._line, entries))
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    lines = b"\n" + lines  # closes a torn line, which stays damaged and is ignored
            file.write(lines)
            _sync(file)
        self._lines += len(entries)


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
        if error.errno in NO_SPACE:
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
    format: Format
    outputs: dict[str, _Output] = field(factory=dict)
    # A zero point that waits for its pair: rows with an odd number of blocks end within a byte.
    carry: torch.Tensor | None = None
    # Rows that wait for the others of their matrix, to be written transposed.
    rows: list[torch.Tensor] = field(factory=list)

    @classmethod
    def open(cls, directory: Path, planned: PlannedTensor) -> _TensorWriter:
        """Begin the files of a tensor.

        Raises:
            BadInput: when its name is no file name.
        """
        if not _SAFE_NAME.fullmatch(planned.name):
            raise BadInput(f"The parameter name {planned.name!r} cannot be a file name.", "Rename it in the overlay.")
        writer = cls(directory, planned.name, planned.format)
        try:
            for kind in planned.format.arrays:
                path = directory / f"{planned.name}.{kind}"
                writer.outputs[kind] = _Output(path, path.with_name(path.name + PARTIAL).open("wb"))
        except BaseException:
            writer.discard()
            raise
        return writer

    def write(self, kind: str, values: torch.Tensor) -> None:
        self.outputs[kind].write(bytes_of(values))

    def write_plain(self, values: torch.Tensor) -> None:
        """Write rows, or keep those of a matrix that is written transposed until it is whole."""
        import torch

        if not self.format.transposed:
            self.write("data", values)
            return
        self.rows.append(values)
        height = self.format.shape[-2]
        if sum(map(len, self.rows)) < height:
            return
        waiting = torch.cat(self.rows)
        whole = len(waiting) // height * height
        for matrix in waiting[:whole].split(height):
            self.write("data", matrix.T)
        self.rows = [waiting[whole:]]

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
        """All rows are written; the sizes and hashes for the journal."""
        import torch

        if self.carry is not None:
            self.write("zero_points", pack_int4(torch.cat((self.carry, torch.zeros_like(self.carry)))))
        return {
            kind: {"bytes": output.size, "sha256": output.sha256.hexdigest()} for kind, output in self.outputs.items()
        }

    @property
    def bytes(self) -> int:
        """Bytes of all its files."""
        return sum(output.size for output in self.outputs.values())

    def sync(self) -> None:
        """Wait until the files are on disk."""
        for output in self.outputs.values():
            _sync(output.file)

    def put_in_place(self) -> None:
        """Rename the files, and remove those that the tensor no longer has; `_sync_directory` is still to be called."""
        for output in self.outputs.values():
            output.file.close()
            os.replace(output.file.name, output.path)
        for kind in set(_KINDS) - set(self.outputs):
            (self.directory / f"{self.name}.{kind}").unlink(missing_ok=True)

    def discard(self) -> None:
        """Leave nothing behind of what is not in place."""
        for output in self.outputs.values():
            with suppress(OSError):  # closing writes what is buffered: the disk may be full
                output.file.close()
            Path(output.file.name).unlink(missing_ok=True)


@frozen
class _Computed:
    """A tensor whose files are complete, but not synced and in place yet."""

    writer: _TensorWriter
    entry: dict[str, Any]

    @property
    def room(self) -> int:
        """The part of the room for waiting tensors that it takes: all of it when it is large."""
        return IN_FLIGHT if self.writer.bytes >= LARGE_BYTES else 1


class _Committer:
    """Puts computed tensors in place while the next ones are computed.

    Whatever has come up while the disk was busy is committed together, so that many small tensors share the waiting.
    When the block is left, all that was submitted is in place, also when it is left by an exception.
    """

    def __init__(self, directory: Path, journal: _Journal) -> None:
        self._directory, self._journal = directory, journal
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._room = BoundedSemaphore(IN_FLIGHT)
        self._waiting: deque[_Computed] = deque()
        self._commits: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self._raise_failure()

    def submit(self, computed: _Computed) -> None:
        """Take over a computed tensor; waits while too many are waiting.

        Raises:
            OSError: when an earlier one could not be written.
        """
        for _ in range(computed.room):
            self._room.acquire()
        try:
            self._raise_failure()
        except BaseException:
            self._room.release(computed.room)
            raise
        self._waiting.append(computed)
        self._commits.append(self._pool.submit(self._commit))

    def settle(self) -> None:
        """Wait until all that was submitted is in place.

        Raises:
            OSError: when one could not be written.
        """
        while self._commits:
            self._commits.popleft().result()

    def _raise_failure(self) -> None:
        while self._commits and self._commits[0].done():
            self._commits.popleft().result()

    def _commit(self) -> None:
        """Commit all that is waiting."""
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not batch:
            return  # an earlier call took it along
        try:
            for computed in batch:
                computed.writer.sync()
            self._journal.forget(*(computed.writer.name for computed in batch))
            for computed in batch:
                computed.writer.put_in_place()
            _sync_directory(self._directory)
            self._journal.append(*(computed.entry for computed in batch))
        except BaseException:
            for computed in batch:
                computed.writer.discard()
            raise
        finally:
            self._room.release(sum(computed.room for computed in batch))


# ---------------------------------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------------------------------


_CODE = (
    "coreai_zoo.checkpoint.files",
    "coreai_zoo.checkpoint.fp8",
    "coreai_zoo.checkpoint.headers",
    "coreai_zoo.dtypes",
    "coreai_zoo.weights.convert",
    "coreai_zoo.weights.formats",
    "coreai_zoo.weights.quantizer",
    "coreai_zoo.weights.store",
)
"""The modules that a value goes through on its way from a checkpoint to the store; a transform is the overlay's."""


@cache
def code_of_values() -> str:
    """SHA-256 over the source of every module of the zoo that has a hand in the bytes of a stored tensor."""
    return _digest(source_digests(_CODE))


@cache
def _installed(name: str, version: Callable[[str], str]) -> str:
    """The version of a distribution by `version`, which reads a file each time: once, and not for each tensor."""
    return version(name)


def ingredients(planned: PlannedTensor, checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything but values that determines the bytes of a stored tensor, by what it is.

    A store outlives the process that filled it, and code changes meanwhile. So code is in it twice: as source, and as
    what it makes of fixed values, which changes with a library too. Of a transform there is only the latter, since an
    edit elsewhere in an overlay must not cost a checkpoint's worth of quantizing.
    """
    transform, spec, columns = planned.transform, planned.quantization, planned.format.columns
    infos = [checkpoint.tensors[source.key] for source in planned.sources]
    return {
        "layout": STORE_VERSION,
        "code": code_of_values(),
        "torch": _installed("torch", distributions.version),
        "shape": list(planned.shape),
        "dtype": planned.dtype,
        "quantization": asdict(spec) if spec else None,
        "read transposed": planned.read_transposed,
        "quantizer": QUANTIZER_VERSION if spec else None,
        "storing": storage_digest(columns, planned.dtype, spec),
        "transform": [transform.name, effect_digest(transform, columns)] if transform else None,
        "keys": [source.key for source in planned.sources],
        "rows": [[source.start, source.stop] for source in planned.sources],
        "source shapes": [list(info.shape) for info in infos],
        "source dtypes": [info.dtype for info in infos],
    }


def _fingerprint(planned: PlannedTensor, checkpoint: Checkpoint) -> str:
    return _digest(ingredients(planned, checkpoint))


def _stamps(planned: PlannedTensor, checkpoint: Checkpoint) -> list[list[Any]]:
    stamps = frozenset[Stamp]().union(*(checkpoint.stamps(source.key) for source in planned.sources))
    return [list(stamp) for stamp in sorted(stamps)]


def _hash_sources(planned: PlannedTensor, checkpoint: Checkpoint) -> str:
    """The digest of the source values, as `_Work` makes it while computing."""

    def hash_chunk(chunk: Chunk) -> bytes:
        return hashlib.sha256(bytes_of(checkpoint.read_rows(chunk.key, chunk.start, chunk.stop))).digest()

    digest = hashlib.sha256()
    for part in run_in_order(partial(hash_chunk, chunk) for chunk in chunks_of(planned)):
        digest.update(part)
    return digest.hexdigest()


class WeightStore:
    """Tensors in a directory, filled from a checkpoint and read back as memory maps.

    Args:
        directory: where the store is, or will be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def journal(self) -> _Journal:
        """The journal of the store, for this module alone."""
        with _explained(self.directory):
            return _Journal(self.directory / JOURNAL)

    def fill(
        self,
        plan: WeightPlan,
        checkpoint: Checkpoint,
        progress: Progress | None = None,
        *,
        check: Literal["quick", "full"] = "quick",
        keep_others: bool = False,
        arriving: Iterable[Sequence[PlannedTensor]] | None = None,
    ) -> FillReport:
        """Make every tensor that `plan` stores present, computing only those that are not.

        Args:
            plan: what to store.
            checkpoint: where the values are.
            progress: called with a tensor and the number of its elements that were finished since the last call.
            check: how a tensor that is there already is checked. `quick` reads no values: it notices a missing file,
                another size, and every checkpoint file whose path, header, size or times have changed. It does not
                notice bytes that changed in the store within the same size, nor values that changed in a checkpoint
                file behind its time stamps. `full` reads all of both, hashes it, and notices those too.
            keep_others: leave tensors that `plan` does not name in the store, where they are otherwise removed.
            arriving: the tensors of `plan` in the order in which their values can be read, where they cannot all be at
                once: the next are asked for when those before are on disk. It is closed if it can be.

        Raises:
            BadInput: for a value that is not finite or overflows, an unreadable checkpoint, or a directory that cannot
                be written.
            EnvironmentLacks: when the disk is full. Finished tensors stay, and another call goes on from them.
        """
        with _explained(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for stale in self.directory.glob(f"*{PARTIAL}"):
                stale.unlink()
            removed = () if keep_others else self._remove_others(plan)
            self.journal.compact()
            work = _Work(self, checkpoint, progress or (lambda _tensor, _count: None), full=check == "full")
            work.run([plan.stored] if arriving is None else arriving)
            self._note_shared(plan)
        return FillReport(
            work.computed, len(plan.stored) - work.computed, work.bytes_written, tuple(work.repaired), removed
        )

    def _remove_others(self, plan: WeightPlan) -> tuple[str, ...]:
        """Remove what is stored under names that `plan` does not have; these names."""
        planned = {tensor.name for tensor in plan.stored}
        others = sorted(set(self.journal.entries) - {tensor.name for tensor in plan.tensors})
        self.journal.forget(*others)
        # Not only the files of `others`: a crash leaves files that the journal does not know.
        for path in self.directory.iterdir():
            name, _, kind = path.name.rpartition(".")
            if kind in _KINDS and name not in planned and _SAFE_NAME.fullmatch(name):
                path.unlink()
        return tuple(others)

    def _note_shared(self, plan: WeightPlan) -> None:
        """Note for each tensor without bytes of its own where they are."""
        for tensor in plan.tensors:
            entry = {"name": tensor.name, "stored_as": tensor.stored_as}
            if not tensor.is_stored and self.journal.entries.get(tensor.name) != entry:
                self.journal.append(entry)

    def __getitem__(self, name: str) -> StoredTensor:
        """The finished tensor called `name`, or that whose bytes it shares, under the name of that.

        Raises:
            KeyError: when the store does not hold it.
        """
        entry = self.journal.entries[name]
        if "stored_as" in entry:
            return self[entry["stored_as"]]
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
            entry["read_transposed"],
        )

    def __contains__(self, name: object) -> bool:
        return name in self.journal.entries

    def unfinished(self, plan: WeightPlan, checkpoint: Checkpoint) -> tuple[PlannedTensor, ...]:
        """The tensors of `plan` of which a quick `fill` would read values: to compute them, or to compare."""
        return tuple(planned for planned in plan.stored if not self._is_known(planned, checkpoint))

    def _is_known(self, planned: PlannedTensor, checkpoint: Checkpoint) -> bool:
        entry = self.journal.entries.get(planned.name)
        return (
            entry is not None
            and entry.get("fingerprint") == _fingerprint(planned, checkpoint)
            and self.intact(planned.name)
            and entry["stamps"] == _stamps(planned, checkpoint)
        )

    def damaged(self, name: str) -> bool:
        """Read the files of `name` in full; whether one differs from what was written."""
        for file in self[name].files.values():
            if not file.path.is_file():
                return True
            with file.path.open("rb") as content:  # not `digest.file_sha256`, which may remember it: the disk is asked
                if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                    return True
        return False

    def intact(self, name: str) -> bool:
        """Whether the files of `name` are there in the sizes that were written."""
        files = self[name].files.values()
        return all(file.path.is_file() and file.path.stat().st_size == file.bytes for file in files)


@define
class _Eviction:
    """Gives back the memory in which the system keeps what was read of a checkpoint, some at a time.

    What was read last may still be in use, and keeps its memory until the next time.
    """

    checkpoint: Checkpoint
    bytes: int = 0
    read: list[str] = field(factory=list)
    again: list[str] = field(factory=list)

    def add(self, planned: PlannedTensor) -> None:
        """All sources of `planned` were read."""
        for source in planned.sources:
            start, stop = self.checkpoint.tensors[source.key].span
            self.bytes += stop - start
            self.read.append(source.key)
        if self.bytes >= EVICT_BYTES:
            self.evict()

    def evict(self) -> None:
        """Give back what can be given back now."""
        self.checkpoint.evict([*self.again, *self.read])
        self.bytes, self.read, self.again = 0, [], self.read


@define
class _Work:
    """One `WeightStore.fill`: finds the tensors that are not current, computes them and counts."""

    store: WeightStore
    checkpoint: Checkpoint
    progress: Progress
    full: bool
    computed: int = 0
    bytes_written: int = 0
    repaired: list[str] = field(factory=list)

    def run(self, arriving: Iterable[Sequence[PlannedTensor]]) -> None:
        """Compute what is not current, and have it on disk before the next tensors are asked for."""
        eviction = _Eviction(self.checkpoint)
        with ExitStack() as stack:
            if isinstance(arriving, Generator):
                stack.enter_context(closing(arriving))
            committer = stack.enter_context(_Committer(self.store.directory, self.store.journal))
            for tensors in arriving:
                self._compute(tensors, committer, eviction)
                committer.settle()
        eviction.evict()

    def _compute(self, tensors: Sequence[PlannedTensor], committer: _Committer, eviction: _Eviction) -> None:
        """Compute those of the tensors that are not current, chunk by chunk and without a pause between them."""
        chunks = (chunk for planned in tensors if not self._is_current(planned) for chunk in chunks_of(planned))
        results = run_in_order(partial(convert_chunk, self.checkpoint, chunk) for chunk in chunks)
        with closing(results):
            for result in results:
                self._write_tensor(result, results, committer)
                eviction.add(result.chunk.planned)

    def _write_tensor(self, first: Result, results: Iterator[Result], committer: _Committer) -> None:
        """Write the tensor that begins with `first` and hand it to the committer."""
        planned = first.chunk.planned
        writer = _TensorWriter.open(self.store.directory, planned)
        try:
            digest = hashlib.sha256()
            for result in chain([first], results):
                digest.update(result.source)
                self.progress(planned, self._write_chunk(result, writer))
                if result.chunk.last:
                    break
            entry = self._entry(planned, digest.hexdigest(), writer.finish())
            committer.submit(_Computed(writer, entry))
        except BaseException:
            writer.discard()
            raise
        self.computed += 1
        self.bytes_written += writer.bytes

    @staticmethod
    def _write_chunk(result: Result, writer: _TensorWriter) -> int:
        """Write a chunk; the number of its elements."""
        spec = result.chunk.planned.quantization
        if result.plain is not None:
            writer.write_plain(result.plain)
            return result.plain.numel()
        assert result.quantized is not None and spec is not None
        writer.write_quantized(result.quantized, spec)
        return result.quantized.codes.numel() * (8 // spec.bits)

    def _entry(self, planned: PlannedTensor, source_digest: str, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            "name": planned.name,
            "fingerprint": _fingerprint(planned, self.checkpoint),
            "stamps": _stamps(planned, self.checkpoint),
            "source_digest": source_digest,
            "role": planned.role,
            "shape": list(planned.shape),
            "dtype": planned.dtype,
            "quantization": asdict(planned.quantization) if planned.quantization else None,
            "read_transposed": planned.read_transposed,
            "files": files,
        }

    def _is_current(self, planned: PlannedTensor) -> bool:
        """Whether the store holds what computing `planned` would give."""
        entry = self.store.journal.entries.get(planned.name)
        if entry is None or entry.get("fingerprint") != _fingerprint(planned, self.checkpoint):
            return False
        if not self.store.intact(planned.name) or (self.full and self.store.damaged(planned.name)):
            self.repaired.append(planned.name)
            return False
        stamps = _stamps(planned, self.checkpoint)
        known = entry["stamps"] == stamps and not self.full
        if not known and entry["source_digest"] != _hash_sources(planned, self.checkpoint):
            return False
        if entry["stamps"] != stamps or entry["role"] != planned.role:
            self.store.journal.append({**entry, "stamps": stamps, "role": planned.role})
        self.progress(planned, planned.parameters)
        return True
