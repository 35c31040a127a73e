"""Sensitivity: what storing one part of a model in another format costs, and what it saves.

One role, one role of one layer, or one tensor at a time is stored in another format than the rest of the model. What
that does to the logits, set against the bytes that it saves, is the table from which a mixed recipe is chosen: the
parts at the top of the ranking deserve more bits, those at the bottom can do with fewer.

The reference is the same decoder with every weight in the format of the rest, by default half precision, so a row shows
the effect of its part and of nothing else. Every run streams the checkpoint, one layer in memory at a time; a weight is
quantized while it is read. Arithmetic is done by one thread: the order of sums may depend on how many there are, and a
result must not depend on the machine's cores or on what else runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from attrs import evolve, field, frozen

from coreai_zoo.build.design import Design
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.errors import BadInput, listing, near_names
from coreai_zoo.gates.layered import TorchCandidate
from coreai_zoo.gates.rule import judge
from coreai_zoo.gates.weights import CheckpointWeights
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.signature import TraceSpec
from coreai_zoo.weights.formats import require_divisible
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan
from coreai_zoo.weights.quantizer import one_thread

MIB = 2**20

Granularity = Literal["role", "layer", "tensor"]
"""What a part is: a role, a role of one layer, or a single tensor."""

PLAIN_BASE: Mapping[str, QuantizationSpec] = MappingProxyType({})
"""The formats, by role, of a model that is not quantized."""


@frozen
class Part:
    """The parameters that are stored in another format together.

    Attributes:
        role: name of their role.
        layer: index of their layer; None for the role in all layers, or outside of them.
        tensor: name of the only one, where tensors are taken one by one; else None.
        spec: how they are stored; None for plain values.
        tensors: their names.
        from_bytes: what they take in the format of the rest.
        as_bytes: what they take in this one: integers, scales and zero points.
    """

    role: str
    layer: int | None
    tensor: str | None
    spec: QuantizationSpec | None
    tensors: tuple[str, ...]
    from_bytes: int
    as_bytes: int

    @property
    def saved_bytes(self) -> int:
        """Bytes that the format saves; negative where it takes more than that of the rest."""
        return self.from_bytes - self.as_bytes

    def __str__(self) -> str:
        if self.tensor is not None:
            return self.tensor
        return self.role if self.layer is None else f"{self.role} of layer {self.layer}"


@frozen
class Sensitivity:
    """The effect of storing one part in another format.

    Attributes:
        part: what was stored so.
        kl: mean over positions of KL(reference || with the part), in nats; like the next two infinite where logits are
            not finite.
        largest_kl: the largest.
        margin_lost: mean over positions of what the reference's best token loses of its lead over the next best, in
            logits; a lead that grows counts as no loss.
        flips: number of confident flips.
    """

    part: Part
    kl: float
    largest_kl: float
    margin_lost: float
    flips: int

    @property
    def kl_per_mib(self) -> float | None:
        """Mean KL for each MiB saved; None where nothing is saved."""
        return self._per_mib(self.kl)

    @property
    def margin_lost_per_mib(self) -> float | None:
        """Mean margin lost for each MiB saved; None where nothing is saved."""
        return self._per_mib(self.margin_lost)

    def _per_mib(self, cost: float) -> float | None:
        return cost / (self.part.saved_bytes / MIB) if self.part.saved_bytes > 0 else None


Measure = Callable[[Sensitivity], "float | None"]

RANKINGS: Mapping[str, tuple[Measure, Measure]] = {
    "kl": (lambda found: found.kl_per_mib, lambda found: found.kl),
    "margin": (lambda found: found.margin_lost_per_mib, lambda found: found.margin_lost),
}
"""The measures that a table can be ranked by, each per MiB saved and by itself."""


def ranked(found: Iterable[Sensitivity], by: str) -> list[Sensitivity]:
    """The results in order: what costs most for what it saves first, then what saves nothing, by what it does."""
    per_mib, plain = RANKINGS[by]

    def key(each: Sensitivity) -> tuple[bool, float]:
        value = per_mib(each)
        return value is not None, (plain(each) if value is None else value) or 0.0

    return sorted(found, key=key, reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# What is stored in another format
# ---------------------------------------------------------------------------------------------------------------------


def parts_of(
    plan: WeightPlan,
    specs: Mapping[str, QuantizationSpec | None],
    layer_paths: Sequence[str] = (),
    by: Granularity = "role",
    base: Mapping[str, QuantizationSpec] = PLAIN_BASE,
    each: Mapping[str, QuantizationSpec] | None = None,
) -> tuple[Part, ...]:
    """The weights that are to be stored in another format, in parts. A part that has its format anyway is left out.

    Weights of one role in two formats are two parts.

    Args:
        plan: the plan of all weights.
        specs: how each role is stored, None for plain values; a role that is not named is left alone.
        layer_paths: module path of each layer.
        by: what a part is.
        base: how the rest is stored, by role; what is not named has plain values.
        each: how single tensors of these roles are stored, by their names, in place of their role; one that is not
            named is left alone.

    Raises:
        BadInput: when no weight has one of the roles, a block does not divide the width of a weight, or every part has
            its format anyway.
    """
    absent = sorted(set(specs) - {tensor.role for tensor in plan.tensors})
    if absent:
        present = sorted({tensor.role for tensor in plan.tensors})
        hint = " ".join(filter(None, [*(near_names(role, present) for role in absent), f"It has: {listing(present)}."]))
        raise BadInput(f"This model has no weights with the role {' or '.join(absent)}.", hint)
    misfits = [*_misfits(plan, base), *(_misfits(plan, specs) if each is None else ())]
    if misfits:
        raise BadInput(
            f"Not every weight can be quantized like that: {listing([*dict.fromkeys(misfits)])}.",
            "Leave these roles out.",
        )
    grouped: dict[tuple[str, int | None, str | None, QuantizationSpec | None], list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        if tensor.role not in specs or (each is not None and tensor.name not in each):
            continue
        spec = specs[tensor.role] if each is None else each[tensor.name]
        if spec != base.get(tensor.role):
            layer = None if by == "role" else _layer_of(tensor.name, layer_paths)
            grouped.setdefault((tensor.role, layer, tensor.name if by == "tensor" else None, spec), []).append(tensor)
    if not grouped:
        raise BadInput("Every part would be stored as it is anyway.", "Choose another --as, or another --from.")
    return tuple(
        Part(
            *key,
            tuple(tensor.name for tensor in tensors),
            _bytes(tensors, base.get(key[0])),
            _bytes(tensors, key[-1]),
        )
        for key, tensors in grouped.items()
    )


def _layer_of(name: str, layer_paths: Sequence[str]) -> int | None:
    return next((index for index, path in enumerate(layer_paths) if name.startswith(f"{path}.")), None)


def _misfits(plan: WeightPlan, specs: Mapping[str, QuantizationSpec | None]) -> Iterator[str]:
    for tensor in plan.tensors:
        if (spec := specs.get(tensor.role)) is not None:
            try:
                require_divisible(tensor.format.columns, spec)
            except ValueError as error:
                yield f"{tensor.name} ({tensor.role}: {error})"


def _bytes(tensors: Sequence[PlannedTensor], stored: QuantizationSpec | None) -> int:
    return sum(evolve(tensor, quantization=stored).format.bytes for tensor in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# What that does
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Subject:
    """The model of which parts are stored in another format.

    Attributes:
        module: its decoder, rewritten, on the meta device: an `overlay.LayeredDecoder`.
        signature: the signature of its function.
        checkpoint: its weights.
        plan: where each weight comes from; how the plan quantizes it does not matter.
        base: how the rest is stored, by role; what is not named has plain values.
    """

    module: Any
    signature: TraceSpec
    checkpoint: Checkpoint
    plan: WeightPlan
    base: Mapping[str, QuantizationSpec] = field(default=PLAIN_BASE)

    @classmethod
    def of(cls, designed: Design, base: Mapping[str, QuantizationSpec] = PLAIN_BASE) -> Subject:
        """The function of a design that decodes."""
        name = designed.decode
        return cls(designed.modules[name], designed.signatures[name], designed.checkpoint, designed.weights, base)

    def candidate(self, part: Part | None, on_layer: Callable[[], None] = lambda: None) -> TorchCandidate:
        """The model with one part in its format, or with none.

        Raises:
            BadInput: when the decoder cannot be run layer by layer.
        """
        chosen = {tensor.name: self.base.get(tensor.role) for tensor in self.plan.tensors}
        if part is not None:
            chosen |= dict.fromkeys(part.tensors, part.spec)
        plan = evolve(
            self.plan,
            tensors=tuple(
                evolve(tensor, quantization=chosen[tensor.name], stored_as=tensor.name) for tensor in self.plan.tensors
            ),
        )
        weights = CheckpointWeights("the reference" if part is None else str(part), self.checkpoint, plan)
        return TorchCandidate(self.module, plan, self.signature, weights, on_layer, shows_layers=False)

    def logits(
        self, part: Part | None, tokens: Sequence[int], on_layer: Callable[[], None] = lambda: None
    ) -> np.ndarray[Any, Any]:
        """Teacher-forced logits [P, V] in the contract's dtype, with one part in its format or with none.

        Args:
            part: the part.
            tokens: the prompt.
            on_layer: called after each layer.

        Raises:
            BadInput: when the decoder cannot be run layer by layer, or a weight is not finite.
        """
        with one_thread():  # weights are still read by all workers, which sum nothing
            logits: np.ndarray[Any, Any] = self.candidate(part, on_layer).run(tokens).logits
        return logits


def measure(
    subject: Subject,
    part: Part,
    tokens: Sequence[int],
    reference: np.ndarray[Any, Any],
    on_layer: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Run the model with one part in its format and compare with the reference.

    Args:
        subject: the model.
        part: see `parts_of`.
        tokens: the prompt.
        reference: logits [P, V] of the model without the part, see `Subject.logits`.
        on_layer: called after each layer.

    Raises:
        BadInput: see `Subject.logits`.
    """
    expected = reference.astype(np.float32)
    logits = subject.logits(part, tokens, on_layer).astype(np.float32)
    verdict = judge(tokens, expected, logits)
    divergences = [position.kl_divergence for position in verdict.positions]
    return Sensitivity(
        part,
        float(np.mean(divergences)),
        max(divergences),
        float(np.mean(margins_lost(expected, logits))),
        len(verdict.confident_flips),
    )


def margins_lost(reference: np.ndarray[Any, Any], logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The lead that the reference's best token loses: logits [P, V] to float32 [P], zero where the lead grows.

    It is infinite where logits are not finite.
    """
    best = reference.argmax(axis=-1)[:, None]

    def lead(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        others = values.copy()
        np.put_along_axis(others, best, -np.inf, axis=-1)
        found: np.ndarray[Any, Any] = np.take_along_axis(values, best, axis=-1)[:, 0] - others.max(axis=-1)
        return found

    lost: np.ndarray[Any, Any] = np.maximum(lead(reference) - lead(logits), 0)
    return np.where(np.isfinite(logits).all(axis=-1), lost, np.inf)
