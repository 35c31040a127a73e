"""Sensitivity: what quantizing one part of a model costs, and what it saves.

One role, or one role of one layer, is quantized at a time and the rest is left in half precision. What that does to the
logits, set against the bytes that it saves, is the table from which a mixed recipe is chosen: the parts at the top of
the ranking deserve more bits, those at the bottom can do with fewer.

The reference is the same decoder with nothing quantized, so a row shows the effect of its part and of nothing else.
Every run streams the checkpoint, one layer in memory at a time; a part is quantized while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from attrs import evolve, frozen

from coreai_zoo.build.design import Design, design
from coreai_zoo.build.rebuild import recorded_request
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import checkpoint_of, named_bundle
from coreai_zoo.catalogue import load_entries
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.tokenizer import encode, load_tokenizer
from coreai_zoo.errors import BadInput, listing
from coreai_zoo.gates.layered import TorchCandidate
from coreai_zoo.gates.prompts import ANCHOR, DEFAULT_POSITIONS, named_prompts
from coreai_zoo.gates.rule import judge
from coreai_zoo.gates.teacher_forced import check_checkpoint
from coreai_zoo.gates.weights import CheckpointWeights
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
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
            tensors=tuple(
                evolve(tensor, quantization=chosen.get(tensor.name), stored_as=tensor.name)
                for tensor in self.plan.tensors
            ),
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


# ---------------------------------------------------------------------------------------------------------------------
# Of a bundle or an entry
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class SensitivityOptions:
    """What was asked for; see the options of `zoo sensitivity`."""

    checkpoint: Path | None
    sample: bool
    custom: bool
    recipe: str | None
    layers: int | None
    quantize_as: Literal["int4", "int8", "uint4", "uint8"] | None
    role: Sequence[str]
    per_layer: bool
    prompt: str | None
    positions: int | None
    by: str


@frozen
class Ranking:
    """The parts of a model in the order of what quantizing them costs.

    Attributes:
        design: the model.
        positions: number of tokens that it was run on.
        rows: the parts, the worst bargain first.
    """

    design: Design
    positions: int
    rows: Sequence[Sensitivity]


def rank_parts(subject: str, options: SensitivityOptions, plugins: Plugins, report: Reporter) -> Ranking:
    """Measure and rank the parts of a bundle, by its folder or name, or of an entry, by its name.

    Raises:
        BadInput: when there is no such bundle or entry, an option does not fit it, or it cannot be run in parts.
    """
    designed = design(_request(subject, options, plugins), plugins)
    tokens = _tokens(designed, options)
    measured = Subject(
        designed.modules[designed.decode], designed.signatures[designed.decode], designed.checkpoint, designed.weights
    )
    specs = _specs(designed, options)
    layered = measured.candidate(None, lambda: None).module  # refuses a decoder that cannot be run layer by layer
    parts = parts_of(designed.weights, specs, layered.layer_paths if options.per_layer else None)
    steps = (len(parts) + 1) * len(layered.layer_paths)
    what = f"{len(parts)} parts of {designed.checkpoint.directory.name}, {len(tokens)} positions each"
    with report.stage("measure", what), report.steps("", steps) as step:
        found = list(measure(measured, parts, tokens, step))
    return Ranking(designed, len(tokens), ranked(found, options.by))


def _request(subject: str, options: SensitivityOptions, plugins: Plugins) -> BuildRequest:
    """The build that made a bundle, or that would make one of an entry."""
    is_entry = subject.endswith(".toml") or (subject in load_entries(plugins) and not Path(subject).is_dir())
    path = None if is_entry else named_bundle(subject)
    if path is not None:
        if options.sample or options.custom or options.recipe or options.layers:
            raise BadInput(
                "--sample, --custom, --recipe and --layers are for an entry; a bundle says what it was built from."
            )
        bundle = Bundle.open(path)
        check_checkpoint(bundle, checkpoint_of(bundle, plugins, options.checkpoint))
        return recorded_request(bundle, options.checkpoint, path.parent)[0]
    return BuildRequest(
        model=subject,
        checkpoint=options.checkpoint,
        sample=options.sample,
        recipe=options.recipe,
        layers=options.layers,
        custom=options.custom,
    )


def _tokens(designed: Design, options: SensitivityOptions) -> list[int]:
    text = named_prompts([ANCHOR])[0].text if options.prompt is None else options.prompt
    tokens = encode(load_tokenizer(designed.checkpoint.directory), text or "")
    positions = options.positions or min(DEFAULT_POSITIONS, len(tokens))
    if not tokens or len(tokens) < positions:
        raise BadInput(
            f"The prompt is {len(tokens)} tokens, and {positions} positions were asked for.",
            "Give a longer prompt, or fewer --positions.",
        )
    return tokens[:positions]


def _specs(designed: Design, options: SensitivityOptions) -> dict[str, QuantizationSpec]:
    """How each role that is asked for is quantized.

    Raises:
        BadInput: for a role that the recipe leaves alone, when nothing else says how, or when there is none at all.
    """
    stored = designed.weights.stored_as()
    recipe = {role: spec for role, specs in stored.items() for spec in specs if spec is not None}
    roles = options.role or tuple(recipe)
    if not roles:
        raise BadInput(
            f"Recipe {designed.recipe.name} quantizes nothing.", "Choose another --recipe, or name a --role and --as."
        )
    if options.quantize_as is not None:
        # The scheme that uses the integers best, in the blocks that engines are fast with.
        signed = not options.quantize_as.startswith("u")
        scheme: Literal["symmetric_with_clipping", "asymmetric"] = "symmetric_with_clipping" if signed else "asymmetric"
        return dict.fromkeys(roles, QuantizationSpec(options.quantize_as, scheme, 32))
    left = [role for role in roles if role not in recipe]
    if left:
        raise BadInput(f"Recipe {designed.recipe.name} leaves {' and '.join(left)} alone.", "Say how with --as.")
    return {role: recipe[role] for role in roles}
