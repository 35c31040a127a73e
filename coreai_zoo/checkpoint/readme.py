"""The page of a checkpoint, its README.md: the front matter in which its makers say what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read_front_matter(directory: Path) -> Mapping[str, Any]:
    """The front matter of a checkpoint's README.md; nothing where there is none, or none that can be read.

    A page is for people: that it is not as it should be says nothing against the weights.
    """
    page = directory / "README.md"
    if not page.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        return metadata_load(page) or {}
    except Exception:  # noqa: BLE001  # what its YAML library raises for a page that it cannot parse
        return {}


def texts(value: object) -> Iterator[str]:
    """The texts in a field of a front matter, where a list of one is written as the one."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (item for item in value if isinstance(item, str))
