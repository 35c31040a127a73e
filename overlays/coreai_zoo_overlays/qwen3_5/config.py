"""The text half of a `qwen3_5` or `qwen3_5_moe` config, checked.

Differs from transformers' `Qwen3_5TextConfig` and `Qwen3_5MoeTextConfig` in that it is one class for both, since the
models differ in nothing but `feed_forward`. Nothing is assumed about sizes; where `config.json` is silent, the defaults
are those of transformers' configuration classes. tests/test_config.py holds every spelling against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from coreai_zoo.errors import BadInput, listing

from .dense_or_moe import FeedForward, kind_of
from .reader import Reader, shown, text_fields
from .yarn import Yarn, read_yarn

LINEAR, FULL = "linear_attention", "full_attention"


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
    yarn: Yarn | None

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    feed_forward: FeedForward
    sliced_from: int | None = None

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of both kinds."""
        return len(self.layer_types)

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


def read_config(hf_config: Mapping[str, Any]) -> Qwen35Config:
    """Parse and check `config.json`, wrapped or flat, dense or MoE.

    Raises:
        BadInput: naming every field that is missing, ill-typed, inconsistent or not implemented.
    """
    fields = text_fields(hf_config)
    read = Reader(fields)
    read.only("hidden_act", "silu")
    read.only("attention_bias", False)
    read.only("attn_output_gate", True)
    if not isinstance(fields["tie_word_embeddings"], bool):
        read.problems.append(f"tie_word_embeddings is {shown(fields['tie_word_embeddings'])}, not true or false")
    read.divides("num_key_value_heads", "num_attention_heads")
    read.divides("linear_num_key_heads", "linear_num_value_heads")
    head_dim, rope = read.size("head_dim", 256), _rope(read)
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
        rope_theta=read.number("rope_theta", 10_000.0, rope),
        rotary_dim=_rotary_dim(read, head_dim, rope),
        yarn=read_yarn(read, rope) if rope["rope_type"] == "yarn" else None,
        linear_num_key_heads=read.size("linear_num_key_heads"),
        linear_num_value_heads=read.size("linear_num_value_heads"),
        linear_key_head_dim=read.size("linear_key_head_dim", 128),
        linear_value_head_dim=read.size("linear_value_head_dim", 128),
        linear_conv_kernel_dim=_kernel_size(read),
        feed_forward=kind_of(hf_config.get("model_type")).read(read),
        sliced_from=fields.get("zoo_sliced_from"),
    )
    if read.problems:
        problems = list(dict.fromkeys(read.problems))  # a field that is read twice is wrong once
        raise BadInput(f"This {hf_config.get('model_type')} config cannot be used: {listing(problems, 40)}.")
    return config


def _layer_types(read: Reader) -> tuple[str, ...]:
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


def _rope(read: Reader) -> Mapping[str, Any]:
    """The settings of the rotary embedding, as transformers' `convert_rope_params_to_dict` leaves them.

    The older `rope_scaling` replaces all of `rope_parameters`; keys beside them stand in for what it does not say.
    """
    name = "rope_scaling" if read.fields.get("rope_scaling") else "rope_parameters"
    given = read.fields.get(name) or {}
    silent: dict[str, Any] = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25, "rope_type": "default"}
    if not isinstance(given, Mapping):
        read.problems.append(f"{name} is not an object")
        return silent
    if {LINEAR, FULL} & set(given) or any(isinstance(value, Mapping) for value in given.values()):
        read.problems.append(f"{name} differs by layer type, which is not implemented")
        return silent
    beside = {key: read.fields[key] for key in ("rope_theta", "partial_rotary_factor") if key in read.fields}
    if beside.get("partial_rotary_factor", 1.0) is None:  # null: transformers then rotates whole heads
        beside["partial_rotary_factor"] = 1.0
    rope = {**silent, **beside, "rope_type": given.get("type", "default"), **given}
    if rope["rope_type"] not in ("default", "yarn"):
        read.problems.append(f"rope_type is {shown(rope['rope_type'])}; only 'default' and 'yarn' are implemented")
    return rope


def _rotary_dim(read: Reader, head_dim: int, rope: Mapping[str, Any]) -> int:
    """How many leading dimensions of a head are rotated: `partial_rotary_factor` of them."""
    rotary_dim = int(head_dim * read.number("partial_rotary_factor", 0.25, rope, largest=1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        read.problems.append(f"partial_rotary_factor rotates {rotary_dim} of {head_dim} dimensions")
    return rotary_dim


def _kernel_size(read: Reader) -> int:
    """Taps of the causal convolution; one fewer are carried as state, so there must be two."""
    size = read.size("linear_conv_kernel_dim", 4)
    if size < 2:
        read.problems.append("linear_conv_kernel_dim is 1: such a model has no convolution state")
    return size


def with_layers(hf_config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config of a slice that keeps the first `layers` layers, wrapped or flat as it was given.

    Raises:
        BadInput: when the slice would not have a layer of each kind, or is not shorter.
    """
    config = read_config(hf_config)
    total = config.num_hidden_layers
    shortest = max(config.layer_types.index(kind) for kind in (LINEAR, FULL)) + 1
    if not shortest <= layers < total:
        sizes = f"{shortest} to {total - 1}" if shortest < total else "none"
        raise BadInput(
            f"A slice of {layers} layers is not possible: this checkpoint has {total} layers, and a slice has fewer, "
            f"with at least one {LINEAR} and one {FULL} layer among them (possible here: {sizes})."
        )
    cut = {
        "num_hidden_layers": layers,
        "layer_types": list(config.layer_types[:layers]),
        "zoo_sliced_from": total,
    }
    if "text_config" in hf_config:
        return {**hf_config, "text_config": {**hf_config["text_config"], **cut}}
    return {**hf_config, **cut}
