"""The converter of `coreai_torch`, to which constants are handed over by name and without a copy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import coreai.authoring  # before the dialects, which import each other through it
import numpy as np
import torch
from attrs import evolve
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
from coreai_torch.converter import _StagedEntry
from coreai_torch.externalize import _ExternalizedExportedProgram
from torch import fx
from torch.export import ExportedProgram

from coreai_zoo.backend import Constant
from coreai_zoo.backends.coreai.composites import require_known_operations, with_call_sites
from coreai_zoo.backends.coreai.constants import row, stored_constants
from coreai_zoo.lowering import mistakes
from coreai_zoo.lowering.folding import TensorKind
from coreai_zoo.lowering.torch_export import without_code
from coreai_zoo.lowering.transposed import is_read_transposed, is_row
from coreai_zoo.names import parameter_of
from coreai_zoo.signature import TraceSpec

# A larger alignment is written but cannot be read back: AIModelAsset.summary() then expects sections aligned to 64.
_ALIGNMENT = 16


def element_type(dtype: str) -> Type:
    """The compiler's element type for a logical dtype such as `float16`, `int8` or `uint4`."""
    floats = {"float16": F16Type, "float32": F32Type, "bfloat16": BF16Type}
    if dtype in floats:
        return floats[dtype].get()
    if dtype == "bool":
        return IntegerType.get_signless(1)
    bits = int(dtype.lstrip("uint"))
    return IntegerType.get_unsigned(bits) if dtype.startswith("u") else IntegerType.get_signed(bits)


State: TypeAlias = Mapping[str, Constant]
"""A constant under its state name, or the integers, scales and perhaps zero points or table of a weight."""


class Converter(TorchConverter):  # type: ignore[misc]  # the toolchain ships no types
    """Lowers traced programs, one for each function. Their state is given by name; state of one name is stored once."""

    def __init__(self) -> None:
        # Release mode records no stack traces, hence no path of the machine that built the bundle.
        super().__init__(mode=TorchConverter.Mode.RELEASE)
        self._states: dict[int, Mapping[str, State]] = {}  # by identity of the program
        self._attributes: dict[str, tuple[Any, Constant]] = {}  # by name
        self._quantized: dict[str, dict[str, Value]] = {}  # by placeholder, until it is read
        self._computed: dict[TensorKind, frozenset[str]] = {}  # what the compiler can make of which weights
        self._serial = itertools.count()

    def add(
        self,
        name: str,
        program: ExportedProgram,
        composites: Sequence[_ExternalizedExportedProgram],
        state: Mapping[str, State],
        spec: TraceSpec,
        computed: Mapping[TensorKind, frozenset[str]],
    ) -> None:
        """Add a function.

        Args:
            name: name of the function.
            program: what it computes.
            composites: the composites that it calls.
            state: what each placeholder of its graph stands for.
            spec: its signature.
            computed: see `Foldable.kinds`.
        """
        self._computed |= {(row(shape), dtype): made_of for (shape, dtype), made_of in computed.items()}
        # Not add_exported_program: it would unpack and repack every 4-bit weight in memory.
        self.validate(program)
        self._states[id(program)] = state
        self._staged.append(
            _StagedEntry(
                exported_program=program,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                state_names=[tensor.name for tensor in spec.states],
                entrypoint_name=name,
                _externalized_exported_programs=with_call_sites(composites, program, self._serial),
            )
        )

    def to_coreai(self) -> Any:
        """The `AIProgram` of all functions."""
        with without_code():
            return super().to_coreai()

    def computed(self, program: Any) -> set[str]:
        """The weights of which the compiler has computed constants of its own, which it stores."""
        made = {(each.shape, each.dtype) for each in stored_constants(program) if each.name not in self._attributes}
        return set[str]().union(*(self._computed[kind] for kind in made if kind in self._computed))

    def validate(self, program: ExportedProgram) -> None:
        """Raise ValueError for operations that are not lowered, naming them."""
        require_known_operations(program, self._user_defined_torch_lowering)

    def _handle_placeholder_op(self, node: fx.Node) -> None:
        state = self._states.get(id(self.exported_program), {})
        if node.name in state:
            given = state[node.name]
            if len(given) > 1:
                self._quantized[node.name] = {
                    parameter_of(name)[1]: self._constant(name, each) for name, each in given.items()
                }
                return
            ((name, constant),) = given.items()
            if not constant.transposed and is_row(node) and is_read_transposed(node):
                constant = _transposed(constant)
            self._values_map[node.name] = value = self._constant(name, constant)
            if constant.transposed:
                self._values_map |= {user.name: value for user in node.users}
        else:
            super()._handle_placeholder_op(node)

    def _handle_call_function_op(self, node: fx.Node) -> None:
        if node.name in self._values_map:  # the transpose of what is given so
            return
        for read in node.all_input_nodes:
            # Where it is read first, as a layer does that unpacks its own weight.
            if read.name in self._quantized and id(self.exported_program) in self._states:
                self._values_map[read.name] = _dequantized(self._quantized.pop(read.name))
        super()._handle_call_function_op(node)

    def _constant(self, name: str, constant: Constant) -> Value:
        """A constant that refers to the bytes where they are; functions that read the same weight share it."""
        known = self._attributes.get(name)
        if known is not None and not _same(known[1], constant):  # a literal of another function
            return self._constant(f"{name}_{len(self._attributes)}", constant)
        if known is None:
            kind = RankedTensorType.get(list(constant.shape), element_type(constant.dtype))
            buffer = memoryview(constant.data.reshape(-1)).cast("B")
            attribute = DenseResourceElementsAttr.get_from_buffer(buffer, name, kind, alignment=_ALIGNMENT)
            known = self._attributes.setdefault(name, (attribute, constant))
        return coreai.ConstantOp(value=known[0]).result


