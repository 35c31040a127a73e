"""The weights of a candidate: out of a bundle's asset, or out of the checkpoint by a plan.

A source gives rows of a parameter seen as a matrix along its last axis, in the values that the asset computes with. A
reader of whole layers asks for a chunk of rows per call, from several threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from attrs import field, frozen
from torch import Tensor

from coreai_zoo.backend import Backend
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.lowering.module import state_of
from coreai_zoo.weights.convert import values_of
from coreai_zoo.weights.formats import ArrayKind, unpacked, unpacked_rows
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan
from coreai_zoo.weights.quantizer import scratch


class WeightSource(Protocol):
    """Values of a decoder's parameters."""

    @property
    def name(self) -> str:
        """A name for the weights, for the report."""

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Write rows `start` to `stop` of the parameter `name` to `out`, [stop - start, columns] in its own dtype.

        Raises:
            KeyError: when there is no such parameter.
        """


@frozen
class AssetWeights:
    """The weights that an asset holds, turned back from integers to values as the asset does it: in one rounding.

    Attributes:
        name: what they are, for the report.
        plan: how each parameter is stored, by its name.
        state: the bytes of the asset's constants, uint8, see `Backend.state`.
    """

    name: str
    plan: Mapping[str, PlannedTensor]
    state: Mapping[str, Tensor]

    @classmethod
    def open(cls, asset: Path, backend: Backend, function: str, plan: WeightPlan) -> AssetWeights:
        """Map the weights of an asset.

        Args:
            asset: the asset.
            backend: the backend that wrote it.
            function: the function whose weights are read.
            plan: the plan of its weights.

        Raises:
            CheckFailed: when it cannot be read, or holds other weights than the plan says.
        """
        state = backend.state(asset, function, state_of(plan))
        with warnings.catch_warnings():
            # Nothing writes to them, and torch need not warn that nothing may.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            tensors = {name: torch.frombuffer(view, dtype=torch.uint8) for name, view in state.items()}
        return cls(f"the weights of {asset.name}", {tensor.name: tensor for tensor in plan.tensors}, tensors)

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """See `WeightSource`."""
        tensor = self.plan[name]
        arrays = {kind: self._rows(tensor, kind, start, stop) for kind in tensor.format.arrays}
        codes = arrays["data"]
        if tensor.quantization is None:
            out.copy_(codes)
            return
        if "table" in arrays:
            codes = arrays["table"][codes.int()]
        scales, zero_points = arrays["scales"], arrays.get("zero_points")
        values, _ = scratch(codes.shape)
        blocks = values.copy_(codes).view(*scales.shape, -1)
        if zero_points is not None:
            blocks.sub_(zero_points.float().unsqueeze(-1))
        out.copy_(blocks.mul_(scales.float().unsqueeze(-1)).view(codes.shape))

    def _rows(self, tensor: PlannedTensor, kind: ArrayKind, start: int, stop: int) -> Tensor:
        """Rows of one of a weight's arrays, as a matrix."""
        array = tensor.format.arrays[kind]
        memory = self.state[tensor.format.state_names(tensor.stored_as)[kind]].view(getattr(torch, array.memory_dtype))
        if tensor.format.transposed:
            return _rows_of_transposed(memory.view(-1, *array.shape[-2:]), start, stop)
        if kind == "table":
            return memory
        if not array.packed:
            return memory.view(tensor.format.rows, -1)[start:stop]
        if kind == "data":
            return unpacked_rows(memory.view(tensor.format.rows, -1)[start:stop], array.dtype)
        # Packed as one row, whose last half-byte may be unused.
        return unpacked(memory, array).view(tensor.format.rows, -1)[start:stop]


def _rows_of_transposed(stack: Tensor, start: int, stop: int) -> Tensor:
    """Rows of a stack of matrices [N, R, C], of which the transposes, [N, C, R], are stored: [stop - start, C]."""
    height = stack.shape[-1]
    parts = []
    for index in range(start // height, -(-stop // height)):
        first = index * height
        parts.append(stack[index].T[max(start - first, 0) : stop - first])
    return torch.cat(parts)


@frozen
class CheckpointWeights:
    """The weights that a plan makes of a checkpoint; where it quantizes, turned to integers and back.

    A plan that quantizes nothing shows what half precision alone does to a model. A plan that quantizes a part shows
    what that part does.

    Attributes:
        name: what they are, for the report.
        checkpoint: the checkpoint.
        plan: where each parameter comes from and how it is stored.
    """

    name: str
    checkpoint: Checkpoint
    plan: WeightPlan
    _tensors: Mapping[str, PlannedTensor] = field(init=False, repr=False)

    @_tensors.default
    def _by_name(self) -> Mapping[str, PlannedTensor]:
        return {tensor.name: tensor for tensor in self.plan.tensors}

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """See `WeightSource`.

        Raises:
            BadInput: when the checkpoint holds a value that is not finite or overflows.
        """
        planned = self._tensors[name]
        for source in planned.sources:
            first, last = max(start, source.start), min(stop, source.stop)
            if first < last:
                values = values_of(self.checkpoint, planned, source.key, first - source.start, last - source.start)
                out[first - start : last - start].copy_(values)
