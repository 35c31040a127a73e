"""The stored constants of a saved asset. Each bears the name of the state that it was written from.

Every weight is lowered as a hole of its own (see `holes`), so that two with the same bytes are two constants. What is
lowered with its bytes, a buffer of a decoder and the rare weight that a compiler can compute with, is stored once where
several are equal, under one of their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen
from coreai._compiler.ir import DenseElementsAttr

from coreai_zoo.errors import listing

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
    """The bytes of each of `state`, by its name; see `Backend.state`.

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
    held = {found.name: found for found in _constants_of(graphs[0])}
    missing = [name for name in state if name not in held]
    if missing:
        raise RuntimeError(f"it does not hold {listing(missing, 3)}")
    for name, (shape, dtype) in state.items():
        found = held[name]
        if (found.shape, found.dtype) != (row(shape), dtype):
            raise RuntimeError(f"{name} is {found.dtype} {list(found.shape)} and not {dtype} {list(shape)}")
    return {name: stored[name] for name in state}


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


def row(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape, of a single column that of the row."""
    return tuple(shape[::-1] if tuple(shape[1:]) == (1,) else shape)
