"""Ctrl-C ends `zoo` with one line and exit code 130, and never in the middle of what cannot be left.

Python raises KeyboardInterrupt between any two steps of its own. Three things do not survive that, and are finished
first. One is a native call that threads still work for: its results are taken down under it, and a thread that was
being started is never told to end, so that the process waits for it for ever. Another is Python that native code calls:
an exception may abort the process there (torch, while it traces) or is swallowed (the end of an object). The third is
an import: a half-imported extension module may crash the process at its end, and what Python calls to clean up after
an import swallows the interruption.

What is left then is the end of the interpreter. A thread that comes back to it is unwound, and a runtime in Swift
aborts the process when that happens to one of its threads, now and then after a command that was not interrupted, too.
So every command ends without it, see `_end`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading

TYPE_CHECKING = False  # as in `coreai_zoo`
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import NoReturn

EXIT_CODE = 130
"""What a shell calls a command that Ctrl-C ended."""

_RETRY_SECONDS = 0.02
_PATIENCE = 3  # times that Ctrl-C is pressed by someone who does not want to wait
# The first is renamed to the second. The last is what safetensors calls, which makes another error of what is raised.
_UNSAFE_MODULES = ("_frozen_importlib", "importlib._bootstrap", "weakref", "torch.storage", "torch.utils.weak")
_UNSAFE_FUNCTIONS = ("__torch_dispatch__", "__torch_function__", "__del__")


def _handler() -> Callable[[int, FrameType | None], object] | None:
    """What answers Ctrl-C and may be exchanged here; None where nothing does, or another thread has to."""
    handler = signal.getsignal(signal.SIGINT)
    return handler if callable(handler) and threading.current_thread() is threading.main_thread() else None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the block Ctrl-C waits: it counts when the block has ended.

    Where that takes minutes nobody has to wait: a second Ctrl-C ends the process at once.
    """
    handler = _handler()
    if handler is None or isinstance(handler, _Noted):  # which raises nothing
        yield
        return
    pressed = False
    stderr = os.dup(2)  # the block may send it elsewhere

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            leave(stderr)
        pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        os.close(stderr)
        if pressed:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C raises nothing; yields what says whether it was pressed, for the block to end its work.

    Whoever cannot wait for that presses it three times, which ends the process at once.
    """
    handler = _handler()
    if handler is None:
        yield lambda: False
        return
    presses = _Noted()
    signal.signal(signal.SIGINT, presses)
    try:
        yield lambda: presses.count > 0
    finally:
        signal.signal(signal.SIGINT, handler)


class _Noted:
    """Counts how often Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.count >= _PATIENCE:
            leave()


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Within the block, which is all that the process does, Ctrl-C waits for imports and what native code calls.

    What answers it in words is the command line; before there is one, it is answered here.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have us ignore it
        handler = _WhereSafe()
        signal.signal(signal.SIGALRM, handler)
        signal.signal(signal.SIGINT, handler)
    code = 0
    try:
        yield
    except KeyboardInterrupt:
        leave()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        code = end.code
    except Exception:  # noqa: BLE001  # told as the end of the interpreter would tell it
        sys.excepthook(*sys.exc_info())
        code = 1
    _ignore()
    _end(code)


def _ignore() -> None:
    """Ignore Ctrl-C from now on: all that is left is the end."""
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def _end(code: int) -> NoReturn:
    """End the process without the end of the interpreter.

    A thread of the runtime that still lets go of what it was given would come back to the interpreter while that ends.
    What Python would do that matters is done: exit handlers remove temporary folders, and what was printed goes out.
    """
    atexit._run_exitfuncs()  # noqa: SLF001  # nothing public runs them
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class _WhereSafe:
    """Raises KeyboardInterrupt as soon as that can be survived; a second Ctrl-C until then ends the process."""

    def __init__(self) -> None:
        self._pressed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _unsafe(frame):
            if self._pressed and number == signal.SIGINT:
                leave()
            self._pressed = True
            signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
        elif number == signal.SIGALRM:
            self._pressed = False
            signal.raise_signal(signal.SIGINT)  # which may be deferred by now
        else:
            raise KeyboardInterrupt


def _unsafe(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") in _UNSAFE_MODULES or frame.f_code.co_name in _UNSAFE_FUNCTIONS:
            return True
        frame = frame.f_back
    return False


def leave(stderr: int = 2) -> NoReturn:
    """End the process as interrupted, at once: what is left behind is what a killed process leaves."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # gone, or in the middle of a write
        sys.stdout.flush()
    os.write(stderr, b"\ninterrupted\n")
    os._exit(EXIT_CODE)
