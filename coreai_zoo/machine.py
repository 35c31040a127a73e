"""This machine: its memory and what a container leaves of it, what this process took, its processor and system."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")

# The file of the limit, the file of what is in use, and the part of that which is page cache, which gives way. Control
# groups have them in version 2 and in version 1.
_VERSION_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes that this process may still take without swapping or being killed; None where Linux does not say.

    Args:
        proc: where the process file system is mounted.
        cgroups: where the control groups are.
    """
    rooms = [*_free(proc), *_room_in_groups(proc, cgroups)]
    return max(0, min(rooms)) if rooms else None


def physical_memory() -> int | None:
    """Bytes of memory that this machine was built with; None where the system does not say."""
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(proc: Path = _PROC) -> int | None:
    """Bytes of memory that this process held at its peak, files that it maps included; None where no system says."""
    for line in _lines(proc / "self" / "status"):  # on Linux ru_maxrss may be that of the process that started this one
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor(proc: Path = _PROC) -> str:
    """What the processor of this machine is sold as: `Apple M4 Max`; else its architecture, such as `x86_64`."""
    named = ""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        named = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    for line in _lines(proc / "cpuinfo"):
        if line.startswith("model name"):
            named = line.partition(":")[2]
            break
    return named.strip() or platform.machine()


def operating_system() -> str:
    """Name and version of the system: `macOS 27.2`, `Linux 6.12.1`."""
    mac = platform.mac_ver()[0]
    return f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"


def _free(proc: Path) -> Iterator[int]:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _room_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """The bytes that each control group around this process leaves."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups if not controllers else cgroups / "memory"
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            yield from _room(folder, *(_VERSION_1 if controllers else _VERSION_2))
            if folder == root:
                break


def _room(folder: Path, limit: str, usage: str, cache: tuple[str, ...]) -> Iterator[int]:
    limits, used = _lines(folder / limit), _lines(folder / usage)
    if not limits or not used or not limits[0].isdigit():  # "max" says that there is none
        return
    statistics = dict(line.split() for line in _lines(folder / "memory.stat"))
    yield int(limits[0]) - int(used[0]) + sum(int(statistics.get(name, 0)) for name in cache)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
