"""GatedDeltaNet: linear attention with a decaying, error-correcting fast-weight memory.

Differs from transformers' `Qwen3_5GatedDeltaNet` in that states are arguments and results instead of entries of a
cache, `A` holds `-exp(A_log)` (folded when the checkpoint is read), and the two parts that an engine contract may want
in another form, the convolution and the delta rule, are modules of their own that a rewrite can replace. In half
precision the rule runs in fp32 as theirs does; `silu(z)` and the norm's gain stay in half, where theirs take a detour
through fp32, and between steps the state is stored in the contract's dtype (fp16 for `static-s1`, fp32 in theirs).

Shapes: S tokens, D hidden, Hk key heads serving Hv value heads (GVA), Dk and Dv head widths, K taps,
C = 2 Hk Dk + Hv Dv convolution channels. Batch is always 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_zoo.composites import GatedDeltaUpdate, RMSNorm

from .config import Qwen35Config

_L2_EPS = 1e-6  # transformers' l2norm


class GatedDeltaNet(nn.Module):
    """Mixes tokens by a causal convolution and the gated delta rule, then gates the result by silu(z)."""

    def __init__(self, config: Qwen35Config) -> None:
        super().__init__()
        self.split = (config.key_dim, config.key_dim, config.value_dim)
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.in_proj_qkv = nn.Linear(config.hidden_size, config.conv_dim, bias=False)
        self.in_proj_z = nn.Linear(config.hidden_size, config.value_dim, bias=False)
        self.in_proj_b = nn.Linear(config.hidden_size, self.value_heads, bias=False)
        self.in_proj_a = nn.Linear(config.hidden_size, self.value_heads, bias=False)
        self.conv1d: nn.Module = CausalConv1d(config.conv_dim, config.linear_conv_kernel_dim)
        # The decay is exponentiated on its way into the state: its constants are fp32 in any decoder.
        self.A = nn.Parameter(torch.empty(self.value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads, dtype=torch.float32))
        self.rule: nn.Module = GatedDeltaRule()
        self.norm = RMSNorm(config.linear_value_head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.value_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, conv_state: Tensor, recurrent_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [1, S, D], `conv_state` [1, C, K - 1], `recurrent_state` [1, Hv, Dk, Dv]; the same three, advanced."""
        mixed, conv_state = self.conv1d(self.in_proj_qkv(x), conv_state)  # [1, S, C]
        query, key, value = F.silu(mixed).split(self.split, dim=-1)
        query, key = (self._heads(part, self.key_heads) for part in (query, key))  # [1, S, Hk, Dk]
        value = self._heads(value, self.value_heads)  # [1, S, Hv, Dv]

        g = self.A * F.softplus(self.in_proj_a(x).float() + self.dt_bias)  # log decay, [1, S, Hv]
        beta = self.in_proj_b(x).float().sigmoid()  # write strength, [1, S, Hv]

        out, state = self.rule(query, key, value, g, beta, recurrent_state.float())
        z = self._heads(self.in_proj_z(x), self.value_heads)
        out = self.norm(out.to(x.dtype)) * F.silu(z)  # [1, S, Hv, Dv]
        return self.out_proj(out.flatten(2)), conv_state, state.to(recurrent_state.dtype)

    @staticmethod
    def _heads(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1))


# ---------------------------------------------------------------------------------------------------------------------
# The delta rule: reference, the form for one token, the loop; `gated_delta_chunks` has those for a prompt without loop
# ---------------------------------------------------------------------------------------------------------------------


class GatedDeltaRule(nn.Module):
    """The recurrence over S tokens, one after the other, in fp32 (Yang et al. 2024, "Gated Delta Networks", eq. 10).

    State W [1, Hv, Dk, Dv] maps keys to values: W <- exp(g) W + k (beta (v - k^T exp(g) W)), then out = q^T W.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`query`, `key` [1, S, Hk, Dk], `value` [1, S, Hv, Dv], `g`, `beta` [1, S, Hv]; output as `value`, state."""
        outputs = []
        for t in range(query.shape[1]):
            out, state = recurrent_gated_delta_rule(query[:, t], key[:, t], value[:, t], g[:, t], beta[:, t], state)
            outputs.append(out)
        return torch.stack(outputs, dim=1), state


class GatedDeltaStep(nn.Module):
    """`GatedDeltaRule` for exactly one token: straight-line, because a loop does not lower on the GPU delegate."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `GatedDeltaRule` with S = 1."""
        query, key, value, g, beta = (tensor.squeeze(1) for tensor in (query, key, value, g, beta))
        out, state = recurrent_gated_delta_rule(query, key, value, g, beta, state)
        return out.unsqueeze(1), state


class GatedDeltaLoop(nn.Module):
    """`GatedDeltaRule` for any number of tokens in one graph: a loop, as the composite that Apple's exporter has."""

    def __init__(self) -> None:
        super().__init__()
        self.update = GatedDeltaUpdate()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `GatedDeltaRule`."""
        groups = value.shape[2] // key.shape[2]
        query, key, value, g, beta = (x.float().transpose(1, 2) for x in (query, key, value, g, beta))  # [1, H, S, ...]
        query, key = (x.repeat_interleave(groups, dim=1) for x in (query, key))
        return self.update(query, key, value, g, beta, state)


def recurrent_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: `query`, `key` [1, Hk, Dk], `value` [1, Hv, Dv], `g`, `beta` [1, Hv], fp32 `state` [1, Hv, Dk, Dv]."""
    groups = value.shape[1] // key.shape[1]
    query, key = (repeat_heads(l2_norm(x.float()), groups) for x in (query, key))  # [1, Hv, Dk]
    query = query * query.shape[-1] ** -0.5

    state = state * g.exp()[..., None, None]
    recalled = (state * key[..., None]).sum(-2)  # what the memory holds for this key, [1, Hv, Dv]
    correction = (value.float() - recalled) * beta[..., None]
    state = state + key[..., None] * correction[..., None, :]
    return (state * query[..., None]).sum(-2), state


def l2_norm(x: Tensor) -> Tensor:
    """Unit length along the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _L2_EPS)


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """[1, Hk, Dk] to [1, Hk * groups, Dk]: each key head serves `groups` consecutive value heads."""
    return x.unsqueeze(2).expand(-1, -1, groups, -1).flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The causal convolution: reference, and the form for one token
# ---------------------------------------------------------------------------------------------------------------------


class CausalConv1d(nn.Module):
    """Depthwise convolution over S tokens; `weight` [C, K], the last tap meeting the newest token."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [1, S, C] and the K - 1 inputs before it, `state` [1, C, K - 1]; output [1, S, C] and the new state."""
        window = torch.cat((state, x.transpose(1, 2)), dim=-1)  # [1, C, K - 1 + S]
        out = F.conv1d(window, self.weight.unsqueeze(1), groups=self.weight.shape[0])
        return out.transpose(1, 2), window[..., x.shape[1] :]


class CausalConv1dStep(nn.Module):
    """`CausalConv1d` for exactly one token: K multiplies and a sum, with no weight that the compiler would reshape."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As `CausalConv1d` with S = 1."""
        window = torch.cat((state, x.transpose(1, 2)), dim=-1)  # [1, C, K]
        return (window * self.weight).sum(-1).unsqueeze(1), window[..., 1:]
