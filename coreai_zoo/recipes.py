"""Recipes: which weights are quantized, and how; plain data, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

from attrs import evolve, field, frozen
from attrs.validators import in_, max_len, min_len

from coreai_zoo.errors import BadInput, listing
from coreai_zoo.overlay import Role, RoleKind

# ---------------------------------------------------------------------------------------------------------------------
# Quantization
# ---------------------------------------------------------------------------------------------------------------------


IntegerDtype = Literal["int4", "int8", "uint4", "uint8"]
Scheme = Literal["symmetric", "symmetric_with_clipping", "asymmetric"]


def _block(_instance: object, _attribute: Any, size: object) -> None:
    if size is not None and (not isinstance(size, int) or size < 2):
        raise ValueError(f"a block has at least 2 inputs, not {size!r}")


@frozen
class QuantizationSpec:
    """How a weight is stored: integers of `dtype` in blocks of `block_size` along the last axis, one scale per block.

    Attributes:
        dtype: `int4`, `int8`, `uint4` or `uint8`.
        scheme: `symmetric` uses the whole integer range; `symmetric_with_clipping` not its lowest signed integer,
            so that both signs have as many; `asymmetric` has a zero point. Names and arithmetic are coreai-opt's.
        block_size: inputs per scale; None for one scale per row ("per channel").
    """

    dtype: IntegerDtype = field(validator=in_(get_args(IntegerDtype)))
    scheme: Scheme = field(validator=in_(get_args(Scheme)))
    block_size: int | None = field(default=32, validator=_block)

    @property
    def bits(self) -> int:
        """Bits per integer: 4 or 8."""
        return int(self.dtype.lstrip("uint"))

    @property
    def signed(self) -> bool:
        """Whether the integers are signed."""
        return not self.dtype.startswith("u")

    def __str__(self) -> str:
        blocks = "per channel" if self.block_size is None else f"block {self.block_size}"
        return f"{self.dtype} {blocks} {self.scheme}"


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
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


_KINDS: tuple[str, ...] = get_args(RoleKind)


def _decides_every_kind(instance: Recipe, _attribute: object, specs: Mapping[str, QuantizationSpec | None]) -> None:
    undecided = [kind for kind in _KINDS if kind not in specs]
    if undecided:
        raise BadInput(
            f"The recipe {instance.name!r} leaves {listing(undecided)} undecided.",
            "A recipe gives each kind of weight a spec, or None to keep it as it is: what is left out would be skipped "
            f"without a word. The kinds are {listing(list(_KINDS))}.",
        )


def _frozen_mapping(specs: Mapping[str, QuantizationSpec | None]) -> Mapping[str, QuantizationSpec | None]:
    return MappingProxyType(dict(specs))


@frozen
class Recipe:
    """What is quantized and how.

    Attributes:
        name: what a user types.
        published_name: the suffix of a bundle's name.
        description: one sentence for `zoo show`.
        specs: a spec for each kind of weight (see `overlay.Role.kind`), and for single roles by their names where they
            differ from their kind; None keeps the parameter's own dtype.

    Raises:
        BadInput: when a kind is undecided, naming each.
    """

    name: str
    published_name: str
    description: str
    specs: Mapping[str, QuantizationSpec | None] = field(converter=_frozen_mapping, validator=_decides_every_kind)

    def spec(self, role: Role) -> QuantizationSpec | None:
        """How a weight of `role` is quantized, or None."""
        return self.specs[role.name if role.name in self.specs else role.kind]

    def with_head(self, policy: HeadQuantization | None, *, allow_per_channel: bool = False) -> Recipe:
        """The recipe with the overlay's head policy in place of its own head spec.

        A recipe that keeps the head as it is stays so: whether to quantize is the recipe's choice, how is the policy's.

        Args:
            policy: the policy, or None for the recipe's own.
            allow_per_channel: accept a head with one scale per row.

        Raises:
            BadInput: for a per-channel head that is not allowed.
        """
        own = self.specs["head"]
        if own is None:
            return self
        spec = policy.spec if policy else own
        if spec.block_size is None and not allow_per_channel:
            raise BadInput(
                f"Recipe {self.name} would quantize the head per channel ({spec}): per-channel int8 weights give "
                "garbage on the GPU delegate, where blocks of 32 are right and fast.",
                "Use a block size of 32, or force the per-channel head if you know your runtime.",
            )
        # Two policies for one head are two bundles: the name tells them apart.
        published_name = self.published_name if spec == own else f"{self.published_name}{_HEAD}{_slug(spec)}"
        return evolve(self, specs={**self.specs, "head": spec}, published_name=published_name)


def _slug(spec: QuantizationSpec) -> str:
    blocks = "channel" if spec.block_size is None else f"block{spec.block_size}"
    return f"{spec.dtype}_{blocks}_{_SCHEME_SLUGS[spec.scheme]}"


_SCHEME_SLUGS = {"symmetric": "sym", "symmetric_with_clipping": "clip", "asymmetric": "asym"}
_HEAD = "_head_"


def published_as(name: str, recipes: Mapping[str, Recipe]) -> Recipe | None:
    """The recipe that a published name stands for, with the head that it names; None where none is published so.

    Args:
        name: the suffix of a bundle's name, see `Recipe.published_name`.
        recipes: those that are installed, by name.
    """
    own = [recipe for recipe in recipes.values() if recipe.published_name == name]
    if own:
        return own[0]
    base, named, head = name.rpartition(_HEAD)
    for recipe in recipes.values() if named else ():
        if recipe.published_name == base and recipe.specs["head"] is not None and (spec := _read_slug(head)):
            return evolve(recipe, specs={**recipe.specs, "head": spec}, published_name=name)
    return None


def _read_slug(slug: str) -> QuantizationSpec | None:
    """The spec that `_slug` wrote; None for another text."""
    dtype, _, rest = slug.partition("_")
    blocks, _, scheme = rest.partition("_")
    schemes = {short: name for name, short in _SCHEME_SLUGS.items()}
    size = blocks.removeprefix("block")
    try:
        return QuantizationSpec(dtype, schemes[scheme], None if blocks == "channel" else int(size))  # type: ignore[arg-type]
    except (KeyError, ValueError):
        return None


def _specs(body: QuantizationSpec | None, head: QuantizationSpec | None = None) -> dict[str, QuantizationSpec | None]:
    # What is neither body nor head is small and sensitive (router, gates, norms, decays, convolutions) or is looked up
    # instead of multiplied (embedding).
    return {"embedding": None, "head": head, "body": body, "other": None}


_INT8 = QuantizationSpec("int8", "symmetric_with_clipping", 32)
_INT4 = QuantizationSpec("int4", "symmetric_with_clipping", 32)
_INT8_ABSMAX = QuantizationSpec("int8", "symmetric", 32)

PLAIN = "fp16"
"""The recipe that quantizes nothing."""


def _published_name(body: QuantizationSpec | None, head: QuantizationSpec | None = None) -> str:
    """The published name of a built-in recipe, by how it stores the body and the head.

    `lin` has the linear layers of the body in integers, `hu` an untied head as well, whose scheme comes last. A body
    that uses its whole range, and a head of other blocks, are said too.
    """
    if body is None:
        return PLAIN
    parts = [f"{body.dtype}{'hu' if head else 'lin'}", f"block{body.block_size}"]
    if body.scheme != "symmetric_with_clipping":
        parts.append(f"body_{_SCHEME_SLUGS[body.scheme]}")
    if head is not None:
        alike = (head.dtype, head.block_size) == (body.dtype, body.block_size)
        parts.append(_SCHEME_SLUGS[head.scheme] if alike else f"head_{_slug(head)}")
    return "_".join(parts)


def _built_in(
    name: str, description: str, body: QuantizationSpec | None, head: QuantizationSpec | None = None
) -> Recipe:
    return Recipe(name, _published_name(body, head), description, _specs(body, head))


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            _built_in(PLAIN, "No quantization: the reference for the others.", None),
            _built_in("int8lin", "Body in int8 blocks of 32, head in fp16.", _INT8),
            _built_in(
                "int8hu",
                "Body and untied head in int8 blocks of 32, the head with absmax scales.",
                _INT8,
                _INT8_ABSMAX,
            ),
            _built_in("int4lin", "Body in int4 blocks of 32, head in fp16.", _INT4),
        )
    }
)
"""The built-in recipes by name."""
