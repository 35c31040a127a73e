"""The gated delta rule over a prompt's tokens without a loop, step by step or by chunks, and the convolution beside it.

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

from coreai_zoo.composites import Composite

from .gated_delta_net import l2_norm


class PaddedGatedDeltaRule(nn.Module):
    """`GatedDeltaRule` for up to `length` tokens, by a rule for exactly as many.

    That may be the reference: its loop over tokens is unrolled, since their number is fixed here.
    """

    def __init__(self, rule: nn.Module, length: int) -> None:
        super().__init__()
        self.rule, self.length = rule, length

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `GatedDeltaRule` with S <= `length`."""
        tokens = query.shape[1]
        query, key, value, g, beta = (padded(x, self.length) for x in (query, key, value, g, beta))
        out, state = self.rule(query, key, value, g, beta, state)
        return out[:, :tokens], state


class ChunkedGatedDeltaRule(nn.Module):
    """`GatedDeltaRule` for whole chunks: `GatedDeltaChunks` with the levels of a chunk."""

    levels: Tensor

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunks = GatedDeltaChunks()
        self.register_buffer("levels", levels_of(chunk), persistent=False)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `GatedDeltaRule` with S = n C."""
        return self.chunks(query, key, value, g, beta, state, self.levels)


def levels_of(chunk: int) -> Tensor:
    """Where tokens meet when neighbours are joined to pairs, pairs to fours, and so on up to the chunk.

    int8 [C, C]: the level at which the blocks of a row's and a column's token are joined. It is 0 for a token and
    itself, 1 to log2 C where the column is the earlier one, and the same with a minus where it is the later one.

    Raises:
        ValueError: when no such tree has `chunk` leaves.
    """
    if chunk & (chunk - 1):
        raise ValueError(f"a chunk is joined from halves down to single tokens, which {chunk} cannot be")
    token = torch.arange(chunk, device="cpu")
    row, column = token.unsqueeze(1), token.unsqueeze(0)
    level = sum((row ^ column) >= 2**bit for bit in range(chunk.bit_length() - 1))
    return torch.where(row < column, -level, level).to(torch.int8)


class GatedDeltaChunks(Composite):
    """`GatedDeltaRule` for whole chunks, one after the other, all tokens of a chunk at once (the WY form).

    Let W be the state before a chunk, d[t] the decay of it up to token t, and d[t, i] that of what token i wrote, for
    i <= t. What the tokens write, k[i] u[i]^T, follows from a unit lower triangular system (Yang et al. 2024, "Gated
    Delta Networks", section 3.3):

        u[t] + sum over i < t of beta[t] d[t, i] (k[t] . k[i]) u[i]  =  beta[t] (v[t] - d[t] k[t]^T W)
        out[t]  =  d[t] q[t]^T W + sum over i <= t of d[t, i] (q[t] . k[i]) u[i]
        W  <-  d[C] W + sum over i of d[C, i] k[i] u[i]^T

    Both sides are solved for all chunks at once, for v and for d k, so that one chunk after the other there is left

        u  =  u_v - u_k W
    """

    name = "gated_delta_chunks"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor, levels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `GatedDeltaRule` with S = P, and `levels` [C, C] of a chunk."""
        query, key = l2_norm(query.float()), l2_norm(key.float())
        heads, chunk, levels = value.shape[2], levels.shape[0], levels.float()
        query, key, value, g, beta = (
            _in_chunks(x, chunk, heads) for x in (query, key, value.float(), g.unsqueeze(-1), beta.unsqueeze(-1))
        )  # [n Hv, C, Dk] twice, [n Hv, C, Dv], [n Hv, C, 1] twice
        query = query * query.shape[-1] ** -0.5

        since, between = _decays(g, levels)  # d[t] [n Hv, C, 1], d[t, i] [n Hv, C, C]
        solved = _solved(beta * between * bmm(key, key.transpose(1, 2)), levels)
        written_of_value, written_of_key = bmm(solved, beta * value), bmm(solved, beta * since * key)
        end = between[:, -1:].transpose(1, 2)  # d[C, i], [n Hv, C, 1]

        states, written, state = [], [], state.squeeze(0)  # [Hv, Dk, Dv]
        parts = (written_of_value, written_of_key, (end * key).transpose(1, 2), since[:, -1:])
        for u_v, u_k, keys, kept in zip(*(x.split(heads) for x in parts), strict=True):
            states.append(state)
            written.append(u_v - bmm(u_k, state))  # u, [Hv, C, Dv]
            state = kept * state + bmm(keys, written[-1])

        before, u = torch.cat(states), torch.cat(written)  # [n Hv, Dk, Dv], [n Hv, C, Dv]
        out = since * bmm(query, before) + bmm(between * bmm(query, key.transpose(1, 2)), u)
        out = out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(0, 1)  # [P, Hv, Dv]
        return out.unsqueeze(0), state.unsqueeze(0)


def _in_chunks(x: Tensor, chunk: int, heads: int) -> Tensor:
    """[1, P, H, D] to [n `heads`, C, D], each of the H heads repeated for those that it serves."""
    x = x.unflatten(1, (-1, chunk)).squeeze(0).transpose(1, 2)  # [n, H, C, D]
    if x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
    return x.flatten(0, 1)


def _decays(g: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """`g` [n Hv, C, 1]; d[t] as `g`, and d[t, i] [n Hv, C, C], zero for i > t.

    The logarithm of d[t, i] is the sum of g[j] for i < j <= t: a row that leaves out j <= i, times a triangle that
    leaves out j > t.
    """
    g = g.squeeze(-1)
    until, behind = (levels < 1).float(), (levels < 0).float()  # j <= t and j < t, of row j and column t
    since = (g @ until).exp()
    between = ((g.unsqueeze(-2) * behind) @ until).exp() * until  # [i, t]
    return since.unsqueeze(-1), between.transpose(-1, -2)


def _solved(system: Tensor, levels: Tensor) -> Tensor:
    """The inverse of I + the part of `system` [n Hv, C, C] below the diagonal.

    Blocks of one row are inverted already. Two blocks X and Y of the same size, joined by a block N below X and
    beside Y, have the inverse X' and Y' with -Y' N X' in the place of N.
    """
    inverse = (levels == 0).float() - system * (levels == 1).float()
    for level in range(2, levels.shape[0].bit_length()):
        joining = system * (levels == level).float()
        inverse = inverse - bmm(bmm(inverse, joining), inverse)
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
