"""From a decoder to an ML Program, with coremltools' converter and exporter.

The converter sees a traced program whose weights are placeholders, and the exporter says where they are to stand.

Precision is the program's own: what the decoder computes in float32 stays float32, the rest is float16. coremltools'
pass that would make everything float16 is left out, because RMSNorm and the delta rule overflow in it unnoticed.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from packaging.version import Version
from torch import Tensor, nn
from torch.export import ExportedProgram

from coreai_zoo import interruption
from coreai_zoo.backend import Constant, Values
from coreai_zoo.backends.coreml.package import (
    NAMES,
    WEIGHT_FILE,
    Stored,
    TensorType,
    WeightFile,
    quietly,
    specification,
)
from coreai_zoo.backends.coreml.reference import unknown
from coreai_zoo.dtypes import bits_of
from coreai_zoo.errors import PluginError, listing
from coreai_zoo.layout import Layout
from coreai_zoo.lowering import mistakes
from coreai_zoo.lowering.folding import foldable
from coreai_zoo.lowering.torch_export import exporting
from coreai_zoo.lowering.trace import example_inputs, require_contract
from coreai_zoo.lowering.transposed import stacks_read_transposed
from coreai_zoo.names import names_beside
from coreai_zoo.signature import TraceSpec

with quietly():  # what it says of versions, see `version_warnings`
    import coremltools as ct
    from coremltools import _deps
    from coremltools.converters.mil.backend.mil import helper
    from coremltools.converters.mil.backend.mil.load import (
        CoreMLProtoExporter,
        MILProtoExporter,
    )
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813  # coremltools' own name for it
    from coremltools.converters.mil.mil import Program, types
    from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipelineManager

TARGET = ct.target.iOS18  # the same as macOS 15

_SKIPPED_PASSES = {
    # It would merge placeholders, which are equal, and with them the weights that take their places.
    "common::const_deduplication",
    # It compares every constant with itself, which takes a byte per element; what it cancels moves a few KiB.
    "common::reduce_transposes",
}
_TO_HALF = "common::add_fp16_cast"

_FEWEST_IN_FILE = 10
"""The fewest elements of a constant that is in the file of the weights, as coremltools has it."""


def version_warnings() -> tuple[str, ...]:
    """The warning that coremltools would give of the versions that it finds, if any."""
    installed, tested = Version(torch.__version__), Version(_deps._TORCH_MAX_VERSION)
    if installed <= tested:
        return ()
    return (
        f"coremltools {ct.__version__} was tested with torch {tested} at the latest, and this is {installed.public}",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tracing
# ---------------------------------------------------------------------------------------------------------------------


_DECODER = "decoder."  # where the decoder is in the module that is traced


class _Stateful(nn.Module):
    """A decoder whose states are buffers, which is how coremltools recognises them.

    It reads a state as float32 whatever it is kept in; turning that into the state's own dtype at once leaves a pair of
    casts that cancel.
    """

    def __init__(self, decoder: nn.Module, spec: TraceSpec) -> None:
        super().__init__()
        self.decoder = decoder
        self.dtypes = {state.name: getattr(torch, state.dtype) for state in spec.states}
        for state in spec.states:
            untouched = torch.empty([int(size) for size in state.shape])  # takes no memory
            self.register_buffer(state.name, untouched)

    def forward(self, **inputs: Tensor) -> Tensor:
        """The decoder's inputs to its output; the buffers are mutated."""
        states = {name: getattr(self, name).to(dtype) for name, dtype in self.dtypes.items()}
        output: Tensor = self.decoder(*inputs.values(), *states.values())
        for name, state in states.items():
            getattr(self, name).copy_(state)
        return output


def trace(decoder: nn.Module, spec: TraceSpec) -> ExportedProgram:
    """The program of a decoder, its states being buffers.

    Raises:
        PluginError: when the decoder has a mistake that keeps it from being traced, leaves a state unwritten, writes to
            something other than a state, or has another output.
    """
    examples = example_inputs(evolve(spec, states=()))  # states are buffers here, and may be large
    inputs = {tensor.name: example for tensor, example in zip(spec.inputs, examples, strict=True)}
    mistakes.require_arguments(decoder, [tensor.name for tensor in (*spec.inputs, *spec.states)])
    with interruption.deferred(), torch.no_grad(), quietly(), mistakes.explained("traced", decoder):
        module = _Stateful(decoder, spec)
        with exporting({}) as exported:
            program = exported(module, (), inputs)
    mistakes.require_results(program, decoder, [output.name for output in spec.outputs])
    written = set(_written_buffers(program))
    states = {state.name for state in spec.states}
    require_contract(program, spec, written & states, [f"buffer {name}" for name in sorted(written - states)])
    return program


