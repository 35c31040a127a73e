"""MLIR bytecode, read as far as it takes to find the constants of a program.

The compiler's own reader copies every constant into memory, 28 GB for a 27B. Here the file is mapped, and its tables
say where each constant stands. Format: https://mlir.llvm.org/docs/BytecodeFormat/, version 6.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from attrs import frozen

_MAGIC = b"ML\xefR"
_VERSION = 6
_STRINGS, _BLOBS, _BLOB_TABLE = 0, 5, 6  # the sections called String, Resource and Resource Offset
_ALIGNED = 0x80  # set in the id of a section whose content is aligned
_IS_BLOB = 0  # the kind of a resource that is neither a flag nor a string
_PADDING = b"\xcb"


@frozen
class Blob:
    """The place of a constant's bytes in the file.

    Attributes:
        name: name of the constant.
        name_index: index of that name among the strings of the program.
        group: number of the dialect that it belongs to.
        offset: where its bytes begin in the file.
        bytes: how many there are; the next constant follows them.
        alignment: alignment of `offset`, in bytes.
    """

    name: str
    name_index: int
    group: int
    offset: int
    bytes: int
    alignment: int


@frozen
class _Section:
    id: int
    alignment: int | None
    start: int
    end: int


@frozen
class Bytecode:
    """A program in a mapped file.

    Attributes:
        data: the file.
        prologue: length of what precedes the sections.
        sections: the sections, in the order of the file.
        blobs: the constants that are stored on their own, in the order of the file.
    """

    data: mmap.mmap
    prologue: int
    sections: tuple[_Section, ...]
    blobs: tuple[Blob, ...]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a file and read its tables.

        Raises:
            OSError: when it cannot be read.
            ValueError: when it is not bytecode of the version that is known here, or its tables do not add up.
        """
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            prologue = _prologue(data)
            sections = tuple(_sections(data, prologue))
            return cls(data, prologue, sections, tuple(_blobs(data, {section.id: section for section in sections})))
        except (IndexError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{path.name} is not bytecode of version {_VERSION}, or is damaged ({error!r})") from error

    def view(self, blob: Blob) -> memoryview:
        """The bytes of a constant, not copied."""
        return memoryview(self.data)[blob.offset : blob.offset + blob.bytes]

    def without_blobs(self) -> bytes:
        """The program with every stored constant empty: graph, types and names, some 100 KB for any model."""
        pieces = self.resized(dict.fromkeys(self.blobs, 0))
        return b"".join(piece for piece in pieces if not isinstance(piece, Blob))

    def resized(self, sizes: Mapping[Blob, int]) -> Iterator[bytes | Blob]:
        """The file as the compiler writes it where each constant has `sizes` bytes.

        Yields:
            Bytes of the file, and between them a constant where its bytes are.
        """
        place = self.prologue
        yield self.data[:place]
        heads, size = self._heads(sizes)
        alignment = max((blob.alignment for blob in self.blobs), default=1)
        for section in self.sections:
            if section.id == _BLOBS:
                head = _section_head(section.id, size, place, alignment)
                yield head
                for blob in self.blobs:
                    yield heads[blob]
                    yield blob
                place += len(head) + size
            else:
                table = section.id == _BLOB_TABLE
                content = self._table(heads, sizes) if table else self.data[section.start : section.end]
                head = _section_head(section.id, len(content), place, 1)
                yield head
                yield content
                place += len(head) + len(content)

    def _heads(self, sizes: Mapping[Blob, int]) -> tuple[dict[Blob, bytes], int]:
        """What stands before each constant in their section, and the length of that."""
        heads: dict[Blob, bytes] = {}
        place = 0
        for blob in self.blobs:
            head = _varint(blob.alignment) + _varint(sizes[blob])
            heads[blob] = head + _PADDING * (-(place + len(head)) % blob.alignment)
            place += len(heads[blob]) + sizes[blob]
        return heads, place

    def _table(self, heads: Mapping[Blob, bytes], sizes: Mapping[Blob, int]) -> bytes:
        """The section that says where each constant is."""
        table = bytearray(_varint(0))
        for group, blobs in itertools.groupby(self.blobs, key=lambda blob: blob.group):
            members = list(blobs)
            table += _varint(group) + _varint(len(members))
            for blob in members:
                table += _varint(blob.name_index) + _varint(len(heads[blob]) + sizes[blob]) + bytes([_IS_BLOB])
        return bytes(table)


def _section_head(number: int, length: int, place: int, alignment: int) -> bytes:
    """What stands before the content of a section that begins at `place`."""
    head = bytes([number]) + _varint(length)
    if (place + len(head)) % alignment == 0:  # then it does not say that it is aligned
        return head
    head = bytes([number | _ALIGNED]) + _varint(length) + _varint(alignment)
    return head + _PADDING * (-(place + len(head)) % alignment)


class _Cursor:
    """Reads numbers one after the other, from a place in a file."""

    def __init__(self, data: mmap.mmap, place: int) -> None:
        self.data, self.place = data, place

    def byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def varint(self) -> int:
        """A number of one to nine bytes: trailing zeros of the first byte count the bytes that follow it."""
        first = self.data[self.place]
        if first == 0:
            self.place += 9
            return int.from_bytes(self.data[self.place - 8 : self.place], "little")
        length = (first & -first).bit_length()
        self.place += length
        return int.from_bytes(self.data[self.place - length : self.place], "little") >> length

    def align(self, alignment: int) -> None:
        if not alignment or alignment & (alignment - 1):
            raise ValueError(f"the bytecode is damaged: an alignment of {alignment}")
        self.place += -self.place % alignment


def _varint(value: int) -> bytes:
    length = next((length for length in range(1, 9) if value < 1 << 7 * length), 9)
    if length == 9:
        return b"\0" + value.to_bytes(8, "little")
    return ((value << 1 | 1) << length - 1).to_bytes(length, "little")


def _prologue(data: mmap.mmap) -> int:
    """Length of magic number, version and the producer's name."""
    cursor = _Cursor(data, len(_MAGIC))
    if data[: len(_MAGIC)] != _MAGIC or (version := cursor.varint()) != _VERSION:
        raise ValueError("not MLIR bytecode" if data[: len(_MAGIC)] != _MAGIC else f"bytecode of version {version}")
    return data.find(b"\0", cursor.place) + 1


def _sections(data: mmap.mmap, place: int) -> Iterator[_Section]:
    cursor = _Cursor(data, place)
    while cursor.place < len(data):
        kind, length, alignment = cursor.byte(), cursor.varint(), None
        if kind & _ALIGNED:
            alignment = cursor.varint()
            cursor.align(alignment)
        if cursor.place + length > len(data):
            raise ValueError(f"the bytecode is truncated: it ends within section {kind & ~_ALIGNED}")
        yield _Section(kind & ~_ALIGNED, alignment, cursor.place, cursor.place + length)
        cursor.place += length


def _strings(data: mmap.mmap, section: _Section) -> list[bytes]:
    """The strings of a program: lengths, last string first, then the strings, each ended by a zero."""
    cursor = _Cursor(data, section.start)
    lengths = [cursor.varint() for _ in range(cursor.varint())][::-1]
    ends = itertools.accumulate(lengths, initial=cursor.place)
    return [data[end : end + length - 1] for end, length in zip(ends, lengths, strict=False)]


def _blobs(data: mmap.mmap, sections: dict[int, _Section]) -> Iterator[Blob]:
    strings, table = _strings(data, sections[_STRINGS]), sections[_BLOB_TABLE]
    cursor, place = _Cursor(data, table.start), sections[_BLOBS].start
    if cursor.varint():
        raise ValueError("resources from outside of the program's dialects are not known here")
    while cursor.place < table.end:
        group = cursor.varint()
        for _ in range(cursor.varint()):
            index, length, kind = cursor.varint(), cursor.varint(), cursor.byte()
            if kind != _IS_BLOB:
                raise ValueError(f"a resource of kind {kind} is not known here")
            entry = _Cursor(data, place)
            alignment, size = entry.varint(), entry.varint()
            entry.align(alignment)
            place += length
            if entry.place + size != place or place > sections[_BLOBS].end:
                raise ValueError("the bytecode is damaged: its tables do not add up")
            yield Blob(strings[index].decode(), index, group, entry.place, size, alignment)
