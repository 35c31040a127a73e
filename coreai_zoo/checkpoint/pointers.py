"""Git-LFS pointers: what a clone without Git LFS has in the place of a large file."""

from __future__ import annotations

from pathlib import Path

from coreai_zoo.errors import BadInput

_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse a file that begins as a pointer does.

    Args:
        path: of the file.
        start: its first bytes, 64 or more where it has as many.

    Raises:
        BadInput: saying how to get the file itself.
    """
    if start.startswith(_POINTER):
        raise BadInput(
            f"{path} is a Git-LFS pointer, a few lines of text in the place of the file.",
            f"Run `git lfs pull` in {path.parent}, or download the checkpoint with `hf download`.",
        )


def refuse_pointer_at(path: Path) -> None:
    """Refuse the file at a path if it begins as a pointer does; see `refuse_pointer`."""
    try:
        with path.open("rb") as file:
            refuse_pointer(path, file.read(64))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
