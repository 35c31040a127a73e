"""The tables of MLIR bytecode: numbers, places, and files that are not what they should be."""

from __future__ import annotations

import mmap
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coreai_zoo.backends.coreai.bytecode import Blob, Bytecode, _Cursor, _varint

ALIGNMENT = 16


def section(kind: int, content: bytes) -> bytes:
    return bytes([kind]) + _varint(len(content)) + content


def aligned_section(kind: int, content: bytes, place: int) -> bytes:
    """As the compiler writes it at `place`: the alignment is stated only where it does not come about by itself."""
    plain = bytes([kind]) + _varint(len(content))
    if (place + len(plain)) % ALIGNMENT == 0:
        return plain + content
    stated = bytes([kind | 0x80]) + _varint(len(content)) + _varint(ALIGNMENT)
    return stated + b"\xcb" * (-(place + len(stated)) % ALIGNMENT) + content


def program(names: list[bytes], blobs: list[bytes], producer: bytes = b"MLIR") -> bytes:
    """Bytecode with nothing in it but strings and blobs, put together from the format's description."""
    strings = _varint(len(names)) + b"".join(_varint(len(name) + 1) for name in reversed(names))
    strings += b"".join(name + b"\0" for name in names)
    entries, table = b"", _varint(0) + _varint(3) + _varint(len(blobs))
    for index, blob in enumerate(blobs):
        head = _varint(ALIGNMENT) + _varint(len(blob))
        head += b"\xcb" * (-(len(entries) + len(head)) % ALIGNMENT)
        entries += head + blob
        table += _varint(index) + _varint(len(head + blob)) + b"\0"
    result = b"ML\xefR" + _varint(6) + producer + b"\0" + section(6, table)
    return result + aligned_section(5, entries, len(result)) + section(0, strings)


@given(st.integers(0, 2**64 - 1))
def test_a_number_is_read_as_it_was_written(value: int) -> None:
    with mmap.mmap(-1, 16) as data:
        data[: len(_varint(value))] = _varint(value)
        cursor = _Cursor(data, 0)
        assert cursor.varint() == value
        assert cursor.place == len(_varint(value))


@pytest.mark.parametrize("length", range(1, 33))  # every place that the blobs can start at
def test_blobs_are_found_by_name_and_emptied(length: int, tmp_path: Path) -> None:
    path = tmp_path / "main.mlirb"
    held = {"first": b"abc", "second": b"\xff" * 300, "third": b"z" * ALIGNMENT}
    path.write_bytes(program([name.encode() for name in held], list(held.values()), producer=b"p" * length))
    bytecode = Bytecode.open(path)
    assert {blob.name: bytes(bytecode.view(blob)) for blob in bytecode.blobs} == held
    path.write_bytes(bytecode.without_blobs())
    emptied = Bytecode.open(path).blobs
    assert [(blob.name, blob.bytes, blob.offset % ALIGNMENT) for blob in emptied] == [(name, 0, 0) for name in held]


@pytest.mark.parametrize("length", range(1, 33))
@pytest.mark.parametrize("sizes", [(0, 0, 0), (3, 70_000, 0), (16, 17, 300), (2**21, 1, 5)])
def test_constants_of_other_sizes_stand_where_the_compiler_would_put_them(
    length: int, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    path, names = tmp_path / "main.mlirb", [b"first", b"second", b"third"]
    path.write_bytes(program(names, [b"abc", b"\xff" * 16, b"z" * 300], producer=b"p" * length))
    bytecode = Bytecode.open(path)
    contents = {
        blob: bytes([65 + at]) * size for at, (blob, size) in enumerate(zip(bytecode.blobs, sizes, strict=True))
    }
    pieces = bytecode.resized({blob: len(content) for blob, content in contents.items()})
    written = b"".join(contents[piece] if isinstance(piece, Blob) else piece for piece in pieces)
    assert written == program(names, list(contents.values()), producer=b"p" * length)


def test_no_constant_is_copied_to_leave_it_out(tmp_path: Path) -> None:
    path, size = tmp_path / "main.mlirb", 2**26
    path.write_bytes(program([b"w"], [b"x" * size]))
    bytecode = Bytecode.open(path)
    tracemalloc.start()
    try:
        bytecode.without_blobs()
        assert tracemalloc.get_traced_memory()[1] < size // 64
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"PK\x03\x04 something else", "not MLIR bytecode"),
        (b"ML\xefR" + _varint(7) + b"MLIR\0", "bytecode of version 7"),
        (program([b"a"], [b"abc"])[:-3], "ends within section 0"),
        (
            program([b"a"], [b"abc"]).replace(_varint(ALIGNMENT) + _varint(3), _varint(ALIGNMENT) + _varint(4)),
            "do not add up",
        ),
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
