"""Mistakes in how prompts are read: in the forms of the delta rule, in the convolution, and in the decoder."""

from __future__ import annotations

from coreai_zoo.recipe_files import RECIPES
from mutants import DENSE, Edit, Mutant

_MODULE = "gated_delta_chunks"
_FORWARD, _PADDED = (f"{_MODULE}.{name}.forward" for name in ("GatedDeltaChunks", "PaddedGatedDeltaRule"))
_IN_CHUNKS, _LEVELS, _DECAYS, _SOLVED = (
    f"{_MODULE}.{name}" for name in ("_in_chunks", "levels_of", "_decays", "_solved")
)
_UNROLLED = "gated_delta_net.GatedDeltaRule.forward"
_CONV = "gated_delta_chunks.CausalConv1dTokens.forward"
_LOOP = "gated_delta_net.GatedDeltaLoop.forward"


def _in(name: str, mistake: str, *edit: str) -> Mutant:
    return Mutant(name, mistake, DENSE, (Edit(*edit),), recipe=RECIPES["fp16"])


CHUNKS = (
    _in(
        "padding-that-writes",
        "padded tokens have g and beta 1",
        "gated_delta_chunks.padded",
        "(0, length))",
        "(0, length), value=1.0)",
    ),
    _in(
        "decay-without-the-token",
        "a decay from before leaves out the token's own",
        _DECAYS,
        "levels < 1",
        "levels < 0",
    ),
    _in(
        "decay-of-the-writer",
        "what a token wrote decays by its own g",
        _DECAYS,
        "levels < 0",
        "levels < 1",
    ),
    _in(
        "state-decays-by-the-first",
        "the state decays by the first token's g",
        _FORWARD,
        "since[:, -1:])",
        "since[:, :1])",
    ),
    _in(
        "state-does-not-decay",
        "the state does not decay over a chunk",
        _FORWARD,
        "kept * state + bmm",
        "state + bmm",
    ),
    _in(
        "written-without-the-state",
        "what is written does not see the state",
        _FORWARD,
        "u_v - bmm(u_k, state)",
        "u_v",
    ),
    _in(
        "state-of-the-chunk-only",
        "the state before a chunk is lost",
        _FORWARD,
        "kept * state + bmm(keys, written[-1])",
        "bmm(keys, written[-1])",
    ),
    _in(
        "output-without-the-state",
        "outputs leave out the state before the chunk",
        _FORWARD,
        "since * bmm(query, before) + ",
        "",
    ),
    _in(
        "output-state-undecayed",
        "outputs see the state before the chunk undecayed",
        _FORWARD,
        "since * bmm(query, before)",
        "bmm(query, before)",
    ),
    _in(
        "recalled-undecayed",
        "what is recalled has not decayed",
        _FORWARD,
        "bmm(solved, beta * since * key)",
        "bmm(solved, beta * key)",
    ),
    _in(
        "recalled-with-the-query",
        "what is recalled is recalled by the query",
        _FORWARD,
        "bmm(solved, beta * since * key)",
        "bmm(solved, beta * since * query)",
    ),
    _in(
        "diagonal-of-attention",
        "a token does not see what it wrote itself",
        _FORWARD,
        "between * bmm(query, key",
        "(between - (levels == 0).float()) * bmm(query, key",
    ),
    _in(
        "beta-left-out-of-the-system",
        "the system leaves out beta",
        _FORWARD,
        "_solved(beta * between",
        "_solved(between",
    ),
    _in(
        "beta-of-the-column",
        "the system has the beta of the earlier token",
        _FORWARD,
        "_solved(beta * between",
        "_solved(beta.transpose(-1, -2) * between",
    ),
    _in(
        "beta-left-out-of-what-is-written",
        "what is written is not scaled by beta",
        _FORWARD,
        "bmm(solved, beta * value)",
        "bmm(solved, value)",
    ),
    _in(
        "written-decays-from-the-start",
        "what is written decays as from the chunk's beginning",
        _FORWARD,
        "between[:, -1:].transpose",
        "between[:, :1].transpose",
    ),
    _in(
        "written-does-not-decay",
        "what is written does not decay until the end",
        _FORWARD,
        "(end * key).transpose",
        "key.transpose",
    ),
    _in(
        "chunks-backwards",
        "the outputs of the chunks are in the reverse order",
        _FORWARD,
        "out.unflatten(0, (-1, heads)).transpose",
        "out.unflatten(0, (-1, heads)).flip(0).transpose",
    ),
    _in(
        "outputs-of-the-padding",
        "the outputs are those of the last tokens, padding included",
        _PADDED,
        "[:, :tokens]",
        "[:, -tokens:]",
    ),
    _in("query-unscaled", "the query is not scaled", _FORWARD, " * query.shape[-1] ** -0.5", ""),
    _in(
        "not-normalised",
        "queries and keys are not normalised",
        _FORWARD,
        "l2_norm(key.float())",
        "key.float()",
    ),
    _in(
        "heads-tiled",
        "key heads serve value heads in turn",
        _IN_CHUNKS,
        "x.repeat_interleave(heads // x.shape[1], dim=1)",
        "x.repeat(1, heads // x.shape[1], 1, 1)",
    ),
    _in(
        "values-in-half",
        "values pass through half precision",
        _FORWARD,
        "value.float()",
        "value.half().float()",
    ),
    _in("decays-transposed", "a token sees what later ones write", _DECAYS, "between.transpose(-1, -2)", "between"),
    _in(
        "decays-in-half",
        "sums of g pass through half precision",
        _DECAYS,
        "(g @ until).exp()",
        "(g @ until).half().float().exp()",
    ),
    _in(
        "decays-as-differences",
        "a decay is a difference of two sums",
        _DECAYS,
        "((g.unsqueeze(-2) * behind) @ until).exp()",
        "((g @ until).unsqueeze(-2) - (g @ until).unsqueeze(-1)).clamp(max=0).exp()",
    ),
    _in(
        "system-with-the-sign-changed",
        "the joining blocks are added",
        _SOLVED,
        "inverse = inverse - bmm",
        "inverse = inverse + bmm",
    ),
    _in(
        "last-level-left-out",
        "the two halves of a chunk do not meet",
        _SOLVED,
        "range(2, levels.shape[0].bit_length())",
        "range(2, levels.shape[0].bit_length() - 1)",
    ),
    _in(
        "first-rows-not-joined",
        "neighbouring tokens do not meet",
        _SOLVED,
        "(levels == 0).float() - system * (levels == 1).float()",
        "(levels == 0).float() + 0 * system",
    ),
    _in(
        "joined-from-the-right-only",
        "blocks are joined without the upper one's inverse",
        _SOLVED,
        "bmm(bmm(inverse, joining), inverse)",
        "bmm(inverse, joining)",
    ),
    _in(
        "levels-by-distance",
        "tokens meet at the level of their distance",
        _LEVELS,
        "(row ^ column)",
        "(row - column).abs()",
    ),
)
"""In the rule by chunks; the recurrence in fp64 shows them."""

