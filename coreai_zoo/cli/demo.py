"""`make demo`: the main job on the shipped sample, from checkpoint to text, with a table of what came out."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coreai_zoo import interruption
from coreai_zoo.build.request import DEFAULT_OUTPUT, BuildRequest

if TYPE_CHECKING:
    from coreai_zoo.build.pipeline import BuildResult
    from coreai_zoo.bundle.bundle import Bundle

POSITIONS = 32
PROMPT = "def main("
NEW_TOKENS = 40


@click.command()
@click.argument("entry")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=DEFAULT_OUTPUT, show_default=True)
def demo(entry: str, output: Path) -> None:
    """Build the sample of ENTRY, gate it against Hugging Face, and let it write.

    \b
    Example:
        python -m coreai_zoo.cli.demo qwen3.6-35b-a3b
    """
    from coreai_zoo.build.pipeline import build
    from coreai_zoo.bundle.bundle import Bundle
    from coreai_zoo.bundle.generate import generate
    from coreai_zoo.bundle.verify import backend_of
    from coreai_zoo.gates.run import GateOptions, run_gate, write_report
    from coreai_zoo.plugins import default_plugins
    from coreai_zoo.progress import Reporter

    started, plugins, report = time.monotonic(), default_plugins(), Reporter()
    request = BuildRequest(entry=entry, sample=True, output=output, force=True)
    result = build(request, plugins, report)
    bundle = Bundle.open(result.path)
    backend = backend_of(bundle, plugins.backends())
    (record,) = run_gate([bundle], GateOptions(prompts="code", positions=POSITIONS), plugins, report)
    page = write_report(bundle, [record])
    with report.stage("generate", f"{NEW_TOKENS} tokens on the {backend.name} runtime"):
        text = "".join(generate(bundle, backend, PROMPT, NEW_TOKENS))
    _print_result(bundle, result, record, page, time.monotonic() - started)
    click.echo(f"\nWhat the bundle wrote:\n\n{PROMPT}{text}\n")
    if not record["verdict"]["passed"]:
        sys.exit(1)


def _print_result(bundle: Bundle, result: BuildResult, record: Mapping[str, Any], page: Path, seconds: float) -> None:
    from coreai_zoo.commands import new_table, print_table
    from coreai_zoo.gates.report import totals

    counts = totals(record)
    table = new_table("", "")
    table.show_header = False
    table.add_row("bundle", str(result.path))
    table.add_row("bytes", f"{result.bytes:,}")
    table.add_row("recipe", str(bundle.build["recipe"]["published_name"]))
    table.add_row("gate", "passed" if record["verdict"]["passed"] else "; ".join(record["verdict"]["reasons"]))
    table.add_row("positions matched", f"{counts['matched']} of {counts['positions']} ({counts['ties']} ties)")
    table.add_row("lowest cosine", f"{counts['cosine']:.6f}")
    table.add_row("confident flips", str(counts["flips"]))
    table.add_row("report", str(page))
    table.add_row("seconds", f"{seconds:.1f}")
    print_table(table)


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
