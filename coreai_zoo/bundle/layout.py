"""The files of a bundle, their sizes and hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from coreai_zoo.bundle.card import CARD, without_measurements
from coreai_zoo.digest import file_sha256

BUILD_SCHEMA = 2

EXPORTS = Path("exports")
"""The folder in which a build makes a bundle's own folder, and where a bundle is looked for by its name."""

GATE_FOLDER = "gate"
"""The folder that gates write after the build. It is outside of the digests, so that a gated bundle still verifies."""

TRANSCRIPT, REPORT = "transcript.json", "report.html"
"""What a gate found, for programs and for people: files in that folder."""


def file_digests(bundle: Path, within: str = "") -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of the bundle but `build.json` itself and what gates add, by relative path.

    Gates add a folder, and a block in the card, which is hashed without it.

    Args:
        bundle: folder of the bundle.
        within: a folder in it, of whose files alone it is; empty for all.
    """
    digests: dict[str, dict[str, Any]] = {}
    for name, path in _files(bundle, within).items():
        if not path.is_file():  # a link to nowhere
            digests[name] = {"bytes": 0, "sha256": None}
        elif name == CARD:
            digests[name] = card_digest(path.read_bytes())
        else:
            digests[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return digests


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def allocated_below(folder: Path) -> int:
    """Bytes of a disk that the files below a folder take, where their ends are not written yet; 0 where there is none.

    A file for which space is reserved takes all of it.
    """
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(min(each.st_size, getattr(each, "st_blocks", 2**50) * 512) for each in found)


def card_digest(card: bytes) -> dict[str, Any]:
    """Size and SHA-256 of a card as the build wrote it."""
    built = without_measurements(card)
    return {"bytes": len(built), "sha256": hashlib.sha256(built).hexdigest()}


def _files(bundle: Path, within: str = "") -> dict[str, Path]:
    files = {}
    for path in sorted((bundle / within).rglob("*")):
        name = path.relative_to(bundle)
        if (path.is_file() or path.is_symlink()) and name != Path("build.json") and name.parts[0] != GATE_FOLDER:
            files[name.as_posix()] = path
    return files
