"""A row of the table of parameters: what a parameter is, and what fills it.

transformers tells this in three places: shapes in the constructor of a layer, spellings of a checkpoint in a conversion
mapping, and changes of values in `forward` (`1 + weight` in its RMSNorm, `-exp(A_log)` in its gated delta net). Here a
kind of layer tells each of its parameters once, in one row, so that a parameter cannot be in one list and not in
another, and the graph has no operation for what can be done to the values while they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import evolve, field, frozen
from attrs.validators import in_

from coreai_zoo.overlay import Part, Role, Transform, WeightRule

if TYPE_CHECKING:
    from torch import Tensor

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
"""What a parameter of this overlay does, in the order in which reports name them; recipes quantize body and head."""


@frozen
class Row:
    """One parameter; names are those below the module that has it, until `below` says which one that is.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        role: name of one of `ROLES`.
        transform: change of values between checkpoint and parameter, or None.
        source: the checkpoint's name for it, where that differs.
        source_shape: the checkpoint's shape from the parameter's, where that differs.
        parts: checkpoint tensors that fill it one slab each, for checkpoints that do not hold it whole.
        float32: whether it is fp32 in a decoder of any dtype.
        read_transposed: whether the decoder reads nothing of it but its transpose in the last two axes.
    """

    name: str
    shape: tuple[int, ...]
    role: str = field(validator=in_([role.name for role in ROLES]))
    transform: Transform | None = None
    source: str = field(kw_only=True)
    source_shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = field(default=None, kw_only=True)
    parts: Mapping[str, Part] = field(factory=dict, kw_only=True)
    float32: bool = field(default=False, kw_only=True)
    read_transposed: bool = field(default=False, kw_only=True)

    @source.default
    def _same_as_name(self) -> str:
        return self.name

    def rules(self) -> Iterator[WeightRule]:
        """What fills the parameter: one tensor, or its parts. Which of the two is there, the checkpoint decides."""
        rule = WeightRule(self.source, self.name, self.role, self.transform, read_transposed=self.read_transposed)
        yield evolve(rule, source_shape=self.source_shape)
        for source, part in self.parts.items():
            yield evolve(rule, source=source, part=part)


def below(module: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of a submodule, as rows of the module that has it."""
    return tuple(
        evolve(
            row,
            name=f"{module}.{row.name}",
            source=f"{module}.{row.source}",
            parts={f"{module}.{source}": part for source, part in row.parts.items()},
        )
        for row in rows
    )


# ---------------------------------------------------------------------------------------------------------------------
# Changes of values
# ---------------------------------------------------------------------------------------------------------------------


def _one_plus(weight: Tensor) -> Tensor:
    return 1.0 + weight


def _minus_exp(logarithm: Tensor) -> Tensor:
    return -logarithm.exp()


# A conversion for MLX stores gains with the one added: their mean is then near one.
ONE_PLUS = Transform("1 + weight", _one_plus, usual_mean=(-0.7, 0.7))
MINUS_EXP = Transform("-exp(weight)", _minus_exp)
