"""The journal of a weight store: what is finished, and where it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO


def canonical(value: object) -> bytes:
    """The one form of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class Journal:
    """One JSON object per line, each with a checksum of its own; the last line of a name counts.

    A line that is torn or damaged is as good as absent: its tensor is computed again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self.entries: dict[str, dict[str, Any]] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        self._lines = len(lines)
        for line in lines:
            entry = self._parse(line)
            if entry is None:
                continue
            if entry.get("forgotten"):
                self.entries.pop(entry["name"], None)
            else:
                self.entries[entry["name"]] = entry

    @staticmethod
    def _parse(line: bytes) -> dict[str, Any] | None:
        try:
            entry = json.loads(line)
            intact = line.endswith(b"\n") and entry.pop("check") == _check(entry)
            intact = intact and ("format" in entry or "forgotten" in entry)  # of an older zoo neither is
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return entry if intact else None

    def append(self, *entries: dict[str, Any]) -> None:
        """Add lines and wait until they are on disk."""
        with self._lock:
            self._write(entries)
            self.entries |= {entry["name"]: entry for entry in entries}

    def forget(self, *names: str) -> None:
        """Withdraw entries, before their bytes are written anew: else a crash before the new entry would leave the old
        one vouching for new bytes.
        """
        with self._lock:
            known = [name for name in names if name in self.entries]
            if known:
                self._write([{"name": name, "forgotten": True} for name in known])
                for name in known:
                    del self.entries[name]

    def compact(self) -> None:
        """Rewrite the file without the lines that no longer count, when they are the greater part."""
        if self._lines > 100 + 2 * len(self.entries):
            self.replace(self.entries)

    def replace(self, entries: Mapping[str, dict[str, Any]]) -> None:
        """Have these entries and no others."""
        with self._lock:
            self.entries = dict(entries)
            shorter = self._path.with_name(f"{self._path.name}.partial")
            with shorter.open("wb") as file:
                file.writelines(map(self._line, self.entries.values()))
                sync(file)
            os.replace(shorter, self._path)
            sync_path(self._path.parent)
            self._lines = len(self.entries)

    @staticmethod
    def _line(entry: dict[str, Any]) -> bytes:
        return canonical({**entry, "check": _check(entry)}) + b"\n"

    def _write(self, entries: Sequence[dict[str, Any]]) -> None:
        lines = b"".join(map(self._line, entries))
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    lines = b"\n" + lines  # closes a torn line, which stays damaged and is ignored
            file.write(lines)
            sync(file)
        self._lines += len(entries)


def _check(entry: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(entry)).hexdigest()


def sync(file: BinaryIO) -> None:
    """Wait until what was written to a file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Wait until a file, or what was made or renamed in a directory, is on disk."""
    # A rename is on disk only when its directory is. Windows cannot open directories, and needs no such thing.
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
