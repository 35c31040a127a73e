"""Folders that are there for a while, and what is said of a disk that is full."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from coreai_zoo.disk import existing_parent, no_space, temporary_folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_temporary_folder_is_there_for_as_long_as_its_block(temporary: Path) -> None:
    with temporary_folder("zoo-test-") as folder:
        (folder / "file").write_text("content")
        assert [path.name for path in temporary.glob("zoo-test-*")] == [folder.name]
    assert list(temporary.iterdir()) == []
    with pytest.raises(ValueError, match="of the block"), temporary_folder():
        raise ValueError("of the block")
    assert list(temporary.iterdir()) == []


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("module", "name"), [(tempfile, "mkdtemp"), (shutil, "rmtree")])
@pytest.mark.parametrize("first", [True, False])
def test_an_interruption_leaves_no_temporary_folder(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, first: bool
) -> None:
    """It comes just before the folder is made or removed, or just after."""
    genuine = getattr(module, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(module, name, genuine)
        if first:
            signal.raise_signal(signal.SIGINT)
        made = genuine(*arguments, **options)
        if not first:
            signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(KeyboardInterrupt), temporary_folder() as folder:
        (folder / "file").write_text("content")
    gc.collect()
    assert list(temporary.iterdir()) == []


_COPIES_AN_ENTRY = """
import signal, tempfile, types
from coreai_zoo.build import rebuild

def interrupted(*arguments, **options):
    made = genuine(*arguments, **options)
    signal.raise_signal(signal.SIGINT)
    return made

genuine, tempfile.mkdtemp = tempfile.mkdtemp, interrupted
rebuild._model(types.SimpleNamespace(build={"entry": {"name": "toy", "file": "name = 1"}}), None)
"""


def test_an_interruption_leaves_no_copy_of_an_entry(tmp_path: Path) -> None:
    """The copy stays until the process ends, and goes with it."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", _COPIES_AN_ENTRY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "KeyboardInterrupt" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_by_the_file_that_was_written(tmp_path: Path, temporary: Path) -> None:
    full = os.strerror(errno.ENOSPC)
    copied = OSError(errno.ENOSPC, full, "read", None, str(temporary / "written"))
    error = no_space(copied, tmp_path)
    assert error.message.startswith(f"There is no space left for {temporary / 'written'} ({full}; ")
    assert "TMPDIR" in error.hint and error.exit_code == 3
    unnamed = no_space(OSError(errno.ENOSPC, full), tmp_path / "out" / "partial")
    assert f"for {tmp_path / 'out' / 'partial'} (" in unnamed.message and "TMPDIR" not in unnamed.hint
    assert existing_parent(tmp_path / "out" / "partial") == tmp_path
