"""Where an asset is too large to be run here, a slice of the same build is, and its graph is that of the whole."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from checkpoints import tiny_checkpoint
from command import zoo
from coreai_zoo.backends.coreai.backend import CoreAIBackend, CoreAIStepper
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.gates.slice import differences, slice_depth
from coreai_zoo.lowering.graph import Graph, count
from mutants import MUTANTS, applied
from test_gate_command import forgetful

LAYERS = 12  # three of softmax attention: the whole is more than a slice


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle with more layers than a slice, and its checkpoint."""
    folder = tmp_path_factory.mktemp("slice")
    checkpoint = tiny_checkpoint(folder / "checkpoint", "dense", num_hidden_layers=LAYERS, layer_types=None)
    made = zoo("build", checkpoint, "--recipe", "fp16", "-o", folder / "out", "--work-dir", folder / "work", "--json")
    assert made.exit_code == 0, made.output
    return Path(json.loads(made.stdout)["path"]), checkpoint


@pytest.fixture(scope="module")
def whole(bundle: tuple[Path, Path]) -> dict[str, Graph]:
    return count(CoreAIBackend().program(Bundle.open(bundle[0]).asset))


@pytest.fixture
def slice_of(
    bundle: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[contextlib.AbstractContextManager[Any]], dict[str, Any]]:
    """The slice's line in the transcript of a gate that takes the asset for one too large to be run."""
    monkeypatch.setattr("coreai_zoo.gates.run._INTERPRETED_BYTES", 1)

    def gate(mistake: contextlib.AbstractContextManager[Any]) -> dict[str, Any]:
        with mistake:
            asked = (
                "--checkpoint",
                bundle[1],
                "-p",
                "0123456789",
                "--allow-weak-prompt",
                "--no-control",
                "-o",
                tmp_path,
            )
            result = zoo("gate", bundle[0], *asked, "--json")
        record = json.loads(result.stdout)
        assert "overlay in PyTorch" in record["prompts"][0]["candidate"]
        (found,) = (gate for gate in record["gates"] if gate["gate"] == "slice")
        assert record["verdict"]["passed"] <= found["passed"]
        return dict(found)

    return gate


@pytest.mark.slow
def test_a_slice_is_built_and_run_on_the_runtime(
    slice_of: Callable[[contextlib.AbstractContextManager[Any]], dict[str, Any]],
) -> None:
    found = slice_of(contextlib.nullcontext())
    assert found["passed"], found["summary"]
    words = "the first 8 layers on the coreai runtime, 3 positions; 2 kinds of layer are as in the whole"
    assert found["summary"] == words


@pytest.mark.slow
def test_a_whole_that_was_built_by_another_overlay_fails_by_its_graph(
    slice_of: Callable[[contextlib.AbstractContextManager[Any]], dict[str, Any]],
) -> None:
    found = slice_of(applied(MUTANTS["attention-gate-silu"]))
    assert not found["passed"]
    assert "layer 3 (self_attn) is another graph in the whole than in the slice" in found["summary"]


@pytest.mark.slow
def test_a_runtime_that_forgets_fails_by_the_numbers(
    slice_of: Callable[[contextlib.AbstractContextManager[Any]], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoreAIStepper, "call", forgetful(CoreAIStepper.call))
    found = slice_of(contextlib.nullcontext())
    assert not found["passed"]
    assert "relative error" in found["summary"] or "confident flips" in found["summary"]


def test_an_asset_that_is_run_itself_has_no_slice(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    for candidate in ("auto", "torch"):
        asked = ("-p", "01", "--allow-weak-prompt", "--candidate", candidate, "--no-control", "-o", tmp_path, "--json")
        result = zoo("gate", bundle[0], "--checkpoint", bundle[1], *asked)
        assert [gate["gate"] for gate in json.loads(result.stdout)["gates"]] == ["weights"]


def test_two_of_every_kind_of_layer_are_in_a_slice(whole: dict[str, Graph]) -> None:
    assert slice_depth(whole) == 8
    (graph,) = whole.values()
    assert differences(whole, whole) == []
    less = evolve(graph, kinds=tuple(evolve(kind, operations={**kind.operations, "mul": 0}) for kind in graph.kinds))
    assert len(differences(whole, {"main": less})) == LAYERS
    assert differences(whole, {"other": graph}) == [
        f"the function {name} is in one of them only" for name in ("main", "other")
    ]
    assert differences(whole, {"main": evolve(graph, composites={})}) == [
        "the composites of main are others in the whole than in the slice"
    ]
