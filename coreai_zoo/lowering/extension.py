"""The program of all layers, from the program of the first few; see `repetition`.

The graph is told apart into layers and what follows the last of them. The layers of each kind, but for the first of
each, are compared node by node, which shows what changes from layer to layer: its own parameters; integers that count,
such as its slot of a state; and values that an earlier layer computed. Those are handed from layer to layer, like the
hidden state or a cache, or gathered at the end, like the new slots of a fixed state. The last traced layer of each kind
is then copied for every layer that was not traced.

Nothing is taken on trust. The rules that are learnt are first applied to the traced layers, and have to give what was
traced. A layer that differs from the others, an integer that no count explains, a value that is handed on in another
way, a shape that does not fit: each raises `NotRepeated`, and the caller traces all layers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from attrs import Factory, define, frozen
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec

from coreai_zoo.lowering.repetition import NotRepeated, Repetition
from coreai_zoo.signature import TraceSpec

Where: TypeAlias = tuple[object, ...]
"""The place of an argument among a node's arguments."""
Role: TypeAlias = tuple[object, int, Where]
"""Kind of layer (or "end"), index of a node in it, place of an argument."""

_STATE = (InputKind.PARAMETER, InputKind.BUFFER)


def extend(
    program: ExportedProgram, module: nn.Module, repetition: Repetition, short: TraceSpec, spec: TraceSpec
) -> ExportedProgram:
    """The program of all layers of `module`.

    Args:
        program: traced from the shortened module, and decomposed.
        module: the decoder with all its layers.
        repetition: how it was shortened.
        short: the signature of the shortened module.
        spec: the signature of all layers.

    Raises:
        NotRepeated: when the traced layers are not alike in a way that can be continued.
    """
    traced = _Traced.of(program, repetition)
    return _Extension(traced, _learnt(traced), module, short, spec).program()


# ---------------------------------------------------------------------------------------------------------------------
# The traced program, taken apart
# ---------------------------------------------------------------------------------------------------------------------


def _mapped(value: Any, function: Callable[[Where, Any], Any], where: Where = ()) -> Any:
    """`value` with every leaf replaced by `function(its place, it)`, which may answer for a whole list of nodes."""
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, fx.Node) for item in value):
            whole = function(where, list(value))
            if whole is not None:
                return whole
        return type(value)(_mapped(item, function, (*where, index)) for index, item in enumerate(value))
    if isinstance(value, dict):
        return {key: _mapped(item, function, (*where, key)) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(getattr(value, end), function, (*where, end)) for end in ("start", "stop", "step")))
    return function(where, value)


def _leaves(node: fx.Node, skip: Callable[[list[fx.Node]], bool] = lambda _: False) -> list[tuple[Where, Any]]:
    """Every argument of a node that is no container, with its place, without the lists of nodes that `skip` accepts."""
    found: list[tuple[Where, Any]] = []

    def visit(where: Where, leaf: Any) -> Any:
        if isinstance(leaf, list):
            return leaf if skip(leaf) else None
        found.append((where, leaf))
        return leaf

    _mapped((node.args, node.kwargs), visit)
    return found


