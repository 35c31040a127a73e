"""Mutants of precision and of eps: arithmetic in too few digits, and norms that start elsewhere.

On the samples most of them round less than half precision does anyway. Each is run on the stress sample that was made
to show it: `Mutant.on` is its name. Some show nowhere, for half precision rounds as much anyway; these are `GOLDEN`.
"""

from __future__ import annotations

import re

from torch import nn

from coreai_zoo.recipe_files import RECIPES
from mutants import DENSE, MOE, Edit, Mutant, change, eps

GOLDEN = "golden graph"

_GDN, _RULE, _L2 = (
    "gated_delta_net.GatedDeltaNet.forward",
    "gated_delta_net.recurrent_gated_delta_rule",
    "gated_delta_net.l2_norm",
)
_ATTENTION, _LAYER, _DECODER, _MOE = (
    "attention.Attention.forward",
    "decoder.DecoderLayer.forward",
    "decoder.Decoder.forward",
    "feed_forward.SparseMoE.forward",
)
_ROPE, _ROPE_INIT = "attention.RotaryEmbedding.forward", "attention.RotaryEmbedding.__init__"
_NORM, _SDPA = "coreai_zoo.composites:RMSNormImpl.forward", "coreai_zoo.composites:SDPAImpl.forward"
_SMALL, _SLOW, _LARGE, _OFFSET, _TAIL, _LONG = (
    "small-activations",
    "slow-decay",
    "large-activations",
    "offset-scores",
    "fat-tailed-head",
    "long-context",
)


def rescaled_by_row(decoder: nn.Module) -> None:
    """Integers of the head for one scale a row."""
    weights = dict(decoder.named_parameters())
    codes = next(value for name, value in weights.items() if re.search(r"lm_head\..*original$", name))
    scales = next(value for name, value in weights.items() if re.search(r"lm_head\..*scales$", name))
    blocks = codes.data.float().view(*scales.shape, -1) * scales.data.float().unsqueeze(-1)
    wide = scales.data.amax(-1, keepdim=True).expand_as(scales).clone()
    codes.data = (blocks / wide.float().unsqueeze(-1)).round().clamp(-128, 127).view(codes.shape).to(codes.dtype)
    scales.data = wide


def _norm_eps(name: str, words: str, pattern: str, value: float = 1e-5) -> Mutant:
    return Mutant(name, f"{words} has eps {value:g}", weights=eps(value, pattern), recipe=_PLAIN, on=_SMALL)


def _in(name: str, mistake: str, on: str, *edits: tuple[str, str, str], kinds: tuple[str, ...] = DENSE + MOE) -> Mutant:
    return Mutant(name, mistake, kinds, tuple(Edit(*edit) for edit in edits), recipe=_PLAIN, on=on)


_PLAIN = RECIPES["fp16"]
_INTO_SOFTPLUS = "F.softplus(self.in_proj_a(x).float() + self.dt_bias)"

