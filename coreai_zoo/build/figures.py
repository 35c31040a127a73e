"""Figures: what a bundle holds, needs and runs at, added up from its design without a weight and without torch.

`zoo plan` prints them, and a bundle's card says them: they are computed here alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from attrs import frozen

from coreai_zoo.build.chips import CHIPS, EFFICIENCY, EFFICIENCY_SOURCE, GPU_SHARE_SOURCE, Chip, tokens_per_second
from coreai_zoo.build.design import Design
from coreai_zoo.build.preflight import asset_bytes, tokenizer_bytes
from coreai_zoo.build.target import backend_of
from coreai_zoo.bundle.card import Machine, Needs
from coreai_zoo.contracts import MINIMUM_CONTEXT
from coreai_zoo.dtypes import packed_bytes
from coreai_zoo.entry import Published
from coreai_zoo.overlay import Role
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.signature import StateSpec
from coreai_zoo.weights.plan import PlannedTensor, RoleTotal, active_share


@frozen
class RoleSum:
    """The weights of one role, added up.

    Attributes:
        role: name of the role.
        meaning: what they do, in words.
        routed: whether it holds experts of which a token reads a few.
        specs: how they are quantized, each way once; None for plain values.
        bytes: what they take in the bundle.
        stored_with: the role whose bytes they share, None where they have their own.
        read: bytes of them that one decoded token reads.
    """

    role: str
    meaning: str
    routed: bool
    tensors: int
    parameters: int
    specs: tuple[QuantizationSpec | None, ...]
    bytes: int
    stored_with: str | None
    read: int

    @property
    def bits(self) -> float | None:
        """Bits per parameter, scales included; None where the parameters are another role's."""
        return 8 * self.bytes / self.parameters if self.parameters else None


