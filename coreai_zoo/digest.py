"""SHA-256 of files, each computed once as long as the file stays as it is; and of the code that something is made of.

A build writes a bundle's bytecode once and needs its hash five times: for the asset, for the record, for three checks.
For 28 GB that is 18 seconds each, and minutes when it has to come back from the disk, so it is taken while the file is
written.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

_REMEMBERED_BYTES = 2**20  # smaller files are hashed again
_BLOCK_BYTES = 2**22
_AHEAD = 4  # blocks that may wait to be hashed

# A change within the same tick of the file system's clock leaves the times as they were, so a file is left alone for
# some ticks before it is hashed.
_TICKS = 0.05

_Identity = tuple[int, int, int, int, int]
_known: dict[_Identity, str] = {}
_lock = Lock()


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
        with _lock:
            if identity in _known:
                return _known[identity]
        _let_tick(status)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if _identity(os.fstat(file.fileno())) == identity:
            with _lock:
                _known[identity] = digest
        return digest


def source_digests(modules: Iterable[str]) -> list[str]:
    """SHA-256 of the source of each module, by name. None is imported for that, but the packages that they are in."""
    origins = (Path(str(spec.origin)) for spec in map(find_spec, modules) if spec is not None)
    return [hashlib.sha256(origin.read_bytes()).hexdigest() for origin in origins]


def write_hashed(path: Path, pieces: Iterable[memoryview]) -> str:
    """Write a file piece by piece; its hexadecimal SHA-256, which `file_sha256` knows afterwards.

    Another thread hashes what is written meanwhile: both leave the interpreter alone.

    Raises:
        OSError: when it cannot be written.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool, path.open("wb") as file:
        hashing: deque[Future[None]] = deque()
        for piece in pieces:
            for start in range(0, piece.nbytes, _BLOCK_BYTES):
                block = piece[start : start + _BLOCK_BYTES]
                hashing.append(pool.submit(digest.update, block))
                file.write(block)
                if len(hashing) > _AHEAD:
                    hashing.popleft().result()
    status = path.stat()
    if status.st_size >= _REMEMBERED_BYTES:
        _let_tick(status)
        with _lock:
            _known[_identity(status)] = digest.hexdigest()
    return digest.hexdigest()


def _let_tick(status: os.stat_result) -> None:
    """Wait until another change would show in the file's times."""
    time.sleep(min(_TICKS, max(0.0, status.st_ctime + _TICKS - time.time())))


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
