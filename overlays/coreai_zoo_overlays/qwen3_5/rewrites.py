"""Which layers take another form, per engine contract, and why.

transformers chooses the form when a layer runs, by the number of tokens it is given and the kernels that are installed.
A graph has nothing left to choose, so the contract does, before the graph is made. The decoder is built in the
reference form, which is compared with transformers; each rewrite puts the form in its place that the contract needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coreai_zoo.contracts import Contract
from coreai_zoo.overlay import LayerRewrite
from coreai_zoo.signature import TraceSpec

if TYPE_CHECKING:
    from torch import nn


def layer_rewrites(contract: Contract, function: TraceSpec) -> tuple[LayerRewrite, ...]:
    """The rewrites of a function that takes one token per call; none otherwise."""
    if function.query_length != 1:
        return ()
    one_token = (
        LayerRewrite(
            name="loop-free-step",
            pattern="model.layers.*.linear_attn.rule",
            reason="the loop over tokens does not lower on the GPU delegate of the macOS 27 betas",
            apply=_loop_free_step,
            keeps_parameters=True,
        ),
        LayerRewrite(
            name="conv-as-shifts",
            pattern="model.layers.*.linear_attn.conv1d",
            reason="with one token the convolution is K multiplies, and the compiler folds no weight of it",
            apply=_conv_as_shifts,
            keeps_parameters=True,
        ),
    )
    if not contract.fixed_context:
        return one_token
    return (
        *one_token,
        LayerRewrite(
            name="fixed-context-attention",
            pattern="model.layers.*.self_attn.attend",
            reason="no axis of the function may be dynamic, so the new key is written by position and the rest masked",
            apply=_fixed_context_attention,
            keeps_parameters=True,
        ),
    )


def _loop_free_step(_rule: nn.Module) -> nn.Module:
    from .gated_delta_net import GatedDeltaStep

    return GatedDeltaStep()


def _conv_as_shifts(conv1d: nn.Module) -> nn.Module:
    from .gated_delta_net import CausalConv1d, CausalConv1dStep

    assert isinstance(conv1d, CausalConv1d)
    return CausalConv1dStep(conv1d.weight)


def _fixed_context_attention(attend: nn.Module) -> nn.Module:
    from .attention import CachedAttention, FixedContextAttention

    assert isinstance(attend, CachedAttention)
    return FixedContextAttention(attend.scale)
