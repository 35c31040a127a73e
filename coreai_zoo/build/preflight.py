"""The preflight of a build: what it reads, writes and needs, and whether this machine has that.

`zoo plan` takes its sizes from here too.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from coreai_zoo.build.design import Design
from coreai_zoo.build.workspace import Workspace
from coreai_zoo.bundle.layout import allocated_below
from coreai_zoo.checkpoint.tokenizer import tokenizer_files
from coreai_zoo.disk import existing_parent
from coreai_zoo.dtypes import size
from coreai_zoo.errors import EnvironmentLacks, listing
from coreai_zoo.machine import available_memory
from coreai_zoo.weights.plan import PlannedTensor
from coreai_zoo.weights.stream import Stream

LEAST_MEMORY = 384 * 2**20
"""Bytes that torch and the toolchain take, imported and idle: no build gets by with less."""

_BYTES_PER_VALUE = 2  # of a checkpoint that is not at hand: released ones are bf16

# The graph around the weights: 45 KiB were measured for two layers, 60 a layer for a prompt in 16 steps, 38 in 4.
_GRAPH_BYTES, _GRAPH_BYTES_PER_LAYER, _GRAPH_BYTES_PER_STEP = 32 * 2**10, 24 * 2**10, 3 * 2**10


@frozen
class Disk:
    """A file system that a build writes to.

    Attributes:
        path: a folder on it.
        needs: bytes that the build will write at least.
        free: bytes that are free.
        chosen_by: what the user chooses another one with.
    """

    path: Path
    needs: int
    free: int
    chosen_by: str = "-o DIR"


@frozen
class Preflight:
    """The bytes that a build handles at least, and the room that there is for them.

    Attributes:
        fetched: bytes that are still to be fetched of the checkpoint.
        fetched_at_once: bytes of fetched files that are on the disk at a time, at the most. Of a checkpoint that is
            streamed, these are some of all, and those that an earlier run left count.
        read: bytes that are read of the checkpoint.
        written: bytes of the bundle.
        disks: the file systems that hold them.
        memory: bytes of memory that are available; None where that is not known.
        least_memory: bytes of memory that the build takes.
        streamed: whether fetched files are dropped when they were used.
    """

    fetched: int
    fetched_at_once: int
    read: int
    written: int
    disks: tuple[Disk, ...]
    memory: int | None
    least_memory: int = LEAST_MEMORY
    streamed: bool = False

    def __str__(self) -> str:
        free = ", ".join(f"{size(disk.free)} free at {_shown(disk.path)}" for disk in self.disks)
        memory = "" if self.memory is None else f"; {size(self.memory)} of memory available"
        at_once = f" ({size(self.fetched_at_once)} on the disk at a time)" if self.streamed else ""
        fetches = f"fetches {size(self.fetched)}{at_once}, " if self.fetched else ""
        return f"{fetches}reads {size(self.read)}, writes {size(self.written)}; {free}{memory}"

    def require(self) -> None:
        """Refuse a build that cannot fit.

        Raises:
            EnvironmentLacks: with the numbers. The machine has to change, not the input.
        """
        for disk in self.disks:
            if disk.needs > disk.free:
                raise EnvironmentLacks(
                    f"The build needs {size(disk.needs)} of disk space at {disk.path}, where {size(disk.free)} are "
                    f"free: {self._wanted} in all.",
                    f"Free some, or use another disk with {disk.chosen_by}{self._ways_out}.",
                )
        if self.memory is not None and self.memory < self.least_memory:
            raise EnvironmentLacks(
                f"The build needs {size(self.least_memory)} of memory at least, and {size(self.memory)} are available.",
                "Close other programs.",
            )

    @property
    def _ways_out(self) -> str:
        return "" if self.streamed or not self.fetched else "; --stream needs no room for all of a checkpoint"

    @property
    def _wanted(self) -> str:
        wanted = [
            (self.fetched_at_once, "of checkpoint"),
            (self.written, "for the bundle"),
        ]
        return listing([f"{size(count)} {what}" for count, what in wanted if count])

    def as_json(self) -> Mapping[str, Any]:
        """The preflight as JSON."""
        return {**attrs.asdict(self), "disks": [{**attrs.asdict(disk), "path": str(disk.path)} for disk in self.disks]}


def preflight(design: Design, workspace: Workspace) -> Preflight:
    """The preflight of building a design in `workspace` on this machine."""
    written = asset_bytes(design) + tokenizer_bytes(design)
    # What an earlier layout takes beyond that makes room where there is none.
    there = allocated_below(workspace.partial)
    places = [(workspace.destination, max(0, written - there), max(0, there - written), "-o DIR")]
    fetched = at_once = 0
    if (stream := stream_of(design, workspace)) is not None:
        # In which order files come, the layout of the asset says, which is not there yet.
        fetched, at_once = stream.missing_bytes, stream.most_bytes_in_any_order
        places.append((workspace.shards, max(0, at_once - allocated_below(workspace.shards)), 0, "--work-dir DIR"))
    elif (hub := design.source.hub) is not None:
        fetched = at_once = hub.missing_bytes
        places.append((hub.directory, fetched, 0, "HF_HOME"))
    disks: dict[int, Disk] = {}
    for path, needs, spent, chosen_by in places:
        existing = existing_parent(path.parent)
        device = existing.stat().st_dev
        disk = disks.get(device) or Disk(existing, 0, shutil.disk_usage(existing).free, chosen_by)
        both = disk.chosen_by if disk.chosen_by == chosen_by or not needs else f"{disk.chosen_by} or {chosen_by}"
        disks[device] = attrs.evolve(disk, needs=disk.needs + needs, free=disk.free + spent, chosen_by=both)
    least_memory = design.backend.memory(int(design.facts["layers"]), len(design.functions), _steps(design))
    # The largest matrix that is written transposed is gathered first.
    formats = [tensor.format for tensor in design.weights.stored if tensor.format.transposed]
    gathered = max((2 * each.bytes // math.prod(each.shape[:-2]) for each in formats), default=0)
    return Preflight(
        fetched,
        at_once,
        bytes_read(design),
        written,
        tuple(disks.values()),
        available_memory(),
        max(LEAST_MEMORY, least_memory) + gathered,
        streamed=stream is not None,
    )


def stream_of(
    design: Design, workspace: Workspace, order: Callable[[PlannedTensor], int] = lambda _: 0, *, alone: bool = True
) -> Stream | None:
    """The checkpoint as it comes and goes while weights are stored in `workspace`; None for one that stays.

    For `order` and `alone` see `Stream`.
    """
    if not design.source.streamed:
        return None
    assert design.source.hub is not None
    store, shards = workspace.store, workspace.shards
    return Stream(design.source.hub, design.checkpoint, design.weights, store, shards, order, alone=alone)


def asset_bytes(design: Design) -> int:
    """Bytes of the asset: every stored byte, and the graph around them."""
    layers = int(design.facts["layers"])
    prompts = (len(design.functions) - 1) * (_GRAPH_BYTES_PER_LAYER + _GRAPH_BYTES_PER_STEP * _steps(design))
    return design.weights.stored_bytes + _GRAPH_BYTES + layers * (_GRAPH_BYTES_PER_LAYER + prompts)


def _steps(design: Design) -> int:
    return design.contract.prefill.steps if design.contract.prefill else 1


def tokenizer_bytes(design: Design) -> int:
    """Bytes of the tokenizer's files, which a bundle copies from the checkpoint; 0 without a checkpoint."""
    directory = design.source.directory
    return 0 if directory is None else sum(file.stat().st_size for file in tokenizer_files(directory))


def bytes_read(design: Design) -> int:
    """Bytes of the checkpoint that a build reads; an estimate where no checkpoint is at hand."""
    if design.opened is None:
        return _BYTES_PER_VALUE * design.weights.parameters
    sources = [source for planned in design.weights.stored for source in planned.sources]
    return sum(design.checkpoint.tensors[source.key].bytes_of(source.stop - source.start) for source in sources)


def _shown(path: Path) -> Path:
    """`path` relative to the current folder, where it is below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
