"""Planning: from a weight map, the decoder's parameters and a checkpoint's tensors to what is read, how, and into what.

A plan is made from names, shapes and dtypes alone, before any weight is read, and it is complete: every checkpoint
tensor is used or dropped with a reason, every row of every parameter is filled exactly once, every width fits its
block. Whatever does not fit is reported at once, in one error.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from attrs import define, evolve, field, frozen

from coreai_zoo.checkpoint.headers import TensorInfo
from coreai_zoo.checkpoint.originals import NotOriginal
from coreai_zoo.errors import BadInput, did_you_mean, listing
from coreai_zoo.overlay import Drop, ParameterInfo, Part, Role, RoleKind, Transform, WeightMap, WeightRule
from coreai_zoo.recipes import KINDS, QuantizationSpec, Recipe, Rule, layer_of
from coreai_zoo.weights.formats import Format
from coreai_zoo.weights.names import Names, Spelling, notes_on

FLOATS = ("bfloat16", "float16", "float32", "float64")


@frozen
class Source:
    """A checkpoint tensor that fills rows `start` to `stop` of its target.

    Attributes:
        key: of the tensor.
        start: first row of the target seen as a matrix (see `TensorInfo.rows`).
        stop: one past the last row.
    """

    key: str
    start: int
    stop: int


@frozen
class PlannedTensor:
    """One parameter of the decoder: where its values come from and how they are stored.

    Attributes:
        name: of the parameter.
        role: name of its role.
        shape: of the parameter.
        dtype: of the parameter, and of its scales when it is quantized.
        quantization: how it is stored, or None for plain values.
        transform: change of values on the way, or None.
        sources: what fills it, in the order of its rows, without gap or overlap; none while there is no checkpoint.
        stored_as: name of the parameter under which its bytes are stored: its own, or that of an earlier one which has
            the same values in the same format, as the embedding table of a tied head.
        read_transposed: see `Format.read_transposed`.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    quantization: QuantizationSpec | None
    transform: Transform | None
    sources: tuple[Source, ...]
    stored_as: str = field()
    read_transposed: bool = False

    @stored_as.default
    def _by_itself(self) -> str:
        return self.name

    @property
    def is_stored(self) -> bool:
        """Whether it has bytes of its own."""
        return self.stored_as == self.name

    @cached_property
    def format(self) -> Format:
        """How it lies in memory."""
        return Format(self.shape, self.dtype, self.quantization, self.read_transposed)

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@frozen
class RoleTotal:
    """What the tensors of one role take.

    Attributes:
        tensors: how many there are.
        parameters: number of elements of those that have bytes of their own.
        bytes: what these take.
        stored_with: the role whose bytes the others share; None where all have their own.
    """

    tensors: int
    parameters: int
    bytes: int
    stored_with: str | None


@frozen
class WeightPlan:
    """Every parameter of a decoder, in the decoder's order, and every checkpoint tensor that is left out.

    Attributes:
        tensors: the parameters.
        dropped: (key, reason) of what is left out.
        roles: what its tensors do, by name, in the order in which reports name them.
        respelled: keys that are not written as a released checkpoint has them, each as the rules have it.
        notes: what a build notes about the names, one phrase each.
    """

    tensors: tuple[PlannedTensor, ...]
    dropped: tuple[tuple[str, str], ...]
    roles: Mapping[str, Role] = field(factory=dict)
    respelled: Mapping[str, str] = field(factory=dict)
    notes: tuple[str, ...] = ()

    def of_kind(self, kind: RoleKind) -> tuple[PlannedTensor, ...]:
        """The tensors whose role is of a kind."""
        return tuple(tensor for tensor in self.tensors if self.roles[tensor.role].kind == kind)

    def by_role(self) -> Mapping[str, tuple[PlannedTensor, ...]]:
        """The tensors of each role that there is, in the order of `roles`."""
        members: dict[str, list[PlannedTensor]] = {}
        for tensor in self.tensors:
            members.setdefault(tensor.role, []).append(tensor)
        return {name: tuple(members[name]) for name in (*self.roles, *members) if name in members}

    def stored_as(self) -> Mapping[str, tuple[QuantizationSpec | None, ...]]:
        """How the tensors of each role of `by_role` are quantized, None for plain values: each way once, in order."""
        return {
            role: tuple(dict.fromkeys(tensor.quantization for tensor in tensors))
            for role, tensors in self.by_role().items()
        }

    def totals(self) -> Mapping[str, RoleTotal]:
        """What each role of `by_role` takes."""
        role_of = {tensor.name: tensor.role for tensor in self.tensors}
        totals = {}
        for role, tensors in self.by_role().items():
            stored = [tensor for tensor in tensors if tensor.is_stored]
            others = (role_of[tensor.stored_as] for tensor in tensors if not tensor.is_stored)
            parameters = sum(tensor.parameters for tensor in stored)
            size = sum(tensor.format.bytes for tensor in stored)
            totals[role] = RoleTotal(len(tensors), parameters, size, next(others, None))
        return totals

    @cached_property
    def stored(self) -> tuple[PlannedTensor, ...]:
        """The tensors that have bytes of their own."""
        return tuple(tensor for tensor in self.tensors if tensor.is_stored)

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors, those that share their bytes counted once."""
        return sum(tensor.parameters for tensor in self.stored)

    @property
    def quantizations(self) -> frozenset[QuantizationSpec]:
        """Every way in which a tensor is quantized."""
        return frozenset(tensor.quantization for tensor in self.tensors if tensor.quantization is not None)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the weight store."""
        return sum(tensor.format.bytes for tensor in self.stored)


