"""Write docs/commands.md from the commands' own help, or check that it is up to date.

Usage: python scripts/command_docs.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from coreai_zoo.cli.app import COMMANDS, cli
from coreai_zoo.plugins import Plugins

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"
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


def main(arguments: list[str]) -> int:
    """Write the page, or compare; the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    text = page()
    if not arguments:
        PAGE.write_text(text, encoding="utf-8")
        print(f"{PAGE}: {len(COMMANDS)} commands")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is not up to date; run: python scripts/command_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
