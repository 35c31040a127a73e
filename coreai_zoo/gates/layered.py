"""The candidate `torch`: an overlay's decoder run in PyTorch, one layer in memory at a time.

It is the module that the asset was lowered from, with the same rewrites, in the same precision: fp16 between
operations, sums in fp32. A layer is filled, run over all tokens of the prompt one by one as an engine would, and
emptied before the next one is filled.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from coreai_zoo.engine import prompt_chunks
from coreai_zoo.errors import BadInput
from coreai_zoo.gate import Activations
from coreai_zoo.gates.weights import WeightSource
from coreai_zoo.overlay import BatchedDecoder, LayeredDecoder, RoleKind
from coreai_zoo.signature import InputSpec, StateSpec, TraceSpec
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan
from coreai_zoo.weights.quantizer import chunk_rows, one_thread, workers

_WORTH_THREADS = 1 << 22  # elements of a matrix
HEAD_CHUNK_ELEMENTS = 1 << 25
"""Elements of the head that are multiplied at a time."""
_STATE_BYTES = 1 << 28  # of all prompts that run side by side: three of 512 tokens for 27 G parameters


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
        shows_layers: whether hidden states and router logits are kept; they take more memory than all else.
        pieces: the lengths in which a prompt of so many tokens is fed where a call takes more than one; None for as few
            as an engine makes of it.
    """

    module: Any
    plan: WeightPlan
    signature: TraceSpec
    weights: WeightSource
    on_layer: Callable[[], None] = lambda: None
    shows_layers: bool = True
    pieces: Callable[[int], Sequence[int]] | None = None
    _buffers: dict[tuple[str, tuple[int, ...]], Tensor] = field(factory=dict, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.module, LayeredDecoder):
            raise BadInput(
                f"A {type(self.module).__name__} cannot be run layer by layer: it is no overlay.LayeredDecoder.",
                "Gate the asset on the runtime of its backend, by --candidate auto.",
            )

    @property
    def name(self) -> str:
        """The candidate and its weights, for the report."""
        return f"the overlay in PyTorch on {self.weights.name}"

    def run(self, tokens: Sequence[int]) -> Activations:
        """Teacher-forced logits in the contract's dtype, hidden states and router logits in float32."""
        return self.run_many([tokens])[0]

    def run_many(self, prompts: Sequence[Sequence[int]]) -> list[Activations]:
        """The same of several prompts, as many at once as the memory for their states allows: weights are read once.

        Where a call takes one token of each, what runs beside a prompt changes nothing in it but the order of sums:
        torch has kernels by the number of rows.
        """
        longest_first = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        together = isinstance(self.module, BatchedDecoder) and self.signature.query_length == 1
        found: dict[int, Activations] = {}
        while longest_first:
            count = self._at_once(len(prompts[longest_first[0]]))
            places, longest_first = longest_first[:count], longest_first[count:]
            chosen = [prompts[place] for place in places]
            batches = [chosen] if together else [[tokens] for tokens in chosen]
            found |= zip(places, self._run_batches(batches), strict=True)
        return [found[place] for place in range(len(prompts))]

    def _at_once(self, positions: int) -> int:
        """How many prompts of at most `positions` tokens run at once."""
        one = sum(_zeros(state.shape, state.dtype, positions).nbytes for state in self.signature.states)
        return max(1, _STATE_BYTES // max(1, one))

    def _run_batches(self, batches: Sequence[Sequence[Sequence[int]]]) -> list[Activations]:
        """Prompts through one layer after the other, those of a batch in the same calls, the longest of it first."""
        lengths = [[len(tokens) for tokens in batch] for batch in batches]
        states = [[self._state(state, len(own), own[0]) for state in self.signature.states] for own in lengths]
        routers: dict[str, list[Tensor]] = {}
        watched = self._watched(routers) if self.shows_layers else contextlib.nullcontext()
        with torch.no_grad(), watched, self._threads():
            x = [self._calls(batch) for batch in batches]
            hidden = [_by_prompt(x, lengths)] if self.shows_layers else []
            for index, path in enumerate(self.module.layer_paths):
                with self._filled(path):
                    for calls, own in zip(x, states, strict=True):
                        self._run_layer(index, calls, own)
                if self.shows_layers:
                    hidden.append(_by_prompt(x, lengths))
                for _ in itertools.chain.from_iterable(batches):
                    self.on_layer()
            self._buffers.clear()
            logits = self._logits(_by_prompt(x, lengths))
        # A router's calls are those of its layer, batch after batch.
        chosen = [_by_prompt(_parts(calls, [len(own) for own in x]), lengths) for calls in routers.values()]
        return [
            Activations(
                rows.numpy(),
                [layer[place].float().numpy() for layer in hidden] or None,
                [router[place].float().numpy() for router in chosen] or None,
            )
            for place, rows in enumerate(logits)
        ]

    def _run_layer(self, index: int, x: list[Tensor], states: Sequence[Tensor]) -> None:
        """Replace the input of each call, [B, S, D], by the output of one layer."""
        length = 0
        for place, tensor in enumerate(x):
            running, count = tensor.shape[:2]
            positions = torch.tensor(self._positions.values([0] * count, length))
            length += count
            x[place] = self.module.layer(
                index, tensor, positions.to(torch.int32)[None], self._of_first(running, states)
            )

    def _state(self, spec: StateSpec, prompts: int, capacity: int) -> Tensor:
        """A fresh state of `prompts` prompts."""
        one = _zeros(spec.shape, spec.dtype, capacity)
        if prompts == 1:
            return one
        shape = [*one.shape]
        shape[self.module.batch_axis] = prompts
        return one.new_zeros(shape)

    def _of_first(self, prompts: int, states: Sequence[Tensor]) -> Sequence[Tensor]:
        """The states of the first prompts, in the same memory: those that have ended are the last ones."""
        if not isinstance(self.module, BatchedDecoder):
            return states
        return [state.narrow(self.module.batch_axis, 0, prompts) for state in states]

    @property
    def _positions(self) -> InputSpec:
        """The input that holds positions."""
        return next(tensor for tensor in self.signature.inputs if tensor.holds != "tokens")

    def _threads(self) -> contextlib.AbstractContextManager[None]:
        """One thread where matrices are small: there torch's half-precision product loses more time than it gains."""
        small = max(tensor.parameters for tensor in self.plan.tensors) < _WORTH_THREADS
        return one_thread() if small else contextlib.nullcontext()

    # -- the ends

    def _calls(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The input of each call: [B, 1, D] per token of the prompts that have one left.

        Where the function takes more, there is one prompt, in `pieces` [1, S, D].
        """
        embedded = self._embed([token for tokens in prompts for token in tokens])  # [1, all tokens, D]
        rows = embedded[0].split([len(tokens) for tokens in prompts])
        if len(prompts) == 1:
            pieces = self.pieces or (lambda tokens: prompt_chunks(tokens, self.signature.most_tokens))
            return list(embedded.split(list(pieces(len(prompts[0]))), dim=1))
        return [
            torch.stack([row[place : place + 1] for row in rows if len(row) > place]) for place in range(len(rows[0]))
        ]

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        """[1, tokens, D], with only the rows of the table in memory that they need."""
        distinct, places = torch.tensor(list(tokens)).unique(return_inverse=True)
        planned = self._only("embedding")
        rows = torch.empty(len(distinct), planned.format.columns, dtype=getattr(torch, planned.dtype))
        for row, token in enumerate(distinct.tolist()):
            self.weights.read_rows(planned.name, token, token + 1, rows[row : row + 1])
        with self._holding({planned.name: rows}):
            embedded: Tensor = self.module.embed(places[None].to(torch.int32))
        return embedded

    def _logits(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Each prompt's [P, D] to its [P, V], a few rows of the head at a time."""
        planned = self._only("head")
        step = max(1, HEAD_CHUNK_ELEMENTS // planned.format.columns)
        together = isinstance(self.module, BatchedDecoder)  # the tokens of a prompt in one call, or a call for each
        calls = [[rows.unsqueeze(1)] if together else rows[:, None].split(1) for rows in prompts]
        parts: list[list[Tensor]] = [[] for _ in prompts]
        layers = tuple(f"{path}." for path in self.module.layer_paths)
        ends = {planned.name, self._only("embedding").name}
        rest = [t for t in self.plan.tensors if t.name not in ends and not t.name.startswith(layers)]
        with self._holding({tensor.name: self._values(tensor) for tensor in rest}):
            for start in range(0, planned.format.rows, step):
                rows = self._values(planned, start, min(start + step, planned.format.rows))
                with self._holding({planned.name: rows}):
                    for found, own in zip(parts, calls, strict=True):
                        found.append(torch.cat([self.module.head(call).flatten(0, 1) for call in own]))
        return [torch.cat(found, dim=-1) for found in parts]

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
        """Within the block, collect every router's output, [B, S, experts] per call, by the router's parameter."""
        with contextlib.ExitStack() as hooks:
            for tensor in self.plan.tensors:
                if self.plan.roles[tensor.role].router:
                    router = self.module.get_submodule(tensor.name.rpartition(".")[0])
                    rows = found.setdefault(tensor.name, [])

                    def keep(_module: nn.Module, _x: object, output: Tensor, rows: list[Tensor] = rows) -> None:
                        rows.append(output if output.dim() > 2 else output[None])  # some leave out the batch

                    hooks.callback(router.register_forward_hook(keep).remove)
            yield


def _parts(calls: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """Some calls, then some more, and so on."""
    rest = iter(calls)
    return [list(itertools.islice(rest, count)) for count in counts]


def _by_prompt(batches: Sequence[Sequence[Tensor]], lengths: Sequence[Sequence[int]]) -> list[Tensor]:
    """The rows of each prompt, [P, D], out of calls [B, S, D] of which the prompts that have ended are no part."""
    return [
        torch.cat([call[prompt] for call in calls[:length]])
        for calls, own in zip(batches, lengths, strict=True)
        for prompt, length in enumerate(own)
    ]


def _zeros(shape: Sequence[int | str], dtype: str, capacity: int) -> Tensor:
    """A fresh state with room for `capacity` positions."""
    return torch.zeros([capacity if isinstance(size, str) else size for size in shape], dtype=getattr(torch, dtype))
