"""Sensitivity: what quantizing one part of a model costs for the bytes that it saves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from click.testing import CliRunner

from checkpoints import tiny_checkpoint
from coreai_zoo.build.design import Design, design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.catalogue import find_entry
from coreai_zoo.cli.app import cli
from coreai_zoo.errors import BadInput
from coreai_zoo.gates import layered
from coreai_zoo.gates.rule import judge
from coreai_zoo.gates.sensitivity import Part, Sensitivity, Subject, margins_lost, measure, parts_of, ranked
from coreai_zoo.gates.sensitivity_results import _in_order, _key, _what
from coreai_zoo.lowering.module import build_module
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.weights.store import WeightStore
from decoders import bind, feed, fresh_states, one_thread, tensors_of

INT4 = QuantizationSpec("int4", "symmetric_with_clipping", 32)
INT8 = QuantizationSpec("int8", "symmetric_with_clipping", 32)
TOKENS = [5, 80, 17, 200, 33, 8, 120, 64, 9, 250, 11, 77]
ENTRY = "qwen3.6-35b-a3b"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", "moe", num_hidden_layers=4, head_scale=4.0)


@pytest.fixture(scope="module")
def resolved(checkpoint: Path) -> Design:
    return design(BuildRequest(ENTRY, checkpoint=checkpoint, custom=True, output=checkpoint.parent), default_plugins())


@pytest.fixture(scope="module")
def subject(resolved: Design) -> Subject:
    return Subject.of(resolved)


def measured(subject: Subject, *parts: Part) -> list[Sensitivity]:
    reference = subject.logits(None, TOKENS)
    return [measure(subject, part, TOKENS, reference) for part in parts]


def built(resolved: Design, base: Mapping[str, QuantizationSpec], part: Part | None, work: Path) -> np.ndarray:
    """Logits of the whole decoder, with the base and one part quantized by the build's own store."""
    chosen = {tensor.name: base.get(tensor.role) for tensor in resolved.weights.tensors}
    if part is not None:
        chosen |= dict.fromkeys(part.tensors, part.spec)
    plan = evolve(
        resolved.weights,
        tensors=tuple(evolve(tensor, quantization=chosen.get(tensor.name)) for tensor in resolved.weights.tensors),
    )
    module = build_module(
        lambda: resolved.model.overlay.decoder(resolved.model.config, resolved.contract),
        list(resolved.functions["main"].rewrites),
    )
    store = WeightStore(work)
    store.fill(plan, resolved.checkpoint)
    bind(module, tensors_of(store, plan.tensors))
    return feed(module, TOKENS, fresh_states(resolved.signatures["main"])).float().numpy()


@pytest.mark.parametrize("base", [{}, {"gdn.in": INT8, "moe.expert": INT8}], ids=["fp16", "int8"])
def test_a_part_costs_what_two_builds_that_differ_in_only_it_differ(
    base: dict[str, QuantizationSpec], resolved: Design, subject: Subject, tmp_path: Path
) -> None:
    specs = {"moe.expert": INT4, "gdn.in": INT4 if base else INT8}
    parts = parts_of(resolved.weights, specs, base=base)
    plain = built(resolved, base, None, tmp_path / "plain")
    for found in measured(evolve(subject, base=base), *parts):
        positions = judge(TOKENS, plain, built(resolved, base, found.part, tmp_path / found.part.role)).positions
        expected = np.mean([position.kl_divergence for position in positions])
        assert expected > 1e-5
        assert found.kl == pytest.approx(expected, rel=0.02)
        assert found.largest_kl >= found.kl


def test_fewer_bits_cost_more_and_save_more(resolved: Design, subject: Subject) -> None:
    parts = [part for spec in (INT4, INT8) for part in parts_of(resolved.weights, {"gdn.in": spec})]
    coarse, fine = measured(subject, *parts)
    assert coarse.kl > 10 * fine.kl > 0
    assert coarse.margin_lost > fine.margin_lost > 0
    assert coarse.part.saved_bytes > fine.part.saved_bytes
    assert ranked([fine, coarse], "kl") == ranked([coarse, fine], "margin") == [coarse, fine]


def test_the_parts_of_a_recipe_save_what_the_recipe_saves(resolved: Design) -> None:
    specs = {role: spec for role, (spec,) in resolved.weights.stored_as().items() if spec is not None}
    plain = sum(evolve(tensor, quantization=None).format.bytes for tensor in resolved.weights.tensors)
    parts = parts_of(resolved.weights, specs)
    assert sum(part.saved_bytes for part in parts) == plain - resolved.weights.stored_bytes


