"""Build both samples with both backends at two revisions of this repository, and compare every file.

Usage: python scripts/compare_builds.py REV [REV2] [--expect FILE[:KEY] ...] [--entry NAME ...] [--backend NAME ...]

    python scripts/compare_builds.py HEAD~1                   # with the working tree
    python scripts/compare_builds.py main my-branch --expect metadata.json:name

Prints a table of the files, which are compared by SHA-256, and the keys of build.json that are not the same. The exit
code is 1 when a file or a key differs that is not expected to. It has to run in the repository that zoo is installed
from.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from coreai_zoo.digest import file_sha256
from coreai_zoo.errors import ZooError
from coreai_zoo.plugins import default_plugins
from coreai_zoo.review.revision import build_sample, worktree

ENTRIES = ("qwen3.6-27b", "qwen3.6-35b-a3b")
BACKENDS = ("coreai", "coreml")
RECORD = "build.json"
_MISSING = object()

EXPECTED: Mapping[str, str] = {
    f"{RECORD}:overlay.code_sha256": "the digest of the overlay's code",
    f"{RECORD}:overlay.rewrites.*.code_sha256": "the digest of a rewrite's code",
}
"""What a change of code alone may change, and why; anything else has to be named with --expect."""


@frozen
class Row:
    """One file of a bundle, on both sides.

    Attributes:
        file: its path in the bundle.
        bytes: its size before and after, None where there is no such file.
        differs: what is not the same: the file, or `build.json:KEY` for each key of the record.
        unexpected: those of them that nobody expects.
    """

    file: str
    bytes: tuple[int | None, int | None]
    differs: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The word for the table."""
        if not self.differs:
            return "same"
        return "DIFFERS" if self.unexpected else "differs as expected"


def compare(before: Path, after: Path, expected: Collection[str] = tuple(EXPECTED)) -> list[Row]:
    """Every file of two bundles' folders, in order of their paths.

    Args:
        before: the one bundle.
        after: the other.
        expected: patterns of what may differ: `FILE`, or `build.json:KEY` with the dots of a path of keys.
    """
    rows = []
    for file in sorted(_files(before) | _files(after)):
        one, other = before / file, after / file
        differs = tuple(_differences(one, other, file))
        unexpected = tuple(name for name in differs if not any(fnmatch.fnmatchcase(name, each) for each in expected))
        rows.append(Row(file, (_size(one), _size(other)), differs, unexpected))
    return rows


def _files(bundle: Path) -> set[str]:
    return {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if not path.is_dir()}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _differences(one: Path, other: Path, file: str) -> Iterator[str]:
    """The file, or for the record its keys, when they are not the same on both sides."""
    if one.exists() and other.exists() and file_sha256(one) == file_sha256(other):
        return
    keys: list[str] = []
    if file == RECORD and one.exists() and other.exists():
        keys = list(_keys(json.loads(one.read_bytes()), json.loads(other.read_bytes())))
    # Other bytes with the same content are another way of writing it.
    yield from (f"{file}:{key}" for key in keys) if keys else (file,)


def _keys(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Paths of the deepest keys whose values are not the same: names and, in lists, indices, with dots between."""
    pairs: Mapping[str, tuple[Any, Any]] = {}
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = {key: (one.get(key, _MISSING), other.get(key, _MISSING)) for key in [*one, *(other.keys() - one)]}
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = {str(index): pair for index, pair in enumerate(zip(one, other, strict=True))}
    elif one != other:
        yield path
    for key, (left, right) in pairs.items():
        yield from _keys(left, right, f"{path}.{key}" if path else key)


def table(compared: Mapping[str, Sequence[Row]]) -> str:
    """The rows of all bundles by name, and below what differs."""
    lines = [("bundle", "file", "bytes", "")]
    for bundle, rows in compared.items():
        lines += [(bundle, row.file, _bytes(row), row.verdict) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        f"{bundle:{widths[0]}}  {file:{widths[1]}}  {size:>{widths[2]}}  {verdict}".rstrip()
        for bundle, file, size, verdict in lines
    ]
    for bundle, rows in compared.items():
        for name in (name for row in rows for name in row.differs):
            known = not any(name in row.unexpected for row in rows)
            text.append(f"{bundle}: {name} differs{', as expected' if known else ''}")
    files = [row for rows in compared.values() for row in rows]
    text.append(
        f"{len(compared)} bundles, {len(files)} files: {sum(row.verdict == 'same' for row in files)} the same, "
        f"{sum(row.verdict == 'differs as expected' for row in files)} differ as expected, "
        f"{sum(bool(row.unexpected) for row in files)} differ otherwise"
    )
    return "\n".join(text)


def _bytes(row: Row) -> str:
    before, after = ("none" if size is None else f"{size:,}" for size in row.bytes)
    return before if before == after else f"{before} -> {after}"


def _build_all(revision: str | None, entries: Sequence[str], backends: Sequence[str], output: Path) -> list[Path]:
    """The bundles of all entries and backends, with the code of a revision or, with None, of the working tree."""
    label = revision or "the working tree"
    bundles = []
    with worktree(revision) as tree:
        for entry in entries:
            for backend in backends:
                print(f"building {entry} with {backend} at {label}", file=sys.stderr, flush=True)
                bundles.append(build_sample(entry, None, tree, output, label, default_plugins(), backend=backend))
    return bundles


def main() -> int:
    """Build, compare, print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV")
    parser.add_argument("other", metavar="REV2", nargs="?", help="default: the working tree")
    parser.add_argument(
        "--expect", metavar="FILE[:KEY]", action="append", default=[], help="what may differ (* matches)"
    )
    parser.add_argument("--entry", metavar="NAME", action="append", help=f"default: {', '.join(ENTRIES)}")
    parser.add_argument("--backend", metavar="NAME", action="append", help=f"default: {', '.join(BACKENDS)}")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zoo-compare-") as folder:
        try:
            before, after = (
                _build_all(revision, given.entry or ENTRIES, given.backend or BACKENDS, Path(folder) / side)
                for side, revision in (("before", given.revision), ("after", given.other))
            )
        except ZooError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        expected = [*EXPECTED, *given.expect]
        compared = {one.name: compare(one, other, expected) for one, other in zip(before, after, strict=True)}
    print(table(compared))
    return int(any(row.unexpected for rows in compared.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