@frozen
class _Traced:
    """A program of few layers.

    Attributes:
        stretches: the nodes of each layer with what comes before it, and those after the last.
        owner: of each node, its stretch.
        places: of each layer's nodes, their index; without sizes, which are computed once and used by all layers.
        own: of each parameter of a layer, the layer and the parameter's name in it.
    """

    program: ExportedProgram
    repetition: Repetition
    stretches: list[list[fx.Node]]
    owner: dict[fx.Node, int]
    places: list[dict[fx.Node, int]]
    own: dict[fx.Node, tuple[int, str]]

    @classmethod
    def of(cls, program: ExportedProgram, repetition: Repetition) -> _Traced:
        """Take `program` apart."""
        inside = re.compile(re.escape(repetition.path) + r"\.(\d+)(?:\.(.*))?")
        nodes = [node for node in program.graph.nodes if node.op not in {"placeholder", "output"}]
        layers = [_layer_of(node, inside) for node in nodes]
        ends = [0, *(_last(layers, layer) + 1 for layer in range(repetition.depth)), len(nodes)]
        stretches = [nodes[start:end] for start, end in itertools.pairwise(ends)]
        for layer, stretch in enumerate(stretches):
            strangers = {_layer_of(node, inside) for node in stretch} - {None, layer}
            if strangers:
                raise NotRepeated(f"operations of layer {layer} are mixed with those of {strangers}")
        targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.kind in _STATE}
        own = {}
        for node in program.graph.find_nodes(op="placeholder"):
            match = inside.fullmatch(targets.get(node.name) or "")
            if match:
                own[node] = (int(match[1]), match[2])
        return cls(
            program=program,
            repetition=repetition,
            stretches=stretches,
            owner={node: index for index, stretch in enumerate(stretches) for node in stretch},
            places=[
                {node: index for index, node in enumerate(node for node in stretch if not _is_size(node))}
                for stretch in stretches
            ],
            own=own,
        )

    def kind(self, layer: int) -> int:
        """The kind of a layer."""
        return self.repetition.kinds[layer]

    def gathered(self, nodes: list[fx.Node]) -> dict[int, int] | None:
        """Of a list of one value per layer, or per layer of some kinds: these kinds and the value's index, else None.

        Raises:
            NotRepeated: when it is another value in one layer than in others of its kind.
        """
        layers = [self.owner.get(node, self.repetition.depth) for node in nodes]
        if len(layers) < 2 or layers[-1] not in self.repetition.compared:
            return None
        kinds = {self.kind(layer) for layer in layers if layer < self.repetition.depth}
        if layers != [layer for layer in range(self.repetition.depth) if self.kind(layer) in kinds]:
            return None
        indices: dict[int, int] = {}
        for layer, node in zip(layers, nodes, strict=True):
            # A node of a layer that is not compared is known by its place in the list only.
            if layer in self.repetition.compared and self.places[layer].get(node) != indices.setdefault(
                self.kind(layer), self.places[layer].get(node, -1)
            ):
                raise NotRepeated(f"{node} is gathered from layer {layer}, but not its like from layers of its kind")
        return indices

    def computed_in(self, node: fx.Node) -> tuple[int, int] | fx.Node:
        """Kind and index of what a compared layer computes; the node itself if it is from elsewhere, or a size."""
        layer = self.owner.get(node, 0)
        if layer in self.repetition.compared and node in self.places[layer]:
            return self.kind(layer), self.places[layer][node]
        return node


def _layer_of(node: fx.Node, inside: re.Pattern[str]) -> int | None:
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    match = inside.fullmatch(next(reversed(stack.values()))[0])
    return int(match[1]) if match else None


def _last(layers: list[int | None], layer: int) -> int:
    if layer not in layers:
        raise NotRepeated(f"layer {layer} does nothing")
    return len(layers) - 1 - layers[::-1].index(layer)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int))


# ---------------------------------------------------------------------------------------------------------------------
# What changes from layer to layer
# ---------------------------------------------------------------------------------------------------------------------


@define
class _Variable:
    """A value that is handed on.

    Attributes:
        given: nodes that are not copied, by layer; of layer 0 also what comes before it.
        renewed: index of the node that renews it in every compared or copied layer, by kind.
    """

    given: dict[int, fx.Node] = Factory(dict)
    renewed: dict[int, int] = Factory(dict)

    def before(self, layer: int, repetition: Repetition) -> tuple[int, int | fx.Node]:
        """Where the value is from when `layer` begins: a layer, and its node or the index of it."""
        for earlier in range(layer - 1, -1, -1):
            if earlier in self.given:
                return earlier, self.given[earlier]
            kind = repetition.kinds[earlier]
            if kind in self.renewed and (earlier >= repetition.depth or earlier in repetition.compared):
                return earlier, self.renewed[kind]
        raise NotRepeated(f"a value that layer {layer} reads is not there yet")


@frozen
class _Learnt:
    """What copying a layer takes.

    Attributes:
        templates: the layer to copy for each kind.
        integers: an argument that counts, as the count's name and what is added to it.
        variables: an argument that is computed elsewhere.
    """

    templates: Mapping[int, int]
    integers: Mapping[Role, tuple[str, int]]
    variables: Mapping[Role, _Variable]


