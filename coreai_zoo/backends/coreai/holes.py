"""An asset is lowered with holes in place of its weights: where each is to stand is known before one is read.

The compiler copies every constant that it is given. So each weight is given as 16 bytes that say which one it is, and
the file is laid out with as many bytes as the weight has. What a constant holds changes nothing else in a program,
unless the compiler computes with it: those with which it can are given as they are, see `lowering.folding`.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from attrs import evolve, frozen

from coreai_zoo.backend import Constant
from coreai_zoo.backends.coreai.bytecode import Blob, Bytecode
from coreai_zoo.errors import PluginError, listing

_TAG = b"zoo hole"
_HOLE_BYTES = len(_TAG) + 8


@frozen
class Holes:
    """The weights of an asset, as holes.

    Attributes:
        names: the name of each, by the bytes that it is given as.
        sizes: its bytes, by name.
        holes: what is given for it, by the identity of the constant.
    """

    names: Mapping[bytes, str]
    sizes: Mapping[str, int]
    holes: Mapping[int, Constant]

    @classmethod
    def of(cls, constants: Mapping[str, Constant]) -> Self:
        """Make holes of constants; what is the same one under two names is one object, and one hole."""
        distinct = {id(each): (name, each) for name, each in reversed([*constants.items()])}
        tags = [_TAG + number.to_bytes(8, "little") for number in range(len(distinct))]
        memory = _memory(tags, max((each.bytes for _, each in distinct.values()), default=0))
        holes = {
            key: evolve(each, data=memory[number * _HOLE_BYTES : (number + 1) * _HOLE_BYTES])
            for number, (key, (_, each)) in enumerate(distinct.items())
        }
        names = [name for name, _ in distinct.values()]
        return cls(dict(zip(tags, names, strict=True)), {name: constants[name].bytes for name in names}, holes)

    def given(self, constant: Constant) -> Constant:
        """What is given to the compiler for a constant: its hole, or itself."""
        return self.holes.get(id(constant), constant)

    def laid_out(self, bytecode: Bytecode) -> tuple[bytes | str, ...]:
        """The content of the file with every hole as large as its weight: bytes, and names of weights between them.

        Args:
            bytecode: what the compiler made of what it was given.

        Raises:
            PluginError: when it computed with the content of a hole.
        """
        found = {blob: self.names.get(bytes(bytecode.view(blob)[:_HOLE_BYTES])) for blob in bytecode.blobs}
        lost = self.sizes.keys() - set(found.values())
        if lost:
            raise PluginError(
                f"The compiler computed with weights that it cannot have the values of: {listing(sorted(lost))}."
            )
        sizes = {blob: blob.bytes if name is None else self.sizes[name] for blob, name in found.items()}
        return tuple(
            (found[piece] or bytes(bytecode.view(piece))) if isinstance(piece, Blob) else piece
            for piece in bytecode.resized(sizes)
        )


def _memory(tags: Sequence[bytes], most: int) -> np.ndarray[Any, Any]:
    """Memory that begins with `tags` and goes on for `most` bytes: what computes with a hole reads past its end."""
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(tags))
        file.truncate(max(1, len(tags) * _HOLE_BYTES + most))  # a hole of the file system
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
