"""Operation counts of each function of a program, by kind of layer.

A saved program does not say which layer an operation came from, but the constants that it stores carry the names of
the decoder's parameters, and values flow from layer to layer. So an operation belongs to the last layer that anything
before it belongs to, starting from those that read a layer's own parameter. What is before the first layer, after the
last one, or shared by several is `outside`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

from attrs import evolve, field, frozen

from coreai_zoo.lowering.wiring import OUTSIDE, Wiring, merged, wire, wire_composites
from coreai_zoo.program import Function, Operation, Program

_IN_A_LIST = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)")


@frozen
class LayerKind:
    """Layers that hold the same operations.

    Attributes:
        name: the submodules that not every layer has, or `layer` where all have the same.
        layers: positions of the layers.
        operations: how often each operation occurs in one of them.
        wiring: what the operations say and how they are connected.
    """

    name: str
    layers: tuple[int, ...]
    operations: Mapping[str, int]
    wiring: Wiring = field(factory=Wiring, repr=False)


@frozen
class Graph:
    """Operation counts of a function; constants are not operations.

    Attributes:
        kinds: the layers by kind, in the order of the first of each.
        outside: operations that belong to no layer.
        composites: of each composite by name, how many operations one is made of: a number per distinct shape, sorted.
        wiring: the wiring of what belongs to no layer.
        composite_wiring: the wiring of each composite, by name.
        cut: whether it gives nothing but states, so that its last layer is not computed to the end.
    """

    kinds: tuple[LayerKind, ...]
    outside: Mapping[str, int]
    composites: Mapping[str, tuple[int, ...]]
    wiring: Wiring = field(factory=Wiring, repr=False)
    composite_wiring: Mapping[str, Wiring] = field(factory=dict, repr=False)
    cut: bool = False

    @property
    def total(self) -> Counter[str]:
        """How often each operation occurs, a composite being one."""
        total = Counter(self.outside)
        for kind in self.kinds:
            total.update({name: count * len(kind.layers) for name, count in kind.operations.items()})
        return total

    @property
    def layers(self) -> Sequence[LayerKind]:
        """The kind of each layer, in their order."""
        by_position = {position: kind for kind in self.kinds for position in kind.layers}
        return [by_position[position] for position in sorted(by_position)]

    def repeated(self, kinds: Sequence[Hashable]) -> Graph:
        """The graph of a deeper decoder whose layer at each position is of the kind `kinds[position]`.

        Layers that this graph has are taken as they are; those beyond are like the last of their kind. A layer that is
        cut stays the last one.
        """
        own = {position: kind for kind in self.kinds for position in kind.layers}
        end, whole = {}, own
        if self.cut and len(own) < len(kinds):
            last = max(own)
            end, whole = {len(kinds) - 1: own[last]}, {position: own[position] for position in own if position != last}
        like = {kinds[position]: whole[position] for position in sorted(whole)}
        members: dict[int, list[int]] = {}
        for position, kind in enumerate(kinds):
            layer = end.get(position) or whole.get(position) or like[kind]
            members.setdefault(self.kinds.index(layer), []).append(position)
        repeated = [evolve(self.kinds[layer], layers=tuple(layers)) for layer, layers in sorted(members.items())]
        return evolve(self, kinds=tuple(repeated))


def count(program: Program) -> dict[str, Graph]:
    """The operation counts of a program's functions, by name."""
    stored = {
        name: [operation.stored for operation in function.operations if operation.stored]
        for name, function in program.functions.items()
    }
    anchors = {name: _Anchors.of(read) for name, read in stored.items()}
    # What a layer is called does not depend on how much of it a function reads.
    shared = {name for each in anchors.values() for name in each.shared}
    names = _Anchors.of(sorted({*itertools.chain.from_iterable(stored.values())} - shared)).kind_names()
    return {name: _counted(function, program, anchors[name], names) for name, function in program.functions.items()}


