"""The results of `zoo sensitivity` in a folder: one JSON file that a run can go on from, whenever it was ended.

After each part the file is written anew and put in the place of the old one, so it is whole at any time. It says what
determines its results; what was measured under other circumstances does not get into the same file. docs/sensitivity.md
describes the fields.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from attrs import define, field

from coreai_zoo.build.lock import exclusive
from coreai_zoo.disk import temporary_folder
from coreai_zoo.errors import BadInput, CheckFailed, listing
from coreai_zoo.format_text import format_text
from coreai_zoo.gates.sensitivity import Part, Sensitivity
from coreai_zoo.gates.sensitivity_work import different, read_reference, write_reference
from coreai_zoo.gates.transcript import replace
from coreai_zoo.json_files import read_object

SCHEMA = 1
"""Raised when a field changes its meaning or goes; a new field does not raise it."""

RESULTS, PICTURE, REFERENCE = "sensitivity.json", "sensitivity.svg", "reference.npy"


@define
class Results:
    """What was measured so far, in memory and, where there is a folder, on the disk.

    Attributes:
        directory: the folder; None to keep nothing.
        head: the fields of the file beside its parts; `determined_by` is what determines the results.
        rows: the parts, each as in the file, by what they are.
        reference_sha256: of the logits that they were compared with; None while there are none.
    """

    directory: Path | None
    head: Mapping[str, Any]
    rows: dict[tuple[Any, ...], dict[str, Any]] = field(factory=dict)
    reference_sha256: str | None = None

    @classmethod
    @contextlib.contextmanager
    def opened(cls, directory: Path | None, head: Mapping[str, Any], *, fresh: bool) -> Iterator[Results]:
        """Within the block, the results of a folder, which is made if it is not there; nobody else uses it.

        Args:
            directory: the folder; None to keep nothing.
            head: see above.
            fresh: whether to forget the results that are there.

        Raises:
            BadInput: when the folder cannot be used, or holds results that something else determined.
        """
        if directory is None:
            yield cls(None, head)
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"The folder {directory} cannot be made: {error.strerror}.", "Choose another -o.") from error
        with exclusive(directory, "measuring sensitivity"):
            results = cls(directory, head)
            if (directory / RESULTS).exists() and not fresh:
                results._read(directory / RESULTS)
            yield results

    def _read(self, path: Path) -> None:
        record = read_object(path)
        try:
            differing = [] if record["schema"] == SCHEMA else ["schema"]
            differing += different(record["determined_by"], self.head["determined_by"])
            rows = {_key(row): row for row in record["parts"]}
            for row in rows.values():
                _measured(row)
            sha256 = record["reference_sha256"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{path} holds no results of `zoo sensitivity`: {error!r}.", "Choose another -o.") from error
        if differing:
            raise BadInput(
                f"{path} was measured with another {listing(differing)}.",
                "Choose another -o, or forget what is there with --fresh.",
            )
        self.rows, self.reference_sha256 = rows, sha256

    def find(self, part: Part) -> Sensitivity | None:
        """The result of a part; None where it was not measured yet."""
        row = self.rows.get(_key(_what(part)))
        if row is None:
            return None
        return Sensitivity(part, *_measured(row))

    def add(self, found: Sensitivity) -> None:
        """Note a result, on the disk as well."""
        row = as_row(found)
        self.rows[_key(row)] = row
        self._write()

    def known_reference(self) -> np.ndarray[Any, Any] | None:
        """The logits that the results were compared with, where they are still there."""
        if self.directory is None or self.reference_sha256 is None:
            return None
        try:
            return read_reference(self.directory / REFERENCE, self.reference_sha256)
        except CheckFailed:
            return None

    def keep_reference(self, logits: np.ndarray[Any, Any]) -> None:
        """Note the logits that results are compared with from now on.

        Raises:
            BadInput: when those that are there were compared with others.
        """
        content, sha256 = write_reference(logits)
        if self.reference_sha256 not in (None, sha256):
            raise BadInput(
                f"The reference has other logits here than those that the results in {self.directory} were compared "
                "with: this machine computes otherwise.",
                "Go on where it was begun, or forget what is there with --fresh.",
            )
        self.reference_sha256 = sha256
        if self.directory is not None:
            self._put(REFERENCE, content)
            self._write()

    @contextlib.contextmanager
    def reference_file(self, logits: np.ndarray[Any, Any]) -> Iterator[Path]:
        """Within the block, a file with the logits for other processes."""
        if self.directory is not None:
            yield self.directory / REFERENCE
            return
        with temporary_folder("zoo-sensitivity-") as folder:
            (folder / REFERENCE).write_bytes(write_reference(logits)[0])
            yield folder / REFERENCE

    def draw(self, svg: str) -> None:
        """Write the picture beside the results."""
        if self.directory is not None:
            self._put(PICTURE, svg.encode())

    def _write(self) -> None:
        if self.directory is None:
            return
        record = {
            "schema": SCHEMA,
            **self.head,
            "reference_sha256": self.reference_sha256,
            "parts": _in_order(self.rows.values()),
        }
        content = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        self._put(RESULTS, content.encode())

    def _put(self, name: str, content: bytes) -> None:
        assert self.directory is not None
        try:
            replace(self.directory / name, content, self.directory)
        except OSError as error:
            raise BadInput(
                f"{self.directory / name} cannot be written: {error.strerror}.", "Choose another -o DIR."
            ) from error


def as_row(found: Sensitivity) -> dict[str, Any]:
    """A result as it is in the file; JSON has no infinity, so what is not finite is null there."""
    row = {
        **_what(found.part),
        "quantization": None if found.part.spec is None else attrs.asdict(found.part.spec),
        "tensors": len(found.part.tensors),
        "from_bytes": found.part.from_bytes,
        "as_bytes": found.part.as_bytes,
        "saved_bytes": found.part.saved_bytes,
        "mean_kl_divergence": found.kl,
        "largest_kl_divergence": found.largest_kl,
        "margin_lost": found.margin_lost,
        "confident_flips": found.flips,
        "kl_per_mib_saved": found.kl_per_mib,
        "margin_lost_per_mib_saved": found.margin_lost_per_mib,
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def _measured(row: Mapping[str, Any]) -> tuple[float, float, float, int]:
    """The measures of a row; raises KeyError, TypeError or ValueError where they are none."""
    names = ("mean_kl_divergence", "largest_kl_divergence", "margin_lost")
    kl, largest, lost = (math.inf if row[name] is None else float(row[name]) for name in names)
    return kl, largest, lost, int(row["confident_flips"])


def _what(part: Part) -> dict[str, Any]:
    members = hashlib.sha256("\n".join(part.tensors).encode()).hexdigest()[:12]
    return {
        "role": part.role,
        "layer": part.layer,
        "tensor": part.tensor,
        "as": format_text(part.spec),
        "members": members,  # by a recipe a part may be some weights of a role
    }


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["role"], row["layer"], row["tensor"], row["as"], row["members"]


def _in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whole roles first, then layers, then tensors; the order in which they were measured does not show."""

    def place(row: Mapping[str, Any]) -> tuple[bool, bool, int, str, str, str, str]:
        layer = -1 if row["layer"] is None else row["layer"]
        name = row["tensor"] or ""
        return row["tensor"] is not None, layer >= 0, layer, row["role"], name, row["as"], row["members"]

    return sorted(rows, key=place)
