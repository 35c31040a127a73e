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
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_zoo.backend import Constant
from coreai_zoo.errors import PluginError
from coreai_zoo.lowering import mistakes
from coreai_zoo.names import quantized_names
from coreai_zoo.overlay import LayerRewrite, ParameterInfo
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.weights.formats import blocks_per_row, has_zero_points, unpack_int4

if TYPE_CHECKING:
    from coreai_zoo.weights.plan import WeightPlan
    from coreai_zoo.weights.store import StoredTensor, WeightStore

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
    with torch.device("meta"), mistakes.located():
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
        with mistakes.located():
            try:
                replacement = rewrite.apply(module.get_submodule(path))
            except Exception as error:
                raise PluginError(
                    f"plugin {plugin!r} failed in rewrite {rewrite.name!r} of layer {path}: {mistakes.brief(error)}"
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
