"""`torch.export` in one go: the graph that `export` and then `run_decompositions` give, in less time.

The public way runs a decoder three times: `export` records it undecomposed, and `run_decompositions` runs that record
once to see what it mutates and once to record it again. torch has the way without the first of the three, which it
took itself before there was a graph for training; the private functions below are that. The second is left out where it
is known what a decoder mutates, which its signature says and the recording then proves. They were read in the versions
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
from torch._functorch import aot_autograd
from torch._functorch._aot_autograd.frontend_utils import _detect_attribute_assignment
from torch._functorch._aot_autograd.functional_utils import has_data_mutation
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
    module: nn.Module,
    examples: tuple[Tensor, ...],
    dynamic_shapes: Any,
    decompositions: Mapping[Any, Any],
    *,
    states: int = 0,
) -> ExportedProgram:
    """The program of a module that is called with `examples`; see `exporting`.

    Args:
        module: what is run.
        examples: its arguments.
        dynamic_shapes: as `torch.export.export` takes them.
        decompositions: see `exporting`.
        states: where the module is expected to write to its last arguments and to nothing else, how many these are.
            It costs a fifth less to trace then. One that does anything else is traced all the same.
    """
    with exporting(decompositions) as exported:
        if states and _is_read():
            # Whatever is wrong, be it the expectation or the module, comes up again without the expectation.
            with contextlib.suppress(Exception), _expecting(module, states):
                return exported(module, examples, dynamic_shapes=dynamic_shapes)
        return exported(module, examples, dynamic_shapes=dynamic_shapes)


@contextlib.contextmanager
def exporting(decompositions: Mapping[Any, Any]) -> Iterator[Export]:
    """Gives an `Export` to call within the block, which takes five times as long to begin as a small module to export.

    Args:
        decompositions: as `ExportedProgram.run_decompositions` takes them.
    """
    if not _is_read():
        yield functools.partial(_publicly, decompositions)
        return
    implicit, others = exported_program._split_decomp_table_to_cia_and_python_decomp(dict(decompositions))
    with exported_program._override_composite_implicit_decomp(implicit), _decomposing(others):
        yield functools.partial(_trace._export, strict=False, pre_dispatch=False)


def _is_read() -> bool:
    return Version(torch.__version__).base_version in _READ


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


class _OtherThanExpected(Exception):
    """A module writes to something else than its states, or changes how a tensor lies that it is given."""


@contextlib.contextmanager
def _expecting(module: nn.Module, states: int) -> Iterator[None]:
    """Within the block, what `module` mutates is not analysed but expected, and the recording has to agree.

    torch runs a module to see which of its arguments it mutates. The analysis is left to torch, but of a function that
    is known to mutate the states. A mutation that was not expected would be lost from the graph, so that the recorded
    run is looked at in the same way: all that it is given, as it was given.

    Raises:
        _OtherThanExpected: within the block or at its end, when they do not agree, or could not be compared.
    """
    looked_up_in: Any = aot_autograd
    analysis = looked_up_in.run_functionalized_fw_and_collect_metadata
    given: list[Any] = []
    states_given: set[int] = set()
    calls = 0

    def analysed(_forward: object, **options: Any) -> Any:
        def expected(*arguments: Tensor) -> tuple[Tensor]:
            for state in arguments[-states:]:
                state.zero_()
            return (arguments[-1].new_empty(()),)

        return analysis(expected, **options)

    def keep(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += 1
        # Whatever a run can write to is a functional tensor, and a parameter or buffer is replaced by one.
        given[:] = [*arguments, *module.parameters(), *module.buffers()]
        states_given.update(id(state) for state in arguments[-states:])

    def compare(_module: nn.Module, _arguments: object, _result: object) -> None:
        written = {id(tensor) for tensor in given if has_data_mutation(tensor)}
        if written != states_given or any(map(_has_other_metadata, given)):
            raise _OtherThanExpected

    hooks = [module.register_forward_pre_hook(keep, prepend=True), module.register_forward_hook(compare)]
    looked_up_in.run_functionalized_fw_and_collect_metadata = analysed
    try:
        with _detect_attribute_assignment(module):  # as torch does while it analyses
            yield
        if calls != 1:  # a module that does not call its hooks, or calls itself
            raise _OtherThanExpected
    finally:
        looked_up_in.run_functionalized_fw_and_collect_metadata = analysis
        for hook in hooks:
            hook.remove()


def _has_other_metadata(tensor: Any) -> bool:
    """Whether a functional tensor lies in memory otherwise than it did, or somewhere else."""
    inside = tensor.elem
    return torch._functionalize_has_metadata_mutation(inside) or torch._functionalize_was_storage_changed(inside)


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
