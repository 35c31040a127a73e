"""The gated delta rule over a prompt's tokens at once: two forms without a loop, and the convolution beside them.

Differs from transformers' `torch_chunk_gated_delta_rule` in how the triangular system is inverted (by blocks, where
theirs substitutes row by row), in that a decay is the exponential of a sum of `g` and never of a difference between two
sums, and in that any number of tokens up to `length` is padded to `length`, which a graph without a loop can count on.
A padded token has g = 0 and beta = 0: it decays nothing and writes nothing, so the state is the one behind the last
real token. The reference is `GatedDeltaRule`, token by token.

Shapes: S tokens, padded to P = n C, that is n chunks of C; Hk key heads serving Hv value heads (GVA), Dk and Dv head
widths, K taps. Batch is always 1; chunks of all heads are one axis, as matrices that are multiplied together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, bmm, nn

from .gated_delta_net import l2_norm, recurrent_gated_delta_rule


class UnrolledGatedDeltaRule(nn.Module):
    """`GatedDeltaRule` for up to `length` tokens: as many steps of the recurrence in a row."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `GatedDeltaRule` with S <= `length`."""
        tokens = query.shape[1]
        query, key, value, g, beta = (padded(x, self.length) for x in (query, key, value, g, beta))
        outputs = []
        for t in range(self.length):
            out, state = recurrent_gated_delta_rule(query[:, t], key[:, t], value[:, t], g[:, t], beta[:, t], state)
            outputs.append(out)
        return torch.stack(outputs, dim=1)[:, :tokens], state


