"""The text half of a `qwen3_5` or `qwen3_5_moe` config, checked.

Differs from transformers' `Qwen3_5TextConfig` in that it is one class for both: `moe` is None in a dense model, and
that is the only switch between them. Nothing is assumed about sizes; where `config.json` is silent, the defaults are
those of transformers' configuration classes.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from typing import Any

import attrs
from attrs import frozen

from coreai_zoo.errors import BadInput, listing

LINEAR, FULL = "linear_attention", "full_attention"

DENSE_MODEL_TYPES = ("qwen3_5", "qwen3_5_text")
MOE_MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
MODEL_TYPES = DENSE_MODEL_TYPES + MOE_MODEL_TYPES


@frozen
class MoEConfig:
    """Sizes of the sparse feed-forward: `num_experts` of width `intermediate_size`, `top_k` of them active."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int


@frozen
class Qwen35Config:
    """Everything that the decoder is built from; attribute names are those of `config.json` where it has one."""

    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rotary_dim: int

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    intermediate_size: int | None
    moe: MoEConfig | None
    sliced_from: int | None = None

    @property
    def key_dim(self) -> int:
        """Width of all key (and of all query) heads of a GatedDeltaNet."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of all value heads of a GatedDeltaNet."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: queries, keys and values side by side."""
        return 2 * self.key_dim + self.value_dim

    @property
    def linear_layers(self) -> int:
        """Number of GatedDeltaNet layers."""
        return self.layer_types.count(LINEAR)

    @property
    def full_layers(self) -> int:
        """Number of softmax-attention layers."""
        return self.layer_types.count(FULL)


class _Reader:
    """Reads typed fields out of a config and collects every complaint, so that they are reported together."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.problems: list[str] = []

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; `default` where the config is silent, required if there is none."""
        value = self.fields.get(name, default)
        value = default if value is None else value
        if value is None:
            self.problems.append(f"{name} is missing")
        elif not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            self.problems.append(f"{name} is {reprlib.repr(value)}, not a positive integer")
        else:
            return value
        return 1

    def number(
        self, name: str, default: float, fields: Mapping[str, Any] | None = None, largest: float = sys.float_info.max
    ) -> float:
        """A positive number, at most `largest`."""
        value = (self.fields if fields is None else fields).get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= largest:
            limit = "" if largest == sys.float_info.max else f" of at most {largest:g}"
            self.problems.append(f"{name} is {reprlib.repr(value)}, not a positive number{limit}")
            return default
        return float(value)

    def divides(self, small: str, large: str) -> None:
        """Require that one field is a multiple of another; sizes that are no sizes have been complained about."""
        small_size, large_size = self.fields.get(small), self.fields.get(large)
        if isinstance(small_size, int) and isinstance(large_size, int) and small_size > 0 and large_size % small_size:
            self.problems.append(f"{large} ({large_size}) is not a multiple of {small} ({small_size})")

    def only(self, name: str, allowed: Any) -> None:
        """Refuse a variant that the overlay does not implement."""
        if self.fields.get(name) not in (allowed, None):
            self.problems.append(f"{name} is {reprlib.repr(self.fields[name])}; only {allowed!r} is implemented")


