"""The state that each constant of a saved asset was written from.

Three habits of the toolchain stand between a constant in the program and its state:

* Equal bytes are stored once: the constants of several states with the same bytes all bear the name of one of them.
* Constants are hoisted to the head of the function in the reverse of the states' order.
* The transpose of a matrix of one row only changes its shape, and is folded: what is left has no name, stands among the
  operations, and is used by the operation that used the transpose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen
from coreai._compiler.ir import DenseElementsAttr

_DTYPES = {"f16": "float16", "f32": "float32", "bf16": "bfloat16", "i1": "bool"}
_SHIFT_SCALE = "coreai.blockwise_shift_scale"

State = Mapping[str, tuple[tuple[int, ...], str]]


@frozen
class _Found:
    """A constant of the program.

    Attributes:
        name: name of the resource that holds its bytes; None when they stand among the operations.
        shape: its shape in elements.
        dtype: logical dtype, for example `int4`.
        values: the values of a constant without a name.
        uses: places of the operations that take it, without those that unpack quantized weights.
    """

    name: str | None
    shape: tuple[int, ...]
    dtype: str
    values: Any
    uses: tuple[int, ...]


def read_state(program: Any, function: str, stored: Mapping[str, memoryview], state: State) -> dict[str, memoryview]:
    """The bytes of each of `state`; see `Backend.state`.

    Args:
        program: an `AIProgram`; the bytes of its stored constants do not matter.
        function: the function whose constants are looked at.
        stored: the bytes of the stored constants, by name.
        state: shape and dtype of each state, by name.

    Raises:
        RuntimeError: when the constants are not those of `state`.
    """
    placed = _placed(list(_constants_of(program, function)), state)
    return {name: stored[place] if isinstance(place, str) else place for name, place in placed.items()}


def _constants_of(program: Any, function: str) -> Iterator[_Found]:
    """Every constant of a function, in the function's order."""
    module = program._module._mlir_module
    named = [op for op in module.body.operations if "sym_name" in op.attributes]
    graphs = [op for op in named if op.attributes["sym_name"].value == function]
    if len(graphs) != 1:
        raise RuntimeError(f"it has no function {function}")
    operations = list(graphs[0].regions[0].blocks[0].operations)
    places = {operation.operation: place for place, operation in enumerate(operations)}
    for operation in operations:
        if operation.operation.name != "coreai.constant":
            continue
        value, type_ = operation.attributes["value"], operation.results[0].type
        element = str(type_.element_type)
        dtype = _DTYPES.get(element) or element.replace("si", "int").replace("ui", "uint")
        inline = isinstance(value, DenseElementsAttr)
        # Only a resource may be printed: it prints its name, the others their values.
        name = None if inline else re.match(r"dense_resource<([^>]+)>", str(value))
        if not inline and name is None:
            raise RuntimeError(f"a constant is neither a resource nor values: {str(value)[:80]}")
        users = (getattr(use.owner, "operation", use.owner) for use in operation.results[0].uses)
        uses = tuple(places[user] for user in users if user in places and user.name != _SHIFT_SCALE)
        yield _Found(name[1] if name else None, tuple(type_.shape), dtype, value if inline else None, uses)


def _placed(found: Sequence[_Found], state: State) -> dict[str, Any]:
    """The resource that holds the bytes of each state, or the bytes themselves."""
    placed: dict[str, Any] = {}
    for kind in dict.fromkeys(state.values()):
        names = [name for name in state if state[name] == kind]
        # A constant with a name that is not a state's holds a literal of the graph.
        held = [f for f in reversed(found) if f.name in state and (f.shape, f.dtype) == kind]
        present = {f.name for f in held}
        if len(held) < len(names):
            folded = [name for name in names if name not in present]
            placed |= _unfolded(found, folded, kind)
            names = [name for name in names if name in present]
        if len(held) != len(names):
            raise RuntimeError(f"it holds {len(held)} constants of {kind[1]} {list(kind[0])} for {len(names)} weights")
        for name, constant in zip(names, held, strict=True):
            if constant.name != name and name in present:
                raise RuntimeError(f"{name} is where {constant.name} was expected")
            placed[name] = constant.name
    return {name: placed[name] for name in state}


def _unfolded(found: Sequence[_Found], names: Sequence[str], kind: tuple[tuple[int, ...], str]) -> dict[str, Any]:
    """The bytes of one-row matrices that stand among the operations, in the order in which those use them."""
    shape, dtype = kind
    values = [f for f in found if f.name is None and f.dtype == dtype and f.shape == shape[::-1]]
    uses = sorted((use, index) for index, f in enumerate(values) for use in f.uses)
    if shape[:1] != (1,) or len(uses) != len(names):
        raise RuntimeError(f"it does not hold {', '.join(names[:3])}")
    arrays = [np.array(f.values).reshape(-1).view(np.uint8).data for f in values]
    return {name: arrays[index] for name, (_, index) in zip(names, uses, strict=True)}
