"""Processes on this machine that work for a block of code: they end with it, and Ctrl-C is for the block alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import forkserver, resource_tracker

_FORKS = sys.platform == "linux"
"""Whether workers are forked, by a process that has no threads yet; frameworks of macOS do not survive a fork."""


@contextlib.contextmanager
def processes(jobs: int, modules: Sequence[str], begin: Callable[[], object]) -> Iterator[Executor]:
    """Within the block, so many processes that share this machine's cores; none of them outlives the block.

    Args:
        jobs: how many.
        modules: what they need, imported once where they are forked.
        begin: what each does first; it goes there pickled.
    """
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
    pool = ProcessPoolExecutor(jobs, context, _begin, (begin,))
    try:
        with _deaf_to_interruption():
            if _FORKS:
                context.set_forkserver_preload([__name__, *modules])
                forkserver.ensure_running()
            else:
                _start(pool, jobs)
        if _FORKS:
            # The server imports for seconds, in which Ctrl-C is for this process. A worker that is asked for meanwhile
            # would start when nobody wants it any more.
            ready = multiprocessing.get_context("forkserver").Process(target=int)
            ready.start()
            ready.join()
            _start(pool, jobs)
        yield pool
    except BaseException:
        # Their work may take minutes, and nobody waits for it any more. That the pool itself drops what waits matters:
        # it stumbles over a future that somebody else has cancelled when its workers end.
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        if _FORKS:
            _end_server()
        raise
    finally:
        pool.shutdown()


def _end_server() -> None:
    """Have it hold this process's output no longer than this process does; the next pool starts another."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)  # noqa: SLF001  # it has no other way to be ended
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # the next pool looks whether it is there


def _start(pool: ProcessPoolExecutor, jobs: int) -> None:
    for _ in range(jobs):
        pool.submit(int)  # has the pool start a process each


@contextlib.contextmanager
def _deaf_to_interruption() -> Iterator[None]:
    """Processes that are started within the block never hear Ctrl-C: it is for the one that ends them.

    That one hears it behind the block, where it comes within: a signal that is blocked waits, and is inherited as such.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which ends with the signal unblocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(begin: Callable[[], object]) -> None:
    """Before the first work; a worker ends when the process that gives the work has ended, however that ends."""
    begin()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
