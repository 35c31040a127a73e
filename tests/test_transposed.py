"""Stacks of plain matrices that a decoder reads transposed: seen in the traced program, and held to what is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from assets import save
from coreai_zoo.backend import Constant
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.backends.coreml.backend import CoreMLBackend
from coreai_zoo.contracts import FIXED_S1
from coreai_zoo.errors import PluginError
from coreai_zoo.lowering.transposed import stacks_read_transposed
from coreai_zoo.signature import KVCache, TraceSpec
from coreai_zoo.weights.formats import Format

WIDTH, EXPERTS = 64, 6
BACKENDS = (CoreAIBackend(), CoreMLBackend())


class Decoder(nn.Module):
    """A decoder of one stack of matrices [E, 2, D], of which `read` makes the matrix for a token."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.read = read
        self.stack = nn.Parameter(torch.zeros(EXPERTS, 2, WIDTH, dtype=dtype), requires_grad=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The logits of a token [1, 1], float16 [1, 1, 2]."""
        for state in (key, value):
            state[:, :, :, position_ids[0]] = input_ids.sum().to(state.dtype).reshape(1, 1, 1, 1, 1)
        x = torch.cos(input_ids[..., None].half() * torch.arange(WIDTH).half())
        logits: Tensor = x @ self.read(self.stack, input_ids[0])
        return logits


def permuted(stack: Tensor, chosen: Tensor) -> Tensor:
    return torch.index_select(stack.permute(0, 2, 1), 0, chosen)


def exchanged(stack: Tensor, chosen: Tensor) -> Tensor:
    return torch.index_select(stack.transpose(-1, 1), 0, chosen)


def twice(stack: Tensor, chosen: Tensor) -> Tensor:
    """The transpose of the stack, and the stack."""
    return torch.index_select(stack.mT + stack.sum(2, keepdim=True).mT, 0, chosen)


def straight(stack: Tensor, chosen: Tensor) -> Tensor:
    return torch.index_select(stack, 0, chosen).transpose(1, 2)


def turned_over(stack: Tensor, chosen: Tensor) -> Tensor:
    """Other axes than the last two."""
    return torch.index_select(stack.transpose(0, 1), 1, chosen).permute(1, 2, 0)


READS = {permuted: True, exchanged: True, twice: False, straight: False, turned_over: False}


def spec() -> TraceSpec:
    return FIXED_S1.functions(KVCache(layers=1, heads=1, head_dim=1), (), vocab_size=2, max_context=8)["main"]


@pytest.mark.parametrize(("read", "transposed"), READS.items(), ids=[read.__name__ for read in READS])
def test_what_a_program_reads_of_a_stack_is_seen(read: Any, transposed: bool) -> None:
    states = torch.zeros(2, 1, 1, 1, 8, 1, dtype=torch.float16)
    examples = (torch.ones(1, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32), *states)
    for program in (made := torch.export.export(Decoder(read), examples, strict=False), made.run_decompositions({})):
        parameters = program.graph_signature.inputs_to_parameters
        assert stacks_read_transposed(program, parameters, None) == ({"stack"} if transposed else set())


@pytest.mark.parametrize("backend", BACKENDS, ids=["coreai", "coreml"])
@pytest.mark.parametrize("read", [permuted, straight])
def test_a_weight_map_that_says_otherwise_than_the_decoder_reads_is_refused(backend: Any, read: Any) -> None:
    told = "nothing but" if READS[read] else "more than"
    with pytest.raises(PluginError, match=f"stack: it reads {told} its transpose"):
        backend.trace({"main": Decoder(read)}, {"main": spec()}, {"stack": not READS[read]})


@pytest.mark.parametrize("backend", BACKENDS, ids=["coreai", "coreml"])
def test_nothing_need_be_said_of_a_stack_that_is_quantized(backend: Any) -> None:
    backend.trace({"main": Decoder(permuted)}, {"main": spec()}, {})


def test_a_stack_that_is_stored_as_it_is_read_gives_the_logits_of_the_decoder(tmp_path: Path) -> None:
    """By the Core ML backend; tests/test_candidates.py runs plain experts by the other."""
    backend, decoder = CoreMLBackend(), Decoder(permuted)
    stack = torch.randn(decoder.stack.shape).half()
    stored = np.ascontiguousarray(stack.mT.numpy())
    constants = {"stack": Constant(stored, stored.shape, "float16", transposed=True)}
    asset = tmp_path / "m.mlpackage"
    save(backend.trace({"main": decoder}, {"main": spec()}, {"stack": True}), constants, asset)
    state = backend.state(asset, "main", {"stack": (stored.shape, "float16")})
    assert bytes(state["stack"]) == stored.tobytes()
    with backend.stepper(asset, {"main": spec()}, 8) as stepper:
        for token in (0, 1, 5):
            x = np.cos(np.arange(WIDTH, dtype=np.float16) * np.float16(token))
            expected = x.astype(np.float32) @ stack[token].float().numpy().T
            assert np.allclose(stepper.step(token), expected, rtol=0.02, atol=0.05), token


def saved(read: Any, folder: Path, *, whole: bool = False) -> bytes:
    """The bytecode of a decoder whose stack has random values, with the compiler given all of them where `whole`."""
    decoder = Decoder(read)
    stored = np.random.default_rng(0).standard_normal(decoder.stack.shape).astype(np.float16)
    constants = {"stack": Constant(stored, stored.shape, "float16")}
    traced = CoreAIBackend().trace({"main": decoder}, {"main": spec()}, {"stack": False})
    save(traced, constants, folder / "m.aimodel", whole=whole)
    return (folder / "m.aimodel" / "main.mlirb").read_bytes()


def test_a_constant_that_the_compiler_computes_from_a_weight_is_refused(tmp_path: Path) -> None:
    """It would have a name that differs from process to process, and take the memory of two."""
    with pytest.raises(PluginError, match=r"computes with stack before there is a token in the decoder at .*`"):
        saved(twice, tmp_path)


def test_no_weight_is_asked_for_where_the_compiler_would_compute_with_it() -> None:
    """A build would read it, or fetch the files that it is in."""
    decoder = Decoder(twice)
    traced = CoreAIBackend().trace({"main": decoder}, {"main": spec()}, {"stack": False})
    asked: list[Any] = []

    def values(names: Any) -> Any:
        asked.append(names)
        return {}

    planned = {"stack": Constant(None, tuple(decoder.stack.shape), "float16")}
    with pytest.raises(PluginError, match="computes with stack before there is a token"):
        traced.lay_out(planned, values)
    assert asked == []


def by_its_largest(stack: Tensor, chosen: Tensor) -> Tensor:
    """A stack, and a number that is known before there is an input."""
    return straight(stack, chosen) / stack.abs().max()


def shifted_by_one_of_it(stack: Tensor, chosen: Tensor) -> Tensor:
    return straight(stack, chosen) + stack[0, 0, 0]


def masked_by_a_literal(stack: Tensor, chosen: Tensor) -> Tensor:
    """With a literal that the compiler makes, and stores: no weight is in it."""
    return straight(stack, chosen) * (torch.arange(1024) <= chosen).half().sum()


@pytest.mark.parametrize("read", [by_its_largest, shifted_by_one_of_it, masked_by_a_literal])
def test_what_the_compiler_computes_with_a_weight_it_is_given_as_it_is(read: Any, tmp_path: Path) -> None:
    """It would compute with what stands there in its place, where it is not given one, and nobody would see."""
    found = [saved(read, tmp_path / str(whole), whole=whole) for whole in (False, True)]
    # What the compiler makes of literals has a name of its own, which differs from one time to the next.
    named = {re.sub(rb"resource_\w+", b"", content) for content in found}
    assert len(named) == 1 and len({len(content) for content in found}) == 1


def test_a_weight_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    decoder = Decoder(straight)
    decoder.unread = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.float16), requires_grad=False)
    stacks = {name: np.ones(each.shape, np.float16) for name, each in decoder.named_parameters()}
    constants = {name: Constant(values, values.shape, "float16") for name, values in stacks.items()}
    with pytest.raises(PluginError, match=r"The decoder never uses unread\."):
        save(CoreAIBackend().trace({"main": decoder}, {"main": spec()}), constants, tmp_path / "m.aimodel")


def test_the_stored_array_has_the_axes_in_the_order_in_which_they_are_read() -> None:
    format_ = Format((EXPERTS, 2, WIDTH), "float16", read_transposed=True)
    assert format_.arrays["data"].shape == (EXPERTS, WIDTH, 2)
    assert (format_.rows, format_.columns) == (EXPERTS * 2, WIDTH)


@pytest.mark.parametrize("shape", [(4,), (4, 8)])
def test_only_stacks_are_read_transposed(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no stack of matrices"):
        Format(shape, "float16", read_transposed=True)
