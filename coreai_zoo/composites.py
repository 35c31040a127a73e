"""Operations that an engine has fused kernels for, as modules that an overlay builds its layers from.

Each holds its mathematics in a child called `impl`, in plain torch. A backend may replace that child by its toolchain's
own operation of the same signature, so that it survives lowering as one named composite; the overlay cannot tell, and
the plain form here is the reference that the replacement is tested against. An overlay brings one of its own as a
`Composite`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class Composite(nn.Module):
    """An operation of an overlay's own that a backend keeps whole, as one graph that every layer calls.

    An engine without a kernel of its name runs the graph. A subclass says `name`, an identifier. It holds no tensor and
    no other module: whatever it computes with is an input. Its attributes are numbers, truth values or strings. Its
    `forward` takes tensors, or `Tensor | None`, by position, writes to none of them, and gives one or several; its
    annotations say so.
    """

    name: ClassVar[str]


class RMSNormImpl(nn.Module):
    """Root mean square normalisation with the gain as an argument."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, input: Tensor, scale: Tensor) -> Tensor:  # noqa: A002  # the composite's name for it
        """`input` [..., D], `scale` [D]; computed in float32, returned in the dtype of `input`."""
        x = input.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x.to(input.dtype) * scale


class RMSNorm(nn.Module):
    """RMSNorm whose parameter `weight` [D] is the gain itself: a checkpoint's `1 + weight` is folded when read."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.impl: nn.Module = RMSNormImpl(eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        normed: Tensor = self.impl(x, self.weight)
        return normed


class SDPAImpl(nn.Module):
    """Causal scaled dot-product attention where fewer key / value heads may serve consecutive query heads (GQA)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`query` [B, Hq, S, D], `key` and `value` [B, Hkv, T, D], the queries being the last S of T; [B, Hq, S, D]."""
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        query_length, key_length = query.shape[2], key.shape[2]
        scores = (query.float() * self.scale) @ key.float().transpose(-1, -2)
        # Query i sits at position T - S + i and sees every key up to itself.
        seen = torch.ones(query_length, key_length, dtype=torch.bool).tril(key_length - query_length)
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        return weights.to(value.dtype) @ value


class SDPA(nn.Module):
    """Causal attention; see `SDPAImpl`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.impl: nn.Module = SDPAImpl(scale)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`query` [B, Hq, S, D], `key` and `value` [B, Hkv, T, D] to [B, Hq, S, D]."""
        attended: Tensor = self.impl(query, key, value)
        return attended


class GatherMMImpl(nn.Module):
    """Matrix product with the right-hand matrices chosen by index."""

    def forward(
        self, lhs: Tensor, rhs: Tensor, lhs_indices: Tensor | None = None, rhs_indices: Tensor | None = None
    ) -> Tensor:
        """`lhs` [..., 1, 1, D] @ `rhs` [E, D, I] at `rhs_indices` [..., K]; returns [..., K, 1, I]."""
        if lhs_indices is not None or rhs_indices is None:
            raise NotImplementedError("only the right-hand side is gathered")
        return lhs @ rhs[rhs_indices]


class GatherMM(nn.Module):
    """Product with chosen experts only; see `GatherMMImpl`."""

    def __init__(self) -> None:
        super().__init__()
        self.impl: nn.Module = GatherMMImpl()

    def forward(self, lhs: Tensor, rhs: Tensor, rhs_indices: Tensor) -> Tensor:
        """`lhs` [..., 1, 1, D], `rhs` [E, D, I], `rhs_indices` int32 [..., K] to [..., K, 1, I]."""
        product: Tensor = self.impl(lhs, rhs, rhs_indices=rhs_indices)
        return product


class GatedDeltaUpdateImpl(nn.Module):
    """The gated delta rule in fp32 over S tokens, one after the other (Yang et al. 2024, "Gated Delta Networks")."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`query`, `key` [B, H, S, Dk], `value` [B, H, S, Dv], log decay `g` and `beta` [B, H, S], fp32 state
        [B, H, Dk, Dv]; [B, S, H, Dv] and the state behind the last token.
        """
        query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
        query, state, outputs = query * query.shape[-1] ** -0.5, initial_state, []
        for t in range(key.shape[2]):
            state = state * g[:, :, t].exp()[..., None, None]
            recalled = (state * key[:, :, t, :, None]).sum(-2)
            correction = (value[:, :, t] - recalled) * beta[:, :, t, None]
            state = state + key[:, :, t, :, None] * correction[..., None, :]
            outputs.append((state * query[:, :, t, :, None]).sum(-2))
        return torch.stack(outputs, dim=1), state


class GatedDeltaUpdate(nn.Module):
    """The gated delta rule over any number of tokens, with a loop over them; see `GatedDeltaUpdateImpl`."""

    def __init__(self) -> None:
        super().__init__()
        self.impl: nn.Module = GatedDeltaUpdateImpl()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`query`, `key` [B, H, S, Dk], `value` [B, H, S, Dv], `g`, `beta` [B, H, S], `state` [B, H, Dk, Dv], fp32."""
        updated: tuple[Tensor, Tensor] = self.impl(query, key, value, g, beta, state)
        return updated
