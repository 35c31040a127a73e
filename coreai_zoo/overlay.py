"""What an overlay tells the host: the vocabulary shared by hooks, plugins and the pipeline.

An overlay is a model's decoder re-authored for export, with everything that the host must know to convert it: which
states a step mutates, which checkpoint tensor fills which parameter, and how the head is quantized. These are plain
frozen data; nothing here imports torch at run time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from attrs import field, frozen
from attrs.validators import deep_iterable, ge, in_, max_len, min_len

if TYPE_CHECKING:
    import torch
    from torch import nn

    from coreai_zoo.contracts import Contract

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"float16": 2, "float32": 4, "bfloat16": 2, "int32": 4})
"""Bytes per element of every dtype that an input, a state, an output or a parameter can have."""

DTYPES = tuple(DTYPE_BYTES)

STORED_DTYPES = ("float16", "float32")
"""Dtypes that an unquantized weight can be stored in."""

ROLES = {
    "embedding": "token embedding table",
    "head": "output projection to the vocabulary",
    "attention": "q, k, v and o projections of softmax attention",
    "gdn.in": "input projections of a gated delta net",
    "gdn.out": "output projection of a gated delta net",
    "gdn.conv": "depthwise causal convolution of a gated delta net",
    "mlp": "dense feed-forward projections, a shared expert's included",
    "moe.expert": "routed experts",
    "moe.router": "router",
    "moe.shared_gate": "gate of the shared expert",
    "norm": "normalisation gains",
    "scalar": "per-head decays, biases and other small vectors",
}
"""Every role that a weight can have, and what it means. A recipe decides each of them."""


# ---------------------------------------------------------------------------------------------------------------------
# Signature of the exported function
# ---------------------------------------------------------------------------------------------------------------------


def _shape(sizes: Iterable[int | str]) -> tuple[int | str, ...]:
    return tuple(sizes)


def _positive_or_axis(_instance: object, attribute: Any, shape: tuple[int | str, ...]) -> None:
    for size in shape:
        if not (isinstance(size, str) and size) and not (isinstance(size, int) and size > 0):
            raise ValueError(f"{attribute.name} holds {size!r}: a size is a positive integer or the name of an axis")


@frozen
class TensorSpec:
    """A named input or output.

    Attributes:
        name: the name in the bundle.
        shape: one entry per dimension, an integer or the name of a dynamic axis.
        dtype: one of `DTYPES`.
    """

    name: str = field(validator=min_len(1))
    shape: tuple[int | str, ...] = field(converter=_shape, validator=_positive_or_axis)
    dtype: str = field(validator=in_(DTYPES))


def _engine_safe_name(instance: StateSpec, _attribute: Any, name: str) -> None:
    if not name:
        raise ValueError("a state needs a name")
    # Engines take any state with "cache" or "kv" in its name for a truncatable cache (rules of the pipelined engine).
    if instance.kind == "fixed" and re.search("cache|kv", name, re.IGNORECASE):
        raise ValueError(f"fixed state {name!r} must not have 'cache' or 'kv' in its name: engines would truncate it")


@frozen
class StateSpec(TensorSpec):
    """A tensor that a step mutates and the engine carries to the next step.

    Attributes:
        kind: `kv_cache` holds something of every position: it grows along its one dynamic axis, or has none where the
            contract fixes the context; `fixed` has a static shape and is zeroed at reset.
    """

    kind: Literal["kv_cache", "fixed"] = field(default="fixed", validator=in_(("kv_cache", "fixed")))
    dtype: str = field(default="float16", validator=in_(DTYPES))
    name: str = field(kw_only=True, validator=_engine_safe_name)

    def __attrs_post_init__(self) -> None:
        dynamic = [size for size in self.shape if isinstance(size, str)]
        if len(dynamic) > (1 if self.kind == "kv_cache" else 0):
            raise ValueError(f"state {self.name!r} is a {self.kind} and has dynamic axes {dynamic}")


@frozen
class Axis:
    """Range of a dynamic axis, both ends included, and the size to trace with."""

    minimum: int = field(validator=ge(1))
    maximum: int
    example: int

    def __attrs_post_init__(self) -> None:
        if not self.minimum <= self.example <= self.maximum:
            raise ValueError(f"axis needs minimum <= example <= maximum, got {self}")


@frozen
class TraceSpec:
    """The signature of one exported function, checked before anything is traced.

    Raises:
        ValueError: for duplicate names, an axis without a range, or a range that no tensor uses.
    """

    inputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, Axis]

    def __attrs_post_init__(self) -> None:
        names = [spec.name for spec in (*self.inputs, *self.states, *self.outputs)]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"the function names {', '.join(duplicates)} more than once")
        used = {size for spec in (*self.inputs, *self.states) for size in spec.shape if isinstance(size, str)}
        if used != set(self.axes):
            raise ValueError(f"tensors use the axes {sorted(used)} but ranges are given for {sorted(self.axes)}")


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class ParameterInfo:
    """Shape and dtype of a parameter of the decoder.

    Attributes:
        shape: sizes; `()` is a scalar.
        dtype: one of `STORED_DTYPES`, what an unquantized weight is stored in.
    """

    shape: tuple[int, ...] = field(validator=deep_iterable(ge(1)))
    dtype: str = field(validator=in_(STORED_DTYPES))


# ---------------------------------------------------------------------------------------------------------------------
# Layer rewrites
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class LayerRewrite:
    """Replaces every module whose dotted path matches `pattern` by `apply(module)`.

    Attributes:
        name: short, for reports and for the error when two rewrites meet on one layer.
        pattern: shell-style pattern on the module path, for example `model.layers.*.linear_attn`.
        reason: why the contract needs it, one sentence.
        apply: takes the module, returns its replacement; parameters keep their values and dtypes.
    """

    name: str
    pattern: str
    reason: str
    apply: Callable[[nn.Module], nn.Module]


# ---------------------------------------------------------------------------------------------------------------------
# Weight map
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Transform:
    """A named change of values on the way from checkpoint to parameter.

    Attributes:
        name: what it does, for reports.
        apply: maps a block of rows, float32 [rows, columns], to float32 [rows, columns]; must not look across rows.
    """

    name: str
    apply: Callable[[torch.Tensor], torch.Tensor]


@frozen
class Part:
    """Says that a source fills only a slab of its target: one expert, and one of several equal pieces of its rows.

    Attributes:
        index: which placeholder of the source pattern is the position along the target's axis 0.
        piece: which piece of axis 1, from 0.
        pieces: how many equal pieces axis 1 has.
    """

    index: str
    piece: int = 0
    pieces: int = 1


@frozen
class WeightRule:
    """One row of the table: checkpoint key to parameter.

    A key and a parameter are dotted names in which `{name}` stands for one number, the same on both sides.

    Attributes:
        source: pattern of the checkpoint key, after `WeightMap.prefixes`.
        target: pattern of the parameter of the overlay's decoder.
        role: one of `ROLES`.
        transform: change of values, or None.
        source_shape: the checkpoint's shape from the parameter's, when they hold the same rows in another shape.
        part: which slab of the target this source fills, or None for all of it.
        fallback: take this source only when no other rule fills the target.
    """

    source: str
    target: str
    role: str = field(validator=in_(ROLES))
    transform: Transform | None = None
    source_shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None
    part: Part | None = None
    fallback: bool = False


@frozen
class Drop:
    """Checkpoint keys that are left out, and why.

    Attributes:
        source: pattern of the key; `{name}` stands for a number and a trailing `**` for the rest of the key.
        reason: one phrase, printed in the build report.
    """

    source: str
    reason: str = field(validator=min_len(1))


@frozen
class WeightMap:
    """The whole table. A key that no rule takes and no drop names is an error, as is an unfilled parameter.

    Attributes:
        rules: keys to parameters. One key may fill several parameters.
        drops: keys to leave out.
        prefixes: alternative spellings of the start of a key, rewritten before matching: (as found, as in the rules).
    """

    rules: tuple[WeightRule, ...]
    drops: tuple[Drop, ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# Quantization
# ---------------------------------------------------------------------------------------------------------------------


def _block(_instance: object, _attribute: Any, size: object) -> None:
    if size is not None and (not isinstance(size, int) or size < 2):
        raise ValueError(f"a block has at least 2 inputs, not {size!r}")


@frozen
class QuantizationSpec:
    """How a weight is stored: integers of `dtype` in blocks of `block_size` along the last axis, one scale per block.

    Attributes:
        dtype: `int4`, `int8`, `uint4` or `uint8`.
        scheme: `symmetric` uses the whole integer range; `symmetric_with_clipping` not its lowest signed integer,
            so that both signs have as many; `asymmetric` has a zero point. Names and arithmetic are coreai-opt's.
        block_size: inputs per scale; None for one scale per row ("per channel").
    """

    dtype: Literal["int4", "int8", "uint4", "uint8"] = field(validator=in_(("int4", "int8", "uint4", "uint8")))
    scheme: Literal["symmetric", "symmetric_with_clipping", "asymmetric"] = field(
        validator=in_(("symmetric", "symmetric_with_clipping", "asymmetric"))
    )
    block_size: int | None = field(default=32, validator=_block)

    @property
    def bits(self) -> int:
        """Bits per integer: 4 or 8."""
        return int(self.dtype.lstrip("uint"))

    @property
    def signed(self) -> bool:
        """Whether the integers are signed."""
        return not self.dtype.startswith("u")

    def __str__(self) -> str:
        blocks = "per channel" if self.block_size is None else f"block {self.block_size}"
        return f"{self.dtype} {blocks} {self.scheme}"


@frozen
class HeadQuantization:
    """How the output projection is quantized when the recipe quantizes the head, and why.

    Attributes:
        spec: the policy.
        reason: in words, for the card and the build record.
    """

    spec: QuantizationSpec
    reason: str = field(validator=[min_len(1), max_len(500)])


# ---------------------------------------------------------------------------------------------------------------------
# The overlay itself
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class KVCache:
    """Geometry of the growing key / value pair: both are [layers, 1, heads, T, head_dim]."""

    layers: int = field(validator=ge(1))
    heads: int = field(validator=ge(1))
    head_dim: int = field(validator=ge(1))


@runtime_checkable
class LayeredDecoder(Protocol):
    """A decoder that can also be run one layer at a time, so that a model of any size is gated in the memory of one.

    A decoder need not offer this; the candidate `torch` needs it. The steps compute what `forward` computes:

        x = embed(input_ids)
        for index in range(len(layer_paths)): x = layer(index, x, position_ids, states)
        logits = head(x)

    The host runs a layer over all tokens of a prompt, one call after the other in their order, before it goes on to the
    next layer. So a layer writes its part of the states at once, where `forward` may wait until the end of the step.
    Parameters are filled before the step that uses them and emptied after it; those with the roles `embedding` and
    `head` hold only some of their rows, the ids being numbered accordingly and the logits being those of these rows.
    """

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Module path of each layer, in order. A layer's parameters are all below its path and used by it alone."""

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids` int32 [1, S] to [1, S, D]."""

    def layer(
        self, index: int, x: torch.Tensor, position_ids: torch.Tensor, states: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """[1, S, D] to [1, S, D] by one layer.

        Args:
            index: which.
            x: output of the layer before.
            position_ids: int32 [1, T], as the decoder takes them: the S tokens are the last of T; with a fixed context
                they are all of T.
            states: all states in the order of the trace spec; the layer mutates its part in place.
        """

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """[1, S, D] after the last layer to logits [1, S, rows of the head]."""


@runtime_checkable
class Overlay(Protocol):
    """A decoder re-authored for export, for one family of architectures.

    `config` objects are the overlay's own; the host only hands them back.
    """

    @property
    def name(self) -> str:
        """Short name, for example `qwen3_5`."""

    def read_config(self, hf_config: Mapping[str, Any]) -> Any:
        """Parse and check a Hugging Face `config.json`.

        Raises:
            BadInput: naming every field that is missing, ill-typed or out of range.
        """

    def facts(self, config: Any) -> Mapping[str, Any]:
        """What the host and an entry need to know of a config.

        Required: `vocab_size`, `layers`, `max_context_length` (int) and `ffn` (str, for example `dense` or `moe`);
        where weights have the role `moe.expert`, also `experts` and `experts_per_token` (int). Anything further is
        compared with the entry's facts and printed in the card.
        """

    def kv_cache(self, config: Any) -> KVCache:
        """Geometry of the key / value pair."""

    def decoder(self, config: Any, contract: Contract) -> nn.Module:
        """The decoder, uninitialised, called as `decoder(input_ids, position_ids, *states)` and returning the logits.

        States come in the order of the trace spec and are mutated in place. Parameters are created in the dtype that
        an unquantized weight is stored in; the caller decides the device (the host uses `meta`).
        """

    def config_of_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """A `config.json` with the sizes that `facts` states: what an entry's checkpoint looks like, without one.

        Raises:
            BadInput: naming the facts that are not known.
        """

    def with_layers(self, hf_config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """The config of a slice that keeps the first `layers` layers.

        Raises:
            BadInput: when a slice of that depth is not a model.
        """


@runtime_checkable
class TellsParameters(Protocol):
    """An overlay that tells its decoder's parameters without building it, so that `zoo plan` answers without torch.

    A build compares what is told with the decoder itself. An overlay without this is planned too, only slower.
    """

    def parameters(self, config: Any, contract: Contract) -> Mapping[str, ParameterInfo]:
        """Every parameter of `Overlay.decoder(config, contract)` by name, before any layer rewrite."""
