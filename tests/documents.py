"""Reading the pages of docs/: sections, fenced blocks, tables."""

from __future__ import annotations

import re
from pathlib import Path

from attrs import frozen

DOCS = Path(__file__).parent.parent / "docs"


@frozen
class Block:
    """A fenced block: its language, the file that it is to be in, if any, and its text without the fences."""

    language: str
    file: str
    text: str
    line: int


def read(page: str) -> str:
    """The text of a page."""
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """Every fenced block, in order."""
    found = re.finditer(r"^```(\S*) ?(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], match[3], text.count("\n", 0, match.start()) + 1) for match in found]


def sections(text: str) -> dict[str, str]:
    """Text below each heading of the second level, by heading; headings in fenced blocks are none."""
    shown = re.sub(
        r"^```.*?^```$", lambda fence: fence[0].replace("\n#", "\n\0#"), text, flags=re.MULTILINE | re.DOTALL
    )
    parts = re.split(r"^## (.+)$", shown, flags=re.MULTILINE)[1:]
    return {heading: body.replace("\0", "") for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def first_column(text: str) -> list[str]:
    """Names in backquotes in the first column of every table in `text`, without call parentheses and link brackets."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return [name.partition("(")[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def public_modules() -> set[str]:
    """What docs/hooks.md offers to the authors of plugins."""
    rules = sections(read("hooks.md"))["Rules for all of them"]
    return {name for name in first_column(rules) if name.startswith("coreai")}
