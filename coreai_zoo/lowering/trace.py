"""Traces a decoder with torch.export and checks the result against its signature."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coreai_zoo.errors import PluginError, listing
from coreai_zoo.lowering import mistakes
from coreai_zoo.signature import TraceSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def example_inputs(spec: TraceSpec) -> tuple[Tensor, ...]:
    """Tensors to trace with: inputs, then states, all zero."""
    sizes = {name: axis.example for name, axis in spec.axes.items()}
    tensors = []
    for tensor in (*spec.inputs, *spec.states):
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        tensors.append(torch.zeros(shape, dtype=getattr(torch, tensor.dtype)))
    return tuple(tensors)


def dynamic_shapes(spec: TraceSpec) -> tuple[dict[int, Any], ...]:
    """The dynamic axes in the form that `torch.export.export` takes."""
    # torch.export specialises sizes 0 and 1, and a cache that one call fills, so the range that it is told begins
    # beyond them; they run all the same.
    least = 1 + (spec.query_length or 1)
    dims = {
        name: torch.export.Dim(name, min=max(least, axis.minimum), max=max(least, axis.maximum))
        for name, axis in spec.axes.items()
    }
    return tuple(
        {index: dims[size] for index, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in (*spec.inputs, *spec.states)
    )


def trace(module: nn.Module, spec: TraceSpec, decompositions: Mapping[Any, Any]) -> ExportedProgram:
    """The program that `module` is traced to, checked against `spec`.

    Raises:
        PluginError: when the overlay has a mistake that keeps it from being traced; when the traced function has
            another output than the contract, leaves a state unwritten, or writes to something that is not a state.
    """
    mistakes.require_arguments(module, [tensor.name for tensor in (*spec.inputs, *spec.states)])
    with torch.no_grad(), warnings.catch_warnings(), mistakes.explained("traced", module):
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(module, example_inputs(spec), dynamic_shapes=dynamic_shapes(spec), strict=False)
        program = program.run_decompositions(dict(decompositions))
    check_traced(program, spec)
    return program


def check_traced(program: ExportedProgram, spec: TraceSpec) -> None:
    """Compare a traced program's outputs and mutations with the spec; see `trace`."""
    signature = program.graph_signature
    names = dict(zip(signature.user_inputs, (tensor.name for tensor in (*spec.inputs, *spec.states)), strict=True))
    mutated = {names[str(argument)] for argument in signature.user_inputs_to_mutate.values()}
    states = {state.name for state in spec.states}
    strays = [f"input {name}" for name in sorted(mutated - states)]
    strays += [f"buffer {name}" for name in sorted(signature.buffers_to_mutate.values())]
    require_contract(program, spec, mutated & states, strays)


def require_contract(program: ExportedProgram, spec: TraceSpec, written: set[str], strays: Sequence[str]) -> None:
    """Compare what a traced program gives and writes with the spec, however it was traced.

    Args:
        program: the traced program, whose last results are the outputs.
        spec: the signature that it has to have.
        written: names of the states that it writes.
        strays: everything else that it writes, in words.

    Raises:
        PluginError: with everything in which they differ.
    """
    states = {state.name for state in spec.states}
    problems = [f"state {name} is never written" for name in sorted(states - written)]
    problems += [f"{stray} is written" for stray in strays]
    outputs = [node.meta["val"] for node in program.graph.output_node().args[0]][-len(spec.outputs) :]
    for tensor, value in zip(spec.outputs, outputs, strict=True):
        found = (tuple(value.shape), str(value.dtype).removeprefix("torch."))
        if found != (tensor.shape, tensor.dtype):
            problems.append(f"output {tensor.name} is {found[1]} {found[0]} instead of {tensor.dtype} {tensor.shape}")
    if problems:
        raise PluginError(f"The traced decoder does not meet its contract: {listing(problems)}.")
