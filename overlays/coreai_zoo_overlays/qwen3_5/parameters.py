"""Every parameter of the decoder, from the sizes alone: what `zoo plan` adds up without importing torch.

The modules in `decoder` are what is built; a build and a test compare these tables with them, name by name. One table
per module, in the module's own order.

Shapes: D hidden, V vocabulary, Hq query heads, Hkv key / value heads, Dh head width; of a GatedDeltaNet Hv value heads
of width Dv, C convolution channels, K taps; E experts, I feed-forward width.
"""

from __future__ import annotations

import math

from coreai_zoo.overlay import ParameterInfo

from .config import FULL, LINEAR, Qwen35Config

Shapes = dict[str, tuple[int, ...]]

# The decay's constants, fp32 in any decoder; see `gated_delta_net`.
_FLOAT32 = (".linear_attn.A", ".linear_attn.dt_bias")


def parameters(config: Qwen35Config, dtype: str) -> dict[str, ParameterInfo]:
    """Name, shape and dtype of every parameter of a decoder in `dtype`."""
    return {
        name: ParameterInfo(shape, "float32" if name.endswith(_FLOAT32) else dtype)
        for name, shape in _decoder(config).items()
    }


def stored_parameters(config: Qwen35Config) -> int:
    """Number of values in a checkpoint's text model, where a tied head is the embedding table and stored once."""
    shapes = _decoder(config)
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return sum(map(math.prod, shapes.values()))


def _decoder(config: Qwen35Config) -> Shapes:
    table = (config.vocab_size, config.hidden_size)  # [V, D]
    layers = {kind: _layer(config, kind) for kind in (LINEAR, FULL)}
    return {
        "model.embed_tokens.weight": table,
        **{
            f"model.layers.{index}.{name}": shape
            for index, kind in enumerate(config.layer_types)
            for name, shape in layers[kind].items()
        },
        "model.norm.weight": (config.hidden_size,),
        "lm_head.weight": table,
    }


def _layer(config: Qwen35Config, kind: str) -> Shapes:
    return {
        **(_inside("self_attn", _attention(config)) if kind == FULL else {}),
        **(_inside("linear_attn", _gated_delta_net(config)) if kind == LINEAR else {}),
        **_inside("mlp", _feed_forward(config)),
        "input_layernorm.weight": (config.hidden_size,),
        "post_attention_layernorm.weight": (config.hidden_size,),
    }


def _inside(module: str, shapes: Shapes) -> Shapes:
    return {f"{module}.{name}": shape for name, shape in shapes.items()}


def _attention(config: Qwen35Config) -> Shapes:
    width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "q_proj.weight": (2 * width, config.hidden_size),  # [2 Hq Dh, D]: queries and their gate
        "k_proj.weight": (kv_width, config.hidden_size),  # [Hkv Dh, D]
        "v_proj.weight": (kv_width, config.hidden_size),
        "o_proj.weight": (config.hidden_size, width),
        "q_norm.weight": (config.head_dim,),
        "k_norm.weight": (config.head_dim,),
    }


def _gated_delta_net(config: Qwen35Config) -> Shapes:
    heads = config.linear_num_value_heads
    return {
        "A": (heads,),
        "dt_bias": (heads,),
        "in_proj_qkv.weight": (config.conv_dim, config.hidden_size),  # [C, D]
        "in_proj_z.weight": (config.value_dim, config.hidden_size),  # [Hv Dv, D]
        "in_proj_b.weight": (heads, config.hidden_size),
        "in_proj_a.weight": (heads, config.hidden_size),
        "conv1d.weight": (config.conv_dim, config.linear_conv_kernel_dim),  # [C, K]
        "norm.weight": (config.linear_value_head_dim,),
        "out_proj.weight": (config.hidden_size, config.value_dim),
    }


def _feed_forward(config: Qwen35Config) -> Shapes:
    if config.moe is None:
        assert config.intermediate_size is not None  # read_config requires it of a dense model
        return _mlp(config.hidden_size, config.intermediate_size)
    moe = config.moe
    return {
        "gate.weight": (moe.num_experts, config.hidden_size),  # [E, D]
        "experts.gate_up_proj": (moe.num_experts, 2 * moe.intermediate_size, config.hidden_size),  # [E, 2I, D]
        "experts.down_proj": (moe.num_experts, config.hidden_size, moe.intermediate_size),  # [E, D, I]
        **_inside("shared_expert", _mlp(config.hidden_size, moe.shared_intermediate_size)),
        "shared_expert_gate.weight": (1, config.hidden_size),
    }


def _mlp(hidden_size: int, intermediate_size: int) -> Shapes:
    return {
        "gate_proj.weight": (intermediate_size, hidden_size),  # [I, D]
        "up_proj.weight": (intermediate_size, hidden_size),
        "down_proj.weight": (hidden_size, intermediate_size),
    }
