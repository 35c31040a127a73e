"""Composites: operations that a device has kernels for, or that an overlay brings, each kept whole through lowering.

Each distinct one is exported once, where the toolchain exports one per layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

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
    return [ExternalizeSpec(cls, composite_op_name=name, composite_attrs=attrs) for name, (cls, attrs) in used.items()]


_OF_THE_TOOLCHAIN = frozenset({"rms_norm", "scaled_dot_product_attention", "gather_mm", "gated_delta_update"})


def _own(path: str, child: composites.Composite) -> tuple[str, list[str]]:
    """The name of a composite of an overlay's own, and of its attributes, which have to tell all that it is."""
    name = getattr(type(child), "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise PluginError(f"{path} is a composite, and its `name` is {name!r}.", "Say `name` in its class.")
    held = [*dict(child.named_parameters()), *dict(child.named_buffers()), *dict(child.named_children())]
    if held:
        raise PluginError(
            f"{path} is a composite and holds {held[0]}.", "Give it whatever it computes with as an input."
        )
    attributes = {key: value for key, value in vars(child).items() if key not in _OF_EVERY_MODULE}
    for key, value in attributes.items():
        if not isinstance(value, (bool, int, float, str)):
            raise PluginError(f"{path} is a composite, and its attribute {key} is of type {type(value).__name__}.")
    return name, sorted(attributes)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


# ---------------------------------------------------------------------------------------------------------------------
# Traced as one operation
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def composites_kept(module: nn.Module, present: list[ExternalizeSpec]) -> Iterator[None]:
    """Within the block, the composites of `module` are traced as one operation each; Ctrl-C waits for its end."""
    with interruption.deferred():
        _patch_model_for_externalization(module, present)
        try:
            _remember_results(_find_marked_submodules(module))
            yield
        finally:
            _restore_externalized(_find_marked_submodules(module))


def _remember_results(marked: Collection[Any]) -> None:
    """What a trace needs of a composite is the shapes of its results, which equal calls of equal composites share.

    The toolchain computes them anew for each layer, with all that is inside.
    """
    for child in marked:
        name = f"{_EXTERNALIZE_NAMESPACE}::{child._externalize_op_name}"
        torch.library.register_fake(name, _remembering(child._original_forward, _identity(child)))


_results: dict[object, tuple[bool, list[tuple[Any, ...]]]] = {}


def _remembering(forward: Callable[..., Any], identity: object) -> Callable[..., Any]:
    def results(*arguments: Any, **named: Any) -> Any:
        given = (*arguments, *named.items())
        tensors = [value for value in given if isinstance(value, Tensor)]
        if not all(isinstance(size, int) for tensor in tensors for size in (*tensor.shape, *tensor.stride())):
            return forward(*arguments, **named)
        key = (identity, tuple(_described(value) if isinstance(value, Tensor) else repr(value) for value in given))
        if key not in _results:
            computed = forward(*arguments, **named)
            alone = isinstance(computed, Tensor)
            _results[key] = (alone, [_described(value) for value in ([computed] if alone else computed)])
        alone, described = _results[key]
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
    with exporting(torch.export.default_decompositions()) as export:
        for prepared in _PreparedModules(module, program):
            key = (
                prepared.composite_op_name,
                repr(sorted(prepared.composite_decl_attrs.items())),
                _input_types(prepared.source_nodes[0]),
            )
            if key not in distinct:
                prepared.name = f"{prepared.composite_op_name}_{next(serial)}"
                distinct[key] = _finalize_module_export(prepared, _exported_composite(prepared, export))
                distinct[key].source_nodes = []
            distinct[key].source_nodes.extend(prepared.source_nodes)
    return list(distinct.values())


# A composite holds no tensor, so what it is exported to depends on nothing but the key below.
_exported: dict[object, tuple[ExportedProgram, list[str], list[str]]] = {}


def _exported_composite(prepared: _PreparedModule, export: Export) -> ExportedProgram:
    """A composite's program, exported once in a process. Names of its inputs and outputs are noted in `prepared`."""
    names = list(inspect.signature(prepared.module.forward).parameters)
    given = [name for name, argument in zip(names, prepared.source_nodes[0].args, strict=False) if argument is not None]

    def exported() -> ExportedProgram:
        arguments, shapes = (
            dict(zip(given, of, strict=True)) for of in (prepared.fake_inputs, prepared.dynamic_shapes)
        )
        return export(prepared.module, (), arguments, dynamic_shapes=shapes)

    key = (
        _identity(prepared.module),
        tuple(given),
        tuple((tuple(example.shape), example.dtype, example.device) for example in prepared.fake_inputs),
        tuple(
            tuple((axis, dim.__name__, dim.min, dim.max) for axis, dim in (dims or {}).items())
            for dims in prepared.dynamic_shapes
        ),
    )
    if key not in _exported:
        with without_lines():
            program = exported()
        with mistakes.explained("lowered", prepared.module, exported):
            validate_exported_program(program, {})
        _exported[key] = (program, *_derive_composite_io_names(program))
    program, prepared.composite_input_names, prepared.composite_output_names = _exported[key]
    return program


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
    values = [argument.meta["val"] for argument in node.args if isinstance(argument, fx.Node)]
    return tuple((tuple(map(str, value.shape)), value.dtype) for value in values)
