"""The golden metadata.json of samples' bundles: every key with its value and the reason for it, in a file to read.

What a build writes there, `zoo verify` derives from the same record. So a mistake in what writes it agrees with itself,
and shows only beside values that a person has looked at.
"""

from __future__ import annotations

import datetime as dt
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.metadata import leaves
from coreai_zoo.errors import BadInput
from coreai_zoo.names import slug


def golden_metadata_path(folder: Path) -> Path:
    """The file among the golden graphs in `folder`; not each repository has one."""
    return folder / "bundles" / "metadata.toml"


def metadata_differences(bundle: Bundle, folder: Path) -> list[str]:
    """What of a sample's bundle is not as the golden file says, one phrase each.

    Raises:
        BadInput: when the file cannot be read, or gives a key without a reason.
    """
    golden = _read(golden_metadata_path(folder))
    found = leaves(bundle.metadata) | dict(_states(bundle))
    problems = [f"{key} is {found[key]!r}, and no reason is given for it" for key in found if key not in golden]
    for key, row in golden.items():
        wanted = _wanted(row, bundle)
        if key not in found:
            problems.append(f"{key} is missing")
        elif found[key] != wanted or type(found[key]) is not type(wanted):
            problems.append(f"{key} is {found[key]!r}, not {wanted!r}: {row['why']}")
    return problems


def _read(path: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}.") from error
    for key, row in rows.items():
        if not isinstance(row, dict) or not row.get("why") or len({"value", "values", "date_of"} & {*row}) != 1:
            raise BadInput(f"{path} gives no reason for {key}, or not one value.")
    return rows


def _wanted(row: Mapping[str, Any], bundle: Bundle) -> Any:
    """The value that a row gives for a bundle."""
    if "values" in row:
        return row["values"].get(bundle.build["facts"].get("ffn"))
    if "date_of" not in row:
        value = row["value"]
        return value.replace("{entry}", slug(str(bundle.entry))) if isinstance(value, str) else value
    seconds = dt.timedelta(seconds=int(bundle.build[row["date_of"]]))
    return (dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def _states(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """How the function that decodes declares each state."""
    for state in bundle.signature.states:
        yield f"state {state.name}", f"{state.dtype} [{', '.join(map(str, state.shape))}]"
