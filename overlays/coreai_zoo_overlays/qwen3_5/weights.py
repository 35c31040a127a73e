"""Every parameter of the decoder, as one table: its shape, its role, and the checkpoint tensor that fills it.

Differs from transformers in that this is told apart from the layers: `parameters` answers what `zoo plan` adds up
without importing torch, `weight_map` what a build reads. A build and a test compare the table with the decoder, name by
name, so each module's rows stand in the module's own order.

Names are those of a flat checkpoint. Three things change values or shapes: RMSNorm gains are stored minus one (but not
the gated output norm of a gated delta net), the decay is stored as a logarithm, and the convolution has one axis more.

Shapes: D hidden, V vocabulary, Hq query heads, Hkv key / value heads, Dh head width; of a gated delta net Hv value
heads of width Dv, C convolution channels, K taps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from coreai_zoo.overlay import Drop, ParameterInfo, Prefix, WeightMap, WeightRule

from .config import FULL, LINEAR, Qwen35Config
from .table import MINUS_EXP, ONE_PLUS, ROLES, Row, below

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# The released checkpoints put the text model under model.language_model. The others come from saving a part of a model,
# or a model inside of another one. transformers adds or takes off one `model.` (its `base_model_prefix`) by itself.
PREFIXES = (
    Prefix("model.language_model.", "model."),
    Prefix("model.model.language_model.", "model.", "a wrapper around the multimodal model"),
    Prefix("model.language_model.model.", "model.", "a wrapper of the multimodal model around the causal one"),
    Prefix("model.model.", "model.", "a wrapper around the causal model"),
    Prefix("language_model.model.", "model.", "a multimodal wrapper around the causal model"),
    Prefix("language_model.", "model.", "the multimodal model without its head"),
    Prefix("language_model.lm_head.", "lm_head.", "a multimodal wrapper around the causal model"),
    Prefix("model.language_model.lm_head.", "lm_head.", "a wrapper of the multimodal model around the causal one"),
    Prefix("", "model.", "the text model without its head"),
    Prefix("model.", "", "a wrapper around the causal model"),
)


def parameters(config: Qwen35Config, dtype: str) -> dict[str, ParameterInfo]:
    """Name, shape and dtype of every parameter of a decoder in `dtype`."""
    rows = _decoder(config, enumerate(config.layer_types))
    return {row.name: ParameterInfo(row.shape, "float32" if row.float32 else dtype) for row in rows}


def weight_map(config: Qwen35Config) -> WeightMap:
    """Which checkpoint tensor fills which parameter, and what is left out: one rule stands for all layers of a kind."""
    rows = _decoder(config, (("{layer}", LINEAR), ("{layer}", FULL)))
    rules = dict.fromkeys(rule for row in rows for rule in row.rules())  # layers of both kinds have some in common
    tied = _TIED if config.tie_word_embeddings else ()
    return WeightMap((*rules, *tied), _drops(config), PREFIXES, roles=ROLES)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def _decoder(config: Qwen35Config, layers: Iterable[tuple[int | str, str]]) -> Iterator[Row]:
    """The whole decoder with these `layers`, each an index (or what stands for it in a pattern) and a kind."""
    vocabulary = (config.vocab_size, config.hidden_size)  # [V, D]
    rows = {kind: _layer(config, kind) for kind in (LINEAR, FULL)}
    yield Row(EMBEDDING, vocabulary, "embedding")
    for index, kind in layers:
        yield from below(f"model.layers.{index}", rows[kind])
    yield Row("model.norm.weight", (config.hidden_size,), "norm", ONE_PLUS)
    yield Row(LM_HEAD, vocabulary, "head")


def _layer(config: Qwen35Config, kind: str) -> tuple[Row, ...]:
    mixer, rows = ("self_attn", _attention) if kind == FULL else ("linear_attn", _gated_delta_net)
    return (
        *below(mixer, rows(config)),
        *below("mlp", config.feed_forward.rows(config.hidden_size)),
        Row("input_layernorm.weight", (config.hidden_size,), "norm", ONE_PLUS),
        Row("post_attention_layernorm.weight", (config.hidden_size,), "norm", ONE_PLUS),
    )


def _attention(config: Qwen35Config) -> tuple[Row, ...]:
    hidden, head = config.hidden_size, config.head_dim
    width, kv_width = config.num_attention_heads * head, config.num_key_value_heads * head
    return (
        Row("q_proj.weight", (2 * width, hidden), "attention"),  # [2 Hq Dh, D]: queries and their gate
        Row("k_proj.weight", (kv_width, hidden), "attention"),  # [Hkv Dh, D]
        Row("v_proj.weight", (kv_width, hidden), "attention"),
        Row("o_proj.weight", (hidden, width), "attention"),
        Row("q_norm.weight", (head,), "norm", ONE_PLUS),
        Row("k_norm.weight", (head,), "norm", ONE_PLUS),
    )


def _gated_delta_net(config: Qwen35Config) -> tuple[Row, ...]:
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    convolution = (config.conv_dim, config.linear_conv_kernel_dim)  # [C, K]
    return (
        # The decay's constants are fp32 in any decoder; see `gated_delta_net`.
        Row("A", (heads,), "scalar", MINUS_EXP, source="A_log", float32=True),  # [Hv]
        Row("dt_bias", (heads,), "scalar", float32=True),
        Row("in_proj_qkv.weight", (config.conv_dim, hidden), "gdn.in"),  # [C, D]
        Row("in_proj_z.weight", (config.value_dim, hidden), "gdn.in"),  # [Hv Dv, D]
        Row("in_proj_b.weight", (heads, hidden), "gdn.in"),
        Row("in_proj_a.weight", (heads, hidden), "gdn.in"),
        Row("conv1d.weight", convolution, "gdn.conv", source_shape=_depthwise),
        Row("norm.weight", (config.linear_value_head_dim,), "norm"),  # [Dv]
        Row("out_proj.weight", (hidden, config.value_dim), "gdn.out"),
    )


def _depthwise(shape: tuple[int, ...]) -> tuple[int, ...]:
    channels, taps = shape
    return channels, 1, taps


# A tied checkpoint stores one of the two. Where it stores both, transformers uses both, and so do we.
_TIED = (
    WeightRule(EMBEDDING, LM_HEAD, "head", fallback=True),
    WeightRule(LM_HEAD, EMBEDDING, "embedding", fallback=True),
)


# Parts of a released checkpoint that a bundle does not have, under each name of the multimodal model's class.
_EXTRAS = {
    "model.visual.**": "vision tower: the bundle is text only",
    "mtp**": "multi-token-prediction head: the contract decodes one token per step",
    "model.mtp.**": "multi-token-prediction head: the contract decodes one token per step",
}

# Older versions of transformers, and other trainers, store these buffers; transformers ignores them.
_ROTARY = ("model.rotary_emb.**", "model.layers.{layer}.self_attn.rotary_emb.**", "model.layers.{layer}.rotary_emb.**")


def _drops(config: Qwen35Config) -> tuple[Drop, ...]:
    beyond = range(config.num_hidden_layers, config.sliced_from or 0)
    return (
        *(Drop(source, reason) for source, reason in _EXTRAS.items()),
        *(Drop(source, "rotary embedding: its frequencies follow from the config", noted=True) for source in _ROTARY),
        *(Drop(f"model.layers.{layer}.**", "layer beyond the slice") for layer in beyond),
    )
