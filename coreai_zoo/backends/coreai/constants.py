"""The state that each constant of a saved asset was written from.

Three habits of the toolchain stand between a constant in the program and its state:

* Equal bytes are stored once: the constants of several states with the same bytes all bear the name of one of them.
* Constants are hoisted to the head of the function in the reverse of the states' order.
* A matrix of one row of which the transpose is read is stored as that; the bytes are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen
from coreai._compiler.ir import DenseElementsAttr

_DTYPES = {"f16": "float16", "f32": "float32", "bf16": "bfloat16", "i1": "bool"}

State = Mapping[str, tuple[tuple[int, ...], str]]


@frozen
class Found:
    """A stored constant of the program.

    Attributes:
        name: name of the resource that holds its bytes.
        shape: its shape in elements, of a single column that of the row.
        dtype: logical dtype, for example `int4`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


def stored_constants(program: Any) -> list[Found]:
    """Every stored constant of an `AIProgram`, function by function."""
    return [found for graph in _graphs(program) for found in _constants_of(graph)]


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
    graphs = [graph for graph in _graphs(program) if graph.attributes["sym_name"].value == function]
    if len(graphs) != 1:
        raise RuntimeError(f"it has no function {function}")
    placed = _placed(list(_constants_of(graphs[0])), state)
    return {name: stored[placed[name]] for name in state}


def _graphs(program: Any) -> list[Any]:
    """The functions and composites."""
    return [each for each in program._module._mlir_module.body.operations if "sym_name" in each.attributes]


def _constants_of(graph: Any) -> Iterator[Found]:
    """Every stored constant of a function, in the function's order."""
    for operation in graph.regions[0].blocks[0].operations:
        if operation.operation.name != "coreai.constant":
            continue
        value, type_ = operation.attributes["value"], operation.results[0].type
        if isinstance(value, DenseElementsAttr):  # it stands among the operations
            continue
        element = str(type_.element_type)
        dtype = _DTYPES.get(element) or element.replace("si", "int").replace("ui", "uint")
        name = re.match(r"dense_resource<([^>]+)>", str(value))  # that is all that it prints
        if name is None:
            raise RuntimeError(f"a constant is neither a resource nor values: {str(value)[:80]}")
        yield Found(name[1], row(type_.shape), dtype)


def _placed(found: Sequence[Found], state: State) -> dict[str, str]:
    """The resource that holds the bytes of each state."""
    placed: dict[str, str] = {}
    kinds = {name: (row(shape), dtype) for name, (shape, dtype) in state.items()}
    for kind in dict.fromkeys(kinds.values()):
        names = [name for name in state if kinds[name] == kind]
        # A constant with a name that is not a state's holds a literal of the graph.
        held = [f.name for f in reversed(found) if f.name in state and (f.shape, f.dtype) == kind]
        if len(held) != len(names):
            if missing := [name for name in names if name not in held]:
                raise RuntimeError(f"it does not hold {', '.join(missing[:3])}")
            raise RuntimeError(f"it holds {len(held)} constants of {kind[1]} {list(kind[0])} for {len(names)} weights")
        for name, stored in zip(names, held, strict=True):
            if stored != name and name in held:
                raise RuntimeError(f"{name} is where {stored} was expected")
            placed[name] = stored
    return placed


def row(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape, of a single column that of the row."""
    return tuple(shape[::-1] if tuple(shape[1:]) == (1,) else shape)
