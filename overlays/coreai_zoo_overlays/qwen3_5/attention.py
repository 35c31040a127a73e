"""Softmax attention with an output gate.

Differs from transformers' `Qwen3_5Attention` in that the key / value pair of all layers is one tensor that this layer
writes its slice of, RoPE is applied as plain operations on the leading dimensions of a head, and what is done with the
cache is a module of its own, which a rewrite can replace: it depends on how the engine contract allocates it. For text
the three planes of mRoPE are equal, so it is ordinary partial RoPE.

Shapes: S new tokens of T so far, D hidden, Hq query heads, Hkv key / value heads (GQA), Dh head width, R rotated
dimensions. Batch is always 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coreai_zoo.composites import SDPA, RMSNorm

from .config import Qwen35Config


class Attention(nn.Module):
    """Grouped-query attention whose output is gated, per head, by a sigmoid of the input."""

    def __init__(self, config: Qwen35Config) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        width, kv_width = self.heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.attend: nn.Module = CachedAttention(scale=self.head_dim**-0.5)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], position_ids: Tensor
    ) -> Tensor:
        """`x` [1, S, D], `rotation` cos and sin [S, R], `cache` K and V [1, Hkv, capacity, Dh]; as `x`."""
        # q_proj interleaves per head: [query | gate] of head 0, then of head 1, and so on.
        query, gate = self.q_proj(x).unflatten(-1, (self.heads, 2 * self.head_dim)).chunk(2, dim=-1)  # [1, S, Hq, Dh]
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [1, S, Hkv, Dh]
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))

        query = apply_rotary(self.q_norm(query).transpose(1, 2), *rotation)  # [1, Hq, S, Dh]
        key = apply_rotary(self.k_norm(key).transpose(1, 2), *rotation)  # [1, Hkv, S, Dh]

        out = self.attend(query, key, value.transpose(1, 2), cache, position_ids).transpose(1, 2)  # [1, S, Hq, Dh]
        return self.o_proj((out * gate.sigmoid()).flatten(2))


# ---------------------------------------------------------------------------------------------------------------------
# Attention over the cache: one that grows, and one that has its full length from the start
# ---------------------------------------------------------------------------------------------------------------------


class CachedAttention(nn.Module):
    """Puts the new tokens at the end of a cache that grows, and attends to all that it holds by then."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.sdpa = SDPA(scale)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor, Tensor], position_ids: Tensor
    ) -> Tensor:
        """`query` [1, Hq, S, Dh], `key`, `value` [1, Hkv, S, Dh], `position_ids` [1, T], all so far; as `query`."""
        length = position_ids.shape[1]
        keys, values = (write(store, new, length) for store, new in zip(cache, (key, value), strict=True))
        return self.sdpa(query, keys, values)


class FixedContextAttention(nn.Module):
    """`CachedAttention` for exactly one token and a cache of fixed length, of which what is not written yet is masked.

    Query heads are grouped by the key head that serves them, so that nothing of the cache is repeated.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor, Tensor], position_ids: Tensor
    ) -> Tensor:
        """As `CachedAttention` with S = 1, but for `position_ids` [1, 1]: the position of the token."""
        position = position_ids[0]
        keys, values = cache
        keys[:, :, position], values[:, :, position] = key, value

        grouped = query.unflatten(1, (keys.shape[1], -1)).squeeze(3)  # [1, Hkv, Hq / Hkv, Dh]
        scores = grouped.float() * self.scale @ keys.float().transpose(-1, -2)  # [1, Hkv, Hq / Hkv, capacity]
        unwritten = torch.arange(keys.shape[2], dtype=torch.int32) > position
        weights = torch.softmax(scores.masked_fill(unwritten, float("-inf")), dim=-1)
        return (weights.to(values.dtype) @ values).flatten(1, 2).unsqueeze(2)


def write(store: Tensor, new: Tensor, length: int) -> Tensor:
    """Put `new` [1, Hkv, S, Dh] at the end of the first T = `length` positions of `store`; return those positions."""
    store[:, :, length - new.shape[2] : length] = new
    return store[:, :, :length]


# ---------------------------------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------------------------------


class RotaryEmbedding(nn.Module):
    """Angles of partial RoPE, computed in fp32 from the positions (Su et al. 2021), stretched where there is YaRN."""

    inverse_frequency: Tensor

    def __init__(self, config: Qwen35Config) -> None:
        super().__init__()
        # Made on the CPU even when the decoder is laid out on the meta device: it is arithmetic, not a weight.
        exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu") / config.rotary_dim
        frequency = config.rope_theta**-exponent
        self.scale = 1.0
        if config.yarn is not None:
            frequency = config.yarn.stretched(frequency, config.rope_theta)
            self.scale = config.yarn.attention_factor
        self.register_buffer("inverse_frequency", frequency, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`positions` [S]; cos and sin [S, R] in `dtype`, the second half repeating the first."""
        angles = positions.float().unsqueeze(-1) * self.inverse_frequency
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.to(dtype), sin.to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of `x` [1, H, S, Dh] in the halves convention; the rest passes through."""
    rotated, passed = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, passed), dim=-1)
