"""Stress samples: the untouched decoder passes each, and mistakes of precision and of eps do not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file

from attack import DOCUMENT, ENTRIES, UNTOUCHED, Outcome, Target, targets_in
from coreai_zoo.bounds import BFLOAT16_MARGIN, GENERAL
from coreai_zoo.catalogue import find_entry
from coreai_zoo.errors import BadInput
from coreai_zoo.gates.stress import StressTest, stress_samples, write_checkpoint
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import PLAIN
from coreai_zoo.stress import StressSample
from mutants import BOTH
from precision_mutants import GOLDEN, PRECISION
from product_mutants import table as product_table
from suite import NIGHTLY

MUTANTS = [mutant for mutant in PRECISION.values() if mutant.on != GOLDEN]
CASES = [(mutant, kind) for mutant in MUTANTS for kind in mutant.kinds]
# By day each mutant on one of its kinds, in turn, and one of those that four thousand positions show. Each stress
# sample of each kind has some. At night all on all.
AT_NIGHT = {"positions-in-bf16", "angles-in-half", "frequencies-in-half"}
RUN = [
    (mutant, kind)
    for number, mutant in enumerate(MUTANTS)
    for place, kind in enumerate(mutant.kinds)
    if NIGHTLY or (place == (number + 1) % len(mutant.kinds) and mutant.name not in AT_NIGHT)
]
SHORT = ("small-activations", "slow-decay", "large-activations", "offset-scores", "fat-tailed-head")
SAMPLES = [(kind, name) for kind in BOTH for name in SHORT] + [("dense", "long-context")]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Target]:
    """Each stress sample of each kind, with its oracle's answer."""
    return targets_in(tmp_path_factory.mktemp("targets"))


@pytest.fixture(scope="module")
def untouched(targets: Callable[[str, str], Target]) -> Callable[[str, str], Outcome]:
    """What the gate says of the decoder without a mistake on a stress sample of a kind, by the sample's own recipe."""
    return functools.cache(
        lambda kind, name: targets(kind, name).attack(evolve(UNTOUCHED, recipe=RECIPES[sample_of(kind, name).recipe]))
    )


@pytest.mark.parametrize("name", ["small-activations", "slow-decay"])
def test_an_entry_of_a_contract_in_bfloat16_is_held_to_bounds_of_that(name: str, tmp_path: Path) -> None:
    plugins = default_plugins()
    entry = evolve(find_entry(ENTRIES["dense"], plugins)[0], contract="dynamic-bf16")
    stress = sample_of("dense", name)
    folder = write_checkpoint(entry.sample_directory(), stress, tmp_path / "checkpoint")
    found = StressTest.open(folder, stress, entry, plugins).run()
    positions = found.verdict.positions
    assert {position.sure_from for position in positions} == {BFLOAT16_MARGIN}
    half = stress.bounds.of_recipe({}, 8, "torch", "dense").median_error
    assert np.median([position.relative_error for position in positions]) > half, "it was computed in bfloat16"
    assert found.reasons == ()


def sample_of(kind: str, name: str) -> StressSample:
    entry = find_entry(ENTRIES[kind], default_plugins())[0]
    (found,) = (each for each in stress_samples(entry, default_plugins()) if each.name == name)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What they catch
# ---------------------------------------------------------------------------------------------------------------------


def test_every_stress_sample_is_one_that_a_mutant_needs() -> None:
    for kind in BOTH:
        brought = {
            each.name for each in stress_samples(find_entry(ENTRIES[kind], default_plugins())[0], default_plugins())
        }
        assert brought == {name for each, name in SAMPLES if each == kind}
    assert {(kind, mutant.on) for mutant, kind in CASES} >= {("dense", name) for name in (*SHORT, "long-context")}
    assert {(kind, mutant.on) for mutant, kind in RUN} == {(kind, mutant.on) for mutant, kind in CASES}
    assert {mutant.name for mutant, _ in CASES} - {mutant.name for mutant, _ in RUN} == (set() if NIGHTLY else AT_NIGHT)


@pytest.mark.parametrize(("kind", "name"), SAMPLES)
def test_the_untouched_decoder_passes(kind: str, name: str, untouched: Callable[[str, str], Outcome]) -> None:
    stress, outcome = sample_of(kind, name), untouched(kind, name)
    assert outcome.caught_by is None, outcome.evidence
    assert len(outcome.verdict.positions) == stress.positions - stress.first
    assert len(outcome.checks) >= 10  # those of the control too


