"""What a function of a bundle takes, keeps and gives: names, shapes and dtypes, checked before anything is traced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from attrs import field, frozen
from attrs.validators import ge, in_, min_len, optional

from coreai_zoo.dtypes import DTYPES


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


Content = Literal["tokens", "positions", "new_positions"]


@frozen
class InputSpec(TensorSpec):
    """An input, and what a call puts into it. Every input is [1, n].

    Attributes:
        holds: `tokens` the ids of the new tokens; `positions` the position of every token so far, 0 to T - 1;
            `new_positions` those of the new tokens only.
        length: values that a call really puts into it, where its axis is declared dynamic all the same: an engine lays
            out the inputs of every function by those of the one that decodes.
    """

    holds: Content = field(kw_only=True, validator=in_(get_args(Content)))
    length: int | None = field(default=None, kw_only=True, validator=optional(ge(1)))

    def values(self, tokens: Sequence[int], start: int) -> list[int]:
        """The values of this input in a call that feeds `tokens` behind the first `start` positions."""
        end = start + len(tokens)
        return {"tokens": list(tokens), "positions": [*range(end)], "new_positions": [*range(start, end)]}[self.holds]


@frozen
class StateSpec(TensorSpec):
    """A tensor that a step mutates and the engine carries to the next step.

    Attributes:
        kind: `kv_cache` holds something of every position: it grows along its one dynamic axis, or has none where the
            contract fixes the context; `fixed` has a static shape and is zeroed at reset.
    """

    kind: Literal["kv_cache", "fixed"] = field(default="fixed", validator=in_(("kv_cache", "fixed")))
    dtype: str = field(default="float16", validator=in_(DTYPES))
    name: str = field(kw_only=True, validator=min_len(1))

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
class Signature:
    """A function of a saved asset as its toolchain reads it back: name to (shape, dtype), a dynamic size being -1."""

    inputs: Mapping[str, tuple[tuple[int, ...], str]]
    states: Mapping[str, tuple[tuple[int, ...], str]]
    outputs: Mapping[str, tuple[tuple[int, ...], str]]


@frozen
class TraceSpec:
    """The signature of one function, checked before anything is traced.

    Attributes:
        inputs: in the order in which an engine binds them.
        states: what a call mutates, in the order in which the decoder takes them.
        outputs: the first one, where there is any, is the logits [1, S, V].
        axes: range of each dynamic axis.

    Raises:
        ValueError: for duplicate names, no input that holds tokens, an axis without a range, or a range that no tensor
            uses.
    """

    inputs: tuple[InputSpec, ...]
    states: tuple[StateSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, Axis]

    def __attrs_post_init__(self) -> None:
        names = [spec.name for spec in (*self.inputs, *self.states, *self.outputs)]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"the function names {', '.join(duplicates)} more than once")
        if not any(spec.holds == "tokens" for spec in self.inputs):
            raise ValueError("no input holds the tokens")
        used = {size for spec in (*self.inputs, *self.states) for size in spec.shape if isinstance(size, str)}
        if used != set(self.axes):
            raise ValueError(f"tensors use the axes {sorted(used)} but ranges are given for {sorted(self.axes)}")

    @property
    def query_length(self) -> int | None:
        """Tokens that a call takes, None where that is any number up to `most_tokens`."""
        (tokens,) = (spec for spec in self.inputs if spec.holds == "tokens")
        size = tokens.length or tokens.shape[1]
        return size if isinstance(size, int) else None

    @property
    def most_tokens(self) -> int:
        """The most tokens that a call takes."""
        (size,) = (spec.shape[1] for spec in self.inputs if spec.holds == "tokens")
        return self.query_length or (self.axes[size].maximum if isinstance(size, str) else size)

    @property
    def positions(self) -> int | None:
        """The most positions that a call may follow, by the ranges and sizes of the caches; None without a cache."""
        sizes = [size for state in self.states if state.kind == "kv_cache" for size in state.shape[3:4]]
        sizes += [size for spec in self.inputs if spec.holds == "positions" for size in spec.shape[1:]]
        return min((self.axes[size].maximum if isinstance(size, str) else size for size in sizes), default=None)

    @property
    def declared(self) -> Signature:
        """What a toolchain reads back from an asset that holds this function."""

        def declared(tensors: Sequence[TensorSpec]) -> dict[str, tuple[tuple[int, ...], str]]:
            return {
                tensor.name: (tuple(-1 if isinstance(size, str) else size for size in tensor.shape), tensor.dtype)
                for tensor in tensors
            }

        return Signature(declared(self.inputs), declared(self.states), declared(self.outputs))

    def step(self, tokens: Sequence[int], start: int) -> dict[str, list[int]]:
        """The inputs of a call that feeds `tokens` behind the first `start` positions: name to the values of [1, n]."""
        return {spec.name: spec.values(tokens, start) for spec in self.inputs}


@frozen
class KVCache:
    """Geometry of the growing key / value pair: both are [layers, 1, heads, T, head_dim]."""

    layers: int = field(validator=ge(1))
    heads: int = field(validator=ge(1))
    head_dim: int = field(validator=ge(1))