def _written_buffers(program: ExportedProgram) -> Iterator[str]:
    """Names of the buffers that get a new value."""
    mutated = program.graph_signature.buffers_to_mutate
    for node in program.graph.output_node().args[0]:
        if node.name in mutated:
            origin = node
            while origin.target in _KEEPS_VALUES:
                origin = origin.args[_KEEPS_VALUES[origin.target]]
            if origin.op != "placeholder":
                yield mutated[node.name]


# Operations that only pass on the value of one argument, and the index of that argument.
_KEEPS_VALUES = {
    torch.ops.aten._to_copy.default: 0,
    torch.ops.aten.clone.default: 0,
    torch.ops.aten.copy.default: 1,
}


# ---------------------------------------------------------------------------------------------------------------------
# Conversion
# ---------------------------------------------------------------------------------------------------------------------


@register_torch_op(torch_alias=["coreai_zoo::dequantize"])  # type: ignore[untyped-decorator]
def coreai_zoo_dequantize(context: Any, node: Any) -> None:
    """`coreai_zoo::dequantize` as a weight that the device unpacks itself."""
    codes, scales, zero_points = (None if name is None else context[name] for name in node.inputs[:3])
    dtype = str(node.inputs[3])
    offset = {} if zero_points is None else {"offset": _as_stored(zero_points, dtype)}
    data = _as_stored(codes, dtype)
    context.add(mb.constexpr_blockwise_shift_scale(data=data, scale=scales, name=node.name, **offset))


def _as_stored(codes: Any, dtype: str) -> Any:
    """The placeholder `codes` in the dtype that it is stored in, where torch has none of 4 bits and holds it in 8."""
    if bits_of(dtype) >= 8:
        return codes
    stored = types.nptype_from_builtin(types.string_to_builtin(dtype))
    return mb.const(val=np.broadcast_to(np.ones((), stored), codes.shape), name=_stored_name(codes.name, dtype))


def _stored_name(placeholder: str, dtype: str | None) -> str:
    """Name of the constant that a placeholder becomes."""
    return placeholder if dtype is None or bits_of(dtype) >= 8 else f"{placeholder}_{dtype}"


@frozen
class Converted:
    """An ML Program whose weights are placeholders.

    Attributes:
        program: coremltools' program.
        names: the state behind each constant of the program: parameter, part of a quantized one, or buffer.
    """

    program: Any
    names: Mapping[str, str]

    @property
    def stored_names(self) -> dict[str, str]:
        """The names that the package records, see `package.NAMES`."""
        found = {}
        for operation in self.program.functions["main"].operations:
            if operation.op_type.startswith("constexpr_"):
                found[operation.outputs[0].name] = self.names[operation.data.name]
            elif operation.op_type == "const" and operation.outputs[0].name in self.names:
                found[operation.outputs[0].name] = self.names[operation.outputs[0].name]
        return found


