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
from coreai_zoo.lowering.graph import Graph, LayerKind, count
from mutants import MUTANTS, applied
from prefill_mutants import CHUNKS
from suite import NIGHTLY
from test_gate_command import forgetful

LAYERS = 12  # three of softmax attention: the whole is more than a slice


def build(folder: Path, *options: str) -> tuple[Path, Path]:
    """A bundle with more layers than a slice, and its checkpoint."""
    checkpoint = tiny_checkpoint(folder / "checkpoint", "dense", num_hidden_layers=LAYERS, layer_types=None)
    made = zoo("build", checkpoint, *options, "-o", folder / "out", "--work-dir", folder / "work", "--json")
    assert made.exit_code == 0, made.output
    return Path(json.loads(made.stdout)["path"]), checkpoint


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("slice"), "--recipe", "fp16")


@pytest.fixture(scope="module")
def whole(bundle: tuple[Path, Path]) -> dict[str, Graph]:
    return count(CoreAIBackend().program(Bundle.open(bundle[0]).asset))


def sliced(bundle: tuple[Path, Path], output: Path) -> dict[str, Any]:
    """The slice's line in the transcript of a gate on a bundle."""
    asked = ("-p", "0123456789", "--allow-weak-prompt", "--no-control", "-o", output, "--json")
    record = json.loads(zoo("gate", bundle[0], "--checkpoint", bundle[1], *asked).stdout)
    assert "overlay in PyTorch" in record["prompts"][0]["candidate"]
    (found,) = (gate for gate in record["gates"] if gate["gate"] == "slice")
    assert record["verdict"]["passed"] <= found["passed"]
    return dict(found)


@pytest.fixture
def slice_of(
    bundle: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[contextlib.AbstractContextManager[Any]], dict[str, Any]]:
    """Gates a bundle whose asset is taken for one too large to be run, with a mistake."""
    monkeypatch.setattr("coreai_zoo.gates.run._INTERPRETED_BYTES", 1)

    def gate(mistake: contextlib.AbstractContextManager[Any]) -> dict[str, Any]:
        with mistake:
            return sliced(bundle, tmp_path)

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


@pytest.mark.skipif(not NIGHTLY, reason="builds an asset with two functions, and two slices; make nightly runs it")
@pytest.mark.slow
def test_a_slice_of_two_functions_reads_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(tmp_path, "--recipe", "fp16", "--contract", "chunked")
    monkeypatch.setattr("coreai_zoo.gates.run._INTERPRETED_BYTES", 1)
    found = sliced(made, tmp_path / "gate")
    assert found["passed"], found["summary"]

    mutant = next(mutant for mutant in CHUNKS if mutant.name == "written-does-not-decay")
    with applied(mutant):
        found = sliced(made, tmp_path / "gate")
    assert not found["passed"]
    assert "the composites of prefill are others in the whole than in the slice" in found["summary"]

    monkeypatch.setattr("coreai_zoo.gates.prefill.call_prefill", lambda *_: None)
    found = sliced(made, tmp_path / "gate")
    assert not found["passed"]
    assert found["summary"].count(": prefill: ") + found["summary"].count("; prefill: ") >= 1


