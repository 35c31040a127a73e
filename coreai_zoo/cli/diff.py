"""`zoo diff`: what a change does to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from coreai_zoo.cli.completion import complete_bundle
from coreai_zoo.commands import Headed, json_option, new_table, plugins_of, print_json, print_table, print_text
from coreai_zoo.errors import BadInput, CheckFailed
from coreai_zoo.progress import Reporter

if TYPE_CHECKING:
    from coreai_zoo.review.diff import Difference


@click.command("diff", cls=Headed, headings={"contract": "What is compared", "markdown": "What is printed"})
@click.argument("a", metavar="A", shell_complete=complete_bundle)
@click.argument("b", metavar="[B]", required=False, shell_complete=complete_bundle)
@click.option("--contract", metavar="C", help="By which entries are compared. Default: their own.")
@click.option("--rev", "revisions", multiple=True, metavar="REV", help="Compare the code at REV with the working tree.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="To run two bundles on. Not needed for samples.",
)
@click.option("--positions", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Tokens to run.")
@click.option("--no-numerics", is_flag=True, help="Run nothing: compare graph and weights only.")
@click.option("--markdown", is_flag=True, help="Print Markdown, to be pasted into a review.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 when anything differs, whatever the kind.")
@json_option
@click.pass_context
def diff(
    ctx: click.Context,
    a: str,
    b: str | None,
    contract: str | None,
    revisions: tuple[str, ...],
    checkpoint: Path | None,
    positions: int,
    no_numerics: bool,
    markdown: bool,
    exit_code: bool,
    as_json: bool,
) -> None:
    """What differs between two bundles, entries, recipes or revisions of the code.

    A and B are two bundles, two entries, or two recipes of one entry (ENTRY:RECIPE). With --rev, A is an entry: its
    sample is built with the code at REV and with the working tree, or at both of two --rev. A bundle is a path or a
    name, as for `zoo gate`; an entry's name means its bundle only beside another bundle. Operations are counted per
    kind of layer; weights are compared byte by byte and logits bit by bit where both sides are bundles. Entries are
    compared without weights, at their true sizes. The last line is the verdict: what kind of change it is, and what to
    run next.

    \b
    Example:
        zoo diff qwen3.6-27b qwen3.6-35b-a3b
        zoo diff qwen3.6-27b:int8hu qwen3.6-27b:int4lin
        zoo diff qwen3.6-27b --rev main --markdown
        zoo diff qwen3.6-27b --rev main --contract chunked
        zoo diff exports/one exports/other
    """
    from coreai_zoo.review.comparison import Comparer
    from coreai_zoo.review.diff import as_json as json_of
    from coreai_zoo.review.diff import as_markdown

    if markdown and as_json:
        raise BadInput("--markdown and --json exclude each other.")
    if (b is None) == (not revisions) or len(revisions) > 2:
        raise click.UsageError("Give two things to compare, or one entry and --rev REV (at most two).")
    comparer = Comparer(
        plugins_of(ctx), Reporter(silent=as_json or markdown), checkpoint, positions, not no_numerics, contract
    )
    compared = comparer.compare_revisions(a, revisions) if b is None else comparer.compare(a, b)
    difference, verdict = compared.difference, compared.verdict
    if as_json:
        print_json({**json_of(difference), "verdict": attrs.asdict(verdict)})
    elif markdown:
        click.echo(f"{as_markdown(difference)}\n**{verdict}**")
    else:
        _print(difference)
        print_text(str(verdict))
    if exit_code and verdict.changed:
        raise CheckFailed(f"{difference.a} and {difference.b} differ.")


def _print(difference: Difference) -> None:
    click.echo(f"A  {difference.a}\nB  {difference.b}\n")
    for section in difference.sections:
        if section.changes:
            table = new_table("", "A", "B", title=section.name)
            for change in section.changes:
                table.add_row(change.what, *("-" if side is None else side for side in (change.before, change.after)))
            print_table(table)
        elif section.missing:
            click.echo(f"{section.name}: not compared, {section.missing}")
        else:
            click.echo(f"{section.name}: no change")
        if section.note:
            click.echo(f"({section.note})")
        click.echo()
    print_text(difference.summary)