@frozen
class Figures:
    """The sizes and rates of a bundle.

    Attributes:
        design: of what is or would be built; its weights have sources when the checkpoint's headers were read.
    """

    design: Design

    @property
    def context(self) -> int:
        """The number of positions that states are counted at."""
        return self.design.max_context

    @cached_property
    def roles(self) -> tuple[RoleSum, ...]:
        """The weights by role, in the order of the overlay's roles."""
        weights = self.design.weights
        totals, specs = weights.totals(), weights.stored_as()
        return tuple(
            self._sum(weights.roles[name], totals[name], of, specs[name]) for name, of in weights.by_role().items()
        )

    def _sum(
        self,
        role: Role,
        total: RoleTotal,
        tensors: Sequence[PlannedTensor],
        specs: tuple[QuantizationSpec | None, ...],
    ) -> RoleSum:
        read = sum(tensor.format.bytes for tensor in tensors)
        return RoleSum(
            role=role.name,
            meaning=role.meaning,
            routed=role.routed,
            tensors=total.tensors,
            parameters=total.parameters,
            specs=specs,
            bytes=total.bytes,
            stored_with=total.stored_with,
            read=round(read * self._share_read(role)),
        )

    def _share_read(self, role: Role, tokens: int = 1) -> float:
        """The share of a role's weights that some tokens read: rows of the embedding table, the chosen experts.

        Of experts it is the share that one token or more chooses, if all are chosen equally often.
        """
        if role.kind == "embedding":
            return min(1.0, tokens / int(self.design.facts["vocab_size"]))
        share = active_share(role, self.design.facts)
        assert share is not None, "nothing is designed without these facts"
        return share if tokens == 1 else 1 - (1 - share) ** tokens

    def read_by(self, tokens: int, *, head: bool) -> int:
        """Bytes of weights that a call with so many tokens reads, each once; with or without the head's."""
        return sum(
            round(sum(tensor.format.bytes for tensor in tensors) * self._share_read(role, tokens))
            for role, tensors in self._tensors(head=head)
        )

    def products(self, tokens: int, *, head: bool) -> int:
        """Floating-point operations of the products of so many tokens with their weights: two for each weight."""
        share = {role.name: active_share(role, self.design.facts) or 0.0 for role in self.design.weights.roles.values()}
        return sum(
            round(2 * tokens * share[role.name] * sum(tensor.parameters for tensor in tensors))
            for role, tensors in self._tensors(head=head)
            if role.kind != "embedding"
        )

    def _tensors(self, *, head: bool) -> Iterator[tuple[Role, Sequence[PlannedTensor]]]:
        """The weights of each role that a function uses."""
        for name, tensors in self.design.weights.by_role().items():
            role = self.design.weights.roles[name]
            if head or role.kind != "head":
                yield role, tensors

    @property
    def bits(self) -> float:
        """Bits per parameter, scales included."""
        return 8 * self.design.weights.stored_bytes / self.design.weights.parameters

    @property
    def tokenizer(self) -> int | None:
        """Bytes of the tokenizer's files, None where they are not at hand."""
        return tokenizer_bytes(self.design) or None

    @property
    def asset(self) -> int:
        """Bytes of the asset: weights and graph."""
        return asset_bytes(self.design)

    @property
    def bundle(self) -> int:
        """Bytes of the bundle, without the tokenizer's files where those are not at hand."""
        return self.asset + (self.tokenizer or 0)

    @property
    def read(self) -> int:
        """Bytes of weights that a decoded token reads."""
        return sum(role.read for role in self.roles)

    @property
    def dense_read(self) -> int:
        """Bytes of weights that a decoded token would read if it read every expert; as `read` without experts."""
        return sum(role.bytes if role.routed else role.read for role in self.roles)

    @property
    def gathers(self) -> bool:
        """Whether a token reads some of the experts and not all."""
        return self.dense_read > self.read

    @property
    def _states(self) -> tuple[StateSpec, ...]:
        return self.design.signatures[self.design.decode].states

    @property
    def states(self) -> Mapping[str, int]:
        """Bytes of each state at `context` positions."""
        return {
            state.name: packed_bytes(
                [self.context if isinstance(size, str) else size for size in state.shape], state.dtype
            )
            for state in self._states
        }

    @property
    def state_bytes(self) -> int:
        """Bytes of all states at `context` positions."""
        return sum(self.states.values())

    @property
    def growth(self) -> int:
        """Bytes that the states grow by with each position."""
        return sum(self.states[state.name] for state in self._states if state.kind == "kv_cache") // self.context

    @property
    def resident(self) -> int:
        """Bytes that a machine has to hold to run the bundle: the asset and the states, and nothing of the engine's."""
        return self.asset + self.state_bytes

    def context_within(self, room: int) -> int:
        """Positions whose states fit beside the asset into `room` bytes, at most those that the model was made for.

        0 where there is no room for the least context of a bundle.
        """
        free = room - (self.resident - self.growth * self.context)
        limit = int(self.design.facts["max_context_length"])
        positions = limit if not self.growth else min(limit, free // self.growth)
        return positions if free >= 0 and positions >= MINIMUM_CONTEXT else 0

    @property
    def published(self) -> tuple[Published, ...]:
        """Measurements that others published of this entry with this recipe.

        They are of this contract, written by the backend that is usual for it: of any other there are none.
        """
        entry, contract = self.design.entry, self.design.contract
        if entry is None or self.design.backend.name != backend_of(contract):
            return ()
        return tuple(
            measured
            for measured in entry.published
            if (measured.contract or entry.contract) == contract.name and self.design.is_stored_by(measured.recipe)
        )


def needs(design: Design) -> Needs:
    """What a machine needs to run the bundle of a design, for its card."""
    figures = Figures(design)
    # Of a miniature or a slice the rate would be that of its launches, not of its memory.
    true_size = not design.sample and design.facts["layers"] == design.model.whole_facts["layers"]
    return Needs(
        asset=figures.asset,
        states=figures.state_bytes,
        growth=figures.growth,
        resident=figures.resident,
        machines=tuple(_machine(figures, chip) for chip in CHIPS) if true_size else (),
        gathers=figures.gathers,
        published=figures.published if true_size else (),
        rate_source=f"{100 * EFFICIENCY:.0f} % of the memory's bandwidth, a share taken from {EFFICIENCY_SOURCE}",
        fit_source=GPU_SHARE_SOURCE,
    )


def _machine(figures: Figures, chip: Chip) -> Machine:
    rate = tokens_per_second(figures.read, chip.bandwidth, EFFICIENCY)
    return Machine(chip.name, chip.smallest_memory(figures.resident), rate)
