"""The operations of each layer and how they are connected, as lines to read and a digest to compare.

A line is one operation: its attributes, its operands, and the types of its results. An operand is shown as the
operation that made it and those that moved it since, so that most changes of wiring show in the line that changed:

    mul(reshape(sigmoid), reshape(batch_matmul<mlp.gate.weight>)) -> 1x1x48xfloat32

The digest covers the same exactly, every edge included. Neither knows how values are numbered, or where in the program
a layer is: what a layer takes from the one before is `below`, its own slot of a state is `slot`, and a weight counts by
its place among the layer's weights; its name is in the lines only. How a weight is stored makes no difference either.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from attrs import define, evolve, field, frozen

from coreai_zoo.names import parameter_of
from coreai_zoo.program import Function, Operation, Program

OUTSIDE = -1
"""The layer of an operation that belongs to none."""

_MOVES = frozenset(
    {"reshape", "transpose", "cast", "broadcast_in_dims", "expand_dims", "shrink_dims", "split"}
)  # the values are those of the first operand
_UNPACKS = "blockwise_shift_scale"  # of constants: the weight that they stand for
_LAYER_OF_A_LIST = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_INLINE = re.compile(r"value = dense<(.*)> : (.*)", re.DOTALL)
_NAMED = re.compile(r"<[^<>]*>")
_END = str(2**31 - 1)  # how the toolchain says that a slice goes on to the end
_LONG = 72
_HASHED = " sha256 "


@frozen
class Wiring:
    """Some operations and how they are connected.

    Attributes:
        digest: the first 16 digits of a SHA-256; empty where there are no operations.
        lines: each operation as text, and how often it occurs.
        handed: digests of the values that other layers take from this one; they are no part of `digest`.
    """

    digest: str = ""
    lines: Mapping[str, int] = field(factory=dict)
    handed: frozenset[str] = frozenset()


def unnamed(line: str) -> str:
    """The line without the names of weights."""
    return _NAMED.sub("<>", line)


def wire(function: Function, layers: Sequence[int], program: Program) -> dict[int, Wiring]:
    """The wiring of each layer, and of what is `OUTSIDE`.

    Args:
        function: a function of `program`.
        layers: the layer that each operation belongs to.
        program: holds the composites that the function calls and the weights that it reads.
    """
    reader = _Reader(function, layers, program)
    for index in range(len(function.operations)):
        reader.read(index)
    return {layer: reader.wiring(layer) for layer in sorted({*reader.lines, OUTSIDE})}


def merged(layers: Sequence[Wiring]) -> Wiring:
    """The wiring of layers that have one digest. All hand on the same, but nobody takes all of it from the last."""
    handed = sorted({key for layer in layers for key in layer.handed})
    return evolve(layers[0], digest=_sha256([layers[0].digest, *handed]), handed=frozenset())


def wire_composites(program: Program, names: Mapping[str, str]) -> dict[str, Wiring]:
    """The wiring of each composite; one that occurs with several shapes is all of them together.

    Args:
        program: holds them.
        names: of each function that is called, the name of its composite.
    """
    parts: dict[str, list[Wiring]] = {}
    program = evolve(program, literals={})  # they are the functions'
    for callee, name in names.items():
        function = program.composites[callee]
        parts.setdefault(name, []).append(wire(function, [OUTSIDE] * len(function.operations), program)[OUTSIDE])
    return {
        name: Wiring(
            _sha256(sorted(part.digest for part in found)),
            dict(sorted(sum((Counter(part.lines) for part in found), Counter()).items())),
        )
        for name, found in sorted(parts.items())
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading the operations in their order
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class _Seen:
    """A value as an operation sees it: for the line, and for the digest."""

    label: str
    key: str


@define
class _Reader:
    """Reads a function's operations one after the other.

    Attributes:
        made: of each value its operation, and the number among the results.
        states: of each value that is a whole state, the argument that holds that.
        aliases: of each state that is read back, the value that was written.
        weights: of each value that is a weight, the name of that.
        first: the first layer.
        ranks: of each layer, the number of each weight, in the order of the decoder.
        slots: of each state and layer, the number of that layer among those that use the state.
        taken: of each layer and where it takes them from, values by type.
        carries_weights: operations that depend on a weight.
        known: of each operation that was read, with everything that is before it in its layer.
        lines, digests: of the operations that were read, by layer.
        handed: of each layer, what it gives to others.
    """

    function: Function
    layers: Sequence[int]
    program: Program
    made: dict[int, tuple[int, int]] = field(init=False)
    states: dict[int, int] = field(init=False)
    aliases: dict[int, int] = field(init=False)
    weights: dict[int, str] = field(init=False)
    first: int = field(init=False)
    ranks: dict[int, dict[str, int]] = field(factory=dict)
    slots: dict[tuple[int, int], int] = field(factory=dict)
    taken: dict[tuple[int, int, str], dict[int, None]] = field(factory=dict)
    carries_weights: set[int] = field(factory=set)
    known: dict[int, _Seen] = field(factory=dict)
    lines: dict[int, Counter[str]] = field(factory=dict)
    digests: dict[int, list[str]] = field(factory=dict)
    handed: dict[int, set[str]] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        operations = self.function.operations
        self.made = {value: (at, number) for at, op in enumerate(operations) for number, value in enumerate(op.results)}
        self.states, self.aliases = _states(operations, len(self.function.arguments))
        self.weights = dict(_weights(operations, self.program.literals))
        self.first = min((layer for layer in self.layers if layer != OUTSIDE), default=OUTSIDE)
        self._rank()

    def _rank(self) -> None:
        """Number the weights of each layer in the order of the decoder, and the layers that use a state."""
        order = {parameter_of(name)[0]: place for place, name in enumerate(self.program.weights)}
        found: dict[int, dict[str, int]] = {}
        users: dict[int, set[int]] = {}
        operations = self.function.operations
        for at, operation in enumerate(operations):
            for value in map(self._resolved, operation.operands):
                if value in self.weights:
                    name = self.weights[value]
                    found.setdefault(self.layers[at], {})[name] = order.get(name, len(order) - value)
                if value in self.states:
                    users.setdefault(self.states[value], set()).add(self.layers[at])
                elif value in self.made and not operations[self.made[value][0]].is_constant:
                    maker = self.layers[self.made[value][0]]
                    self.taken.setdefault((self.layers[at], maker, _short(self._type(value))), {}).setdefault(value)
        self.ranks = {
            layer: {name: rank for rank, name in enumerate(sorted(names, key=lambda name: (names[name], name)))}
            for layer, names in found.items()
        }
        self.slots = {
            (state, layer): slot
            for state, layers in users.items()
            for slot, layer in enumerate(sorted(layers - {OUTSIDE}))
        }

    def read(self, at: int) -> None:
        """Take in one operation, all before it having been read."""
        operation, layer = self.function.operations[at], self.layers[at]
        if operation.is_constant or (operation.results and operation.results[0] in self.weights):
            return
        seen = [self._slotted(at, place) or self._seen(value, layer) for place, value in enumerate(operation.operands)]
        said = ", ".join(attribute.partition(" : ")[0] for attribute in self._attributes(operation))
        types = ", ".join(map(_short, operation.types)) or "nothing"
        labels = [each.label for each in seen]
        key = _sha256([operation.name, said, types, *(each.key for each in seen)])
        self.known[at] = _Seen(_label(operation, labels), key)
        line = f"{operation.name}{f'{{{said}}}' if said else ''}({', '.join(labels)}) -> {types}"
        self.lines.setdefault(layer, Counter())[line] += 1
        self.digests.setdefault(layer, []).append(key)
        if any(self._carries_weights(value) for value in operation.operands):
            self.carries_weights.add(at)

    def wiring(self, layer: int) -> Wiring:
        """Of one layer, once everything has been read."""
        literals = self.program.literals.values() if layer == OUTSIDE else ()
        parts = sorted((*self.digests.get(layer, ()), *literals))
        lines = dict(sorted(self.lines.get(layer, {}).items()))
        return Wiring(_sha256(parts), lines, frozenset(self.handed.get(layer, ())))

    def _resolved(self, value: int) -> int:
        return self.aliases.get(value, value)

    def _carries_weights(self, value: int) -> bool:
        return value in self.weights or (value in self.made and self.made[value][0] in self.carries_weights)

    def _attributes(self, operation: Operation) -> tuple[str, ...]:
        called = self.program.composites.get(operation.callee or "")
        return operation.attributes if called is None else called.attributes

    def _seen(self, value: int, layer: int) -> _Seen:
        """A value as an operation of `layer` sees it."""
        value = self._resolved(value)
        if value in self.weights:
            name = self.weights[value]
            type_ = _short(self._type(value))
            return _Seen(f"<{_within(name, layer)}>", f"weight {self.ranks[layer][name]} {type_}")
        if value not in self.made:
            arguments = self.function.arguments
            return _Seen(arguments[value] if value < len(arguments) else "inner", f"argument {value}")
        at, number = self.made[value]
        operation = self.function.operations[at]
        if operation.is_constant:
            text = self._constant(operation)
            return _Seen(_readable(text), text)
        if self.layers[at] != layer:
            return self._seen_across(value, at, layer)
        known, many = self._known(at), f"#{number}" if len(operation.types) > 1 else ""
        return _Seen(known.label + many, known.key + many)

    def _known(self, at: int) -> _Seen:
        return self.known.get(at) or _Seen(self.function.operations[at].name, "")

    def _constant(self, operation: Operation) -> str:
        if operation.stored is not None:
            return self.program.literals.get(operation.stored, f"unknown {_short(operation.types[0])}")
        inline = _INLINE.fullmatch(", ".join(operation.attributes))
        value = inline[1] if inline else ", ".join(operation.attributes)
        return f"{value} : {_short(operation.types[0])}"

    def _seen_across(self, value: int, at: int, layer: int) -> _Seen:
        """A value that something else than `layer` made, without how: a change is told where it is."""
        maker, operation, number = self.layers[at], self.function.operations[at], self.made[value][1]
        if maker != OUTSIDE:
            self.handed.setdefault(maker, set()).add(f"{self._known(at).key} {number}")
        if value in self.states and layer != OUTSIDE:
            argument = self.states[value]
            return _Seen(f"state {self.function.arguments[argument]}", f"state {argument}")
        type_ = _short(operation.types[number])
        from_below = maker != OUTSIDE or (layer == self.first and at in self.carries_weights)
        if layer != OUTSIDE and from_below:
            distance = layer - maker if maker != OUTSIDE else 1
            label = "below" if distance == 1 else f"{distance} layers below"
        else:
            whose = f"layer {maker}: " if maker != OUTSIDE else ""
            label = whose + self._known(at).label + (f"#{number}" if len(operation.types) > 1 else "")
        alike = sorted(self.taken.get((layer, maker, type_), ()))
        return _Seen(label, f"{label} {type_} {alike.index(value) if value in alike else 0}")

    def _type(self, value: int) -> str:
        at, number = self.made[value]
        return self.function.operations[at].types[number]

    # -- the slot of a layer in a state

    def _slotted(self, at: int, place: int) -> _Seen | None:
        """An inline constant that says where in a state the layer's own slot is, or None."""
        operation, layer = self.function.operations[at], self.layers[at]
        state = next((self.states[v] for v in map(self._resolved, operation.operands) if v in self.states), None)
        slot = self.slots.get((state, layer)) if state is not None else None
        value = operation.operands[place]
        if slot is None or value not in self.made:
            return None
        constant = self.function.operations[self.made[value][0]]
        if not constant.is_constant or constant.stored is not None:
            return None
        text, type_ = self._constant(constant).rsplit(" : ", 1)
        if type_.endswith("xbool"):
            chosen = re.findall("true|false", text)
            if len(chosen) > 1 and [word == "true" for word in chosen] == [n == slot for n in range(len(chosen))]:
                return _Seen("only slot", f"only slot {type_}")
            return None
        expected = {1: (slot, "slot"), 2: (slot + 1, "slot + 1")}.get(place)
        sizes = re.fullmatch(r"(\d+)xu?int32", type_)
        if expected is None or sizes is None or not operation.name.startswith("slice"):
            return None
        numbers = re.findall(r"-?\d+", text)
        numbers = numbers * int(sizes[1]) if len(numbers) == 1 else numbers
        if not numbers or int(numbers[0]) != expected[0]:
            return None
        shown = f"[{', '.join((expected[1], *numbers[1:]))}]"
        return _Seen(_readable(f"{shown} : {type_}"), f"{shown} : {type_}")


