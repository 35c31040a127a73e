"""The plugin: every hook, each a line or two. What they return is in `coreai_zoo_overlays.qwen3_5`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coreai_zoo import hookimpl
from coreai_zoo.bounds import MeasuredBounds
from coreai_zoo.contracts import Contract
from coreai_zoo.overlay import LayerRewrite, Overlay, TokenizerClass, WeightMap
from coreai_zoo.recipe_files import read_recipes
from coreai_zoo.recipes import HeadQuantization, Recipe
from coreai_zoo.signature import StateSpec, TraceSpec
from coreai_zoo.stress import StressSample
from coreai_zoo_overlays import qwen3_5
from coreai_zoo_qwen36.bounds import BOUNDS


@hookimpl
def zoo_entries() -> Iterable[Path]:
    """The entries of the family."""
    return sorted((Path(__file__).parent / "zoo_entries").glob("*.toml"))


@hookimpl
def zoo_recipes() -> Iterable[Recipe]:
    """Mixes that name the roles of the family."""
    return read_recipes(Path(__file__).parent / "recipes").values()


@hookimpl
def zoo_claim_overlay(model_type: str) -> Overlay | None:
    """Dense and MoE, wrapped and flat."""
    return qwen3_5.Qwen35Overlay() if model_type in qwen3_5.MODEL_TYPES else None


@hookimpl
def zoo_layer_rewrites(overlay: Overlay, contract: Contract, function: TraceSpec) -> Iterable[LayerRewrite]:
    """The loop-free step and the convolution as shifts, where a function takes one token per call."""
    return qwen3_5.layer_rewrites(contract, function) if _ours(overlay) else ()


@hookimpl
def zoo_extra_states(overlay: Overlay, config: Any, contract: Contract) -> Iterable[StateSpec]:
    """Convolution and recurrent state."""
    return qwen3_5.extra_states(config, contract) if _ours(overlay) else ()


@hookimpl
def zoo_weight_map(overlay: Overlay, config: Any) -> WeightMap | None:
    """The table of `qwen3_5.weights`."""
    return qwen3_5.weight_map(config) if _ours(overlay) else None


@hookimpl
def zoo_head_quantization(overlay: Overlay) -> HeadQuantization | None:
    """Absolute-maximum scales."""
    return qwen3_5.HEAD if _ours(overlay) else None


@hookimpl
def zoo_tokenizer_classes() -> Iterable[TokenizerClass]:
    """The class of newer transformers, which engines do not know yet; they read all that differs in tokenizer.json."""
    return [TokenizerClass("Qwen3_5Tokenizer", known_as="Qwen2Tokenizer")]


@hookimpl
def zoo_gate_bounds(overlay: Overlay) -> MeasuredBounds | None:
    """What the samples show."""
    return BOUNDS if _ours(overlay) else None


@hookimpl
def zoo_stress_samples(overlay: Overlay, config: Any) -> Iterable[StressSample]:
    """Small and large activations, slow decays, offset scores, a fat-tailed head, and a long context."""
    from coreai_zoo_qwen36.stress import stress_samples

    return stress_samples(config) if _ours(overlay) else ()


def _ours(overlay: Overlay) -> bool:
    return isinstance(overlay, qwen3_5.Qwen35Overlay)
