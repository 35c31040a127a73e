"""Bundles of every Core AI contract, played by an engine that knows nothing of this project, against transformers.

By day a sample of four layers by two contracts, by night both samples whole by all. How prompts are computed is tested
in PyTorch, in test_prefill.py.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forked
from command import zoo
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.bounds import BFLOAT16_MARGIN, CONFIDENT_MARGIN
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import checkpoint_of
from coreai_zoo.checkpoint.folder import read_config
from coreai_zoo.gates.run import GateOptions, margin_of_asset, run_gate
from coreai_zoo.plugins import default_plugins
from coreai_zoo.progress import Reporter
from decoders import OVERLAY
from mutants import applied
from player import Player
from prefill_mutants import CHUNKS
from reference import whole_model
from shared import Shared
from suite import NIGHTLY

pytestmark = pytest.mark.slow

DENSE, MOE = "qwen3.6-27b", "qwen3.6-35b-a3b"
LAYERS = () if NIGHTLY else ("--layers", "4")
ALL = ("static-s1", "chunked", "chunked-unrolled", "dynamic", "dynamic-bf16")
BY_DAY = ("chunked", "dynamic", "dynamic-bf16")
PLAYED = list(itertools.product((DENSE, MOE), ALL) if NIGHTLY else itertools.product((DENSE,), BY_DAY))
CERTAIN = 0.25  # of a margin between the first and the second token; integers of 8 bits move logits by less


def arguments(entry: str, contract: str, output: Path) -> list[str]:
    return ["build", entry, "--sample", "--contract", contract, *LAYERS, "-o", str(output), "--json"]


def build(entry: str, contract: str, output: Path) -> None:
    """Build a bundle in a process of its own."""
    done = forked.run(*arguments(entry, contract, output))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def bundle_of(shared: Shared) -> functools.partial[Bundle]:
    """Makes a bundle by entry and contract, once in a run of the tests."""

    def make(shared: Shared, entry: str, contract: str) -> Bundle:
        (bundle,) = shared.folder(f"{entry}-{contract}-played", functools.partial(build, entry, contract)).iterdir()
        return Bundle.open(bundle)

    return functools.partial(make, shared)


def oracle(bundle: Bundle, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """Transformers' logits on the sample's checkpoint, cut to the layers of the bundle."""
    checkpoint = checkpoint_of(bundle, default_plugins(), None)
    config, layers = read_config(checkpoint), int(bundle.build["layers"])
    if layers < OVERLAY.facts(OVERLAY.read_config(config))["layers"]:
        config = OVERLAY.with_layers(config, layers)
    return whole_model(checkpoint, tokens, config).logits


@pytest.mark.parametrize(("entry", "contract"), PLAYED)
def test_an_engine_says_with_a_bundle_what_transformers_says(
    entry: str, contract: str, bundle_of: functools.partial[Bundle]
) -> None:
    bundle = bundle_of(entry, contract)
    text = np.random.default_rng(5).integers(0, 900, 300).tolist()
    turns = [text[:240], text[240:261], text[261:262]]  # the second one goes beyond the first 256 positions
    with Player(bundle.directory) as player:
        answers = [player.answer(turn, 6) for turn in turns]
        played = list(player.calls)
        player.reset()
        again = player.answer(turns[2], 3), player.answer(turns[1], 3)
        player.reset()
        assert again == (player.answer(turns[2], 3), player.answer(turns[1], 3))
    # Of each answer the last token is not read. A position knows those before it alone, so transformers runs once.
    whole = [token for turn, answer in zip(turns, answers, strict=True) for token in (*turn, *answer[:-1])]
    expected, read, certain = oracle(bundle, whole), 0, 0
    for turn, answer in zip(turns, answers, strict=True):
        logits = expected[read + len(turn) - 1 :][: len(answer)]
        first, second = np.sort(logits, axis=-1)[:, -1], np.sort(logits, axis=-1)[:, -2]
        sure = first - second >= (BFLOAT16_MARGIN if contract == "dynamic-bf16" else CERTAIN)
        assert sure.any() or contract == "dynamic-bf16"
        certain += int(sure.sum())
        assert (np.array(answer) == logits.argmax(-1))[sure].all()
        read += len(turn) + len(answer) - 1
    assert certain > 2
    sent = [count for name, count in played if name == "prefill"]
    if contract == "chunked":
        assert sent == [239, 20]
    elif contract != "static-s1":
        assert sum(sent) == 259


def test_each_of_two_bundles_is_judged_beside_a_control_in_its_own_precision(
    bundle_of: functools.partial[Bundle],
) -> None:
    options = GateOptions(prompts="code", positions=24, candidate="torch")
    half, wide = (bundle_of(DENSE, contract) for contract in ("dynamic", "dynamic-bf16"))
    for pair in ((half, wide), (wide, half)):
        records = run_gate(pair, options, default_plugins(), Reporter(silent=True))
        for bundle, record in zip(pair, records, strict=True):
            prompt = record["prompts"][0]
            error = np.median([row["control"]["relative_error"] for row in prompt["positions"]])
            assert (error > 0.003) == (bundle is wide), error
            assert prompt["bounds"]["margin"] == (BFLOAT16_MARGIN if bundle is wide else CONFIDENT_MARGIN)


def test_verify_and_diff_ask_for_the_margin_of_the_gate(bundle_of: functools.partial[Bundle]) -> None:
    plugins = default_plugins()
    for contract in ("dynamic", "dynamic-bf16"):
        bundle = bundle_of(DENSE, contract)
        checkpoint = checkpoint_of(bundle, plugins, None)
        options = GateOptions(prompts="code", positions=24, candidate="coreai")
        (record,) = run_gate([bundle], options, plugins, Reporter(silent=True))
        assert margin_of_asset(bundle, plugins, checkpoint) == record["prompts"][0]["bounds"]["margin"]


# A token less or more than a chunk of 64, than a call of 256, and two calls and three more.
EDGES = (1, 63, 64, 65, 256, 257, 515) if NIGHTLY else (65, 257)


@pytest.mark.parametrize("entry", [DENSE, MOE] if NIGHTLY else [DENSE])
def test_a_prompt_that_ends_at_the_edge_of_a_chunk_is_read_to_its_end(
    entry: str, bundle_of: functools.partial[Bundle]
) -> None:
    bundle = bundle_of(entry, "chunked")
    text = np.random.default_rng(6).integers(0, 900, EDGES[-1] + 1).tolist()
    sure = 0
    with Player(bundle.directory) as player:
        for read in EDGES:
            player.reset()
            player.calls.clear()
            answer = player.answer(text[: read + 1], 2)
            assert sum(count for name, count in player.calls if name == "prefill") == read
            logits = oracle(bundle, [*text[: read + 1], *answer])[read:-1]
            ranked = np.sort(logits, axis=-1)
            certain = ranked[:, -1] - ranked[:, -2] >= CERTAIN
            assert (np.array(answer) == logits.argmax(-1))[certain].all(), read
            sure += certain.sum()
    assert sure >= len(EDGES)


def test_both_functions_share_their_weights_under_the_same_names(bundle_of: functools.partial[Bundle]) -> None:
    backend = CoreAIBackend()
    one, two = (backend.constants(bundle_of(DENSE, contract).asset) for contract in ("dynamic", "chunked"))
    weights = {name: bytes(view) for name, view in one.items() if "parametrizations" in name}
    assert len(weights) > 40
    assert weights == {name: bytes(view) for name, view in two.items() if "parametrizations" in name}
    assert not [name for name in (*one, *two) if name.startswith("resource")]
    added = sum(view.nbytes for name, view in two.items() if name not in one)
    assert added == 64 * 64  # where the tokens of a chunk meet, once for all layers


def test_the_chunk_of_a_prompt_is_told_to_engines(bundle_of: functools.partial[Bundle]) -> None:
    chunked, dynamic = (bundle_of(DENSE, contract).metadata["language"] for contract in ("chunked", "dynamic"))
    assert (chunked["prefill_chunk_size"], chunked["prefill_chunk_threshold"]) == (256, 256)
    assert "prefill_chunk_size" not in dynamic and "prefill_chunk_threshold" not in dynamic


def test_the_gate_judges_how_a_prompt_is_read(bundle_of: functools.partial[Bundle], tmp_path: Path) -> None:
    bundle = bundle_of(DENSE, "chunked")
    command = ["gate", str(bundle.directory), "--prompts", "code", "--positions", "72", "--no-control", "--json"]
    command += ["--allow-weak-prompt", "-o", str(tmp_path)]
    passed = zoo(*command)
    assert passed.exit_code == 0, passed.output
    (gate,) = (gate for gate in json.loads(passed.stdout)["gates"] if gate["gate"] == "prefill")
    assert gate["summary"] == "72 positions in PyTorch and 68 on the coreai runtime: within the bounds"

    mutant = next(mutant for mutant in CHUNKS if mutant.name == "written-does-not-decay")
    with applied(mutant):
        failed = zoo(*command)
    assert failed.exit_code == 1
    reasons = json.loads(failed.stdout)["verdict"]["reasons"]
    assert [reason for reason in reasons if reason.startswith("gate prefill: ")] == reasons


@pytest.mark.skipif(not NIGHTLY, reason="builds two bundles; make nightly runs it")
@pytest.mark.parametrize("contract", ["chunked", "dynamic"])
def test_builds_in_processes_with_other_hash_seeds_have_the_same_bytes(
    contract: str, bundle_of: functools.partial[Bundle], tmp_path: Path
) -> None:
    bundle = bundle_of(MOE, contract)
    command = [sys.executable, "-m", "coreai_zoo", *arguments(MOE, contract, tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "77"})
    files = sorted(path.relative_to(bundle.directory) for path in bundle.directory.rglob("*") if path.is_file())
    other = tmp_path / bundle.directory.name
    assert [file for file in files if (bundle.directory / file).read_bytes() != (other / file).read_bytes()] == []


@pytest.mark.skipif(not NIGHTLY, reason="builds a bundle; make nightly runs it")
def test_the_gate_fails_an_asset_that_reads_prompts_wrongly(tmp_path: Path) -> None:
    mutant = next(mutant for mutant in CHUNKS if mutant.name == "written-does-not-decay")
    with applied(mutant):
        assert zoo("build", DENSE, "--sample", "--contract", "chunked", "-o", tmp_path).exit_code == 0
    (bundle,) = tmp_path.iterdir()
    failed = zoo("gate", bundle, "--prompts", "code", "--positions", "72", "--no-control", "--json")
    assert failed.exit_code == 1
    assert any("prefill" in reason for reason in json.loads(failed.stdout)["verdict"]["reasons"])
