"""A few mutants all the way: lowered to a real bundle, of which the runtime and the torch candidate say the same.

tests/test_mutants.py runs every mutant in PyTorch, which takes half a second each; lowering one takes most of a minute,
so that is for the night.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from attack import ENTRIES, UNTOUCHED, Outcome, Target
from coreai_zoo.backend import Backend
from coreai_zoo.bounds import Arithmetic
from coreai_zoo.build.design import design
from coreai_zoo.build.pipeline import build
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.errors import CheckFailed
from coreai_zoo.gate import Model
from coreai_zoo.gates.bounds import check_bounds
from coreai_zoo.gates.candidate import AssetCandidate
from coreai_zoo.gates.layered import TorchCandidate
from coreai_zoo.gates.weights import AssetWeights
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo_qwen36.bounds import BOUNDS as SAMPLES
from mutants import MUTANTS, Mutant, applied
from suite import NIGHTLY

POSITIONS = 16
NAMES = ("attention-gate-left-out", "gva-tiled", "conv-state-after-activation")
# Declared as the recipe that ships, lowered as another.
COARSER = evolve(MUTANTS["int4-as-int8"], recipe=RECIPES["int4lin"])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target("dense", tmp_path_factory.mktemp("stores"), positions=POSITIONS)


def outcomes(mutant: Mutant, target: Target, folder: Path) -> dict[Arithmetic, Outcome]:
    """Build the sample with the mutant in force and judge both candidates, by the bounds of what it claims to be."""
    plugins = default_plugins()
    request = BuildRequest(ENTRIES["dense"], sample=True, recipe=mutant.recipe.name, output=folder)
    claimed = RECIPES["int8hu"] if mutant.declared else mutant.recipe
    stored = {role: None if spec is None else {"dtype": spec.dtype} for role, spec in claimed.specs.items()}
    with applied(mutant):
        bundle = Bundle.open(build(request, plugins).path)
        resolved = design(request, plugins)
        backend: Backend = resolved.backend
        weights = AssetWeights.open(bundle.asset, backend, "main", resolved.weights)
        candidates: dict[Arithmetic, Model] = {
            "runtime": AssetCandidate(bundle, backend),
            "torch": TorchCandidate(resolved.modules["main"], resolved.weights, resolved.signatures["main"], weights),
        }
        found = {}
        for arithmetic, candidate in candidates.items():
            verdict = target.compare(candidate.run(target.tokens))
            bounds = SAMPLES.of_recipe(stored, len(target.config.layer_types), arithmetic, target.bounds_kind)
            found[arithmetic] = Outcome(verdict, check_bounds(verdict, bounds))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not NIGHTLY, reason="takes half a minute; make nightly runs it")
def test_a_mutant_whose_logits_are_not_finite_is_refused_by_the_build(target: Target, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"does not verify: .*step: two tokens, logits not finite"):
        outcomes(MUTANTS["decay-sign"], target, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not NIGHTLY, reason="takes most of a minute each; make nightly runs it")
@pytest.mark.parametrize("mutant", [UNTOUCHED, *(MUTANTS[name] for name in NAMES), COARSER], ids=lambda it: it.name)
def test_a_lowered_mutant_fails_by_either_arithmetic_and_the_untouched_sample_by_none(
    mutant: Mutant, target: Target, tmp_path: Path
) -> None:
    found = outcomes(mutant, target, tmp_path)

    assert found.keys() == {"runtime", "torch"}
    caught = {arithmetic: outcome.caught_by is not None for arithmetic, outcome in found.items()}
    assert caught == dict.fromkeys(found, mutant is not UNTOUCHED), {a: o.evidence for a, o in found.items()}