def text_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The text config, whether wrapped (`text_config`) or flat."""
    text = hf_config.get("text_config")
    if text is None and ("text_config" not in hf_config or "hidden_size" in hf_config):
        text = hf_config
    if not isinstance(text, Mapping):
        raise BadInput("text_config in config.json is not an object.")
    # Released wrappers carry the tie flag at the top; a text config's own wins. Null is silence.
    tied = text.get("tie_word_embeddings")
    tied = hf_config.get("tie_word_embeddings") if tied is None else tied
    return {**text, "tie_word_embeddings": False if tied is None else tied}


def read_config(hf_config: Mapping[str, Any]) -> Qwen35Config:
    """Parse and check `config.json`, wrapped or flat, dense or MoE.

    Raises:
        BadInput: naming every field that is missing, ill-typed, inconsistent or not implemented.
    """
    fields = text_fields(hf_config)
    read = _Reader(fields)
    read.only("hidden_act", "silu")
    read.only("attention_bias", False)
    read.only("attn_output_gate", True)
    if not isinstance(fields["tie_word_embeddings"], bool):
        read.problems.append(f"tie_word_embeddings is {reprlib.repr(fields['tie_word_embeddings'])}, not true or false")
    read.divides("num_key_value_heads", "num_attention_heads")
    read.divides("linear_num_key_heads", "linear_num_value_heads")
    head_dim = read.size("head_dim", 256)
    is_moe = hf_config.get("model_type") in MOE_MODEL_TYPES
    config = Qwen35Config(
        vocab_size=read.size("vocab_size"),
        hidden_size=read.size("hidden_size"),
        layer_types=_layer_types(read),
        max_position_embeddings=read.size("max_position_embeddings", 32768),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(fields["tie_word_embeddings"]),
        num_attention_heads=read.size("num_attention_heads"),
        num_key_value_heads=read.size("num_key_value_heads"),
        head_dim=head_dim,
        rope_theta=read.number("rope_theta", 10_000.0, _rope_fields(read)),
        rotary_dim=_rotary_dim(read, head_dim),
        linear_num_key_heads=read.size("linear_num_key_heads"),
        linear_num_value_heads=read.size("linear_num_value_heads"),
        linear_key_head_dim=read.size("linear_key_head_dim", 128),
        linear_value_head_dim=read.size("linear_value_head_dim", 128),
        linear_conv_kernel_dim=_kernel_size(read),
        intermediate_size=None if is_moe else read.size("intermediate_size"),
        moe=_moe(read) if is_moe else None,
        sliced_from=fields.get("zoo_sliced_from"),
    )
    if read.problems:
        problems = list(dict.fromkeys(read.problems))  # a field that is read twice is wrong once
        raise BadInput(f"This {hf_config.get('model_type')} config cannot be used: {listing(problems, 40)}.")
    return config


def _layer_types(read: _Reader) -> tuple[str, ...]:
    """`layer_types` as given, or every `full_attention_interval`-th layer with full attention."""
    layers = read.size("num_hidden_layers")
    if layers > 1_000:
        read.problems.append(f"num_hidden_layers is {layers}")
        return (LINEAR, FULL)
    given = read.fields.get("layer_types")
    if given is None:
        interval = read.size("full_attention_interval", 4)
        given = [LINEAR if (index + 1) % interval else FULL for index in range(layers)]
    if not isinstance(given, list | tuple) or any(kind not in (LINEAR, FULL) for kind in given):
        read.problems.append(f"layer_types holds something other than {LINEAR} and {FULL}")
        return (LINEAR, FULL)
    if len(given) != layers:
        read.problems.append(f"layer_types has {len(given)} entries for num_hidden_layers {layers}")
    for kind in (LINEAR, FULL):
        if kind not in given:
            read.problems.append(f"no layer is a {kind} layer, and the contract's states need at least one of each")
    return tuple(given)


def _rope_fields(read: _Reader) -> Mapping[str, Any]:
    """RoPE settings: `rope_parameters`, or the older flat keys."""
    rope = read.fields.get("rope_parameters") or read.fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        read.problems.append("rope_parameters is not an object")
        return {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        read.problems.append("rope_parameters differ by layer type, which is not implemented")
        return {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        read.problems.append(f"rope_type is {reprlib.repr(kind)}; only 'default' is implemented")
    return {**read.fields, **rope}


def _rotary_dim(read: _Reader, head_dim: int) -> int:
    """How many leading dimensions of a head are rotated: `partial_rotary_factor` of them."""
    rotary_dim = int(head_dim * read.number("partial_rotary_factor", 0.25, _rope_fields(read), largest=1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        read.problems.append(f"partial_rotary_factor rotates {rotary_dim} of {head_dim} dimensions")
    return rotary_dim


def _kernel_size(read: _Reader) -> int:
    """Taps of the causal convolution; one fewer are carried as state, so there must be two."""
    size = read.size("linear_conv_kernel_dim", 4)
    if size < 2:
        read.problems.append("linear_conv_kernel_dim is 1: such a model has no convolution state")
    return size


def _moe(read: _Reader) -> MoEConfig:
    """The sparse feed-forward's sizes."""
    moe = MoEConfig(
        num_experts=read.size("num_experts"),
        top_k=read.size("num_experts_per_tok"),
        intermediate_size=read.size("moe_intermediate_size"),
        shared_intermediate_size=read.size("shared_expert_intermediate_size"),
    )
    if moe.top_k > moe.num_experts:
        read.problems.append(f"num_experts_per_tok ({moe.top_k}) is more than num_experts ({moe.num_experts})")
    return moe


