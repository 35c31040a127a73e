"""Run a command and say how long it took and how much memory it used at most.

    python benchmarks/measure.py [--limit-gib 2] -- zoo build qwen3.6-27b --checkpoint DIR --custom -o OUT --json

Prints a JSON line: wall seconds and CPU seconds (user and system, its own children's too); peak resident set (RSS,
VmHWM: anonymous and mapped files); peak anonymous memory (RssAnon, sampled every 20 ms); bytes that it wrote to files
(write_bytes of /proc/PID/io); exit code; and what the command printed, if that is JSON. With `--limit-gib` the command
runs in a cgroup with that memory limit, page cache included (needs root). Of a command with `--progress json`, also the
seconds and the peak anonymous memory of each stage.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_INTERVAL = 0.02
# Where memory cgroups are made, and what their limit and their counter of kills are called: version 2, then version 1.
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.events"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.oom_control"),
)


@contextlib.contextmanager
def limited(gib: float | None) -> Iterator[tuple[Path, Path] | None]:
    """A cgroup with that memory limit, as (its list of processes, its counters), or None without a limit.

    The machine should have no swap: version 1 cannot always forbid it.
    """
    if gib is None:
        yield None
        return
    parent, limit, events = next(found for found in _CGROUPS if (found[0] / "cgroup.procs").exists())
    group = parent / f"zoo-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(int(gib * 2**30)))
        yield group / "cgroup.procs", group / events
    finally:
        group.rmdir()


def memory_of(pid: int) -> dict[str, int]:
    """VmHWM and RssAnon of a process in bytes; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon") if name in fields}


class Stages:
    """Follows the stages of a command by the events on its stderr; lines that are no events are passed on."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.current: str | None = None
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._thread = threading.Thread(target=self._follow, args=(lines,))
        self._thread.start()

    def _follow(self, lines: Iterable[str]) -> None:
        for line in lines:
            event = _json_of(line)
            if not isinstance(event, dict):
                sys.stderr.write(line)
            elif event.get("event") == "stage":
                self.current = event["stage"] if event["state"] == "start" else None
                if event["state"] == "end":
                    self.seconds[event["stage"]] = event["seconds"]

    def saw(self, anonymous: int) -> None:
        """Count a sample for the stage that is running."""
        if self.current is not None:
            self.peaks[self.current] = max(self.peaks.get(self.current, 0), anonymous)

    def result(self) -> dict[str, Any]:
        """Seconds and peak by stage, when the command has ended."""
        self._thread.join()
        return {
            stage: {"seconds": seconds, "peak_anonymous_bytes": self.peaks.get(stage)}
            for stage, seconds in self.seconds.items()
        }


def written_by(pid: int) -> int:
    """Bytes of file pages that a process has dirtied; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes")), 0)


def blocks_below(folders: Sequence[Path]) -> int:
    """Bytes that the files below some folders take on the disk."""
    total = 0
    for path, _, names in (found for folder in folders for found in os.walk(folder)):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                total += os.lstat(os.path.join(path, name)).st_blocks * 512  # noqa: PTH118  # many times a second
    return total


def measure(command: Sequence[str], limit_gib: float | None = None, folders: Sequence[Path] = ()) -> dict[str, Any]:
    """Run `command`; see the module's docstring for what comes back.

    Args:
        command: the command.
        limit_gib: the limit of its memory; None for none.
        folders: of what is below them, `peak_disk_bytes` says what it took on the disk at the most.
    """
    peak: dict[str, int] = {"VmHWM": 0, "RssAnon": 0}
    disk = written = 0
    with limited(limit_gib) as group:
        # The child has to enter the group before it becomes the command; this process has one thread. Without a group
        # nothing is run in between, so that this process, which may map more than there is memory, is not forked.
        enter = None if group is None else functools.partial(group[0].write_text, "0")  # who writes 0 means itself
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, preexec_fn=enter, text=True, **pipes)  # noqa: PLW1509
        assert process.stdout is not None and process.stderr is not None
        stages = Stages(process.stderr)
        while process.poll() is None:
            found = memory_of(process.pid)
            for name, value in found.items():
                peak[name] = max(peak[name], value)
            stages.saw(found.get("RssAnon", 0))
            written, disk = max(written, written_by(process.pid)), max(disk, blocks_below(folders))
            time.sleep(_INTERVAL)
        seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        output = process.stdout.read()
        events = group[1].read_text() if group is not None else ""
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "peak_rss_bytes": peak["VmHWM"],
        "peak_anonymous_bytes": peak["RssAnon"],
        "written_bytes": written,
        "peak_disk_bytes": disk if folders else None,
        "limit_gib": limit_gib,
        "oom_kills": dict(line.split() for line in events.splitlines()).get("oom_kill"),
        "exit_code": process.returncode,
        "stages": stages.result(),
        "output": _json_of(output),
    }


def _json_of(output: str) -> Any:
    """What the command printed, if that is JSON, whole or in its last line."""
    for candidate in (output, output.strip().rpartition("\n")[2]):
        with contextlib.suppress(ValueError):
            return json.loads(candidate)
    return None


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gib", type=float)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("give a command after --")
    print(json.dumps(measure(command, arguments.limit_gib)))


if __name__ == "__main__":
    main()
