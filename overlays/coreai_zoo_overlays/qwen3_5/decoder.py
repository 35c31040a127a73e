"""The decoder: one function from token and states to logits.

Differs from transformers' `Qwen3_5ForCausalLM` in that every state is an argument and is mutated in place, and that the
head is always a matrix of its own, so that it can be quantized by itself. A tied one is filled from the embedding's
tensor, and the host stores it once where both are stored alike.
Module and parameter names are transformers' own.

Shapes: S new tokens of T so far, D hidden, V vocabulary. Batch is 1; a gate also runs several prompts side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coreai_zoo.composites import RMSNorm

from .attention import Attention, RotaryEmbedding
from .config import FULL, Qwen35Config
from .gated_delta_net import GatedDeltaNet
from .states import FixedStates, LayerStates


class Decoder(nn.Module):
    """Embedding, layers, norm and head; all of them in `forward`, or one at a time (`overlay.BatchedDecoder`)."""

    batch_axis = 1  # of the states

    def __init__(self, config: Qwen35Config, logits_dtype: torch.dtype) -> None:
        super().__init__()
        self.logits_dtype = logits_dtype  # an engine's, whatever the decoder computes in
        self.model = DecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        conv_state: Tensor,
        recurrent_state: Tensor,
    ) -> Tensor:
        """`input_ids` int32 [1, S], `position_ids` int32 as the contract has them, the S new ones last, states as in
        `states`; logits [1, S, V].
        """
        states = FixedStates(conv_state, recurrent_state)
        hidden = self.model(input_ids, position_ids, (key_cache, value_cache), states)
        states.commit()
        return self.lm_head(hidden).to(self.logits_dtype)

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Where the layers are."""
        return tuple(f"model.layers.{index}" for index in range(len(self.model.layers)))

    def embed(self, input_ids: Tensor) -> Tensor:
        """`input_ids` [1, S]; [1, S, D]."""
        return self.model.embed_tokens(input_ids)

    def layer(self, index: int, x: Tensor, position_ids: Tensor, states: Sequence[Tensor]) -> Tensor:
        """[1, S, D] to [1, S, D] by one layer, which writes its part of `states`; `position_ids` as in `forward`."""
        key_cache, value_cache, conv_state, recurrent_state = states
        rotation = self.model.rotation(position_ids, x)
        fixed = LayerStates(conv_state, recurrent_state)
        return self.model.layers[index](x, rotation, position_ids, (key_cache, value_cache), fixed)

    def head(self, x: Tensor) -> Tensor:
        """[1, S, D] after the last layer; logits [1, S, V]."""
        return self.lm_head(self.model.norm(x)).to(self.logits_dtype)


class DecoderModel(nn.Module):
    """Everything but the head."""

    def __init__(self, config: Qwen35Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, kind, index=config.layer_types[:position].count(kind))
            for position, kind in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, kv_cache: tuple[Tensor, Tensor], states: FixedStates
    ) -> Tensor:
        """The normed hidden state after the last layer, [1, S, D]."""
        x = self.embed_tokens(input_ids)
        rotation = self.rotation(position_ids, x)
        for layer in self.layers:
            x = layer(x, rotation, position_ids, kv_cache, states)
        return self.norm(x)

    def rotation(self, position_ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Angles of the S last positions, for `x` [1, S, D]: cos and sin [S, R]."""
        return self.rotary_emb(position_ids[0, -x.shape[1] :], x.dtype)


class DecoderLayer(nn.Module):
    """Token mixing, then feed-forward, each normed before and added to its input.

    `index` counts the layers of the same kind: it is this layer's place in the states.
    """

    def __init__(self, config: Qwen35Config, kind: str, index: int) -> None:
        super().__init__()
        self.kind, self.index = kind, index
        if kind == FULL:
            self.self_attn = Attention(config)
        else:
            self.linear_attn = GatedDeltaNet(config)
        self.mlp = config.feed_forward.layer(config.hidden_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        position_ids: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        states: FixedStates,
    ) -> Tensor:
        """[1, S, D] to [1, S, D]; mutates this layer's part of the states."""
        normed = self.input_layernorm(x)
        if self.kind == FULL:
            keys, values = kv_cache
            mixed = self.self_attn(normed, rotation, (keys[self.index], values[self.index]), position_ids)
        else:
            mixed, *updated = self.linear_attn(normed, *states.read(self.index))
            states.replace(self.index, *updated)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x))


def build_decoder(config: Qwen35Config, dtype: torch.dtype, logits_dtype: torch.dtype) -> Decoder:
    """An uninitialised decoder whose parameters are of `dtype`, but for those that are fp32 by nature."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Decoder(config, logits_dtype)
    finally:
        torch.set_default_dtype(before)
