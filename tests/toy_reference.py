"""The toy as a model of transformers, written without the zoo: what tests/toy_vocabulary.py is gated against.

Shapes: P positions, D hidden, V vocabulary. Batch is always 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import CausalLMOutput

# The two that transformers finds by their modules; every other parameter has the checkpoint's name.
register_checkpoint_conversion_mapping(
    "toy_mean",
    [WeightRenaming(r"^tok\.table$", "tok.weight"), WeightRenaming(r"^unembed$", "unembed.weight")],
)


class ToyReferenceConfig(PreTrainedConfig):
    """Sizes."""

    model_type = "toy_mean"
    vocab_size: int = 8
    hidden_size: int = 8
    layers: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 8
    intermediate_size: int = 8
    tie_word_embeddings: bool = False


def _normed(x: Tensor, decibel: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5) * 10 ** (decibel / 20)


class ToyBlock(nn.Module):
    """Mean of all tokens so far, attention, MLP; gains in decibel."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, wide = config.hidden_size, config.intermediate_size
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        shapes = {"wq": (queries, hidden), "wk": (keys, hidden), "wv": (keys, hidden), "wo": (hidden, queries)}
        shapes |= {"up": (wide, hidden), "down": (hidden, wide)}
        shapes |= {f"gain_{letter}": (hidden,) for letter in "maf"}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor) -> Tensor:
        """[1, P, D] to [1, P, D]."""
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x + _normed(x.cumsum(1) / count, self.gain_m)
        normed = _normed(x, self.gain_a)
        q, k, v = (
            F.linear(normed, weight).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for weight in (self.wq, self.wk, self.wv)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), self.wo)
        return x + F.linear(F.relu(F.linear(_normed(x, self.gain_f), self.up)), self.down)


class ToyForCausalLM(PreTrainedModel):
    """Embedding, blocks, norm and head."""

    config_class = ToyReferenceConfig
    _no_split_modules: ClassVar[list[str]] = ["ToyBlock"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tok = nn.Embedding(config.vocab_size, config.hidden_size)
        self.block = nn.ModuleList(ToyBlock(config) for _ in range(config.layers))
        self.gain = nn.Parameter(torch.empty(config.hidden_size))
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, _module: nn.Module) -> None:
        """Every weight is in the checkpoint."""

    def get_input_embeddings(self) -> nn.Module:
        return self.tok

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def set_output_embeddings(self, head: nn.Module) -> None:
        self.unembed = head

    def forward(self, inputs_embeds: Tensor, use_cache: bool = False) -> CausalLMOutput:  # has none
        """`inputs_embeds` [1, P, D]; logits [1, P, V]."""
        x = inputs_embeds
        for block in self.block:
            x = block(x)
        return CausalLMOutput(logits=self.unembed(_normed(x, self.gain)))
