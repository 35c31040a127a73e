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
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import cache, cached_property, partial
from importlib import metadata as distributions
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, get_args

from attrs import asdict, define, field, frozen

from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.headers import Stamp, TensorInfo
from coreai_zoo.digest import source_digests
from coreai_zoo.errors import BadInput
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
from coreai_zoo.weights.quantizer import QUANTIZER_VERSION, one_thread

if TYPE_CHECKING:
    import numpy as np
    import torch

JOURNAL = "journal.jsonl"
LOOKS = "looks.json"
"""What was seen of values that are not stored; `stream` writes it."""
IN_FLIGHT = 8
"""Small tensors that wait to be synced together, at the most; behind a large one nothing waits."""
LARGE_BYTES = 4 * 2**20
"""From this size on a tensor is large: writing it takes longer than waiting for the disk."""
EVICT_BYTES = 128 * 2**20
"""So much is read of a checkpoint before the system is told that it need not keep it."""
_BLOCK_BYTES = 4 * 2**20

_KINDS: tuple[str, ...] = get_args(ArrayKind)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")

Progress = Callable[[PlannedTensor, int], None]
Placed = Callable[[Iterable["StoredArray"]], None]
"""Is told of arrays that are where they are to be; of those that were just written, in another thread."""


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
    stamp: Sequence[int] | None = None

    @property
    def is_there(self) -> bool:
        """Whether the file is there, and long enough, and as it was left."""
        try:
            status = self.place.path.stat()
        except OSError:
            return False
        long_enough = status.st_size >= self.place.offset + self.bytes
        return long_enough and (self.stamp is None or [*self.stamp] == [status.st_size, status.st_mtime_ns])


@frozen
class StoredTensor:
    """A finished tensor of the store.

    Attributes:
        name: of the parameter.
        format: how it lies in memory.
        source_digest: SHA-256 over the SHA-256 of each chunk of the source values, as stored in the checkpoint.
        arrays: by kind: `data`, `scales`, `zero_points`, `table`.
    """

    name: str
    format: Format
    source_digest: str
    arrays: Mapping[str, StoredArray]

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


