"""Filling a weight store from a checkpoint that is fetched meanwhile: which file when, and for how long.

A tensor is stored when all files that hold parts of it have arrived. A file is removed when nothing needs it any more,
and no file is fetched twice. So there are two on the disk at a time, one that is read and one that comes; more where a
tensor has parts in more files, or where tensors lie across files in such a way that none of them can go.

Some values are looked at without being stored: the means of some vectors, and tensors that two files hold, which must
be the same. What they are is written down beside the store, so that a file need not come again for that.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.headers import TensorInfo
from coreai_zoo.checkpoint.hub import HubSource
from coreai_zoo.checkpoint.index import held_differently, values_digest
from coreai_zoo.checkpoint.stream import ShardFetcher, present
from coreai_zoo.errors import BadInput
from coreai_zoo.json_files import read_object, write_json
from coreai_zoo.progress import CountBytes
from coreai_zoo.weights.means import judged_by_mean, mean_of, notes_on_means
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan
from coreai_zoo.weights.store import LOOKS, WeightStore

# ---------------------------------------------------------------------------------------------------------------------
# The order
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Look:
    """A tensor whose values are looked at and not stored; `mean` of a vector, else the SHA-256 of its bytes."""

    info: TensorInfo
    mean: bool


@frozen
class Step:
    """What is done when certain files have arrived.

    Attributes:
        files: their names.
        tensors: are stored, in this order.
        looks: are made before.
        last: names of the files that nothing needs after this.
    """

    files: frozenset[str]
    tensors: tuple[PlannedTensor, ...]
    looks: tuple[Look, ...]
    last: frozenset[str]


@frozen
class Schedule:
    """The steps, one after the other.

    Attributes:
        steps: those that need no file come first.
        order: names of the files as they are needed.
        limit: how many files are on the disk at a time.
    """

    steps: tuple[Step, ...]
    order: tuple[str, ...]
    limit: int

    def most_bytes(self, sizes: Mapping[str, int], here: Iterable[str]) -> int:
        """Bytes of the files that are on the disk at a time, at the most.

        Args:
            sizes: of the files, by name.
            here: those that are on the disk at the beginning, whole or not.
        """
        held, waiting, most = set(here), deque(self.order), 0
        for step in self.steps:
            while waiting and (waiting[0] in held or len(held) < self.limit):
                held.add(waiting.popleft())
            most = max(most, sum(sizes[name] for name in held))
            held -= step.last
        return most


def schedule(jobs: Sequence[tuple[PlannedTensor | Look, frozenset[str]]], here: Iterable[str] = ()) -> Schedule:
    """In which order jobs are done so that few files are on the disk at a time.

    Args:
        jobs: each with the names of the files that it needs, in the order that would be best.
        here: names of files that are on the disk already, whole or not.
    """
    left: dict[frozenset[str], list[PlannedTensor | Look]] = {frozenset(): []}
    for job, files in jobs:
        left.setdefault(files, []).append(job)
    position = {files: number for number, files in enumerate(left)}
    held = set(here) & {name for files in left for name in files}
    steps, order, most = [], list[str](), len(held)
    while left:
        files = _next(left, held, position)
        done = left.pop(files)
        held |= files
        order += sorted(files - set(order))
        most = max(most, len(held))
        last = frozenset(held - {name for others in left for name in others})
        held -= last
        tensors = tuple(job for job in done if isinstance(job, PlannedTensor))
        steps.append(Step(files, tensors, tuple(job for job in done if isinstance(job, Look)), last))
    return Schedule(tuple(steps), tuple(order), max(2, most))


def _next(left: Iterable[frozenset[str]], held: set[str], position: Mapping[frozenset[str], int]) -> frozenset[str]:
    """The files of the next step.

    What is possible with those at hand goes first, and of that what needs the most of them: it may be the last to. Else
    as few as possible are added to them, so that they can go soon.
    """
    possible = [files for files in left if files <= held]
    if possible:
        return min(possible, key=lambda files: (bool(files), -len(files), position[files]))
    touching = [files for files in left if files & held] or list(left)
    return min(touching, key=lambda files: (len(files - held) if held else 0, position[files]))


# ---------------------------------------------------------------------------------------------------------------------
# Looks
# ---------------------------------------------------------------------------------------------------------------------


@define
class _Looks:
    """What was seen of values that are not stored, in a file that outlives an interruption."""

    path: Path
    checkpoint: Checkpoint
    seen: dict[str, Any] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        with suppress(BadInput):  # there is none, or a kill has torn it: then files come again
            self.seen = read_object(self.path)

    def _key(self, look: Look) -> str:
        stamp = next(header.stamp for header in self.checkpoint.headers if header.file == look.info.file)
        return json.dumps(["mean" if look.mean else "sha256", look.info.key, *stamp])

    def __contains__(self, look: Look) -> bool:
        return self._key(look) in self.seen

    def __getitem__(self, look: Look) -> Any:
        return self.seen[self._key(look)]

    def make(self, looks: Iterable[Look]) -> None:
        """Look, and write down what is seen."""
        for look in looks:
            place = self.checkpoint.place(look.info.file)
            assert place is not None
            seen = mean_of(self.checkpoint, look.info.key) if look.mean else values_digest(look.info, place)
            self.seen[self._key(look)] = seen
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f"{self.path.name}.new")
        write_json(fresh, self.seen)
        os.replace(fresh, self.path)

    def require_same(self) -> None:
        """Refuse a tensor that two files hold with different values, as far as both were seen.

        Raises:
            BadInput: naming tensor and files.
        """
        for _key, infos in sorted(self.checkpoint.uncompared.items()):
            for one, other in pairwise(infos):
                looks = Look(one, mean=False), Look(other, mean=False)
                if all(look in self for look in looks) and self[looks[0]] != self[looks[1]]:
                    raise held_differently(self.checkpoint.directory, one, other)


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint that comes and goes
# ---------------------------------------------------------------------------------------------------------------------


class Stream:
    """A checkpoint whose weight files come, are read and go.

    Args:
        hub: where they come from.
        checkpoint: opened by `open_on_hub`.
        plan: what is stored of it.
        store: where.
        folder: where the files lie meanwhile.
        order: of the tensors, as far as files allow; that of the plan unless given.
        alone: see `ShardFetcher`.
    """

    def __init__(
        self,
        hub: HubSource,
        checkpoint: Checkpoint,
        plan: WeightPlan,
        store: WeightStore,
        folder: Path,
        order: Callable[[PlannedTensor], int] = lambda _: 0,
        *,
        alone: bool = True,
    ) -> None:
        self._hub, self._checkpoint, self._plan, self._folder = hub, checkpoint, plan, folder
        self._alone = alone
        self._looks = _Looks(store.directory / LOOKS, checkpoint)
        self._finished, jobs = self._jobs(store, order)
        self._here = present(hub, folder, sorted({name for _, files in jobs for name in files}))
        self._schedule = schedule(jobs, self._here)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be fetched. Of files whose tensors are all in the store there are none."""
        return sum(self._hub.missing_apart(name, self._folder) for name in self._schedule.order)

    @property
    def most_bytes(self) -> int:
        """Bytes of weight files that are on the disk at a time, at the most; none of those in the cache."""
        return self._schedule.most_bytes(self._sizes, self._here)

    @property
    def most_bytes_in_any_order(self) -> int:
        """The same of the largest files, as many as there are at a time, whichever of them come together."""
        held = {*self._schedule.order, *self._here}
        sizes = (size for name, size in self._sizes.items() if name in held)
        return sum(sorted(sizes, reverse=True)[: max(self._schedule.limit, len(self._here))])

    @property
    def _sizes(self) -> Mapping[str, int]:
        return {file.name: file.size for file in self._hub.weights}

    def arriving(self, count: CountBytes) -> Generator[tuple[PlannedTensor, ...], None, None]:
        """The tensors of the plan, some at a time, when their values can be read; for `WeightStore.fill`.

        Args:
            count: told of the bytes that come, in another thread.

        Raises:
            EnvironmentLacks: when a file cannot be fetched, or is not what the hub states.
            BadInput: when two files hold a tensor with different values.
        """
        order, limit = self._schedule.order, self._schedule.limit
        fetcher = ShardFetcher(self._hub, self._checkpoint, self._folder, order, limit, count, alone=self._alone)
        with fetcher:
            yield self._finished
            for step in self._schedule.steps:
                fetcher.need(step.files)
                if step.looks:
                    self._looks.make(step.looks)
                    self._looks.require_same()
                yield step.tensors
                fetcher.drop(step.last)

    def notes(self) -> tuple[str, ...]:
        """What `unusual_means` notes, when all tensors have arrived."""
        return notes_on_means(self._plan, lambda key: self._looks[Look(self._checkpoint.tensors[key], mean=True)])

    def _jobs(
        self, store: WeightStore, order: Callable[[PlannedTensor], int]
    ) -> tuple[tuple[PlannedTensor, ...], list[tuple[PlannedTensor | Look, frozenset[str]]]]:
        """The tensors that are in the store; and all that values are still to be read for, with its files."""
        unfinished = sorted(store.unfinished(self._plan, self._checkpoint), key=order)
        names = {tensor.name for tensor in unfinished}
        wanted = dict.fromkeys(
            [Look(self._checkpoint.tensors[key], mean=True) for _, key in judged_by_mean(self._plan)]
            + [Look(info, mean=False) for infos in self._checkpoint.uncompared.values() for info in infos]
        )
        looks = [look for look in wanted if look not in self._looks]
        jobs: list[tuple[PlannedTensor | Look, frozenset[str]]] = [
            (tensor, frozenset[str]().union(*(self._names(source.key) for source in tensor.sources)))
            for tensor in unfinished
        ]
        jobs += [(look, self._fetched([look.info.file])) for look in looks]
        return tuple(tensor for tensor in self._plan.stored if tensor.name not in names), jobs

    def _names(self, key: str) -> frozenset[str]:
        return self._fetched(self._checkpoint.files_of(key))

    def _fetched(self, files: Iterable[Path]) -> frozenset[str]:
        """The names of those files that are not in the cache."""
        names = (file.relative_to(self._checkpoint.directory).as_posix() for file in files)
        return frozenset(name for name in names if name not in self._hub.cached)
