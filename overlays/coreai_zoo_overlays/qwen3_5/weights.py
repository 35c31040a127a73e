"""Checkpoint to decoder, as a table.

Names on the left are those of a flat checkpoint; the prefixes say how else they are spelled. The right-hand side is
left out where it is the same. Three things change values or shapes: RMSNorm gains are stored minus one (but not the
gated output norm of a GatedDeltaNet), the decay is stored as a logarithm, and the convolution has one axis more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coreai_zoo.overlay import Drop, Part, Role, Transform, WeightMap, WeightRule

from .config import Qwen35Config

if TYPE_CHECKING:
    from torch import Tensor


def _one_plus(weight: Tensor) -> Tensor:
    return 1.0 + weight


def _minus_exp(logarithm: Tensor) -> Tensor:
    return -logarithm.exp()


def _depthwise(shape: tuple[int, ...]) -> tuple[int, ...]:
    channels, taps = shape
    return channels, 1, taps


ONE_PLUS = Transform("1 + weight", _one_plus)
MINUS_EXP = Transform("-exp(weight)", _minus_exp)

# Wrapped checkpoints put the text model under model.language_model.
PREFIXES = (("model.language_model.", "model."),)

LAYER = "model.layers.{layer}."

ROLES = (
    Role("embedding", "token embedding table", "embedding"),
    Role("head", "output projection to the vocabulary", "head"),
    Role("attention", "q, k, v and o projections of softmax attention", "body"),
    Role("gdn.in", "input projections of a gated delta net", "body"),
    Role("gdn.out", "output projection of a gated delta net", "body"),
    Role("gdn.conv", "depthwise causal convolution of a gated delta net"),
    Role("mlp", "dense feed-forward projections, a shared expert's included", "body"),
    Role("moe.expert", "routed experts", "body", routed=True),
    Role("moe.router", "router", router=True),
    Role("moe.shared_gate", "gate of the shared expert"),
    Role("norm", "normalisation gains"),
    Role("scalar", "per-head decays, biases and other small vectors"),
)
"""What a weight does, in the order in which reports name them."""


def weight_map(config: Qwen35Config) -> WeightMap:
    """The table for one config: a tied head may stand in for what is not stored; the switch decides the rest."""
    rules = (
        WeightRule("model.embed_tokens.weight", "model.embed_tokens.weight", "embedding"),
        WeightRule("lm_head.weight", "lm_head.weight", "head"),
        *(_TIED if config.tie_word_embeddings else ()),
        WeightRule("model.norm.weight", "model.norm.weight", "norm", ONE_PLUS),
        _rule("input_layernorm.weight", "norm", ONE_PLUS),
        _rule("post_attention_layernorm.weight", "norm", ONE_PLUS),
        *_ATTENTION,
        *_GATED_DELTA_NET,
        *(_MLP if config.moe is None else _MOE),
    )
    return WeightMap(rules, _drops(config), PREFIXES, roles=ROLES)


def _rule(name: str, role: str, transform: Transform | None = None, *, target: str = "") -> WeightRule:
    """A row for a tensor of every layer."""
    return WeightRule(LAYER + name, LAYER + (target or name), role, transform)


# A tied checkpoint stores one of the two. Where it stores both, transformers uses both, and so do we.
_TIED = (
    WeightRule("model.embed_tokens.weight", "lm_head.weight", "head", fallback=True),
    WeightRule("lm_head.weight", "model.embed_tokens.weight", "embedding", fallback=True),
)

_ATTENTION = (
    _rule("self_attn.q_proj.weight", "attention"),
    _rule("self_attn.k_proj.weight", "attention"),
    _rule("self_attn.v_proj.weight", "attention"),
    _rule("self_attn.o_proj.weight", "attention"),
    _rule("self_attn.q_norm.weight", "norm", ONE_PLUS),
    _rule("self_attn.k_norm.weight", "norm", ONE_PLUS),
)

_GATED_DELTA_NET = (
    _rule("linear_attn.in_proj_qkv.weight", "gdn.in"),
    _rule("linear_attn.in_proj_z.weight", "gdn.in"),
    _rule("linear_attn.in_proj_b.weight", "gdn.in"),
    _rule("linear_attn.in_proj_a.weight", "gdn.in"),
    WeightRule(
        LAYER + "linear_attn.conv1d.weight",
        LAYER + "linear_attn.conv1d.weight",
        "gdn.conv",
        source_shape=_depthwise,
    ),
    _rule("linear_attn.A_log", "scalar", MINUS_EXP, target="linear_attn.A"),
    _rule("linear_attn.dt_bias", "scalar"),
    _rule("linear_attn.norm.weight", "norm"),
    _rule("linear_attn.out_proj.weight", "gdn.out"),
)

_MLP = (
    _rule("mlp.gate_proj.weight", "mlp"),
    _rule("mlp.up_proj.weight", "mlp"),
    _rule("mlp.down_proj.weight", "mlp"),
)


def _expert(name: str, target: str, piece: int = 0, pieces: int = 1) -> WeightRule:
    """A row for one projection of one expert, where experts are stored one by one."""
    part = Part(index="expert", piece=piece, pieces=pieces)
    return WeightRule(LAYER + "mlp.experts.{expert}." + name, LAYER + "mlp.experts." + target, "moe.expert", part=part)


_MOE = (
    _rule("mlp.gate.weight", "moe.router"),
    # Packed, as released, or one by one, as transformers saves them: the checkpoint decides.
    _rule("mlp.experts.gate_up_proj", "moe.expert"),
    _rule("mlp.experts.down_proj", "moe.expert"),
    _expert("gate_proj.weight", "gate_up_proj", piece=0, pieces=2),
    _expert("up_proj.weight", "gate_up_proj", piece=1, pieces=2),
    _expert("down_proj.weight", "down_proj"),
    _rule("mlp.shared_expert.gate_proj.weight", "mlp"),
    _rule("mlp.shared_expert.up_proj.weight", "mlp"),
    _rule("mlp.shared_expert.down_proj.weight", "mlp"),
    _rule("mlp.shared_expert_gate.weight", "moe.shared_gate"),
)


def _drops(config: Qwen35Config) -> tuple[Drop, ...]:
    drops = (
        Drop("model.visual.**", "vision tower: the bundle is text only"),
        Drop("mtp.**", "multi-token-prediction head: the contract decodes one token per step"),
    )
    beyond = range(len(config.layer_types), config.sliced_from or 0)
    return drops + tuple(Drop(f"model.layers.{layer}.**", "layer beyond the slice") for layer in beyond)