def with_layers(hf_config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config of a slice that keeps the first `layers` layers, wrapped or flat as it was given.

    Raises:
        BadInput: when the slice would not have a layer of each kind, or is not shorter.
    """
    config = read_config(hf_config)
    total = len(config.layer_types)
    shortest = max(config.layer_types.index(kind) for kind in (LINEAR, FULL)) + 1
    if not shortest <= layers < total:
        sizes = f"{shortest} to {total - 1}" if shortest < total else "none"
        raise BadInput(
            f"A slice of {layers} layers is not possible: this checkpoint has {total} layers, and a slice has fewer, "
            f"with at least one {LINEAR} and one {FULL} layer among them (possible here: {sizes})."
        )
    text = {
        **text_fields(hf_config),
        "num_hidden_layers": layers,
        "layer_types": list(config.layer_types[:layers]),
        "zoo_sliced_from": total,
    }
    return {**hf_config, "text_config": text} if "text_config" in hf_config else text


# ---------------------------------------------------------------------------------------------------------------------
# Facts: what an entry states of a model and a card prints
# ---------------------------------------------------------------------------------------------------------------------

# Fact to the field of config.json that holds it; layer counts and rotary_dim are derived.
_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "max_context_length": "max_position_embeddings",
    "tied_head": "tie_word_embeddings",
    "attention_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "gdn_key_heads": "linear_num_key_heads",
    "gdn_value_heads": "linear_num_value_heads",
    "gdn_key_head_dim": "linear_key_head_dim",
    "gdn_value_head_dim": "linear_value_head_dim",
    "conv_kernel": "linear_conv_kernel_dim",
}
_DENSE_FIELDS = {"intermediate_size": "intermediate_size"}
_MOE_FIELDS = {
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_intermediate_size": "moe_intermediate_size",
    "shared_expert_intermediate_size": "shared_expert_intermediate_size",
}
_OPTIONAL_FACTS = {"max_context_length"}


def facts_of(config: Qwen35Config) -> dict[str, Any]:
    """The facts of a config."""
    flat = {
        **attrs.asdict(config, recurse=False),
        "num_hidden_layers": len(config.layer_types),
        **({} if config.moe is None else _moe_fields(config.moe)),
    }
    names = {**_FIELDS, **(_DENSE_FIELDS if config.moe is None else _MOE_FIELDS)}
    return {
        "ffn": "dense" if config.moe is None else "moe",
        **{fact: flat[name] for fact, name in names.items()},
        "linear_attention_layers": config.linear_layers,
        "full_attention_layers": config.full_layers,
        "rotary_dim": config.rotary_dim,
    }


def _moe_fields(moe: MoEConfig) -> dict[str, int]:
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "shared_expert_intermediate_size": moe.shared_intermediate_size,
    }


def config_of_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A wrapped `config.json` of the model that `facts` describes; full attention comes at regular intervals.

    Raises:
        BadInput: naming the facts that are not known.
    """
    moe = facts.get("ffn") == "moe"
    names = {**_FIELDS, **(_MOE_FIELDS if moe else _DENSE_FIELDS)}
    needed = [*names, "full_attention_layers", "rotary_dim"]
    unknown = [fact for fact in needed if fact not in facts and fact not in _OPTIONAL_FACTS]
    if unknown:
        raise BadInput(f"No config follows from these facts: {listing(unknown)} not known.")
    text = {name: facts[fact] for fact, name in names.items() if fact in facts}
    text |= {
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
        "full_attention_interval": facts["layers"] // facts["full_attention_layers"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": facts["rotary_dim"] / facts["head_dim"],
            # Three planes that share the rotated pairs; equal for text, so only their sum matters.
            "mrope_section": _thirds(facts["rotary_dim"] // 2),
            "mrope_interleaved": True,
        },
    }
    wrapper = "qwen3_5_moe" if moe else "qwen3_5"
    return {"model_type": wrapper, "text_config": text, "tie_word_embeddings": facts["tied_head"]}


def _thirds(pairs: int) -> list[int]:
    return [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3]
