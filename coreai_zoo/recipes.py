"""Recipes: which weights are quantized, and how; plain data, without torch.

A recipe is a list of rules in order. The first one that matches a weight decides how it is stored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, get_args

from attrs import asdict, evolve, field, frozen
from attrs.validators import in_, max_len, min_len

from coreai_zoo.errors import BadInput, listing
from coreai_zoo.overlay import Role, RoleKind

# ---------------------------------------------------------------------------------------------------------------------
# Quantization
# ---------------------------------------------------------------------------------------------------------------------


IntegerDtype = Literal["int4", "int6", "int8", "uint4", "uint8"]
Scheme = Literal["symmetric", "symmetric_with_clipping", "asymmetric"]
Scales = Literal["absmax", "mse"]


def _block(_instance: object, _attribute: Any, size: object) -> None:
    if size is not None and (not isinstance(size, int) or size < 2):
        raise ValueError(f"a block has at least 2 inputs, not {size!r}")


@frozen
class QuantizationSpec:
    """How a weight is stored: integers of `dtype` in blocks of `block_size` along the last axis, one scale per block.

    Attributes:
        dtype: `int4`, `int8`, `uint4` or `uint8`; or `int6`, which no runtime has: it is stored as indices of 6 bits
            into a table of the 64 integers.
        scheme: `symmetric` uses the whole integer range; `symmetric_with_clipping` not its lowest signed integer,
            so that both signs have as many; `asymmetric` has a zero point. Names and arithmetic are coreai-opt's.
        block_size: inputs per scale; None for one scale per row ("per channel").
        scales: how a scale is chosen: `absmax` by the largest magnitude of its block, so that nothing is cut off;
            `mse` by the least sum of squared errors of its block, which may cut off the largest a little.
    """

    dtype: IntegerDtype = field(validator=in_(get_args(IntegerDtype)))
    scheme: Scheme = field(validator=in_(get_args(Scheme)))
    block_size: int | None = field(default=32, validator=_block)
    scales: Scales = field(default="absmax", validator=in_(get_args(Scales)))

    def __attrs_post_init__(self) -> None:
        if self.scales == "mse" and (self.scheme == "asymmetric" or self.dtype.startswith("u")):
            raise ValueError("scales by mse are for signed integers without zero points")

    @property
    def bits(self) -> int:
        """Bits per integer: 4, 6 or 8."""
        return int(self.dtype.lstrip("uint"))

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight with its share of a scale in half precision and of a zero point; without scales per row."""
        shared = 16 + (self.bits if self.scheme == "asymmetric" or not self.signed else 0)
        return self.bits + (0 if self.block_size is None else shared / self.block_size)

    @property
    def signed(self) -> bool:
        """Whether the integers are signed."""
        return not self.dtype.startswith("u")

    def __str__(self) -> str:
        blocks = "per channel" if self.block_size is None else f"block {self.block_size}"
        return f"{self.dtype} {blocks} {self.scheme}{'' if self.scales == 'absmax' else f' {self.scales}'}"

    @property
    def record(self) -> dict[str, Any]:
        """It as build.json says it."""
        scales = {} if self.scales == "absmax" else {"scales": self.scales}
        return {"dtype": self.dtype, "scheme": self.scheme, "block": self.block_size, **scales}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> QuantizationSpec:
        """The spec of which `record` is the record.

        Raises:
            KeyError: when a key is missing.
            ValueError: when one has a value that is none.
        """
        return cls(record["dtype"], record["scheme"], record["block"], record.get("scales", "absmax"))


def usual_scheme(dtype: str) -> Scheme:
    """The scheme where none is named: the one that uses the integers best."""
    return "asymmetric" if dtype.startswith("u") else "symmetric_with_clipping"


def recorded_forms(stored: Mapping[str, Any] | list[Any] | None) -> tuple[Mapping[str, Any] | None, ...]:
    """How build.json says that the weights of a role are stored: in one way, or in a list of several."""
    return tuple(stored) if isinstance(stored, list) else (stored,)