def convert(decoder: nn.Module, spec: TraceSpec, read_transposed: Mapping[str, bool] | None) -> Converted:
    """A decoder, traced and converted.

    Args:
        decoder: the decoder, its parameters allocated as they will be stored, see `lowering.module.allocate`. What the
            parameters hold is not read.
        spec: its signature, without dynamic axes.
        read_transposed: see `Backend.trace`.

    Raises:
        PluginError: when the decoder does not meet its contract or has an operation that is not lowered, or its weights
            do not arrive in the program as they are.
    """
    traced = trace(decoder, spec)
    _give_as_read(traced, read_transposed)
    names = _hide_weights(traced)
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes({*_SKIPPED_PASSES, _TO_HALF})
    mb.name_count.clear()  # it counts through a process; so that the second program of one has the bytes of a first
    with quietly(), mistakes.explained("lowered", decoder, lambda: traced):
        with _unchecked():
            program = ct.convert(
                traced,
                convert_to="milinternal",
                minimum_deployment_target=TARGET,
                compute_precision=ct.precision.FLOAT32,
                pass_pipeline=pipeline,
                states=[
                    ct.StateType(ct.TensorType(shape=state.shape, dtype=np.dtype(state.dtype).type), name=state.name)
                    for state in spec.states
                ],
                outputs=[ct.TensorType(name=output.name, dtype=np.dtype(output.dtype).type) for output in spec.outputs],
            )
            backend = ct.PassPipeline.get_pipeline("backend_mlprogram")
            backend.remove_passes(_SKIPPED_PASSES)
            PassPipelineManager.apply_pipeline(program, backend)
        program.validate(check_essential_scope=True)
    converted = Converted(program, names)
    _require_kept(converted, traced, decoder)
    _check(converted, traced, spec)
    strange = unknown(operation.op_type for operation in converted.program.functions["main"].operations)
    if left := [each for each in strange if not each.startswith("coreml_")]:
        raise PluginError(
            f"The decoder becomes operations of Core ML that nothing on this machine runs, so no bundle of it could be "
            f"checked: {listing(left)}.",
            "Write it with other operations, or build it with the backend coreai.",
        )
    return converted


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Within the block, coremltools does not check the whole program after each of its hundred passes.

    That takes a quarter of the time. One check at the end finds whatever is still wrong then.
    """
    validate = Program.validate
    Program.validate = lambda *_, **__: None
    try:
        yield
    finally:
        Program.validate = validate


def _give_as_read(traced: ExportedProgram, said: Mapping[str, bool] | None) -> None:
    """Exchange the axes of every stack of plain matrices that is read transposed, and leave the transposition out."""
    parameters = {
        placeholder: name.removeprefix(_DECODER)
        for placeholder, name in traced.graph_signature.inputs_to_parameters.items()
    }
    stacks = stacks_read_transposed(traced, parameters, said)
    for node in traced.graph.find_nodes(op="placeholder"):
        if parameters.get(node.name) in stacks:
            path = traced.graph_signature.inputs_to_parameters[node.name]
            traced.state_dict[path] = nn.Parameter(traced.state_dict[path].transpose(-1, -2), requires_grad=False)
            node.meta["val"] = node.meta["val"].transpose(-1, -2)
            for transposition in list(node.users):
                transposition.replace_all_uses_with(node)
                traced.graph.erase_node(transposition)
    traced.graph_module.recompile()


def _hide_weights(traced: ExportedProgram) -> dict[str, str]:
    """Replace every parameter by a placeholder that takes no memory; returns the state behind each constant.

    A floating-point placeholder is NaN, so that whatever an optimisation computes from it shows.
    """
    signature = traced.graph_signature
    dtypes = {
        codes.name: node.args[3]
        for node in traced.graph.find_nodes(op="call_function", target=torch.ops.coreai_zoo.dequantize.default)
        for codes in (node.args[0], node.args[2])
        if codes is not None
    }
    for name in signature.parameters:
        tensor = traced.state_dict[name]
        blank = torch.full((1,), math.nan if tensor.is_floating_point() else 1, dtype=tensor.dtype)
        traced.state_dict[name] = nn.Parameter(blank.expand(tensor.shape), requires_grad=False)
    return {
        _stored_name(placeholder, dtypes.get(placeholder)): name.removeprefix(_DECODER)
        for placeholder, name in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items()
        if name.startswith(_DECODER)
    }


def _require_kept(converted: Converted, traced: ExportedProgram, decoder: nn.Module) -> None:
    """Refuse a program without a weight that the decoder has: it never reads it, or the compiler computed with it.

    Raises:
        PluginError: with the layer and the line that reads it.
    """
    paths = traced.graph_signature.inputs_to_parameters
    used = {paths[node.name] for node in traced.graph.find_nodes(op="placeholder") if node.name in paths and node.users}
    states = [name for name in converted.names.values() if _DECODER + name in paths.values()]
    mistakes.require_read([name for name in states if _DECODER + name not in used])
    made = {each.outputs[0].name: each for each in converted.program.functions["main"].operations}
    blank = any(
        each.op_type == "const" and name not in converted.names and _has_nan(each.val.val)
        for name, each in made.items()
    )
    plain = {
        placeholder: name.removeprefix(_DECODER)
        for placeholder, name in paths.items()
        if ".parametrizations." not in name
    }
    computed = foldable(traced, plain).weights
    gone = [name for constant, name in converted.names.items() if name in computed and (blank or constant not in made)]
    if gone:
        raise mistakes.computed_with(gone, mistakes.read_at(traced, decoder, gone[0]))


def _check(converted: Converted, traced: ExportedProgram, spec: TraceSpec) -> None:
    """Refuse a program that does not write each state once, or does not hold each weight once and as it is stored.

    Raises:
        PluginError: naming each such state and weight.
    """
    operations = list(converted.program.functions["main"].operations)
    written = [operation.state.name for operation in operations if operation.op_type == "coreml_update_state"]
    problems = [
        f"state {state.name} is written {written.count(state.name)} times"
        for state in spec.states
        if written.count(state.name) != 1
    ]
    constants = {operation.outputs[0].name: operation for operation in operations if operation.op_type == "const"}
    paths = set(traced.graph_signature.parameters)
    parameters = {constant: _DECODER + name for constant, name in converted.names.items() if _DECODER + name in paths}
    for constant, path in parameters.items():
        value, parameter = constants.get(constant), traced.state_dict[path]
        expected = (tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        found = None if value is None else (tuple(value.val.val.shape), str(value.val.val.dtype))
        if found != expected:
            problems.append(f"weight {converted.names[constant]} is {found}, not {expected}")
    problems += [
        f"constant {name} was computed from a weight that is not there yet"
        for name, operation in constants.items()
        if name not in parameters and _has_nan(operation.val.val)
    ]
    problems += _misquantized(converted, operations)
    if problems:
        raise PluginError(f"coremltools changed the decoder on its way: {listing(problems)}.")


def _has_nan(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.floating)) and value.dtype.kind == "f" and bool(np.isnan(value).any())


def _misquantized(converted: Converted, operations: Sequence[Any]) -> list[str]:
    """Weights that should be quantized and are not, and the other way round; one phrase each."""
    states = set(converted.names.values())
    expected = {
        tuple(part for part in names_beside(name) if part in states) for name in states if name.endswith(".original")
    }
    found = {
        tuple(
            converted.names.get(part.name, part.name)
            for part in (operation.data, operation.scale, operation.offset)
            if part is not None
        )
        for operation in operations
        if operation.op_type.startswith("constexpr_")
    }
    return [f"{codes} is not quantized by {' and '.join(rest)}" for codes, *rest in sorted(expected - found)] + [
        f"{' and '.join(parts)} are no weight of the recipe" for parts in sorted(found - expected)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Laying out
# ---------------------------------------------------------------------------------------------------------------------


class _Exporter(MILProtoExporter):  # type: ignore[misc]  # coremltools ships no types
    """coremltools' exporter, which lays the file of the weights out and writes none."""

    def __init__(self, converted: Converted, constants: Mapping[str, Constant], known: Mapping[str, Constant]) -> None:
        super().__init__(converted.program, "", TARGET)
        self.file = WeightFile()
        self._weights = {constant: path for constant, path in converted.names.items() if path in constants}
        self._constants, self._known = constants, known
        self._offsets: dict[int, int] = {}  # by identity of what is stored: parameters may share it

    def get_milproto_value(self, var: Any) -> Any:
        """The value of a constant: from the program, or, of a weight, where it is to stand."""
        path = self._weights.get(var.name)
        if path is None:
            return super().get_milproto_value(var)
        weight = self._constants[path]
        if path in self._known:
            content = np.asarray(self._known[path].data).reshape(-1).view(np.uint8)
            elements = Stored(TensorType(weight.shape, weight.dtype), content.data).array
            return helper.create_tensor_value(elements.view(types.nptype_from_builtin(var.dtype)))
        if id(weight) not in self._offsets:
            self._offsets[id(weight)] = self.file.add_room(path, weight)
        return helper.create_file_value_tensor(
            file_name=f"@model_path/weights/{Path(WEIGHT_FILE).name}",
            offset=self._offsets[id(weight)],
            dim=weight.shape,
            data_type=helper.types_to_proto_primitive(var.sym_type.get_primitive()),
        )

    def get_blob_writer(self, weight_path: str) -> WeightFile:  # noqa: ARG002  # there is one
        """What coremltools hands the values to that are the program's own."""
        return self.file


def lay_out(converted: Converted, constants: Mapping[str, Constant], values: Values) -> Layout:
    """The files of the package.

    Args:
        converted: the program, which can be laid out again.
        constants: the stored state of the decoder by name.
        values: is asked for what is so small that it stands in the program itself.
    """
    names = [name for name in converted.names.values() if name in constants]
    small = [name for name in names if math.prod(constants[name].shape) < _FEWEST_IN_FILE]
    with quietly():
        exporter = _Exporter(converted, constants, values(small))
        model = CoreMLProtoExporter(
            converted.program, exporter.export(), None, None, None, "mlprogram", "pytorch", TARGET
        ).export(TARGET)
    model.description.metadata.userDefined[NAMES] = json.dumps(converted.stored_names, sort_keys=True)
    weights = exporter.file
    return Layout(f"Data/{WEIGHT_FILE}", weights.pieces, weights.sizes, specification(model))
