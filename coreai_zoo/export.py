"""From an overlay's decoder to a traced program: rewrite, allocate or bind weights, trace, check against the contract.

Only torch is used here; what a traced program becomes is a backend's business.
"""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_zoo.errors import PluginError, listing
from coreai_zoo.overlay import LayerRewrite, ParameterInfo, QuantizationSpec, TraceSpec
from coreai_zoo.quantize import blocks_per_row, has_zero_points, unpack_int4

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from coreai_zoo.store import StoredTensor, WeightStore
    from coreai_zoo.weights import WeightPlan

# ---------------------------------------------------------------------------------------------------------------------
# The module, without weights
# ---------------------------------------------------------------------------------------------------------------------


def build_module(make: Callable[[], nn.Module], rewrites: Sequence[tuple[str, LayerRewrite]]) -> nn.Module:
    """Lay the decoder out on the meta device and apply the rewrites.

    Args:
        make: builds the decoder.
        rewrites: (plugin, rewrite) pairs.

    Raises:
        PluginError: when two rewrites meet on one layer, or one matches no layer or raises.
    """
    with torch.device("meta"):
        module = make().eval()
    taken: dict[str, tuple[str, LayerRewrite]] = {}
    for plugin, rewrite in rewrites:
        paths = [path for path, _ in module.named_modules() if fnmatch.fnmatchcase(path, rewrite.pattern)]
        if not paths:
            raise PluginError(f"Rewrite {rewrite.name!r} of plugin {plugin} matches no layer ({rewrite.pattern}).")
        for path in paths:
            if path in taken:
                other_plugin, other = taken[path]
                raise PluginError(
                    f"Two rewrites meet on layer {path}: {other.name!r} of plugin {other_plugin} and {rewrite.name!r} "
                    f"of plugin {plugin}."
                )
            taken[path] = (plugin, rewrite)
    for path, (plugin, rewrite) in taken.items():
        try:
            replacement = rewrite.apply(module.get_submodule(path))
        except Exception as error:
            raise PluginError(
                f"plugin {plugin!r} failed in rewrite {rewrite.name!r} of layer {path}: "
                f"{type(error).__name__}: {error}."
            ) from error
        module.set_submodule(path, replacement)
    return module


