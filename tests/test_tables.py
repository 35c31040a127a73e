"""Tables on terminals of any width, and through a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable

import click
import click.testing
import pytest

from command import zoo
from coreai_zoo.commands import Column, Table, new_table, table_lines
from coreai_zoo.plugins import Plugins, default_plugins

COMMANDS = [
    ("list",),
    ("show", "qwen3.6-35b-a3b"),
    ("plan", "qwen3.6-35b-a3b"),
    ("plan", "qwen3.6-27b", "--compare"),
    ("plan", "qwen3.6-27b", "qwen3.6-35b-a3b", "qwen3.5-397b-a17b", "--compare", "--recipe", "int8hu"),
    ("plugins",),
    ("doctor",),
]
WIDTHS = [40, 60, 80, 120]


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Run `zoo` as on a terminal of a width; the lines that it prints."""

    def run(width: int, *arguments: str, plugins: Plugins | None = None) -> list[str]:
        monkeypatch.setattr(click.testing._NamedTextIOWrapper, "isatty", lambda _self: True, raising=False)
        monkeypatch.setenv("COLUMNS", str(width))
        lines = click.unstyle(zoo(*arguments, plugins=plugins).stdout).splitlines()
        monkeypatch.undo()
        return lines

    return run


def words(text: str) -> set[str]:
    return set(re.findall(r"\S+", text))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_no_line_of_a_table_is_wider_than_the_terminal_and_no_word_or_number_is_broken(
    on_terminal: Callable[..., list[str]], arguments: tuple[str, ...], width: int
) -> None:
    piped = zoo(*arguments).stdout
    lines = on_terminal(width, *arguments)

    too_wide = [line for line in lines if len(line) > width and len(line.split()) > 1]
    assert not too_wide
    # What a terminal shows is made of the words of the pipe: nothing is cut, nothing is broken.
    measured = re.compile(r"free|memory|\d\.\d")  # changes from run to run
    broken = {word for word in words("\n".join(lines)) - words(piped) if set(word) != {"\u2500"}}
    broken -= words(next((" ".join(lines[at:]) for at, line in enumerate(lines) if line.startswith("Left out")), ""))
    assert {word for word in broken if not measured.search(word)} == set()


@pytest.mark.parametrize("width", WIDTHS)
def test_names_and_bytes_are_always_there(on_terminal: Callable[..., list[str]], width: int) -> None:
    lines = on_terminal(width, "plan", "qwen3.6-35b-a3b")

    for name, size in (("moe.expert", "34,225,520,640"), ("moe.shared_gate", "163,840"), ("all", "37,324,502,016")):
        assert any(line.split()[:1] == [name] and size in line for line in lines), (name, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_column_that_is_left_out_is_named(on_terminal: Callable[..., list[str]], width: int) -> None:
    lines = on_terminal(width, "list")

    heading, note = lines[0].split(), " ".join(line for line in lines if "Left out" in line or line.endswith("."))
    for column in ("entry", "FFN", "parameters", "recipe", "contract", "status", "plugin"):
        assert (column in heading) != (column in note), column
    assert "entry" in heading and "parameters" in heading
    assert ("plugin" in heading) == (width >= 80)


@pytest.mark.parametrize("columns", [None, "40"])
def test_through_a_pipe_nothing_is_cut_or_wrapped_whatever_the_terminal(columns: str | None) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    environment |= {} if columns is None else {"COLUMNS": columns}
    command = [sys.executable, "-m", "coreai_zoo", "plugins"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    heading, _rule, *rows = printed.splitlines()
    assert heading.split() == ["plugin", "from", "entries", "backends", "hooks"]
    brought = {row.split()[0]: row for row in rows}
    assert [*brought] == list(default_plugins().names())
    assert "qwen3.5-397b-a17b, qwen3.6-27b" in brought["qwen36"] and "zoo_recipes" not in printed.split()[0]
    assert len(brought["qwen36"]) > 200, "a row is a line"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_width_is_that_of_the_real_terminal(width: int) -> None:
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in {"COLUMNS", "LINES"}}
    command = [sys.executable, "-m", "coreai_zoo", "list"]
    with subprocess.Popen(command, stdout=inner, stdin=inner, env=environment) as process:
        os.close(inner)
        printed = b""
        try:
            while part := os.read(outer, 65536):
                printed += part
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(outer)

    lines = click.unstyle(printed.decode()).splitlines()
    assert process.returncode == 0
    assert max(map(len, lines)) <= width
    assert ("plugin" in lines[0]) == (width >= 80)
    assert sum(line.startswith("qwen3.6-27b ") for line in lines) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The layout itself
# ---------------------------------------------------------------------------------------------------------------------


def lines_of(table: Table, width: int | None) -> list[str]:
    return [click.unstyle(line) for line in table_lines(table, width)]


def test_text_is_wrapped_before_a_column_is_dropped_and_the_highest_goes_first() -> None:
    table = new_table("name", "text", Column("a", number=True, drop=1), Column("b", number=True, drop=2))
    table.add_row("one", "some words that can be wrapped", "1,000", "2,000")

    assert lines_of(table, None)[2] == "one    some words that can be wrapped   1,000   2,000"
    assert lines_of(table, 36)[2:] == ["one   some words that   1,000  2,000", "      can be wrapped"]
    assert lines_of(table, 30)[2:] == [
        "one   some words that    1,000",
        "      can be wrapped",
        "Left out for want of width: b.",
    ]
    assert lines_of(table, 22)[-2:] == ["Left out for want of", "width: a, b."]


def test_columns_that_may_not_be_dropped_go_below_with_the_names_again() -> None:
    table = new_table("", *(Column(head, number=True) for head in ("one", "two", "three")))
    table.add_row("asset", "1,000,000", "2,000,000", "3,000,000")

    lines = lines_of(table, 30)

    assert [line.split() for line in lines if "asset" in line] == [
        ["asset", "1,000,000", "2,000,000"],
        ["asset", "3,000,000"],
    ]


def test_what_does_not_fit_beside_its_name_stands_below_it() -> None:
    table = new_table("name", Column("bytes", number=True))
    table.add_row("a_name_that_is_long", "34,660,610,688")
    table.add_row("short", "7")

    assert lines_of(table, 30)[2:] == ["a_name_that_is_long", "  34,660,610,688", "short                        7"]


def test_a_number_stays_with_its_unit() -> None:
    table = new_table("name", "text")
    table.add_row("asset", "takes 34.8 GiB of it")

    assert lines_of(table, 16)[2:] == ["asset  takes", "       34.8 GiB", "       of it"]


def test_wide_characters_count_as_the_cells_that_they_take() -> None:
    table = new_table("name", "value")
    table.add_row("模型", "x")
    table.add_row("abcd", "y")

    assert lines_of(table, None)[2:] == ["模型   x", "abcd   y"]


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        new_table("a", "b").add_row("x")
