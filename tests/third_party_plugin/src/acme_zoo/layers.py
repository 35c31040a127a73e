"""The layer that Acme's models have in place of the plain gated MLP.

Shapes: S tokens, D hidden, I width. Batch is always 1.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

LIMIT = 0.25


class ClampedMLP(nn.Module):
    """SwiGLU with its gate held below `LIMIT` and its up projection within plus and minus `LIMIT`.

    It takes over the projections of the layer that it replaces, so parameter names, and with them the weight map, stay.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj = mlp.gate_proj
        self.up_proj = mlp.up_proj
        self.down_proj = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """[1, S, D] to [1, S, D]."""
        gate = self.gate_proj(x).clamp(max=LIMIT)
        up = self.up_proj(x).clamp(min=-LIMIT, max=LIMIT)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out
