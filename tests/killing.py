"""Runs `zoo` many times, each in a process that is killed at a chosen moment.

This file is run as a program that imports what takes seconds to import, and forks for each run. It reads jobs, one JSON
object per line (see `Job`), and answers each with the process's status and the number of file operations. The code
under test is as it is: operations are seen through audit events, which Python raises before it does what they say.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

EVENTS = frozenset(
    {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.rmtree"}
)


@attrs.frozen
class Job:
    """One run.

    Attributes:
        arguments: of `zoo`.
        log: prefix of the files that take stdout (`.out`) and stderr (`.err`).
        folder: file operations below it are counted.
        after: count from the first operation on a path that contains this.
        survive: signal the process at the operation after so many; None: never.
        tear: first cut off the end of the file that was written last, as a kill inside of that write would have.
        appears: signal the process when this path is there...
        seconds: ... and so much time has passed.
        signal: which.
    """

    arguments: Sequence[str]
    log: str
    folder: str
    after: str = ""
    survive: int | None = None
    tear: bool = False
    appears: str | None = None
    seconds: float = 0.0
    signal: int = signal.SIGKILL


@attrs.frozen
class Outcome:
    """Exit code of a run, minus the signal if it was killed; how many file operations; and where it was killed."""

    status: int
    operations: int
    last: str


class Zoo:
    """The program, started."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._process.communicate()

    def run(self, job: Job) -> Outcome:
        assert self._process.stdin and self._process.stdout
        print(json.dumps(attrs.asdict(job)), file=self._process.stdin, flush=True)
        return Outcome(**json.loads(self._process.stdout.readline()))


# ---------------------------------------------------------------------------------------------------------------------
# In the program
# ---------------------------------------------------------------------------------------------------------------------


class _Operations:
    """Counts file operations below a folder, and signals this process at one of them."""

    def __init__(self, job: Job, answer: int) -> None:
        self._job, self._answer = job, answer
        self._started, self._done, self._count, self._written = not job.after, False, 0, ""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._done or event not in EVENTS or not self._counts(event, arguments):
            return
        path = str(arguments[0])
        self._started = self._started or self._job.after in path
        if not self._started:
            return
        if self._count == self._job.survive:
            self._done = True
            if self._job.tear and Path(self._written).is_file():
                size = Path(self._written).stat().st_size
                os.truncate(self._written, size - min(size // 2, 40))
            self.answer(f"{event} {path}")
            os.kill(os.getpid(), self._job.signal)
        self._count += 1
        if event in {"open", "os.rename"}:
            self._written = str(arguments[event == "os.rename"])

    def _counts(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open" and not arguments[2] & os.O_ACCMODE:
            return False  # reading leaves nothing
        # shutil.rmtree names what it removes relative to a descriptor.
        relative = event in {"os.remove", "os.rmdir"} and arguments[1] != -1 and self._started
        return relative or str(arguments[0]).startswith(self._job.folder)

    def answer(self, last: str = "") -> None:
        os.write(self._answer, json.dumps({"operations": self._count, "last": last}).encode() + b"\n")


def _run_zoo(job: Job, answer: int) -> None:
    """In the child: be `zoo`."""
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(job.log + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    operations = _Operations(job, answer)
    sys.addaudithook(operations)
    from coreai_zoo.cli.app import main

    sys.argv[:] = ["zoo", *job.arguments]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        operations.answer()
        os._exit(int(end.code or 0))


def _signal_when_due(job: Job, child: int) -> None:
    while not Path(str(job.appears)).exists():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.0002)
    time.sleep(job.seconds)
    os.kill(child, job.signal)


def _serve() -> None:
    import coreai.authoring
    import coreai.runtime  # noqa: F401
    import coreai_torch  # noqa: F401
    import torch

    import coreai_zoo.cli.build  # noqa: F401

    assert torch.get_num_threads() == 1  # threads would not survive the fork
    for line in sys.stdin:
        job = Job(**json.loads(line))
        reader, writer = os.pipe()
        # A shell that starts the tests in the background has them ignore Ctrl-C, and a child would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        child = os.fork()
        if not child:
            _run_zoo(job, writer)
            os._exit(99)
        os.close(writer)
        if job.appears is not None:
            _signal_when_due(job, child)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with os.fdopen(reader, "rb") as answer:
            answers = answer.read().splitlines() or [b'{"operations": -1, "last": ""}']
        found = json.loads(answers[0])
        print(json.dumps({"status": status, **found}), flush=True)


if __name__ == "__main__":
    _serve()
