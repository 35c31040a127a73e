"""Memory that is left, as Linux describes it: files of both versions of control groups, as they really look."""

from __future__ import annotations

from pathlib import Path

import pytest

from coreai_zoo.machine import available_memory

MIB = 2**20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    write(folder / "meminfo", "MemTotal: 24684092 kB\nMemFree: 100 kB\nMemAvailable: 8388608 kB")
    return folder


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content + "\n", encoding="ascii")


def group(folder: Path, version: int, limit: str, used: int, cache: int) -> None:
    names = (
        ("memory.max", "memory.current", "")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    write(folder / names[0], limit)
    write(folder / names[1], str(used))
    write(folder / "memory.stat", f"cache {cache}\n{names[2]}inactive_file {cache}\n{names[2]}active_file 0")


def test_without_control_groups_it_is_what_the_machine_has(proc: Path, tmp_path: Path) -> None:
    assert available_memory(proc, tmp_path / "none") == 8 * 2**30


@pytest.mark.parametrize(("version", "line"), [(2, "0::/app/build"), (1, "4:memory:/app/build")])
def test_a_limit_counts_wherever_it_stands_and_page_cache_gives_way(
    version: int, line: str, proc: Path, tmp_path: Path
) -> None:
    write(proc / "self" / "cgroup", f"6:freezer:/elsewhere\n{line}")
    root = tmp_path / "cgroup" / ("memory" if version == 1 else "")
    no_limit = "max" if version == 2 else str(2**63 - 4096)
    group(root / "app" / "build", version, str(512 * MIB), 300 * MIB, 100 * MIB)
    assert available_memory(proc, tmp_path / "cgroup") == 312 * MIB
    group(root / "app", version, str(400 * MIB), 350 * MIB, 50 * MIB)  # of the group around it
    assert available_memory(proc, tmp_path / "cgroup") == 100 * MIB
    group(root / "app", version, no_limit, 350 * MIB, 0)
    assert available_memory(proc, tmp_path / "cgroup") == 312 * MIB
    group(root / "app" / "build", version, no_limit, 350 * MIB, 0)
    assert available_memory(proc, tmp_path / "cgroup") == 8 * 2**30


def test_where_linux_does_not_tell_nothing_is_known(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "no-proc", tmp_path / "none") is None
