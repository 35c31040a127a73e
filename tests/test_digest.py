"""Hashes of files that are remembered, and when they must not be."""

from __future__ import annotations

import hashlib
import os
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