def one_or_several(forms: list[Any]) -> Any:
    """The form itself where there is one, else all: what `recorded_forms` undoes."""
    return forms[0] if len(forms) == 1 else forms


def stored_text(specs: Iterable[QuantizationSpec | None]) -> str:
    """How weights are stored, in words, where they are stored in one way or several."""
    return ", ".join("not quantized" if spec is None else str(spec) for spec in specs)


def recorded_text(stored: Mapping[str, Any] | list[Any] | None) -> str:
    """How build.json says that the weights of a role are stored, in words; raises as `QuantizationSpec.of_record`."""
    return stored_text(form if form is None else QuantizationSpec.of_record(form) for form in recorded_forms(stored))


@frozen
class HeadQuantization:
    """How the output projection is quantized when the recipe quantizes the head, and why.

    Attributes:
        spec: the policy.
        reason: in words, for the card and the build record.
    """

    spec: QuantizationSpec
    reason: str = field(validator=[min_len(1), max_len(500)])


# ---------------------------------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------------------------------


KINDS: tuple[str, ...] = get_args(RoleKind)
"""The kinds of roles, which a rule may name in place of a role."""

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])", re.ASCII)


def layer_of(parameter: str) -> int | None:
    """Index of the layer that a parameter belongs to: the first number between dots in its name; None for none."""
    found = _NUMBER.search(parameter)
    return int(found[0]) if found else None


def _in_order(_instance: object, _attribute: Any, layers: tuple[int, int] | None) -> None:
    if layers is not None and (layers[0] < 0) == (layers[1] < 0) and layers[0] > layers[1]:
        raise ValueError(f"layers {list(layers)} end before they begin")