def _states(operations: Sequence[Operation], arguments: int) -> tuple[dict[int, int], dict[int, int]]:
    """Which values are whole states, and which of these are read back after they were written."""
    states: dict[int, int] = {}
    aliases: dict[int, int] = {}
    written: dict[int, int] = {}  # of each token, the value whose writing it stands for
    types: set[str] = set()
    for operation in operations:
        if operation.on_state and operation.operands and operation.operands[0] < arguments:
            if operation.types and not operation.types[0].startswith("!"):
                types.add(operation.types[0])
                states[operation.results[0]] = operation.operands[0]
                for token in written.keys() & operation.operands:
                    aliases[operation.results[0]] = written[token]
            elif len(operation.operands) > 1:
                written |= dict.fromkeys(operation.results, aliases.get(operation.operands[1], operation.operands[1]))
        elif operation.types and operation.types[0] in types and not operation.is_constant:
            before = [states[value] for value in operation.operands if value in states]
            states |= dict.fromkeys(operation.results[:1], before[0]) if before else {}
    return states, aliases


def _weights(operations: Sequence[Operation], literals: Collection[str]) -> Iterator[tuple[int, str]]:
    """Values that are a weight, as it is stored or unpacked, with its name."""
    found: dict[int, str] = {}
    for operation in operations:
        stored = operation.stored
        name = parameter_of(stored)[0] if stored is not None and stored not in literals else None
        if operation.name.endswith(_UNPACKS) and operation.operands[0] in found:
            name = found[operation.operands[0]]
        if name is not None:
            found[operation.results[0]] = name
            yield operation.results[0], name


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def _label(operation: Operation, operands: Sequence[str]) -> str:
    """An operation for the line of one that reads its result, from the labels of its own operands."""
    if operation.name in _MOVES and operands:
        return f"{operation.name}({operands[0]})"
    return operation.name + "".join(dict.fromkeys(_NAMED.findall(" ".join(_own_weights(operands)))))


def _own_weights(labels: Sequence[str]) -> Iterator[str]:
    """Those of some operands that are a weight, perhaps moved."""
    for label in labels:
        inner = label
        while (match := re.fullmatch(rf"(?:{'|'.join(_MOVES)})\((.*)\)", inner)) is not None:
            inner = match[1]
        if _NAMED.fullmatch(inner):
            yield inner


def _within(name: str, layer: int) -> str:
    """A weight's name from its layer on."""
    match = _LAYER_OF_A_LIST.fullmatch(name)
    return match[2] if match and int(match[1]) == layer else name


def _short(type_: str) -> str:
    return type_.removeprefix("tensor<").removesuffix(">") if type_.startswith("tensor<") else type_


def _readable(text: str) -> str:
    """A constant for a line: its value, with its type where that is no index's; of a long one a hash."""
    value, _, type_ = text.rpartition(" : ")
    value = value.replace(_END, "end")
    if len(value) > _LONG and _HASHED not in value:
        value = f"{value[:24]}...{_HASHED}{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return value if re.fullmatch(r"(\d+x)*u?int\d+", type_) and _HASHED not in value else f"{value} {type_}"


def _sha256(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if parts else ""