def _counted(function: Function, program: Program, anchors: _Anchors, names: Mapping[int, str]) -> Graph:
    layers = _assigned(function, anchors)
    counts: dict[int, Counter[str]] = {}
    for operation, layer in zip(function.operations, layers, strict=True):
        if not operation.is_constant:
            counts.setdefault(layer, Counter())[operation.name] += 1
    outside = counts.pop(OUTSIDE, Counter())
    called = {operation.callee: operation.name for operation in function.operations if operation.callee}
    sizes: dict[str, list[int]] = {}
    for callee, name in called.items():
        sizes.setdefault(name, []).append(program.composites[callee].size)
    found = {name: tuple(sorted(each)) for name, each in sorted(sizes.items())}
    wiring = wire(function, layers, program)
    return Graph(
        _kinds(counts, wiring, names),
        dict(sorted(outside.items())),
        found,
        wiring[OUTSIDE],
        wire_composites(program, called),
        cut=function.outputs == 0,
    )


def layer_list(parameters: Iterable[str]) -> str:
    """The path of the list that a decoder's layers are in, from the names of its parameters; empty where none is."""
    matches = (_IN_A_LIST.fullmatch(name) for name in _Anchors.of(list(parameters)).layer)
    return next((match[1] or "" for match in matches if match), "")


def layer_names(parameters: Iterable[str]) -> list[str]:
    """The kind of each layer, by name, from the names of a decoder's parameters."""
    anchors = _Anchors.of(list(parameters))
    names = anchors.kind_names()
    return [names[layer] for layer in sorted(names)]


def telling_depth(kinds: Sequence[Hashable]) -> int:
    """How many of the first layers show each kind twice: a state of one slot is compiled otherwise than others.

    The last of them is of the kind of the last of all, which a function that gives nothing does not compute to its end.

    Args:
        kinds: of each layer, what tells its kind from others.
    """
    wanted = {kind: min(2, kinds.count(kind)) for kind in kinds}
    depths = (
        depth
        for depth in range(1, len(kinds) + 1)
        if kinds[depth - 1] == kinds[-1] and all(kinds[:depth].count(kind) >= count for kind, count in wanted.items())
    )
    return next(depths, 0)


@frozen
class _Anchors:
    """What the names of constants say about layers.

    Attributes:
        layer: the layer of each constant that is stored once and named after a parameter of a layer.
        shared: constants that are read in several places: equal ones are stored once, so the name says nothing.
        children: the submodules of each layer.
    """

    layer: Mapping[str, int]
    shared: frozenset[str]
    children: Mapping[int, frozenset[str]] = field(repr=False)

    @classmethod
    def of(cls, names: Sequence[str]) -> _Anchors:
        shared = frozenset(name for name, times in Counter(names).items() if times > 1)
        places: dict[str, dict[str, tuple[int, str]]] = {}
        for name in dict.fromkeys(names):
            match = _IN_A_LIST.fullmatch(name)
            if match and name not in shared:
                places.setdefault(match[1] or "", {})[name] = (int(match[2]), match[3].partition(".")[0])
        # The longest list; an overlay may have others.
        inside = max(places.values(), key=lambda found: len({layer for layer, _ in found.values()}), default={})
        children: dict[int, set[str]] = {}
        for layer, child in inside.values():
            children.setdefault(layer, set()).add(child)
        return cls(
            {name: layer for name, (layer, _) in inside.items()},
            shared,
            {layer: frozenset(found) for layer, found in children.items()},
        )

    def kind_names(self) -> dict[int, str]:
        """The name of each layer's kind."""
        common = frozenset.intersection(*self.children.values()) if self.children else frozenset()
        return {layer: "+".join(sorted(found - common)) or "layer" for layer, found in sorted(self.children.items())}


