"""Run docs/tutorial.md: write the files that it shows, run its commands, and put what they print into the page.

Usage: python scripts/tutorial.py [--check [DIR]]

With --check the page is left alone and compared: the exit code is 1 if more than times, rates and free space differs.
Commands that are in DIR are taken from there.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"

FENCE = re.compile(r"^```(?P<language>\S*) ?(?P<file>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)

FAILING: Mapping[str, int] = {"zoo build wrong.toml": 2, "zoo gate": 1}
"""Commands that the tutorial shows failing, by their beginning, and their exit codes; all others have to succeed."""

# What differs from run to run or machine to machine. The words and the whole numbers around it are compared.
VOLATILE = (
    (r"\(\d[\d,]* bytes, [\d.]+ s\)", "(# bytes, # s)"),
    (r"\d+(\.\d+)? s\b", "# s"),
    (r"-?\d+\.\d+(e[-+]\d+)?", "#"),
    (r"# [KMGT]?i?B( of memory available| free)", r"# #\1"),
    (r"─+", "─"),
    (r"\s+", " "),
)


def stable(output: str) -> str:
    """`output` without what is not the same in every run."""
    for pattern, replacement in VOLATILE:
        output = re.sub(pattern, replacement, output)
    return output.strip()


def run(page: str, folder: Path, *commands: Path) -> str:
    """The page with the outputs of this run, which happens in `folder`; folders of `commands` are looked in first.

    Raises:
        SystemExit: when a command does not exit as the page says.
    """
    path = os.pathsep.join([*map(str, commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}

    def block(fence: re.Match[str]) -> str:
        if fence["file"]:
            file = folder / fence["file"]
            file.parent.mkdir(exist_ok=True)
            file.write_text(fence["text"], encoding="utf-8")
        elif fence["language"] == "console":
            commands = re.findall(r"^\$ (.+)$", fence["text"], re.MULTILINE)
            shown = "".join(f"$ {command}\n{_output(command, folder, environment)}" for command in commands)
            return f"```console\n{shown}```"
        return fence[0]

    return FENCE.sub(block, page)


def _output(command: str, folder: Path, environment: Mapping[str, str]) -> str:
    """What `command` prints, as in a terminal, in the folder of the tutorial."""
    result = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    expected = next((code for start, code in FAILING.items() if command.startswith(start)), 0)
    if result.returncode != expected:
        raise SystemExit(f"$ {command}\n{result.stdout}exit code {result.returncode} instead of {expected}")
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    return "".join(f"{line}\n" for line in lines)


def main(arguments: list[str]) -> int:
    """Run the tutorial; update the page, or compare. The exit code."""
    if arguments[:1] not in ([], ["--check"]) or len(arguments) > 2:
        print(__doc__, file=sys.stderr)
        return 2
    before = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="tutorial-") as folder:
        after = run(before, Path(folder), *map(Path, arguments[1:]))
    if not arguments:
        PAGE.write_text(after, encoding="utf-8")
        return 0
    old, new = ([stable(line) for line in text.splitlines()] for text in (before, after))
    differences = list(difflib.unified_diff(old, new, "shown", "printed", lineterm="", n=1))
    print("\n".join(differences), file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
