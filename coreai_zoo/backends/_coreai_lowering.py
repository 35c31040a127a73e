"""The converter of `coreai_torch` with two things changed: constants are handed over by name without a copy, and each
distinct composite is exported once instead of once per layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import coreai.authoring  # before the dialects, which import each other through it
import torch
from coreai._compiler.dialects import coreai
from coreai._compiler.ir import (
    BF16Type,
    DenseElementsAttr,
    DenseResourceElementsAttr,
    F16Type,
    F32Type,
    FloatAttr,
    IntegerAttr,
    IntegerType,
    RankedTensorType,
    Type,
    Value,
)
from coreai_torch import TorchConverter
from coreai_torch._validate import validate_exported_program
from coreai_torch.converter import _StagedEntry
from coreai_torch.externalize import (
    _ExternalizedExportedProgram,
    _finalize_module_export,
    _PreparedModules,
    _torch_export_module,
)
from torch import fx
from torch.export import ExportedProgram

from coreai_zoo.backends.coreai import _ALIGNMENT
from coreai_zoo.export import Constant


def element_type(dtype: str) -> Type:
    """The compiler's element type for a logical dtype such as `float16`, `int8` or `uint4`."""
    floats = {"float16": F16Type, "float32": F32Type, "bfloat16": BF16Type}
    if dtype in floats:
        return floats[dtype].get()
    if dtype == "bool":
        return IntegerType.get_signless(1)
    bits = int(dtype.lstrip("uint"))
    return IntegerType.get_unsigned(bits) if dtype.startswith("u") else IntegerType.get_signed(bits)


class Converter(TorchConverter):  # type: ignore[misc]  # the toolchain ships no types
    """Lowers one traced program whose state is given by name."""

    def __init__(self, state: Mapping[str, tuple[str, Constant]]) -> None:
        """Args: placeholder of the graph to (state name, constant)."""
        # Release mode records no stack traces, hence no path of the machine that built the bundle.
        super().__init__(mode=TorchConverter.Mode.RELEASE)
        self._state = state
        self.register_torch_lowering("coreai_zoo::dequantize.default")(_lower_dequantize)

    def convert(
        self,
        program: ExportedProgram,
        composites: Sequence[_ExternalizedExportedProgram],
        *,
        input_names: Sequence[str],
        output_names: Sequence[str],
        state_names: Sequence[str],
    ) -> Any:
        """The lowered `AIProgram` with the one function `main`."""
        # Not add_exported_program: it would unpack and repack every 4-bit weight in memory.
        validate_exported_program(program, self._user_defined_torch_lowering)
        self._main = program
        self._staged.append(
            _StagedEntry(
                exported_program=program,
                input_names=input_names,
                output_names=output_names,
                state_names=state_names,
                entrypoint_name="main",
                _externalized_exported_programs=list(composites),
            )
        )
        return self.to_coreai()

    def _handle_placeholder_op(self, node: fx.Node) -> None:
        if self.exported_program is self._main and node.name in self._state:
            name, constant = self._state[node.name]
            self._values_map[node.name] = _constant(name, constant)
        else:
            super()._handle_placeholder_op(node)


def _constant(name: str, constant: Constant) -> Value:
    """A constant that refers to the bytes where they are."""
    kind = RankedTensorType.get(list(constant.shape), element_type(constant.dtype))
    buffer = memoryview(constant.data.reshape(-1)).cast("B")
    attribute = DenseResourceElementsAttr.get_from_buffer(buffer, name, kind, alignment=_ALIGNMENT)
    return coreai.ConstantOp(value=attribute).result


def _splat_zero(shape: Sequence[int], element: Type) -> Value:
    zero = FloatAttr.get(element, 0.0) if not IntegerType.isinstance(element) else IntegerAttr.get(element, 0)
    return coreai.ConstantOp(value=DenseElementsAttr.get_splat(RankedTensorType.get(list(shape), element), zero)).result


def _lower_dequantize(values: dict[str, Value], node: fx.Node, loc: Any) -> Value:
    """`coreai_zoo::dequantize` to `coreai.blockwise_shift_scale`; a missing zero point costs a splat, not a tensor."""
    arguments: tuple[Any, ...] = node.args
    codes, scales, zero_points = values[arguments[0].name], values[arguments[1].name], arguments[2]
    shape = list(scales.type.shape)
    if isinstance(zero_points, fx.Node):
        offset = values[zero_points.name]
    else:
        offset = _splat_zero(shape, codes.type.element_type)
    return coreai.blockwise_shift_scale(codes, scales, offset, _splat_zero(shape, scales.type.element_type), loc=loc)


def export_composites(module: torch.nn.Module, program: ExportedProgram) -> list[_ExternalizedExportedProgram]:
    """Export every distinct composite of a patched `module` once.

    Two call sites are the same composite when operation, attributes and the shapes and dtypes of their inputs agree;
    the compiler merges their graphs in the end, so exporting one each only costs time. Names are derived from position.
    """
    distinct: dict[object, _ExternalizedExportedProgram] = {}
    serial = itertools.count()
    for prepared in _PreparedModules(module, program):
        key = (
            prepared.composite_op_name,
            repr(sorted(prepared.composite_decl_attrs.items())),
            _input_types(prepared.source_nodes[0]),
        )
        if key not in distinct:
            prepared.name = f"{prepared.composite_op_name}_{next(serial)}"
            exported = _torch_export_module(prepared).run_decompositions()
            distinct[key] = _finalize_module_export(prepared, exported)
            distinct[key].source_nodes = []
        distinct[key].source_nodes.extend(prepared.source_nodes)
    return list(distinct.values())


def add_call_sites(composites: Sequence[_ExternalizedExportedProgram], program: ExportedProgram) -> None:
    """Replace the call sites that each composite was found at by all those in `program`, which calls no others."""
    known = {_call(node): composite for composite in composites for node in composite.source_nodes}
    targets = {target for target, _ in known}
    for composite in composites:
        composite.source_nodes = []
    for node in program.graph.nodes:
        if node.target in targets:
            known[_call(node)].source_nodes.append(node.name)


def _call(node: fx.Node) -> tuple[object, object]:
    return node.target, _input_types(node)


def _input_types(node: fx.Node) -> tuple[object, ...]:
    values = [argument.meta["val"] for argument in node.args if isinstance(argument, fx.Node)]
    return tuple((tuple(map(str, value.shape)), value.dtype) for value in values)
