"""Traces a decoder with torch.export and checks the result against its signature."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from coreai_zoo.errors import PluginError, listing
from coreai_zoo.lowering import mistakes
from coreai_zoo.lowering.torch_export import export
from coreai_zoo.signature import TraceSpec


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

    A decoder gives logits. Those of a function without outputs are traced with it: `without_outputs` leaves them out.

    Raises:
        PluginError: when the overlay has a mistake that keeps it from being traced; when the traced function has
            another output than the contract, leaves a state unwritten, or writes to something that is not a state.
    """
    mistakes.require_arguments(module, [tensor.name for tensor in (*spec.inputs, *spec.states)])
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        mistakes.explained("traced", module),
        _narrowed(module, spec),
        _use_lazy_graph_module(True),  # or a dozen graphs on the way are written as Python, which nobody calls
    ):
        warnings.simplefilter("ignore", FutureWarning)
        program = export(module, example_inputs(spec), dynamic_shapes(spec), decompositions, states=len(spec.states))
    mistakes.require_results(program, module, [output.name for output in spec.outputs])
    check_traced(program, spec)
    return program


@contextlib.contextmanager
def _narrowed(module: nn.Module, spec: TraceSpec) -> Iterator[None]:
    """Within the block, `module` uses of each input only what a call really puts into it; see `InputSpec.length`."""

    def narrow(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = (tensor[:, : of.length] for tensor, of in zip(arguments, spec.inputs, strict=False))
        return (*inputs, *arguments[len(spec.inputs) :])

    if all(tensor.length is None for tensor in spec.inputs):
        yield
        return
    hook = module.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        hook.remove()


def without_outputs(program: ExportedProgram) -> ExportedProgram:
    """`program` without its results, and without what is computed for them alone; it still writes its states.

    This is done to the program of all layers, whose last one is not computed to its end then, as no other is.
    """
    signature, graph = program.graph_signature, fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(program.graph, copies)
    results = zip(program.graph.output_node().args[0], signature.output_specs, strict=True)
    kept = [(copies[node], spec) for node, spec in results if spec.kind is not OutputKind.USER_OUTPUT]
    graph.output(tuple(node for node, _ in kept))
    graph.eliminate_dead_code()
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(signature.input_specs, [spec for _, spec in kept]),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        constants=program.constants,
        verifiers=program.verifiers,
    )


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
    results = [node.meta["val"] for node in program.graph.output_node().args[0]]
    axes = _traced_axes(program, spec)
    hint = ""
    for tensor, value in zip(spec.outputs, results[len(results) - len(spec.outputs) :], strict=True):
        found = (tuple(axes.get(str(size), size) for size in value.shape), str(value.dtype).removeprefix("torch."))
        if found != (tensor.shape, tensor.dtype):
            if found[1] != tensor.dtype:
                hint = "A decoder gives its logits in `contract.logits_dtype`."
            problems.append(f"output {tensor.name} is {found[1]} {found[0]} instead of {tensor.dtype} {tensor.shape}")
    if problems:
        raise PluginError(f"The traced decoder does not meet its contract: {listing(problems)}.", hint)


def _traced_axes(program: ExportedProgram, spec: TraceSpec) -> dict[str, str]:
    """The names of the dynamic axes, by the symbols that they were traced as."""
    values = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    # A backend may have traced the states as buffers: then they are not among the inputs.
    inputs = zip(program.graph_signature.user_inputs, (*spec.inputs, *spec.states), strict=False)
    return {
        str(traced): size
        for name, tensor in inputs
        for traced, size in zip(values[str(name)].shape, tensor.shape, strict=True)
        if isinstance(size, str)
    }
