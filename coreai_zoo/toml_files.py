"""TOML files into frozen classes: every unknown key, ill-typed value and bad value of a file is reported at once."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn, override

from coreai_zoo.errors import BadInput, near_names, near_paths

_TOML_TYPES = {bool: "a boolean", int: "an integer", float: "a float", str: "text", list: "a list", dict: "a table"}
_T = TypeVar("_T")

Structure = Callable[[Any, Any], Any]


def toml_lines(table: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a table's keys, whose values are text, numbers, booleans and lists of them."""
    # Of these, TOML is JSON, but for one control character.
    for key, value in table.items():
        yield f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a file.

    Args:
        path: the file.
        what: what it is, for an error, for example `entry file`.

    Raises:
        BadInput: when it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadInput(f"the {what} {path} cannot be read: {error.strerror}.", near_paths(path)) from error
    except (ValueError, RecursionError) as error:  # also of bad UTF-8, and of a number with thousands of digits
        raise BadInput(f"the {what} {path} is not TOML: {error}.") from error


def mistyped(value: object, expected: str) -> ValueError:
    """The error about a value of another type than the expected one."""
    return ValueError(f"expected {expected}, found {_TOML_TYPES.get(type(value), type(value).__name__)} ({value!r})")


def only(kinds: type | UnionType, expected: str, structure: Callable[[Any, Any], _T]) -> Callable[[Any, Any], _T]:
    """A hook that structures values of some types and refuses all others; a boolean is no number."""

    def hook(value: object, type_: Any) -> _T:
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise mistyped(value, expected)
        return structure(value, type_)

    return hook


def as_it_is(value: Any, _type: Any) -> Any:
    """A hook that changes nothing."""
    return value


def choice(value: object, type_: Any) -> object:
    """A hook for a Literal."""
    if value not in get_args(type_):
        near = near_names(str(value), get_args(type_), 1)
        known = f"{value!r} is not one of {', '.join(map(repr, get_args(type_)))}"
        raise ValueError(f"{known}. {near}" if near else known)
    return value


def _texts(value: object, _type: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise mistyped(value, "a list of text")
    return tuple(value)


def make_converter() -> cattrs.Converter:
    """A converter that takes text, numbers, booleans and lists of text for what they are, and no unknown key."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(str, only(str, "text", as_it_is))
    converter.register_structure_hook(bool, only(bool, "a boolean", as_it_is))
    converter.register_structure_hook(int, only(int, "an integer", as_it_is))
    converter.register_structure_hook(float, only(int | float, "a number", lambda value, _type: float(value)))
    converter.register_structure_hook_func(lambda type_: type_ == tuple[str, ...], _texts)
    return converter


def register_table(
    converter: cattrs.Converter, cls: type, around: Callable[[Structure], Structure] = lambda structure: structure
) -> None:
    """Teach a converter a class that is a table, and a list of such tables.

    Args:
        converter: the converter; it knows the types of the attributes.
        cls: an attrs class. Its validators run on each key, so that all bad values of a table are found.
        around: wraps what structures it.
    """

    def field_hook(value: object, type_: Any, *, attribute: attrs.Attribute[Any]) -> object:
        # The constructor would run validators only once all types are right, and stop at the first.
        structured = converter.structure(value, type_)
        if attribute.validator is not None:
            attribute.validator(None, attribute, structured)
        return structured

    attributes = attrs.fields(attrs.resolve_types(cls))
    hooks = {a.name: override(struct_hook=partial(field_hook, attribute=a)) for a in attributes}
    structure: Any = around(make_dict_structure_fn(cls, converter, **hooks))  # type: ignore[arg-type]  # overrides
    converter.register_structure_hook(cls, only(dict, "a table", structure))
    several = tuple.__class_getitem__((cls, ...))
    each = only(list, "a list of tables", converter.get_structure_hook(several))
    converter.register_structure_hook_func(lambda type_: type_ == several, each)


def problems_of(error: BaseException, key: str = "", *, unnamed: str | None = None) -> Iterator[str]:
    """What is wrong with a file, one phrase for each key.

    Args:
        error: what a converter raised.
        key: of the table that it is about.
        unnamed: an attribute whose keys stand beside its table's own in the file.
    """
    if isinstance(error, ClassValidationError):
        located, rest = error.group_exceptions()
        for inner, note in located:
            below = key if note.name == unnamed else f"{key}.{note.name}".lstrip(".")
            yield from problems_of(inner, below, unnamed=unnamed)
        for inner in rest:
            yield from problems_of(inner, key, unnamed=unnamed)
    elif isinstance(error, IterableValidationError):
        for inner, item in error.group_exceptions()[0]:
            yield from problems_of(inner, f"{key}[{item.index}]", unnamed=unnamed)
    elif isinstance(error, ForbiddenExtraKeysError):
        known = [attribute.name for attribute in attrs.fields(error.cl)]
        for name in sorted(error.extra_fields):
            near = difflib.get_close_matches(name, known, n=1)
            known_keys = f"nearest is {near[0]}" if near else f"known are {', '.join(known)}"
            yield f"{f'{key}.{name}'.lstrip('.')}: unknown key, {known_keys}"
    elif isinstance(error, KeyError):
        yield f"{key}: missing"
    else:
        yield f"{key}: {error.args[0] if error.args else error}"


def raise_bad_keys(path: Path, what: str, problems: list[str]) -> None:
    """Refuse a file with bad keys, naming all.

    Raises:
        BadInput: when there are any.
    """
    if problems:
        count = len(problems)
        raise BadInput(f"the {what} {path} has {count} bad key{'s' * (count > 1)}: {'; '.join(problems)}.")