OTHER_FORMS = (
    _in(
        "unrolled-outputs-reversed",
        "the outputs of the steps come last first",
        _UNROLLED,
        "torch.stack(outputs,",
        "torch.stack(outputs[::-1],",
    ),
    _in(
        "unrolled-starts-anew",
        "each step begins with the state before the prompt",
        _UNROLLED,
        "out, state = recurrent",
        "out, after = recurrent",
    ),
    _in(
        "unrolled-beta-of-the-next",
        "a step has the next one's beta",
        _UNROLLED,
        "beta[:, t], state)",
        "beta[:, t - 1], state)",
    ),
    _in(
        "loop-heads-tiled",
        "key heads serve value heads in turn",
        _LOOP,
        "x.repeat_interleave(groups, dim=1)",
        "x.repeat(1, groups, 1, 1)",
    ),
    _in(
        "loop-beta-for-g",
        "decay and write strength are exchanged",
        _LOOP,
        "value, g, beta, state)",
        "value, beta, g, state)",
    ),
    _in(
        "window-one-too-early",
        "the window ends before the last token",
        _CONV,
        "inputs[:, tokens:]",
        "inputs[:, tokens - 1 : -1]",
    ),
    _in(
        "window-of-the-first",
        "the window is that of the prompt's first tokens",
        _CONV,
        "inputs[:, tokens:]",
        "inputs[:, : taps - 1]",
    ),
    _in(
        "taps-backwards",
        "the last tap meets the oldest token",
        _CONV,
        "for tap in range(taps)",
        "for tap in range(taps - 1, -1, -1)",
    ),
)
"""In the other forms of the rule and in the convolution; the recurrence and the reference show them."""

DECODER = (
    _in(
        "prompt-at-the-start",
        "keys of a prompt are written from position 0 on",
        "attention.write",
        "length - new.shape[2] : length] = new",
        ": new.shape[2]] = new",
    ),
    _in(
        "second-prompt-one-too-early",
        "keys of a second prompt are written one position too early",
        "attention.write",
        "length - new.shape[2] : length] = new",
        "max(0, length - new.shape[2] - 1) : max(new.shape[2], length - 1)] = new",
    ),
    _in(
        "positions-of-the-start",
        "a second prompt is rotated as the first",
        "decoder.DecoderModel.rotation",
        "-x.shape[1] :",
        ": x.shape[1]",
    ),
    _in(
        "prompt-sees-ahead",
        "tokens of a prompt attend to later ones",
        "coreai_zoo.composites:SDPAImpl.forward",
        "tril(key_length - query_length)",
        "tril(key_length)",
    ),
    _in(
        "prompt-sees-itself-only",
        "tokens of a prompt do not attend to what is before it",
        "coreai_zoo.composites:SDPAImpl.forward",
        "~seen",
        "~(seen & torch.ones_like(seen).triu(key_length - query_length))",
    ),
    _in(
        "states-exchanged-in-prompts",
        "layers hand their window on and not their state",
        "decoder.DecoderLayer.forward",
        "states.replace(self.index, *updated)",
        "states.replace(self.index, updated[0], states.read(self.index)[1])",
    ),
)
"""In the decoder over many tokens; single steps and transformers show them."""


def table() -> str:
    """The table of docs/gate-mutants.md."""
    by = {"the recurrence in fp64": CHUNKS, "the recurrence, or the reference": OTHER_FORMS, "single steps": DECODER}
    rows = ["| mutant | mistake | shown by |", "|---|---|---|"]
    rows += [f"| `{mutant.name}` | {mutant.mistake} | {who} |" for who, mutants in by.items() for mutant in mutants]
    return "\n".join(rows)
