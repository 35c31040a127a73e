"""Progress on long work: a bar on a terminal, plain lines elsewhere, nothing when silenced. Always on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from coreai_zoo.dtypes import size
from coreai_zoo.errors import reason

# Seconds between two plain lines of one stage, so that a log of a long build stays readable.
_PLAIN_INTERVAL = 10.0
# The same where each line is one of some hundred steps that take hours together.
_STEPS_INTERVAL = 600.0
# The same between two events, which a program may draw.
_EVENT_INTERVAL = 0.2
# Steps that will take longer than this are foretold, once as long has passed, or so many are done in a shorter time:
# the first one also loads libraries, and some models count a layer of several prompts at once.
_WORTH_TELLING = 60.0
_TELLING_STEPS, _TELLING_AFTER = 8, 10.0

CountBytes = Callable[[str, int], None]
"""Takes what is worked on and how many more bytes of the stage are done."""


class Reporter:
    """Tells the user which stage runs and how far it is.

    Args:
        silent: report nothing (for `--json`, and when used as a library).
    """

    def __init__(self, *, silent: bool = False) -> None:
        # No markup: names and paths are printed as they are.
        self._console = Console(file=sys.stderr, quiet=silent, highlight=False, markup=False, emoji=False)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[None]:
        """Announce a stage and, when it is done, how long it took (also kept in `seconds`)."""
        self._console.print(f"{name:<8} {detail}".rstrip(), soft_wrap=True)
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started
        self._console.print(f"         {self.seconds[name]:.1f} s", style="dim")

    def note(self, text: str) -> None:
        """A remark inside a stage."""
        self._console.print(f"         {text}", soft_wrap=True)

    @contextmanager
    def steps(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Count equal steps up to `total`: a bar on a terminal, a line elsewhere; yields what to call after each.

        Args:
            what: is counted; empty inside a stage, which has said it.
            total: how many.
        """
        if self._console.quiet:
            yield lambda: None
            return
        if not self._console.is_terminal:
            if what:
                self._console.print(what, soft_wrap=True)
            yield self._steps_in_lines(total)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    def _steps_in_lines(self, total: int) -> Callable[[], None]:
        """What counts a step: it foretells long work after the first few, and then says now and then how far it is."""
        done, foretold = 0, False
        started = reported = time.monotonic()

        def count() -> None:
            nonlocal done, reported, foretold
            done += 1
            now = time.monotonic()
            left = (now - started) / done * (total - done)
            first = not foretold and now - started >= (_TELLING_AFTER if done >= _TELLING_STEPS else _WORTH_TELLING)
            foretold = foretold or first
            if (first and left >= _WORTH_TELLING) or (done < total and now - reported >= _STEPS_INTERVAL):
                reported = now
                self.note(f"{done} of {total} steps in {duration(now - started)}, about {duration(left)} left")

        return count

    @contextmanager
    def bytes(self, total: int) -> Iterator[CountBytes]:
        """Count bytes of a stage up to `total`: a bar on a terminal, a line every ten seconds elsewhere."""
        if not self._console.is_terminal or self._console.quiet:
            yield self._count_in_lines(total)
            return
        columns = (
            TextColumn("         {task.description:<48.48}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda what, count: bar.update(task, advance=count, description=what)

    def _count_in_lines(self, total: int) -> CountBytes:
        done = 0
        started = reported = time.monotonic()

        def count_bytes(what: str, count: int) -> None:
            nonlocal done, reported
            done += count
            now = time.monotonic()
            if now - reported >= _PLAIN_INTERVAL:
                reported = now
                rate = done / (now - started)
                left = (total - done) / rate if rate else 0.0
                self._console.print(
                    f"         {size(done)} of {size(total)}, {size(round(rate))}/s, {left:.0f} s left: {what}"
                )

        return count_bytes


def duration(seconds: float) -> str:
    """A time in the units that a person would use: 40 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class EventReporter(Reporter):
    """Tells a program: one JSON object per line on stderr.

    `{"event": "stage", "stage", "state": "start" | "end" | "failed", "detail" or "seconds"}`, a failed one with
    `"message"` and `"exit_code"`; `{"event": "note", "stage", "text"}`; while bytes are counted
    `{"event": "bytes", "stage", "what", "done", "total", "rate", "left"}`, rate in bytes a second, left in seconds; and
    where the command fails, in a stage or not, at the very end `{"event": "failed", "stage", "message", "exit_code"}`.
    """

    def __init__(self) -> None:
        super().__init__(silent=True)
        self._stage = ""

    def emit(self, event: str, **fields: object) -> None:
        """Write one event."""
        print(self._line(event, **fields), file=sys.stderr, flush=True)

    def failure_line(self, message: str, exit_code: int) -> str:
        """The last event of a command that fails, for `errors.tell_failure_as`."""
        return self._line("failed", message=message, exit_code=exit_code)

    def _line(self, event: str, **fields: object) -> str:
        return json.dumps({"event": event, "stage": self._stage, **fields})

    @contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[None]:
        """See `Reporter.stage`."""
        self._stage = name
        self.emit("stage", state="start", detail=detail)
        started = time.monotonic()
        try:
            yield
        except BaseException as error:
            message, exit_code = reason(error)
            seconds = round(time.monotonic() - started, 3)
            self.emit("stage", state="failed", seconds=seconds, message=message, exit_code=exit_code)
            raise
        self.seconds[name] = time.monotonic() - started
        self.emit("stage", state="end", seconds=round(self.seconds[name], 3))

    def note(self, text: str) -> None:
        """See `Reporter.note`."""
        self.emit("note", text=text)

    @contextmanager
    def bytes(self, total: int) -> Iterator[CountBytes]:
        """See `Reporter.bytes`: an event at once, then a few a second, and one at the end."""
        done, current = 0, ""
        started, emitted = time.monotonic(), 0.0

        def emit() -> None:
            nonlocal emitted
            emitted = time.monotonic()
            rate = done / max(emitted - started, 1e-9)
            left = (total - done) / rate if rate else None
            self.emit("bytes", what=current, done=done, total=total, rate=round(rate), left=left)

        def count_bytes(what: str, count: int) -> None:
            nonlocal done, current
            done, current = done + count, what
            if time.monotonic() - emitted >= _EVENT_INTERVAL:
                emit()

        yield count_bytes
        emit()
