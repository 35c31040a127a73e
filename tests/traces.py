"""Decoders that are the same are traced once in a process, for tests of what comes before and after a trace."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import pytest
from torch import nn
from torch.nn.utils import parametrize

from coreai_zoo.backends.coreai.backend import CoreAIBackend, CoreAITraced
from coreai_zoo.contracts import TraceSpec

_INTERNAL = frozenset(vars(nn.Module()))
_traced: dict[object, CoreAITraced] = {}


def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the Core AI backend give the trace that it made of the same decoders before.

    A trace has no weights: `Traced.save` takes them, by name. What it depends on is all of `_everything`. To trace is
    two thirds of a build of a miniature, and such tests build dozens that have other files but the same decoder.
    """
    monkeypatch.setattr(CoreAIBackend, "trace", _remembering(CoreAIBackend.trace))


def inherit() -> None:
    """The same until this process ends: for `before` of a fork, which has the traces of the program that forked."""
    CoreAIBackend.trace = _remembering(CoreAIBackend.trace)  # type: ignore[method-assign]


Trace = Callable[[CoreAIBackend, Mapping[str, nn.Module], Mapping[str, TraceSpec]], CoreAITraced]


def _remembering(trace: Trace) -> Trace:
    def remembered(
        self: CoreAIBackend, modules: Mapping[str, nn.Module], functions: Mapping[str, TraceSpec]
    ) -> CoreAITraced:
        key = (repr(self), *((name, repr(functions[name]), _everything(module)) for name, module in modules.items()))
        if key not in _traced:
            _traced[key] = trace(self, modules, functions)
        return _traced[key]

    return remembered


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
