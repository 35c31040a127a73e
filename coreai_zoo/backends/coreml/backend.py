"""The Core ML backend: a decoder as an ML Program in an `.mlpackage`, for macOS 15 and iOS 18 and later.

coremltools and torch are imported inside, so that it costs nothing to discover the backend. Where there is no Mac, the
reference interpreter in `reference` runs a package: with the program's own rounding, without a device.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, frozen

from coreai_zoo.backends.versions import checked_versions
from coreai_zoo.disk import temporary_folder
from coreai_zoo.errors import BadInput, CheckFailed, EnvironmentLacks, listing
from coreai_zoo.layout import Layout
from coreai_zoo.machine import available_memory, physical_memory
from coreai_zoo.names import names_beside
from coreai_zoo.program import Function, Operation, Program
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.signature import Signature, StateSpec, TraceSpec
from coreai_zoo.weights.formats import has_table

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from coreai_zoo.backend import Constant, Values
    from coreai_zoo.backends.coreml.lowering import Converted
    from coreai_zoo.backends.coreml.package import Package, Stored
    from coreai_zoo.backends.coreml.reference import Interpreter

FUNCTION = "main"
"""The function of a package; coremltools gives it this name."""

_REQUIRED = {"coremltools": "9.0"}

_SCRIPT = Path(__file__).with_name("compare_on_mac.py")
_RUNNING = (
    "**Not run on Apple hardware.** What was checked was computed by a reference interpreter of ML Programs on the "
    "saved package, which rounds as the program says and knows nothing of a device. On a Mac, "
    "`python compare_on_mac.py` (it needs coremltools and numpy) runs the package and compares its logits with those "
    "that `zoo gate` left in `gate/`.\n\n"
    "Anywhere, in the reference interpreter (slow; for checking):"
)

_MAX_RANK = 5
_MAX_ELEMENTS = 2**31 - 1
"""The most elements of one state: ML Programs index with 32 bits."""

_SHOWN_ELEMENTS = 16  # of a literal


@frozen
class CoreMLBackend:
    """Writes and runs `.mlpackage` folders; see `Backend`."""

    name: str = "coreml"
    title: str = "Core ML"
    run_instructions: str = _RUNNING
    asset_suffix: str = ".mlpackage"
    runtime: str = "mil"
    accumulation: Literal["half", "single"] = "single"
    traces_quantized: bool = True

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the toolchain, checked."""
        return checked_versions(_REQUIRED)

    @property
    def extra_files(self) -> Mapping[str, str]:
        """See `Backend.extra_files`."""
        return {_SCRIPT.name: _SCRIPT.read_text(encoding="utf-8")}

    @property
    def version_warnings(self) -> tuple[str, ...]:
        """See `Backend.version_warnings`."""
        from coreai_zoo.backends.coreml.lowering import version_warnings

        return version_warnings()

    def require(self, functions: Mapping[str, TraceSpec], quantizations: Collection[QuantizationSpec]) -> None:
        """See `Backend.require`."""
        if list(functions) != [FUNCTION]:
            raise BadInput(
                f"The Core ML backend writes one function, {FUNCTION}, and the contract asks for "
                f"{listing(list(functions))}.",
                "Use another contract, or the backend coreai.",
            )
        spec = functions[FUNCTION]
        problems = list(chain.from_iterable(map(_state_problems, spec.states)))
        problems += [f"axis {name} is dynamic" for name in spec.axes]
        if problems:
            too_large = all("elements, and" in problem for problem in problems)
            hint = "Try a smaller --max-context." if too_large else "Use another contract, or the backend coreai."
            raise BadInput(f"Core ML cannot hold this decoder: {listing(problems)}.", hint)
        tables = sorted(str(spec) for spec in quantizations if has_table(spec))
        if tables:
            raise BadInput(
                f"The Core ML backend does not write {listing(tables)}: systems before macOS 26 and iOS 26 take scales "
                "before a table only, and so a table for each block.",
                "Use a recipe of int8 or int4, or the backend coreai.",
            )

    def memory(self, layers: int, functions: int, steps: int) -> int:  # noqa: ARG002  # it writes one function
        """See `Backend.memory`: coremltools' program takes 363 MB at 4 layers, 609 at 64; weights take none."""
        return (340 + 4 * layers) * 2**20

    def trace(
        self,
        modules: Mapping[str, nn.Module],
        functions: Mapping[str, TraceSpec],
        read_transposed: Mapping[str, bool] | None = None,
    ) -> CoreMLTraced:
        """See `Backend.trace`."""
        from coreai_zoo.backends.coreml.lowering import convert

        checked_versions(_REQUIRED)
        return CoreMLTraced(convert(modules[FUNCTION], functions[FUNCTION], read_transposed))

    def check_integrity(self, asset: Path) -> None:
        """See `Backend.check_integrity`: a package has no checksum."""

    def signatures(self, asset: Path) -> Mapping[str, Signature]:
        """See `Backend.signatures`."""
        with _opened(asset) as package:
            return {FUNCTION: _signature(package)}

    def constants(self, asset: Path) -> Mapping[str, memoryview]:
        """See `Backend.constants`."""
        with _opened(asset) as package:
            return {name: stored.bytes for name, stored in _constants(package).items()}

    def state(
        self,
        asset: Path,
        function: str,  # noqa: ARG002  # there is one
        state: Mapping[str, tuple[tuple[int, ...], str]],
    ) -> Mapping[str, memoryview]:
        """See `Backend.state`."""
        from coreai_zoo.backends.coreml.package import TensorType

        with _opened(asset) as package:
            found = _constants(package)
            problems = [name for name in state if name not in found]
            problems += [
                f"{name} ({found[name].type} instead of {TensorType(shape, dtype)})"
                for name, (shape, dtype) in state.items()
                if name in found and found[name].type != TensorType(shape, dtype)
            ]
            if problems:
                raise CheckFailed(f"{asset} holds other constants than the decoder: {listing(problems)}.")
            return {name: found[name].bytes for name in state}

    def program(self, asset: Path) -> Program:
        """See `Backend.program`."""
        with _opened(asset) as package:
            return _program(package)

    def require_memory(self, asset: Path) -> None:
        """See `Interpreting.require_memory`."""
        from coreai_zoo.backends.coreml.reference import memory

        with _opened(asset) as package:
            needed = memory(package)
        room = available_memory() or physical_memory()
        if room is not None and needed > room:
            raise EnvironmentLacks(
                f"{asset.name} takes {_gib(needed)} in the reference interpreter of ML Programs, which holds every "
                f"weight in memory, and {_gib(room)} are available.",
                "It is for small bundles; a large one is judged by `zoo gate` with --candidate torch.",
            )

    @contextlib.contextmanager
    def stepper(self, asset: Path, functions: Mapping[str, TraceSpec], capacity: int) -> Iterator[MILStepper]:
        """See `Backend.stepper`."""
        from coreai_zoo.backends.coreml.reference import Interpreter

        self.require_memory(asset)
        with _opened(asset) as package:
            interpreter = Interpreter(package)
        yield MILStepper(interpreter, functions[FUNCTION], capacity)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _state_problems(state: StateSpec) -> Iterator[str]:
    if state.dtype != "float16":
        yield f"state {state.name} is {state.dtype}, and a state is float16"
    if len(state.shape) > _MAX_RANK:
        yield f"state {state.name} has {len(state.shape)} axes, and a state has {_MAX_RANK} at most"
    sizes = [size for size in state.shape if isinstance(size, int)]
    if len(sizes) < len(state.shape):
        yield f"state {state.name} has a dynamic axis"
    elif math.prod(sizes) > _MAX_ELEMENTS:
        yield f"state {state.name} has {math.prod(sizes):,} elements, and {_MAX_ELEMENTS:,} are the most"


