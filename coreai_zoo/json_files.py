"""Files of text and of JSON, read with an error in words; JSON is written in one form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coreai_zoo.errors import BadInput, near_paths


def read_text(path: Path, what: str, hint: str = "") -> str:
    """The text of a file.

    Args:
        path: the file.
        what: what it is, as an error begins, for example `The prompt`.
        hint: what to do, where no file is called almost like it.

    Raises:
        BadInput: when it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BadInput(f"{what} {path} cannot be read: {error.strerror}.", near_paths(path) or hint) from error
    except UnicodeError as error:
        raise BadInput(f"{what} {path} is not UTF-8 text: {error}.", hint) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        BadInput: when it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a JSON object.")
    return content