@define
class FillReport:
    """The outcome of `WeightStore.fill`.

    Attributes:
        computed: tensors that were read, converted and written.
        reused: tensors that were there already.
        bytes_written: of the computed tensors.
        repaired: names of those among the computed that were there, but not whole any more.
        removed: names of tensors that the plan does not name and that were removed.
    """

    computed: int = 0
    reused: int = 0
    bytes_written: int = 0
    repaired: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def _digest(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Writing one tensor
# ---------------------------------------------------------------------------------------------------------------------


def _creating(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT)


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
                self.files[kind] = open(place.path, "r+b", opener=_creating)  # noqa: SIM115  # `close` closes it
                self.files[kind].seek(place.offset)
        except BaseException:
            self.close()
            raise

    def write(self, values: Any) -> None:
        """Write the next rows, as `convert_chunk` gives them for this format."""
        if self.format.quantization is None:
            self._write_plain(values)
            return
        self._write("data", values.codes)
        self._write("scales", values.scales)
        if values.zero_points is not None:
            self._write_zero_points(values.zero_points.flatten())

    def _write(self, kind: ArrayKind, values: torch.Tensor) -> None:
        self.files[kind].write(bytes_of(values))

    def copy(self, arrays: Mapping[str, StoredArray]) -> None:
        """Write what is stored elsewhere."""
        for kind, file in self.files.items():
            with arrays[kind].place.path.open("rb") as source:
                source.seek(arrays[kind].place.offset)
                for start in range(0, arrays[kind].bytes, _BLOCK_BYTES):
                    file.write(source.read(min(_BLOCK_BYTES, arrays[kind].bytes - start)))

    def _write_plain(self, values: torch.Tensor) -> None:
        """Write rows, or keep those of a matrix that is written transposed until it is whole."""
        if not self.format.transposed:
            self._write("data", values)
            return
        height = self.format.shape[-2]
        if self.matrix is None:
            self.matrix = values.new_empty(height, self.format.columns)
        while len(values):
            taken, values = values.tensor_split([height - self.rows])
            self.matrix[self.rows : self.rows + len(taken)] = taken
            self.rows += len(taken)
            if self.rows == height:
                self._write("data", self.matrix.T)
                self.rows = 0

    def _write_zero_points(self, values: torch.Tensor) -> None:
        import torch

        if self.format.arrays["zero_points"].packed:
            if self.carry is not None:
                values = torch.cat((self.carry, values))
            even = len(values) // 2 * 2
            self.carry = values[even:].clone() if even < len(values) else None
            values = pack_int4(values[:even])
        self._write("zero_points", values)

    def finish(self) -> None:
        """All rows are written."""
        import torch

        if self.carry is not None:
            self._write("zero_points", pack_int4(torch.cat((self.carry, torch.zeros_like(self.carry)))))
        if "table" in self.files:
            self._write("table", torch.tensor(TABLE, dtype=torch.int8))

    @property
    def stored(self) -> dict[str, StoredArray]:
        """What there is when it is finished."""
        return {kind: StoredArray(self.places[kind], array.bytes) for kind, array in self.format.arrays.items()}

    def close(self) -> None:
        """Write no more."""
        for file in self.files.values():
            with suppress(OSError):  # closing writes what is buffered: the disk may be full
                file.close()


class _Committer:
    """Syncs written tensors and notes them in the journal while the next ones are computed.

    Whatever comes up while the disk is busy is committed together, so that many small tensors share the waiting. When
    the block is left, all that was submitted is in place, also when it is left by an exception.
    """

    def __init__(self, store: WeightStore, placed: Placed) -> None:
        self._directory, self._journal, self._placed = store.directory, store.journal, placed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._waiting: list[tuple[_TensorWriter, dict[str, Any]]] = []
        self._running: Future[None] = Future()
        self._running.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        with self._pool, ExitStack() as closed:
            for writer, _ in self._waiting:
                closed.callback(writer.close)
            with suppress(OSError) if error else nullcontext():
                self.settle()

    def submit(self, writer: _TensorWriter, entry: dict[str, Any]) -> None:
        """Take over a written tensor, and what the journal says of it but where it is; waits while too many wait.

        Raises:
            OSError: when an earlier one could not be written.
        """
        self._waiting.append((writer, entry))
        if len(self._waiting) == IN_FLIGHT or writer.format.bytes >= LARGE_BYTES or self._running.done():
            self._begin()

    def settle(self) -> None:
        """Wait until all that was submitted is in place.

        Raises:
            OSError: when one could not be written.
        """
        if self._waiting:
            self._begin()
        self._running.result()

    def _begin(self) -> None:
        self._running.result()
        batch, self._waiting = self._waiting, []
        self._running = self._pool.submit(self._commit, batch)

    def _commit(self, batch: Sequence[tuple[_TensorWriter, dict[str, Any]]]) -> None:
        with ExitStack() as closed:
            for writer, _ in batch:
                closed.callback(writer.close)
            for file in chain.from_iterable(writer.files.values() for writer, _ in batch):
                sync(file)
            sync_path(self._directory)
            self._journal.append(*({**entry, "files": self._files(writer.stored)} for writer, entry in batch))
            for writer, _ in batch:
                self._placed(writer.stored.values())

    def _files(self, stored: Mapping[str, StoredArray]) -> dict[str, dict[str, Any]]:
        """Arrays as the journal has them; a path in the directory of the store is relative to that."""
        found = {}
        for kind, array in stored.items():
            path, own = array.place.path, self._directory
            path = path.relative_to(own) if path.is_relative_to(own) else path.absolute()
            found[kind] = {"path": str(path), "offset": array.place.offset, "bytes": array.bytes, "stamp": None}
        return found


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
    infos = _infos(planned, checkpoint)
    return {
        "code": code_of_values(),
        "torch": _installed("torch", distributions.version),
        "format": asdict(planned.format),
        "quantizer": QUANTIZER_VERSION if spec else None,
        "storing": storage_digest(columns, planned.dtype, spec),
        "transform": [transform.name, effect_digest(transform, columns)] if transform else None,
        "keys": [source.key for source in planned.sources],
        "rows": [[source.start, source.stop] for source in planned.sources],
        "source shapes": [list(info.shape) for info in infos],
        "source dtypes": [info.dtype for info in infos],
    }


def _infos(planned: PlannedTensor, checkpoint: Checkpoint) -> list[TensorInfo]:
    return [checkpoint.tensors[source.key] for source in planned.sources]


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


@frozen(slots=False)  # for the journal
class WeightStore:
    """Tensors in a directory, filled from a checkpoint and read back as memory maps.

    Attributes:
        directory: where the store is, or will be.
    """

    directory: Path

    @cached_property
    def journal(self) -> Journal:
        """The journal of the store, for this module alone."""
        return Journal(self.directory / JOURNAL)

    def fill(
        self,
        plan: WeightPlan,
        checkpoint: Checkpoint,
        progress: Progress | None = None,
        *,
        places: Places | None = None,
        placed: Placed | None = None,
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
            arriving: the tensors of `plan` in the order in which their values can be read, where they cannot all be at
                once, or not all are wanted yet: the next are asked for when those before are on disk. It is closed if
                it can be. Without, they are written in the order of their places.

        Raises:
            BadInput: for a value that is not finite or overflows, or an unreadable checkpoint.
            OSError: when something cannot be written: the disk may be full. Finished tensors stay, and another call
                goes on from them.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        others = sorted(set(self.journal.entries) - {tensor.name for tensor in plan.stored})
        self.journal.forget(*others)
        self.journal.compact()
        report = FillReport(removed=tuple(others))
        work = _Work(self, checkpoint, report, places or {}, progress or (lambda *_: None), placed or (lambda _: None))
        try:
            work.run([sorted(plan.stored, key=first_of(work.places))] if arriving is None else arriving)
        finally:
            self._remove_unused_files()
        return report

    def _remove_unused_files(self) -> None:
        """Remove what the journal does not name: a crash leaves it, and what was copied to another place does."""
        used = self.files()
        for path in self.directory.iterdir():
            if path.suffix[1:] in _KINDS and path not in used:
                path.unlink()

    def __getitem__(self, name: str) -> StoredTensor:
        """The finished tensor called `name`.

        Raises:
            KeyError: when the store does not hold it.
        """
        entry = self.journal.entries[name]
        form, spec = entry["format"], entry["format"]["quantization"]
        spec = QuantizationSpec(**spec) if spec else None
        form = Format(tuple(form["shape"]), form["dtype"], spec, form["read_transposed"])
        arrays = {
            kind: StoredArray(Place(self.directory / file["path"], file["offset"]), file["bytes"], file["stamp"])
            for kind, file in entry["files"].items()
        }
        return StoredTensor(name, form, entry["source_digest"], arrays)

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
        return any(self.directory in path.parent.parents and path.exists() for path in self.files())

    def files(self) -> frozenset[Path]:
        """The files in which tensors are stored."""
        return frozenset[Path]().union(*map(self._files_of, self.journal.entries))

    def _files_of(self, name: str) -> set[Path]:
        return {self.directory / file["path"] for file in self.journal.entries[name]["files"].values()}

    def forget_in(self, folder: Path) -> None:
        """Forget the tensors in the files of a folder: these are going to be made anew."""
        names = [name for name in self.journal.entries if any(folder in path.parents for path in self._files_of(name))]
        self.journal.forget(*names)

    def hand_over(self, directory: Path, moved: tuple[Path, Path] | None = None) -> None:
        """Have another store begin with what is in this one.

        Args:
            directory: of that store, empty.
            moved: a folder below the directory of this store which will not change any more, and where it will be.
        """

        def handed_over(file: Mapping[str, Any]) -> Mapping[str, Any]:
            path = self.directory / file["path"]
            if moved is None or moved[0] not in path.parents:
                return file
            status, there = path.stat(), moved[1] / path.relative_to(moved[0])
            return {**file, "path": str(there), "stamp": [status.st_size, status.st_mtime_ns]}

        for path in (*self.files(), self.directory / LOOKS):
            if path.parent == self.directory and path.exists():
                shutil.copyfile(path, directory / path.name)
        entries = self.journal.entries.items()
        files = {name: {kind: handed_over(file) for kind, file in entry["files"].items()} for name, entry in entries}
        Journal(directory / JOURNAL).replace({name: {**entry, "files": files[name]} for name, entry in entries})


@define
class _Work:
    """One `WeightStore.fill`: finds the tensors that are not current, computes them and counts."""

    store: WeightStore
    checkpoint: Checkpoint
    report: FillReport
    places: Places
    progress: Progress
    placed: Placed
    # Keys of what was read and may still be in the memory of the system: lately, and before that.
    read: list[str] = field(factory=list)
    read_before: list[str] = field(factory=list)
    bytes_read: int = 0

    def run(self, arriving: Iterable[Sequence[PlannedTensor]]) -> None:
        """Compute what is not current, and have it on disk before the next tensors are asked for."""
        with ExitStack() as stack:
            stack.enter_context(one_thread())  # the other cores are the workers'
            if isinstance(arriving, Generator):
                stack.enter_context(closing(arriving))
            committer = stack.enter_context(_Committer(self.store, self.placed))
            for tensors in arriving:
                self._compute(tensors, committer)
                committer.settle()
        self._evict()

    def _compute(self, tensors: Sequence[PlannedTensor], committer: _Committer) -> None:
        """Compute those of the tensors that are not current, chunk by chunk and without a pause between them."""
        missing = (planned for planned in tensors if not self._is_in_place(planned, committer))
        chunks = (chunk for planned in missing for chunk in chunks_of(planned))
        results = run_in_order(partial(convert_chunk, self.checkpoint, chunk) for chunk in chunks)
        with closing(results):
            for result in results:
                planned = result.chunk.planned
                self._write_tensor(result, results, committer)
                self.read += (source.key for source in planned.sources)
                self.bytes_read += sum(source.bytes_of(source.rows) for source in _infos(planned, self.checkpoint))
                if self.bytes_read >= EVICT_BYTES:
                    self._evict()

    def _evict(self) -> None:
        """Give back the memory of what was read; what was read last may be in use, and keeps it till next time."""
        self.checkpoint.evict([*self.read_before, *self.read])
        self.read_before, self.read, self.bytes_read = self.read, [], 0

    def _write_tensor(self, first: Result, results: Iterator[Result], committer: _Committer) -> None:
        """Write the tensor that begins with `first` and hand it to the committer."""
        planned = first.chunk.planned
        self.store.journal.forget(planned.name)
        with self._writer(planned) as writer:
            digest = hashlib.sha256()
            for result in chain([first], results):
                digest.update(result.source)
                writer.write(result.values)
                self.progress(planned, (result.chunk.stop - result.chunk.start) * planned.format.columns)
                if result.chunk.last:
                    break
            writer.finish()
            # Of a file that comes and goes the stamp says what it should be, not what was read.
            self.checkpoint.require_unchanged([source.key for source in planned.sources])
        committer.submit(writer, self._entry(planned, digest.hexdigest()))
        self.report.computed += 1
        self.report.bytes_written += writer.format.bytes

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
        """What writes a tensor; it is closed if that fails, and else when what was written is on the disk."""
        writer = _TensorWriter(planned.format, self._places_of(planned))
        try:
            yield writer
        except BaseException:
            writer.close()
            raise

    def _entry(self, planned: PlannedTensor, source_digest: str) -> dict[str, Any]:
        return {
            "name": planned.name,
            "fingerprint": _fingerprint(planned, self.checkpoint),
            "stamps": _stamps(planned, self.checkpoint),
            "source_digest": source_digest,
            "format": asdict(planned.format),
        }

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
            committer.submit(writer, entry)
        self.progress(planned, planned.parameters)
        self.report.reused += 1
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
                self.report.repaired += (planned.name,)
            return False
        stamps = _stamps(planned, self.checkpoint)
        if entry["stamps"] != stamps and entry["source_digest"] != _hash_sources(planned, self.checkpoint):
            return False
        if entry["stamps"] != stamps:
            self.store.journal.append({**entry, "stamps": stamps})
        return True
