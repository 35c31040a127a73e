"""Native libraries that print, or end the process when they cannot write.

The compiler behind the toolchain reports a failed write by printing a line and calling `exit(1)`. No exception is
raised, and nothing of Python's runs any more. The C library still runs exit handlers, so one is registered meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from coreai_zoo.errors import CheckFailed, EnvironmentLacks, ZooError, failure_line

_NO_SPACE = ("No space left on device", "Disk quota exceeded", "File too large")

_WHEN_FULL = "Free some space there, or set TMPDIR to a folder on another disk; then run the same command again."


@contextlib.contextmanager
def exit_explained(destination: Path) -> Iterator[None]:
    """Within the block, a native call that ends the process says why, and removes the half-written `destination`.

    The process still ends, with the exit code of the error (see `errors`): 3 when there is no space left.
    """
    with tempfile.TemporaryFile() as captured, _stderr_in(captured) as stderr:

        def explain(_: object) -> None:
            # Before anything else: a process that shares the file may complain of what is removed.
            error = _error(destination, _content(captured).decode(errors="replace").strip())
            shutil.rmtree(destination, ignore_errors=True)
            os.write(stderr, f"{failure_line(error)}\n".encode())
            os._exit(error.exit_code)

        try:
            with _at_exit(explain):
                yield
        finally:
            _pass_on(captured, stderr)


@contextlib.contextmanager
def output_captured() -> Iterator[None]:
    """Within the block, native code prints nothing on the terminal's stderr, unless the block fails."""
    with tempfile.TemporaryFile() as captured, _stderr_in(captured) as stderr:
        try:
            yield
        except Exception:
            _pass_on(captured, stderr)
            raise


@contextlib.contextmanager
def _stderr_in(captured: BinaryIO) -> Iterator[int]:
    """Within the block, what is written to stderr goes to a file; yields a descriptor of the former stderr."""
    sys.stderr.flush()
    saved = os.dup(2)
    os.dup2(captured.fileno(), 2)
    try:
        yield saved
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _pass_on(captured: BinaryIO, stderr: int) -> None:
    os.write(stderr, _content(captured))


def _content(captured: BinaryIO) -> bytes:
    """All that was written so far, without moving the position: every process that writes there shares it."""
    return os.pread(captured.fileno(), os.fstat(captured.fileno()).st_size, 0)


@contextlib.contextmanager
def _at_exit(explain: Callable[[object], None]) -> Iterator[None]:
    """Within the block, the C library's `exit` calls `explain`, where that library knows handlers."""
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if library is None or not hasattr(library, "__cxa_atexit"):
        yield
        return
    inside = True
    handler = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda argument: explain(argument) if inside else None)
    # Handlers are registered for a shared object, by an address in it, and can be taken back by that. This one must be
    # taken back: at the end of every process it would run when there is no Python any more.
    owner = ctypes.byref(ctypes.c_char())
    library.__cxa_atexit(handler, None, owner)
    try:
        yield
    finally:
        inside = False
        library.__cxa_finalize(owner)  # runs it once more


def _error(destination: Path, said: str) -> ZooError:
    """The error that a native library's last words stand for."""
    if any(words in said for words in _NO_SPACE):
        return EnvironmentLacks(
            f"There is no space left to write {destination}; what was written of it is removed.", _WHEN_FULL
        )
    return CheckFailed(f"The toolchain ended the process while it wrote {destination}, saying: {said[-500:]}.")