class ChunkedGatedDeltaRule(nn.Module):
    """`GatedDeltaRule` for up to `length` tokens, chunk by chunk, all tokens of a chunk at once (the WY form).

    Let W be the state before a chunk, d[t] the decay of it up to token t, and d[t, i] that of what token i wrote, for
    i <= t. What the tokens write, k[i] u[i]^T, follows from a unit lower triangular system (Yang et al. 2024, "Gated
    Delta Networks", section 3.3):

        u[t] + sum over i < t of beta[t] d[t, i] (k[t] . k[i]) u[i]  =  beta[t] (v[t] - d[t] k[t]^T W)
        out[t]  =  d[t] q[t]^T W + sum over i <= t of d[t, i] (q[t] . k[i]) u[i]
        W  <-  d[C] W + sum over i of d[C, i] k[i] u[i]^T

    Both sides are solved for all chunks at once, for v and for d k, so that one chunk after the other there is left

        u  =  u_v - u_k W
    """

    until: Tensor
    behind: Tensor
    identity: Tensor

    def __init__(self, length: int, chunk: int) -> None:
        super().__init__()
        if chunk & (chunk - 1):
            raise ValueError(f"a chunk is joined from halves down to single tokens, which {chunk} cannot be")
        self.length, self.chunk = length, chunk
        token = torch.arange(chunk, device="cpu")
        row, column = token.unsqueeze(1), token.unsqueeze(0)
        self._constant("until", row <= column)
        self._constant("behind", row < column)
        self._constant("identity", row == column)
        self.widths = tuple(2**level for level in range(chunk.bit_length() - 1))
        for width in self.widths:  # of blocks: joins the lower one of each pair to the upper one
            self._constant(f"join_{width}", (row // width == column // width + 1) & (row // width % 2 == 1))

    def _constant(self, name: str, mask: Tensor) -> None:
        # Each a buffer of its own: a slice of a constant is another one, which the compiler names as it likes.
        self.register_buffer(name, mask.float(), persistent=False)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `GatedDeltaRule` with S <= `length`."""
        tokens, heads = value.shape[1:3]
        query, key, value = (
            self._chunks(x.float(), heads) for x in (l2_norm(query.float()), l2_norm(key.float()), value)
        )
        g, beta = (self._chunks(x.unsqueeze(-1), heads) for x in (g, beta))  # [n Hv, C, 1], and [n Hv, C, D] before
        query = query * query.shape[-1] ** -0.5

        since, between = self._decays(g)  # d[t] [n Hv, C, 1], d[t, i] [n Hv, C, C]
        solved = self._solved(beta * between * bmm(key, key.transpose(1, 2)))
        written_of_value, written_of_key = bmm(solved, beta * value), bmm(solved, beta * since * key)
        end = between[:, -1:].transpose(1, 2)  # d[C, i], [n Hv, C, 1]

        states, written, state = [], [], state.squeeze(0)  # [Hv, Dk, Dv]
        parts = (written_of_value, written_of_key, (end * key).transpose(1, 2), since[:, -1:])
        parts = tuple(x.unflatten(0, (-1, heads)) for x in parts)
        for chunk in range(self.length // self.chunk):
            u_v, u_k, keys, kept = (x[chunk] for x in parts)
            states.append(state)
            written.append(u_v - bmm(u_k, state))  # u, [Hv, C, Dv]
            state = kept * state + bmm(keys, written[-1])

        before, u = torch.cat(states), torch.cat(written)  # [n Hv, Dk, Dv], [n Hv, C, Dv]
        out = since * bmm(query, before) + bmm(between * bmm(query, key.transpose(1, 2)), u)
        out = out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(0, 1)  # [P, Hv, Dv]
        return out[:tokens].unsqueeze(0), state.unsqueeze(0)

    def _chunks(self, x: Tensor, heads: int) -> Tensor:
        """[1, S, H, D] to [n `heads`, C, D], each of the H heads repeated for those that it serves."""
        x = padded(x, self.length).unflatten(1, (-1, self.chunk)).squeeze(0).transpose(1, 2)  # [n, H, C, D]
        if x.shape[1] != heads:
            x = x.repeat_interleave(heads // x.shape[1], dim=1)
        return x.flatten(0, 1)

    def _decays(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """`g` [..., C, 1]; d[t] as `g`, and d[t, i] [..., C, C], zero for i > t.

        The logarithm of d[t, i] is the sum of g[j] for i < j <= t: a row that leaves out j <= i, times a triangle that
        leaves out j > t.
        """
        g = g.squeeze(-1)
        since = self._until(g).exp()
        between = self._until(g.unsqueeze(-2) * self.behind).exp() * self.until  # [i, t]
        return since.unsqueeze(-1), between.transpose(-1, -2)

    def _until(self, x: Tensor) -> Tensor:
        """Sums of `x` [..., C] over all tokens until each."""
        # One product of two matrices: the compiler repeats a constant for each product of a batch, and stores that.
        return (x.reshape(-1, self.chunk) @ self.until).view(x.shape)

    def _solved(self, system: Tensor) -> Tensor:
        """The inverse of I + the part of `system` [..., C, C] below the diagonal.

        Blocks of one row are inverted already. Two blocks X and Y of the same size, joined by a block N below X and
        beside Y, have the inverse X' and Y' with -Y' N X' in the place of N.
        """
        inverse = self.identity - system * self.get_buffer("join_1")
        for width in self.widths[1:]:
            inverse = inverse - bmm(bmm(inverse, system * self.get_buffer(f"join_{width}")), inverse)
        return inverse


class CausalConv1dTokens(nn.Module):
    """`CausalConv1d` as K shifted windows, with no weight that the compiler would reshape."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As `CausalConv1d`, `weight` [C, K]."""
        tokens, taps = x.shape[1], self.weight.shape[1]
        inputs = torch.cat((state.transpose(1, 2), x), dim=1)  # [1, K - 1 + S, C]
        windows = torch.stack([inputs[:, tap : tap + tokens] for tap in range(taps)], dim=-1)  # [1, S, C, K]
        return (windows * self.weight).sum(-1), inputs[:, tokens:].transpose(1, 2)


def padded(x: Tensor, length: int) -> Tensor:
    """[1, S, ...] to [1, `length`, ...], zeros behind the S tokens.

    As many zeros are added as there may be missing and the rest is cut off: to add a number that is not fixed does not
    lower.
    """
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, length))[:, :length]
