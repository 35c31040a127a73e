"""`zoo sensitivity`: which weights of a model can do with fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from coreai_zoo.cli.completion import complete_entry
from coreai_zoo.cli.recipe_option import recipe_option
from coreai_zoo.commands import Column, json_option, new_table, plugins_of, print_json, print_table, print_text
from coreai_zoo.progress import Reporter

if TYPE_CHECKING:
    from coreai_zoo.gates.sensitivity import Ranking, Sensitivity

_EXISTING = click.Path(path_type=Path)


@click.command("sensitivity")
@click.argument("subject", metavar="BUNDLE_OR_ENTRY", shell_complete=complete_entry)
@click.option("--checkpoint", type=_EXISTING, metavar="DIR", help="A local Hugging Face checkpoint.")
@click.option("--sample", is_flag=True, help="Of an entry: the miniature that ships with it.")
@click.option("--custom", is_flag=True, help="Of an entry: the checkpoint is of other sizes, as in `zoo build`.")
@recipe_option("Of an entry: a name from `zoo recipes`, or a TOML file. Default: the entry's.")
@click.option("--layers", type=click.IntRange(1), metavar="N", help="Of an entry: its first N layers only.")
@click.option(
    "--as",
    "quantize_as",
    type=click.Choice(["int4", "int8", "uint4", "uint8"]),
    help="Quantize every role like this, in blocks of 32. Default: each as the recipe does.",
)
@click.option(
    "--role",
    multiple=True,
    metavar="ROLE",
    help="Only this role, which may be one that the recipe leaves alone. May be repeated.",
)
@click.option("--per-layer", is_flag=True, help="Take each layer by itself. One run for each role of each layer.")
@click.option("-p", "--prompt", help="Text to measure on. Default: the gate's built-in Python program.")
@click.option("--positions", type=click.IntRange(1), metavar="N", help="How many of its tokens. Default: at most 64.")
@click.option("--by", type=click.Choice(["kl", "margin"]), default="kl", show_default=True, help="What ranks.")
@json_option
@click.pass_context
def sensitivity(ctx: click.Context, /, subject: str, as_json: bool, **given: Any) -> None:
    """Rank a model's weights by what quantizing them costs for each byte that it saves.

    One role at a time is quantized from the checkpoint, the rest stays in fp16, and the logits are compared with those
    of fp16 throughout: KL divergence, and how much of its lead over the next best token the best one loses. What ranks
    high deserves more bits, what ranks low can do with fewer. The model is run in PyTorch, with one layer in memory at
    a time; each part takes a pass over the checkpoint. A bundle is a path or its own name; an entry's name means the
    entry.

    \b
    Example:
        zoo sensitivity qwen3.6-27b --sample --as int4
        zoo sensitivity qwen3.6-27b --checkpoint ~/Qwen3.6-27B --role mlp --as int4 --per-layer --positions 16
        zoo sensitivity exports/qwen3_6_27b_sample_decode_int8hu_block32_sym --json
    """
    from coreai_zoo.gates.sensitivity import SensitivityOptions, rank_parts

    options = SensitivityOptions(**given)
    ranking = rank_parts(subject, options, plugins_of(ctx), Reporter(silent=as_json))
    if as_json:
        print_json(_as_json(ranking, options.by))
        return
    _print(ranking.rows)
    by = "KL" if options.by == "kl" else "margin lost"
    print_text(
        f"{ranking.positions} positions; reference: fp16. Ranked by {by} per MiB saved: the first row is the worst "
        "bargain."
    )


def _print(rows: Sequence[Sensitivity]) -> None:
    per_layer = any(row.part.layer is not None for row in rows)
    table = new_table(
        "role",
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
        layer = [] if not per_layer else ["" if row.part.layer is None else str(row.part.layer)]
        table.add_row(
            row.part.role,
            *layer,
            str(row.part.spec),
            f"{row.part.saved_bytes / 2**20:.3f}",
            f"{row.kl:.2e}",
            f"{row.largest_kl:.2e}",
            f"{row.margin_lost:.4f}",
            str(row.flips),
            f"{row.kl_per_mib:.2e}",
            f"{row.margin_lost_per_mib:.2e}",
        )
    print_table(table)


def _as_json(ranking: Ranking, by: str) -> dict[str, Any]:
    designed = ranking.design
    return {
        "checkpoint": str(designed.checkpoint.directory),
        "entry": designed.entry.name if designed.entry else None,
        "positions": ranking.positions,
        "ranked_by": by,
        "parts": [
            {
                "role": row.part.role,
                "layer": row.part.layer,
                "quantization": attrs.asdict(row.part.spec),
                "tensors": len(row.part.tensors),
                "plain_bytes": row.part.plain_bytes,
                "quantized_bytes": row.part.quantized_bytes,
                "mean_kl_divergence": row.kl,
                "largest_kl_divergence": row.largest_kl,
                "margin_lost": row.margin_lost,
                "confident_flips": row.flips,
                "kl_per_mib_saved": row.kl_per_mib,
                "margin_lost_per_mib_saved": row.margin_lost_per_mib,
            }
            for row in ranking.rows
        ],
    }
