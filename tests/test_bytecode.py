"""The tables of MLIR bytecode: numbers, places, and files that are not what they should be."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coreai_zoo.backends._bytecode import Bytecode, _Cursor, _varint


def section(kind: int, content: bytes, alignment: int | None = None) -> bytes:
    assert alignment is None  # aligned ones are seen in real assets, see test_coreai_backend
    return bytes([kind]) + _varint(len(content)) + content


def program(names: list[bytes], blobs: list[bytes]) -> bytes:
    """Bytecode with nothing in it but strings and blobs, put together from the format's description."""
    strings = _varint(len(names)) + b"".join(_varint(len(name) + 1) for name in reversed(names))
    strings += b"".join(name + b"\0" for name in names)
    entries = [_varint(1) + _varint(len(blob)) + blob for blob in blobs]
    table = _varint(0) + _varint(3) + _varint(len(blobs))
    table += b"".join(_varint(index) + _varint(len(entry)) + b"\0" for index, entry in enumerate(entries))
    return b"ML\xefR" + _varint(6) + b"MLIR\0" + section(6, table) + section(5, b"".join(entries)) + section(0, strings)


@given(st.integers(0, 2**64 - 1))
def test_a_number_is_read_as_it_was_written(value: int) -> None:
    with mmap.mmap(-1, 16) as data:
        data[: len(_varint(value))] = _varint(value)
        cursor = _Cursor(data, 0)
        assert cursor.varint() == value
        assert cursor.place == len(_varint(value))


def test_blobs_are_found_by_name_and_emptied(tmp_path: Path) -> None:
    path = tmp_path / "main.mlirb"
    path.write_bytes(program([b"first", b"second"], [b"abc", b"\xff" * 300]))
    bytecode = Bytecode.open(path)
    assert {blob.name: bytes(bytecode.view(blob)) for blob in bytecode.blobs} == {
        "first": b"abc",
        "second": b"\xff" * 300,
    }
    path.write_bytes(bytecode.without_blobs())
    assert path.read_bytes() == program([b"first", b"second"], [b"", b""])
    assert [(blob.name, blob.bytes) for blob in Bytecode.open(path).blobs] == [("first", 0), ("second", 0)]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"PK\x03\x04 something else", "not MLIR bytecode"),
        (b"ML\xefR" + _varint(7) + b"MLIR\0", "bytecode of version 7"),
        (program([b"a"], [b"abc"])[:-3], "ends within section 0"),
        (program([b"a"], [b"abc"]).replace(b"\x07abc", b"\x09abc"), "do not add up"),
        (b"ML\xefR" + _varint(6) + b"MLIR\0", "damaged"),
    ],
)
def test_what_is_not_bytecode_or_damaged_is_said(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "main.mlirb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told):
        Bytecode.open(path)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0), value=st.integers(0, 255))
def test_a_damaged_table_is_an_error_or_leads_to_bytes_within_the_file(
    place: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(program([b"first", b"second"], [b"abc", b"defgh"]))
    content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.mlirb"
    path.write_bytes(content)
    try:
        bytecode = Bytecode.open(path)
    except ValueError:
        return
    for blob in bytecode.blobs:
        assert 0 <= blob.offset <= blob.offset + blob.bytes <= len(content)
