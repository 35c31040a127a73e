"""An index against the files that it names: what they disagree about, and whether it matters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from coreai_zoo.checkpoint.folder import INDEX
from coreai_zoo.checkpoint.headers import Header, TensorInfo
from coreai_zoo.errors import BadInput, listing

_CHUNK = 1 << 24


def find_doubled(headers: Sequence[Header], left_out: Callable[[str], bool]) -> dict[str, list[TensorInfo]]:
    """The tensors that several files hold, by key, but for those that a bundle leaves out."""
    return {key: tensors for key, tensors in _found(headers).items() if len(tensors) > 1 and not left_out(key)}


def _found(headers: Sequence[Header]) -> dict[str, list[TensorInfo]]:
    """The tensors of all files, by key."""
    found: dict[str, list[TensorInfo]] = {}
    for header in headers:
        for key, tensor in header.tensors.items():
            found.setdefault(key, []).append(tensor)
    return found


def alike(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors have the same shape and dtype."""
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def same_values(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors have the same shape, dtype and bytes; these are read, in pieces."""
    if not alike(one, other):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.span[0])
        second.seek(other.span[0])
        left = one.span[1] - one.span[0]
        while left:
            piece = min(left, _CHUNK)
            if first.read(piece) != second.read(piece):
                return False
            left -= piece
    return True


def values_digest(info: TensorInfo, place: Path) -> str:
    """SHA-256 of a tensor's bytes.

    Args:
        info: the tensor.
        place: where the content of its file is.
    """
    digest, left = hashlib.sha256(), info.span[1] - info.span[0]
    with place.open("rb") as file:
        file.seek(info.span[0])
        while left:
            piece = file.read(min(left, _CHUNK))
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def held_differently(directory: Path, one: TensorInfo, other: TensorInfo) -> BadInput:
    """The error for a tensor that two files hold with different values."""
    return BadInput(
        f"{directory} holds {one.key} twice, with different values: in {_name(directory, one)} and in "
        f"{_name(directory, other)}.",
        "Which one is meant is not known; download the checkpoint again, or save it anew.",
    )


def check_index(
    directory: Path,
    weight_map: Mapping[str, str],
    headers: Sequence[Header],
    left_out: Callable[[str], bool],
    same: Callable[[TensorInfo, TensorInfo], bool] = same_values,
) -> tuple[str, ...]:
    """Compare an index with the headers of the files that it names.

    Args:
        directory: the checkpoint's.
        weight_map: key to file name, as the index has it; empty without an index.
        headers: of the files that are there.
        left_out: whether a bundle leaves a key out, so that it does not matter where it is.
        same: whether a tensor that two files hold is the same in both.

    Returns:
        What to note.

    Raises:
        BadInput: for a file or a tensor that is missing, that no index names, or that two files hold with different
            values.
    """
    if not weight_map:
        return ()
    _require_files(directory, weight_map, headers, left_out)
    found = _found(headers)
    notes = _compare_doubled(directory, find_doubled(headers, left_out), same)
    absent = {
        key: f"{key} (not in {name})"
        for key, name in sorted(weight_map.items())
        if name not in [_name(directory, tensor) for tensor in found.get(key, ())]
    }
    extra = {key: f"{key} (in {_name(directory, found[key][0])} only)" for key in sorted(set(found) - set(weight_map))}
    if mattering := [text for key, text in {**absent, **extra}.items() if not left_out(key)]:
        raise BadInput(
            f"{directory / INDEX} and the shards disagree: {listing(mattering, 6)}.",
            "The files are of different downloads or were edited; download the checkpoint again.",
        )
    differing = (("names", absent, "the files lack"), ("lacks", extra, "the files have"))
    disagreed = [
        f"{INDEX} {verb} {len(keys)} tensor{'s' * (len(keys) > 1)} that {where}, all of a part that is left out: "
        f"{listing(list(keys), 3)}"
        for verb, keys, where in differing
        if keys
    ]
    return (*notes, *disagreed)


def _name(directory: Path, tensor: TensorInfo) -> str:
    return tensor.file.relative_to(directory).as_posix()


def _require_files(
    directory: Path, weight_map: Mapping[str, str], headers: Sequence[Header], left_out: Callable[[str], bool]
) -> None:
    """Refuse an index whose files are not all there, but for those of which a bundle takes nothing."""
    there = {header.file for header in headers}
    named = sorted(set(weight_map.values()))
    absent = {name for name in named if directory / name not in there}
    missing = sorted({name for key, name in weight_map.items() if name in absent and not left_out(key)})
    if not missing:
        return
    present = {path.relative_to(directory).as_posix().lower(): path for path in directory.rglob("*.safetensors")}
    otherwise = [f"{present[name.lower()].name} is not {name}" for name in missing if name.lower() in present]
    raise BadInput(
        f"{directory} lacks {len(missing)} of the {len(named)} files that {INDEX} names: {listing(missing, 200)}.",
        f"Names differ in upper and lower case: {listing(otherwise, 4)}. Rename them."
        if otherwise
        else "Download them.",
    )


def _compare_doubled(
    directory: Path,
    doubled: Mapping[str, Sequence[TensorInfo]],
    same: Callable[[TensorInfo, TensorInfo], bool],
) -> tuple[str, ...]:
    """Compare tensors that several files hold, by `same`.

    Raises:
        BadInput: when two are not the same.
    """
    for _key, tensors in sorted(doubled.items()):
        for one, other in pairwise(tensors):
            if not same(one, other):
                raise held_differently(directory, one, other)
    if not doubled:
        return ()
    files = sorted({_name(directory, tensor) for tensors in doubled.values() for tensor in tensors})
    count = len(doubled)
    several = f"{count} tensors are" if count > 1 else "1 tensor is"
    return (f"{several} in more than one file, with the same values ({listing(files, 4)}): {listing([*doubled], 3)}",)
