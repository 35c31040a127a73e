"""`make demo`: the main job on the shipped sample, from checkpoint to text, with a table of what came out."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coreai_zoo import interruption
from coreai_zoo.build.request import DEFAULT_OUTPUT

if TYPE_CHECKING:
    from coreai_zoo.review.demo import Demonstration


@click.command()
@click.argument("entry")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=DEFAULT_OUTPUT, show_default=True)
def demo(entry: str, output: Path) -> None:
    """Build the sample of ENTRY, gate it against Hugging Face, and let it write.

    \b
    Example:
        python -m coreai_zoo.cli.demo qwen3.6-35b-a3b
    """
    from coreai_zoo.plugins import default_plugins
    from coreai_zoo.progress import Reporter
    from coreai_zoo.review.demo import demonstrate

    started = time.monotonic()
    found = demonstrate(entry, output, default_plugins(), Reporter())
    _print_table(found, time.monotonic() - started)
    click.echo(f"\nWhat the bundle wrote:\n\n{found.text}\n")
    if not found.record["verdict"]["passed"]:
        sys.exit(1)
    click.echo("\n".join(next_steps(found.built.path, entry)))


def next_steps(bundle: Path, entry: str) -> list[str]:
    """The lines that say what to type next, for a shell in this folder."""
    zoo = _installed_zoo()
    commands = [(zoo, "run", bundle, "-p", "class Stack:", "-n", "40"), (zoo, "plan", entry), (zoo, "--help")]
    lines = ["What to type next:", "", *(f"    {shlex.join(map(str, words))}" for words in commands)]
    if zoo == "zoo":
        return lines
    folder = Path(zoo).parent
    where = str(folder if folder.is_absolute() else Path("$PWD") / folder)
    return [*lines, "", f'To type `zoo` alone: export PATH="{where}:$PATH"']


def _installed_zoo() -> str:
    """What to type for `zoo`: the name where the shell finds this very one by it, else the path, from here."""
    beside = Path(sys.executable).with_name("zoo")
    found = shutil.which("zoo")
    if found is not None and beside.exists() and Path(found).samefile(beside):
        return "zoo"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def _print_table(found: Demonstration, seconds: float) -> None:
    from coreai_zoo.commands import print_rows
    from coreai_zoo.gates.report import totals

    verdict, counts = found.record["verdict"], totals(found.record)
    print_rows(
        [
            ("bundle", found.built.path),
            ("bytes", f"{found.built.bytes:,}"),
            ("recipe", found.bundle.build["recipe"]["published_name"]),
            ("gate", "passed" if verdict["passed"] else "; ".join(verdict["reasons"])),
            ("positions matched", f"{counts['matched']} of {counts['positions']} ({counts['ties']} ties)"),
            ("lowest cosine", f"{counts['cosine']:.6f}"),
            ("confident flips", counts["flips"]),
            ("report", found.page),
            ("seconds", f"{seconds:.1f}"),
        ]
    )


def main() -> None:
    """Run the demo with the arguments of this process."""
    from coreai_zoo.cli.app import exit_with
    from coreai_zoo.errors import ZooError

    try:
        demo(standalone_mode=False)
    except (ZooError, click.ClickException, click.Abort) as error:
        exit_with(error)


if __name__ == "__main__":
    with interruption.answered():
        main()
