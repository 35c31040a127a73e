"""The disk: where something will be, for how long, and what is said when there is no room for it."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from coreai_zoo import interruption
from coreai_zoo.errors import EnvironmentLacks

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The numbers of an OSError that say that a disk or a quota is full."""


@contextlib.contextmanager
def temporary_folder(prefix: str = "zoo-") -> Iterator[Path]:
    """A folder for as long as the block runs; Ctrl-C leaves none behind, whenever it comes."""
    with interruption.deferred():
        made = tempfile.TemporaryDirectory(prefix=prefix)
    try:
        yield Path(made.name)
    finally:
        with interruption.deferred():
            made.cleanup()


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists() or parent.is_symlink())


def file_of(error: OSError, folder: Path) -> Path:
    """What could not be written or read, as far as an error says it.

    Args:
        error: of a copy, where the second name is of the file that was written; of a file that is open it has no name.
        folder: where that is, in this case.
    """
    return Path(str(error.filename2 or error.filename or folder))


def no_space(error: OSError, folder: Path) -> EnvironmentLacks:
    """The error for a disk or a quota that is full: `error` has one of the numbers of `NO_SPACE`; see `file_of`."""
    file = file_of(error, folder)
    free, temporary = shutil.disk_usage(existing_parent(file)).free, Path(tempfile.gettempdir())
    elsewhere = "; TMPDIR names another folder for temporary files" if temporary in (file, *file.parents) else ""
    return EnvironmentLacks(
        f"There is no space left for {file} ({error.strerror}; {free:,} bytes are free).",
        f"Free some, then run the same command again to go on{elsewhere}.",
    )