@frozen
class Rule:
    """How the weights are stored that meet all of its conditions; a rule without any is for all weights.

    Attributes:
        spec: how, or None to keep them as the decoder declares them.
        why: the reason, in words.
        roles: names of roles or kinds of roles (see `overlay.Role`), of which a weight has one.
        parameters: shell-style patterns on the parameter's name, of which it matches one.
        layers: first and last layer, from 0; a negative number counts from the end, -1 being the last layer.
        overlay_decides: whether the overlay's policy for the head takes the place of `spec`, where there is one.
    """

    spec: QuantizationSpec | None
    why: str = field(validator=[min_len(1), max_len(500)])
    roles: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    layers: tuple[int, int] | None = field(default=None, validator=_in_order)
    overlay_decides: bool = False

    def __attrs_post_init__(self) -> None:
        if self.overlay_decides and (self.spec is None or self.roles != ("head",)):
            raise ValueError("the overlay decides about a head that is quantized, by a rule for the role head")

    def matches(self, parameter: str, role: Role, layers: int) -> bool:
        """Whether it is for a parameter with this role, in a model with so many layers."""
        if self.roles and not {role.name, role.kind} & set(self.roles):
            return False
        if self.parameters and not any(fnmatchcase(parameter, pattern) for pattern in self.parameters):
            return False
        if self.layers is None:
            return True
        layer = layer_of(parameter)
        first, last = (edge + layers if edge < 0 else edge for edge in self.layers)
        return layer is not None and first <= layer <= last

    @property
    def is_general(self) -> bool:
        """Whether it speaks of kinds of weights alone, or of all: a model may lack them."""
        return not self.parameters and self.layers is None and set(self.roles) <= set(KINDS)

    def __str__(self) -> str:
        conditions = [
            f"role {' or '.join(self.roles)}" if self.roles else "",
            f"parameter {' or '.join(self.parameters)}" if self.parameters else "",
            f"layers {self.layers[0]} to {self.layers[1]}" if self.layers else "",
        ]
        return ", ".join(filter(None, conditions)) or "all weights"


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Recipe:
    """What is quantized and how.

    Attributes:
        name: what a user types.
        description: one sentence for `zoo recipes`.
        rules: in order; the first one that matches a weight decides it.
        quality: what is known of the quality of its bundles, and from where; empty where nothing is.
        head: the overlay's policy for the head, in place of the rule's where that leaves it to the overlay.
    """

    name: str = field(validator=min_len(1))
    description: str = field(validator=min_len(1))
    rules: tuple[Rule, ...] = field(validator=min_len(1))
    quality: str = ""
    head: QuantizationSpec | None = None

    @classmethod
    def by_role(cls, name: str, description: str, specs: Mapping[str, QuantizationSpec | None]) -> Recipe:
        """A recipe from a spec for each kind of role, and for single roles by their names, which go first.

        A head that is quantized is left to the overlay.

        Raises:
            BadInput: when a kind is undecided, naming each.
        """
        undecided = [kind for kind in KINDS if kind not in specs]
        if undecided:
            raise BadInput(
                f"The recipe {name!r} leaves {listing(undecided)} undecided.",
                "A recipe gives each kind of weight a spec, or None to keep it as it is: what is left out would be "
                f"skipped without a word. The kinds are {listing(list(KINDS))}.",
            )
        ordered = sorted(specs, key=lambda role: role in KINDS)
        description = description or name
        return cls(name, description, tuple(_rule_by_role(role, specs[role], description[:500]) for role in ordered))

    def rule_for(self, parameter: str, role: Role, layers: int) -> Rule | None:
        """The rule that decides a parameter, or None; see `Rule.matches`."""
        return next((rule for rule in self.rules if rule.matches(parameter, role, layers)), None)

    def spec_of(self, rule: Rule) -> QuantizationSpec | None:
        """How a rule stores its weights, with the overlay's policy in place."""
        return self.head or rule.spec if rule.overlay_decides else rule.spec

    @property
    def specs(self) -> Mapping[str, QuantizationSpec | None]:
        """What rules say that have no condition but roles and kinds, by those: the whole recipe, where all are so."""
        found: dict[str, QuantizationSpec | None] = {}
        for rule in self.rules:
            if not rule.parameters and rule.layers is None:
                for role in rule.roles or KINDS:
                    found.setdefault(role, self.spec_of(rule))
        return found

    @property
    def quantizations(self) -> frozenset[QuantizationSpec]:
        """Every way in which a rule quantizes weights."""
        return frozenset(spec for rule in self.rules if (spec := self.spec_of(rule)) is not None)

    @property
    def published_name(self) -> str:
        """The end of a bundle's name, which follows from the rules alone: two recipes that differ in those have two."""
        own = evolve(self, head=None)
        name = _name_by_kind(own.specs) if all(rule.is_general for rule in self.rules) else None
        if name is None:
            dtypes: list[str] = sorted({spec.dtype for spec in own.quantizations})
            name = "_".join(["mix", *dtypes, _digest(self.rules)])
        # Two policies for one head are two bundles.
        return name if self.head is None else f"{name}{_HEAD}{_slug(self.head)}"

    @property
    def leaves_head_to_overlay(self) -> bool:
        """Whether the overlay's policy for the head has a say: no rule before decides the head instead."""
        for rule in self.rules:
            if rule.overlay_decides:
                return True
            if not rule.parameters and rule.layers is None and (not rule.roles or "head" in rule.roles):
                return False
        return False

    def with_head(self, policy: HeadQuantization | None) -> Recipe:
        """The recipe with the overlay's head policy in place, where a rule leaves the head to the overlay.

        A recipe that keeps the head as it is, or says itself how it is stored, stays so.
        """
        own = {self.spec_of(rule) for rule in self.rules if rule.overlay_decides}
        has_say = policy is not None and self.leaves_head_to_overlay and not own <= {policy.spec}
        return evolve(self, head=policy.spec) if policy is not None and has_say else self


