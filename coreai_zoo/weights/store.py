"""The weight store: a tensor at a time, each where it is to stand, and resumable after any interruption.

An array of a tensor has a place: in the asset that is being built, as a `Layout` says, or else in a file of its own in
the directory of the store. A tensor's bytes are written there, raw and little-endian in row order, and synced; then a
line of `journal.jsonl` says where they are, synced as well. So a line vouches for bytes, and is withdrawn before these
are written anew. Syncing goes on while the next tensor is computed: a crash costs the tensor being computed and the one
that waits for the disk, or a few small ones that do.

The directory is the store's own: tensors that a plan does not name are removed from it.

A tensor is computed again when the values of its sources or anything else that makes its bytes changed: what is asked
for, and the code that makes it (see `ingredients`). One that is current and lies elsewhere is copied. Values are hashed
while they are read; later a source counts as unchanged while its file has the same path, header, size and times, and is
hashed again, without computing anything, when it has not.
"""

from __future__ import annotations

import hashlib
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
from threading import BoundedSemaphore
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, get_args

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
from coreai_zoo.weights.formats import TABLE, ArrayKind, Format, pack_int4
from coreai_zoo.weights.journal import Journal, canonical, sync, sync_path
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan
from coreai_zoo.weights.quantizer import QUANTIZER_VERSION, QuantizedRows, one_thread

if TYPE_CHECKING:
    import numpy as np
    import torch

JOURNAL = "journal.jsonl"
LOOKS = "looks.json"
"""What was seen of values that are not stored; `stream` writes it."""
_LAYOUT = "@layout"  # no parameter is called so
STORE_VERSION = 2
"""Raised when the layout of the files changes."""
IN_FLIGHT = 8
"""Small tensors that may wait to be synced; a large one waits alone."""
LARGE_BYTES = 4 * 2**20
"""From this size on a tensor is large: writing it takes longer than waiting for the disk."""
EVICT_BYTES = 128 * 2**20
"""So much is read of a checkpoint before the system is told that it need not keep it."""
_BLOCK_BYTES = 4 * 2**20

_KINDS: tuple[str, ...] = get_args(ArrayKind)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")

Progress = Callable[[PlannedTensor, int], None]
Placed = Callable[[Iterable["StoredArray"]], None]
"""Is told of arrays that are where they are to be; in another thread."""


@frozen
class Place:
    """Where the bytes of an array are, or are to be.

    Attributes:
        path: of a file.
        offset: of the first byte in it.
    """

    path: Path
    offset: int = 0


Places = Mapping[str, Place]
"""Where arrays are to be, by their names in the state of the decoder."""


def first_of(places: Places) -> Callable[[PlannedTensor], int]:
    """Gives where the first of a tensor's arrays is to be in its file: the order to fill one from its beginning."""

    def first(planned: PlannedTensor) -> int:
        names = planned.format.state_names(planned.name).values()
        return min((places[name].offset for name in names if name in places), default=0)

    return first


@frozen
class StoredArray:
    """The bytes of an array.

    Attributes:
        place: where they are.
        bytes: how many.
        stamp: size and time of change of the file, of one that is not to change any more.
    """

    place: Place
    bytes: int
    stamp: tuple[int, int] | None = None

    @property
    def is_there(self) -> bool:
        """Whether the file is there, and long enough, and as it was left."""
        try:
            status = self.place.path.stat()
        except OSError:
            return False
        long_enough = status.st_size >= self.place.offset + self.bytes
        return long_enough and self.stamp in (None, (status.st_size, status.st_mtime_ns))


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
        arrays: by kind: `data`, `scales`, `zero_points`, `table`.
        read_transposed: see `Format.read_transposed`.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    quantization: QuantizationSpec | None
    source_digest: str
    arrays: Mapping[str, StoredArray]
    read_transposed: bool = False

    @cached_property
    def format(self) -> Format:
        """How it lies in memory."""
        return Format(self.shape, self.dtype, self.quantization, self.read_transposed)

    @property
    def is_there(self) -> bool:
        """Whether all its bytes are there, as far as sizes and times tell."""
        return all(array.is_there for array in self.arrays.values())

    def array(self, kind: ArrayKind) -> np.memmap[Any, Any]:
        """One of its arrays, mapped: in `formats.StoredArray.memory_shape` and `memory_dtype`.

        NumPy has no bfloat16: the values of such an array are its 16 bits as uint16.

        Raises:
            KeyError: when it has no such array.
        """
        import numpy as np

        array, place = self.format.arrays[kind], self.arrays[kind].place
        dtype = "uint16" if array.memory_dtype == "bfloat16" else array.memory_dtype
        # Copy-on-write: torch.from_numpy warns about arrays that it must not write to, and nothing may reach the file.
        return np.memmap(place.path, dtype=dtype, mode="c", offset=place.offset, shape=array.memory_shape)