@pytest.mark.parametrize(("mutant", "kind"), RUN, ids=[f"{mutant.name}-{kind}" for mutant, kind in RUN])
def test_a_stress_sample_catches(mutant: Any, kind: str, targets: Callable[[str, str], Target]) -> None:
    outcome = targets(kind, mutant.on).attack(mutant, briefly=True)
    assert outcome.caught_by is not None, f"{mutant.mistake}, and {mutant.on} does not show it"


def test_the_documentation_lists_every_mutant_with_what_it_is_run_on() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for mutant in PRECISION.values():
        row = f"| `{mutant.name}` | {mutant.mistake} |" + ("" if mutant.on == GOLDEN else f" {mutant.on} |")
        assert text.count(row) == 1, mutant.name
    assert product_table() in text


def test_the_sample_itself_shows_few_of_them(targets: Callable[[str, str], Target]) -> None:
    """What the stress samples are for: five that they catch and the sample lets pass."""
    for name in ("eps-of-the-final-norm", "a-in-half", "scores-in-half", "l2-eps", "softplus-in-half"):
        assert targets("dense", "sample").attack(PRECISION[name]).caught_by is None, name


# ---------------------------------------------------------------------------------------------------------------------
# How they are made and judged
# ---------------------------------------------------------------------------------------------------------------------


def test_a_stress_sample_is_the_same_every_time_and_another_model_than_the_sample(tmp_path: Path) -> None:
    entry = find_entry(ENTRIES["dense"], default_plugins())[0]
    sample = load_file(entry.sample_directory() / "model.safetensors")
    for name in SHORT:
        one, other = (
            load_file(
                write_checkpoint(entry.sample_directory(), sample_of("dense", name), tmp_path / place / name)
                / "model.safetensors"
            )
            for place in ("one", "other")
        )
        assert one.keys() == other.keys() == sample.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert any(not torch.equal(one[key], sample[key]) for key in one)
        assert {key: tensor.dtype for key, tensor in one.items()} == {key: t.dtype for key, t in sample.items()}


def test_a_change_that_overflows_is_refused(tmp_path: Path) -> None:
    def overflow(weights: dict[str, torch.Tensor], _config: dict[str, Any]) -> None:
        weights["lm_head.weight"][3, 5] = float("inf")

    stress = StressSample("overflow", "it overflows", overflow, sample_of("dense", "slow-decay").bounds)
    with pytest.raises(BadInput, match=r"overflow has values that are not finite in lm_head\.weight"):
        write_checkpoint(
            find_entry(ENTRIES["dense"], default_plugins())[0].sample_directory(), stress, tmp_path / "new"
        )


def test_a_stress_sample_has_bounds_of_its_own_and_positions_to_judge() -> None:
    def nothing(_weights: object, _config: object) -> None:
        return None

    with pytest.raises(ValueError, match="no row for fp16"):
        StressSample("one", "why", nothing, evolve(GENERAL, rows={}, router_gaps={}))
    with pytest.raises(ValueError, match="none is left from position 32 on"):
        StressSample("one", "why", nothing, GENERAL, first=32)
    with pytest.raises(ValueError, match="name"):
        StressSample("Not A Name", "why", nothing, GENERAL)


@pytest.mark.parametrize("kind", BOTH)
def test_the_host_judges_the_overlay_as_the_attack_does(
    kind: str, untouched: Callable[[str, str], Outcome], tmp_path: Path
) -> None:
    entry = find_entry(ENTRIES[kind], default_plugins())[0]
    stress = sample_of(kind, "fat-tailed-head")
    test = StressTest.open(
        write_checkpoint(entry.sample_directory(), stress, tmp_path / "s"), stress, entry, default_plugins()
    )
    found = test.run()
    assert found.reasons == ()
    expected = untouched(kind, stress.name)
    assert [check.name for check in found.checks] == [check.name for check in expected.checks]
    assert np.allclose([check.limit for check in found.checks], [check.limit for check in expected.checks])
    assert np.allclose([check.value for check in found.checks], [check.value for check in expected.checks], rtol=0.05)
    noisy = evolve(test.oracle, logits=test.oracle.logits + np.float32(1) * np.arange(test.oracle.logits.shape[1]) % 2)
    assert any("relative error" in reason for reason in test.judge(noisy).reasons)
    assert stress.recipe != PLAIN
