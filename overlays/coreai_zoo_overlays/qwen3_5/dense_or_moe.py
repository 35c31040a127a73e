"""Dense or mixture-of-experts: the two kinds of feed-forward, and everything in which they differ.

transformers has two model files, `qwen3_5` and `qwen3_5_moe`, each with a configuration, a decoder and a conversion
mapping of its own. The models are the same but for the feed-forward of a layer, so here a kind of feed-forward is an
object that brings all that is its own: how its sizes are read, its layer, its parameters, its facts. `kind_of` chooses
one, and nothing else does: every other module asks `config.feed_forward`.

Shapes: D hidden, I width, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from attrs import frozen

from coreai_zoo.overlay import Part

from .reader import Reader
from .table import Row, below

if TYPE_CHECKING:
    from torch import nn


class FeedForward(ABC):
    """Sizes of a feed-forward, named as in `config.json`, and what follows from them.

    Attributes:
        name: what an entry calls the kind, in its fact `ffn`.
        model_types: what `config.json` calls a model of the kind, wrapped and flat.
        facts: fact of an entry to the size that it states.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, str]]
    facts: ClassVar[Mapping[str, str]]

    @classmethod
    def read(cls, read: Reader) -> Self:
        """The sizes that a config states."""
        return cls(**{size: read.size(size) for size in cls.facts.values()})

    @abstractmethod
    def rows(self, hidden_size: int) -> tuple[Row, ...]:
        """The parameters of the layer."""

    @abstractmethod
    def layer(self, hidden_size: int) -> nn.Module:
        """The layer, uninitialised."""


@frozen
class Dense(FeedForward):
    """A gated MLP."""

    name = "dense"
    model_types = ("qwen3_5", "qwen3_5_text")
    facts: ClassVar = {"intermediate_size": "intermediate_size"}

    intermediate_size: int

    def rows(self, hidden_size: int) -> tuple[Row, ...]:
        """Of `feed_forward.MLP`."""
        return _mlp(hidden_size, self.intermediate_size)

    def layer(self, hidden_size: int) -> nn.Module:
        """An MLP."""
        from .feed_forward import MLP

        return MLP(hidden_size, self.intermediate_size)


@frozen
class MoE(FeedForward):
    """`num_experts` experts, `num_experts_per_tok` of them active, and a shared one, which always is."""

    name = "moe"
    model_types = ("qwen3_5_moe", "qwen3_5_moe_text")
    facts: ClassVar = {
        "experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_intermediate_size": "moe_intermediate_size",
        "shared_expert_intermediate_size": "shared_expert_intermediate_size",
    }

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int

    @classmethod
    def read(cls, read: Reader) -> Self:
        """The sizes that a config states; no more experts can be active than there are."""
        sizes = super().read(read)
        active, experts = sizes.num_experts_per_tok, sizes.num_experts
        if active > experts:
            read.problems.append(f"num_experts_per_tok ({active}) is more than num_experts ({experts})")
        return sizes

    def rows(self, hidden_size: int) -> tuple[Row, ...]:
        """Of `feed_forward.SparseMoE`. Experts are packed, as released, or one by one, as transformers saves them."""
        experts, width = self.num_experts, self.moe_intermediate_size
        gate, up = (Part("expert", piece=piece, pieces=2) for piece in (0, 1))
        return (
            Row("gate.weight", (experts, hidden_size), "moe.router"),  # [E, D]
            Row(
                "experts.gate_up_proj",
                (experts, 2 * width, hidden_size),  # [E, 2I, D]
                "moe.expert",
                parts={"experts.{expert}.gate_proj.weight": gate, "experts.{expert}.up_proj.weight": up},
                read_transposed=True,
            ),
            Row(
                "experts.down_proj",
                (experts, hidden_size, width),  # [E, D, I]
                "moe.expert",
                parts={"experts.{expert}.down_proj.weight": Part("expert")},
                read_transposed=True,
            ),
            *below("shared_expert", _mlp(hidden_size, self.shared_expert_intermediate_size)),
            Row("shared_expert_gate.weight", (1, hidden_size), "moe.shared_gate"),
        )

    def layer(self, hidden_size: int) -> nn.Module:
        """A sparse MoE."""
        from .feed_forward import SparseMoE

        return SparseMoE(
            hidden_size,
            experts=self.num_experts,
            top_k=self.num_experts_per_tok,
            intermediate_size=self.moe_intermediate_size,
            shared_intermediate_size=self.shared_expert_intermediate_size,
        )


def _mlp(hidden_size: int, intermediate_size: int) -> tuple[Row, ...]:
    return (
        Row("gate_proj.weight", (intermediate_size, hidden_size), "mlp"),  # [I, D]
        Row("up_proj.weight", (intermediate_size, hidden_size), "mlp"),
        Row("down_proj.weight", (hidden_size, intermediate_size), "mlp"),
    )


MODEL_TYPES = Dense.model_types + MoE.model_types


def kind_of(name: str | None) -> type[FeedForward]:
    """The kind that a `model_type` or the fact `ffn` names: the one switch between dense and mixture-of-experts."""
    return MoE if name in (MoE.name, *MoE.model_types) else Dense