_ALL = (
    # -- eps
    _norm_eps("eps-of-the-input-norm", "the norm before token mixing", r"input_layernorm"),
    _norm_eps("eps-of-the-second-norm", "the norm before the feed-forward", r"post_attention_layernorm"),
    _norm_eps("eps-of-the-final-norm", "the last norm", r"model\.norm"),
    _norm_eps("eps-of-the-query-norm", "the norm of queries", r"q_norm"),
    _norm_eps("eps-of-the-key-norm", "the norm of keys", r"k_norm"),
    _norm_eps("eps-of-the-gated-norm", "the gated output norm", r"linear_attn\.norm"),
    _norm_eps("eps-a-tenth", "every norm", r"", 1e-7),
    _norm_eps("eps-twice", "every norm", r"", 2e-6),
    _in("l2-eps", "the L2 norm has eps 1e-5", _SMALL, (_L2, "_L2_EPS", "1e-5")),
    _in("l2-eps-left-out", "the L2 norm has no eps", _SMALL, (_L2, " + _L2_EPS", ""), kinds=DENSE),
    _in(
        "eps-after-the-root",
        "eps is added to the root mean square, not to the mean square",
        _SMALL,
        (
            _NORM,
            "torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)",
            "(x.square().mean(-1, keepdim=True).sqrt() + self.eps).reciprocal()",
        ),
    ),
    # -- positions
    _in(
        "positions-in-half",
        "positions go through fp16",
        _LONG,
        (_ROPE, "positions.float()", "positions.half().float()"),
        kinds=DENSE,
    ),
    _in(
        "positions-in-bf16",
        "positions go through bf16",
        _LONG,
        (_ROPE, "positions.float()", "positions.bfloat16().float()"),
        kinds=DENSE,
    ),
    _in(
        "angles-in-half",
        "angles go through fp16",
        _LONG,
        (_ROPE, "angles.cos(), angles.sin()", "angles.half().float().cos(), angles.half().float().sin()"),
        kinds=DENSE,
    ),
    _in(
        "frequencies-in-half",
        "inverse frequencies are stored in fp16",
        _LONG,
        (_ROPE_INIT, '"inverse_frequency", frequency', '"inverse_frequency", frequency.half().float()'),
        kinds=DENSE,
    ),
    # -- decay and write strength
    _in(
        "softplus-in-half",
        "softplus is computed in fp16",
        _SLOW,
        (_GDN, _INTO_SOFTPLUS, "F.softplus(self.in_proj_a(x) + self.dt_bias.half()).float()"),
    ),
    _in("dt-bias-in-half", "dt_bias is stored in fp16", _SLOW, (_GDN, "self.dt_bias)", "self.dt_bias.half().float())")),
    _in("a-in-half", "A is stored in fp16", _SLOW, (_GDN, "self.A *", "self.A.half().float() *")),
    _in("decay-in-half", "exp(g) is rounded to fp16", _SLOW, (_RULE, "g.exp()", "g.half().exp().float()"), kinds=DENSE),
    _in("decay-in-bf16", "exp(g) is rounded to bf16", _SLOW, (_RULE, "g.exp()", "g.exp().bfloat16().float()")),
    # -- delta rule and states
    _in(
        "l2-norm-in-half",
        "the L2 norm is computed in fp16",
        _LARGE,
        (_RULE, "l2_norm(x.float())", "l2_norm(x).float()"),
    ),
    _in(
        "delta-rule-in-half",
        "the whole delta rule is computed in fp16",
        _SLOW,
        (
            _GDN,
            "self.rule(query, key, value, g, beta, recurrent_state.float())",
            "self.rule(query, key, value, g.to(x.dtype), beta.to(x.dtype), recurrent_state)",
        ),
        (_RULE, "x.float()", "x"),
        (_RULE, "value.float()", "value"),
        kinds=DENSE,
    ),
    _in(
        "recurrent-state-in-bf16",
        "the recurrent state is carried in bf16",
        _SLOW,
        (_GDN, "state.to(recurrent_state.dtype)", "state.bfloat16().to(recurrent_state.dtype)"),
    ),
    _in(
        "conv-state-in-bf16",
        "the convolution's state is carried in bf16",
        _SLOW,
        ("gated_delta_net.CausalConv1dStep.forward", "window[..., 1:]", "window[..., 1:].bfloat16().to(window.dtype)"),
        kinds=DENSE,
    ),
    # -- attention
    _in(
        "scores-in-half",
        "attention scores are computed in fp16",
        _OFFSET,
        (
            _SDPA,
            "(query.float() * self.scale) @ key.float().transpose(-1, -2)",
            "(query * self.scale) @ key.transpose(-1, -2)",
        ),
    ),
    _in(
        "softmax-in-half",
        "attention's softmax is computed in fp16",
        _OFFSET,
        (_SDPA, "torch.softmax(scores.masked_fill", "torch.softmax(scores.half().masked_fill"),
    ),
    # -- norms, stream, router, head
    _in("norm-in-half", "the mean square is computed in fp16", _LARGE, (_NORM, "x = input.float()", "x = input")),
    _in(
        "norm-in-bf16",
        "what is normed goes through bf16",
        _LARGE,
        (_NORM, "x = input.float()", "x = input.bfloat16().float()"),
    ),
    _in(
        "residual-in-bf16",
        "the residual stream is carried in bf16",
        _LARGE,
        (_LAYER, "x = x + mixed", "x = (x + mixed).bfloat16().to(x.dtype)"),
    ),
    _in(
        "logits-in-bf16",
        "logits are rounded to bf16",
        _LARGE,
        (_DECODER, "self.lm_head(hidden)", "self.lm_head(hidden).bfloat16().to(hidden.dtype)"),
    ),
    _in(
        "router-in-bf16",
        "the router's logits are rounded to bf16",
        _LARGE,
        (_MOE, "self.gate(x).float()", "self.gate(x).bfloat16().float()"),
        kinds=MOE,
    ),
    # -- head
    Mutant(
        "head-per-row", "the head has one scale a row", kinds=DENSE, weights=rescaled_by_row, in_file=True, on=_TAIL
    ),
    Mutant(
        "head-tails-cut",
        "the head's integers are cut at three quarters of their range",
        weights=change(r"lm_head\..*original$", lambda codes: codes.clamp(-96, 95)),
        in_file=True,
        on=_TAIL,
    ),
)

# What rounds no more than half precision does anyway, whatever it is run on: the graph shows it all the same.
_IN_THE_GRAPH = (
    _in(
        "beta-in-bf16",
        "the write strength is rounded to bf16",
        GOLDEN,
        (_GDN, "self.in_proj_b(x).float().sigmoid()", "self.in_proj_b(x).sigmoid().bfloat16().float()"),
    ),
    _in(
        "beta-in-half",
        "the write strength is computed in fp16",
        GOLDEN,
        (_GDN, "self.in_proj_b(x).float().sigmoid()", "self.in_proj_b(x).sigmoid().float()"),
    ),
    _in(
        "log-decay-in-half",
        "g is rounded to fp16",
        GOLDEN,
        (_GDN, "beta = self.in_proj_b", "g = g.half().float()\n    beta = self.in_proj_b"),
    ),
    _in("a-in-bf16", "A is rounded to bf16", GOLDEN, (_GDN, "self.A *", "self.A.bfloat16().float() *")),
    _in(
        "router-softmax-in-half",
        "the router's softmax is computed in fp16",
        GOLDEN,
        (_MOE, "torch.softmax(self.gate(x).float(), dim=-1)", "torch.softmax(self.gate(x), dim=-1)"),
        kinds=MOE,
    ),
)

PRECISION = {mutant.name: mutant for mutant in (*_ALL, *_IN_THE_GRAPH)}
assert len(PRECISION) == len(_ALL) + len(_IN_THE_GRAPH), "a name is there twice"
