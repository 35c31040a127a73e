"""The short way through torch.export gives what the public one does, and lines are known where they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coreai_torch import get_decomp_table
from packaging.version import Version
from torch import Tensor, nn
from torch._functorch import aot_autograd
from torch.export import ExportedProgram

from checkpoints import tiny_checkpoint
from coreai_zoo.backends.coreml import lowering as coreml
from coreai_zoo.contracts import CONTRACTS, TraceSpec
from coreai_zoo.engine import PREFILL
from coreai_zoo.lowering import torch_export
from coreai_zoo.lowering.module import build_module
from coreai_zoo.lowering.trace import trace
from coreai_zoo_overlays import qwen3_5
from decoders import OVERLAY, rewrites_of
from suite import NIGHTLY

BY_NIGHT = pytest.mark.skipif(not NIGHTLY, reason="takes most of half a minute; make nightly runs it")


def decoder(folder: Path, kind: Any, name: str, function: str) -> tuple[nn.Module, TraceSpec]:
    """A decoder of three layers with zeros for weights, in the form of a function of a contract, and its signature."""
    contract = CONTRACTS[name]
    layers = ["linear_attention"] * 2 + ["full_attention"]
    tiny_checkpoint(folder, kind, num_hidden_layers=3, layer_types=layers)
    config = OVERLAY.read_config(json.loads((folder / "config.json").read_text()))
    extra = qwen3_5.extra_states(config, contract)
    spec = contract.functions(OVERLAY.kv_cache(config), extra, config.vocab_size, 512)[function]
    rewrites = [("qwen36", rewrite) for rewrite in rewrites_of(contract, function)]
    module = build_module(lambda: OVERLAY.decoder(config, contract), rewrites)
    return module.to_empty(device="cpu"), spec


def described(program: ExportedProgram) -> list[object]:
    """What a program computes, values numbered in its order: names differ, and say nothing.

    To record a record leaves assertions about the dtypes in it, which are no part of that, and takes out what is copied
    over all of an argument, which is its value.
    """
    numbers: dict[str, int] = {}
    found: list[object] = []
    for node in program.graph.nodes:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            continue
        if node.target is torch.ops.aten.copy.default and node.args[0].op == "placeholder":
            numbers[node.name] = numbers[node.args[1].name]
            continue
        numbers[node.name] = len(numbers)
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda used: numbers[used.name])
        value = node.meta.get("val")
        kind = (str(value.dtype), len(value.shape)) if isinstance(value, Tensor) else type(value).__name__
        found.append((node.op, str(node.target) if node.op == "call_function" else "", str(arguments), kind))
    signature = program.graph_signature
    inputs = [(spec.kind, spec.target, numbers[spec.arg.name]) for spec in signature.input_specs]
    outputs = [(spec.kind, spec.target, numbers[spec.arg.name]) for spec in signature.output_specs]
    return [*found, inputs, outputs, sorted(program.state_dict)]


@pytest.mark.parametrize(
    ("kind", "contract", "function"),
    [
        ("dense", "chunked", PREFILL),
        ("moe", "static-s1", "main"),
        pytest.param("moe", "chunked", PREFILL, marks=BY_NIGHT),  # no operation that neither of the others has
    ],
)
def test_the_short_way_gives_what_the_public_one_does(
    kind: str, contract: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, spec = decoder(tmp_path, kind, contract, function)
    runs: list[None] = []
    counting = module.register_forward_pre_hook(lambda *_: runs.append(None))
    short = trace(module, spec, get_decomp_table())
    counting.remove()
    assert len(runs) == 1, "what it writes to was expected"
    monkeypatch.setattr(torch_export, "_READ", ())
    public = trace(module, spec, get_decomp_table())
    assert len(described(short)) > 200
    assert described(short) == described(public)


def test_the_short_way_gives_core_ml_what_the_public_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, spec = decoder(tmp_path, "dense", "fixed-s1", "main")
    short = coreml.trace(module, spec)
    monkeypatch.setattr(torch_export, "_READ", ())
    public = coreml.trace(module, spec)
    assert len(described(short)) > 200
    assert described(short) == described(public)


def test_the_short_way_is_taken_by_the_torch_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one has to be read first: see `torch_export`."""
    assert Version(torch.__version__).base_version in torch_export._READ
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("the public way was taken"))
    recording = torch.export._trace._export_to_aten_ir
    program = torch_export.export(nn.SiLU(), (torch.ones(2),), ({},), get_decomp_table())
    assert [node.op for node in program.graph.nodes] == ["placeholder", "call_function", "output"]
    assert torch.export._trace._export_to_aten_ir is recording