@frozen
class FillReport:
    """The outcome of `WeightStore.fill`.

    Attributes:
        computed: tensors that were read, converted and written.
        reused: tensors that were there already.
        bytes_written: of the computed tensors.
        repaired: names of those among the computed that were there, but not whole any more.
        removed: names of tensors that the plan does not name and that were removed.
    """

    computed: int
    reused: int
    bytes_written: int
    repaired: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def is_own_file(path: Path) -> bool:
    """Whether a file is called as those in which a store has what it stores."""
    name, _, kind = path.name.rpartition(".")
    return path.name == LOOKS or (kind in _KINDS and _SAFE_NAME.fullmatch(name) is not None)


def _digest(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


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
                f"There is no space left for weights ({error.strerror}; {free:,} bytes are free in {directory}).",
                "Free some, then run the same command again to go on.",
            ) from error
        raise EnvironmentLacks(
            f"The weight store {directory} cannot be used: {error.strerror or error} ({error.filename or directory}).",
            "Mend that, then run the same command again to go on.",
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Writing one tensor
# ---------------------------------------------------------------------------------------------------------------------


@define
class _TensorWriter:
    """Writes the arrays of one tensor to their places, in the order of its rows."""

    format: Format
    places: Mapping[ArrayKind, Place]
    files: dict[ArrayKind, BinaryIO] = field(factory=dict)
    # A zero point that waits for its pair: rows with an odd number of blocks end within a byte.
    carry: torch.Tensor | None = None
    # A matrix that is written transposed once all of its rows are there, and how many are.
    matrix: torch.Tensor | None = None
    rows: int = 0

    def __attrs_post_init__(self) -> None:
        try:
            for kind, place in self.places.items():
                with suppress(FileExistsError):
                    place.path.open("xb").close()
                self.files[kind] = place.path.open("r+b")
                self.files[kind].seek(place.offset)
        except BaseException:
            self.close()
            raise

    def write(self, kind: ArrayKind, values: torch.Tensor) -> None:
        self.files[kind].write(bytes_of(values))

    def copy(self, arrays: Mapping[str, StoredArray]) -> None:
        """Write what is stored elsewhere."""
        for kind, file in self.files.items():
            with arrays[kind].place.path.open("rb") as source:
                source.seek(arrays[kind].place.offset)
                for start in range(0, arrays[kind].bytes, _BLOCK_BYTES):
                    file.write(source.read(min(_BLOCK_BYTES, arrays[kind].bytes - start)))

    def write_plain(self, values: torch.Tensor) -> None:
        """Write rows, or keep those of a matrix that is written transposed until it is whole."""
        if not self.format.transposed:
            self.write("data", values)
            return
        height = self.format.shape[-2]
        if self.matrix is None:
            self.matrix = values.new_empty(height, self.format.columns)
        while len(values):
            taken, values = values.tensor_split([height - self.rows])
            self.matrix[self.rows : self.rows + len(taken)] = taken
            self.rows += len(taken)
            if self.rows == height:
                self.write("data", self.matrix.T)
                self.rows = 0

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

    def finish(self) -> None:
        """All rows are written."""
        import torch

        if self.carry is not None:
            self.write("zero_points", pack_int4(torch.cat((self.carry, torch.zeros_like(self.carry)))))
        if "table" in self.files:
            self.write("table", torch.tensor(TABLE, dtype=torch.int8))

    @property
    def stored(self) -> dict[str, StoredArray]:
        """What there is when it is finished."""
        return {kind: StoredArray(self.places[kind], array.bytes) for kind, array in self.format.arrays.items()}

    def sync(self) -> None:
        """Wait until all is on disk."""
        for file in self.files.values():
            sync(file)
        self.close()

    def close(self) -> None:
        """Write no more."""
        for file in self.files.values():
            with suppress(OSError):  # closing writes what is buffered: the disk may be full
                file.close()


@frozen
class _Written:
    """A tensor that is written, but not synced yet."""

    writer: _TensorWriter
    entry: dict[str, Any]

    @property
    def room(self) -> int:
        """The part of the room for waiting tensors that it takes: all of it when it is large."""
        return IN_FLIGHT if self.writer.format.bytes >= LARGE_BYTES else 1


class _Committer:
    """Syncs written tensors and notes them in the journal while the next ones are computed.

    Whatever has come up while the disk was busy is committed together, so that many small tensors share the waiting.
    When the block is left, all that was submitted is in place, also when it is left by an exception.
    """

    def __init__(self, store: WeightStore, placed: Placed) -> None:
        self._directory, self._journal, self._placed = store.directory, store.journal, placed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._room = BoundedSemaphore(IN_FLIGHT)
        self._waiting: deque[_Written] = deque()
        self._commits: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self._raise_failure()

    def submit(self, written: _Written) -> None:
        """Take over a written tensor; waits while too many are waiting.

        Raises:
            OSError: when an earlier one could not be written.
        """
        for _ in range(written.room):
            self._room.acquire()
        try:
            self._raise_failure()
        except BaseException:
            self._room.release(written.room)
            raise
        self._waiting.append(written)
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
            for written in batch:
                written.writer.sync()
            sync_path(self._directory)
            self._journal.append(*(written.entry for written in batch))
            for written in batch:
                self._placed(written.writer.stored.values())
        finally:
            for written in batch:
                written.writer.close()
            self._room.release(sum(written.room for written in batch))


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
    def journal(self) -> Journal:
        """The journal of the store, for this module alone."""
        with _explained(self.directory):
            return Journal(self.directory / JOURNAL)

    def fill(
        self,
        plan: WeightPlan,
        checkpoint: Checkpoint,
        progress: Progress | None = None,
        *,
        places: Places | None = None,
        placed: Placed | None = None,
        keep_others: bool = False,
        arriving: Iterable[Sequence[PlannedTensor]] | None = None,
    ) -> FillReport:
        """Have every tensor that `plan` stores where it is to be, computing only those that are not current.

        No value is read of one that is: it is noticed when a file is missing or too short, and when a checkpoint file
        has another path, header, size or time. It is not noticed when bytes changed behind the back of that.

        Args:
            plan: what to store.
            checkpoint: where the values are.
            progress: called with a tensor and the number of its elements that were finished since the last call.
            places: where arrays are to be; those without a place are in files of the store's own.
            placed: told of every array once it is there.
            keep_others: leave tensors that `plan` does not name in the store, where they are otherwise removed.
            arriving: the tensors of `plan` in the order in which their values can be read, where they cannot all be at
                once: the next are asked for when those before are on disk. It is closed if it can be. Without, they
                are written in the order of their places.

        Raises:
            BadInput: for a value that is not finite or overflows, an unreadable checkpoint, or a directory that cannot
                be written.
            EnvironmentLacks: when the disk is full. Finished tensors stay, and another call goes on from them.
        """
        with _explained(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            removed = () if keep_others else self._remove_others(plan)
            self.journal.compact()
            work = _Work(self, checkpoint, places or {}, progress or (lambda *_: None), placed or (lambda _: None))
            try:
                work.run([sorted(plan.stored, key=first_of(work.places))] if arriving is None else arriving)
                self._note_shared(plan)
            finally:
                if not keep_others:
                    self._remove_unused_files()
        return FillReport(
            work.computed, len(plan.stored) - work.computed, work.bytes_written, tuple(work.repaired), removed
        )

    def _remove_others(self, plan: WeightPlan) -> tuple[str, ...]:
        """Remove what is stored under names that `plan` does not have; these names."""
        others = sorted(set(self.journal.entries) - {_LAYOUT, *(tensor.name for tensor in plan.tensors)})
        self.journal.forget(*others)
        self._remove_unused_files()
        return tuple(others)

    def _remove_unused_files(self) -> None:
        """Remove what the journal does not name: a crash leaves it, and what was copied to another place does."""
        used = self.own_files()
        for path in self.directory.iterdir():
            if is_own_file(path) and path not in used:
                path.unlink()

    def _paths_of(self, name: str) -> set[Path]:
        """The files that an entry of the journal vouches for, the bytes of that name being its own."""
        files = self.journal.entries[name].get("files", {})
        return {self.directory / file["path"] for file in files.values()}

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
        arrays = {
            kind: StoredArray(
                Place(self.directory / file["path"], file["offset"]), file["bytes"], _stamp_of(file["stamp"])
            )
            for kind, file in entry["files"].items()
        }
        return StoredTensor(
            name,
            entry["role"],
            tuple(entry["shape"]),
            entry["dtype"],
            QuantizationSpec(**spec) if spec else None,
            entry["source_digest"],
            arrays,
            entry["read_transposed"],
        )

    def __contains__(self, name: object) -> bool:
        return name in self.journal.entries

    def unfinished(self, plan: WeightPlan, checkpoint: Checkpoint) -> tuple[PlannedTensor, ...]:
        """The tensors of `plan` of which `fill` would read values: to compute them, or to compare."""

        def is_known(planned: PlannedTensor) -> bool:
            entry = self.entry_of(planned, checkpoint)
            known = entry is not None and entry["stamps"] == _stamps(planned, checkpoint)
            return known and self[planned.name].is_there

        return tuple(planned for planned in plan.stored if not is_known(planned))

    def entry_of(self, planned: PlannedTensor, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """The entry of a tensor that was made as `planned` would be; None where there is none."""
        entry = self.journal.entries.get(planned.name, {})
        return entry if entry.get("fingerprint") == _fingerprint(planned, checkpoint) else None

    # The asset that is filled

    @property
    def holds_tensors(self) -> bool:
        """Whether there is a finished tensor in an asset below the directory."""
        return any(self.directory in path.parent.parents for path in self.files())

    def laid_out_as(self, sha256: str) -> str | None:
        """The folder in which weights are stored by the layout of that SHA-256; None where another was the last."""
        entry = self.journal.entries.get(_LAYOUT, {})
        return entry["folder"] if entry.get("sha256") == sha256 else None

    def lay_out(self, sha256: str, folder: str) -> None:
        """Note the SHA-256 of a layout, and the name of the folder in which weights are stored by it from now on."""
        with _explained(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.journal.append({"name": _LAYOUT, "sha256": sha256, "folder": folder})

    def files(self) -> frozenset[Path]:
        """The files in which tensors are stored."""
        return frozenset[Path]().union(*map(self._paths_of, self.journal.entries))

    def own_files(self) -> frozenset[Path]:
        """The files of the store's own but for its journal: those of tensors that are nowhere else, and `LOOKS`."""
        looks = self.directory / LOOKS
        return frozenset(path for path in (*self.files(), looks) if path.parent == self.directory and path.exists())

    def keep(self, directory: Path, folder: Path, destination: Path) -> None:
        """Leave a store from which another can begin: what is in a folder now will be in another, and not change.

        Args:
            directory: of that store.
            folder: of the asset, below the directory of this store.
            destination: where it will be.
        """

        def kept(file: Mapping[str, Any]) -> Mapping[str, Any]:
            path = self.directory / file["path"]
            if folder not in path.parents:
                return file
            status, there = path.stat(), destination / path.relative_to(folder)
            return {**file, "path": str(there), "stamp": [status.st_size, status.st_mtime_ns]}

        entries = {name: entry for name, entry in self.journal.entries.items() if name != _LAYOUT}
        for name, entry in entries.items():
            if "files" in entry:
                entries[name] = {**entry, "files": {kind: kept(file) for kind, file in entry["files"].items()}}
        with _explained(directory):
            self._hand_over(directory, entries)

    def adopt(self, directory: Path) -> None:
        """Begin with what `keep` left."""
        left = WeightStore(directory)
        with _explained(self.directory):
            left._hand_over(self.directory, left.journal.entries)

    def _hand_over(self, directory: Path, entries: Mapping[str, dict[str, Any]]) -> None:
        """Give another store the files of this one, and a journal."""
        for path in self.own_files():
            shutil.copyfile(path, directory / path.name)
        Journal(directory / JOURNAL).replace(entries)


def _stamp_of(recorded: list[int] | None) -> tuple[int, int] | None:
    return None if recorded is None else (recorded[0], recorded[1])


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
    places: Places
    progress: Progress
    placed: Placed
    computed: int = 0
    bytes_written: int = 0
    repaired: list[str] = field(factory=list)

    def run(self, arriving: Iterable[Sequence[PlannedTensor]]) -> None:
        """Compute what is not current, and have it on disk before the next tensors are asked for."""
        eviction = _Eviction(self.checkpoint)
        with ExitStack() as stack:
            stack.enter_context(one_thread())  # the other cores are the workers'
            if isinstance(arriving, Generator):
                stack.enter_context(closing(arriving))
            committer = stack.enter_context(_Committer(self.store, self.placed))
            for tensors in arriving:
                self._compute(tensors, committer, eviction)
                committer.settle()
        eviction.evict()

    def _compute(self, tensors: Sequence[PlannedTensor], committer: _Committer, eviction: _Eviction) -> None:
        """Compute those of the tensors that are not current, chunk by chunk and without a pause between them."""
        missing = (planned for planned in tensors if not self._is_in_place(planned, committer))
        chunks = (chunk for planned in missing for chunk in chunks_of(planned))
        results = run_in_order(partial(convert_chunk, self.checkpoint, chunk) for chunk in chunks)
        with closing(results):
            for result in results:
                self._write_tensor(result, results, committer)
                eviction.add(result.chunk.planned)

    def _write_tensor(self, first: Result, results: Iterator[Result], committer: _Committer) -> None:
        """Write the tensor that begins with `first` and hand it to the committer."""
        planned = first.chunk.planned
        self.store.journal.forget(planned.name)
        with self._writer(planned) as writer:
            digest = hashlib.sha256()
            for result in chain([first], results):
                digest.update(result.source)
                self.progress(planned, self._write_chunk(result, writer))
                if result.chunk.last:
                    break
            writer.finish()
            # Of a file that comes and goes the stamp says what it should be, not what was read.
            self.checkpoint.require_unchanged([source.key for source in planned.sources])
            committer.submit(_Written(writer, self._entry(planned, digest.hexdigest(), writer)))
        self.computed += 1
        self.bytes_written += writer.format.bytes

    def _places_of(self, planned: PlannedTensor) -> dict[ArrayKind, Place]:
        """Where a tensor's arrays are to be.

        Raises:
            BadInput: when its name is no file name.
        """
        if not _SAFE_NAME.fullmatch(planned.name):
            raise BadInput(f"The parameter name {planned.name!r} cannot be a file name.", "Rename it in the overlay.")
        own = {kind: Place(self.store.directory / f"{planned.name}.{kind}") for kind in planned.format.arrays}
        names = planned.format.state_names(planned.name)
        return {kind: self.places.get(names[kind], place) for kind, place in own.items()}

    @contextmanager
    def _writer(self, planned: PlannedTensor) -> Iterator[_TensorWriter]:
        """What writes a tensor, which the committer closes unless the block fails."""
        writer = _TensorWriter(planned.format, self._places_of(planned))
        try:
            yield writer
        except BaseException:
            writer.close()
            raise

    @staticmethod
    def _write_chunk(result: Result, writer: _TensorWriter) -> int:
        """Write a chunk; the number of its elements."""
        spec = result.chunk.planned.quantization
        if result.plain is not None:
            writer.write_plain(result.plain)
            return result.plain.numel()
        assert result.quantized is not None and spec is not None
        writer.write_quantized(result.quantized, spec)
        return result.quantized.codes.numel() * 8 // spec.bits

    def _entry(self, planned: PlannedTensor, source_digest: str, writer: _TensorWriter) -> dict[str, Any]:
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
            "files": self._files(writer.stored),
        }

    def _files(self, stored: Mapping[str, StoredArray]) -> dict[str, dict[str, Any]]:
        """Arrays as the journal has them; a path in the store's own directory is relative to that."""
        found = {}
        for kind, array in stored.items():
            path, own = array.place.path, self.store.directory
            path = path.relative_to(own) if path.is_relative_to(own) else path.absolute()
            found[kind] = {"path": str(path), "offset": array.place.offset, "bytes": array.bytes, "stamp": None}
        return found

    def _is_in_place(self, planned: PlannedTensor, committer: _Committer) -> bool:
        """Whether a tensor need not be computed: it is where it is to be, or it was copied there."""
        if not self._is_current(planned):
            return False
        entry, stored = self.store.journal.entries[planned.name], self.store[planned.name]
        if {kind: array.place for kind, array in stored.arrays.items()} == self._places_of(planned):
            self.placed(stored.arrays.values())
        else:
            with self._writer(planned) as writer:
                writer.copy(stored.arrays)
                committer.submit(_Written(writer, {**entry, "files": self._files(writer.stored)}))
        self.progress(planned, planned.parameters)
        return True

    def _is_current(self, planned: PlannedTensor) -> bool:
        """Whether the store holds what computing `planned` would give."""
        entry = self.store.entry_of(planned, self.checkpoint)
        if entry is None:
            return False
        stored = self.store[planned.name]
        if not stored.is_there:
            # What is gone, or another's, is not damaged: a bundle that was replaced, a layout that made room.
            if any(array.stamp is None and array.place.path.exists() for array in stored.arrays.values()):
                self.repaired.append(planned.name)
            return False
        stamps = _stamps(planned, self.checkpoint)
        if entry["stamps"] != stamps and entry["source_digest"] != _hash_sources(planned, self.checkpoint):
            return False
        if entry["stamps"] != stamps or entry["role"] != planned.role:
            self.store.journal.append({**entry, "stamps": stamps, "role": planned.role})
        return True
