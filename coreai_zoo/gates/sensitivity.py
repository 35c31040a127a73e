"""Sensitivity: what quantizing one part of a model costs, and what it saves.

One role, or one role of one layer, is quantized at a time and the rest is left in half precision. What that does to the
logits, set against the bytes that it saves, is the table from which a mixed recipe is chosen: the parts at the top of
the ranking deserve more bits, those at the bottom can do with fewer.

The reference is the same decoder with nothing quantized, so a row shows the effect of its part and of nothing else.
Every run streams the checkpoint, one layer in memory at a time; a part is quantized while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen

from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.errors import BadInput, listing
from coreai_zoo.gates.layered import TorchCandidate
from coreai_zoo.gates.rule import judge
from coreai_zoo.gates.weights import CheckpointWeights
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.signature import TraceSpec
from coreai_zoo.weights.formats import require_divisible
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan

MIB = 2**20


@frozen
class Part:
    """The parameters that are quantized together.

    Attributes:
        role: name of their role.
        layer: index of their layer; None for the role in all layers, or outside of them.
        spec: how they are quantized.
        tensors: their names.
        plain_bytes: what they take unquantized.
        quantized_bytes: what they take quantized: integers, scales and zero points.
    """

    role: str
    layer: int | None
    spec: QuantizationSpec
    tensors: tuple[str, ...]
    plain_bytes: int
    quantized_bytes: int

    @property
    def saved_bytes(self) -> int:
        """Bytes that quantizing saves."""
        return self.plain_bytes - self.quantized_bytes

    def __str__(self) -> str:
        return self.role if self.layer is None else f"{self.role} of layer {self.layer}"


@frozen
class Sensitivity:
    """The effect of quantizing one part.

    Attributes:
        part: what was quantized.
        kl: mean over positions of KL(reference || quantized), in nats.
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
    def kl_per_mib(self) -> float:
        """Mean KL for each MiB saved."""
        return self.kl / (self.part.saved_bytes / MIB)

    @property
    def margin_lost_per_mib(self) -> float:
        """Mean margin lost for each MiB saved."""
        return self.margin_lost / (self.part.saved_bytes / MIB)


RANKINGS: Mapping[str, Callable[[Sensitivity], float]] = {
    "kl": lambda found: found.kl_per_mib,
    "margin": lambda found: found.margin_lost_per_mib,
}
"""The measures that a table can be ranked by, each per byte saved."""


def ranked(found: Iterable[Sensitivity], by: str) -> list[Sensitivity]:
    """The results in order, the part that costs most for what it saves first."""
    return sorted(found, key=RANKINGS[by], reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# What to quantize
# ---------------------------------------------------------------------------------------------------------------------


def parts_of(
    plan: WeightPlan,
    specs: Mapping[str, QuantizationSpec],
    layer_paths: Sequence[str] | None = None,
) -> tuple[Part, ...]:
    """The weights that are to be quantized, in parts: by role, or by role and layer.

    Args:
        plan: the plan of all weights.
        specs: how each role is quantized; a role that is not named is left alone.
        layer_paths: module path of each layer, to take each layer by itself; None to take all layers together.

    Raises:
        BadInput: when no weight has one of the roles, or a block does not divide the width of a weight.
    """
    grouped: dict[tuple[str, int | None], list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        if tensor.role in specs:
            grouped.setdefault((tensor.role, _layer_of(tensor.name, layer_paths or ())), []).append(tensor)
    absent = sorted(set(specs) - {role for role, _ in grouped})
    if absent:
        present = listing(sorted({tensor.role for tensor in plan.tensors}))
        raise BadInput(f"This model has no weights with the role {' or '.join(absent)}.", f"It has: {present}.")
    misfits = list(_misfits(plan, specs))
    if misfits:
        raise BadInput(f"Not every weight can be quantized like that: {listing(misfits)}.", "Leave these roles out.")
    return tuple(_part(role, layer, specs[role], tensors) for (role, layer), tensors in grouped.items())


def _layer_of(name: str, layer_paths: Sequence[str]) -> int | None:
    return next((index for index, path in enumerate(layer_paths) if name.startswith(f"{path}.")), None)


def _misfits(plan: WeightPlan, specs: Mapping[str, QuantizationSpec]) -> Iterator[str]:
    for tensor in plan.tensors:
        if tensor.role in specs:
            try:
                require_divisible(tensor.format.columns, specs[tensor.role])
            except ValueError as error:
                yield f"{tensor.name} ({tensor.role}: {error})"


def _part(role: str, layer: int | None, spec: QuantizationSpec, tensors: Sequence[PlannedTensor]) -> Part:
    plain, quantized = (
        sum(evolve(tensor, quantization=stored).format.bytes for tensor in tensors) for stored in (None, spec)
    )
    return Part(role, layer, spec, tuple(tensor.name for tensor in tensors), plain, quantized)


# ---------------------------------------------------------------------------------------------------------------------
# What quantizing it does
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Subject:
    """The model that is quantized in parts.

    Attributes:
        module: its decoder, rewritten, on the meta device: an `overlay.LayeredDecoder`.
        signature: the signature of its function.
        checkpoint: its weights.
        plan: where each weight comes from; how the plan quantizes it does not matter.
    """

    module: Any
    signature: TraceSpec
    checkpoint: Checkpoint
    plan: WeightPlan

    def candidate(self, part: Part | None, on_layer: Callable[[], None]) -> TorchCandidate:
        """The model with one part quantized, or with none.

        Raises:
            BadInput: when the decoder cannot be run layer by layer.
        """
        chosen = {} if part is None else dict.fromkeys(part.tensors, part.spec)
        plan = evolve(
            self.plan,
            tensors=tuple(evolve(tensor, quantization=chosen.get(tensor.name)) for tensor in self.plan.tensors),
        )
        weights = CheckpointWeights("nothing quantized" if part is None else str(part), self.checkpoint, plan)
        return TorchCandidate(self.module, plan, self.signature, weights, on_layer)


def measure(
    subject: Subject, parts: Sequence[Part], tokens: Sequence[int], on_layer: Callable[[], None] = lambda: None
) -> Iterator[Sensitivity]:
    """Run the model once with nothing quantized and once for each part, and compare.

    Args:
        subject: the model.
        parts: see `parts_of`.
        tokens: the prompt.
        on_layer: called after each layer of each run: (len(parts) + 1) times the number of layers.

    Yields:
        One result for each part, in their order, as soon as there is one.

    Raises:
        BadInput: when the decoder cannot be run layer by layer, or a weight is not finite.
    """
    reference = subject.candidate(None, on_layer).run(tokens).logits.astype(np.float32)
    for part in parts:
        logits = subject.candidate(part, on_layer).run(tokens).logits.astype(np.float32)
        verdict = judge(tokens, reference, logits)
        divergences = [position.kl_divergence for position in verdict.positions]
        yield Sensitivity(
            part,
            float(np.mean(divergences)),
            max(divergences),
            float(np.mean(margins_lost(reference, logits))),
            len(verdict.confident_flips),
        )


def margins_lost(reference: np.ndarray[Any, Any], logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The lead that the reference's best token loses: logits [P, V] to float32 [P], zero where the lead grows."""
    best = reference.argmax(axis=-1)[:, None]

    def lead(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        others = values.copy()
        np.put_along_axis(others, best, -np.inf, axis=-1)
        found: np.ndarray[Any, Any] = np.take_along_axis(values, best, axis=-1)[:, 0] - others.max(axis=-1)
        return found

    lost: np.ndarray[Any, Any] = np.maximum(lead(reference) - lead(logits), 0)
    return lost
