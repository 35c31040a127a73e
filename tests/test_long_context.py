"""Thousands of positions on a sample, one token at a time, against transformers: what only a long text shows.

The key / value cache has grown beyond every size that a trace or another test has seen, positions are beyond 2,048, up
to which half precision holds every integer, and the recurrent state has decayed and been rounded as often. By night
positions are beyond 4,096 too.
"""

from __future__ import annotations

import numpy as np
import pytest

from coreai_zoo.build.design import design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.gates.bounds import check_bounds
from coreai_zoo.gates.layered import TorchCandidate
from coreai_zoo.gates.oracle import Oracle
from coreai_zoo.gates.rule import Verdict, compare
from coreai_zoo.gates.stress import prompt_of
from coreai_zoo.gates.weights import CheckpointWeights
from coreai_zoo.plugins import default_plugins
from coreai_zoo_qwen36.bounds import BOUNDS
from suite import NIGHTLY

POSITIONS = 5000 if NIGHTLY else 2600
LAYERS = 4  # one of softmax attention among them

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def verdict() -> Verdict:
    """The streamed candidate, on plain weights, against the oracle."""
    request = BuildRequest("qwen3.6-27b", sample=True, layers=LAYERS, recipe="fp16", dry=True)
    designed = design(request, default_plugins())
    assert designed.source.directory is not None
    tokens = prompt_of(designed.source.directory, POSITIONS)
    oracle = Oracle(designed.checkpoint, designed.model.hf_config).run(tokens)
    weights = CheckpointWeights("plain weights", designed.checkpoint, designed.weights)
    name = designed.decode
    candidate = TorchCandidate(designed.modules[name], designed.weights, designed.signatures[name], weights)
    return compare(tokens, oracle, candidate.run(tokens))


def test_no_token_flips_and_every_bound_is_kept(verdict: Verdict) -> None:
    assert len(verdict.positions) == POSITIONS
    assert verdict.confident_positions > POSITIONS // 2
    assert verdict.passed
    # Largest values of single positions are bounded for prompts of 64, and grow with how many there are.
    broken = [
        str(c)
        for c in check_bounds(verdict, BOUNDS.of_class("fp16", "torch"))
        if not c.passed and ("median" in c.name or "hidden" in c.name)
    ]
    assert broken == []


def test_the_last_positions_are_as_good_as_the_first(verdict: Verdict) -> None:
    errors, fifth = np.array([position.relative_error for position in verdict.positions]), POSITIONS // 5
    assert np.median(errors[-fifth:]) <= 2 * np.median(errors[:fifth])
    assert errors[-fifth:].max() <= 3 * errors[:fifth].max()
