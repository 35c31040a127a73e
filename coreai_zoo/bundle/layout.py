"""The files of a bundle, their sizes and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coreai_zoo.bundle.card import CARD, without_measurements
from coreai_zoo.digest import file_sha256

BUILD_SCHEMA = 2

# Written after the build, by gates: outside the digest, so that a gated bundle still verifies.
GATE_FOLDER = "gate"


def file_sizes(bundle: Path) -> dict[str, int]:
    """Size of every file that `file_digests` looks at, by relative path, without reading one."""
    return {path.relative_to(bundle).as_posix(): path.stat().st_size for path in sorted(_files(bundle))}


def file_digests(bundle: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of the bundle but `build.json` itself and what gates add, by relative path.

    What gates add is their folder, and their block in the card, which is hashed without it.
    """
    digests: dict[str, dict[str, Any]] = {}
    for path in sorted(_files(bundle)):
        if not path.is_file():  # a link to nowhere
            digests[path.relative_to(bundle).as_posix()] = {"bytes": 0, "sha256": None}
            continue
        if path == bundle / CARD:
            built = without_measurements(path.read_bytes())
            digests[CARD] = {"bytes": len(built), "sha256": hashlib.sha256(built).hexdigest()}
            continue
        digests[path.relative_to(bundle).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return digests


def _files(bundle: Path) -> Iterator[Path]:
    for path in bundle.rglob("*"):
        parts = path.relative_to(bundle).parts
        if (path.is_file() or path.is_symlink()) and parts != ("build.json",) and parts[0] != GATE_FOLDER:
            yield path
