"""Decoders that are the same are traced once in a process, for tests of what comes before and after a trace."""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib
import os
import pkgutil
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pytest
from torch import nn
from torch.nn.utils import parametrize

import coreai_zoo.backends.coreai
import coreai_zoo.lowering
import coreai_zoo_overlays
from coreai_zoo import composites
from coreai_zoo.backend import Constant, Values
from coreai_zoo.backends.coreai.backend import CoreAIBackend, CoreAIStepper, CoreAITraced
from coreai_zoo.contracts import TraceSpec
from coreai_zoo.layout import Layout
from coreai_zoo.lowering.transposed import stacks_read_transposed

_INTERNAL = frozenset(vars(nn.Module()))
_KEPT = 12  # a trace is some hundred thousand objects
_traced: collections.OrderedDict[object, CoreAITraced] = collections.OrderedDict()
_layouts: collections.OrderedDict[object, tuple[CoreAITraced, Layout]] = collections.OrderedDict()

# What a trace comes of. Whoever replaces a function of these, as a mutant does, gets a trace of his own.
_SOURCES = (coreai_zoo_overlays, coreai_zoo.lowering, coreai_zoo.backends.coreai)
_RUNS = CoreAIStepper  # but not of what runs the asset that is made of it: tests watch that, or have it forget


def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the Core AI backend give the trace that it made of the same decoders before, and the layout of that.

    A trace has no weights: `Traced.lay_out` takes them, by name. What it depends on is all of `_everything`, and the
    code that is in force. To trace is two thirds of a build of a miniature, and the tests build dozens that have other
    files but the same decoder.
    """
    monkeypatch.setattr(CoreAIBackend, "trace", _remembering(CoreAIBackend.trace))
    monkeypatch.setattr(CoreAITraced, "lay_out", _remembering_layouts(CoreAITraced.lay_out))


def inherit() -> None:
    """The same of traces, until this process ends: for `before` of a fork, which has those of who forked."""
    CoreAIBackend.trace = _remembering(CoreAIBackend.trace)  # type: ignore[method-assign]


Trace = Callable[[CoreAIBackend, Mapping[str, nn.Module], Mapping[str, TraceSpec], Any], CoreAITraced]


def _remembering(trace: Trace) -> Trace:
    def remembered(
        self: CoreAIBackend,
        modules: Mapping[str, nn.Module],
        functions: Mapping[str, TraceSpec],
        read_transposed: Any = None,
    ) -> CoreAITraced:
        decoders = tuple((name, repr(functions[name]), _everything(module)) for name, module in modules.items())
        key = (repr(self), tuple(_code()), decoders)
        if key in _traced:  # of another recipe perhaps, whose plain weights are others
            for function in _traced[key].functions.values():
                program, _ = function.traced
                stacks_read_transposed(program, program.graph_signature.inputs_to_parameters, read_transposed)
        else:
            _traced[key] = trace(self, modules, functions, read_transposed)
            if len(_traced) > _KEPT:
                _traced.popitem(last=False)
        _traced.move_to_end(key)
        return _traced[key]

    return remembered


LayOut = Callable[[CoreAITraced, Mapping[str, Constant], Values], Layout]


def _remembering_layouts(lay_out: LayOut) -> LayOut:
    """A layout depends on no weight unless it is given some: then it is made anew."""

    def remembered(self: CoreAITraced, constants: Mapping[str, Constant], values: Values) -> Layout:
        given: dict[str, Constant] = {}

        def watched(names: Collection[str]) -> Mapping[str, Constant]:
            given.update(values(names))
            return given

        numbers: dict[int, int] = {}  # what is one constant under two names
        kinds = tuple(
            (name, each.shape, each.dtype, each.transposed, numbers.setdefault(id(each), len(numbers)))
            for name, each in constants.items()
        )
        key = (id(self), kinds, os.environ.get("SOURCE_DATE_EPOCH"), tuple(_code()))
        if key not in _layouts:
            made = lay_out(self, constants, watched)
            if given:
                return made
            _layouts[key] = (self, made)  # with whom it was made of, so that nobody else gets that identity
            if len(_layouts) > _KEPT:
                _layouts.popitem(last=False)
        _layouts.move_to_end(key)
        return _layouts[key][1]

    return remembered


@functools.cache
def _sources() -> tuple[types.ModuleType, ...]:
    """The modules of `_SOURCES`, imported."""
    found = (
        each.name for package in _SOURCES for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    )
    return composites, *map(importlib.import_module, sorted(found))


def _code() -> Iterator[object]:
    """Functions and plain values of `_SOURCES` as they are now, of modules and of their classes, by name."""
    for module in _sources():
        for attribute, value in list(vars(module).items()):
            own = isinstance(value, type) and value.__module__ == module.__name__ and value is not _RUNS
            for inside, each in list(vars(value).items()) if own else [("", value)]:
                function = getattr(each, "__func__", None) or getattr(each, "fget", None) or each
                if isinstance(function, types.FunctionType):
                    yield module.__name__, attribute, inside, function.__code__
                elif isinstance(function, int | float | str | tuple):
                    yield module.__name__, attribute, inside, repr(function)


def _everything(module: nn.Module) -> object:
    """All that a module is, but for the values of its parameters: classes, attributes, shapes, contents of buffers.

    What is told apart too finely, as by the address of a function, is traced again.
    """
    seen: dict[int, str] = {}  # a tied parameter is the same one under two names
    parameters = tuple(
        (name, seen.setdefault(id(each), name), tuple(each.shape), each.dtype, each.requires_grad)
        for name, each in module.named_parameters(remove_duplicate=False)
    )
    buffers = tuple(
        (name, tuple(each.shape), each.dtype, hashlib.sha256(each.contiguous().numpy().tobytes()).hexdigest())
        for name, each in module.named_buffers(remove_duplicate=False)
    )
    modules = tuple(
        (
            name,
            _class(each),
            getattr(each.forward, "__func__", None),  # a mutant has another
            each.training,
            repr(_attributes(each)),
        )
        for name, each in module.named_modules(remove_duplicate=False)
    )
    return parameters, buffers, modules


def _class(module: nn.Module) -> tuple[type, tuple[str, ...]]:
    """Its class; for one that torch derived for a quantized module, its base and what was added."""
    own = type(module)
    return (own.__bases__[0], tuple(vars(own))) if own.__module__ == parametrize.__name__ else (own, ())


def _attributes(module: nn.Module) -> list[tuple[str, object]]:
    return sorted((name, value) for name, value in vars(module).items() if name not in _INTERNAL)