def parameters_of(module: nn.Module) -> dict[str, ParameterInfo]:
    """Name, shape and dtype of every parameter, in the order of the module."""
    return {
        name: ParameterInfo(shape=tuple(parameter.shape), dtype=str(parameter.dtype).removeprefix("torch."))
        for name, parameter in module.named_parameters()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Quantized weights in a module
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("coreai_zoo::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: str,  # noqa: ARG001  # for the backend
) -> Tensor:
    """(codes - zero_points) * scales, blockwise along the last axis; a backend lowers it to its own operation.

    Args:
        codes: int8 or uint8, [..., C], one code per element whatever its width.
        scales: [..., blocks], of the weight's dtype.
        zero_points: as `codes`, [..., blocks], or None for zero.
        dtype: the codes' logical dtype, for example `int4`.
    """
    blocks = codes.unflatten(-1, (scales.shape[-1], -1)).to(torch.float32)
    if zero_points is not None:
        blocks = blocks - zero_points.unsqueeze(-1)
    return (blocks * scales.unsqueeze(-1).float()).flatten(-2).to(scales.dtype)


@dequantize.register_fake
def _(codes: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: str) -> Tensor:  # noqa: ARG001  # shapes only
    return torch.empty(codes.shape, dtype=scales.dtype, device=codes.device)


class Dequantize(nn.Module):
    """Parametrization that presents integer codes as the weight that a layer expects."""

    def __init__(self, scales: Tensor, zero_points: Tensor | None, dtype: str) -> None:
        super().__init__()
        self.dtype = dtype
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.zero_points = None if zero_points is None else nn.Parameter(zero_points, requires_grad=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Integer codes to the weight."""
        weight: Tensor = dequantize(codes, self.scales, self.zero_points, self.dtype)
        return weight


@frozen
class Constant:
    """A stored tensor as a backend hands it over: the bytes as they are on disk, and what they mean.

    Attributes:
        data: bytes in memory or a memory map of them; nothing is read until it is written out.
        shape: logical shape, in elements.
        dtype: logical dtype, for example `float16`, `int8` or `int4` (two to a byte, low half first).
    """

    data: Any
    shape: tuple[int, ...]
    dtype: str


class Layout(Protocol):
    """How a parameter is stored: a `weights.PlannedTensor` or a `store.StoredTensor`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""

    @property
    def dtype(self) -> str:
        """Of the plain values, or of the scales."""

    @property
    def quantization(self) -> QuantizationSpec | None:
        """How it is quantized, or None."""


class Stored(Layout, Protocol):
    """A parameter with its bytes; see `store.StoredTensor`."""

    def data(self) -> Any:
        """Plain values or codes."""

    def scales(self) -> Any:
        """One for each block."""

    def zero_points(self) -> Any:
        """One for each block, or None when all are zero."""


def allocate(module: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Give every parameter of `module` memory as it will be stored: enough to trace, and costs nothing until touched.

    Args:
        module: the decoder, on the meta device.
        layouts: how each of its parameters is stored, by name.
    """
    for name, _ in list(module.named_parameters()):
        layout = layouts[name]
        spec, dtype = layout.quantization, getattr(torch, layout.dtype)
        if spec is None:
            _put(module, name, torch.empty(layout.shape, dtype=dtype))
            continue
        per_block = (*layout.shape[:-1], blocks_per_row(layout.shape[-1], spec))
        zero_points = torch.empty(per_block, dtype=_carrier(spec)) if has_zero_points(spec) else None
        codes = torch.empty(layout.shape, dtype=_carrier(spec))
        _put(module, name, codes, Dequantize(torch.empty(per_block, dtype=dtype), zero_points, spec.dtype))


def bind(module: nn.Module, store: WeightStore) -> None:
    """Give every parameter of `module` its stored value, memory-mapped; 4-bit codes are unpacked in memory.

    Args:
        module: the decoder, on the meta device.
        store: holds every parameter.
    """
    with warnings.catch_warnings():
        # Mapped copy-on-write: nothing writes to them, and torch need not warn that nothing may.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, _ in list(module.named_parameters()):
            stored = store[name]
            if stored.quantization is None:
                _put(module, name, torch.from_numpy(stored.data()))
                continue
            codes = _unpacked(torch.from_numpy(stored.data()), stored.shape, stored.quantization)
            scales = torch.from_numpy(stored.scales())
            _put(module, name, codes, Dequantize(scales, _zero_points(stored), stored.quantization.dtype))


def _put(module: nn.Module, name: str, value: Tensor, dequantize: Dequantize | None = None) -> None:
    """Make `value` the parameter called `name`, as the integers that `dequantize` takes if that is given."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    if dequantize is not None:
        parametrize.register_parametrization(owner, leaf, dequantize, unsafe=True)


def constants(store: WeightStore | Mapping[str, Stored], names: Iterable[str]) -> dict[str, Constant]:
    """The stored bytes of the parameters `names`, by the names that they have in the state of a bound module."""
    found: dict[str, Constant] = {}
    for name in names:
        stored = store[name]
        spec = stored.quantization
        if spec is None:
            found[name] = Constant(stored.data(), stored.shape, stored.dtype)
            continue
        scales, zero_points = stored.scales(), stored.zero_points()
        names_of = quantized_names(name)
        found[names_of[0]] = Constant(stored.data(), stored.shape, spec.dtype)
        found[names_of[1]] = Constant(scales, tuple(scales.shape), stored.dtype)
        if zero_points is not None:
            found[names_of[2]] = Constant(zero_points, tuple(scales.shape), spec.dtype)
    return found


def state_of(module: nn.Module, plan: WeightPlan) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and logical dtype of each state of `module` once `plan` is bound to it, in the order of `bind`'s constants.

    Names are those of the constants; buffers are among them.
    """
    state: dict[str, tuple[tuple[int, ...], str]] = {}
    for tensor in plan.tensors:
        spec = tensor.quantization
        if spec is None:
            state[tensor.name] = (tensor.shape, tensor.dtype)
            continue
        codes, scales, zero_points = quantized_names(tensor.name)
        blocks = (*tensor.shape[:-1], blocks_per_row(tensor.columns, spec))
        state[codes] = (tensor.shape, spec.dtype)
        state[scales] = (blocks, tensor.dtype)
        if has_zero_points(spec):
            state[zero_points] = (blocks, spec.dtype)
    for name, buffer in module.named_buffers():
        state[name] = (tuple(buffer.shape), str(buffer.dtype).removeprefix("torch."))
    return state


def quantized_names(name: str) -> tuple[str, str, str]:
    """Names of the integers, scales and zero points of the quantized parameter `name`, as `bind` makes them."""
    path, _, leaf = name.rpartition(".")
    state = f"{path}.parametrizations.{leaf}." if path else f"parametrizations.{leaf}."
    return state + "original", state + "0.scales", state + "0.zero_points"


def scales_name(codes: str) -> str:
    """Name of the scales that belong to the integers called `codes`; see `quantized_names`."""
    return f"{codes.removesuffix('original')}0.scales"


def _carrier(spec: QuantizationSpec) -> torch.dtype:
    return torch.int8 if spec.signed else torch.uint8


def _zero_points(stored: StoredTensor) -> Tensor | None:
    data, spec = stored.zero_points(), stored.quantization
    if data is None or spec is None:
        return None
    return _unpacked(torch.from_numpy(data), tuple(stored.scales().shape), spec)


def _unpacked(data: Tensor, shape: tuple[int, ...], spec: QuantizationSpec) -> Tensor:
    if spec.bits == 8:
        return data.reshape(shape)
    # Zero points are packed as one row; an odd number of them leaves the last half-byte unused.
    codes = unpack_int4(data.reshape(-1, data.shape[-1]), signed=spec.signed)
    return codes.reshape(-1)[: math.prod(shape)].reshape(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Tracing
# ---------------------------------------------------------------------------------------------------------------------


def example_inputs(spec: TraceSpec) -> tuple[Tensor, ...]:
    """Tensors to trace with: inputs, then states, all zero but for position ids."""
    sizes = {name: axis.example for name, axis in spec.axes.items()}
    tensors = []
    for tensor in (*spec.inputs, *spec.states):
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        tensors.append(torch.zeros(shape, dtype=getattr(torch, tensor.dtype)))
    return tuple(tensors)


def dynamic_shapes(spec: TraceSpec) -> tuple[dict[int, Any], ...]:
    """The dynamic axes in the form that `torch.export.export` takes."""
    # torch.export specialises sizes 0 and 1, so the range that it is told begins at 2; 1 runs all the same.
    dims = {
        name: torch.export.Dim(name, min=max(2, axis.minimum), max=max(2, axis.maximum))
        for name, axis in spec.axes.items()
    }
    return tuple(
        {index: dims[size] for index, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in (*spec.inputs, *spec.states)
    )


def trace(module: nn.Module, spec: TraceSpec, decompositions: Mapping[Any, Any]) -> ExportedProgram:
    """Trace `module` once and check the result against `spec`.

    Raises:
        PluginError: when the traced function has another output than the contract, leaves a state unwritten, or writes
            to something that is not a state.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(module, example_inputs(spec), dynamic_shapes=dynamic_shapes(spec), strict=False)
        program = program.run_decompositions(dict(decompositions))
    check_traced(program, spec)
    return program


def check_traced(program: ExportedProgram, spec: TraceSpec) -> None:
    """Compare a traced program's outputs and mutations with the spec; see `trace`."""
    signature = program.graph_signature
    names = dict(zip(signature.user_inputs, (tensor.name for tensor in (*spec.inputs, *spec.states)), strict=True))
    mutated = {names[str(argument)] for argument in signature.user_inputs_to_mutate.values()}
    states = {state.name for state in spec.states}
    strays = [f"input {name}" for name in sorted(mutated - states)]
    strays += [f"buffer {name}" for name in sorted(signature.buffers_to_mutate.values())]
    require_contract(program, spec, mutated & states, strays)


def require_contract(program: ExportedProgram, spec: TraceSpec, written: set[str], strays: Sequence[str]) -> None:
    """Compare what a traced program gives and writes with the spec, however it was traced.

    Args:
        program: its last results are the outputs.
        spec: what it has to be.
        written: names of the states that it writes.
        strays: what it writes that is no state, in words.

    Raises:
        PluginError: with everything that is not so.
    """
    states = {state.name for state in spec.states}
    problems = [f"state {name} is never written" for name in sorted(states - written)]
    problems += [f"{stray} is written" for stray in strays]
    outputs = [node.meta["val"] for node in program.graph.output_node().args[0]][-len(spec.outputs) :]
    for tensor, value in zip(spec.outputs, outputs, strict=True):
        found = (tuple(value.shape), str(value.dtype).removeprefix("torch."))
        if found != (tensor.shape, tensor.dtype):
            problems.append(f"output {tensor.name} is {found[1]} {found[0]} instead of {tensor.dtype} {tensor.shape}")
    if problems:
        raise PluginError(f"The traced decoder does not meet its contract: {listing(problems)}.")