# ---------------------------------------------------------------------------------------------------------------------
# Laying out
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class CoreMLTraced:
    """A converted decoder whose weights are placeholders; see `Traced`."""

    converted: Converted

    def lay_out(self, constants: Mapping[str, Constant], values: Values) -> Layout:
        """See `Traced.lay_out`: values are asked for of what is too small for the file of the weights."""
        from coreai_zoo.backends.coreml.lowering import lay_out

        return lay_out(self.converted, constants, values)

    def lowered(self, constants: Mapping[str, Constant]) -> Program:
        """See `Traced.lowered`."""
        import numpy as np

        def zeros(names: Collection[str]) -> Mapping[str, Constant]:
            found = {name: constants[name] for name in names}
            return {name: evolve(each, data=np.zeros(each.shape, each.dtype)) for name, each in found.items()}

        with temporary_folder() as folder:
            self.lay_out(constants, zeros).write(folder, reserve=False)
            with _opened(folder) as package:
                return _program(package)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(asset: Path) -> Iterator[Package]:
    """A package; an exception of the block that shows that it is damaged becomes an error in words."""
    from coreai_zoo.backends.coreml.package import Damaged, Package

    try:
        yield Package.open(asset)
    except (Damaged, OSError, KeyError, ValueError, IndexError) as error:
        raise CheckFailed(f"{asset} cannot be read: {str(error).strip()[:300]}.", "Build the bundle again.") from error


