"""Commands that only read need no folder that can be written to, but the one that their report goes to."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import forked
from coreai_zoo.bundle.bundle import Bundle

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, _CAPABILITY_VERSION_3 = 24, 1, 0x20080522


def respect_permissions() -> None:
    """In a child process: let permissions hold for root, too, from the next exec on."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0):
        os._exit(99)


def respect_permissions_now() -> None:
    """The same where no exec follows."""
    if os.geteuid() == 0:
        libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3), (ctypes.c_uint32 * 6)()
        failed = libc.capget(header, sets)
        for number in (0, 1):  # effective and permitted
            sets[number] &= ~(1 << _CAP_DAC_OVERRIDE)
        if failed or libc.capset(header, sets):
            os._exit(99)


def zoo(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(folder), "XDG_CACHE_HOME": str(folder), "HF_HOME": str(folder / "hf")}
    return subprocess.run(
        [sys.executable, "-B", "-m", "coreai_zoo", *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=respect_permissions,
    )


# All that a command imports is imported where nothing can be written by the gate below; these need not do it again.
FORKED = frozenset({"diff", "sensitivity", "verify"})


@pytest.fixture
def locked(built: Callable[[str, str], Bundle], tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written to, with a bundle that cannot either."""
    folder = tmp_path / "locked"
    bundle = Path(shutil.copytree(built("qwen3.6-27b", "int8hu").directory, folder / "exports" / "a_bundle"))
    folders = [folder, bundle.parent, bundle, *(path for path in bundle.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    if subprocess.run([sys.executable, "-S", "-c", ""], preexec_fn=respect_permissions, check=False).returncode == 99:
        pytest.skip("permissions cannot be made to hold for root here")
    yield folder
    for path in folders:
        path.chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "a_bundle"),
        ("run", "a_bundle", "-p", "def", "-n", "2"),
        ("diff", "a_bundle", "exports/a_bundle", "--positions", "2"),
        ("sensitivity", "a_bundle", "--role", "mlp", "--positions", "2"),
        ("sensitivity", "qwen3.6-27b", "--sample", "--custom", "--role", "mlp", "--positions", "2"),
        ("plan", "qwen3.6-27b"),
        ("show", "qwen3.6-27b"),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_a_command_that_only_reads_runs_where_nothing_can_be_written(locked: Path, arguments: tuple[str, ...]) -> None:
    if arguments[0] in FORKED:
        environment = {**os.environ, "HOME": str(locked), "XDG_CACHE_HOME": str(locked)}
        before = "test_read_only:respect_permissions_now"
        result = forked.run(*arguments, cwd=locked, env=environment, before=before)
    else:
        result = zoo(locked, *arguments)

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("before", [None, "test_read_only:respect_permissions_now"])
def test_a_fork_that_respects_permissions_cannot_write(locked: Path, before: str | None) -> None:
    write = "from pathlib import Path; Path('file').touch(); Path('file').unlink()"
    result = forked.run(write, cwd=locked, call="forked:execute", before=before)

    denied = before is not None or os.geteuid() != 0
    assert (result.returncode == 1 and "PermissionError" in result.stderr) == denied, result.stderr


@pytest.mark.slow
def test_a_gate_writes_elsewhere_and_nowhere_else(locked: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    options = ("--prompts", "code", "--positions", "8", "--no-control")

    refused = zoo(locked, "gate", "a_bundle", *options)
    assert refused.returncode == 2
    assert "cannot be written to" in refused.stderr and "Choose another with -o DIR" in refused.stderr

    judged = zoo(locked, "gate", "a_bundle", *options, "-o", elsewhere)
    assert judged.returncode == 0, judged.stderr
    assert sorted(path.name for path in elsewhere.iterdir()) == ["report.html", "transcript.json"]


def test_a_build_is_refused_where_it_cannot_write_before_anything_is_read(locked: Path) -> None:
    result = zoo(locked, "build", "qwen3.6-27b", "--sample")

    assert result.returncode == 2
    assert "The output folder exports cannot be used" in result.stderr