def _learnt(traced: _Traced) -> _Learnt:
    templates = {traced.kind(layer): layer for layer in traced.repetition.compared}
    integers: dict[Role, dict[int, int]] = {}
    references: dict[Role, dict[int, fx.Node]] = {}
    for layer in traced.repetition.compared:
        _compare(traced, layer, templates[traced.kind(layer)], integers, references)
    _read_at_end(traced, references)
    variables = _variables(traced, references)
    for role, seen in references.items():
        _replay(traced, role, variables[role], seen)
    return _Learnt(
        templates,
        {role: _count(traced.repetition, role, seen) for role, seen in integers.items() if len(set(seen.values())) > 1},
        variables,
    )


def _read_at_end(traced: _Traced, references: dict[Role, dict[int, fx.Node]]) -> None:
    """Note what is read from elsewhere after the last layer, but for what is gathered from all."""
    end = traced.repetition.depth
    for index, node in enumerate((*traced.stretches[end], traced.program.graph.output_node())):
        for where, leaf in _leaves(node, skip=lambda nodes: traced.gathered(nodes) is not None):
            if isinstance(leaf, fx.Node) and traced.owner.get(leaf) != end:
                references["end", index, where] = {end: leaf}


def _compare(
    traced: _Traced,
    layer: int,
    template: int,
    integers: dict[Role, dict[int, int]],
    references: dict[Role, dict[int, fx.Node]],
) -> None:
    """Compare a layer with its template, node by node; note its integers and what it reads from elsewhere."""
    kind, nodes = traced.kind(layer), list(traced.places[layer])
    if len(nodes) != len(traced.places[template]):
        raise NotRepeated(f"layers {layer} and {template} have {len(nodes)} and {len(traced.places[template])} nodes")
    for index, (node, like) in enumerate(zip(nodes, traced.places[template], strict=True)):
        found, expected = _leaves(node), _leaves(like)
        alike = _target(traced, node, layer) == _target(traced, like, template) and len(found) == len(expected)
        for (where, leaf), (place, other) in zip(found, expected, strict=alike):
            role = (kind, index, where)
            if isinstance(leaf, fx.Node) and isinstance(other, fx.Node):
                here, there = _within(traced, leaf, layer), _within(traced, other, template)
                alike &= here == there
                if here is None:
                    references.setdefault(role, {})[layer] = leaf
            elif type(leaf) is int and type(other) is int:
                integers.setdefault(role, {})[layer] = leaf
            else:
                alike &= type(leaf) is type(other) and leaf == other
            alike &= where == place
        if not alike:
            raise NotRepeated(f"layers {layer} and {template} differ in {node.format_node()}")


def _target(traced: _Traced, node: fx.Node, layer: int) -> str:
    """A node's operation; a backend may have given each layer's modules operations of their own, named by path."""
    path = re.escape(traced.repetition.path).replace(r"\.", "[._]")
    return re.sub(rf"{path}[._]{layer}(?=[._])", "", str(node.target))


def _within(traced: _Traced, node: fx.Node, layer: int) -> object:
    """How a layer refers to what is its own: an index, or a parameter's name; None for what is not."""
    if node in traced.own:
        if traced.own[node][0] != layer:
            raise NotRepeated(f"layer {layer} reads {node}, which belongs to another layer")
        return traced.own[node][1]
    return traced.places[layer].get(node)


def _variables(traced: _Traced, references: Mapping[Role, Mapping[int, fx.Node]]) -> dict[Role, _Variable]:
    """Arguments and the values that they were seen to have, joined: whatever is read in one place is one variable."""
    parent: dict[object, object] = {}

    def find(item: object) -> object:
        while parent.setdefault(item, item) is not item:
            item = parent[item]
        return item

    for role, seen in references.items():
        for node in seen.values():
            parent[find(traced.computed_in(node))] = find(("role", role))
    variables: dict[object, _Variable] = {}
    for item in list(parent):
        variable = variables.setdefault(id(find(item)), _Variable())
        match item:
            case fx.Node():
                if variable.given.setdefault(traced.owner.get(item, 0), item) is not item:
                    raise NotRepeated(f"{item} is read in places where another value is read as well")
            case ("role", _):
                pass
            case (int(kind), int(index)):
                # What is renewed twice in a layer is handed on as it was last.
                variable.renewed[kind] = max(index, variable.renewed.get(kind, index))
    return {role: variables[id(find(("role", role)))] for role in references}


