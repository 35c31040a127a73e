"""`torch.export` in one go: the graph that `export` and then `run_decompositions` give, in less time.

The public way runs a decoder three times: `export` records it undecomposed, and `run_decompositions` runs that record
once to see what it mutates and once to record it again. torch has the way without the first of the three, which it
took itself before there was a graph for training; the private functions below are that. They were read in the versions
of `_READ`; any other goes the public way. tests/test_torch_export.py compares the two.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.fx.config
from packaging.version import Version
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, _trace, exported_program

_READ = ("2.13.0",)


class Export(Protocol):
    """Gives the decomposed program of a module."""

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor] | None = None,
        *,
        dynamic_shapes: Any = None,
    ) -> ExportedProgram:
        """Takes what `torch.export.export` takes."""


def export(
    module: nn.Module, examples: tuple[Tensor, ...], dynamic_shapes: Any, decompositions: Mapping[Any, Any]
) -> ExportedProgram:
    """The program of a module that is called with `examples`; see `exporting`."""
    with exporting(decompositions) as exported:
        return exported(module, examples, dynamic_shapes=dynamic_shapes)


@contextlib.contextmanager
def exporting(decompositions: Mapping[Any, Any]) -> Iterator[Export]:
    """Gives an `Export` to call within the block, which takes five times as long to begin as a small module to export.

    Args:
        decompositions: as `ExportedProgram.run_decompositions` takes them.
    """
    if Version(torch.__version__).base_version not in _READ:
        yield functools.partial(_publicly, decompositions)
        return
    implicit, others = exported_program._split_decomp_table_to_cia_and_python_decomp(dict(decompositions))
    with exported_program._override_composite_implicit_decomp(implicit), _decomposing(others):
        yield functools.partial(_trace._export, strict=False, pre_dispatch=False)


def _publicly(decompositions: Mapping[Any, Any], *arguments: Any, **named: Any) -> ExportedProgram:
    return torch.export.export(*arguments, **named, strict=False).run_decompositions(dict(decompositions))


@contextlib.contextmanager
def _decomposing(table: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Within the block, what `_export` records is decomposed: it has no argument for that."""
    recording = _trace._export_to_aten_ir
    _trace._export_to_aten_ir = functools.partial(recording, decomp_table=table)
    try:
        yield
    finally:
        _trace._export_to_aten_ir = recording


@contextlib.contextmanager
def without_code() -> Iterator[None]:
    """Within the block, a graph that is made or changed is not written as Python, which takes a fifth of lowering one.

    Such a graph can be read, and not be called.
    """
    writing = fx.GraphModule.recompile
    fx.GraphModule.recompile = lambda _: None  # type: ignore[method-assign,assignment,return-value]
    try:
        yield
    finally:
        fx.GraphModule.recompile = writing  # type: ignore[method-assign]


@contextlib.contextmanager
def without_lines() -> Iterator[None]:
    """Within the block, operations do not know the lines that they come from, which takes a tenth of the time."""
    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before
