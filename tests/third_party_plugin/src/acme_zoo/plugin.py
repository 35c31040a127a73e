"""Every hook of the plugin. Nothing here imports torch: `zoo list` loads this module too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coreai_zoo import hookimpl
from coreai_zoo.bounds import MeasuredBounds
from coreai_zoo.gate import ReferenceModel
from coreai_zoo.overlay import LayerRewrite, Overlay, TokenizerClass
from coreai_zoo.recipes import HeadQuantization, QuantizationSpec

if TYPE_CHECKING:
    import click
    from torch import nn

    from coreai_zoo.entry import Entry

from .limited import BOUNDS, REFERENCE, AcmeLimited

CLAMPED = "acme-mini-clamped"


@hookimpl
def zoo_entries() -> Iterable[Path]:
    """Both fine-tunes. For `acme-mini` this is all: it is its base model with other weights."""
    return sorted((Path(__file__).parent / "entries").glob("*.toml"))


@hookimpl
def zoo_claim_overlay(hf_config: Mapping[str, Any]) -> Overlay | None:
    """Acme Limited, which is a Qwen3.5 to everybody else."""
    return AcmeLimited(name="acme_limited") if "acme_limit" in hf_config else None


@hookimpl
def zoo_layer_rewrites(entry: Entry | None) -> Iterable[LayerRewrite]:
    """`acme-mini-clamped` was trained with a clamped feed-forward; every other entry is left alone."""
    if entry is None or entry.name != CLAMPED:
        return ()
    rewrite = LayerRewrite(
        name="clamped-mlp",
        pattern="model.layers.*.mlp",
        reason="Acme trains with gate and up clamped, so that half precision cannot overflow",
        apply=_clamped,
    )
    return (rewrite,)


@hookimpl
def zoo_head_quantization(entry: Entry | None) -> HeadQuantization | None:
    """Smaller blocks for the head of `acme-mini-clamped`; for every other entry the next plugin is asked."""
    if entry is None or entry.name != CLAMPED:
        return None
    return HeadQuantization(
        spec=QuantizationSpec(dtype="int8", scheme="symmetric", block_size=16),
        reason="Outliers of this head come in narrow groups: blocks of 16 keep them from their neighbours.",
    )


@hookimpl
def zoo_tokenizer_classes() -> Iterable[TokenizerClass]:
    """The class that our tokenizers are saved with."""
    return [TokenizerClass("AcmeTokenizer", known_as="PreTrainedTokenizer")]


@hookimpl
def zoo_oracle(overlay: Overlay) -> ReferenceModel | None:
    """The reference of Acme Limited."""
    return REFERENCE if isinstance(overlay, AcmeLimited) else None


@hookimpl
def zoo_gate_bounds(overlay: Overlay) -> MeasuredBounds | None:
    """The bounds of Acme Limited."""
    return BOUNDS if isinstance(overlay, AcmeLimited) else None


@hookimpl
def zoo_register_commands(cli: click.Group) -> None:
    """`zoo acme-head`."""
    from .commands import acme_head

    cli.add_command(acme_head)


def _clamped(mlp: nn.Module) -> nn.Module:
    from .layers import ClampedMLP

    return ClampedMLP(mlp)
