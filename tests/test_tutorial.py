"""The tutorial, executed: its files are written, its commands run in order, and what they print is what it shows."""

from __future__ import annotations

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import forked
from documents import DOCS, blocks, read

SCRIPT = DOCS.parent / "scripts" / "tutorial.py"


@pytest.mark.slow
def test_the_tutorial_works_and_prints_what_it_shows(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--check", forked.command(tmp_path).parent]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stdout + result.stderr


def test_the_entry_of_the_tutorial_has_the_facts_of_its_checkpoint() -> None:
    (entry,) = (block.text for block in blocks(read("tutorial.md")) if block.file == "my-sibling.toml")
    (script,) = (block.text for block in blocks(read("tutorial.md")) if block.file == "make_checkpoint.py")
    fields = tomllib.loads(entry)

    assert fields["status"] == "unverified"
    for fact, name in (
        ("layers", "num_hidden_layers"),
        ("hidden_size", "hidden_size"),
        ("gdn_value_heads", "linear_num_value_heads"),
    ):
        assert f"{name}={fields['facts'][fact]}," in script


def test_times_and_rates_may_differ_and_nothing_else() -> None:
    stable = runpy.run_path(str(SCRIPT))["stable"]

    assert stable("         12.3 s") == stable("0.4 s")
    assert stable("66.7 GiB free at .") == stable("812.0 MiB free at .")
    assert stable("M4   120  16 GB  820568.9") == stable("M4 120 16 GB 1.5")
    assert stable("16 of 16 matched") != stable("15 of 16 matched")
    assert stable("asset 314,048 bytes") != stable("asset 314,049 bytes")


def test_a_command_that_does_not_end_as_the_tutorial_says_fails_it(tmp_path: Path) -> None:
    run = runpy.run_path(str(SCRIPT))["run"]

    assert run("```console\n$ echo so\nnot so\n```\n", tmp_path) == "```console\n$ echo so\nso\n```\n"
    with pytest.raises(SystemExit, match="exit code 3 instead of 0"):
        run("```console\n$ exit 3\n```\n", tmp_path)
