"""Layers that repeat are traced a few times and copied, so that the time of a trace does not grow with depth.

A decoder is a list of layers of few kinds. `find_repetition` tells the kinds apart by everything that their modules
hold: classes, shapes and dtypes of parameters, attributes. Only an integer that counts up from layer to layer, such as
the layer's place in a state, may differ. `shortened` cuts the list to the first few layers; `extension.extend` makes of
the program that is traced from those the one that all layers would have given.

What cannot be seen from outside is a layer that computes something else because of its count alone, as in
`if self.index % 2`: a decoder whose layers differ says so by a class, or by an attribute that is not a count.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_zoo.composites import Composite
from coreai_zoo.signature import TraceSpec

_POSITION = "position"
_WORTHWHILE = 0.75  # tracing more than this part of the layers saves nothing that is worth the copying


class NotRepeated(Exception):
    """The traced layers are not alike in a way that can be continued; the message says which and where."""


# ---------------------------------------------------------------------------------------------------------------------
# Which layers are alike
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Repetition:
    """A list of layers that repeat.

    Attributes:
        path: path of the `nn.ModuleList`.
        kinds: the kind of each layer, as a number.
        counts: what counts up from layer to layer of a kind: of each layer its position, and attributes by path.
        depth: layers to trace. They hold what has to be compared: every kind that goes on, every pair of kinds that
            follow each other, and the places where two counts part.
    """

    path: str
    kinds: tuple[int, ...]
    counts: tuple[Mapping[str, int], ...]
    depth: int

    @property
    def compared(self) -> tuple[int, ...]:
        """Positions of the traced layers that are alike."""
        return _alike(self.kinds[: self.depth])

    @property
    def copied(self) -> range:
        """Positions of the layers that are not traced."""
        return range(self.depth, len(self.kinds))


def find_repetition(module: nn.Module) -> Repetition | None:
    """The longest list of layers in `module`, if tracing few of them is enough."""
    path, layers = _layers(module)
    described = [_described(layer) for layer in layers]
    kinds, counting = _kinds(described)
    counts = tuple(
        {_POSITION: position} | {name: integers[name] for name in counting[position]}
        for position, (_, integers) in enumerate(described)
    )
    for depth in range(2, int(len(layers) * _WORTHWHILE) + 1):
        if _suffices(depth, kinds, counts):
            return Repetition(path, kinds, counts, depth)
    return None


def layer_kinds(module: nn.Module, path: str) -> tuple[int, ...]:
    """The kind of each layer in a list of layers, as a number, as far as can be told; see `Repetition.kinds`.

    An object of a type that says nothing of its value is not another one for being an object of its own.

    Args:
        module: the decoder.
        path: of the list; without one there, nothing is told.
    """
    layers = dict(module.named_modules()).get(path)
    if not isinstance(layers, nn.ModuleList):
        return ()
    return _kinds([_described(layer, by_identity=False) for layer in layers])[0]


def _layers(module: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The longest list of layers and its path; where there is none, an empty one."""
    lists = [(path, list(child)) for path, child in module.named_modules() if isinstance(child, nn.ModuleList) and path]
    return max(lists, key=lambda found: len(found[1]), default=("", []))


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two decoders are the same to a trace: all that their modules hold, but for the values of parameters."""
    if _described(one) != _described(other):
        return False
    buffers = dict(other.named_buffers(remove_duplicate=False))
    return all(_same_bits(tensor, buffers[name]) for name, tensor in one.named_buffers(remove_duplicate=False))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _described(layer: nn.Module, *, by_identity: bool = True) -> tuple[object, dict[str, int]]:
    """What a layer is, but for its integer attributes, and those by path.

    What it holds under several names is told by the one under which it is met first. Other objects are told by their
    identity, or by their types alone.
    """
    structure: list[object] = []
    integers: dict[str, int] = {}
    first: dict[int, str] = {}
    for path, child in layer.named_modules(remove_duplicate=False):
        # A parametrized module has a class of its own, made on the fly; its bases say what it is.
        classes = type(child).__mro__[1:] if parametrize.is_parametrized(child) else type(child).__mro__
        structure.append((path, first.setdefault(id(child), path), [(base.__qualname__, id(base)) for base in classes]))
        structure += [
            (name, first.setdefault(id(tensor), f"{path}.{name}"), _kept_as(tensor))
            for name, tensor in (
                *child.named_parameters(recurse=False, remove_duplicate=False),
                *child.named_buffers(recurse=False, remove_duplicate=False),
            )
        ]
        for name, value in sorted(attributes_of(child).items()):
            # A composite is called by all layers that are alike, so its numbers are a part of what a layer is.
            counting = not isinstance(value, bool) and not isinstance(child, Composite)
            if isinstance(value, int) and counting:
                integers[f"{path}.{name}" if path else name] = value
            else:
                structure.append((name, _comparable(value, by_identity)))
    return repr(structure), integers


def _kept_as(tensor: Tensor) -> object:
    return type(tensor).__qualname__, tuple(tensor.shape), tensor.stride(), str(tensor.dtype)


def attributes_of(module: nn.Module) -> dict[str, object]:
    """The attributes that an author gave a module, slots included."""
    slots = {name for base in type(module).__mro__ for name in getattr(base, "__slots__", ())}
    held = vars(module) | {name: getattr(module, name) for name in slots if hasattr(module, name)}
    return {name: value for name, value in held.items() if name not in _MODULE_ATTRIBUTES}


# What every module has: its tensors and children are described above, and `training` is off throughout.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {name for name in vars(nn.Module()) if name.endswith("_hooks")}


def _comparable(value: object, by_identity: bool) -> object:
    """A value that two layers agree in, or the identity of an object that they share."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if isinstance(value, (list, tuple)):
        return (type(value).__qualname__, [_comparable(item, by_identity) for item in value])
    if isinstance(value, dict):
        return [(_comparable(key, by_identity), _comparable(item, by_identity)) for key, item in value.items()]
    return (type(value).__qualname__, id(value) if by_identity else None)


