"""JSON objects of a checkpoint, read so that nothing in them is taken for something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coreai_zoo.checkpoint.pointers import refuse_pointer
from coreai_zoo.errors import BadInput, listing

MAX_JSON_BYTES = 256_000_000


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object whose keys are unique.

    Raises:
        BadInput: when `data` is not UTF-8, not JSON, not an object, or names a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise BadInput(f"{what} names {listing(twice)} twice.")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise BadInput(f"{what} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{what} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BadInput(f"{what} must hold a JSON object, not a {type(value).__name__}.")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; see `parse_object`.

    Raises:
        BadInput: also when the file cannot be read, or is too large for one.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise BadInput(f"{path} is {size:,} bytes, more than the {MAX_JSON_BYTES:,} that are read of a JSON file.")
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    refuse_pointer(path, data[:64])
    return parse_object(data, str(path))
