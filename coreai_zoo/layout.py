"""Where everything stands in an asset, before there are weights: what is known of its files, and room for the rest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path

from attrs import frozen


@frozen(slots=False)  # for what is cached
class Layout:
    """The files of an asset, with room in one of them for every weight.

    Attributes:
        path: of the file in which the weights are, below the asset.
        pieces: its content in order: bytes, and between them the name of a weight where that is to stand.
        sizes: bytes of each weight.
        others: the other files, by path below the asset.
        checksum: path of one more, which holds the SHA-256 of the first; None for a format that has none.
    """

    path: str
    pieces: tuple[bytes | str, ...]
    sizes: Mapping[str, int]
    others: Mapping[str, bytes]
    checksum: str | None = None

    @cached_property
    def room(self) -> Mapping[str, int]:
        """Where each weight begins in the file."""
        return {piece: start for start, piece in self._places() if isinstance(piece, str)}

    @cached_property
    def size(self) -> int:
        """Length of the file in bytes."""
        return sum(map(self._length, self.pieces))

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of all that is known: where it is the same, every weight stands in the same place."""
        digest = hashlib.sha256(repr((self.path, sorted(self.sizes.items()), self.checksum)).encode())
        others: Iterable[bytes | str] = chain.from_iterable(sorted(self.others.items()))
        for part in chain(self.pieces, others):
            content = part.encode() if isinstance(part, str) else part
            digest.update(f"{type(part).__name__} {len(content)} ".encode())
            digest.update(content)
        return digest.hexdigest()

    def is_in(self, asset: Path) -> bool:
        """Whether there is a file of that length in a folder, and no link to one."""
        file = asset / self.path
        return file.is_file() and file.stat().st_size == self.size and file.resolve() == file.absolute()

    def write(self, asset: Path, *, reserve: bool) -> None:
        """Write all that is known. What there is of the weights already stays as it is.

        Args:
            asset: folder of the asset, which may be there already.
            reserve: whether to take the space for the weights, where the system can; else it is taken as it is filled.

        Raises:
            OSError: when it cannot be written: the disk may be full.
        """
        file = asset / self.path
        for path, content in self.others.items():
            (asset / path).parent.mkdir(parents=True, exist_ok=True)
            (asset / path).write_bytes(content)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("r+b" if file.exists() else "w+b") as output:
            if reserve and self.size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(output.fileno(), 0, self.size)
            output.truncate(self.size)
            for start, piece in self._places():
                if isinstance(piece, bytes):
                    output.seek(start)
                    output.write(piece)

    def _places(self) -> Iterator[tuple[int, bytes | str]]:
        """Each piece with its place in the file."""
        return zip(accumulate(map(self._length, self.pieces), initial=0), self.pieces, strict=False)

    def _length(self, piece: bytes | str) -> int:
        return self.sizes[piece] if isinstance(piece, str) else len(piece)
