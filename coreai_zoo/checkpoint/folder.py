"""The folder of a checkpoint: its config, its index, and which of its files are its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from coreai_zoo.checkpoint.headers import Header, read_header
from coreai_zoo.checkpoint.strict_json import read_object
from coreai_zoo.errors import BadInput, listing

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
    return read_object(path)


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
    weight_map = read_object(path).get("weight_map")
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


def open_headers(directory: Path) -> list[Header]:
    """The headers of the files that hold the weights.

    Raises:
        BadInput: when it is not clear which files those are, or they do not agree with the index.
    """
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