def test_by_a_recipe_a_part_has_the_weights_of_a_role_that_are_stored_so(resolved: Design) -> None:
    """Some weights of `gdn.in` in one format, some in another, and some left alone."""
    first, second, *_left = (tensor.name for tensor in resolved.weights.tensors if tensor.role == "gdn.in")
    parts = parts_of(resolved.weights, {"gdn.in": None}, each={first: INT8, second: INT4})
    assert [(part.spec, part.tensors) for part in parts] == [(INT8, (first,)), (INT4, (second,))]
    keys = {_key(_what(part)) for part in (*parts, *parts_of(resolved.weights, {"gdn.in": INT8}))}
    assert len(keys) == 3, "results of a part are not those of the whole role"
    two = [
        _what(part)
        for name in (first, second)
        for part in parts_of(resolved.weights, {"gdn.in": None}, each={name: INT8})
    ]
    assert _in_order(two) == _in_order(two[::-1]), "whichever was measured first"


def test_each_layer_by_itself_adds_up_to_the_role(resolved: Design) -> None:
    (whole,) = parts_of(resolved.weights, {"gdn.in": INT8})
    layers = parts_of(resolved.weights, {"gdn.in": INT8}, resolved.modules["main"].layer_paths, "layer")
    assert [part.layer for part in layers] == [0, 2]
    assert sorted(name for part in layers for name in part.tensors) == sorted(whole.tensors)
    assert sum(part.saved_bytes for part in layers) == whole.saved_bytes
    (head,) = parts_of(resolved.weights, {"head": INT8}, resolved.modules["main"].layer_paths, "layer")
    assert head.layer is None


def test_each_tensor_by_itself_adds_up_to_the_role(resolved: Design) -> None:
    (whole,) = parts_of(resolved.weights, {"gdn.in": INT8})
    tensors = parts_of(resolved.weights, {"gdn.in": INT8}, resolved.modules["main"].layer_paths, "tensor")
    assert tuple(part.tensor for part in tensors) == whole.tensors
    assert all(part.tensors == (part.tensor,) and f".{part.layer}." in str(part) for part in tensors)
    assert sum(part.saved_bytes for part in tensors) == whole.saved_bytes


def test_a_part_saves_the_difference_of_two_formats_and_is_left_out_where_there_is_none(resolved: Design) -> None:
    base = {"gdn.in": INT8, "head": INT4}
    (part,) = parts_of(resolved.weights, {"gdn.in": INT4, "head": INT4}, base=base)
    (to_eight,), (to_four,) = (parts_of(resolved.weights, {"gdn.in": spec}) for spec in (INT8, INT4))
    assert part.role == "gdn.in"
    assert part.saved_bytes == to_four.saved_bytes - to_eight.saved_bytes
    (back,) = parts_of(resolved.weights, {"gdn.in": None}, base=base)
    assert back.saved_bytes == -to_eight.saved_bytes
    with pytest.raises(BadInput, match="as it is anyway"):
        parts_of(resolved.weights, {"head": INT4}, base=base)


