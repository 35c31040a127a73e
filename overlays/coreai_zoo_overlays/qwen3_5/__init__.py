"""The `qwen3_5` overlay: Qwen3.5, Qwen3.6 and their relatives, dense and mixture-of-experts.

Read in this order: `config` (`reader` checks its fields), `states`, `decoder`, `attention` (and `yarn`),
`gated_delta_net`, `gated_delta_chunks`, `feed_forward`, `dense_or_moe`, then what the host is told about them: `table`,
`weights`, `facts`, `operations`, `rewrites`, `quantization`. Each module opens by saying how it differs from
transformers, and why. Only the modules that hold layers import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from coreai_zoo.contracts import Contract, Prefill
from coreai_zoo.overlay import ParameterInfo
from coreai_zoo.signature import KVCache

from .config import Qwen35Config, read_config, with_layers
from .dense_or_moe import MODEL_TYPES
from .facts import config_of_facts, facts_of
from .operations import operations
from .quantization import HEAD
from .rewrites import layer_rewrites
from .states import extra_states, kv_cache
from .weights import parameters, weight_map

if TYPE_CHECKING:
    from torch import nn

__all__ = ["HEAD", "MODEL_TYPES", "Qwen35Overlay", "extra_states", "layer_rewrites", "weight_map"]


@frozen
class Qwen35Overlay:
    """The overlay as the host sees it; see `coreai_zoo.overlay.Overlay`."""

    name: str = "qwen3_5"

    def read_config(self, hf_config: Mapping[str, Any]) -> Qwen35Config:
        """Parse and check `config.json`."""
        return read_config(hf_config)

    def with_layers(self, hf_config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """The config of a slice of the first `layers` layers."""
        return with_layers(hf_config, layers)

    def facts(self, config: Qwen35Config) -> Mapping[str, Any]:
        """What an entry states of a config and a card prints."""
        return facts_of(config)

    def config_of_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """A `config.json` with these facts."""
        return config_of_facts(facts)

    def kv_cache(self, config: Qwen35Config) -> KVCache:
        """Geometry of the key / value pair."""
        return kv_cache(config)

    def parameters(self, config: Qwen35Config, contract: Contract) -> Mapping[str, ParameterInfo]:
        """Every parameter of the decoder in the contract's dtype, without building it."""
        return parameters(config, contract.compute_dtype)

    def operations(self, config: Qwen35Config, prefill: Prefill | None, tokens: int, positions: int) -> int:
        """Floating-point operations of a call beside the products with its weights."""
        return operations(config, prefill, tokens, positions)

    def decoder(self, config: Qwen35Config, contract: Contract) -> nn.Module:
        """The decoder in the contract's dtypes, uninitialised."""
        import torch

        from .decoder import build_decoder

        return build_decoder(config, getattr(torch, contract.compute_dtype), getattr(torch, contract.logits_dtype))
