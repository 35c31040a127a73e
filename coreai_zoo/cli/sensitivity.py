"""`zoo sensitivity`: which weights of a model can do with fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coreai_zoo.build.request import DEFAULT_RECIPE
from coreai_zoo.cli.completion import complete_entry
from coreai_zoo.cli.recipe_option import recipe_option
from coreai_zoo.commands import (
    Column,
    Headed,
    OneOf,
    json_option,
    new_table,
    plugins_of,
    print_json,
    print_table,
    print_text,
    say_next,
)
from coreai_zoo.errors import zoo_command
from coreai_zoo.format_text import format_text
from coreai_zoo.progress import Reporter
from coreai_zoo.recipes import PLAIN

if TYPE_CHECKING:
    from coreai_zoo.gates.sensitivity import Sensitivity
    from coreai_zoo.gates.sensitivity_run import Ranking

_EXISTING = click.Path(path_type=Path)


@click.command(
    "sensitivity",
    cls=Headed,
    headings={
        "checkpoint": "The model",
        "stored_from": "What is stored otherwise",
        "prompt": "What it is measured on",
        "output": "Who measures, and where it goes",
    },
)
@click.argument("subject", metavar="BUNDLE_OR_ENTRY", shell_complete=complete_entry)
@click.option("--checkpoint", type=_EXISTING, metavar="DIR", help="A local Hugging Face checkpoint.")
@click.option("--sample", is_flag=True, help="Of an entry: the miniature that ships with it.")
@click.option("--custom", is_flag=True, help="Of an entry: the checkpoint is of other sizes, as in `zoo build`.")
@recipe_option("Of an entry: a name from `zoo recipes`, or a TOML file. Default: the entry's.")
@click.option("--layers", type=click.IntRange(1), metavar="N", help="Of an entry: its first N layers only.")
@click.option(
    "--from",
    "stored_from",
    metavar="FORMAT",
    default=PLAIN,
    show_default=True,
    help="What the reference is stored in: the roles that the recipe quantizes, and those of --role.",
)
@click.option(
    "--as",
    "stored_as",
    metavar="FORMAT",
    help="What the part in question is stored in instead. Default: each role as the recipe has it.",
)
@click.option(
    "--role",
    multiple=True,
    metavar="ROLE",
    help="Only this role, which may be one that the recipe leaves alone. May be repeated.",
)
@click.option("--per-layer", is_flag=True, help="Take each layer by itself. One run for each role of each layer.")
@click.option("--per-tensor", is_flag=True, help="Take each tensor by itself. One run for each.")
@click.option("-p", "--prompt", help="Text to measure on. Default: the gate's built-in Python program.")
@click.option("--positions", type=click.IntRange(1), metavar="N", help="How many of its tokens. Default: at most 64.")
@click.option("--by", type=OneOf(["kl", "margin"]), default="kl", show_default=True, help="What ranks.")
@click.option(
    "-o",
    "--output",
    type=_EXISTING,
    metavar="DIR",
    help="Keep results here as sensitivity.json and sensitivity.svg, and go on from those that are there.",
)
@click.option("--fresh", is_flag=True, help="Forget the results that are in DIR.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    metavar="N",
    default=1,
    show_default=True,
    help="Measure so many parts at a time, each in a process with one layer in memory.",
)
@click.option("--scheduler", metavar="ADDRESS", help="Have the workers of a dask cluster measure: tcp://HOST:PORT.")
@json_option
@click.pass_context
def sensitivity(ctx: click.Context, /, subject: str, as_json: bool, **given: Any) -> None:
    """Rank a model's weights by what quantizing them costs for each byte that it saves.

    One part at a time is stored in another format, from the checkpoint, and the logits are compared with those of the
    reference, by default fp16 throughout: KL divergence, and how much of its lead over the next best token the best one
    loses. A part is a role, or with --per-layer a role of a layer, or with --per-tensor a tensor. What ranks high
    deserves more bits, what ranks low can do with fewer. The model is run in PyTorch, with one layer in memory at a
    time; each part takes a pass over the checkpoint. A bundle is a path or its own name; an entry's name means the
    entry.

    A FORMAT is DTYPE[:blockN|:channel][:SCHEME][:mse], for example int8, uint4:channel or int4:block64:symmetric, or
    fp16. Without more, blocks are of 32, signed integers symmetric_with_clipping and unsigned ones asymmetric.

    With -o every finished part is kept, and the same command goes on where it was interrupted. Results are the same
    whoever measures: this process, --jobs, or a --scheduler (needs the extra `cluster`).

    \b
    Example:
        zoo sensitivity qwen3.6-27b --sample --as int4
        zoo sensitivity qwen3.6-27b --sample --from int8 --as int4:block64 --per-tensor -o sensitivity --jobs 2
        zoo sensitivity qwen3.6-27b --checkpoint ~/Qwen3.6-27B --role mlp --as int4 --per-layer --positions 16
        zoo sensitivity qwen3.6-27b --checkpoint /nfs/Qwen3.6-27B --per-tensor -o /nfs/out --scheduler tcp://head:8786
        zoo sensitivity exports/qwen3_6_27b_sample_decode_int8hu_block32_sym --json
    """
    from coreai_zoo.gates.sensitivity_run import SensitivityOptions, rank_parts

    options = SensitivityOptions(**given)
    ranking = rank_parts(subject, options, plugins_of(ctx), Reporter(silent=as_json))
    if as_json:
        print_json(ranking.as_json())
        return
    _print(ranking.rows)
    print_text(f"{ranking.positions} positions; reference: {ranking.stored_from}. {_order(ranking)}")
    if options.output is not None:
        print_text(f"Results: {options.output / 'sensitivity.json'}, picture: {options.output / 'sensitivity.svg'}")
    say_next("write a recipe by it", f"{zoo_command('show-recipe', DEFAULT_RECIPE)} > mine.toml")


def _order(ranking: Ranking) -> str:
    """The order of the table in words."""
    by = "KL" if ranking.by == "kl" else "margin lost"
    nothing = sum(row.kl_per_mib is None for row in ranking.rows)
    if nothing == len(ranking.rows):
        return f"Ranked by {by}: nothing is saved."
    last = " What saves nothing comes last, ranked by what it changes." if nothing else ""
    return f"Ranked by {by} per MiB saved: the first row is the worst bargain.{last}"


def _print(rows: Sequence[Sensitivity]) -> None:
    per_tensor = any(row.part.tensor is not None for row in rows)
    per_layer = not per_tensor and any(row.part.layer is not None for row in rows)
    table = new_table(
        "tensor" if per_tensor else "role",
        *([Column("layer", number=True)] if per_layer else []),
        Column("as", drop=2),
        Column("MiB saved", number=True),
        Column("mean KL", number=True, drop=1),
        Column("largest KL", number=True, drop=5),
        Column("margin lost", number=True, drop=3),
        Column("flips", number=True, drop=4),
        Column("KL per MiB", number=True),
        Column("margin per MiB", number=True),
    )
    for row in rows:
        table.add_row(
            row.part.tensor or row.part.role,
            *([] if not per_layer else ["" if row.part.layer is None else str(row.part.layer)]),
            format_text(row.part.spec),
            f"{row.part.saved_bytes / 2**20:.3f}",
            f"{row.kl:.2e}",
            f"{row.largest_kl:.2e}",
            f"{row.margin_lost:.4f}",
            str(row.flips),
            *("-" if value is None else f"{value:.2e}" for value in (row.kl_per_mib, row.margin_lost_per_mib)),
        )
    print_table(table)
