"""Hashes of files that are remembered, and when they must not be."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
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


def filled(path: Path, content: bytes, order: Sequence[int]) -> digest.FollowingDigest:
    """A digest of a file whose second half is filled in five pieces, in an order."""
    half = len(content) // 2
    size = -(-(len(content) - half) // 5)
    path.write_bytes(content[:half] + bytes(len(content) - half))
    gaps = [(start, min(start + size, len(content))) for start in range(half, len(content), size)]
    following = digest.FollowingDigest(path, reversed(gaps))
    with path.open("r+b", buffering=0) as file:
        for start, end in (gaps[number] for number in order):
            file.seek(start)
            file.write(content[start:end])
            following.filled(start, end)
    return following


@pytest.mark.parametrize("order", [range(5), range(4, -1, -1), (3, 0, 4, 1, 2)])
def test_a_file_is_hashed_while_it_is_filled_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Sequence[int]
) -> None:
    path, content = tmp_path / "big", bytes(range(256)) * 80_000  # more than four blocks
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("the file was read again"))
    with filled(path, content, order) as following:
        expected = hashlib.sha256(content).hexdigest()
        assert following.hexdigest() == expected
    assert path.read_bytes() == content
    assert digest.file_sha256(path) == expected


def test_a_file_without_gaps_is_hashed_too(tmp_path: Path) -> None:
    for content in (b"", b"x"):
        (tmp_path / "small").write_bytes(content)
        with digest.FollowingDigest(tmp_path / "small", []) as following:
            assert following.hexdigest() == hashlib.sha256(content).hexdigest()


def test_what_is_changed_after_it_was_filled_is_hashed_again(tmp_path: Path) -> None:
    path, content = tmp_path / "big", b"y" * MIB
    with filled(path, content, range(5)) as following:
        following.hexdigest()
    with path.open("r+b") as file:
        file.write(b"x")
    assert digest.file_sha256(path) == hashlib.sha256(b"x" + b"y" * (MIB - 1)).hexdigest()


def test_a_gap_that_is_not_filled_is_no_hash_and_holds_nobody_up(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="1 gaps"),
        filled(tmp_path / "big", b"y" * MIB, (0, 1, 3, 4)) as following,
    ):
        following.hexdigest()
    with pytest.raises(KeyError), filled(tmp_path / "big", b"y" * MIB, (1,)):
        raise KeyError  # the block is left although the thread still waits


def test_a_file_that_becomes_shorter_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(bytes(MIB))
    with digest.FollowingDigest(path, [(0, MIB)]) as following:
        time.sleep(0.05)  # it has seen how long the file is
        os.truncate(path, 5)
        following.filled(0, MIB)
        with pytest.raises(OSError, match="shorter"):
            following.hexdigest()
