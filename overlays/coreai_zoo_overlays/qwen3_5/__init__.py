"""The `qwen3_5` overlay: Qwen3.5, Qwen3.6 and their relatives, dense and mixture-of-experts.

Read in this order: `config`, `states`, `decoder`, `attention`, `gated_delta_net`, `feed_forward`, then what the host is
told about them: `weights`, `rewrites`, `quantization`. Only the modules that hold layers import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from coreai_zoo.contracts import Contract
from coreai_zoo.overlay import KVCache

from .config import MODEL_TYPES, Qwen35Config, read_config, with_layers
from .quantization import HEAD
from .rewrites import layer_rewrites
from .states import extra_states, kv_cache
from .weights import weight_map

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
        facts: dict[str, Any] = {
            "ffn": "dense" if config.moe is None else "moe",
            "layers": len(config.layer_types),
            "linear_attention_layers": config.linear_layers,
            "full_attention_layers": config.full_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "max_context_length": config.max_position_embeddings,
            "tied_head": config.tie_word_embeddings,
            "attention_heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rotary_dim": config.rotary_dim,
            "gdn_key_heads": config.linear_num_key_heads,
            "gdn_value_heads": config.linear_num_value_heads,
            "gdn_key_head_dim": config.linear_key_head_dim,
            "gdn_value_head_dim": config.linear_value_head_dim,
            "conv_kernel": config.linear_conv_kernel_dim,
        }
        if config.moe is None:
            return {**facts, "intermediate_size": config.intermediate_size}
        return {
            **facts,
            "experts": config.moe.num_experts,
            "experts_per_token": config.moe.top_k,
            "expert_intermediate_size": config.moe.intermediate_size,
            "shared_expert_intermediate_size": config.moe.shared_intermediate_size,
        }

    def kv_cache(self, config: Qwen35Config) -> KVCache:
        """Geometry of the key / value pair."""
        return kv_cache(config)

    def decoder(self, config: Qwen35Config, contract: Contract) -> nn.Module:
        """The decoder in the contract's dtype, uninitialised."""
        import torch

        from .decoder import build_decoder

        return build_decoder(config, getattr(torch, contract.compute_dtype))
