"""SHA-256 of files, each computed once as long as the file stays as it is; and of the code that something is made of.

A build writes a bundle's bytecode once and needs its hash five times: for the asset, for the record, for three checks.
For 28 GB that is 18 seconds each, and minutes when it has to come back from the disk, so it is taken while the file is
written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

_REMEMBERED_BYTES = 2**20  # smaller files are hashed again

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


# Hashes a file until its end is reached after the standard input has ended, which stands for the writer being done.
_FOLLOW = """
import hashlib, os, select, sys
digest, size, ended = hashlib.sha256(), 0, False
with open(sys.argv[1], "rb", buffering=0) as file:
    while True:
        block = file.read(1 << 20)
        if block:
            digest.update(block)
            size += len(block)
        elif ended:
            break
        else:
            ended = bool(select.select([0], [], [], 0.02)[0])
    print(os.fstat(file.fileno()).st_ino, size, digest.hexdigest())
"""


@contextlib.contextmanager
def hashed_while_written(path: Path) -> Iterator[None]:
    """Within the block a file is written from its beginning to its end; `file_sha256` knows its hash afterwards.

    Another process follows: native code that writes may not let this one's threads run. Where it cannot, because the
    file is removed before it has begun, it says nothing.
    """
    path.touch()
    command = [sys.executable, "-I", "-S", "-c", _FOLLOW, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as follower:
        try:
            yield
        except BaseException:
            follower.kill()
            raise
        status = path.stat()
        _let_tick(status)
        answer, _ = follower.communicate()
        *hashed, digest = answer.split() or [""]
        if hashed == [str(status.st_ino), str(status.st_size)] and _identity(path.stat()) == _identity(status):
            with _lock:
                _known[_identity(status)] = digest


def _let_tick(status: os.stat_result) -> None:
    """Wait until another change would show in the file's times."""
    time.sleep(min(_TICKS, max(0.0, status.st_ctime + _TICKS - time.time())))


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
