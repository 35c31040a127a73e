"""A lock on a path, which a process cannot leave locked by dying.

The kernel holds the lock and drops it when the holder ends, however it ends; whether another process has the same pid
by now does not matter. What is written in the lock file only tells the others whom they wait for. It decides in one
case: when another machine left it, whose locks this one may not see, since some network file systems keep locks to
themselves.

The file is ours and only the lock on it is filelock's: a `FileLock` would leave the file behind and, in most versions,
empty it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from attrs import asdict, field, frozen
from attrs.validators import instance_of

from coreai_zoo.errors import BadInput, EnvironmentLacks

_POLL_SECONDS = 0.1
_MAX_BYTES = 4096  # of a lock file: more than is ever written to one
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@frozen
class Holder:
    """The holder of a lock, as its file names it.

    Attributes:
        pid: id of the process.
        host: name of its machine (or container).
        boot: id of the running kernel; empty where there is none.
        started: local date and time when the lock was taken.
        what: what the process does.
    """

    pid: int = field(validator=instance_of(int))
    host: str = field(validator=instance_of(str))
    boot: str = field(validator=instance_of(str))
    started: str = field(validator=instance_of(str))
    what: str = field(validator=instance_of(str))

    def __str__(self) -> str:
        where = "" if self.host == socket.gethostname() else f" on {self.host}"
        return f"process {self.pid}{where} ({self.what}, since {self.started})"

    @classmethod
    def this(cls, what: str) -> Holder:
        """This process as the holder, from now on."""
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(os.getpid(), socket.gethostname(), _boot(), started, what)

    @property
    def may_be_elsewhere(self) -> bool:
        """Whether another machine may have written it, whose locks the kernel here may not see."""
        return self.host != socket.gethostname() and not (self.boot and self.boot == _boot())


def _boot() -> str:
    with suppress(OSError):
        return _BOOT_ID.read_text(encoding="ascii").strip()
    return ""


def lock_file(path: Path) -> Path:
    """The lock file of `path`: hidden and beside it, so that `path` itself may be made, renamed and removed."""
    path = path.absolute()
    return path.with_name(f".zoo-lock-{path.name}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def exclusive(path: Path, what: str, *, wait: bool = False, say: Callable[[str], None] = _say) -> Iterator[None]:
    """Within the block, no other block of `exclusive` runs for `path`, in this process or in another.

    The folder of `path` must exist, `path` need not. The lock file is gone afterwards; one that a dead process left
    behind is taken over.

    Args:
        path: what is locked.
        what: what is done with it, for the message that others get, for example `building acme-mini`.
        wait: whether to wait for the holder to end instead of refusing.
        say: called with a line that says whom this process waits for, once for each holder.

    Raises:
        BadInput: when it is held and `wait` is false, when another machine left the lock file, or when the file cannot
            be made.
        EnvironmentLacks: when there are no locks, on this system or on this file system.
    """
    file, told = lock_file(path), None
    while True:
        with _open(file, path) as opened:
            locked, holder = _try(opened, path), _read(opened)
            if not _is(opened, file):
                continue  # its holder ended and removed it meanwhile
            if locked:
                with _signed(opened, file, path, what, holder):
                    yield
                return
        if not wait:
            raise BadInput(
                f"{path} is in use by {holder or 'another process'}.",
                "Wait until that has ended, or choose another folder.",
            )
        if holder and holder != told:
            say(f"waiting for {holder}, which uses {path}")
            told = holder
        time.sleep(_POLL_SECONDS)


def _open(file: Path, path: Path) -> FileIO:
    try:
        # Not through a link: the file is written to, and others may have put it there.
        return FileIO(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:
        raise BadInput(
            f"{path} cannot be locked: {file} cannot be made or opened ({error.strerror}).",
            "Choose a folder that exists and that you may write to.",
        ) from error


def _try(opened: FileIO, path: Path) -> bool:
    """Take the kernel's lock; False when another has it."""
    from filelock import lock_descriptor  # brings asyncio along, which only a build needs

    try:
        return lock_descriptor(opened.fileno(), blocking=False)
    except OSError as error:
        raise EnvironmentLacks(
            f"{path} cannot be locked: its file system has no locks ({error.strerror}), so two builds there could not "
            "be kept apart.",
            "Choose a folder on a local disk; --work-dir and -o say where a build writes.",
        ) from error


def _is(opened: FileIO, file: Path) -> bool:
    """Whether the open file is the one that is there."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(opened.fileno()), file.lstat())
    return False


def _read(opened: FileIO) -> Holder | None:
    """The holder as written in the file; None when that is nothing or nonsense."""
    try:
        return Holder(**json.loads(os.pread(opened.fileno(), _MAX_BYTES, 0)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


@contextmanager
def _signed(opened: FileIO, file: Path, path: Path, what: str, left: Holder | None) -> Iterator[None]:
    """Within the block, the locked file says who holds it instead of who `left` it; afterwards it is gone."""
    if left and left.may_be_elsewhere:
        raise BadInput(
            f"{path} was in use by {left}, and from here it cannot be seen whether it still is.",
            f"If nothing runs there any more, delete {file} and try again.",
        )
    try:
        _write(opened, Holder.this(what), file)
        yield
    finally:
        # While it is still held: whoever has opened it meanwhile sees that it is gone and opens another.
        if _is(opened, file):
            file.unlink(missing_ok=True)


def _write(opened: FileIO, holder: Holder, file: Path) -> None:
    try:
        opened.truncate(0)
        opened.write(json.dumps(asdict(holder)).encode())
    except OSError as error:
        raise EnvironmentLacks(
            f"The lock file {file} cannot be written ({error.strerror}).", "Free some space on its disk."
        ) from error
