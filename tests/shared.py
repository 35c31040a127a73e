"""Things that take seconds to make and that tests only read: made once in a run of the tests, by whoever asks first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from filelock import FileLock

Arrays = Mapping[str, np.ndarray[Any, Any]]


@frozen
class Shared:
    """What the processes of one run have in common.

    One run has one version of the code, so a name says all by saying the arguments; the next run begins with nothing.

    Attributes:
        root: a folder that is the same in all of them, and in no other run.
    """

    root: Path

    def folder(self, name: str, fill: Callable[[Path], object]) -> Path:
        """A folder that `fill` was given empty. Who wants to change it copies it first.

        Raises:
            AssertionError: when somebody did change it.
        """
        folder, listing = self.root / name, self.root / f"{name}.listing"
        self.root.mkdir(exist_ok=True)
        with FileLock(self.root / f"{name}.lock"):
            if not listing.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a try that failed
                folder.mkdir()
                fill(folder)
                listing.write_text(_listing(folder), encoding="utf-8")
            assert listing.read_text(encoding="utf-8") == _listing(folder), f"a test changed {folder}, which is shared"
        return folder

    def arrays(self, name: str, compute: Callable[[], Arrays]) -> dict[str, np.ndarray[Any, Any]]:
        """The named arrays that `compute` gives."""
        folder = self.folder(name, lambda folder: np.savez(folder / "arrays.npz", **compute()))
        with np.load(folder / "arrays.npz") as arrays:
            return dict(arrays)


def _listing(folder: Path) -> str:
    """Every file below a folder, with its size and the time of its last change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = ((path, path.stat()) for path in files)
    return "\n".join(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