def test_an_asset_that_is_run_itself_has_no_slice(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    for candidate in ("auto", "torch"):
        asked = ("-p", "01", "--allow-weak-prompt", "--candidate", candidate, "--no-control", "-o", tmp_path, "--json")
        result = zoo("gate", bundle[0], "--checkpoint", bundle[1], *asked)
        assert [gate["gate"] for gate in json.loads(result.stdout)["gates"]] == ["weights"]


def cut(whole: dict[str, Graph], depth: int) -> dict[str, Graph]:
    """The graph of a slice: the first layers of the whole."""
    kinds = [evolve(kind, layers=tuple(at for at in kind.layers if at < depth)) for kind in whole["main"].kinds]
    return {"main": evolve(whole["main"], kinds=tuple(kind for kind in kinds if kind.layers))}


def each_by_itself(whole: dict[str, Graph], change: Callable[[int, LayerKind], LayerKind]) -> dict[str, Graph]:
    """The graph with each layer a kind of its own, changed."""
    kinds = (change(at, evolve(kind, layers=(at,))) for at, kind in enumerate(whole["main"].layers))
    return {"main": evolve(whole["main"], kinds=tuple(kinds))}


def with_line(kind: LayerKind, line: str) -> LayerKind:
    return evolve(kind, wiring=evolve(kind.wiring, lines={**kind.wiring.lines, line: 1}))


def test_two_of_every_kind_of_layer_are_in_a_slice(whole: dict[str, Graph]) -> None:
    assert slice_depth(whole) == 8
    (graph,) = whole.values()
    assert differences(whole, whole) == differences(whole, cut(whole, 8)) == []
    less = evolve(graph, kinds=tuple(evolve(kind, operations={**kind.operations, "mul": 0}) for kind in graph.kinds))
    assert len(differences(whole, {"main": less})) == LAYERS
    assert differences(whole, {"other": graph}) == [
        f"the function {name} is in one of them only" for name in ("main", "other")
    ]
    other = "of main are others in the whole than in the slice"
    assert differences(whole, {"main": evolve(graph, composites={})}) == [f"the composites {other}"]


@pytest.mark.parametrize("odd", [3, 8, 11])
def test_a_layer_unlike_the_others_of_its_kind_is_seen_wherever_it_is(whole: dict[str, Graph], odd: int) -> None:
    wrong = each_by_itself(whole, lambda at, kind: with_line(kind, "tanh(add)") if at == odd else kind)
    assert slice_depth(wrong) == 8, "a slice, whatever the whole looks like"
    name = whole["main"].layers[odd].name
    assert differences(wrong, cut(whole, 8)) == [
        f"layer {odd} ({name}) is another graph in the whole than in the slice"
    ]


def test_another_composite_and_another_final_norm_are_seen(whole: dict[str, Graph]) -> None:
    (graph,) = whole.values()
    (line,) = (line for line in graph.wiring.lines if line.startswith("rms_norm") and "model.norm.weight" in line)
    edited = {text.replace("E-7", "E-6") if text == line else text: n for text, n in graph.wiring.lines.items()}
    assert edited != graph.wiring.lines
    final = evolve(graph, wiring=evolve(graph.wiring, lines=edited))
    assert differences({"main": final}, cut(whole, 8)) == [
        "what belongs to no layer of main is other in the whole than in the slice"
    ]
    name, wiring = next(iter(graph.composite_wiring.items()))
    inside = {**graph.composite_wiring, name: evolve(wiring, lines={**wiring.lines, "tanh(add)": 1})}
    assert differences({"main": evolve(graph, composite_wiring=inside)}, cut(whole, 8)) == [
        "the composites of main are others in the whole than in the slice"
    ]


def test_the_last_layer_of_a_function_that_gives_nothing_is_like_the_last_one_and_no_other(
    whole: dict[str, Graph],
) -> None:
    def ends(graph: dict[str, Graph]) -> dict[str, Graph]:
        last = len(graph["main"].layers) - 1
        changed = each_by_itself(graph, lambda at, kind: with_line(kind, "cut") if at == last else kind)
        return {"main": evolve(changed["main"], cut=True)}

    assert differences(ends(whole), ends(cut(whole, 8))) == []
    told = " is another graph in the whole than in the slice"
    assert differences(ends(whole), {"main": evolve(cut(whole, 8)["main"], cut=True)}) == [
        f"layer 11 (self_attn){told}"
    ]
    wrong = each_by_itself(ends(whole), lambda at, kind: with_line(kind, "cut") if at == 7 else kind)
    assert differences({"main": evolve(wrong["main"], cut=True)}, ends(cut(whole, 8))) == [f"layer 7 (self_attn){told}"]
