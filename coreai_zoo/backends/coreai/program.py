"""A lowered `AIProgram` as data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from coreai_zoo.backend import Constant
from coreai_zoo.program import Function, Operation, Program

_NOISE = ("coreai.", "decomposable.", "broadcasting_")
_PRIVATE = "priv"  # what a function says that no engine calls: a composite
_ON_STATE = frozenset({"read_handle", "write_handle", "create_token", "output"})
_WRITTEN = "!coreai.token"  # what writing a state gives
_SHOWN = 3
_ELEMENTS = {"f16": "float16", "f32": "float32", "bf16": "bfloat16", "i1": "bool", "si": "int", "ui": "uint"}
_ELEMENT = re.compile(r"(?<=[x<])(f16|f32|bf16|i1(?!\d)|si(?=\d)|ui(?=\d))")


def read_program(program: Any, state: Mapping[str, Constant] | None = None, weights: Collection[str] = ()) -> Program:
    """A lowered program as data. No weight's bytes are read.

    Args:
        program: an `AIProgram`.
        state: what it was lowered with, by name, in the order of the decoder; None where that is not known.
        weights: those of `state` that are weights; the others' values become part of what the program says.
    """
    state = state or {}
    texts: dict[Any, str] = {}
    graphs = [graph.operation for graph in program._module._mlir_module.body.operations]
    composites = {_symbol(graph): _composite_name(graph) for graph in graphs}
    kinds: dict[bool, dict[str, Function]] = {False: {}, True: {}}
    for name, graph in zip(composites, graphs, strict=True):
        kinds[_PRIVATE in graph.attributes][name] = _function(graph, name, composites, texts)
    return Program(
        functions=kinds[False],
        composites=kinds[True],
        weights=tuple(name for name in state if name in weights),
        literals={name: _described(constant) for name, constant in state.items() if name not in weights},
    )


def _described(constant: Constant) -> str:
    """Some values of a constant, exactly, and a hash of all."""
    values = constant.data.reshape(-1)
    shown = ", ".join(map(repr, values[:_SHOWN].tolist()))
    rest = f", ... sha256 {hashlib.sha256(values.tobytes()).hexdigest()[:16]}" if values.size > _SHOWN else ""
    return f"[{shown}{rest}] : {'x'.join(map(str, (*constant.shape, constant.dtype)))}"


def _symbol(graph: Any) -> str:
    return str(graph.attributes["sym_name"]).strip('"')


def _composite_name(graph: Any) -> str:
    if "composite_decl" not in graph.attributes:
        return _symbol(graph)
    match = re.search(r'<"([^"]+)"', str(graph.attributes["composite_decl"]))
    return match[1] if match else _symbol(graph)


def _function(graph: Any, name: str, composites: Mapping[str, str], texts: dict[Any, str]) -> Function:
    numbers: dict[Any, int] = {}

    def number(values: Any) -> tuple[int, ...]:
        return tuple(numbers.setdefault(value, len(numbers)) for value in values)

    def text(part: Any) -> str:
        found = texts.get(part)
        return found if found is not None else texts.setdefault(part, str(part))

    def operations(block: Any) -> Iterator[Operation]:
        number(block.arguments)
        for view in block.operations:
            operation = view.operation
            attributes = {entry.name: text(entry.attr) for entry in _attributes(operation)}
            callee = re.search(r"@([\w$.-]+)", attributes.get("callee", ""))
            stored = re.match(r'dense_resource<"?([^>"]+)"?>', attributes.get("value", ""))
            plain = operation.name
            for noise in _NOISE:
                plain = plain.removeprefix(noise)
            yield Operation(
                name=composites.get(callee[1], plain) if callee else plain,
                operands=number(operation.operands),
                results=number(operation.results),
                types=tuple(_ELEMENT.sub(_plain_name, text(result.type)) for result in operation.results),
                attributes=tuple(f"{key} = {value}" for key, value in attributes.items()),
                stored=stored[1] if stored else None,
                callee=callee[1] if callee else None,
                on_state=plain in _ON_STATE,
            )
            for region in operation.regions:
                for inner in region.blocks:
                    yield from operations(inner)

    body = [operation for block in graph.regions[0].blocks for operation in operations(block)]
    declaration = tuple(f"{entry.name} = {text(entry.attr)}" for entry in _attributes(graph))
    arguments = re.findall(r'coreai\.name = "([^"]*)"', _text_of(graph, "arg_attrs"))
    composite = re.search(r"op_attrs = \{([^}]*)\}", _text_of(graph, "composite_decl"))
    attributes = composite[1].split(", ") if composite else []
    types = {value: kind for operation in body for value, kind in zip(operation.results, operation.types, strict=True)}
    outputs = sum(types.get(value) != _WRITTEN for value in body[-1].operands)
    return Function(name, declaration, tuple(body), tuple(arguments), tuple(attributes), outputs)


def _text_of(graph: Any, attribute: str) -> str:
    return str(graph.attributes[attribute]) if attribute in graph.attributes else ""


def _plain_name(match: re.Match[str]) -> str:
    return _ELEMENTS[match[1]]


def _attributes(operation: Any) -> list[Any]:
    return [operation.attributes[index] for index in range(len(operation.attributes))]
