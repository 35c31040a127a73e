"""The code that a plugin's object runs, as a digest: what build.json says of overlays and rewrites."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import CellType, FunctionType, MethodType

_KNOWN = frozenset({"torch", "attr", "attrs", "coreai_zoo", *sys.stdlib_module_names})
"""Packages that a version says everything about."""


def code_digest(thing: object) -> str:
    """SHA-256 over the source of every package that the code of `thing` is in, or of the module where it is in none.

    Of an object or a class that is the code of all its bases, and of what it holds to call; of a partial and a bound
    method that of the function and of what it is bound to. Python, torch, attrs and this package are left out:
    `versions` in build.json says which they are.

    Args:
        thing: an object, a class, or something to call.
    """
    parts = dict.fromkeys(_parts(thing, {}))
    digests = [*dict.fromkeys(text if is_value else _source_digest(text) for text, is_value in parts)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _parts(thing: object, seen: dict[int, object]) -> Iterator[tuple[str, bool]]:
    """Names of modules, and values that functions are bound to as text; the flag says that it is a value."""
    if id(thing) in seen:
        return
    seen[id(thing)] = thing  # kept, so that nothing else gets its id
    match thing:
        case functools.partial():
            yield from _parts(thing.func, seen)
            yield from _parts((thing.args, thing.keywords), seen)
        case MethodType():
            yield from _parts(thing.__func__, seen)
            yield from _parts(thing.__self__, seen)
        case FunctionType():
            yield from _function_parts(thing, seen)
        case type():
            yield from _modules(*(base.__module__ for base in thing.__mro__))
        case list() | tuple():
            for item in thing:
                yield from _parts(item, seen)
        case Mapping():
            yield from _parts([*thing.items()], seen)
        case str() | int() | float():
            yield repr(thing), True
        case _:
            yield from _parts(type(thing), seen)
            attributes = [*getattr(thing, "__dict__", {}), *getattr(type(thing), "__slots__", ())]
            values = [getattr(thing, name, None) for name in attributes]
            yield from _parts([value for value in values if callable(value)], seen)


def _function_parts(function: FunctionType, seen: dict[int, object]) -> Iterator[tuple[str, bool]]:
    # A wrapper bears the name of the module whose function it wraps.
    own, wrapped = function.__globals__["__name__"], getattr(function, "__wrapped__", None)
    yield from _modules(own, function.__module__)
    yield from _parts(wrapped, seen)
    if wrapped is None or _is_unknown(own):
        yield from _parts([*_held(function.__closure__ or ())], seen)


def _held(cells: Sequence[CellType]) -> Iterator[object]:
    """What a function takes from around it; a variable that has no value yet is left out."""
    for cell in cells:
        with contextlib.suppress(ValueError):
            yield cell.cell_contents


def _modules(*names: str) -> Iterator[tuple[str, bool]]:
    return ((name, False) for name in names if _is_unknown(name))


def _is_unknown(module: str) -> bool:
    return module.partition(".")[0] not in _KNOWN


def _source_digest(name: str) -> str:
    """Of the package that module `name` is in, or of the module where it is in none."""
    module = sys.modules[name]
    source = Path(str(module.__file__))
    files = sorted(source.parent.rglob("*.py")) if module.__package__ else [source]
    lines = [f"{path.relative_to(source.parent)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
