"""`zoo sensitivity`: which weights of a model can do with fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
from attrs import frozen

from coreai_zoo.build.design import Design, design
from coreai_zoo.build.rebuild import recorded_request
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.checkpoint.tokenizer import load_tokenizer
from coreai_zoo.commands import json_option, new_table, plugins_of, print_json, print_table
from coreai_zoo.errors import BadInput
from coreai_zoo.gates.run import checkpoint_of
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.recipes import RECIPES, QuantizationSpec

if TYPE_CHECKING:
    from coreai_zoo.gates.sensitivity import Sensitivity

_EXISTING = click.Path(path_type=Path)

# Of each integer type, the scheme that uses it best, in the blocks that engines are fast with.
_SPECS = {
    dtype: QuantizationSpec(dtype, scheme, 32)  # type: ignore[arg-type]
    for dtype, scheme in {
        "int4": "symmetric_with_clipping",
        "int8": "symmetric_with_clipping",
        "uint4": "asymmetric",
        "uint8": "asymmetric",
    }.items()
}


@frozen
class _Options:
    """What was asked for; see the options of `sensitivity`."""

    checkpoint: Path | None
    sample: bool
    custom: bool
    recipe: str | None
    layers: int | None
    quantize_as: str | None
    role: tuple[str, ...]
    per_layer: bool
    prompt: str | None
    positions: int | None


@click.command("sensitivity")
@click.argument("subject", metavar="BUNDLE_OR_ENTRY")
@click.option("--checkpoint", type=_EXISTING, metavar="DIR", help="A local Hugging Face checkpoint.")
@click.option("--sample", is_flag=True, help="Of an entry: the miniature that ships with it.")
@click.option("--custom", is_flag=True, help="Of an entry: the checkpoint is of other sizes, as in `zoo build`.")
@click.option("--recipe", metavar="R", help=f"Of an entry: {', '.join(RECIPES)}. Default: the entry's.")
@click.option("--layers", type=click.IntRange(1), metavar="N", help="Of an entry: its first N layers only.")
@click.option(
    "--as",
    "quantize_as",
    type=click.Choice(list(_SPECS)),
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
def sensitivity(ctx: click.Context, /, subject: str, by: str, as_json: bool, **given: Any) -> None:
    """Rank a model's weights by what quantizing them costs for each byte that it saves.

    One role at a time is quantized from the checkpoint, the rest stays in fp16, and the logits are compared with those
    of fp16 throughout: KL divergence, and how much of its lead over the next best token the best one loses. What ranks
    high deserves more bits, what ranks low can do with fewer. The model is run in PyTorch, with one layer in memory at
    a time; each part takes a pass over the checkpoint.

    \b
    Example:
        zoo sensitivity qwen3.6-27b --sample --as int4
        zoo sensitivity qwen3.6-27b --checkpoint ~/Qwen3.6-27B --role mlp --as int4 --per-layer --positions 16
        zoo sensitivity exports/qwen3_6_27b_sample_decode_int8hu_block32_sym --json
    """
    from coreai_zoo.gates.sensitivity import ranked

    options = _Options(**given)
    designed = design(_request(subject, options, plugins_of(ctx)), plugins_of(ctx))
    tokens = _tokens(designed, options)
    found = ranked(_measure(designed, options, tokens, Reporter(silent=as_json)), by)
    if as_json:
        print_json(_as_json(designed, found, len(tokens), by))
        return
    _print(found)
    click.echo(
        f"{len(tokens)} positions; reference: fp16. Ranked by {'KL' if by == 'kl' else 'margin lost'} per MiB saved: "
        "the first row is the worst bargain."
    )


def _request(subject: str, options: _Options, plugins: Plugins) -> BuildRequest:
    """The build that made a bundle, or that would make one of an entry."""
    path = Path(subject)
    if path.is_dir():
        if options.sample or options.custom or options.recipe or options.layers:
            raise BadInput(
                "--sample, --custom, --recipe and --layers are for an entry; a bundle says what it was built from."
            )
        from coreai_zoo.gates.teacher_forced import check_checkpoint

        bundle = Bundle.open(path)
        check_checkpoint(bundle, checkpoint_of(bundle, plugins, options.checkpoint))
        return recorded_request(bundle, options.checkpoint, path.parent)[0]
    return BuildRequest(
        entry=subject,
        checkpoint=options.checkpoint,
        sample=options.sample,
        recipe=options.recipe,
        layers=options.layers,
        custom=options.custom,
        allow_unverified=True,  # nothing is built that could claim to be the published model
    )


def _specs(designed: Design, options: _Options) -> dict[str, QuantizationSpec]:
    """How each role that is asked for is quantized.

    Raises:
        BadInput: for a role that the recipe leaves alone, when nothing else says how, or when there is none at all.
    """
    recipe = {role: spec for role, spec in designed.stored_roles.items() if spec is not None}
    roles = options.role or tuple(recipe)
    if not roles:
        raise BadInput(
            f"Recipe {designed.recipe.name} quantizes nothing.", "Choose another --recipe, or name a --role and --as."
        )
    if options.quantize_as is not None:
        return dict.fromkeys(roles, _SPECS[options.quantize_as])
    left = [role for role in roles if role not in recipe]
    if left:
        raise BadInput(f"Recipe {designed.recipe.name} leaves {' and '.join(left)} alone.", "Say how with --as.")
    return {role: recipe[role] for role in roles}


def _tokens(designed: Design, options: _Options) -> list[int]:
    from coreai_zoo.gates.prompts import ANCHOR, DEFAULT_POSITIONS, named_prompts

    text = named_prompts([ANCHOR])[0].text if options.prompt is None else options.prompt
    tokens: list[int] = load_tokenizer(designed.checkpoint.directory).encode(text).ids
    positions = options.positions or min(DEFAULT_POSITIONS, len(tokens))
    if not tokens or len(tokens) < positions:
        raise BadInput(
            f"The prompt is {len(tokens)} tokens, and {positions} positions were asked for.",
            "Give a longer prompt, or fewer --positions.",
        )
    return tokens[:positions]


def _measure(designed: Design, options: _Options, tokens: Sequence[int], report: Reporter) -> list[Sensitivity]:
    from coreai_zoo.gates.sensitivity import Subject, measure, parts_of

    subject = Subject(
        designed.modules[designed.decode], designed.signatures[designed.decode], designed.checkpoint, designed.weights
    )
    specs = _specs(designed, options)
    layered = subject.candidate(None, lambda: None).module  # refuses a decoder that cannot be run layer by layer
    parts = parts_of(designed.weights, specs, layered.layer_paths if options.per_layer else None)
    steps = (len(parts) + 1) * len(layered.layer_paths)
    what = f"{len(parts)} parts of {designed.checkpoint.directory.name}, {len(tokens)} positions each"
    with report.stage("measure", what), report.steps("", steps) as step:
        return list(measure(subject, parts, tokens, step))


def _print(found: Sequence[Sensitivity]) -> None:
    per_layer = any(row.part.layer is not None for row in found)
    columns = ["role", *(["layer"] if per_layer else []), "as", "MiB saved", "mean KL", "largest KL", "margin lost"]
    table = new_table(*columns, "flips", "KL per MiB", "margin per MiB")
    for row in found:
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


def _as_json(designed: Design, found: Sequence[Sensitivity], positions: int, by: str) -> dict[str, Any]:
    return {
        "checkpoint": str(designed.checkpoint.directory),
        "entry": designed.entry.name if designed.entry else None,
        "positions": positions,
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
            for row in found
        ],
    }
