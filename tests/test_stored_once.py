"""A tied head: its table is stored once where the recipe stores head and embedding alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import read_weights, tiny_checkpoint, write_weights
from command import zoo
from coreai_zoo.backend import Backend, drain
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.contracts import STATIC_S1
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.weights.plan import WeightPlan, plan_weights, plan_without_checkpoint
from coreai_zoo.weights.store import WeightStore
from coreai_zoo_overlays import qwen3_5
from decoders import OVERLAY
from reference import whole_model

KINDS = ("dense", "moe")
ALIKE = ("fp16", "int8lin", "int4lin")
"""Recipes that store head and embedding in one format."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = list(range(30, 42))


def planned(directory: Path, recipe: str) -> WeightPlan:
    checkpoint = Checkpoint.open(directory)
    config = OVERLAY.read_config(checkpoint.config)
    parameters = OVERLAY.parameters(config, STATIC_S1)
    weights = plan_weights(qwen3_5.weight_map(config), parameters, checkpoint.tensors, RECIPES[recipe])
    # What is planned before there is a checkpoint is what is planned with it.
    assumed = plan_without_checkpoint(qwen3_5.weight_map(config), parameters, RECIPES[recipe])
    assert [tensor.stored_as for tensor in assumed.tensors] == [tensor.stored_as for tensor in weights.tensors]
    return weights


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD])
@pytest.mark.parametrize("recipe", ALIKE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_table_is_planned_and_stored_once(kind: Any, recipe: str, kept: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "checkpoint", kind, tie_word_embeddings=True)
    if kept == HEAD:
        weights = read_weights(directory)
        (embedding,) = [key for key in weights if key.endswith("embed_tokens.weight")]
        weights[HEAD] = weights.pop(embedding)
        write_weights(directory, weights)
    plan = planned(directory, recipe)
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    assert by_name[HEAD].stored_as == EMBEDDING
    assert plan.stored_bytes == sum(tensor.format.bytes for tensor in plan.tensors) - by_name[HEAD].format.bytes
    assert plan.totals()["head"].stored_with == "embedding"

    store = WeightStore(tmp_path / "store")
    report = store.fill(plan, Checkpoint.open(directory))
    assert report.computed == len(plan.tensors) - 1
    files = sum(path.stat().st_size for path in store.directory.iterdir() if path.name != "journal.jsonl")
    assert files == plan.stored_bytes
    assert EMBEDDING in store and HEAD not in store
    assert WeightStore(store.directory).fill(plan, Checkpoint.open(directory)).computed == 0


@pytest.mark.parametrize(("recipe", "tied"), [("int8hu", True), *((recipe, False) for recipe in ALIKE)])
def test_a_head_in_a_format_of_its_own_and_an_untied_one_are_stored(recipe: str, tied: bool, tmp_path: Path) -> None:
    plan = planned(tiny_checkpoint(tmp_path, tie_word_embeddings=tied), recipe)
    assert plan.stored == plan.tensors
    assert {total.stored_with for total in plan.totals().values()} == {None}


def test_a_store_goes_from_shared_bytes_to_own_ones_and_back(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=True)
    store = WeightStore(tmp_path / "store")
    for recipe, own in (("int8lin", False), ("int8hu", True), ("int8lin", False)):
        store.fill(planned(directory, recipe), Checkpoint.open(directory))
        assert (HEAD in store) is own
        assert any(path.name.startswith(HEAD) for path in store.directory.iterdir()) is own


def test_the_tied_2b_plans_at_the_published_size() -> None:
    plan = json.loads(zoo("plan", "qwen3.5-2b", "--recipe", "int8lin", "--json").stdout)
    published = 2_477_402_309  # main.mlirb, the community's int8lin of the 2B with the tied table stored once
    assert plan["asset_bytes"] == pytest.approx(published, rel=1e-4)
    assert plan["roles"]["head"]["bytes"] == 0 and plan["roles"]["head"]["stored_with"] == "embedding"
    assert plan["roles"]["head"]["read_per_token"] == 248_320 * 2_048 * 2  # but a token reads it


@pytest.mark.parametrize(("backend", "recipe"), [("coreai", "int8lin"), ("coreml", "fp16")])
def test_an_asset_holds_the_table_once_and_computes_the_same(backend: str, recipe: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=True, head_scale=1.0)
    out = tmp_path / "out"
    contract = ["--contract", "fixed-s1"] if backend == "coreml" else []
    made = zoo(
        *("build", "qwen3.6-27b", "--checkpoint", str(directory), "--custom", "--recipe", recipe, "-o", str(out)),
        *("--backend", backend, "--max-context", "64", "--json", *contract),
    )
    assert made.exit_code == 0, made.stderr
    bundle = Bundle.open(Path(json.loads(made.stdout)["path"]))
    back: Backend = default_plugins().backends()[backend]
    plan = planned(directory, recipe)
    table = next(tensor for tensor in plan.tensors if tensor.name == EMBEDDING).format.bytes
    views = [np.frombuffer(view, np.uint8) for view in back.constants(bundle.asset).values()]
    held = sum({view.ctypes.data: view.nbytes for view in views}.values())
    assert plan.stored_bytes <= held < plan.stored_bytes + table / 2
    assert "stored once, with `embedding`" in (bundle.directory / "README.md").read_text(encoding="utf-8")

    verified = zoo("verify", str(bundle.directory))
    assert verified.exit_code == 0, verified.stdout + verified.stderr
    with back.stepper(bundle.asset, bundle.functions, 64) as stepper:
        logits = np.stack(list(drain(stepper, TOKENS))).astype(np.float32)
    expected = whole_model(directory, TOKENS, Checkpoint.open(directory).config).logits
    cosine = (logits * expected).sum(1) / np.linalg.norm(logits, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.995
