"""Stress samples, made and judged: is a decoder right where a kind model would not tell?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from coreai_zoo.bounds import CONFIDENT_MARGIN, Bounds, Kind, kind_of
from coreai_zoo.build.design import Design, design
from coreai_zoo.build.record import roles_record
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.checkpoint.tokenizer import encode, load_tokenizer
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput
from coreai_zoo.gates.bounds import BoundCheck, broken, check_bounds, check_control
from coreai_zoo.gates.oracle import Oracle
from coreai_zoo.gates.prompts import BUILT_IN
from coreai_zoo.gates.rule import Verdict, compare, flips_told
from coreai_zoo.plugins import Plugins
from coreai_zoo.recipes import PLAIN
from coreai_zoo.stress import StressSample

if TYPE_CHECKING:
    from coreai_zoo.gate import Activations

_WEIGHTS = "model.safetensors"


@frozen
class StressVerdict:
    """What a stress sample showed.

    Attributes:
        sample: the stress sample.
        verdict: of the decoder against the oracle, on the positions that are judged.
        checks: every bound, kept or broken, those of the control included.
    """

    sample: StressSample
    verdict: Verdict
    checks: tuple[BoundCheck, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it failed, a phrase each; empty when it passed."""
        return (*flips_told(self.verdict), *broken(self.checks))


def write_checkpoint(sample: Path, stress: StressSample, folder: Path) -> Path:
    """The stress sample that is made of the checkpoint in `sample`, written to the new `folder`.

    Tensors keep the dtypes that they have. Raises a BadInput when the change makes a value that is not finite there.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(sample, folder)
    stored = load_file(sample / _WEIGHTS)
    tensors = {key: tensor.float() for key, tensor in stored.items()}
    config = json.loads((sample / "config.json").read_text(encoding="utf-8"))
    stress.change(tensors, config)
    dtypes = {tensor.dtype for tensor in stored.values()}
    default = next(iter(dtypes))
    made = {key: tensor.to(stored[key].dtype if key in stored else default) for key, tensor in tensors.items()}
    broken = [key for key, tensor in made.items() if not tensor.isfinite().all()]
    if broken:
        raise BadInput(f"The stress sample {stress.name} has values that are not finite in {broken[0]}.")
    save_file({key: tensor.contiguous() for key, tensor in made.items()}, folder / _WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def prompt_of(folder: Path, positions: int, skip: int = 0) -> tuple[int, ...]:
    """The tokens that a stress sample is run on: the built-in prompts in turn, from token `skip`, over and over."""
    tokenizer = load_tokenizer(folder)
    tokens = [token for prompt in BUILT_IN.values() if prompt.text for token in encode(tokenizer, prompt.text)]
    return tuple((tokens * (1 + (skip + positions) // len(tokens)))[skip : skip + positions])


@frozen
class StressTest:
    """A stress sample that was written, with the oracle's answer.

    Attributes:
        stress: what it is.
        designed: the decoder on it, as its recipe stores it.
        tokens: what is run.
        oracle: transformers' activations.
    """

    stress: StressSample
    designed: Design
    tokens: tuple[int, ...]
    oracle: Activations

    @classmethod
    def open(cls, folder: Path, stress: StressSample, entry: Entry, plugins: Plugins, skip: int = 0) -> StressTest:
        """The test on the checkpoint in `folder`, which `write_checkpoint` has written, on other tokens with `skip`."""
        request = BuildRequest(entry.name, checkpoint=folder, custom=True, recipe=stress.recipe, dry=True)
        designed = design(request, plugins, entry)
        if stress.at_once:
            designed = designed.with_any_query_length()
        tokens = prompt_of(folder, stress.positions, skip)
        return cls(stress, designed, tokens, Oracle.of(designed, designed.checkpoint).run(tokens))

    def run(self) -> StressVerdict:
        """The verdict on the overlay as it is now."""
        plain = self.designed.with_recipe(PLAIN)
        return self.judge(self.found(self.designed), None if self.stress.recipe == PLAIN else self.found(plain))

    def judge(self, found: Activations, control: Activations | None = None) -> StressVerdict:
        """The verdict on what a candidate computed, and its control, where the recipe quantizes."""
        held_to, plain = self._held_to(roles_record(self.designed)), self._held_to({})
        verdict = self.compare(found, held_to.margin)
        checks = list(check_bounds(verdict, held_to))
        if control is not None:
            checks += check_control(verdict, self.compare(control, plain.margin), held_to, plain)
        return StressVerdict(self.stress, verdict, tuple(checks))

    def _held_to(self, roles: Mapping[str, Any]) -> Bounds:
        precision = self.designed.contract.compute_dtype
        return self.stress.bounds.of_recipe(roles, self.layers, "torch", self.kind, precision)

    def compare(self, found: Activations, sure_from: float = CONFIDENT_MARGIN) -> Verdict:
        """The margin rule, and every measure, on the positions that are judged."""
        first = self.stress.first
        return compare(
            self.tokens[first:],
            positions_from(self.oracle, first),
            positions_from(found, first),
            self.designed.facts.get("experts_per_token"),
            sure_from,
        )

    @property
    def kind(self) -> Kind:
        """Which bounds it is held to."""
        return kind_of(self.designed.facts.get("experts_per_token"))

    @property
    def layers(self) -> int:
        """How many it has."""
        return int(self.designed.facts["layers"])

    def found(self, designed: Design) -> Activations:
        """What the overlay in PyTorch computes on the weights that a design makes of the checkpoint."""
        from coreai_zoo.gates.layered import TorchCandidate
        from coreai_zoo.gates.weights import CheckpointWeights

        name = designed.decode
        weights = CheckpointWeights("the stress sample", designed.checkpoint, designed.weights)
        return TorchCandidate(designed.modules[name], designed.weights, designed.signatures[name], weights).run(
            self.tokens
        )


def positions_from(activations: Activations, first: int) -> Activations:
    """The activations of the positions from `first` on."""

    def cut(arrays: Sequence[Any] | None) -> list[Any] | None:
        return None if arrays is None else [array[first:] for array in arrays]

    return evolve(
        activations,
        logits=activations.logits[first:],
        hidden=cut(activations.hidden),
        router_logits=cut(activations.router_logits),
    )


def stress_samples(entry: Entry, plugins: Plugins) -> Sequence[StressSample]:
    """The stress samples of an entry's sample, as plugins bring them."""
    designed = design(BuildRequest(entry.name, sample=True, dry=True), plugins, entry)
    return plugins.stress_samples(designed.model.overlay, designed.model.config)


def judge_all(entry: Entry, plugins: Plugins, work: Path) -> Iterator[StressVerdict]:
    """The verdicts on all stress samples of an entry's sample, each made in the folder `work` and removed after it."""
    for stress in stress_samples(entry, plugins):
        folder = write_checkpoint(entry.sample_directory(), stress, work / stress.name)
        try:
            yield StressTest.open(folder, stress, entry, plugins).run()
        finally:
            shutil.rmtree(folder)
