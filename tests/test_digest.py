"""Hashes of files that are remembered, and when they must not be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
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
    path, block = tmp_path / "big", bytes(range(256)) * 40_000  # more than two blocks are written of
    pieces = [b"", block, b"x", block[1:]]
    expected = hashlib.sha256(b"".join(pieces)).hexdigest()
    assert digest.write_hashed(path, map(memoryview, pieces)) == expected
    assert path.read_bytes() == b"".join(pieces)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("the file was read again"))
    assert digest.file_sha256(path) == expected


def test_what_is_changed_after_it_was_written_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "big"
    digest.write_hashed(path, [memoryview(b"y" * MIB)])
    with path.open("r+b") as file:
        file.write(b"x")
    assert digest.file_sha256(path) == hashlib.sha256(b"x" + b"y" * (MIB - 1)).hexdigest()


def test_pieces_that_cannot_be_had_leave_no_hash(tmp_path: Path) -> None:
    def failing() -> Iterator[memoryview]:
        yield memoryview(b"y" * MIB)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        digest.write_hashed(tmp_path / "big", failing())
    assert digest.file_sha256(tmp_path / "big") == hashlib.sha256(b"y" * MIB).hexdigest()
