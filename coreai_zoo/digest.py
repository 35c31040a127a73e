"""SHA-256 of files, each computed once as long as the file stays as it is; and of the code that something is made of.

A build writes a bundle's weights once and needs their hash five times: for the asset, for the record, for three checks.
For 28 GB that is 18 seconds each, and minutes when it has to come back from the disk, so it is taken while the file is
filled.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Self

_REMEMBERED_BYTES = 2**20  # smaller files are hashed again
_BLOCK_BYTES = 2**22

# A change within the same tick of the file system's clock leaves the times as they were, so a file is left alone for
# some ticks before it is hashed.
_TICKS = 0.05

_Identity = tuple[int, int, int, int, int]
_known: dict[_Identity, str] = {}


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content.

    Raises:
        OSError: when it cannot be read.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size < _REMEMBERED_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        identity = _identity(status)
        if identity in _known:
            return _known[identity]
        _let_tick(status)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if _identity(os.fstat(file.fileno())) == identity:
            _known[identity] = digest
        return digest


def source_digests(modules: Iterable[str]) -> list[str]:
    """SHA-256 of the source of each module, by name. None is imported for that, but the packages that they are in."""
    origins = (Path(str(spec.origin)) for spec in map(find_spec, modules) if spec is not None)
    return [hashlib.sha256(origin.read_bytes()).hexdigest() for origin in origins]


class FollowingDigest:
    """SHA-256 of a file that is filled in any order: a thread hashes what is written as far as there is no gap.

    It reads what has just been written out of the system's memory, and leaves the interpreter alone meanwhile.

    Args:
        path: the file, which has its final length.
        gaps: start and end of each part that is still to be written.
    """

    def __init__(self, path: Path, gaps: Iterable[tuple[int, int]]) -> None:
        self._path, self._gaps = path, deque(sorted(gaps))
        self._filled = SimpleQueue[tuple[int, int] | None]()
        self._left = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._digest = self._thread.submit(self._follow)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._left = True
        self._filled.put(None)
        self._thread.shutdown()

    def filled(self, start: int, end: int) -> None:
        """One of the gaps is written."""
        self._filled.put((start, end))

    def hexdigest(self) -> str:
        """The hexadecimal SHA-256 of the file, all gaps being filled; `file_sha256` knows it afterwards.

        Raises:
            ValueError: when a gap is not filled.
            OSError: when the file cannot be read.
        """
        self._filled.put(None)
        digest = self._digest.result()
        status = self._path.stat()
        if status.st_size >= _REMEMBERED_BYTES:
            _let_tick(status)
            _known[_identity(status)] = digest
        return digest

    def _follow(self) -> str:
        digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
        with self._path.open("rb", buffering=0) as file:
            place, size = 0, os.fstat(file.fileno()).st_size
            for end in self._ends(size):
                while place < end and not self._left:
                    read = file.readinto(block[: end - place])
                    if not read:
                        raise OSError(errno.EIO, "The file has become shorter while it was written", str(self._path))
                    digest.update(block[:read])
                    place += read
        return digest.hexdigest()

    def _ends(self, size: int) -> Iterator[int]:
        """How far the file is without a gap, each time that it may be further; at last its size."""
        filled = set[tuple[int, int] | None]()
        while self._gaps:
            yield self._gaps[0][0]
            filled.add(self._filled.get())
            while self._gaps and self._gaps[0] in filled:
                self._gaps.popleft()
            if self._gaps and None in filled:
                raise ValueError(f"{self._path} has {len({*self._gaps} - filled)} gaps")
        yield size


def _let_tick(status: os.stat_result) -> None:
    """Wait until another change would show in the file's times."""
    time.sleep(min(_TICKS, max(0.0, status.st_ctime + _TICKS - time.time())))


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