def _same(one: Constant, other: Constant) -> bool:
    """Whether two constants of one name are the same: stored weights are one object, literals are compared."""
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    return one is other or (alike and bool((one.data == other.data).all()))


def _transposed(constant: Constant) -> Constant:
    """A matrix of one row or column as its transpose."""
    return evolve(constant, shape=constant.shape[::-1], transposed=True)


def require_lowered(
    program: ExportedProgram, module: torch.nn.Module, with_lines: Callable[[], ExportedProgram]
) -> None:
    """Refuse a traced program with an operation that is not lowered, before weights are read for it.

    Args:
        program: the program.
        module: what it was traced from.
        with_lines: makes the program again, with the lines that operations come from.

    Raises:
        PluginError: with the layer and the line of the overlay.
    """
    with mistakes.explained("lowered", module, with_lines):
        Converter().validate(program)


def _splat_zero(shape: Sequence[int], element: Type) -> Value:
    zero = FloatAttr.get(element, 0.0) if not IntegerType.isinstance(element) else IntegerAttr.get(element, 0)
    return coreai.ConstantOp(value=DenseElementsAttr.get_splat(RankedTensorType.get(list(shape), element), zero)).result


def _dequantized(parts: Mapping[str, Value]) -> Value:
    """The weight that integers and scales stand for; a missing zero point costs a splat, not a tensor.

    Args:
        parts: by `parameter_of`. Where there is a table, integers are looked up in it, along no axis of the weight.
    """
    codes, scales = parts[""], parts["scales"]
    if "table" in parts:
        codes = coreai.lut_to_dense(codes, parts["table"], coreai.constant(np.array(0, dtype=np.int16)))
    shape = list(scales.type.shape)
    offset = parts["zero points"] if "zero points" in parts else _splat_zero(shape, codes.type.element_type)
    return coreai.blockwise_shift_scale(codes, scales, offset, _splat_zero(shape, scales.type.element_type))
