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

# Seconds between two plain lines of one stage, so that a log of a long build stays readable.
_PLAIN_INTERVAL = 10.0
# The same between two events, which a program may draw.
_EVENT_INTERVAL = 0.2


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
        if not self._console.is_terminal or self._console.quiet:
            if what:
                self._console.print(what, soft_wrap=True)
            yield lambda: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    @contextmanager
    def bytes(self, total: int) -> Iterator[ByteCounter]:
        """Count bytes of a stage up to `total`."""
        if not self._console.is_terminal or self._console.quiet:
            yield PlainCounter(self._console, total)
            return
        columns = (
            TextColumn("         {task.description:<48.48}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            yield BarCounter(bar, total)


class EventReporter(Reporter):
    """Tells a program: one JSON object per line on stderr.

    `{"event": "stage", "stage", "state": "start" | "end" | "failed", "detail" or "seconds"}`,
    `{"event": "note", "stage", "text"}`, and while bytes are counted
    `{"event": "bytes", "stage", "what", "done", "total", "rate", "left"}`, rate in bytes a second, left in seconds.
    """

    def __init__(self) -> None:
        super().__init__(silent=True)
        self._stage = ""

    def emit(self, event: str, **fields: object) -> None:
        """Write one event."""
        line = json.dumps({"event": event, "stage": self._stage, **fields})
        print(line, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[None]:
        """See `Reporter.stage`."""
        self._stage = name
        self.emit("stage", state="start", detail=detail)
        started = time.monotonic()
        try:
            yield
        except BaseException:
            self.emit("stage", state="failed", seconds=round(time.monotonic() - started, 3))
            raise
        self.seconds[name] = time.monotonic() - started
        self.emit("stage", state="end", seconds=round(self.seconds[name], 3))

    def note(self, text: str) -> None:
        """See `Reporter.note`."""
        self.emit("note", text=text)

    @contextmanager
    def bytes(self, total: int) -> Iterator[ByteCounter]:
        """See `Reporter.bytes`."""
        counter = EventCounter(self, total)
        yield counter
        counter.emit()


class ByteCounter:
    """Counts bytes against a total."""

    def advance(self, what: str, count: int) -> None:
        """Add `count` bytes, now working on `what`."""
        raise NotImplementedError


class BarCounter(ByteCounter):
    """A bar on a terminal."""

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total)

    def advance(self, what: str, count: int) -> None:
        """Add `count` bytes, now working on `what`."""
        self._bar.update(self._task, advance=count, description=what)


class PlainCounter(ByteCounter):
    """A line every ten seconds."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._started = self._reported = time.monotonic()

    def advance(self, what: str, count: int) -> None:
        """Add `count` bytes, now working on `what`."""
        self._done += count
        now = time.monotonic()
        if now - self._reported >= _PLAIN_INTERVAL:
            self._reported = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate if rate else 0.0
            self._console.print(
                f"         {self._done / 2**20:,.0f} of {self._total / 2**20:,.0f} MiB, {rate / 2**20:,.0f} MiB/s, "
                f"{left:.0f} s left: {what}"
            )


class EventCounter(ByteCounter):
    """Events: the first at once, then a few a second, and one at the end."""

    def __init__(self, report: EventReporter, total: int) -> None:
        self._report, self._total, self._done, self._what = report, total, 0, ""
        self._started, self._emitted = time.monotonic(), 0.0

    def advance(self, what: str, count: int) -> None:
        """Add `count` bytes, now working on `what`."""
        self._done += count
        self._what = what
        if time.monotonic() - self._emitted >= _EVENT_INTERVAL:
            self.emit()

    def emit(self) -> None:
        """Tell how far it is."""
        self._emitted = time.monotonic()
        rate = self._done / max(self._emitted - self._started, 1e-9)
        left = (self._total - self._done) / rate if rate else None
        self._report.emit("bytes", what=self._what, done=self._done, total=self._total, rate=round(rate), left=left)