def _signature(package: Package) -> Signature:
    from coreai_zoo.backends.coreml.package import tensor_type

    arguments = {tensor.name: tensor.type for tensor in package.function.inputs}
    kinds = {name: (tensor_type(type_).shape, tensor_type(type_).dtype) for name, type_ in arguments.items()}
    states = {name: kinds.pop(name) for name, type_ in arguments.items() if type_.WhichOneof("type") == "stateType"}
    made = {output.name: output.type for operation in package.block.operations for output in operation.outputs}
    outputs = {name: (tensor_type(made[name]).shape, tensor_type(made[name]).dtype) for name in package.block.outputs}
    return Signature(kinds, states, outputs)


def _constants(package: Package) -> dict[str, Stored]:
    """The values of the decoder's states by name."""
    names = package.names
    found: dict[str, Stored] = {}
    for operation in package.block.operations:
        name = names.get(operation.outputs[0].name) if operation.outputs else None
        if name is None:
            continue
        if operation.type == "const":
            found[name] = package.stored(operation.attributes["val"])
        else:
            for key, part in _unpacked_from(name).items():
                if key in operation.inputs:
                    found[part] = package.stored(operation.inputs[key].arguments[0].value)
    return found


def _unpacked_from(codes: str) -> dict[str, str]:
    """The states that the weight with the integers `codes` is unpacked from, by the argument that each of them is."""
    return dict(zip(("data", "scale", "offset"), names_beside(codes), strict=False))


def _program(package: Package) -> Program:
    """Every function as data, in the order of their names: the file keeps none."""
    functions = package.model.mlProgram.functions
    return Program({name: _function_of(package, name, functions[name]) for name in sorted(functions)}, {})


def _function_of(package: Package, name: str, function: Any) -> Function:
    """One function as data; a quantized weight is its stored constants and the operation that unpacks them."""
    from coreai_zoo.backends.coreml.package import Damaged, tensor_type

    if len(function.block_specializations) != 1:
        raise Damaged(f"it has several forms of the function {name}, or none")
    (block,) = function.block_specializations.values()
    names = package.names
    numbers = {argument.name: number for number, argument in enumerate(function.inputs)}
    operations: list[Operation] = []

    def constant(value: Any, stored: str | None) -> int:
        """Number of a new constant."""
        number = numbers.setdefault(f"constant {len(numbers)}", len(numbers))
        text = () if stored else (f"value = {_shown(package, value)}",)
        operations.append(Operation("constant", (), (number,), (_type_of(value.type),), text, stored=stored))
        return number

    for operation in block.operations:
        made = operation.outputs[0].name if operation.outputs else ""
        if operation.type == "const":
            numbers[made] = constant(operation.attributes["val"], names.get(made))
            continue
        quantized = _unpacked_from(names[made]) if made in names else {}
        operands = [
            numbers[binding.name]
            if binding.WhichOneof("binding") == "name"
            else constant(binding.value, quantized.get(key))
            for key, argument in sorted(operation.inputs.items())
            for binding in argument.arguments
        ]
        results = [numbers.setdefault(output.name, len(numbers)) for output in operation.outputs]
        operations.append(
            Operation(
                operation.type,
                tuple(operands),
                tuple(results),
                tuple(str(tensor_type(output.type)) for output in operation.outputs),
                on_state=operation.type in {"read_state", "write_state"},
            )
        )
    declaration = [f"{argument.name}: {tensor_type(argument.type)}" for argument in function.inputs]
    declaration += [f"output {output}" for output in block.outputs]
    arguments = tuple(argument.name for argument in function.inputs)
    return Function(name, tuple(declaration), tuple(operations), arguments)


