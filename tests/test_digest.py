"""Hashes of files that are remembered, and when they must not be."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from coreai_zoo import digest

MIB = 2**20


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were really read."""
    names: list[str] = []
    genuine = hashlib.file_digest

    def counted(file: object, name: str) -> object:
        names.append(Path(file.name).name)  # type: ignore[attr-defined]
        return genuine(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def test_a_large_file_is_read_once_and_again_after_any_change(tmp_path: Path, hashed: list[str]) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"a" * 2 * MIB)
    expected = hashlib.sha256(b"a" * 2 * MIB).hexdigest()
    assert [digest.file_sha256(path) for _ in range(3)] == [expected] * 3
    assert hashed == ["large"]
    before = path.stat()
    with path.open("r+b") as file:  # one byte, the same size, and the times put back
        file.seek(MIB)
        file.write(b"b")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest.file_sha256(path) == hashlib.sha256(b"a" * MIB + b"b" + b"a" * (MIB - 1)).hexdigest()
    assert hashed == ["large", "large"]


def test_a_change_right_after_hashing_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "large"
    for turn in range(20):
        content = bytes([turn]) * MIB
        path.write_bytes(content)
        assert digest.file_sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_file_that_took_the_place_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    path, other = tmp_path / "main", tmp_path / "other"
    path.write_bytes(b"a" * MIB)
    first = digest.file_sha256(path)
    other.write_bytes(b"b" * MIB)
    other.replace(path)
    assert digest.file_sha256(path) == hashlib.sha256(b"b" * MIB).hexdigest() != first


def test_a_file_is_hashed_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, block = tmp_path / "big", bytes(range(256)) * 5000
    with digest.hashed_while_written(path), path.open("wb") as file:
        for _ in range(3):
            file.write(block)
            file.flush()
            time.sleep(0.05)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("the file was read again"))
    assert digest.file_sha256(path) == hashlib.sha256(3 * block).hexdigest()


def test_what_replaces_the_file_that_was_being_hashed_is_hashed_itself(tmp_path: Path) -> None:
    path, other = tmp_path / "big", tmp_path / "other"
    with digest.hashed_while_written(path):
        path.write_bytes(b"y" * MIB)
        other.write_bytes(b"x" * MIB)
        other.replace(path)
    assert digest.file_sha256(path) == hashlib.sha256(b"x" * MIB).hexdigest()


def test_a_file_removed_before_the_follower_has_begun_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def remove(path: Path) -> None:
        path.unlink()
        time.sleep(1)  # the follower comes to it

    with pytest.raises(FileNotFoundError), digest.hashed_while_written(tmp_path / "big"):
        remove(tmp_path / "big")
    assert capfd.readouterr() == ("", "")


def test_nothing_follows_a_file_whose_writing_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no more"), digest.hashed_while_written(tmp_path / "big"):
        raise RuntimeError("no more")
    assert digest.file_sha256(tmp_path / "big") == hashlib.sha256(b"").hexdigest()
