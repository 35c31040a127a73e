"""Feed-forward: a gated MLP, or a sparse mixture of experts with a shared one.

Differs from transformers' `Qwen3_5MoeSparseMoeBlock` in that only the chosen experts are multiplied, by the GatherMM
composite, instead of looping over the experts that any token hit.

Shapes: S tokens, D hidden, I width, E experts of which K are active. Batch is always 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_zoo.composites import GatherMM


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, S, D] to [1, S, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMoE(nn.Module):
    """K of E experts by a softmax router, plus a shared expert that every token visits through a gate."""

    def __init__(
        self, hidden_size: int, *, experts: int, top_k: int, intermediate_size: int, shared_intermediate_size: int
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden_size, experts, bias=False)
        self.experts = Experts(experts, hidden_size, intermediate_size)
        self.shared_expert = MLP(hidden_size, shared_intermediate_size)
        self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, S, D] to [1, S, D]."""
        probabilities = torch.softmax(self.gate(x).float(), dim=-1)  # over all experts, [1, S, E]
        weights, chosen = torch.topk(probabilities, self.top_k, dim=-1)  # [1, S, K]
        weights = weights / weights.sum(-1, keepdim=True)
        routed = self.experts(x, chosen.to(torch.int32), weights.to(x.dtype))
        return routed + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


class Experts(nn.Module):
    """E SwiGLU experts, packed as in the released checkpoints: `gate_up_proj` [E, 2I, D], `down_proj` [E, D, I]."""

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.gather_gate_up = GatherMM()
        self.gather_down = GatherMM()

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`x` [1, S, D], `chosen` int32 and `weights` [1, S, K]; the weighted sum of the chosen experts, [1, S, D]."""
        x = x[:, :, None, None]  # [1, S, 1, 1, D]
        gate, up = self.gather_gate_up(x, self.gate_up_proj.transpose(1, 2), chosen).chunk(2, dim=-1)  # [1, S, K, 1, I]
        out = self.gather_down(F.silu(gate) * up, self.down_proj.transpose(1, 2), chosen)  # [1, S, K, 1, D]
        return (out.squeeze(3) * weights.unsqueeze(-1)).sum(2)