def _type_of(value_type: Any) -> str:
    from coreai_zoo.backends.coreml.package import Damaged, tensor_type

    try:
        return str(tensor_type(value_type))
    except Damaged:
        return "text"


def _shown(package: Package, value: Any) -> str:
    """A literal as text, or the hash of a long one."""
    found = package.value(value)
    if isinstance(found, str) or found.size <= _SHOWN_ELEMENTS:
        return str(found if isinstance(found, str) else found.tolist())
    return f"sha256 {hashlib.sha256(found.tobytes()).hexdigest()[:16]}"


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


class MILStepper:
    """Steps a package in the reference interpreter; see `Stepper`."""

    def __init__(self, interpreter: Interpreter, spec: TraceSpec, capacity: int) -> None:
        """Begin at position 0.

        Raises:
            BadInput: when the package's context is shorter than `capacity`.
        """
        self._interpreter, self._spec = interpreter, spec
        self._context = min(int(state.shape[3]) for state in spec.states if state.kind == "kv_cache")
        self.reserve(capacity)
        self.reset()

    def reset(self, unwritten: float = 0.0) -> None:
        """See `Stepper.reset`."""
        import torch

        self._position = 0
        self._states = {
            state.name: torch.full(
                [int(size) for size in state.shape],
                unwritten if state.kind == "kv_cache" else 0.0,
                dtype=getattr(torch, state.dtype),
            )
            for state in self._spec.states
        }

    def step(self, token: int) -> np.ndarray[Any, Any]:
        """Feed one token; the logits, float16 [V].

        Raises:
            CheckFailed: when the context is full, or the program does what it does not declare.
        """
        logits = self.call(FUNCTION, [token])
        assert logits is not None
        last: np.ndarray[Any, Any] = logits[-1]
        return last

    def call(self, function: str, tokens: Sequence[int]) -> np.ndarray[Any, Any] | None:  # noqa: ARG002  # there is one
        """Feed tokens; the logits, float16 [S, V], None where there are none; raises as `step` does."""
        import torch

        from coreai_zoo.backends.coreml.package import Damaged

        if self._position + len(tokens) > self._context:
            raise CheckFailed(f"The context of {self._context} positions is full.")
        values = self._spec.step(tokens, self._position)
        inputs = {
            tensor.name: torch.tensor([values[tensor.name]], dtype=getattr(torch, tensor.dtype))
            for tensor in self._spec.inputs
        }
        self._position += len(tokens)
        try:
            outputs = self._interpreter.run(inputs, self._states)
        except (Damaged, KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckFailed(f"The package cannot be run: {str(error).strip()[:300]}.") from error
        if not self._spec.outputs:
            return None
        logits: np.ndarray[Any, Any] = outputs[self._spec.outputs[0].name][0].numpy()
        return logits

    def state(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of a state as it is now."""
        return self._states[name].numpy().copy()

    def reserve(self, capacity: int) -> None:
        """See `Stepper.reserve`: a package has room for its whole context from the start.

        Raises:
            BadInput: when that is less.
        """
        if capacity > self._context:
            raise BadInput(
                f"{capacity} positions were asked for, and the package allows {self._context}.",
                "Build it with a larger --max-context.",
            )
