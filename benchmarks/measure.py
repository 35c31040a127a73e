"""Run a command and say how long it took and how much memory it used at most.

    python benchmarks/measure.py [--limit-gib 2] -- zoo build qwen3.6-27b --checkpoint DIR --custom -o OUT --json

Prints a JSON line: wall seconds; peak resident set (RSS, VmHWM: anonymous and mapped files); peak anonymous memory
(RssAnon, sampled every 20 ms); exit code; and what the command printed, if that is JSON. With `--limit-gib` the command
runs in a cgroup with that memory limit, page cache included (needs root).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
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


def measure(command: Sequence[str], limit_gib: float | None = None) -> dict[str, Any]:
    """Run `command`; see the module's docstring for what comes back."""
    peak: dict[str, int] = {"VmHWM": 0, "RssAnon": 0}
    with limited(limit_gib) as group:

        def enter() -> None:
            if group is not None:
                group[0].write_text(str(os.getpid()))

        started = time.monotonic()
        # The child has to enter the group before it becomes the command; this process has one thread.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=enter, text=True)  # noqa: PLW1509
        while process.poll() is None:
            for name, value in memory_of(process.pid).items():
                peak[name] = max(peak[name], value)
            time.sleep(_INTERVAL)
        seconds = time.monotonic() - started
        output = process.stdout.read() if process.stdout else ""
        events = group[1].read_text() if group is not None else ""
    return {
        "seconds": round(seconds, 2),
        "peak_rss_bytes": peak["VmHWM"],
        "peak_anonymous_bytes": peak["RssAnon"],
        "limit_gib": limit_gib,
        "oom_kills": dict(line.split() for line in events.splitlines()).get("oom_kill"),
        "exit_code": process.returncode,
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