def _kinds(
    described: Sequence[tuple[object, Mapping[str, int]]],
) -> tuple[tuple[int, ...], list[tuple[str, ...]]]:
    """The kind of each layer, and the names of its integers that count up; the others are part of what a layer is."""
    groups: dict[object, list[int]] = {}
    for position, (structure, own) in enumerate(described):
        groups.setdefault((structure, tuple(own)), []).append(position)
    integers = [own for _, own in described]
    counting: list[tuple[str, ...]] = [()] * len(described)
    identities: dict[int, object] = {}
    for group, members in groups.items():
        names = tuple(name for name in integers[members[0]] if _counts_up([integers[p][name] for p in members]))
        for position in members:
            counting[position] = names
            identities[position] = (group, [v for name, v in integers[position].items() if name not in names])
    numbers: dict[str, int] = {}
    kinds = tuple(numbers.setdefault(repr(identities[p]), len(numbers)) for p in range(len(described)))
    return kinds, counting


def _counts_up(values: Sequence[int]) -> bool:
    return len(values) > 1 and all(before < after for before, after in itertools.pairwise(values))


def _alike(kinds: Sequence[int]) -> tuple[int, ...]:
    """Positions of the layers that can be expected to be alike: all but the first of each kind.

    That one computes what later ones use again, such as a size, and finds every state as it was given.
    """
    return tuple(position for position, kind in enumerate(kinds) if kind in kinds[:position])


def _suffices(depth: int, kinds: Sequence[int], counts: Sequence[Mapping[str, int]]) -> bool:
    """Whether the first `depth` layers show all that is needed to copy the rest."""
    alike = _alike(kinds)
    compared = [position for position in alike if position < depth]
    followed = {(kinds[at], kinds[at + 1]) for at in compared if at + 1 in compared}
    if not followed.issuperset(itertools.pairwise(kinds[depth - 1 :])):
        return False
    for kind in set(kinds[depth:]):
        members = [position for position in alike if kinds[position] == kind]
        traced = [position for position in members if position < depth]
        if len(traced) < 2:
            return False
        for one, other in itertools.combinations(counts[members[0]], 2):
            gaps = [counts[position][one] - counts[position][other] for position in members]
            if len(set(gaps)) > 1 and len(set(gaps[: len(traced)])) == 1:
                return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Tracing fewer layers
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shortened(module: nn.Module, repetition: Repetition) -> Iterator[None]:
    """Within the block, `module` has only its first layers."""
    layers = module.get_submodule(repetition.path)
    assert isinstance(layers, nn.ModuleList)
    module.set_submodule(repetition.path, nn.ModuleList(list(layers)[: repetition.depth]))
    try:
        yield
    finally:
        module.set_submodule(repetition.path, layers)


def short_signature(spec: TraceSpec, repetition: Repetition) -> TraceSpec:
    """The signature of the shortened decoder.

    A fixed state is written whole, so it has as many slots as the traced layers fill. A cache is written slot by slot
    and keeps all of them, so that every operation on it is traced as it will be.

    Raises:
        NotRepeated: when the slots of a fixed state cannot be told to belong to layers.
    """
    states = []
    for state in spec.states:
        if state.kind == "fixed":
            slots = _traced_slots(state.name, state.shape[0], repetition)
            state = evolve(state, shape=(slots, *state.shape[1:]))  # noqa: PLW2901  # the same state, shorter
        states.append(state)
    return evolve(spec, states=tuple(states))


def _traced_slots(name: str, slots: int | str, repetition: Repetition) -> int:
    """How many of a state's slots belong to traced layers: those of some kinds, as many as there are slots."""
    kinds, candidates = sorted(set(repetition.kinds)), set()
    for size in range(1, len(kinds) + 1):
        for chosen in itertools.combinations(kinds, size):
            if sum(kind in chosen for kind in repetition.kinds) == slots:
                candidates.add(sum(kind in chosen for kind in repetition.kinds[: repetition.depth]))
    if len(candidates) != 1 or 0 in candidates:
        raise NotRepeated(f"the {slots} slots of state {name} do not tell which layers they belong to")
    return candidates.pop()