def _replay(traced: _Traced, role: Role, variable: _Variable, seen: Mapping[int, fx.Node]) -> None:
    """Check that a variable's rule gives what was traced."""
    for layer, node in seen.items():
        earlier, expected = variable.before(layer, traced.repetition)
        if isinstance(expected, int):
            expected = list(traced.places[earlier])[expected]
        if expected is not node:
            raise NotRepeated(f"{role} of layer {layer} is {node}, which is not handed on like others")


def _count(repetition: Repetition, role: Role, seen: Mapping[int, int]) -> tuple[str, int]:
    """The count that an integer follows, and what is added to it."""
    counts = repetition.counts
    matching = {}
    for name in counts[next(iter(seen))]:
        offsets = {value - counts[layer][name] for layer, value in seen.items()}
        if len(offsets) == 1:
            matching[name] = offsets.pop()
    continued = {
        tuple(counts[layer][name] + offset for layer in repetition.copied if repetition.kinds[layer] == role[0])
        for name, offset in matching.items()
    }
    if len(continued) != 1:
        raise NotRepeated(f"{role} takes the values {list(seen.values())}, which no count of the layers explains")
    return next(iter(matching.items()))


# ---------------------------------------------------------------------------------------------------------------------
# The extended program
# ---------------------------------------------------------------------------------------------------------------------


