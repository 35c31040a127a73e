"""The overlay's decoder with a checkpoint's weights, read the way a build reads them."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.contracts import STATIC_S1, Contract
from coreai_zoo.lowering import module as lowering
from coreai_zoo.lowering.module import build_module, parameters_of
from coreai_zoo.overlay import LayerRewrite
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.signature import KVCache, TraceSpec
from coreai_zoo.weights.formats import ArrayKind, unpacked
from coreai_zoo.weights.plan import PlannedTensor, plan_weights
from coreai_zoo.weights.store import StoredTensor, WeightStore
from coreai_zoo_overlays import qwen3_5

OVERLAY = qwen3_5.Qwen35Overlay()


def rewrites_of(contract: Contract = STATIC_S1, function: str = "main") -> tuple[LayerRewrite, ...]:
    """The overlay's rewrites of a function of a contract."""
    return qwen3_5.layer_rewrites(contract, contract.functions(KVCache(1, 1, 1), (), 8, 64)[function])


def tensors_of(store: WeightStore, tensors: Iterable[PlannedTensor]) -> dict[str, StoredTensor]:
    """What a store holds of each tensor of a plan, by name."""
    return {each.name: store[each.stored_as] for each in tensors}


def bind(module: nn.Module, parameters: Mapping[str, StoredTensor]) -> None:
    """Give every parameter of `module` its stored value, memory-mapped.

    In memory packed integers are unpacked, indices are the integers of their table, and what is stored transposed is
    laid out as the parameter is.

    Args:
        module: the decoder, on the meta device.
        parameters: what is stored of each, by name.
    """
    with warnings.catch_warnings():
        # Mapped copy-on-write: nothing writes to them, and torch need not warn that nothing may.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, _ in list(module.named_parameters()):
            stored = parameters[name]
            arrays = stored.format.arrays.items()
            values = {kind: unpacked(_mapped(stored, kind), array) for kind, array in arrays}
            if "table" in values:
                values["data"] = values.pop("table").view(-1)[values["data"].int()]
            if stored.format.transposed:
                values["data"] = values["data"].transpose(-1, -2).contiguous()
            lowering._put(module, name, stored.format, values)


def _mapped(stored: StoredTensor, kind: ArrayKind) -> Tensor:
    """One of the arrays of a stored weight as it lies in memory."""
    return torch.from_numpy(stored.array(kind)).view(getattr(torch, stored.format.arrays[kind].memory_dtype))


def load_decoder(
    directory: Path,
    work: Path,
    *,
    dtype: str | None = "float32",
    rewritten: bool = True,
    recipe: str = "fp16",
    contract: Contract = STATIC_S1,
    function: str = "main",
) -> tuple[nn.Module, TraceSpec]:
    """The decoder in `dtype`, in the form of a contract's function or as the reference, and the signature of `main`.

    Without a `dtype` it is in those of the contract.
    """
    if dtype is not None:
        contract = evolve(contract, compute_dtype=dtype, engine=None)  # so that logits are in it too
    checkpoint = Checkpoint.open(directory)
    config = OVERLAY.read_config(checkpoint.config)
    rewrites = [("qwen36", rewrite) for rewrite in rewrites_of(contract, function)] if rewritten else []
    module = build_module(lambda: OVERLAY.decoder(config, contract), rewrites)
    plan = plan_weights(qwen3_5.weight_map(config), parameters_of(module), checkpoint.tensors, RECIPES[recipe])
    store = WeightStore(work)
    store.fill(plan, checkpoint)
    bind(module, tensors_of(store, plan.tensors))
    return module, signature(config, contract)


def signature(config: Any, contract: Contract = STATIC_S1) -> TraceSpec:
    """The function's signature for a config."""
    extra = qwen3_5.extra_states(config, contract)
    return contract.functions(OVERLAY.kv_cache(config), extra, config.vocab_size, 64)["main"]


def fresh_states(spec: TraceSpec, capacity: int = 64) -> list[Tensor]:
    """Zeroed states with room for `capacity` positions."""
    return [
        torch.zeros([capacity if isinstance(size, str) else size for size in s.shape], dtype=getattr(torch, s.dtype))
        for s in spec.states
    ]


def feed(module: nn.Module, tokens: list[int], states: list[Tensor], *pieces: int) -> Tensor:
    """Logits [len(tokens), V] when the tokens are fed in pieces that end at `pieces`, or one by one without any."""
    return torch.cat(list(fed(module, tokens, states, *pieces)))


def fed(module: nn.Module, tokens: list[int], states: list[Tensor], *pieces: int) -> Iterator[Tensor]:
    """The same piece by piece: logits [length of the piece, V]."""
    yield from _fed(module, tokens, states, sorted({*pieces, len(tokens)}) if pieces else range(1, len(tokens) + 1), 0)


def feed_by_position(module: nn.Module, tokens: list[int], states: list[Tensor]) -> Tensor:
    """The same one by one, where `position_ids` is the new token's position only."""
    return torch.cat(list(_fed(module, tokens, states, range(1, len(tokens) + 1), None)))


def _fed(
    module: nn.Module, tokens: list[int], states: list[Tensor], ends: Sequence[int], first: int | None
) -> Iterator[Tensor]:
    start = 0
    for end in ends:
        ids = torch.tensor([tokens[start:end]], dtype=torch.int32)
        positions = torch.arange(start if first is None else first, end, dtype=torch.int32)[None]
        with torch.no_grad():
            logits = module(ids, positions, *states)[0]
        yield logits
        start = end


def paths(module: nn.Module, pattern: str) -> list[str]:
    """Module paths that match a pattern."""
    return [path for path, _ in module.named_modules() if fnmatch.fnmatchcase(path, pattern)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: a step of a miniature is over before a second thread has woken up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
