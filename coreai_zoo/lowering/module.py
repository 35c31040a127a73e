"""From an overlay's decoder to a traced program: rewrite, allocate weights, trace, check against the contract.

Only torch is used here; what a traced program becomes is a backend's business.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_zoo.backend import Constant
from coreai_zoo.errors import PluginError
from coreai_zoo.lowering import mistakes
from coreai_zoo.overlay import LayerRewrite, ParameterInfo
from coreai_zoo.tracebacks import raised_at
from coreai_zoo.weights.formats import ArrayKind, Format, StoredArray

if TYPE_CHECKING:
    from coreai_zoo.weights.plan import PlannedTensor, WeightPlan

# ---------------------------------------------------------------------------------------------------------------------
# The module, without weights
# ---------------------------------------------------------------------------------------------------------------------


def build_module(make: Callable[[], nn.Module], rewrites: Sequence[tuple[str, LayerRewrite]]) -> nn.Module:
    """Lay the decoder out on the meta device and apply the rewrites.

    Args:
        make: makes the decoder.
        rewrites: pairs of a plugin's name and its rewrite.

    Raises:
        PluginError: when two rewrites meet on one layer, or one matches no layer or raises.
    """
    with torch.device("meta"):
        module = make()
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
        layer = module.get_submodule(path)
        try:
            replacement = rewrite.apply(layer)
        except Exception as error:
            raise PluginError(
                f"plugin {plugin!r} failed in rewrite {rewrite.name!r} of layer {path}: {mistakes.brief(error)}",
                raised_at(error),
            ) from error
        if not isinstance(replacement, nn.Module):
            raise PluginError(
                f"Rewrite {rewrite.name!r} of plugin {plugin} makes {type(replacement).__name__} of layer {path}, and "
                "no module."
            )
        if rewrite.keeps_parameters and parameters_of(replacement) != parameters_of(layer):
            raise PluginError(
                f"Rewrite {rewrite.name!r} of plugin {plugin} changes the parameters of layer {path}, and promises in "
                "`keeps_parameters` that it does not."
            )
        module.set_submodule(path, replacement)
    return module.eval()  # what a rewrite made, too


def parameters_of(module: nn.Module) -> dict[str, ParameterInfo]:
    """Shape and dtype of every parameter by name, in the order of the module."""
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
    """A parametrization that presents integer codes as the weight that a layer expects."""

    def __init__(self, scales: Tensor, zero_points: Tensor | None, dtype: str) -> None:
        super().__init__()
        self.dtype = dtype
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.zero_points = None if zero_points is None else nn.Parameter(zero_points, requires_grad=False)

    def forward(self, codes: Tensor) -> Tensor:
        """The weight, from its integer codes."""
        weight: Tensor = dequantize(codes, self.scales, self.zero_points, self.dtype)
        return weight


class Stored(Protocol):
    """A parameter with its bytes, for example a `store.StoredTensor`."""

    @property
    def name(self) -> str:
        """The parameter that it is stored as: several may share their bytes."""

    @property
    def format(self) -> Format:
        """How it is stored."""

    def array(self, kind: ArrayKind) -> Any:
        """One of its arrays as it lies in memory."""


def allocate(module: nn.Module, formats: Mapping[str, Format]) -> None:
    """Give every parameter of `module` memory in its stored format: enough to trace, and free until it is touched.

    Args:
        module: the decoder, on the meta device.
        formats: how each of its parameters is stored, by name.
    """
    for name, _ in list(module.named_parameters()):
        format_ = formats[name]
        shapes = {kind: format_.shape if kind == "data" else array.shape for kind, array in format_.arrays.items()}
        values = {kind: torch.empty(shapes[kind], dtype=_carrier(array)) for kind, array in format_.arrays.items()}
        _put(module, name, format_, values)


def _carrier(array: StoredArray) -> torch.dtype:
    """The dtype in which torch holds an element: a byte for one of 4 bits."""
    packed = {"int4": torch.int8, "uint4": torch.uint8, "uint6": torch.uint8}
    return packed[array.dtype] if array.packed else getattr(torch, array.dtype)


def _put(module: nn.Module, name: str, format_: Format, values: Mapping[ArrayKind, Tensor]) -> None:
    """Make `values` the parameter called `name`: as they are, or as the integers, scales and zero points of it."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(values["data"], requires_grad=False))
    if format_.quantization is not None:
        dequantize = Dequantize(values["scales"], values.get("zero_points"), format_.quantization.dtype)
        parametrize.register_parametrization(owner, leaf, dequantize, unsafe=True)


def constants(parameters: Mapping[str, Stored]) -> dict[str, Constant]:
    """The stored bytes of parameters, each given by its name, by the names that they have in the state of a module.

    Where two parameters share their bytes, theirs is one `Constant` under both names.
    """
    return _constants(parameters, lambda stored, kind: stored.array(kind))


def planned_constants(plan: WeightPlan) -> dict[str, Constant]:
    """The same constants before there are any bytes: their data are None."""
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    return _constants({tensor.name: tensors[tensor.stored_as] for tensor in plan.tensors}, lambda *_: None)


_Named = TypeVar("_Named", bound="Stored | PlannedTensor")


def _constants(parameters: Mapping[str, _Named], data: Callable[[_Named, ArrayKind], Any]) -> dict[str, Constant]:
    """The constants of parameters, of each of which it is said what it is stored as, and where its data are."""
    found: dict[str, Constant] = {}
    shared: dict[tuple[str, ArrayKind], Constant] = {}
    for name, stored in parameters.items():
        for kind, state in stored.format.state_names(name).items():
            array = stored.format.arrays[kind]
            if (stored.name, kind) not in shared:
                transposed = stored.format.transposed
                shared[stored.name, kind] = Constant(data(stored, kind), array.shape, array.dtype, transposed)
            found[state] = shared[stored.name, kind]
    return found


def state_of(plan: WeightPlan) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and logical dtype of each array of the weights of `plan`, by the names of `constants`; shared ones once."""
    return {
        name: (tensor.format.arrays[kind].shape, tensor.format.arrays[kind].dtype)
        for tensor in plan.stored
        for kind, name in tensor.format.state_names(tensor.name).items()
    }