def _kinds(
    counts: Mapping[int, Counter[str]], wiring: Mapping[int, Wiring], names: Mapping[int, str]
) -> tuple[LayerKind, ...]:
    """The layers by kind: those of one hold the same operations, wired alike."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for layer in sorted(counts):
        alike = (names[layer], repr(sorted(counts[layer].items())), wiring[layer].digest)
        groups.setdefault(alike, []).append(layer)
    return tuple(
        LayerKind(
            name,
            tuple(layers),
            dict(sorted(counts[layers[0]].items())),
            merged([wiring[layer] for layer in layers]),
        )
        for (name, *_), layers in groups.items()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Which layer an operation belongs to
# ---------------------------------------------------------------------------------------------------------------------


def _assigned(function: Function, anchors: _Anchors) -> list[int]:
    """The layer of each operation."""
    operations = function.operations
    flow = _Flow.of(operations)
    anchored = [
        max((anchors.layer.get(name, OUTSIDE) for name in flow.stored[index]), default=OUTSIDE)
        for index in range(len(operations))
    ]
    layer = [OUTSIDE] * len(operations)
    for index in range(len(operations)):
        layer[index] = max(anchored[index], *(layer[before] for before in flow.producers[index]), OUTSIDE)
    ahead = [OUTSIDE] * len(operations)  # the last layer that anything behind this operation reads a parameter of
    for index in reversed(range(len(operations))):
        ahead[index] = max((max(anchored[user], ahead[user]) for user in flow.users[index]), default=OUTSIDE)
    slots = _slot_reads(flow, layer)
    after = _after_the_layers(flow, anchored, layer, ahead, slots)
    for index in reversed(range(len(operations))):
        if flow.on_state[index] or index in after:
            layer[index] = OUTSIDE
            continue
        behind = {layer[user] for user in flow.users[index]} - {OUTSIDE}
        if anchored[index] == OUTSIDE and flow.stored[index] & anchors.shared and behind:
            # Its own parameter has another's name: it is where its result is used first.
            layer[index] = min(behind)
        elif index in slots:
            layer[index] = behind.pop() if len(behind) == 1 else OUTSIDE
    return layer


def _after_the_layers(
    flow: _Flow, anchored: Sequence[int], layer: Sequence[int], ahead: Sequence[int], slots: Collection[int]
) -> set[int]:
    """Operations behind the last layer: those that read another parameter, and those that gather the new states."""
    after: set[int] = set()

    def continues(index: int) -> bool:
        return any(before in after for before in flow.producers[index])

    last = max((index for index, own in enumerate(anchored) if own != OUTSIDE), default=0)
    # The compiler may rename a constant that it folds, so a parameter of another name says nothing before that.
    behind = [index for index in range(last + 1, len(flow.users)) if not flow.on_state[index]]
    for index in behind:
        is_last = ahead[index] == OUTSIDE and layer[index] != OUTSIDE
        if continues(index) or (is_last and flow.stored[index]):
            after.add(index)
    leads_there: set[int] = set()
    for index in reversed(behind):
        if any(user in after or user in leads_there for user in flow.users[index]):
            leads_there.add(index)
    for index in behind:
        # A state goes from layer to layer with all its slots: who reads or writes one of them gathers nothing.
        gathered = [before for before in flow.producers[index] if before not in slots and not flow.whole_state[before]]
        sources = {layer[before] for before in gathered} - {OUTSIDE}
        if continues(index) or (len(sources) > 1 and index not in leads_there):
            after.add(index)
    return after


def _slot_reads(flow: _Flow, layer: Sequence[int]) -> set[int]:
    """Operations that take a slot out of a state, which an earlier layer may have written another slot of."""
    slots: set[int] = set()
    for index, producers in enumerate(flow.producers):
        states = [before for before in producers if flow.whole_state[before] or before in slots]
        others = [before for before in producers if before not in states and layer[before] != OUTSIDE]
        if states and not others and not flow.on_state[index] and not flow.whole_state[index]:
            slots.add(index)
    return slots


@frozen
class _Flow:
    """Who reads whose results, by index of the operation; constants are left out.

    Attributes:
        producers: the operations whose results an operation reads.
        users: the operations that read its results.
        stored: names of the stored constants that it reads.
        on_state: see `Operation.on_state`.
        whole_state: whether its result is a state with all its slots.
    """

    producers: list[list[int]]
    users: list[list[int]]
    stored: list[frozenset[str]]
    on_state: list[bool]
    whole_state: list[bool]

    @classmethod
    def of(cls, operations: Sequence[Operation]) -> _Flow:
        made = {value: index for index, operation in enumerate(operations) for value in operation.results}
        state_types = {
            operation.types[0] for operation in operations if operation.on_state and len(operation.types) > 1
        }
        producers: list[list[int]] = []
        stored: list[frozenset[str]] = []
        users: list[list[int]] = [[] for _ in operations]
        for index, operation in enumerate(operations):
            before = [made[value] for value in operation.operands if value in made]
            stored.append(frozenset(name for at in before if (name := operations[at].stored)))
            computed = [at for at in before if not operations[at].is_constant and at < index]
            producers.append(computed)
            for at in computed:
                users[at].append(index)
        return cls(
            producers,
            users,
            stored,
            [operation.on_state for operation in operations],
            [any(type_ in state_types for type_ in operation.types) for operation in operations],
        )
