"""Composites: operations that a device has kernels for, or that an overlay brings, each kept whole through lowering.

Each distinct one is exported once, where the toolchain exports one per layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from coreai_torch import ExternalizeSpec
from coreai_torch._validate import validate_exported_program
from coreai_torch.composite_ops import SDPA, GatedDeltaUpdate, GatherMM, RMSNormImpl
from coreai_torch.externalize import (
    _EXTERNALIZE_NAMESPACE,
    _derive_composite_io_names,
    _ExternalizedExportedProgram,
    _finalize_module_export,
    _find_marked_submodules,
    _patch_model_for_externalization,
    _PreparedModule,
    _PreparedModules,
    _restore_externalized,
)
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from coreai_zoo import composites, interruption
from coreai_zoo.errors import PluginError
from coreai_zoo.lowering import mistakes
from coreai_zoo.lowering.repetition import attributes_of
from coreai_zoo.lowering.torch_export import Export, exporting, without_lines

# ---------------------------------------------------------------------------------------------------------------------
# Which there are
# ---------------------------------------------------------------------------------------------------------------------


def use_toolchain_composites(module: nn.Module) -> list[ExternalizeSpec]:
    """Replace the plain composites by the toolchain's; returns the externalization specs of all that occur.

    Names and attributes are those under which Apple's own exporter externalizes them, which is what the device's fused
    kernels look for (coreai-models, `_EXTERNALIZE_SPECS`).

    Raises:
        PluginError: for a composite of an overlay's own that cannot be one; see `composites.Composite`.
    """
    used: dict[str, tuple[type[nn.Module], list[str]]] = {}
    for path, child in list(module.named_modules()):
        match child:
            case composites.RMSNorm():
                child.impl = RMSNormImpl(eps=child.impl.eps)
                used["rms_norm"] = (RMSNormImpl, ["axes", "eps"])
            case composites.SDPA():
                child.impl = SDPA(scale=child.impl.scale, is_causal=True)
                used["scaled_dot_product_attention"] = (SDPA, ["scale", "is_causal", "window_size"])
            case composites.GatherMM():
                child.impl = GatherMM()
                used["gather_mm"] = (GatherMM, ["num_batch_axes"])
            case composites.GatedDeltaUpdate():
                child.impl = GatedDeltaUpdate()
                used["gated_delta_update"] = (GatedDeltaUpdate, [])
            case composites.Composite():
                name, attributes = _own(path, child)
                found = (type(child), attributes)
                if name in _OF_THE_TOOLCHAIN or used.setdefault(name, found) != found:
                    raise PluginError(f"{path} is a composite called {name}, and so is another one.")
    specs = [ExternalizeSpec(cls, composite_op_name=name, composite_attrs=attrs) for name, (cls, attrs) in used.items()]
    # A module is the first of these that it is an instance of: what derives from another composite comes before that.
    return sorted(specs, key=lambda spec: -len(spec.target_class.__mro__))


# Composites that it makes of its own modules and of torch's operations; a device may have a kernel for each.
_OF_THE_TOOLCHAIN = frozenset(
    {
        *("rms_norm", "rope", "scaled_dot_product_attention", "gather_mm", "gated_delta_update"),
        *("avg_pool_2d", "avg_pool_3d", "batch_norm", "group_norm", "hard_sigmoid", "instance_norm", "layer_norm"),
        *("linalg_vector_norm", "log_softmax", "pixel_shuffle"),
    }
)


def _own(path: str, child: composites.Composite) -> tuple[str, list[str]]:
    """The name of a composite of an overlay's own, and of its attributes, which have to tell all that it is."""
    name = getattr(type(child), "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        hint = "Say `name` in its class: letters, digits and underscores."
        raise PluginError(f"{path} is a composite, and its `name` is {name!r}.", hint)
    held = [*dict(child.named_parameters()), *dict(child.named_buffers()), *dict(child.named_children())]
    if held:
        raise PluginError(
            f"{path} is a composite and holds {held[0]}.", "Give it whatever it computes with as an input."
        )
    attributes = {key: value for key, value in attributes_of(child).items() if value or not key.endswith("_hooks")}
    for key, value in attributes.items():
        if not isinstance(value, (bool, int, float, str)):
            raise PluginError(
                f"{path} is a composite, and its attribute {key} is of type {type(value).__name__}.",
                "Attributes are numbers, truth values or text; a tensor is an input of its forward.",
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise PluginError(f"{path} is a composite, and its attribute {key} has more than 64 bits.")
        if key == "version":
            raise PluginError(f"{path} is a composite, and its attribute version is one that the toolchain sets.")
    _require_tensors(path, child)
    return name, sorted(attributes)


def _require_tensors(path: str, child: composites.Composite) -> None:
    """Refuse a composite that takes anything but tensors, each of them by position and by name."""
    try:
        hints = get_type_hints(type(child).forward)
    except NameError as error:  # imported for type checkers only
        raise PluginError(
            f"{path} is a composite, and the annotations of its forward cannot be read: {error}."
        ) from error
    for name, parameter in list(inspect.signature(type(child).forward).parameters.items())[1:]:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD or hints.get(name) not in _TENSORS:
            raise PluginError(
                f"{path} is a composite, and its forward takes {parameter}.",
                "A composite takes tensors, or `Tensor | None`, and nothing else; other values are attributes."
                if parameter.annotation is not inspect.Parameter.empty
                else f"Annotate it: `{name}: Tensor`.",
            )


_TENSORS = (Tensor, Tensor | None)


# ---------------------------------------------------------------------------------------------------------------------
# Traced as one operation
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def composites_kept(module: nn.Module, present: list[ExternalizeSpec]) -> Iterator[None]:
    """Within the block, the composites of `module` are traced as one operation each; Ctrl-C waits for its end."""
    with interruption.deferred():
        try:
            _patch_model_for_externalization(module, present)
        except (RuntimeError, ValueError) as error:  # for what its forward is declared to take and to give
            raise PluginError(f"A composite of the decoder cannot be kept whole. {mistakes.brief(error)}") from error
        marked = _find_marked_submodules(module)
        try:
            _remember_results(marked)
            yield
        finally:
            _restore_externalized(_find_marked_submodules(module))
            for child in marked:
                vars(child).pop("forward", None)  # the class's own: it may be traced again


def _remember_results(marked: Collection[Any]) -> None:
    """What a trace needs of a composite is the shapes of its results, which equal calls of equal composites share.

    The toolchain computes them anew for each layer, with all that is inside.
    """
    known: dict[object, tuple[bool, list[tuple[Any, ...]]]] = {}
    for child in marked:
        name = f"{_EXTERNALIZE_NAMESPACE}::{child._externalize_op_name}"
        torch.library.register_fake(name, _remembering(child, known))


def _remembering(child: Any, known: dict[object, tuple[bool, list[tuple[Any, ...]]]]) -> Callable[..., Any]:
    forward, identity = child._original_forward, _identity(child)

    def results(*given: Tensor | None) -> Any:
        tensors = [value for value in given if value is not None]
        if not all(isinstance(size, int) for tensor in tensors for size in (*tensor.shape, *tensor.stride())):
            return forward(*given)
        key = (identity, tuple(None if value is None else _described(value) for value in given))
        if key not in known:
            computed = forward(*given)
            alone = isinstance(computed, Tensor)
            known[key] = (alone, [_described(value) for value in ([computed] if alone else computed)])
        alone, described = known[key]
        made = [torch.empty_strided(size, stride, dtype=dtype, device=at) for size, stride, dtype, at in described]
        return made[0] if alone else tuple(made)

    return results


def _described(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _identity(child: Any) -> object:
    """What tells two composites apart, but for their inputs."""
    attributes = child._externalize_config.composite_attrs
    return type(child), child.training, repr([(name, getattr(child, name)) for name in attributes])


# ---------------------------------------------------------------------------------------------------------------------
# Exported once each
# ---------------------------------------------------------------------------------------------------------------------


def export_composites(module: torch.nn.Module, program: ExportedProgram) -> list[_ExternalizedExportedProgram]:
    """Every distinct composite of a patched `module`, exported once.

    Two call sites are the same composite when operation, attributes and the shapes and dtypes of their inputs agree.
    The compiler merges such graphs in the end, so to export one for each call only costs time. Names are derived from
    position.
    """
    distinct: dict[object, _ExternalizedExportedProgram] = {}
    serial = itertools.count()
    least = _least_sizes(program)
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        # Most often all are known, and to begin takes longer than to export one.
        export = functools.cache(lambda: stack.enter_context(exporting(torch.export.default_decompositions())))
        warnings.filterwarnings("ignore", message=".*skipping unused submodule")  # a layer may leave one out
        for prepared in _PreparedModules(module, program):
            key = (_identity(prepared.module), _input_types(prepared.source_nodes[0]))
            if key not in distinct:
                prepared.dynamic_shapes = _bounded(prepared, least)
                prepared.name = f"{prepared.composite_op_name}_{next(serial)}"
                distinct[key] = _finalize_module_export(prepared, _exported_composite(prepared, export))
                distinct[key].source_nodes = []
            distinct[key].source_nodes.extend(prepared.source_nodes)
    return list(distinct.values())


_SPECIALISED = 2
"""torch.export takes an axis for at least that long, whatever it is told."""


def _least_sizes(program: ExportedProgram) -> dict[int, int]:
    """The least that an axis of the arguments may measure, by what it measured while tracing, where two are not enough.

    The toolchain makes a number of an axis before it asks how long it may be, and loses the latter.
    """
    arguments = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    axes = [axis for argument in arguments for axis in argument.shape if isinstance(axis, torch.SymInt)]
    lowest = {axis.node.hint: program.range_constraints[axis.node.expr].lower for axis in axes}
    return {traced: int(least) for traced, least in lowest.items() if least > _SPECIALISED}


def _bounded(prepared: _PreparedModule, least: Mapping[int, int]) -> tuple[dict[int, Any] | None, ...]:
    """The dynamic axes of a composite, none shorter than it may be."""
    return tuple(
        dims
        and {
            axis: torch.export.Dim(dim.__name__, min=max(dim.min, least.get(example.shape[axis], 0)), max=dim.max)
            for axis, dim in dims.items()
        }
        for example, dims in zip(prepared.fake_inputs, prepared.dynamic_shapes, strict=True)
    )


# One of the toolchain's holds no tensor and does not change: what it is exported to depends on the key below alone.
_exported: dict[object, tuple[ExportedProgram, list[str], list[str]]] = {}


def _exported_composite(prepared: _PreparedModule, export: Callable[[], Export]) -> ExportedProgram:
    """A composite's program, one of the toolchain's exported once in a process; names of its inputs are noted."""
    names = list(inspect.signature(prepared.module.forward).parameters)
    given = [name for name, argument in zip(names, prepared.source_nodes[0].args, strict=False) if argument is not None]

    def exported() -> ExportedProgram:
        arguments, shapes = (
            dict(zip(given, of, strict=True)) for of in (prepared.fake_inputs, prepared.dynamic_shapes)
        )
        return export()(prepared.module, (), arguments, dynamic_shapes=shapes)

    key = (
        _identity(prepared.module),
        tuple(given),
        tuple((tuple(example.shape), example.dtype, example.device) for example in prepared.fake_inputs),
        tuple(
            tuple((axis, dim.__name__, dim.min, dim.max) for axis, dim in (dims or {}).items())
            for dims in prepared.dynamic_shapes
        ),
    )
    known = {} if isinstance(prepared.module, composites.Composite) else _exported
    if key not in known:
        with without_lines():
            program = exported()
        if program.graph_signature.user_inputs_to_mutate:
            raise PluginError(f"{prepared.module_path} is a composite and writes to a tensor that it is given.")
        with mistakes.explained("lowered", prepared.module, exported, inside=prepared.module_path):
            require_known_operations(program, {})
        known[key] = (program, *_derive_composite_io_names(program))
    program, prepared.composite_input_names, prepared.composite_output_names = known[key]
    return program


def require_known_operations(program: ExportedProgram, own: Mapping[str, Any]) -> None:
    """Raise ValueError for operations that are not lowered, naming them, with what an overlay can do about it."""
    try:
        validate_exported_program(program, own)
    except ValueError as error:
        told, advice, _ = str(error).partition("Use register_torch_lowering()")
        raise ValueError(f"{told}Write it with other operations." if advice else told) from None


def with_call_sites(
    composites: Sequence[_ExternalizedExportedProgram], program: ExportedProgram, serial: Iterator[int]
) -> list[_ExternalizedExportedProgram]:
    """The composites with all their call sites in `program`, which calls no others.

    They are numbered anew: functions of one asset may not share the name of a composite.
    """
    own = [
        dataclasses.replace(composite, source_nodes=[], name=f"{composite.composite_op_name}_{next(serial)}")
        for composite in composites
    ]
    known = {_call(node): at for at, composite in enumerate(composites) for node in composite.source_nodes}
    targets = {target for target, _ in known}
    for node in program.graph.nodes:
        if node.target in targets:
            own[known[_call(node)]].source_nodes.append(node.name)
    return own


def _call(node: fx.Node) -> tuple[object, object]:
    return node.target, _input_types(node)


def _input_types(node: fx.Node) -> tuple[object, ...]:
    values = [argument.meta["val"] if isinstance(argument, fx.Node) else None for argument in node.args]
    return tuple(value if value is None else (tuple(map(str, value.shape)), value.dtype) for value in values)
