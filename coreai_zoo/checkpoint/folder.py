"""The folder of a checkpoint: its config, its index, and which of its files are its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from coreai_zoo.checkpoint.adapters import ADAPTER_CONFIG, adapter_alone, adapter_files, adapter_note
from coreai_zoo.checkpoint.strict_json import read_object
from coreai_zoo.errors import BadInput, listing, near_paths

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def _check_directory(directory: Path) -> None:
    if not directory.exists():
        raise BadInput(
            f"The checkpoint directory {directory} does not exist.", near_paths(directory) or "Check the path."
        )
    if not directory.is_dir():
        raise BadInput(
            f"The checkpoint {directory} is not a directory.", "Give the folder that holds config.json and the weights."
        )


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` of a checkpoint and nothing else.

    Raises:
        BadInput: when the directory or the file is missing, unreadable, or not a JSON object in UTF-8; when there is
            an adapter in the place of a model.
    """
    _check_directory(directory)
    path = directory / CONFIG
    names = _file_names(directory)
    if (adapter := adapter_files(names)) and not has_model(names):
        raise adapter_alone(str(directory), adapter, directory / ADAPTER_CONFIG)
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
    try:
        target = path.resolve()
        path.is_file()
    except (OSError, RuntimeError) as error:  # too long a name, or links in a circle
        said = error.strerror if isinstance(error, OSError) and error.strerror else "its links lead in a circle"
        raise BadInput(f"{where} names {name[:80]!r}, which cannot be opened: {said}.", "Correct the name.") from error
    if path.is_dir():
        raise BadInput(f"{where} names {name!r}, which is a folder.", "Put the file there.")
    outside = not any(target.is_relative_to(folder) for folder in inside)
    if Path(name).is_absolute() and not outside:
        raise BadInput(f"{where} names {name!r}, a path from the root.", f"Name it as it is within {directory}.")
    if ".." in Path(name).parts or outside:
        link = f", a link to {target}" if path.is_symlink() else ""
        raise BadInput(
            f"{where} names {name!r}{link}, which leads outside of {directory}.",
            "Only files of the checkpoint are read: " + ("put the file itself there." if link else "correct the name."),
        )
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Which files
# ---------------------------------------------------------------------------------------------------------------------


def has_weights(directory: Path) -> bool:
    """Whether there are weights beside the config that could be opened, complete or not."""
    return bool(_safetensors(_file_names(directory)))


def _file_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_file())


def _safetensors(names: Collection[str]) -> list[str]:
    """The safetensors files among some files but for an adapter's."""
    return [name for name in names if name.endswith(".safetensors") and name not in adapter_files(names)]


def has_model(names: Collection[str]) -> bool:
    """Whether there are the weights of a model among files, in a format that we read or in another."""
    others = set(names) - set(adapter_files(names))
    return any(
        name == INDEX or name.endswith((".safetensors", ".gguf")) or name.startswith("pytorch_model") for name in others
    )


def no_weights(where: str, names: Collection[str]) -> BadInput:
    """The error for weights that cannot be found, by the names of the files that are there.

    Args:
        where: a folder or a repository.
        names: of the files in it, those of folders within left out.
    """
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return BadInput(
            f"{where} has no safetensors weights, only {listing(pickles, 4)}: pickles can run code and are never "
            "loaded.",
            "Use a revision with safetensors, or convert the checkpoint where you trust it.",
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return BadInput(
            f"{where} has {listing(gguf, 4)} only: GGUF weights are quantized already and cannot be used.",
            "Use the original Hugging Face checkpoint in bf16.",
        )
    if stray := _safetensors(names):
        return BadInput(
            f"{where} has {listing(stray, 4)} but neither {SINGLE} nor {INDEX}.",
            f"Download {INDEX} as well"
            + (f", or rename {stray[0]} to {SINGLE} if it holds the whole model." if len(stray) == 1 else "."),
        )
    return BadInput(
        f"{where} has no weights: neither {SINGLE} nor {INDEX}.",
        "Only checkpoints in the safetensors format can be used: check where it is, or download it.",
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
    weight_map = {key: name.removeprefix("./") for key, name in weight_map.items()}
    names = sorted(set(weight_map.values()))
    for name in names:
        member(directory, name, str(path))
    wrong = [name for name in names if not name.endswith(".safetensors")]
    if wrong:
        raise BadInput(f"{path} names {listing(wrong)}: only .safetensors files are read.")
    return weight_map


@frozen
class WeightFiles:
    """The files that hold the weights of a checkpoint.

    Attributes:
        names: of the files, sorted.
        weight_map: of the index, key to file name; empty where no index says what is in them.
        notes: what to note of other files in the folder.
    """

    names: tuple[str, ...]
    weight_map: Mapping[str, str] = field(factory=dict)
    notes: tuple[str, ...] = ()


def uses_index(names: Collection[str], weight_map: Mapping[str, str]) -> bool:
    """Whether an index says which files are read. Beside a single file that it does not name it says nothing.

    transformers takes the single file where there is one, and does not look at an index.

    Args:
        names: of the files that there are.
        weight_map: of the index; empty where there is none.
    """
    return bool(weight_map) and (SINGLE not in names or SINGLE in weight_map.values())


def find_weights(directory: Path, elsewhere: Collection[str] = ()) -> WeightFiles:
    """The files that hold the weights of the checkpoint in a folder.

    Args:
        directory: the folder.
        elsewhere: names of files that count as if they were in it.

    Raises:
        BadInput: when there are none, or an index cannot be used.
    """
    there = sorted({*_file_names(directory), *elsewhere})
    index = read_index(directory) if INDEX in there else {}
    weight_map = index if uses_index(there, index) else {}
    if weight_map:
        names = tuple(sorted(set(weight_map.values())))
    elif SINGLE in there:
        member(directory, SINGLE, str(directory))
        names = (SINGLE,)
    else:
        raise no_weights(str(directory), _file_names(directory))
    adapter = adapter_files(there)
    notes = (
        *_note_on_index(ignored=bool(index) and not weight_map),
        *_note_on_others(directory, names, INDEX if weight_map else SINGLE),
        *(adapter_note(adapter) if adapter else ()),
    )
    return WeightFiles(names, weight_map, notes)


def _note_on_index(*, ignored: bool) -> tuple[str, ...]:
    return (f"{SINGLE} is read, as transformers does, and {INDEX} is not: it does not name that file",) * ignored


def _note_on_others(directory: Path, names: Collection[str], decides: str) -> tuple[str, ...]:
    """What to note of files beside those that are read; `decides` is the file that says which are."""
    others = [name for name in _safetensors(_file_names(directory)) if name not in names]
    why = "is the whole model" if decides == SINGLE else "does not name them"
    return (f"not read: {listing(others, 6)}; {decides} {why}",) if others else ()
