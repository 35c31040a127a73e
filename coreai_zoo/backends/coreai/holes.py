"""An asset is lowered with holes in place of its large constants, which are filled when the file is written.

The compiler's writer copies every constant that it is given, and ends the process when a disk is full. So a large one
is given as 16 bytes that say which one it is, and in the file its own stand in their place. What a constant holds
changes nothing else in a program, unless the compiler computes with it: those with which it can are given as they are
(see `lowering.folding`), and so are small ones, of which it stores equal ones once.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from attrs import evolve, frozen

from coreai_zoo.backend import Constant
from coreai_zoo.backends.coreai.bytecode import Blob, Bytecode
from coreai_zoo.errors import PluginError, listing

LARGE_BYTES = 2**16
"""A constant of more bytes is given as a hole. What the compiler was seen to move is much smaller."""

_TAG = b"zoo hole"
_HOLE_BYTES = len(_TAG) + 8


@frozen
class Holes:
    """The constants of an asset, the large ones as holes.

    Attributes:
        large: name and constant of each hole, by the bytes that it is given as.
        holes: what is given for each large constant, by its identity.
    """

    large: Mapping[bytes, tuple[str, Constant]]
    holes: Mapping[int, Constant]

    @classmethod
    def of(cls, constants: Mapping[str, Constant], computed_with: Collection[str], folder: Path) -> Self:
        """Make holes of the large ones of `constants`.

        Args:
            constants: by name; what is the same constant under two names is one object, and one hole.
            computed_with: names of those with which the compiler can compute.
            folder: where a file can be made that takes no room.
        """
        known = {id(each) for name, each in constants.items() if name in computed_with}
        large = {
            id(each): (name, each)
            for name, each in constants.items()
            if each.data.nbytes > LARGE_BYTES and id(each) not in known
        }
        tags = [_TAG + number.to_bytes(8, "little") for number in range(len(large))]
        memory = _memory(tags, max((each.data.nbytes for _, each in large.values()), default=0), folder)
        holes = {
            key: evolve(each, data=memory[number * _HOLE_BYTES : (number + 1) * _HOLE_BYTES])
            for number, (key, (_, each)) in enumerate(large.items())
        }
        return cls(dict(zip(tags, large.values(), strict=True)), holes)

    def given(self, constant: Constant) -> Constant:
        """What is given to the compiler for a constant: its hole, or itself."""
        return self.holes.get(id(constant), constant)

    def filled(self, bytecode: Bytecode) -> Iterator[memoryview]:
        """The bytes of the program with every hole filled, piece by piece.

        Args:
            bytecode: what the compiler made of what it was given.

        Raises:
            PluginError: when it computed with the content of a hole.
        """
        tags = {blob: bytes(bytecode.view(blob)[:_HOLE_BYTES]) for blob in bytecode.blobs}
        lost = self.large.keys() - set(tags.values())
        if lost:
            names = listing(sorted(self.large[tag][0] for tag in lost))
            raise PluginError(f"The compiler computed with weights that it cannot have the values of: {names}.")
        contents = {blob: self._content(bytecode, blob, tag) for blob, tag in tags.items()}
        for piece in bytecode.resized({blob: content.nbytes for blob, content in contents.items()}):
            yield contents[piece] if isinstance(piece, Blob) else memoryview(piece)

    def _content(self, bytecode: Bytecode, blob: Blob, tag: bytes) -> memoryview:
        if tag in self.large:
            return memoryview(self.large[tag][1].data.reshape(-1)).cast("B")
        return bytecode.view(blob)


def _memory(tags: Sequence[bytes], most: int, folder: Path) -> np.ndarray[Any, Any]:
    """Memory that begins with `tags` and goes on for `most` bytes: what computes with a hole reads past its end."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"".join(tags))
        file.truncate(max(1, len(tags) * _HOLE_BYTES + most))  # a hole of the file system
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