def test_arithmetic_takes_one_thread_however_many_there_are(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layered, "_WORTH_THREADS", 0)  # as if the matrices were large
    counts: set[int] = set()
    torch.set_num_threads(2)
    try:
        subject.logits(None, TOKENS[:2], lambda: counts.add(torch.get_num_threads()))
        assert (counts, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(1)


def test_logits_that_overflow_cost_infinitely_much(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    (part,) = parts_of(subject.plan, {"gdn.in": INT8})
    reference = subject.logits(None, TOKENS)
    overflowing = reference.copy()
    overflowing[3, 5], overflowing[4, 6] = np.inf, np.nan
    monkeypatch.setattr(Subject, "logits", lambda *_: overflowing)
    with np.errstate(invalid="ignore"):
        found = measure(subject, part, TOKENS, reference)
    assert (found.kl, found.largest_kl, found.kl_per_mib, found.margin_lost) == (np.inf,) * 4


def test_a_role_that_is_not_there_and_a_width_that_does_not_fit_are_refused(resolved: Design) -> None:
    with pytest.raises(BadInput, match=r"no weights with the role nonsense\. It has: .*moe\.router"):
        parts_of(resolved.weights, {"nonsense": INT8})
    with pytest.raises(BadInput, match=r"conv1d\.weight \(gdn\.conv: 4 columns are not divisible"):
        parts_of(resolved.weights, {"gdn.conv": INT8})


def test_a_margin_is_lost_where_the_lead_of_the_reference_shrinks_and_only_there() -> None:
    reference = np.array([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0], [0.0, 2.0, 1.5]], dtype=np.float32)
    logits = np.array([[2.5, 1.0, 0.0], [4.0, 1.0, 0.0], [0.0, 1.0, 3.0]], dtype=np.float32)
    assert margins_lost(reference, logits).tolist() == [0.5, 0.0, 2.5]


def test_a_ranking_is_per_byte_saved() -> None:
    def cost(role: str, saved: int, kl: float, margin: float) -> Sensitivity:
        return Sensitivity(Part(role, None, None, INT8, (), max(saved, 0), max(-saved, 0)), kl, kl, margin, 0)

    large, small = cost("mlp", 64 * 2**20, 0.02, 0.01), cost("head", 2**20, 0.01, 0.001)
    assert ranked([large, small], "kl") == [small, large]
    assert ranked([small, large], "margin") == [small, large]
    assert small.kl_per_mib == 0.01
    nothing, more = cost("norm", 0, 0.5, 0.5), cost("router", -(2**20), 0.7, 0.7)
    assert nothing.kl_per_mib is None and more.margin_lost_per_mib is None
    assert ranked([nothing, large, more, small], "kl") == [small, large, more, nothing]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["sensitivity", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_json_in_the_order_that_was_asked_for(checkpoint: Path) -> None:
    options = ("--as", "int4", "--role", "moe.expert", "--role", "moe.router", "--per-layer", "--positions", 6)
    code, out, _ = run(ENTRY, "--custom", "--checkpoint", checkpoint, *options, "--by", "margin", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["positions"] == 6
    assert {(part["role"], part["layer"]) for part in found["parts"]} == {
        (role, layer) for role in ("moe.expert", "moe.router") for layer in range(4)
    }
    margins = [part["margin_lost_per_mib_saved"] for part in found["parts"]]
    assert margins == sorted(margins, reverse=True)
    assert margins[0] > 0


def test_the_command_prints_a_table(checkpoint: Path) -> None:
    code, out, err = run(ENTRY, "--custom", "--checkpoint", checkpoint, "--role", "gdn.out", "--positions", 4)
    assert code == 0, err
    assert "gdn.out" in out
    assert "int8:block32:symmetric_with_clipping" in out
    assert "4 positions; reference: fp16" in out


def test_what_cannot_be_measured_is_said(checkpoint: Path) -> None:
    at = (ENTRY, "--custom", "--checkpoint", checkpoint)
    code, _, err = run(*at, "--role", "moe.router")
    assert code == 2
    assert "leaves moe.router alone. Say how with --as." in err
    code, _, err = run(*at, "--recipe", "fp16")
    assert code == 2
    assert "Recipe fp16 quantizes nothing." in err
    code, _, err = run(*at, "-p", "short", "--positions", 100)
    assert code == 2
    assert "100 positions were asked for" in err
    code, _, err = run(checkpoint, "--sample")
    assert code == 2
    assert "are for an entry" in err
    for options, said in (
        (("--per-layer", "--per-tensor"), "exclude each other"),
        (("--as", "int5"), "The format 'int5' cannot be read"),
        (("--from", "int4:block1"), "is no block of at least 2 inputs"),
        (("--scheduler", "tcp://127.0.0.1:1"), "--scheduler needs -o DIR"),
        (("--scheduler", "tcp://127.0.0.1:1", "-o", "x", "--jobs", 2), "--jobs is for this machine"),
        (("--fresh",), "Say in which one with -o DIR."),
    ):
        code, _, err = run(*at, *options)
        assert (code, said in err) == (2, True), err


def test_the_gate_refuses_with_it_what_it_would_not_do() -> None:
    arguments = ["gate", "qwen3.6-27b", "--sensitivity", "--positions", "2", "--json"]
    directory = find_entry("qwen3.6-27b", default_plugins())[0].sample_directory()
    result = CliRunner().invoke(cli, [*arguments, "--candidate", "torch", "--checkpoint", str(directory)])
    assert result.exit_code == 2
    assert "--sensitivity goes with" in result.stderr
    # An entry has no bundle's record, so the sample's sizes are refused as those of another model.
    result = CliRunner().invoke(cli, [*arguments, "--checkpoint", str(directory)])
    assert result.exit_code == 2
    assert "--custom" in result.stderr
