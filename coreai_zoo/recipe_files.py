"""Recipes as TOML files: reading one, and writing one that can be edited and read again.

    description = "Body in int4 blocks of 32, head in fp16."

    [[rule]]
    role = "body"
    dtype = "int4"
    why = "Half the bytes of int8."

Rules stand in their order. docs/recipes.md says what each key means.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import cattrs
from attrs import evolve, field, frozen
from attrs.validators import min_len
from cattrs.errors import ClassValidationError

from coreai_zoo.errors import BadInput
from coreai_zoo.recipes import PLAIN, QuantizationSpec, Recipe, Rule, Scales, Scheme, usual_scheme
from coreai_zoo.toml_files import (
    choice,
    make_converter,
    mistyped,
    problems_of,
    raise_bad_keys,
    read_toml,
    register_table,
    toml_lines,
)

CHANNEL = "channel"
"""The block size of one scale per row."""

Dtype = Literal["fp16", "int4", "int6", "int8", "uint4", "uint8"]


@frozen
class _Names:
    """One name or several."""

    names: tuple[str, ...] = ()


@frozen
class _Layers:
    """A first and a last layer."""

    edges: tuple[int, int]


@frozen
class _BlockSize:
    """Inputs per scale; None for one scale per row."""

    inputs: int | None


@frozen
class _RuleTable:
    """A rule as it stands in a file; see `recipes.Rule` and `recipes.QuantizationSpec`."""

    dtype: Dtype
    why: str
    role: _Names = _Names()
    parameter: _Names = _Names()
    layers: _Layers | None = None
    scheme: Scheme | None = None
    block_size: _BlockSize | None = None
    scales: Scales | None = None
    overlay_decides: bool = False

    @property
    def rule(self) -> Rule:
        """The rule.

        Raises:
            ValueError: when keys contradict each other.
        """
        return Rule(
            self._spec,
            self.why,
            self.role.names,
            self.parameter.names,
            self.layers.edges if self.layers else None,
            self.overlay_decides,
        )

    @property
    def _spec(self) -> QuantizationSpec | None:
        if self.dtype == PLAIN:
            given = [key for key in ("scheme", "block_size", "scales") if getattr(self, key) is not None]
            if given:
                raise ValueError(f"{PLAIN} is not quantized and has no {' or '.join(given)}")
            return None
        return QuantizationSpec(
            self.dtype,
            self.scheme or usual_scheme(self.dtype),
            self.block_size.inputs if self.block_size else 32,
            self.scales or "absmax",
        )


@frozen
class _File:
    """A file as it is."""

    description: str = field(validator=min_len(1))
    quality: str = ""
    rule: tuple[_RuleTable, ...] = field(kw_only=True, validator=min_len(1))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _names(value: object, _type: Any) -> _Names:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise mistyped(value, "text or a list of text")
    if not names or not all(names):
        raise ValueError("needs at least one name, and no empty one")
    return _Names(tuple(names))


def _layers(value: object, _type: Any) -> _Layers:
    if not isinstance(value, list) or [type(edge) for edge in value] != [int, int]:
        raise mistyped(value, "the first and the last layer, such as [0, 3]")
    return _Layers((value[0], value[1]))


def _block_size(value: object, _type: Any) -> _BlockSize:
    if value != CHANNEL and type(value) is not int:
        raise mistyped(value, f"an integer or {CHANNEL!r}")
    return _BlockSize(None if value == CHANNEL else value)  # type: ignore[arg-type]


def _make_converter() -> cattrs.Converter:
    converter = make_converter()
    converter.register_structure_hook_func(lambda type_: type_ in (Dtype, Scheme, Scales), choice)
    for type_, hook in ((_Names, _names), (_Layers, _layers), (_BlockSize, _block_size)):
        converter.register_structure_hook(type_, hook)
    register_table(converter, _RuleTable)
    register_table(converter, _File)
    return converter


_CONVERTER = _make_converter()


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file, called as the file is.

    Raises:
        BadInput: when the file cannot be read, or naming every key that is unknown, missing, ill-typed or bad.
    """
    return _recipe(path, read_toml(path, "recipe file"), "recipe file")


def recorded_recipe(name: str, content: Mapping[str, Any], path: Path) -> Recipe:
    """The recipe that `content_of` made a record of.

    Args:
        name: of the recipe.
        content: the record.
        path: the file that it stands in, for an error.

    Raises:
        BadInput: as `read_recipe`.
    """
    kept = {key: content[key] for key in ("description", "quality", "rule") if key in content}
    return evolve(_recipe(path, kept, "recipe of"), name=name)


def _recipe(path: Path, content: Mapping[str, Any], what: str) -> Recipe:
    problems, rules = [], []
    try:
        file = _CONVERTER.structure(content, _File)
    except ClassValidationError as error:
        raise_bad_keys(path, what, [*problems_of(error)])
        raise
    for at, table in enumerate(file.rule):
        try:
            rules.append(table.rule)
        except ValueError as error:
            problems.append(f"rule[{at}]: {error}")
    raise_bad_keys(path, what, problems)
    if not path.stem:
        raise BadInput(f"the {what} {path} has no name.")
    return Recipe(path.stem, file.description, tuple(rules), file.quality)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def content_of(recipe: Recipe) -> dict[str, Any]:
    """What a file of a recipe holds: every key that is not what it is without being said."""
    quality = {"quality": recipe.quality} if recipe.quality else {}
    return {"description": recipe.description, **quality, "rule": [_table(rule) for rule in recipe.rules]}


def _table(rule: Rule) -> dict[str, Any]:
    spec = rule.spec
    keys: dict[str, Any] = {
        "role": _one_or_several(rule.roles),
        "parameter": _one_or_several(rule.parameters),
        "layers": list(rule.layers) if rule.layers else None,
        "dtype": PLAIN if spec is None else spec.dtype,
    }
    if spec is not None:
        keys["scheme"] = spec.scheme
        keys["block_size"] = CHANNEL if spec.block_size is None else spec.block_size
        keys["scales"] = None if spec.scales == "absmax" else spec.scales
    keys["overlay_decides"] = rule.overlay_decides or None
    keys["why"] = rule.why
    return {key: value for key, value in keys.items() if value is not None}


def _one_or_several(names: tuple[str, ...]) -> str | list[str] | None:
    return None if not names else names[0] if len(names) == 1 else list(names)


def as_toml(recipe: Recipe) -> str:
    """The text of a recipe's file."""
    content = content_of(recipe)
    rules = [line for rule in content.pop("rule") for line in ("\n[[rule]]", *toml_lines(rule))]
    return "\n".join([*toml_lines(content), *rules]) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Those that come with the host
# ---------------------------------------------------------------------------------------------------------------------


def read_recipes(folder: Path) -> Mapping[str, Recipe]:
    """The recipes in the files of a folder, by name, in the order of the names; for the hook `zoo_recipes`.

    Raises:
        BadInput: when there is no such folder, as where a package was built without its data, or a file is bad.
    """
    if not folder.is_dir():
        raise BadInput(f"There is no folder of recipes {folder}.", "Is it among the data of the package?")
    return MappingProxyType({path.stem: read_recipe(path) for path in sorted(folder.glob("*.toml"))})


RECIPES = read_recipes(Path(__file__).with_name("shipped_recipes"))
"""The host's own recipes by name."""