class _Extension:
    """Writes the graph of all layers, first to last."""

    def __init__(self, traced: _Traced, learnt: _Learnt, module: nn.Module, short: TraceSpec, spec: TraceSpec) -> None:
        self._traced, self._learnt, self._module = traced, learnt, module
        before, after = (*short.inputs, *short.states), (*spec.inputs, *spec.states)
        self._shapes = {old.shape: new.shape for old, new in zip(before, after, strict=True) if old.shape != new.shape}
        self._lengthened = {
            str(name): [size for size in new.shape if isinstance(size, int)]  # no dynamic one: the state is fixed
            for name, old, new in zip(traced.program.graph_signature.user_inputs, before, after, strict=True)
            if old.shape != new.shape
        }
        if any(self._shapes[old.shape] != new.shape for old, new in zip(before, after, strict=True) if old != new):
            raise NotRepeated("states that differ in the number of their slots are of one shape in the first layers")
        self._layers = len(traced.repetition.kinds)
        self._graph = fx.Graph()
        self._new: dict[fx.Node, fx.Node] = {}  # what was traced, in the new graph
        self._own: dict[tuple[int, str], fx.Node] = {}  # parameters of layers
        self._made: list[list[fx.Node]] = [[] for _ in range(self._layers)]  # what each layer computes

    def program(self) -> ExportedProgram:
        """The extended program, checked."""
        traced = self._traced
        specs = self._placeholders()
        for layer, stretch in enumerate(traced.stretches[:-1]):
            for node in stretch:
                self._new[node] = self._copy(node, self._same)
            self._made[layer] = [self._new[node] for node in traced.places[layer]]
        for layer in traced.repetition.copied:
            self._copy_layer(layer)
        output = traced.program.graph.output_node()
        for index, node in enumerate((*traced.stretches[-1], output)):
            self._new[node] = self._copy(node, functools.partial(self._at_end, index))
        return self._assembled(specs, [leaf for _, leaf in _leaves(self._new[output])])

    # Inputs ----------------------------------------------------------------------------------------------------------

    def _placeholders(self) -> list[InputSpec]:
        """Inputs of the new graph: the traced ones, and behind the last layer's parameters those of the copied."""
        traced, specs = self._traced, []
        nodes = {node.name: node for node in traced.program.graph.find_nodes(op="placeholder")}
        old = traced.program.graph_signature.input_specs
        last = {spec.kind: index for index, spec in enumerate(old) if nodes[spec.arg.name] in traced.own}
        by_layer: dict[tuple[int, InputKind], list[InputSpec]] = {}
        for index, spec in enumerate(old):
            node = nodes[spec.arg.name]
            self._new[node], made = self._input(node, spec, node.name, spec.target)
            specs.append(made)
            if node in traced.own:
                by_layer.setdefault((traced.own[node][0], spec.kind), []).append(spec)
                self._own[traced.own[node]] = self._new[node]
            if last.get(spec.kind) == index:
                for layer in traced.repetition.copied:
                    template = self._learnt.templates[traced.repetition.kinds[layer]]
                    likes = by_layer.get((template, spec.kind), [])
                    specs += [self._own_input(nodes[like.arg.name], like, layer) for like in likes]
        return specs

    def _own_input(self, like: fx.Node, spec: InputSpec, layer: int) -> InputSpec:
        """A parameter of a copied layer."""
        path, (template, name) = self._traced.repetition.path, self._traced.own[like]
        flat = path.replace(".", "_")
        called = re.sub(rf"{re.escape(flat)}_{template}_", f"{flat}_{layer}_", like.name, count=1, flags=re.IGNORECASE)
        placeholder, made = self._input(like, spec, called, f"{path}.{layer}.{name}")
        self._own[layer, name] = placeholder
        return made

    def _input(self, like: fx.Node, spec: InputSpec, name: str, target: str | None) -> tuple[fx.Node, InputSpec]:
        """A placeholder like another one, and what it stands for."""
        placeholder = self._graph.placeholder(name)
        placeholder.meta = dict(like.meta)
        if placeholder.name != name:
            raise NotRepeated(f"there are two inputs called {name}")
        if name in self._lengthened:
            value = placeholder.meta["val"]
            with value.fake_mode:
                placeholder.meta["val"] = torch.empty(self._lengthened[name], dtype=value.dtype, device=value.device)
        return placeholder, dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=name), target=target)

    # Operations ------------------------------------------------------------------------------------------------------

    def _same(self, _where: Where, leaf: Any) -> Any:
        """An argument of a traced layer."""
        return self._new[leaf] if isinstance(leaf, fx.Node) else _kept(leaf)

    def _copy_layer(self, layer: int) -> None:
        traced, learnt = self._traced, self._learnt
        kind = traced.repetition.kinds[layer]
        template = learnt.templates[kind]
        for node, index in traced.places[template].items():

            def argument(where: Where, leaf: Any, index: int = index) -> Any:
                role = (kind, index, where)
                if role in learnt.integers:
                    count, offset = learnt.integers[role]
                    return traced.repetition.counts[layer][count] + offset
                if not isinstance(leaf, fx.Node):
                    return _kept(leaf)
                if leaf in traced.own:
                    return self._own[layer, traced.own[leaf][1]]
                if leaf in traced.places[template]:
                    return self._made[layer][traced.places[template][leaf]]
                return self._current(learnt.variables[role], layer)

            self._made[layer].append(self._copy(node, argument))

    def _current(self, variable: _Variable, layer: int) -> fx.Node:
        """What a variable is when `layer` begins."""
        earlier, value = variable.before(layer, self._traced.repetition)
        return self._made[earlier][value] if isinstance(value, int) else self._new[value]

    def _at_end(self, index: int, where: Where, leaf: Any) -> Any:
        """An argument of what follows the layers."""
        if isinstance(leaf, list):
            return self._gathered(leaf)
        if not isinstance(leaf, fx.Node):
            return leaf
        variable = self._learnt.variables.get(("end", index, where))
        return self._new[leaf] if variable is None else self._current(variable, self._layers)

    def _gathered(self, nodes: list[fx.Node]) -> list[fx.Node] | None:
        """A list of one value per layer, of all layers or all of some kinds, continued; None for any other list."""
        traced = self._traced
        indices = traced.gathered(nodes)
        if indices is None:
            return None
        copied = [layer for layer in traced.repetition.copied if traced.kind(layer) in indices]
        return [
            *(self._new[node] for node in nodes),
            *(self._made[layer][indices[traced.kind(layer)]] for layer in copied),
        ]

    def _copy(self, node: fx.Node, argument: Callable[[Where, Any], Any]) -> fx.Node:
        """A node with other arguments, and the value that it then has."""
        reshaped = False

        def mapped(where: Where, leaf: Any) -> Any:
            nonlocal reshaped
            new = argument(where, leaf)
            if isinstance(new, fx.Node) and new.meta.get("val") is not leaf.meta.get("val"):
                reshaped = True
            elif isinstance(new, list):
                reshaped |= len(new) != len(leaf)
            return new

        args, kwargs = _mapped((node.args, node.kwargs), mapped)
        reshaped &= node.op != "output"
        if reshaped:
            args = tuple(self._resized(value) for value in args)
        copy = self._graph.create_node(node.op, node.target, args, kwargs, name=node.name, type_expr=node.type)
        copy.meta = dict(node.meta)
        if reshaped:
            value = _evaluated(copy)
            if _shape(value) != _shape(node.meta.get("val")):  # the same object otherwise, which is quick to compare
                copy.meta["val"] = value
        return copy

    def _resized(self, value: Any) -> Any:
        """The sizes of a state, where those of the short one were traced."""
        if isinstance(value, (list, tuple)) and all(type(size) is int for size in value):
            return type(value)(self._shapes.get(tuple(value), value))
        return value

    # Result ----------------------------------------------------------------------------------------------------------

    def _assembled(self, specs: list[InputSpec], results: list[fx.Node]) -> ExportedProgram:
        program = self._traced.program
        outputs = []
        for spec, node in zip(program.graph_signature.output_specs, results, strict=True):
            outputs.append(dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=node.name)))
        self._check(specs, results)
        unsaved = {spec.target for spec in specs if spec.kind is InputKind.BUFFER and not spec.persistent}
        buffers = {name: buffer for name, buffer in self._module.named_buffers() if name in unsaved}
        return ExportedProgram(
            root=program.graph_module,
            graph=self._graph,
            graph_signature=ExportGraphSignature(specs, outputs),
            state_dict=self._module.state_dict(keep_vars=True),
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            constants={**program.constants, **buffers},
            verifiers=program.verifiers,
        )

    def _check(self, specs: list[InputSpec], results: list[fx.Node]) -> None:
        """Compare what was written with what the traced program and the module say there should be."""
        for kind, tensors in (
            (InputKind.PARAMETER, self._module.named_parameters(remove_duplicate=False)),
            (InputKind.BUFFER, self._module.named_buffers(remove_duplicate=False)),
        ):
            wanted, found = {name for name, _ in tensors}, {spec.target for spec in specs if spec.kind is kind}
            if wanted != found:
                raise NotRepeated(
                    f"{sorted(map(str, wanted ^ found))[:3]} are not both in the module and in the program"
                )
        for layer in self._traced.repetition.copied:
            template = self._made[self._learnt.templates[self._traced.repetition.kinds[layer]]]
            for node, like in zip(self._made[layer], template, strict=True):
                if bool(node.users) != bool(like.users):
                    raise NotRepeated(f"{node} of layer {layer} is not used as {like} is")
        inputs = {node.name: node for node in self._graph.find_nodes(op="placeholder")}
        signature = self._traced.program.graph_signature
        for node, spec in zip(results, signature.output_specs, strict=True):
            if spec.target in inputs and _shape(node.meta["val"]) != _shape(inputs[spec.target].meta["val"]):
                raise NotRepeated(f"state {spec.target} is written with another shape")


def _kept(leaf: Any) -> Any:
    """A leaf as it is; lists are not answered for as a whole."""
    return None if isinstance(leaf, list) else leaf


def _shape(value: Any) -> str:
    """Shape and dtype; as text, because comparing symbolic sizes would be taken for a condition on them."""
    if isinstance(value, (list, tuple)):
        return str([_shape(item) for item in value])
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


def _evaluated(node: fx.Node) -> Any:
    """The value of a node, from its arguments' values."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    values: list[Any] = [argument.meta["val"] for argument in node.all_input_nodes]
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    try:
        with mode, torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]  # call_function
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise NotRepeated(f"{node.format_node()} does not fit all layers: {error}") from error