def _rule_by_role(role: str, spec: QuantizationSpec | None, why: str) -> Rule:
    return Rule(spec, why, (role,), overlay_decides=role == "head" and spec is not None)


def _digest(rules: Iterable[Rule]) -> str:
    """Twelve digits that change with what rules match and how they store it, in whatever words they say why."""
    content = [
        [
            sorted(rule.roles),
            sorted(rule.parameters),
            rule.layers,
            None if rule.spec is None else asdict(rule.spec),
            rule.overlay_decides,
        ]
        for rule in rules
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------------
# Published names
# ---------------------------------------------------------------------------------------------------------------------


PLAIN: Final = "fp16"
"""The recipe that quantizes nothing."""

_SCHEME_SLUGS = {"symmetric": "sym", "symmetric_with_clipping": "clip", "asymmetric": "asym"}
_HEAD = "_head_"


def _slug(spec: QuantizationSpec) -> str:
    blocks = "channel" if spec.block_size is None else f"block{spec.block_size}"
    scales = "" if spec.scales == "absmax" else f"_{spec.scales}"
    return f"{spec.dtype}_{blocks}_{_SCHEME_SLUGS[spec.scheme]}{scales}"


def _name_by_kind(specs: Mapping[str, QuantizationSpec | None]) -> str | None:
    """The published name of a recipe that stores all weights of a kind alike; None where it has none of this form.

    `lin` has the linear layers of the body in integers, `hu` an untied head as well, whose scheme comes last. A body
    that uses its whole range, a head of other blocks, and an embedding in integers are said too.
    """
    if not set(specs) >= set(KINDS) or specs["other"] is not None:
        return None
    body, head, embedding = (specs[kind] for kind in ("body", "head", "embedding"))
    if body is None and (head, embedding) != (None, None):
        return None
    if body is None:
        return PLAIN
    parts = [f"{body.dtype}{'hu' if head else 'lin'}"]
    parts.append("channel" if body.block_size is None else f"block{body.block_size}")
    if body.scheme != "symmetric_with_clipping":
        parts.append(f"body_{_SCHEME_SLUGS[body.scheme]}")
    if body.scales != "absmax":
        parts.append(body.scales)
    if embedding is not None:
        parts.append("embedding" if embedding == head else f"embedding_{_slug(embedding)}")
    if head is not None:
        alike = (head.dtype, head.block_size, head.scales) == (body.dtype, body.block_size, body.scales)
        parts.append(_SCHEME_SLUGS[head.scheme] if alike else f"head_{_slug(head)}")
    return "_".join(parts)


def published_as(name: str, recipes: Iterable[Recipe]) -> Recipe | None:
    """The recipe that a published name stands for, with the head that it names; None where none is published so.

    Args:
        name: the suffix of a bundle's name, see `Recipe.published_name`.
        recipes: those that are known.
    """
    known = list(recipes)
    head = _read_slug(name.rpartition(_HEAD)[2])
    with_heads = (evolve(recipe, head=head) for recipe in known if head and recipe.leaves_head_to_overlay)
    return next((recipe for recipe in (*known, *with_heads) if recipe.published_name == name), None)


def _read_slug(slug: str) -> QuantizationSpec | None:
    """The spec that `_slug` wrote; None for another text."""
    dtype, _, rest = slug.partition("_")
    blocks, _, rest = rest.partition("_")
    scheme, _, scales = rest.partition("_")
    schemes = {short: name for name, short in _SCHEME_SLUGS.items()}
    size = None if blocks == "channel" else blocks.removeprefix("block")
    try:
        return QuantizationSpec(
            dtype,  # type: ignore[arg-type]
            schemes[scheme],  # type: ignore[arg-type]
            None if size is None else int(size),
            scales or "absmax",  # type: ignore[arg-type]
        )
    except (KeyError, ValueError):
        return None
