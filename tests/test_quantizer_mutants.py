"""Each mistake in how weights are quantized is found in what was stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve

from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.build.design import Design, design
from coreai_zoo.build.expected import expected_by
from coreai_zoo.build.pipeline import build
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.stored import check_stored
from coreai_zoo.gates.stored import compare_weights
from coreai_zoo.gates.weights import AssetWeights, CheckpointWeights
from coreai_zoo.lowering.module import constants
from coreai_zoo.plugins import default_plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.recipes import Recipe
from coreai_zoo.weights.store import WeightStore
from decoders import tensors_of
from documents import read
from quantizer_mutants import LAYERS, QUANTIZER_MUTANTS, QuantizerMutant, table
from traces import trace_once

QUIET = Reporter(silent=True)


def designed(recipe: Recipe) -> Design:
    return design(BuildRequest("qwen3.6-27b", sample=True, recipe=recipe), default_plugins())


def values_found(of: Design, directory: Path) -> dict[str, torch.Tensor]:
    """The bytes that the weights of a design are stored in, by the names that they have in an asset."""
    store = WeightStore(directory)
    store.fill(of.weights, of.checkpoint)
    stored = constants(tensors_of(store, of.weights.tensors))
    return {name: torch.from_numpy(each.data.reshape(-1).view(np.uint8)) for name, each in stored.items()}


def gate(of: Design, state: dict[str, torch.Tensor]) -> bool:
    """Whether the gate that compares every value passes."""
    asset = AssetWeights("the store", {tensor.name: tensor for tensor in of.weights.tensors}, state)
    checkpoint = CheckpointWeights("the checkpoint", of.checkpoint, of.weights)
    return compare_weights(of.weights, asset, checkpoint, QUIET).passed


def weights_pass(bundle: Bundle, of: Design) -> bool:
    """Whether `zoo verify` passes the weights of a bundle, as one that is to be of a design."""
    known = {of.recipe.name: of.recipe}
    return check_stored(bundle, CoreAIBackend(), known, expected_by(of, of.checkpoint.directory)).passed


def built(recipe: Recipe, output: Path) -> Bundle:
    request = BuildRequest("qwen3.6-27b", sample=True, recipe=recipe, output=output)
    return Bundle.open(build(request, default_plugins(), QUIET).path)


VALUES = [mutant for mutant in QUANTIZER_MUTANTS if not mutant.whole]
FORMATS = [mutant for mutant in QUANTIZER_MUTANTS if mutant.whole]


@pytest.mark.parametrize("mutant", VALUES, ids=lambda mutant: mutant.name)
def test_a_mistake_in_values_fails_the_gate(mutant: QuantizerMutant, tmp_path: Path) -> None:
    right = designed(mutant.recipe)
    with pytest.MonkeyPatch.context() as patch:
        mutant.make(patch)
        wrong = values_found(designed(mutant.recipe), tmp_path / "wrong")
    assert not gate(right, wrong)
    assert gate(right, values_found(right, tmp_path / "right"))


@pytest.mark.parametrize("mutant", FORMATS, ids=lambda mutant: mutant.name)
def test_a_mistake_in_which_weights_fails_to_verify(
    mutant: QuantizerMutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_once(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        mutant.make(patch)
        wrong = built(mutant.recipe, tmp_path)
    assert not weights_pass(wrong, designed(mutant.recipe))


def test_without_a_mistake_both_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_once(monkeypatch)
    bundle = built(LAYERS, tmp_path)
    assert weights_pass(bundle, designed(LAYERS))
    # The recipe is no plugin's: the rules in build.json are what the name stands for.
    assert check_stored(bundle, CoreAIBackend(), {}, None).passed
    other = evolve(LAYERS, rules=LAYERS.rules[1:])
    renamed = evolve(bundle, metadata={**bundle.metadata, "compression": other.published_name})
    assert not check_stored(renamed, CoreAIBackend(), {}, None).passed


def test_the_page_has_every_mutant() -> None:
    assert table() in read("gate-mutants.md")
