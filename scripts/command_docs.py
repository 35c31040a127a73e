"""Write what docs/ takes from the commands, or check that it is up to date.

That is all of docs/commands.md, from the commands' own help, and in docs/contracts.md each block of text below a
comment `<!-- output: zoo ... -->`: the tables that the command prints, without the explanations below them.

Usage: python scripts/command_docs.py [--check]
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from coreai_zoo.cli.app import COMMANDS, cli
from coreai_zoo.plugins import Plugins

DOCS = Path(__file__).parent.parent / "docs"
PAGE, CONTRACTS = DOCS / "commands.md", DOCS / "contracts.md"
OUTPUT = re.compile(r"(?<=<!-- output: zoo )(?P<command>.+?)( -->\n+```text\n)(.*?)(?=```$)", re.MULTILINE | re.DOTALL)
EXPLANATIONS = "\n\nPredictions. "
WIDTH = 100  # of the help, whatever the terminal's is

INTRODUCTION = """\
# Commands

<!-- Written by `python scripts/command_docs.py` from the commands' own help. Do not edit. -->

Every command has `--help`. `--json` is there where a program would read the answer. Progress and errors go to standard
error, answers to standard output. Exit codes: 0 fine; 1 a gate, check or verification failed; 2 bad usage or bad input;
3 the environment lacks something; 130 interrupted.

A plugin may add commands; they are in `zoo --help` and not here.
"""


def help_of(name: str, command: click.Command, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """The full name and the help of a command, then of its subcommands."""
    # A host without plugins: what happens to be installed must not decide what is written.
    context = click.Context(
        command,
        parent=parent,
        info_name=name,
        obj=Plugins(),
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
    )
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield context.command_path, text
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from help_of(child, found, context)


def page() -> str:
    """The whole page."""
    sections = [INTRODUCTION]
    sections += [f"## {name}\n\n```text\n{text}\n```\n" for name, text in help_of("zoo", cli)]
    return "\n".join(sections)


def with_outputs(text: str) -> str:
    """A page with what its commands print today.

    Raises:
        SystemExit: when a command fails.
    """

    def block(found: re.Match[str]) -> str:
        result = CliRunner().invoke(cli, shlex.split(found["command"]), prog_name="zoo")
        if result.exit_code:
            raise SystemExit(f"zoo {found['command']} failed: {result.output}")
        return f"{found['command']}{found[2]}{result.stdout.partition(EXPLANATIONS)[0]}\n"

    return OUTPUT.sub(block, text)


def main(arguments: list[str]) -> int:
    """Write the pages, or compare; the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    pages = {PAGE: page(), CONTRACTS: with_outputs(CONTRACTS.read_text(encoding="utf-8"))}
    if not arguments:
        for path, text in pages.items():
            path.write_text(text, encoding="utf-8")
        print(f"{PAGE}: {len(COMMANDS)} commands; {CONTRACTS}: {len(OUTPUT.findall(pages[CONTRACTS]))} outputs")
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path} is not up to date; run: python scripts/command_docs.py", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
