"""Runs `zoo` many times, each in a process that is killed at a chosen moment.

Processes are those of `forked`, which call `watched_zoo`. The code under test is as it is: operations are seen through
audit events, which Python raises before it does what they say. But a decoder that was traced before they were forked is
not traced again: between the files that a kill can fall between, that is a pause of seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

import forked

EVENTS = frozenset(
    {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.rmtree"}
)


@attrs.frozen
class Job:
    """One run.

    Attributes:
        arguments: of `zoo`.
        log: prefix of the files that take stdout (`.out`), stderr (`.err`) and the answer (`.answer`).
        folder: file operations below it are counted.
        after: count from the first operation on a path that contains this.
        survive: signal the process at the operation after so many; None: never.
        tear: first cut off the end of the file that was written last, as a kill inside of that write would have. Not of
            one that has its whole length before it is filled.
        written_to: signal the process when something is written to this file...
        seconds: ... and so much time has passed.
        signal: which.
    """

    arguments: Sequence[str]
    log: str
    folder: str
    after: str = ""
    survive: int | None = None
    tear: bool = False
    written_to: str | None = None
    seconds: float = 0.0
    signal: int = signal.SIGKILL


@attrs.frozen
class Outcome:
    """How a run ended.

    Attributes:
        status: its exit code, minus the signal if it was killed.
        operations: how many file operations were counted.
        before: how many there were until the first that was counted.
        last: where it was killed.
    """

    status: int
    operations: int
    before: int
    last: str


def run(job: Job) -> Outcome:
    """Run `zoo`; the end of its process."""
    answer = Path(job.log + ".answer")
    answer.unlink(missing_ok=True)
    before = _written(job.written_to)
    with forked.Process(json.dumps(attrs.asdict(job)), call="killing:watched_zoo", before="traces:inherit") as process:
        if job.written_to is not None:
            _signal_when_due(job, process, before)
        status = process.wait()
        for text, suffix in zip(process.communicate(), (".out", ".err"), strict=True):
            Path(job.log + suffix).write_text(text, encoding="utf-8")
    answers = answer.read_text(encoding="utf-8").splitlines() or ['{"operations": -1, "before": -1, "last": ""}']
    return Outcome(status, **json.loads(answers[0]))


def _written(file: str | None) -> int | None:
    """When a file was written to; None where there is none."""
    return Path(file).stat().st_mtime_ns if file is not None and Path(file).exists() else None


def _signal_when_due(job: Job, process: forked.Process, before: int | None) -> None:
    while _written(job.written_to) in (None, before):
        if process.poll() is not None:
            return
        time.sleep(0.0002)
    time.sleep(job.seconds)
    process.send_signal(job.signal)


# ---------------------------------------------------------------------------------------------------------------------
# In the process
# ---------------------------------------------------------------------------------------------------------------------


class _Operations:
    """Counts file operations below a folder, and signals this process at one of them."""

    def __init__(self, job: Job, answer: int) -> None:
        self._job, self._answer = job, answer
        self._started, self._done, self._written = not job.after, False, ""
        self._count = self._before = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._done or event not in EVENTS or not self._counts(event, arguments):
            return
        path = str(arguments[0])
        self._started = self._started or self._job.after in path
        if not self._started:
            self._before += 1
            return
        if self._count == self._job.survive:
            self._done = True
            if self._job.tear and Path(self._written).is_file() and not self._written.endswith(".mlirb"):
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
        told = {"operations": self._count, "before": self._before, "last": last}
        os.write(self._answer, json.dumps(told).encode() + b"\n")


def watched_zoo() -> None:
    """Be `zoo` with the arguments of the job that is this process's only argument."""
    job = Job(**json.loads(sys.argv[1]))
    operations = _Operations(job, os.open(job.log + ".answer", os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    sys.addaudithook(operations)
    from coreai_zoo.cli.app import main

    sys.argv[1:] = job.arguments
    try:
        main()
    except SystemExit:
        operations.answer()
        raise
