"""Pages that are one file: templates that escape what they show, and the parts that all pages share.

`page_parts/` has these: the style, in light and in dark, and tables that a phone can read. A page fetches nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

_PARTS = "page_parts"


def environment(room: str) -> Environment:
    """Where the templates of a room are found, by their names, and those that all pages share.

    Args:
        room: the folder of the host that they lie in.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=ChoiceLoader([PackageLoader("coreai_zoo", room), PackageLoader("coreai_zoo", _PARTS)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
