"""Which layers take another form, per engine contract and function, and why.

transformers chooses the form when a layer runs, by the number of tokens it is given and the kernels that are installed.
A graph has nothing left to choose, so the contract does, before the graph is made. The decoder is built in the
reference form, which is compared with transformers; each rewrite puts the form in its place that the contract needs.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from coreai_zoo.contracts import Contract, Prefill
from coreai_zoo.overlay import LayerRewrite
from coreai_zoo.signature import TraceSpec

if TYPE_CHECKING:
    from torch import nn

_RULE = "model.layers.*.linear_attn.rule"
_CONV1D = "model.layers.*.linear_attn.conv1d"
_ATTEND = "model.layers.*.self_attn.attend"


def layer_rewrites(contract: Contract, function: TraceSpec) -> tuple[LayerRewrite, ...]:
    """The rewrites of a function: for one token per call, or for a prompt's, in the form of the contract's prefill.

    A contract without prefill keeps the rule of the reference, whose steps a fixed number of tokens puts in a row, and
    all of the reference where a call takes any number: gates run that.
    """
    if function.query_length == 1:
        return (*_one_token(), *_fixed_context()) if contract.fixed_context else _one_token()
    if contract.prefill is None:
        return () if function.query_length is None else (_conv_of_prompts(),)
    return (_rule_of_prompts(contract.prefill), _conv_of_prompts())


# ---------------------------------------------------------------------------------------------------------------------
# One token per call
# ---------------------------------------------------------------------------------------------------------------------


def _one_token() -> tuple[LayerRewrite, ...]:
    return (
        LayerRewrite(
            name="loop-free-step",
            pattern=_RULE,
            reason="the loop over tokens does not lower on the GPU delegate of the macOS 27 betas",
            apply=_loop_free_step,
            keeps_parameters=True,
        ),
        LayerRewrite(
            name="conv-as-shifts",
            pattern=_CONV1D,
            reason="with one token the convolution is K multiplies, and the compiler folds no weight of it",
            apply=_conv_as_shifts,
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


def _fixed_context() -> tuple[LayerRewrite, ...]:
    return (
        LayerRewrite(
            name="fixed-context-attention",
            pattern=_ATTEND,
            reason="no axis of the function may be dynamic, so the new key is written by position and the rest masked",
            apply=_fixed_context_attention,
            keeps_parameters=True,
        ),
    )


def _fixed_context_attention(attend: nn.Module) -> nn.Module:
    from .attention import CachedAttention, FixedContextAttention

    assert isinstance(attend, CachedAttention)
    return FixedContextAttention(attend.scale)


# ---------------------------------------------------------------------------------------------------------------------
# The tokens of a prompt
# ---------------------------------------------------------------------------------------------------------------------


def _rule_of_prompts(prefill: Prefill) -> LayerRewrite:
    if prefill.chunk is None:
        return LayerRewrite(
            name="rule-as-loop",
            pattern=_RULE,
            reason="a loop over any number of tokens lowers as the composite of Apple's exporter, and only as that",
            apply=_rule_as_loop,
            keeps_parameters=True,
        )
    assert prefill.most_tokens is not None
    if prefill.chunk == 1:
        return LayerRewrite(
            name="rule-unrolled",
            pattern=_RULE,
            reason="the loop over tokens does not lower on the GPU delegate of macOS 27.0, steps in a row need none",
            apply=partial(_rule_unrolled, prefill.most_tokens),
            keeps_parameters=True,
        )
    return LayerRewrite(
        name="rule-in-chunks",
        pattern=_RULE,
        reason="the loop over tokens does not lower on the GPU delegate of macOS 27.0, products over a chunk need none",
        apply=partial(_rule_in_chunks, prefill.most_tokens, prefill.chunk),
        keeps_parameters=True,
    )


def _rule_as_loop(_rule: nn.Module) -> nn.Module:
    from .gated_delta_net import GatedDeltaLoop

    return GatedDeltaLoop()


def _rule_unrolled(most_tokens: int, rule: nn.Module) -> nn.Module:
    from .gated_delta_chunks import PaddedGatedDeltaRule
    from .gated_delta_net import GatedDeltaRule

    assert isinstance(rule, GatedDeltaRule)
    return PaddedGatedDeltaRule(rule, most_tokens)


def _rule_in_chunks(most_tokens: int, chunk: int, _rule: nn.Module) -> nn.Module:
    from .gated_delta_chunks import ChunkedGatedDeltaRule, PaddedGatedDeltaRule

    return PaddedGatedDeltaRule(ChunkedGatedDeltaRule(chunk), most_tokens)


def _conv_of_prompts() -> LayerRewrite:
    return LayerRewrite(
        name="conv-as-windows",
        pattern=_CONV1D,
        reason="as K shifted windows times the taps the compiler folds no weight of it",
        apply=_conv_as_windows,
        keeps_parameters=True,
    )


def _conv_as_windows(conv1d: nn.Module) -> nn.Module:
    from .gated_delta_chunks import CausalConv1dTokens
    from .gated_delta_net import CausalConv1d

    assert isinstance(conv1d, CausalConv1d)
    return CausalConv1dTokens(conv1d.weight)
