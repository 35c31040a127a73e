"""Lazy reading of a Hugging Face checkpoint: `config.json` and safetensors, one block of rows at a time.

Opening reads headers only, and checks all that headers can tell: that every file lies in the directory, is as long as
its header says, holds no tensor twice, and agrees with the index. Values stay in memory-mapped files until
`Checkpoint.read_rows` asks for them. Pickles are never loaded.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attrs import define, field

from coreai_zoo.checkpoint.adapters import refuse_unmerged
from coreai_zoo.checkpoint.folder import CONFIG, WeightFiles, find_weights, read_config
from coreai_zoo.checkpoint.fp8 import BlockScales, described, fold_scales
from coreai_zoo.checkpoint.headers import Header, Stamp, TensorInfo, read_header
from coreai_zoo.checkpoint.index import alike, check_index, find_doubled, same_values
from coreai_zoo.checkpoint.originals import check_original
from coreai_zoo.errors import BadInput, EnvironmentLacks, listing

if TYPE_CHECKING:
    import torch


def _unreadable(what: str, error: OSError) -> EnvironmentLacks:
    """What the system cannot read it may be able to read the next time."""
    return EnvironmentLacks(
        f"{what} cannot be read: {error.strerror or error}.", "Mend that, then run the same command again to go on."
    )


@define
class Checkpoint:
    """An opened checkpoint: its config and its tensors, whose values are read on demand.

    Attributes:
        directory: where it is.
        config: `config.json`.
        tensors: every tensor, sorted by key; FP8 with block scales as the float32 that it stands for.
        headers: one per safetensors file, sorted by name.
        weight_map: of its index, key to file name; empty without one.
        notes: what a build notes about its files and its config, one phrase each.
        scales: of FP8 tensors, by their keys.
        uncompared: tensors that several files hold, by their keys, of which `check_index` could not compare the values
            since a file has not arrived; see `same_values`.
    """

    directory: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    headers: tuple[Header, ...]
    weight_map: Mapping[str, str] = field(factory=dict)
    notes: tuple[str, ...] = ()
    scales: Mapping[str, BlockScales] = field(factory=dict)
    uncompared: Mapping[str, Sequence[TensorInfo]] = field(factory=dict, init=False)
    _places: dict[Path, Path] = field(factory=dict, init=False, repr=False)
    _seen: dict[Path, tuple[int, int]] = field(factory=dict, init=False, repr=False)
    _files: dict[Path, Any] = field(factory=dict, init=False, repr=False)

    @cached_property
    def _stamps(self) -> Mapping[Path, Stamp]:
        return {header.file: header.stamp for header in self.headers}

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Open the checkpoint in `directory`, reading its config and headers.

        What an index says is compared by `check_index`, for which one has to know what is left out.

        Raises:
            BadInput: for anything missing, unreadable, inconsistent, outside of the directory, not merged, or quantized
                already.
        """
        config = read_config(directory)
        files = find_weights(directory)
        checkpoint = cls.of_headers(directory, config, files, _read_headers(directory, files))
        for header in checkpoint.headers:
            checkpoint.arrive(header.file, header.file, header.stamp[2:4])
        return checkpoint

    @classmethod
    def of_headers(
        cls, directory: Path, config: dict[str, Any], files: WeightFiles, headers: tuple[Header, ...]
    ) -> Checkpoint:
        """The checkpoint in `directory` whose weight files have these headers; none of them can be read yet.

        Raises:
            BadInput: as `open` does.
        """
        tensors = {key: tensor for header in headers for key, tensor in header.tensors.items()}
        refuse_unmerged(str(directory), tensors)
        tensors, scales = fold_scales(str(directory), config, tensors)
        notes = check_original(str(directory), config, {key: tensor.dtype for key, tensor in tensors.items()})
        by_key = MappingProxyType(dict(sorted(tensors.items())))
        if scales:  # which the config is right about
            notes = (f"{described(scales)}: made floats of while they are read",)
        return cls(directory, config, by_key, headers, files.weight_map, (*files.notes, *notes), scales)

    # Files come and go where a checkpoint is read while it is fetched.

    def arrive(self, file: Path, place: Path, seen: tuple[int, int] | None = None) -> None:
        """From now on the values of a weight file can be read.

        Args:
            file: as its header names it.
            place: where its content is.
            seen: its size and time of modification; None to look now.
        """
        if seen is None:
            status = place.stat()
            seen = (status.st_size, status.st_mtime_ns)
        self._places[file], self._seen[file] = place, seen

    def leave(self, file: Path) -> None:
        """From now on the values of a weight file cannot be read, and it may be removed."""
        self._places.pop(file, None)
        self._files.pop(file, None)

    def place(self, file: Path) -> Path | None:
        """Where the content of a weight file is; None while it cannot be read."""
        return self._places.get(file)

    @property
    def precision(self) -> str:
        """The precision of its values, in words."""
        plain = [tensor.dtype for key, tensor in self.tensors.items() if key not in self.scales]
        return listing([*([described(self.scales)] if self.scales else ()), *sorted(set(plain))])

    def check_index(self, left_out: Callable[[str], bool] = lambda _key: False) -> tuple[str, ...]:
        """Refuse what index and files disagree about, but for keys that are left out; what to note of those.

        Raises:
            BadInput: naming files and tensors.
        """
        doubled = find_doubled(self.headers, left_out) if self.weight_map else {}
        arrived = all(info.file in self._places for infos in doubled.values() for info in infos)
        self.uncompared = {} if arrived else doubled
        same = same_values if arrived else alike
        return check_index(self.directory, self.weight_map, self.headers, left_out, same)

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Read rows of a tensor seen as a matrix (see `TensorInfo.rows`).

        Args:
            key: of the tensor.
            start: first row.
            stop: one past the last row.

        Returns:
            [stop - start, columns] in the dtype of `TensorInfo`, on the CPU. It may be a view of the mapped file: do
            not write.

        Raises:
            KeyError: when there is no such tensor.
            IndexError: when the rows are not all in the tensor.
            BadInput: when the file cannot be read any more, or has changed since it was opened.
        """
        info = self.tensors[key]
        rows = self._stored_rows(info, start, stop)
        if key in self.scales:
            rows = self.scales[key].applied(rows, start, self._stored_rows)
        return rows

    def _stored_rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor as its file holds them."""
        import torch
        from safetensors import SafetensorError

        key = info.key
        if not 0 <= start <= stop <= info.rows:
            raise IndexError(f"rows {start}..{stop} of {key}, which has {info.rows}")
        try:
            file = self._file(info.file)
            if len(info.shape) < 2:
                tensor: torch.Tensor = file.get_tensor(key).reshape(1, info.columns)
                return tensor[start:stop]
            blocks = _row_blocks(file.get_slice(key), info.shape, start, stop)
        except OSError as error:
            raise _unreadable(f"Tensor {key} of {info.file}", error) from error
        except (RuntimeError, SafetensorError) as error:
            raise BadInput(f"{info.file} cannot be read at tensor {key}: {error}.", "Download it again.") from error
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def require_unchanged(self, keys: Iterable[str]) -> None:
        """Refuse what was read of some tensors while a file of theirs changed.

        Raises:
            EnvironmentLacks: naming the file.
        """
        for path in {path for key in keys for path in self.files_of(key)}:
            self._place(path)

    def _place(self, path: Path) -> Path:
        """Where a file is, which has not changed since it was opened, or arrived."""
        place = self._places[path]
        try:
            status = place.stat()
        except OSError as error:
            raise _unreadable(str(place), error) from error
        if (status.st_size, status.st_mtime_ns) != self._seen[path]:
            raise EnvironmentLacks(
                f"{place} has changed while it was read.",
                "Leave the checkpoint alone, then run the same command again to go on.",
            )
        return place

    def _file(self, path: Path) -> Any:
        # Reading a mapped file that someone has cut short kills the process, so its size is looked at each time.
        place = self._place(path)
        # One mapping per file until it is released: opening one parses its header again.
        file = self._files.get(path)
        if file is None:
            from safetensors import safe_open

            file = self._files[path] = safe_open(place, framework="pt", device="cpu")
        return file

    def release(self) -> None:
        """Unmap the files, so that what was read of them no longer counts as this process's memory.

        What is still in use of them stays mapped; reading goes on as before.
        """
        self._files.clear()

    def evict(self, keys: Iterable[str]) -> None:
        """Also give back the memory in which the system keeps some tensors: nobody reads the weights twice.

        What is written next takes their place. In a virtual machine that has not used all of its memory yet, fresh
        memory is ten times slower to write to. A file of which a view is still in use keeps its memory. One that has
        left is passed over.
        """
        self.release()
        if not hasattr(os, "posix_fadvise"):
            return
        for path, tensors in groupby((self.tensors[key] for key in keys), key=lambda tensor: tensor.file):
            place = self._places.get(path)
            if place is None:
                continue
            descriptor = os.open(place, os.O_RDONLY)
            try:
                for start, stop in (tensor.span for tensor in tensors):
                    os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def files_of(self, key: str) -> frozenset[Path]:
        """The files that hold `key` and its scales."""
        scales = (self.scales[key].info,) if key in self.scales else ()
        return frozenset(info.file for info in (self.tensors[key], *scales))

    def stamps(self, key: str) -> frozenset[Stamp]:
        """The stamps of the files that hold `key` and its scales."""
        return frozenset(self._stamps[file] for file in self.files_of(key))

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


def _read_headers(directory: Path, files: WeightFiles) -> tuple[Header, ...]:
    """The headers of the files that are there. Whether one that is missing matters, the index tells."""
    there = [name for name in files.names if (directory / name).is_file()]
    headers = tuple(read_header(directory / name) for name in there)
    if not headers:
        check_index(directory, files.weight_map, headers, lambda _key: False)
    return headers


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
