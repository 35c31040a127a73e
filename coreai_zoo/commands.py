"""What a subcommand of `zoo` is built from, the host's or a plugin's: options, tables, JSON."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
from attrs import field, frozen

from coreai_zoo.errors import near_names
from coreai_zoo.plugins import Plugins, default_plugins


def plugins_of(ctx: click.Context) -> Plugins:
    """The installed plugins, or those that a test passed as `obj`."""
    given = ctx.find_object(Plugins)
    return given if given is not None else default_plugins()


class Number(click.FloatRange):
    """A finite number within bounds, both included; click's own ranges let nan through, and inf where they end open."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Headed(click.Command):
    """A command with many options, which its help shows below headings.

    Args:
        headings: by the name of a parameter the heading above it and those that follow it.
    """

    def __init__(self, *args: Any, headings: Mapping[str, str], **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        unknown = set(headings) - {parameter.name for parameter in self.params}
        if unknown:
            raise ValueError(f"{self.name} has no parameters {sorted(unknown)}")
        self._headings = headings

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Command.format_options`."""
        heading, below = "Options", dict[str, list[tuple[str, str]]]()
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option):
                heading = self._headings.get(str(parameter.name), heading)
                below.setdefault(heading, []).extend(filter(None, [parameter.get_help_record(ctx)]))
        for title, rows in below.items():
            with formatter.section(title):
                formatter.write_dl(rows)


class OneOf(click.Choice[str]):
    """One of some words; the error about another one names the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """See `click.Choice.get_invalid_choice_message`."""
        return f"{super().get_invalid_choice_message(value, ctx)} {near_names(str(value), self.choices)}".rstrip()


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(value: object) -> None:
    """Print `value` for a program; what JSON does not know is printed as text."""
    click.echo(json.dumps(value, indent=2, default=str))


def say_next(why: str, command: str) -> None:
    """End a command that people read by naming the next one, on stderr.

    Args:
        why: what it is for, as in `compare it with Hugging Face`.
        command: the command, see `errors.zoo_command`.
    """
    click.echo(f"Next, {why}: {command}", err=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

_WIDE_GAP, _GAP = 3, 2  # between columns, where there is no end of a line and where there is one
_INDENT = 2  # of a value that stands below its name
_LEAST_TEXT = 16  # what a column of text is narrowed to before another one is dropped
_SPACE = re.compile(r" +(?!(?:[KMGT]?i?B|bytes|tokens/s|%|s)(?:\W|$))|(?<!\d) +")
"""Where a text may be broken: not between a number and its unit."""


@frozen
class Column:
    """A column of a table, and what becomes of it where the terminal is narrow.

    Attributes:
        name: its heading.
        number: whether it holds numbers: right-aligned and never broken. Text is wrapped between words.
        drop: 0 for a column that is always there; of the others the one with the highest number goes first.
    """

    name: str
    number: bool = False
    drop: int = 0


@frozen
class Table:
    """Rows of text below columns; the first column is the name that a row is about, which is never cut.

    Attributes:
        columns: the columns, the name's first.
        title: a line above it; None for none.
        headed: whether the names of the columns are printed.
        rows: the cells of each row.
    """

    columns: tuple[Column, ...]
    title: str | None = None
    headed: bool = True
    rows: list[tuple[str, ...]] = field(factory=list)

    def add_row(self, *cells: object) -> None:
        """Add a row of one cell for each column."""
        texts = tuple(str(cell) for cell in cells)
        if len(texts) != len(self.columns):
            raise ValueError(f"{len(texts)} cells for {len(self.columns)} columns")
        self.rows.append(texts)


def new_table(*columns: str | Column, title: str | None = None) -> Table:
    """An empty table; a column that is given by its name alone is text, and always there."""
    return Table(tuple(Column(column) if isinstance(column, str) else column for column in columns), title)


def print_rows(rows: Sequence[tuple[str, object]], title: str | None = None) -> None:
    """Print pairs of a name and a value as a table without a header."""
    table = Table((Column(""), Column("")), title, headed=False)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def print_table(table: Table) -> None:
    """Print a table: within the width of the terminal, or as wide as it is where there is none.

    A pipe has no width: a line that a program will read is neither cut nor wrapped. Where COLUMNS is set, it is the
    terminal's width.
    """
    for line in table_lines(table, _terminal_width()):
        click.echo(line)


def print_text(text: str) -> None:
    """Print lines of text, on a terminal wrapped between words: it would break them, and numbers, where it ends."""
    for line in _wrapped(text, _terminal_width()):
        click.echo(line)


def _terminal_width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table_lines(table: Table, width: int | None) -> Iterator[str]:
    """The lines of a table that fit into `width` cells of a terminal; None for any width.

    Text is wrapped first. Then columns are dropped, and a last line says which. Columns that may not be dropped go
    below the others, with the names once more.
    """
    if table.title is not None:
        yield click.style(table.title, italic=True)
    shown = list(range(len(table.columns)))
    if width is not None:
        while not _fits(table, shown, width) and any(table.columns[at].drop for at in shown):
            shown.remove(max(shown, key=lambda at: (table.columns[at].drop, at)))
    blocks = _blocks(table, shown, width)
    for number, block in enumerate(blocks):
        if number:
            yield ""
        yield from _block_lines(table, block, width)
    dropped = [column.name for at, column in enumerate(table.columns) if at not in shown]
    if dropped:
        yield from _wrapped(f"Left out for want of width: {', '.join(dropped)}.", width)


# -- which columns stand side by side


def _fits(table: Table, columns: Sequence[int], width: int) -> bool:
    return sum(_least(table, at) + _GAP for at in columns) - _GAP <= width


def _blocks(table: Table, shown: Sequence[int], width: int | None) -> list[list[int]]:
    """The columns that stand side by side, each time with the name first."""
    blocks = [[shown[0]]]
    for at in shown[1:]:
        last = blocks[-1]
        if width is not None and len(last) > 1 and not _fits(table, [*last, at], width):
            blocks.append([shown[0], at])
        else:
            last.append(at)
    return blocks


def _least(table: Table, at: int) -> int:
    """The least width of a column: the name and a number are never broken, a text not within a word."""
    column = table.columns[at]
    heading = _longest_word(column.name) if table.headed else 0
    lines = [line for row in table.rows for line in row[at].splitlines()]
    whole = max(map(_width, lines), default=0)
    if at == 0 or column.number:
        return max(heading, whole)
    longest = max(map(_longest_word, lines), default=0)
    return max(heading, longest, min(whole, _LEAST_TEXT))


def _widths(table: Table, block: Sequence[int], width: int | None) -> list[int]:
    """The width of each column of a block: as wide as it wants, or what there is shared among those that want more."""
    wanted = []
    for at in block:
        lines = [line for row in table.rows for line in row[at].splitlines()]
        wanted.append(max(map(_width, [*lines, table.columns[at].name if table.headed else ""]), default=0))
    if width is None:
        return wanted
    widths = [min(_least(table, at), want) for at, want in zip(block, wanted, strict=True)]
    if len(block) == 2:  # what does not fit beside its name stands below it: `_row_lines`
        widths[1] = min(widths[1], width - widths[0] - _GAP)
    for _ in range(width - sum(widths) - _GAP * (len(block) - 1)):
        short = [place for place, want in enumerate(wanted) if widths[place] < want]
        if not short:
            break
        widths[max(short, key=lambda place: wanted[place] / max(widths[place], 1))] += 1
    return widths


# -- lines


def _block_lines(table: Table, block: Sequence[int], width: int | None) -> Iterator[str]:
    widths = _widths(table, block, width)
    total = sum(widths) + (_WIDE_GAP if width is None else _GAP) * (len(widths) - 1)
    if table.headed:
        heading = [table.columns[at].name for at in block]
        yield from (click.style(line, bold=True) for line in _row_lines(table, block, heading, widths, width))
        yield _rule(total if width is None else min(total, width))
    for row in table.rows:
        yield from _row_lines(table, block, [row[at] for at in block], widths, width)


def _row_lines(
    table: Table, block: Sequence[int], cells: Sequence[str], widths: Sequence[int], width: int | None
) -> Iterator[str]:
    """The lines of one row: its cells side by side, or, where even one does not fit beside the name, below it."""
    if width is not None and len(block) == 2 and widths[0] + _GAP + _longest_word(cells[1]) > width:
        yield cells[0]
        for line in _wrapped(cells[1], width - _INDENT):
            yield " " * min(_INDENT, max(0, width - _width(line))) + line
        return
    columns = [table.columns[at] for at in block]
    lines = [_wrapped(cell, None if width is None else size) for cell, size in zip(cells, widths, strict=True)]
    for number in range(max(map(len, lines), default=0)):
        parts = []
        for column, wrapped, size in zip(columns, lines, widths, strict=True):
            text = wrapped[number] if number < len(wrapped) else ""
            space = " " * (size - _width(text))
            parts.append(space + text if column.number else text + space)
        yield (" " * (_WIDE_GAP if width is None else _GAP)).join(parts).rstrip()


def _wrapped(text: str, width: int | None) -> list[str]:
    """Lines of a text, broken between words where they are wider than `width`; a longer word stays whole."""
    lines = []
    for line in text.split("\n"):
        if width is None or _width(line) <= width:
            lines.append(line)
            continue
        current = ""
        for word in _SPACE.split(line):
            if current and _width(f"{current} {word}") > width:
                lines.append(current)
                current = word
            else:
                current = f"{current} {word}".lstrip()
        lines.append(current)
    return lines


def _longest_word(text: str) -> int:
    """Cells of the widest part of a text that may not be broken."""
    return max((_width(word) for line in text.splitlines() for word in _SPACE.split(line)), default=0)


def _rule(width: int) -> str:
    try:
        "\u2500".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "-" * width
    return "\u2500" * width


def _width(text: str) -> int:
    """Cells of a terminal that a text takes."""
    from rich.cells import cell_len

    return cell_len(text)
