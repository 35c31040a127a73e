"""The candidate `torch`: an overlay's decoder run in PyTorch, one layer in memory at a time.

It is the module that the asset was lowered from, with the same rewrites, in the same precision: fp16 between
operations, sums in fp32. A layer is filled, run over all tokens of the prompt one by one as an engine would, and
emptied before the next one is filled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from coreai_zoo.errors import BadInput
from coreai_zoo.gate import Activations
from coreai_zoo.gates.weights import WeightSource
from coreai_zoo.overlay import LayeredDecoder, RoleKind
from coreai_zoo.signature import InputSpec, TraceSpec
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan
from coreai_zoo.weights.quantizer import chunk_rows, workers

_WORTH_THREADS = 1 << 22  # elements of a matrix
HEAD_CHUNK_ELEMENTS = 1 << 25
"""Elements of the head that are multiplied at a time."""


@define
class TorchCandidate:
    """An overlay's decoder on given weights; see `coreai_zoo.gate.Model`.

    Attributes:
        module: the decoder after its rewrites, on the meta device, a `LayeredDecoder`. Only one candidate may run on it
            at a time.
        plan: names, shapes and roles of its weights.
        signature: the states of its function.
        weights: the values of its weights.
        on_layer: called after each layer.
    """

    module: Any
    plan: WeightPlan
    signature: TraceSpec
    weights: WeightSource
    on_layer: Callable[[], None] = lambda: None
    _buffers: dict[tuple[str, tuple[int, ...]], Tensor] = field(factory=dict, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.module, LayeredDecoder):
            raise BadInput(
                f"A {type(self.module).__name__} cannot be run layer by layer: it is no overlay.LayeredDecoder.",
                "Gate the asset itself: --candidate coreai, or mil.",
            )

    @property
    def name(self) -> str:
        """The candidate and its weights, for the report."""
        return f"the overlay in PyTorch on {self.weights.name}"

    def run(self, tokens: Sequence[int]) -> Activations:
        """Teacher-forced logits in the contract's dtype, hidden states and router logits in float32."""
        states = [_zeros(state.shape, state.dtype, len(tokens)) for state in self.signature.states]
        routers: dict[str, list[Tensor]] = {}
        with torch.no_grad(), self._watched(routers), self._threads():
            x = self._embed(tokens)
            hidden = [torch.cat(x, dim=1)[0].float().numpy()]
            for index, path in enumerate(self.module.layer_paths):
                with self._filled(path):
                    length = 0
                    for place, tensor in enumerate(x):
                        positions = torch.tensor(self._positions.values([0] * tensor.shape[1], length))
                        length += tensor.shape[1]
                        x[place] = self.module.layer(index, tensor, positions.to(torch.int32)[None], states)
                hidden.append(torch.cat(x, dim=1)[0].float().numpy())
                self.on_layer()
            self._buffers.clear()
            logits = self._logits(torch.cat(x, dim=1))
        found = [torch.cat(rows).float().numpy() for rows in routers.values()]
        return Activations(logits.numpy(), hidden, found or None)

    @property
    def _positions(self) -> InputSpec:
        """The input that holds positions."""
        return next(tensor for tensor in self.signature.inputs if tensor.holds != "tokens")

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        """One thread where matrices are small: there torch's half-precision product loses more time than it gains."""
        before = torch.get_num_threads()
        workers()  # they are made once, as many as torch has threads then: before it has one
        if max(tensor.parameters for tensor in self.plan.tensors) < _WORTH_THREADS:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    # -- the ends

    def _embed(self, tokens: Sequence[int]) -> list[Tensor]:
        """The input of each call: [1, 1, D] per token, or [1, S, D] at once where the contract allows."""
        distinct, places = torch.tensor(list(tokens)).unique(return_inverse=True)
        planned = self._only("embedding")
        rows = torch.empty(len(distinct), planned.format.columns, dtype=getattr(torch, planned.dtype))
        for row, token in enumerate(distinct.tolist()):
            self.weights.read_rows(planned.name, token, token + 1, rows[row : row + 1])
        with self._holding({planned.name: rows}):
            embedded: Tensor = self.module.embed(places[None].to(torch.int32))
        return list(embedded.split(self.signature.query_length or len(tokens), dim=1))

    def _logits(self, x: Tensor) -> Tensor:
        """[1, P, D] to [P, V], a few rows of the head at a time."""
        planned = self._only("head")
        step = max(1, HEAD_CHUNK_ELEMENTS // planned.format.columns)
        parts = []
        layers = tuple(f"{path}." for path in self.module.layer_paths)
        ends = {planned.name, self._only("embedding").name}
        rest = [t for t in self.plan.tensors if t.name not in ends and not t.name.startswith(layers)]
        with self._holding({tensor.name: self._values(tensor) for tensor in rest}):
            for start in range(0, planned.format.rows, step):
                rows = self._values(planned, start, min(start + step, planned.format.rows))
                with self._holding({planned.name: rows}):
                    parts.append(
                        torch.cat([self.module.head(x[:, place : place + 1]) for place in range(x.shape[1])], 1)
                    )
        return torch.cat(parts, dim=-1)[0]

    def _only(self, kind: RoleKind) -> PlannedTensor:
        found = self.plan.of_kind(kind)
        if len(found) != 1:
            raise BadInput(f"The decoder has {len(found)} parameters of the kind {kind!r}, not one.")
        return found[0]

    # -- weights

    @contextlib.contextmanager
    def _filled(self, path: str) -> Iterator[None]:
        """Within the block, the parameters below `path` have values; layers of one kind share the memory."""
        values = {}
        for tensor in self.plan.tensors:
            if tensor.name.startswith(f"{path}."):
                key = (tensor.name.removeprefix(path), tensor.shape)
                if key not in self._buffers:
                    self._buffers[key] = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
                self._fill(tensor, self._buffers[key].view(tensor.format.rows, tensor.format.columns))
                values[tensor.name] = self._buffers[key]
        with self._holding(values):
            yield

    def _values(self, tensor: PlannedTensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a parameter as a matrix, or the whole of it in its own shape."""
        rows = tensor.format.rows if stop is None else stop
        out = torch.empty(rows - start, tensor.format.columns, dtype=getattr(torch, tensor.dtype))
        self._fill(tensor, out, start)
        return out.view(tensor.shape) if stop is None else out

    def _fill(self, tensor: PlannedTensor, out: Tensor, first: int = 0) -> None:
        """Read rows of a parameter from row `first` on, on all cores."""
        step = chunk_rows(tensor.format.columns)

        def read(start: int) -> None:
            part = out[start : start + step]
            self.weights.read_rows(tensor.name, first + start, first + start + len(part), part)

        list(workers().map(read, range(0, len(out), step)))

    @contextlib.contextmanager
    def _holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block, tensors stand in the place of parameters."""
        before: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for name, tensor in values.items():
                path, _, leaf = name.rpartition(".")
                owner = self.module.get_submodule(path)
                before.append((owner, leaf, getattr(owner, leaf)))
                setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
            yield
        finally:
            for owner, leaf, parameter in before:
                setattr(owner, leaf, parameter)

    @contextlib.contextmanager
    def _watched(self, found: dict[str, list[Tensor]]) -> Iterator[None]:
        """Within the block, collect every router's output, [tokens, experts] per call, by the router's parameter."""
        with contextlib.ExitStack() as hooks:
            for tensor in self.plan.tensors:
                if self.plan.roles[tensor.role].router:
                    router = self.module.get_submodule(tensor.name.rpartition(".")[0])
                    rows = found.setdefault(tensor.name, [])

                    def keep(_module: nn.Module, _x: object, output: Tensor, rows: list[Tensor] = rows) -> None:
                        rows.append(output.flatten(0, -2))

                    hooks.callback(router.register_forward_hook(keep).remove)
            yield


def _zeros(shape: Sequence[int | str], dtype: str, capacity: int) -> Tensor:
    """A fresh state with room for `capacity` positions."""
    return torch.zeros([capacity if isinstance(size, str) else size for size in shape], dtype=getattr(torch, dtype))
