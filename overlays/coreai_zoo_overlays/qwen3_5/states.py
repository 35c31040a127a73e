"""What a step carries to the next one.

transformers keeps a cache object per layer. An engine binds tensors by name instead, so all layers of a kind share one
tensor whose first axis is the layer:

    keyCache, valueCache   [L_full, 1, Hkv, T, D]          grow along T; declared by the contract
    convState              [L_lin, 1, C, K - 1]            the last K - 1 inputs of each causal convolution
    recState               [L_lin, 1, Hv, Dk, Dv]          the fast weights of each gated delta rule

The two fixed states are written once per step, whole: chained writes of single layers are dropped by one GPU delegate.
The KV pair is written layer by layer, as in Apple's own exporters: each write is a slice along T, which engines know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coreai_zoo.contracts import Contract
from coreai_zoo.signature import KVCache, StateSpec

from .config import Qwen35Config

if TYPE_CHECKING:
    from torch import Tensor


def kv_cache(config: Qwen35Config) -> KVCache:
    """Geometry of the pair that grows."""
    return KVCache(layers=config.full_layers, heads=config.num_key_value_heads, head_dim=config.head_dim)


def extra_states(config: Qwen35Config, contract: Contract) -> tuple[StateSpec, ...]:
    """The fixed states, in the order in which the decoder takes them."""
    conv = (config.linear_layers, 1, config.conv_dim, config.linear_conv_kernel_dim - 1)
    recurrent = (
        config.linear_layers,
        1,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )
    return (
        StateSpec(name="convState", shape=conv, dtype=contract.compute_dtype, kind="fixed"),
        StateSpec(name="recState", shape=recurrent, dtype=contract.compute_dtype, kind="fixed"),
    )


class FixedStates:
    """The fixed states of one step: read layer by layer, replaced layer by layer, written back whole by `commit`."""

    def __init__(self, conv_state: Tensor, recurrent_state: Tensor) -> None:
        self._stores = (conv_state, recurrent_state)
        self._updated: tuple[list[Tensor], list[Tensor]] = ([], [])

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """State of the `index`-th linear layer before this step: [1, C, K - 1] and [1, Hv, Dk, Dv]."""
        conv_state, recurrent_state = self._stores
        return conv_state[index], recurrent_state[index]

    def replace(self, index: int, conv_state: Tensor, recurrent_state: Tensor) -> None:
        """State of the `index`-th linear layer after this step; layers report in order."""
        for updated, state in zip(self._updated, (conv_state, recurrent_state), strict=True):
            assert len(updated) == index
            updated.append(state)

    def commit(self) -> None:
        """Write both states, once."""
        import torch

        for store, updated in zip(self._stores, self._updated, strict=True):
            store.copy_(torch.stack(updated))


class LayerStates(FixedStates):
    """The same where layers run on their own, outside of a graph: each writes its state as soon as it has it."""

    def replace(self, index: int, conv_state: Tensor, recurrent_state: Tensor) -> None:
        """Write the state of the `index`-th linear layer."""
        for store, state in zip(self._stores, (conv_state, recurrent_state), strict=True):
            store[index] = state