# ---------------------------------------------------------------------------------------------------------------------
# Patterns
# ---------------------------------------------------------------------------------------------------------------------

# A whole part between dots: the digit of `conv1d` is a letter like the others.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])", re.ASCII)
_NUMBER_OR_PLACEHOLDER = re.compile(r"(?<![^.])(?:\{([A-Za-z_]\w*)\}|(\d+))(?![^.])", re.ASCII)
_HOLE = "{}"


def _holes(name: str) -> tuple[str, list[str]]:
    """A name with each number replaced by `_HOLE`, and the numbers."""
    return _NUMBER.sub(_HOLE, name), _NUMBER.findall(name)


@frozen
class _Pattern:
    """A dotted name in which a part `{name}` stands for one number; other numbers stand for themselves.

    Attributes:
        text: as written.
        template: the text with every number and placeholder replaced by a hole: names that can match share it, so that
            patterns are found by a dictionary instead of tried one by one.
        slots: per hole, the placeholder's name or the literal number.
    """

    text: str
    template: str
    slots: tuple[tuple[str | None, str], ...]

    @classmethod
    def parse(cls, text: str) -> _Pattern:
        """Parse a pattern.

        Raises:
            ValueError: when a brace is not part of a placeholder between dots.
        """
        if set("{}") & set(_NUMBER_OR_PLACEHOLDER.sub("", text)):
            raise ValueError(f"in the weight rule pattern {text!r}, a placeholder is not a whole part between dots")
        slots = tuple((match[1], match[2]) for match in _NUMBER_OR_PLACEHOLDER.finditer(text))
        return cls(text, _NUMBER_OR_PLACEHOLDER.sub(_HOLE, text), slots)

    def match(self, numbers: list[str]) -> dict[str, str] | None:
        """The placeholders' values for the numbers of a name with the same template, or None."""
        values: dict[str, str] = {}
        for (name, literal), number in zip(self.slots, numbers, strict=True):
            if name is None:
                if number != literal:
                    return None
            # Numbers are written without leading zeros, so that one index has one spelling.
            elif values.setdefault(name, number) != number or (number[0] == "0" and number != "0"):
                return None
        return values

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with placeholders replaced by `values`; those without a value stay."""
        return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), self.text)


@frozen
class _Rule:
    """A `WeightRule` with its patterns parsed."""

    rule: WeightRule
    source: _Pattern
    target: _Pattern

    @classmethod
    def parse(cls, rule: WeightRule) -> _Rule:
        parsed = cls(rule, _Pattern.parse(rule.source), _Pattern.parse(rule.target))
        ours = {name for name, _ in parsed.source.slots if name}
        needed = {name for name, _ in parsed.target.slots if name} | ({rule.part.index} if rule.part else set())
        if not needed <= ours:
            raise ValueError(f"weight rule {rule.source!r} -> {rule.target!r} has no {{{'}, {'.join(needed - ours)}}}")
        return parsed


# ---------------------------------------------------------------------------------------------------------------------
# Matching one target
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class _Match:
    """A checkpoint tensor that a rule sends to a target."""

    rule: WeightRule
    key: str
    values: Mapping[str, str]


def _slab(rule: WeightRule, shape: tuple[int, ...], values: Mapping[str, str]) -> tuple[range, tuple[int, ...]]:
    """The rows of a target that a rule fills and the shape of the tensor that fills them.

    Returns:
        The rows, empty when the index is beyond the target's axis 0, and the expected shape.
    """
    if rule.part is None:
        rows, expected = range(math.prod(shape[:-1])), shape
    else:
        rows, expected = _part_slab(rule, rule.part, shape, values)
    if rule.source_shape is not None:
        stored = rule.source_shape(expected)
        if math.prod(stored[:-1]) != math.prod(expected[:-1]) or stored[-1:] != expected[-1:]:
            raise ValueError(f"weight rule {rule.source!r}: source_shape turns {expected} into {stored}, other rows")
        expected = tuple(stored)
    return rows, expected


def _part_slab(
    rule: WeightRule, part: Part, shape: tuple[int, ...], values: Mapping[str, str]
) -> tuple[range, tuple[int, ...]]:
    if len(shape) != 3 or not 0 <= part.piece < part.pieces or shape[1] % part.pieces:
        raise ValueError(f"weight rule {rule.source!r}: {part} does not divide a target of shape {shape}")
    height, index = shape[1] // part.pieces, int(values[part.index])
    start = index * shape[1] + part.piece * height
    return range(start, start + height if index < shape[0] else start), (height, shape[2])


@define
class _Target:
    """A parameter while its sources are collected."""

    name: str
    info: ParameterInfo
    matches: list[_Match] = field(factory=list)


@define
class _Problems:
    """What is wrong, by kind, in the order in which it is reported."""

    missing: list[str] = field(factory=list)
    unknown: list[str] = field(factory=list)
    misshapen: list[str] = field(factory=list)
    doubled: list[str] = field(factory=list)
    dtypes: list[str] = field(factory=list)
    blocks: list[str] = field(factory=list)
    per_channel: list[str] = field(factory=list)
    undecided: list[str] = field(factory=list)
    idle: list[str] = field(factory=list)
    is_mlx: bool = False
    has_no_head: bool = False

    def raise_if_any(self) -> None:
        of_recipe = {
            "not divisible by the recipe's block": self.blocks,
            "a head with one scale per row, which gives garbage on the GPU delegate": self.per_channel,
            "decided by no rule of the recipe": self.undecided,
            "rules that decide no weight": self.idle,
        }
        kinds = {
            "missing": self.missing,
            "unknown to the weight map": self.unknown,
            "misshapen": self.misshapen,
            "filled twice": self.doubled,
            "not floating point": self.dtypes,
            **of_recipe,
        }
        found = {title: items for title, items in kinds.items() if items}
        if not found:
            return
        count = sum(map(len, found.values()))
        text = "; ".join(f"{title}: {listing(_grouped(items), 20)}" for title, items in found.items())
        if self.is_mlx:
            raise NotOriginal(
                "The checkpoint was converted for MLX, which stores convolutions with their last axes exchanged. "
                f"{text}."
            )
        subject = "recipe" if found.keys() <= of_recipe.keys() else "checkpoint"  # there may be none
        raise BadInput(
            f"The {subject} does not fit the model ({count} problem{'s' if count > 1 else ''}). {text}.", self._hint()
        )

    def _hint(self) -> str:
        if self.has_no_head and len(self.missing) == 1 and not self.unknown:
            return (
                "If its head is to be its embedding table, config.json has to say so: tie_word_embeddings, where the "
                "class in `architectures` looks for it (of a wrapper beside text_config). Else it is not complete."
            )
        if self.missing or self.unknown:
            return "Check that it is a checkpoint of this architecture, complete and original."
        if self.misshapen or self.doubled or self.dtypes:
            return "Use the original checkpoint."
        if self.undecided or self.idle:
            return "`zoo show` names the roles of a model; docs/recipes.md says how rules match."
        if self.per_channel:
            return "Use a block size of 32."
        return "Choose a recipe with blocks that divide them, or one that leaves these roles alone."


_ALIKE = 3  # fewer are named one by one


def _grouped(items: list[str]) -> list[str]:
    """Problems that are told apart by numbers in names only, such as a layer's, as one with their count."""
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", item), []).append(item)
    return [
        text
        for pattern, alike in groups.items()
        for text in ([f"{len(alike)} x {pattern}"] if len(alike) >= _ALIKE else alike)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


class _Planner:
    """Collects what fills each parameter and how it is stored, and everything that is wrong on the way."""

    def __init__(
        self,
        weight_map: WeightMap,
        parameters: Mapping[str, ParameterInfo],
        tensors: Mapping[str, TensorInfo | None],
        recipe: Recipe,
        layers: int | None,
    ) -> None:
        self.tensors = tensors
        self.recipe = recipe
        self.built = 1 + max((layer for name in parameters if (layer := layer_of(name)) is not None), default=-1)
        self.layers = layers or self.built
        self._applied: set[int] = set()  # by identity: two rules may be equal, and the second decides nothing
        self.targets = {name: _Target(name, info) for name, info in parameters.items()}
        self.problems = _Problems()
        self.dropped: list[tuple[str, Drop]] = []
        self._rules = [_Rule.parse(rule) for rule in weight_map.rules]
        self._by_source: dict[str, list[_Rule]] = {}
        self._by_target: dict[str, list[_Rule]] = {}
        for rule in self._rules:
            self._by_source.setdefault(rule.source.template, []).append(rule)
            self._by_target.setdefault(rule.target.template, []).append(rule)
        self.spellings: dict[str, Spelling] = {}
        self._names = Names(weight_map)
        self.roles = {role.name: role for role in weight_map.roles}

    # -- keys to targets

    def place_keys(self) -> None:
        """Give every checkpoint key to its targets, or drop it, or report it."""
        for key in self.tensors:
            placed = next((found for found in self._names.spellings(key) if self._place(key, found.text)), None)
            if placed is not None:
                self.spellings[key] = placed
            elif (drop := self._names.drop_of(key)) is not None:
                self.dropped.append((key, drop))
            else:
                self.problems.unknown.append(key)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a build notes about the names."""
        noted = Counter(drop.reason for _, drop in self.dropped if drop.noted)
        left_out = (f"{count} tensor{'s' * (count > 1)} left out: {reason}" for reason, count in noted.items())
        return (*notes_on(self.spellings.values()), *left_out)

    def _place(self, key: str, spelling: str) -> bool:
        """Hand `key` to every parameter that a rule sends it to; whether there was one."""
        template, numbers = _holes(spelling)
        placed = False
        for rule in self._by_source.get(template, ()):
            values = rule.source.match(numbers)
            target = None if values is None else self.targets.get(rule.target.fill(values))
            if values is None or target is None:
                continue
            rows, _ = _slab(rule.rule, target.info.shape, values)
            if rows or rule.rule.part is None:
                target.matches.append(_Match(rule.rule, key, values))
                placed = True
        return placed

    def drop_fallbacks(self) -> None:
        """Let go of sources that only stand in for others, where the others are there."""
        for target in self.targets.values():
            first = [match for match in target.matches if not match.rule.fallback]
            target.matches = first or target.matches

    # -- one target

    def plan(self, target: _Target) -> PlannedTensor | None:
        """The plan of one parameter, or None when something is wrong with it."""
        sources = self._sources(target)
        if not target.matches:
            return None
        rule = target.matches[0].rule
        said = {(match.rule.role, match.rule.transform, match.rule.read_transposed) for match in target.matches}
        if len(said) > 1:
            raise ValueError(f"the weight rules that fill {target.name} differ in role, transform or read_transposed")
        return self._planned(target, rule, sources)

    def plan_without_sources(self, target: _Target) -> PlannedTensor:
        """The plan of one parameter while there is no checkpoint."""
        rules = [rule.rule for rule, _ in self._rules_for(target)]
        if not rules:
            raise ValueError(f"no weight rule fills {target.name}")
        return self._planned(target, rules[0], ())

    def assumed_keys(self) -> Iterator[str]:
        """The key that fills each parameter in a checkpoint that stores values once: one of an earlier parameter's
        where that stands in for its own, else its own.
        """
        taken: set[str] = set()
        for target in self.targets.values():
            rules = sorted(self._rules_for(target), key=lambda found: found[0].rule.fallback)
            keys = [rule.source.fill(values) for rule, values in rules]
            key = next((key for key in keys if key in taken), keys[0])
            taken.add(key)
            yield key

    def _planned(self, target: _Target, rule: WeightRule, sources: tuple[Source, ...]) -> PlannedTensor:
        spec = self._spec(target.name, self.roles[rule.role])
        planned = PlannedTensor(
            target.name,
            rule.role,
            target.info.shape,
            target.info.dtype,
            spec,
            rule.transform,
            sources,
            read_transposed=rule.read_transposed,
        )
        try:
            _ = planned.format
        except ValueError as error:
            self.problems.blocks.append(f"{target.name} ({rule.role}, {spec}: {error})")
        return planned

    # -- the recipe

    def _spec(self, name: str, role: Role) -> QuantizationSpec | None:
        """How the recipe stores a parameter."""
        rule = self.recipe.rule_for(name, role, self.layers)
        if rule is None:
            self.problems.undecided.append(f"{name} ({role.name})")
            return None
        self._applied.add(id(rule))
        spec = self.recipe.spec_of(rule)
        if role.kind == "head" and spec is not None and spec.block_size is None:
            self.problems.per_channel.append(f"{name} ({spec})")
        return spec

    def find_idle_rules(self) -> None:
        """Report the rules that decided nothing, but for those that speak of kinds of weights a model may lack.

        Of a slice, the layers and parameters that a rule is for may be among those that are left out.
        """
        for number, rule in enumerate(self.recipe.rules, 1):
            unknown = [role for role in rule.roles if role not in self.roles and role not in KINDS]
            if unknown:
                near = did_you_mean(unknown[0], self.roles)
                self.problems.idle.append(f"rule {number} names {listing(unknown)}, no role of this model ({near})")
                continue
            of_slice = self.built < self.layers and (rule.layers is not None or rule.parameters)
            if id(rule) not in self._applied and not rule.is_general and not of_slice:
                self.problems.idle.append(f"rule {number} ({rule}{self._of_layers(rule)})")

    def _of_layers(self, rule: Rule) -> str:
        return "" if rule.layers is None else f" of {self.layers}"

    def _sources(self, target: _Target) -> tuple[Source, ...]:
        sources = []
        for match in target.matches:
            rows, expected = _slab(match.rule, target.info.shape, match.values)
            info = self.tensors[match.key]
            if info is not None and info.shape != expected:
                self.problems.misshapen.append(
                    f"{match.key} is {_shape(info.shape)}, expected {_shape(expected)} for {target.name}"
                )
                self.problems.is_mlx = self.problems.is_mlx or _is_mlx_convolution(info.shape, expected)
            if info is not None and info.dtype not in FLOATS:
                self.problems.dtypes.append(f"{match.key} ({info.dtype})")
            sources.append(Source(match.key, rows.start, rows.stop))
        sources.sort(key=lambda source: (source.start, source.stop, source.key))
        self._check_cover(target, sources)
        return tuple(sources)

    def _check_cover(self, target: _Target, sources: list[Source]) -> None:
        """Report rows that are filled twice or not at all."""
        end, before, gap = 0, "", False
        for source in sources:
            if source.start < end:
                self.problems.doubled.append(f"{target.name} by {before} and {source.key}")
            gap = gap or source.start > end
            if source.stop >= end:
                end, before = source.stop, source.key
        if not sources:
            self.problems.missing.append(self._expectation(target))
            roles = {self.roles[rule.rule.role].kind for rule, _ in self._rules_for(target)}
            self.problems.has_no_head |= "head" in roles
        elif gap or end < math.prod(target.info.shape[:-1]):
            self.problems.missing.append(f"part of {target.name}: {listing(self._missing_parts(target, sources), 6)}")

    def _rules_for(self, target: _Target) -> list[tuple[_Rule, dict[str, str]]]:
        template, numbers = _holes(target.name)
        rules = self._by_target.get(template, ())
        return [(rule, values) for rule in rules if (values := rule.target.match(numbers)) is not None]

    def _expectation(self, target: _Target) -> str:
        keys = [rule.source.fill(values) for rule, values in self._rules_for(target)]
        if not keys:
            return f"{target.name} (no weight rule fills it)"
        return keys[0] if keys == [target.name] else f"{' or '.join(keys)} for {target.name}"

    def _missing_parts(self, target: _Target, sources: list[Source]) -> list[str]:
        """Keys of the parts that are absent, of the layout that the checkpoint began."""
        present = {(source.start, source.stop) for source in sources}
        begun = {match.rule.source for match in target.matches}
        families = {match.rule.part.index for match in target.matches if match.rule.part}
        missing = []
        for rule, values in self._rules_for(target):
            part = rule.rule.part
            if part is None or (rule.rule.source not in begun and part.index not in families):
                continue
            for index in range(target.info.shape[0]):
                filled = {**values, part.index: str(index)}
                rows, _ = _slab(rule.rule, target.info.shape, filled)
                if (rows.start, rows.stop) not in present:
                    missing.append((rows.start, rule.source.fill(filled)))
        return [key for _, key in sorted(missing)]


def _is_mlx_convolution(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a depthwise convolution [C, 1, K] is stored as [C, K, 1]."""
    return len(expected) == 3 and expected[1] == 1 != expected[2] and found == (expected[0], expected[2], expected[1])


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def plan_weights(
    weight_map: WeightMap,
    parameters: Mapping[str, ParameterInfo],
    tensors: Mapping[str, TensorInfo | None],
    recipe: Recipe,
    layers: int | None = None,
) -> WeightPlan:
    """Decide what fills each parameter of a decoder and how it is stored.

    Where the table holds alternatives for one parameter (experts packed in one tensor, or one by one), those whose keys
    the checkpoint has are used.

    Args:
        weight_map: the overlay's table.
        parameters: the decoder's parameters, in its order.
        tensors: what the checkpoint holds; None for a tensor of which an index tells the name alone.
        recipe: how each parameter is stored.
        layers: of the whole model, where the decoder is a slice of it.

    Raises:
        BadInput: listing at once every missing, unknown, misshapen, doubled or ill-typed key, every width that its
            block does not divide, every parameter that no rule of the recipe decides and every rule that decides none.
        ValueError: when the table itself is wrong.
    """
    planner = _Planner(weight_map, parameters, tensors, recipe, layers)
    planner.place_keys()
    planner.drop_fallbacks()
    planned = [planner.plan(target) for target in planner.targets.values()]
    if None not in planned:  # else a rule may be for what is missing
        planner.find_idle_rules()
    planner.problems.raise_if_any()
    found = _stored_once((tensor, tensor.sources) for tensor in planned if tensor is not None)
    dropped = tuple((key, drop.reason) for key, drop in planner.dropped)
    respelled = {key: spelling.text for key, spelling in planner.spellings.items() if spelling.notes}
    return WeightPlan(found, dropped, planner.roles, respelled, planner.notes)


def _stored_once(tensors: Iterable[tuple[PlannedTensor, object]]) -> tuple[PlannedTensor, ...]:
    """The tensors, each of which shares the bytes of the first one with the same values in the same format.

    Args:
        tensors: each with what fills it.
    """
    first: dict[object, str] = {}
    return tuple(
        evolve(tensor, stored_as=first.setdefault((filled_by, tensor.transform, tensor.format), tensor.name))
        for tensor, filled_by in tensors
    )


def active_share(role: Role, facts: Mapping[str, Any]) -> float | None:
    """The share of a role's weights that one token is multiplied by: of the experts, those that its router chooses.

    None when there are experts and `facts` does not say how many are chosen.
    """
    if not role.routed:
        return 1.0
    experts, chosen = facts.get("experts"), facts.get("experts_per_token")
    return float(chosen / experts) if experts and chosen else None


def plan_without_checkpoint(
    weight_map: WeightMap, parameters: Mapping[str, ParameterInfo], recipe: Recipe, layers: int | None = None
) -> WeightPlan:
    """A plan without sources: how each parameter of a decoder will be stored, when no checkpoint is at hand.

    Args:
        weight_map: the overlay's table.
        parameters: the decoder's parameters.
        recipe: how each parameter is stored.
        layers: of the whole model, where the decoder is a slice of it.

    Raises:
        BadInput: listing all that is wrong with the recipe, as `plan_weights` does.
        ValueError: when the table fills a parameter by no rule.
    """
    planner = _Planner(weight_map, parameters, {}, recipe, layers)
    planned = [planner.plan_without_sources(target) for target in planner.targets.values()]
    planner.find_idle_rules()
    planner.problems.raise_if_any()
    return WeightPlan(_stored_once(zip(planned, planner.assumed_keys(), strict=True)), (), planner.roles)