class Odd(nn.Module):
    """Writes to two states, and does with the rest that it has what a test says."""

    counted: Tensor

    def __init__(self, does: Callable[[Odd, Tensor, Tensor], Any], *, writes: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("counted", torch.zeros(3))
        self.does, self.writes = does, writes

    def forward(self, token: Tensor, one: Tensor, other: Tensor) -> Any:
        one[0] = 5
        if self.writes:
            other.copy_(one * 2)
        return self.does(self, token, other)


def exported(module: Odd, states: int) -> list[object]:
    examples = tuple(torch.arange(9.0).reshape(3, 3) + i for i in range(3))
    with torch.no_grad():
        return described(torch_export.export(module, examples, ({}, {}, {}), get_decomp_table(), states=states))


def test_what_is_written_is_not_analysed_where_it_is_expected() -> None:
    runs: list[None] = []

    def usual(module: Odd, token: Tensor, other: Tensor) -> Tensor:
        runs.append(None)
        return token * module.weight + other[1] + module.counted

    expected, in_one = exported(Odd(usual), states=2), len(runs)
    assert expected == exported(Odd(usual), states=0)
    assert (in_one, len(runs) - in_one) == (1, 2)


ODD: dict[str, Odd] = {
    "leaves a state unwritten": Odd(lambda odd, token, other: token + other, writes=False),
    "writes to its token": Odd(lambda odd, token, other: token.add_(other) * 2),
    "writes to a part of its token": Odd(lambda odd, token, other: token[:2].zero_() + 1),
    "writes to a buffer": Odd(lambda odd, token, other: odd.counted.add_(1) + token),
    "writes to a view of a buffer": Odd(lambda odd, token, other: odd.counted[1:].fill_(3)[0] + token),
    "writes to a buffer and replaces it": Odd(
        lambda odd, token, other: (odd.counted.add_(1), setattr(odd, "counted", odd.counted.clone()), token + 1)[2]
    ),
    "writes to a buffer that it replaced": Odd(
        lambda odd, token, other: (
            before := odd.counted,
            setattr(odd, "counted", token[0] + 1),
            before.add_(1) + token,
        )[2]
    ),
    "puts its token elsewhere": Odd(lambda odd, token, other: token.set_(other.clone()) + 1),
    "puts a buffer elsewhere": Odd(lambda odd, token, other: odd.counted.set_(token[0].clone()) + token),
    "writes to a parameter": Odd(lambda odd, token, other: odd.weight.mul_(2) + token),
    "gives a state": Odd(lambda odd, token, other: other),
    "gives a part of a state": Odd(lambda odd, token, other: other[1:]),
    "gives its token": Odd(lambda odd, token, other: token),
    "gives two tensors": Odd(lambda odd, token, other: (token + other, token + 1)),
    "gives no tensor": Odd(lambda odd, token, other: 7),
    "turns a state": Odd(lambda odd, token, other: other.t_() + 1),
    "turns its token": Odd(lambda odd, token, other: token.t_() + 1),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_is_expected_wrongly_is_exported_as_without_expectation(odd: Odd) -> None:
    def told(states: int) -> object:
        try:
            return exported(odd, states)
        except Exception as error:  # noqa: BLE001  # whatever torch says to this
            return type(error), str(error)

    analysis = vars(aot_autograd)["run_functionalized_fw_and_collect_metadata"]
    assert told(2) == told(0)
    assert not odd._forward_hooks and not odd._forward_pre_hooks, "as it was"
    assert vars(aot_autograd)["run_functionalized_fw_and_collect_metadata"] is analysis


class Uncalled(Odd):
    """Calls no hook, as a module may that is called in a way of its own."""

    def __call__(self, *arguments: Tensor) -> Any:
        return self.forward(*arguments)


class Twice(Odd):
    """Calls itself on another token."""

    within = False

    def forward(self, token: Tensor, one: Tensor, other: Tensor) -> Any:
        if self.within:
            return token * 2
        self.within = True
        inner = self(token + 1, one.clone(), other.clone())
        self.within = False
        return super().forward(token, one, other) + inner


@pytest.mark.parametrize("kind", [Uncalled, Twice])
def test_what_cannot_be_compared_is_exported_as_without_expectation(kind: type[Odd]) -> None:
    odd = kind(lambda odd, token, other: odd.counted.add_(1) + token.add_(other))
    assert exported(odd, states=2) == exported(odd, states=0)


def test_what_a_hook_writes_before_a_module_is_called_is_not_lost() -> None:
    """Such as that by which a decoder gets of its inputs what a call really puts into them."""
    odd = Odd(lambda odd, token, other: token + other)
    odd.register_forward_pre_hook(lambda _, given: (given[0].add_(1).clone(), *given[1:]))
    assert exported(odd, states=2) == exported(odd, states=0)


def test_a_tensor_that_is_left_in_an_attribute_is_told_as_without_expectation() -> None:
    odd = Odd(lambda odd, token, other: setattr(odd, "kept", token + 1) or token + other)
    for states in (2, 0):
        with pytest.warns(UserWarning, match="attribute self.kept was assigned during export"):
            exported(odd, states)


def test_operations_know_their_lines_unless_it_is_said_otherwise() -> None:
    def lines() -> list[bool]:
        program = torch_export.export(nn.Linear(2, 2), (torch.ones(1, 2),), ({},), {})
        return ["stack_trace" in node.meta for node in program.graph.nodes if node.op == "call_function"]

    with torch_export.without_lines():
        assert not any(lines())
    assert all(lines())


def test_graphs_are_written_as_python_again_after_the_block_in_which_they_are_not() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    with torch_export.without_code():
        assert not hasattr(torch.fx.GraphModule(nn.Module(), graph), "_code")
    assert torch.fx.GraphModule(nn.Module(), graph)(7) == 7
