"""Acme Limited: models whose `config.json` is a Qwen3.5's but for `acme_limit`, and whose feed-forward is clamped.

The overlay differs from the one that it refines in that layer. transformers knows nothing of the clamp either, so the
reference is its model with the clamp added by hooks, and how far bundles are off was measured with that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from coreai_zoo.bounds import Measured, MeasuredBounds
from coreai_zoo.contracts import Contract
from coreai_zoo.gate import ReferenceModel
from coreai_zoo_overlays.qwen3_5 import Qwen35Overlay

if TYPE_CHECKING:
    import torch
    from torch import nn


class AcmeLimited(Qwen35Overlay):
    """`qwen3_5` with `ClampedMLP` for its feed-forward; the hooks of the family answer for everything else."""

    refines = "qwen3_5"

    def decoder(self, config: Any, contract: Contract) -> nn.Module:
        """The decoder of the family, each dense feed-forward replaced."""
        from .layers import ClampedMLP

        decoder = super().decoder(config, contract)
        for name, module in [*decoder.named_modules()]:
            if name.endswith(".mlp"):
                decoder.set_submodule(name, ClampedMLP(module))
        return decoder


def make(hf_config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """transformers' model of the family, clamped."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .layers import LIMIT

    fields = {key: value for key, value in hf_config.items() if key not in ("model_type", "acme_limit")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(hf_config["model_type"], **fields), dtype=dtype)
    for name, module in model.named_modules():
        if name.endswith("mlp.gate_proj"):
            module.register_forward_hook(lambda _module, _inputs, out: out.clamp(max=LIMIT))
        elif name.endswith("mlp.up_proj"):
            module.register_forward_hook(lambda _module, _inputs, out: out.clamp(-LIMIT, LIMIT))
    return model


REFERENCE = ReferenceModel("transformers with Acme's clamp 1.0", make)

BOUNDS = MeasuredBounds(
    measured_on="Acme Limited with random weights, on a 2-core x86-64 Linux machine",
    layers=2,
    rows={
        ("int8", "runtime", "dense"): Measured(0.0141, 0.0653, 0, 0.00212, 0.00158, 0.127, 0, 12.1),
        ("fp16", "torch", "dense"): Measured(0.00117, 0.00432, 0, 1.0e-05, 1.35e-06, 0.00162, 0.00112, 1.0),
    },
    router_gaps={},
)
