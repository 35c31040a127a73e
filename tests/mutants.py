"""Mutants of the overlay: plausible mistakes of porting the model, each made on purpose, to see the gate catch it.

A mutant is one of two things, or both:

* edits of the overlay's source: a few characters of one function, replaced while the mutant is in force. The text to
  replace must be there exactly once, so that a mutant that no longer mutates is an error and not a pass;
* a change of a built decoder's weights, as a wrong weight map, converter or unpacker would have left them.

`MUTANTS` holds them by name, in the order of the model: `with applied(mutant): ...` puts the edits in force, and
`mutant.weights(decoder)` changes a decoder that has its weights.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor, nn

from coreai_zoo.composites import RMSNormImpl
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import QuantizationSpec, Recipe

PACKAGE = "coreai_zoo_overlays.qwen3_5."
DENSE, MOE = ("dense",), ("moe",)
BOTH = DENSE + MOE
SAMPLE = "sample"

# Gains that a checkpoint stores minus one: all but the output norm of a gated delta net.
ONE_PLUS_NORM = r"(layernorm|[qk]_norm|model\.norm)\.weight$"


@frozen
class Edit:
    """A replacement in the source of one function of the overlay.

    Attributes:
        function: dotted path below the overlay's package, for example `attention.Attention.forward`; elsewhere the
            module, a colon, and the path in it.
        old: text that occurs exactly once in its source.
        new: what stands there instead.
    """

    function: str
    old: str
    new: str


@frozen
class Mutant:
    """A mistake.

    Attributes:
        name: short, in kebab case.
        mistake: what was done wrong, one phrase.
        kinds: the samples on which it makes a difference.
        edits: of the overlay's source.
        weights: changes a decoder after its weights are in place.
        recipe: of the bundle that carries the mistake.
        declared: the recipe that it claims to be, where that is another.
        in_file: what is wrong is a quantized file, so that a control made from the checkpoint is right.
        runs: how often the prompt is run before the last run is judged.
        on: what it is run on: the sample, or the stress sample of that name.
    """

    name: str
    mistake: str
    kinds: tuple[str, ...] = BOTH
    edits: tuple[Edit, ...] = ()
    weights: Callable[[nn.Module], None] = lambda decoder: None
    recipe: Recipe = field(default=RECIPES["int8hu"], repr=False)
    declared: Recipe | None = field(default=None, repr=False)
    in_file: bool = False
    runs: int = 1
    on: str = SAMPLE


@contextlib.contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """The overlay with the mutant's edits; decoders must be both built and run inside.

    Raises:
        LookupError: when a text to replace is not there exactly once.
    """
    functions: dict[str, list[Edit]] = {}
    for edit in mutant.edits:
        functions.setdefault(edit.function, []).append(edit)
    with contextlib.ExitStack() as stack:
        for function, edits in functions.items():
            stack.enter_context(_edited(function, edits))
        yield


@contextlib.contextmanager
def _edited(function: str, edits: list[Edit]) -> Iterator[None]:
    elsewhere, _, inside = function.rpartition(":")
    module_name, *path = ([elsewhere] if elsewhere else []) + inside.split(".")
    module = importlib.import_module(elsewhere or PACKAGE + module_name)
    owner: Any = module
    for part in path[:-1]:
        owner = getattr(owner, part)
    original = getattr(owner, path[-1])
    source = textwrap.dedent(inspect.getsource(original))
    for edit in edits:
        if source.count(edit.old) != 1:
            raise LookupError(f"{function} holds {source.count(edit.old)} times the text {edit.old!r}")
        source = source.replace(edit.old, edit.new)
    setattr(owner, path[-1], _compiled(source, path[-1], module, owner))
    try:
        yield
    finally:
        setattr(owner, path[-1], original)


def _compiled(source: str, name: str, module: Any, owner: Any) -> Callable[..., Any]:
    """The function that `source` defines, in the namespace of its module and with `super()` of its class."""
    # `super()` without arguments looks its class up in a variable of the enclosing function that is called __class__.
    wrapper = f"def make(__class__):\n{textwrap.indent(source, '    ')}\n    return {name}\n"
    namespace: dict[str, Any] = {}
    code = compile("from __future__ import annotations\n" + wrapper, f"<mutant of {name}>", "exec")
    exec(code, vars(module), namespace)
    made: Callable[..., Any] = namespace["make"](owner)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Changes of weights
# ---------------------------------------------------------------------------------------------------------------------


def change(pattern: str, function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    """Change every parameter whose name matches the regular expression `pattern`.

    A quantized weight is several parameters: `NAME.original`, its integers, `NAME.0.scales`, `NAME.0.zero_points`.
    """

    def apply(decoder: nn.Module) -> None:
        found = [parameter for name, parameter in decoder.named_parameters() if re.search(pattern, name)]
        assert found, f"no parameter's name matches {pattern}"
        for parameter in found:
            changed = function(parameter.data)
            assert changed.shape == parameter.shape and changed.dtype == parameter.dtype, pattern
            parameter.data = changed.contiguous()

    return apply


def swap_nibbles(codes: Tensor) -> Tensor:
    """Exchange the first and second of each pair."""
    return codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def eps(value: float, pattern: str = "") -> Callable[[nn.Module], None]:
    """Give every norm whose path matches the regular expression `pattern` this eps."""

    def apply(decoder: nn.Module) -> None:
        modules = decoder.named_modules()
        norms = [module for path, module in modules if isinstance(module, RMSNormImpl) and re.search(pattern, path)]
        assert norms, f"no norm's path matches {pattern}"
        for norm in norms:
            norm.eps = value

    return apply


def swap(one: str, other: str) -> Callable[[nn.Module], None]:
    """Exchange two submodules of each module that has both."""

    def apply(decoder: nn.Module) -> None:
        owners = [module for _, module in decoder.named_modules() if hasattr(module, one) and hasattr(module, other)]
        assert owners, f"no module has {one} and {other}"
        for owner in owners:
            first, second = getattr(owner, one), getattr(owner, other)
            setattr(owner, one, second)
            setattr(owner, other, first)

    return apply


def swap_layers(decoder: nn.Module) -> None:
    """Exchange the second and third layer, which are of one kind."""
    layers = decoder.get_submodule("model.layers")
    first, second = layers[1], layers[2]  # type: ignore[index]
    for name in ("linear_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        one, other = getattr(first, name), getattr(second, name)
        setattr(first, name, other)
        setattr(second, name, one)


def tie_head(decoder: nn.Module) -> None:
    """Let the embedding be the head."""
    decoder.lm_head = nn.Linear(1, 1, bias=False)
    decoder.lm_head.weight = decoder.get_submodule("model.embed_tokens").weight  # type: ignore[assignment]


# ---------------------------------------------------------------------------------------------------------------------
# Recipes whose files a mutant misreads
# ---------------------------------------------------------------------------------------------------------------------


def body_as(name: str, spec: QuantizationSpec, *roles: str) -> Recipe:
    """The ship recipe with some roles, or the whole body, quantized by `spec`."""
    ship = RECIPES["int8hu"]
    chosen = roles or tuple(role for role, given in ship.specs.items() if given is not None and role != "head")
    return Recipe.by_role(name, "For a mutant.", {**ship.specs, **dict.fromkeys(chosen, spec)})


INT4_BODY = body_as("int4hu", QuantizationSpec("int4", "symmetric_with_clipping", 32))
UINT8_BODY = body_as("uint8hu", QuantizationSpec("uint8", "asymmetric", 32))
INT4_GDN_OUT = body_as("int4gdnout", QuantizationSpec("int4", "symmetric_with_clipping", 32), "gdn.out")


# ---------------------------------------------------------------------------------------------------------------------
# The mutants
# ---------------------------------------------------------------------------------------------------------------------

_ATTENTION, _GDN, _LAYER = (
    "attention.Attention.forward",
    "gated_delta_net.GatedDeltaNet.forward",
    "decoder.DecoderLayer.forward",
)
_RULE = "gated_delta_net.recurrent_gated_delta_rule"
_CONVS = "gated_delta_net.CausalConv1d.forward", "gated_delta_net.CausalConv1dStep.forward"
_ROPE_INIT, _ROPE, _ROTATE = (
    "attention.RotaryEmbedding.__init__",
    "attention.RotaryEmbedding.forward",
    "attention.apply_rotary",
)
_MOE, _MODEL = "feed_forward.SparseMoE.forward", "decoder.DecoderModel.forward"

_ALL = (
    # -- embedding, norms, residual stream, head
    Mutant(
        "embedding-of-the-neighbour",
        "the row of the next token is looked up",
        edits=(
            Edit(
                _MODEL,
                "self.embed_tokens(input_ids)",
                "self.embed_tokens((input_ids + 1) % self.embed_tokens.num_embeddings)",
            ),
        ),
    ),
    Mutant(
        "embedding-scaled",
        "the embedding is multiplied by sqrt(D), as other families do",
        edits=(
            Edit(
                _MODEL,
                "self.embed_tokens(input_ids)",
                "self.embed_tokens(input_ids) * self.embed_tokens.embedding_dim**0.5",
            ),
        ),
    ),
    Mutant(
        "norm-gain-without-the-one",
        "gains are used as stored, without adding 1",
        weights=change(ONE_PLUS_NORM, lambda gain: gain - 1),
    ),
    Mutant(
        "norm-gain-with-two-ones",
        "1 is added to gains that have it already (an MLX checkpoint taken for Hugging Face's)",
        weights=change(ONE_PLUS_NORM, lambda gain: gain + 1),
    ),
    Mutant(
        "gated-norm-gain-plus-one",
        "1 is added to the gated output norm, which is stored as it is",
        weights=change(r"linear_attn\.norm\.weight$", lambda gain: gain + 1),
    ),
    Mutant("norm-eps", "every norm has eps 1e-5 instead of 1e-6", weights=eps(1e-5)),
    Mutant(
        "norms-swapped",
        "the two norms of a layer are exchanged",
        weights=swap("input_layernorm", "post_attention_layernorm"),
    ),
    Mutant(
        "residual-after-norm",
        "the normed input is added back instead of the input",
        edits=(Edit(_LAYER, "x = x + mixed", "x = normed + mixed"),),
    ),
    Mutant(
        "feed-forward-before-norm",
        "the feed-forward is given the stream, not its norm",
        edits=(Edit(_LAYER, "self.mlp(self.post_attention_layernorm(x))", "self.mlp(x)"),),
    ),
    Mutant(
        "final-norm-left-out", "the last norm is left out", edits=(Edit(_MODEL, "return self.norm(x)", "return x"),)
    ),
    Mutant("layers-in-wrong-order", "two layers of one kind are exchanged", weights=swap_layers),
    Mutant("head-tied", "the head is the embedding, though it is untied", weights=tie_head),
    # -- softmax attention
    Mutant(
        "attention-gate-not-interleaved",
        "query and gate are split once, not per head",
        edits=(
            Edit(
                _ATTENTION,
                "query, gate = self.q_proj(x).unflatten(-1, (self.heads, 2 * self.head_dim)).chunk(2, dim=-1)",
                "query, gate = (half.unflatten(-1, (self.heads, -1)) for half in self.q_proj(x).chunk(2, dim=-1))",
            ),
        ),
    ),
    Mutant(
        "attention-gate-first",
        "gate and query are read in the wrong order",
        edits=(Edit(_ATTENTION, "query, gate = self", "gate, query = self"),),
    ),
    Mutant(
        "attention-gate-left-out", "the output is not gated", edits=(Edit(_ATTENTION, "out * gate.sigmoid()", "out"),)
    ),
    Mutant(
        "attention-gate-silu",
        "the gate goes through silu instead of a sigmoid",
        edits=(Edit(_ATTENTION, "gate.sigmoid()", "(gate * gate.sigmoid())"),),
    ),
    Mutant("q-norm-left-out", "queries are not normed", edits=(Edit(_ATTENTION, "self.q_norm(query)", "query"),)),
    Mutant("k-norm-left-out", "keys are not normed", edits=(Edit(_ATTENTION, "self.k_norm(key)", "key"),)),
    Mutant("q-and-k-norm-swapped", "the gains of queries and keys are exchanged", weights=swap("q_norm", "k_norm")),
    Mutant(
        "qk-norm-after-rope",
        "queries and keys are rotated first and normed then",
        edits=(
            Edit(
                _ATTENTION,
                "apply_rotary(self.q_norm(query).transpose(1, 2), *rotation)",
                "self.q_norm(apply_rotary(query.transpose(1, 2), *rotation))",
            ),
            Edit(
                _ATTENTION,
                "apply_rotary(self.k_norm(key).transpose(1, 2), *rotation)",
                "self.k_norm(apply_rotary(key.transpose(1, 2), *rotation))",
            ),
        ),
    ),
    Mutant(
        "sdpa-unscaled",
        "scores are not divided by sqrt(head_dim)",
        edits=(Edit("attention.Attention.__init__", "scale=self.head_dim**-0.5", "scale=1.0"),),
    ),
    Mutant(
        "sdpa-scale-of-the-rotated-part",
        "scores are divided by the square root of the rotated width",
        edits=(Edit("attention.Attention.__init__", "scale=self.head_dim**-0.5", "scale=config.rotary_dim**-0.5"),),
    ),
    Mutant(
        "kv-written-one-position-late",
        "the new key and value are written at p + 1, behind what is read",
        edits=(
            Edit(
                "attention.write",
                "store[:, :, length - new.shape[2] : length] = new",
                "room = store[:, :, length - new.shape[2] + 1 : length + 1]\n"
                "    room.copy_(new[:, :, : room.shape[2]])",
            ),
        ),
    ),
    Mutant(
        "kv-slot-shared",
        "every attention layer uses the first slot of the cache",
        edits=(Edit(_LAYER, "(keys[self.index], values[self.index])", "(keys[0], values[0])"),),
    ),
    # -- RoPE
    Mutant(
        "rope-on-all-dimensions",
        "the whole head is rotated",
        edits=(
            Edit(_ROPE_INIT, "config.rotary_dim, 2, dtype", "config.head_dim, 2, dtype"),
            Edit(_ROPE_INIT, 'device="cpu") / config.rotary_dim', 'device="cpu") / config.head_dim'),
        ),
    ),
    Mutant(
        "rope-frequencies-of-the-head",
        "exponents are divided by the head's width, not the rotated one",
        edits=(Edit(_ROPE_INIT, 'device="cpu") / config.rotary_dim', 'device="cpu") / config.head_dim'),),
    ),
    Mutant("rope-theta", "theta is 10,000", edits=(Edit(_ROPE_INIT, "config.rope_theta**", "10_000.0**"),)),
    Mutant(
        "rope-interleaved",
        "neighbours are rotated together, not halves",
        edits=(
            Edit(
                _ROTATE,
                "first, second = rotated.chunk(2, dim=-1)",
                "first, second = rotated[..., ::2], rotated[..., 1::2]\n"
                "    cos, sin = (table.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for table in (cos, sin))",
            ),
            Edit(_ROTATE, "torch.cat((-second, first), dim=-1)", "torch.stack((-second, first), dim=-1).flatten(-2)"),
        ),
    ),
    Mutant(
        "rope-backwards",
        "the sine has the other sign",
        edits=(Edit(_ROTATE, "torch.cat((-second, first), dim=-1)", "torch.cat((second, -first), dim=-1)"),),
    ),
    Mutant(
        "rope-not-on-keys",
        "keys are not rotated",
        edits=(
            Edit(
                _ATTENTION,
                "apply_rotary(self.k_norm(key).transpose(1, 2), *rotation)",
                "self.k_norm(key).transpose(1, 2)",
            ),
        ),
    ),
    Mutant(
        "rope-query-one-position-late",
        "queries are rotated as if they stood at p + 1",
        edits=(
            Edit(
                "decoder.DecoderModel.rotation",
                "return self.rotary_emb(position_ids[0, -x.shape[1] :], x.dtype)",
                "at = position_ids[0, -x.shape[1] :]\n"
                "    return self.rotary_emb(at, x.dtype), self.rotary_emb(at + 1, x.dtype)",
            ),
            Edit(
                _ATTENTION,
                "self.q_norm(query).transpose(1, 2), *rotation",
                "self.q_norm(query).transpose(1, 2), *rotation[1]",
            ),
            Edit(
                _ATTENTION,
                "self.k_norm(key).transpose(1, 2), *rotation",
                "self.k_norm(key).transpose(1, 2), *rotation[0]",
            ),
        ),
    ),
    Mutant(
        "rope-sections",
        "the height and width planes of mRoPE are left at zero for text",
        edits=(
            Edit(
                _ROPE,
                "* self.inverse_frequency",
                "* self.inverse_frequency * (torch.arange(len(self.inverse_frequency)) % 3 == 0)",
            ),
        ),
    ),
    # -- gated delta net: projections, gates, output
    Mutant(
        "gdn-q-and-k-swapped",
        "queries and keys are exchanged",
        edits=(Edit(_GDN, "query, key, value = F.silu", "key, query, value = F.silu"),),
    ),
    Mutant(
        "gdn-a-and-b-swapped",
        "the projections of decay and write strength are exchanged",
        weights=swap("in_proj_a", "in_proj_b"),
    ),
    Mutant(
        "gdn-grouped-by-key-head",
        "q, k and v are read per key head, as Qwen3-Next packs them",
        edits=(
            Edit(
                _GDN,
                "query, key, value = F.silu(mixed).split(self.split, dim=-1)",
                "grouped = F.silu(mixed).unflatten(-1, (self.key_heads, -1))\n"
                "    query, key, value = (\n"
                "        part.flatten(2)\n"
                "        for part in grouped.split([size // self.key_heads for size in self.split], dim=-1)\n"
                "    )",
            ),
        ),
    ),
    Mutant(
        "beta-without-sigmoid",
        "the write strength is used as projected",
        edits=(Edit(_GDN, "self.in_proj_b(x).float().sigmoid()", "self.in_proj_b(x).float()"),),
    ),
    Mutant(
        "decay-without-softplus",
        "softplus is left out of the decay",
        edits=(
            Edit(
                _GDN,
                "F.softplus(self.in_proj_a(x).float() + self.dt_bias)",
                "(self.in_proj_a(x).float() + self.dt_bias)",
            ),
        ),
    ),
    Mutant(
        "decay-without-dt-bias",
        "dt_bias is left out of the decay",
        edits=(Edit(_GDN, "self.in_proj_a(x).float() + self.dt_bias", "self.in_proj_a(x).float()"),),
    ),
    Mutant(
        "dt-bias-after-softplus",
        "dt_bias is added after softplus",
        edits=(
            Edit(
                _GDN,
                "F.softplus(self.in_proj_a(x).float() + self.dt_bias)",
                "(F.softplus(self.in_proj_a(x).float()) + self.dt_bias)",
            ),
        ),
    ),
    Mutant(
        "decay-sign",
        "the state grows where it should decay",
        # As -self.A, the compiler would compute with the weight, which is refused before it is lowered.
        edits=(
            Edit(_GDN, "g = self.A * F", "g = torch.abs(self.A * F"),
            Edit(_GDN, "self.dt_bias)  #", "self.dt_bias))  #"),
        ),
    ),
    Mutant(
        "a-log-without-exp",
        "A is -A_log instead of -exp(A_log)",
        weights=change(r"linear_attn\.A$", lambda decay: -(-decay).log()),
    ),
    Mutant(
        "z-gate-left-out",
        "the output is not gated by silu(z)",
        edits=(Edit(_GDN, "self.norm(out.to(x.dtype)) * F.silu(z)", "self.norm(out.to(x.dtype))"),),
    ),
    Mutant(
        "z-gate-sigmoid",
        "the output is gated by sigmoid(z) instead of silu(z)",
        edits=(Edit(_GDN, "F.silu(z)", "z.sigmoid()"),),
    ),
    Mutant(
        "z-gate-before-norm",
        "the output is gated first and normed then, as in Mamba 2",
        edits=(Edit(_GDN, "self.norm(out.to(x.dtype)) * F.silu(z)", "self.norm(out.to(x.dtype) * F.silu(z))"),),
    ),
    # -- gated delta net: the rule
    Mutant(
        "gva-tiled",
        "key heads are tiled over the value heads instead of serving consecutive ones",
        edits=(
            Edit(
                "gated_delta_net.repeat_heads",
                "x.unsqueeze(2).expand(-1, -1, groups, -1).flatten(1, 2)",
                "x.repeat(1, groups, 1)",
            ),
        ),
    ),
    Mutant(
        "gdn-q-unscaled",
        "queries are not scaled by Dk ** -0.5",
        edits=(Edit(_RULE, "query * query.shape[-1] ** -0.5", "query"),),
    ),
    Mutant(
        "l2-norm-left-out",
        "neither queries nor keys are brought to unit length",
        edits=(Edit(_RULE, "l2_norm(x.float())", "x.float()"),),
    ),
    Mutant(
        "k-not-normalised",
        "keys are not brought to unit length",
        edits=(
            Edit(
                _RULE,
                "query, key = (repeat_heads(l2_norm(x.float()), groups) for x in (query, key))",
                "query, key = repeat_heads(l2_norm(query.float()), groups), repeat_heads(key.float(), groups)",
            ),
        ),
    ),
    Mutant(
        "q-not-normalised",
        "queries are not brought to unit length",
        edits=(
            Edit(
                _RULE,
                "query, key = (repeat_heads(l2_norm(x.float()), groups) for x in (query, key))",
                "query, key = repeat_heads(query.float(), groups), repeat_heads(l2_norm(key.float()), groups)",
            ),
        ),
    ),
    Mutant(
        "no-correction",
        "values are added without taking off what the memory holds already",
        edits=(Edit(_RULE, "value.float() - recalled", "value.float()"),),
    ),
    Mutant(
        "recalled-before-decay",
        "what the memory holds is read before it decays",
        edits=(
            Edit(
                _RULE,
                "state = state * g.exp()[..., None, None]\n    recalled = (state * key[..., None]).sum(-2)",
                "recalled = (state * key[..., None]).sum(-2)\n    state = state * g.exp()[..., None, None]",
            ),
        ),
    ),
    Mutant(
        "read-before-write",
        "the output is read before the new value is written",
        edits=(
            Edit(
                _RULE,
                "state = state + key[..., None] * correction[..., None, :]\n"
                "    return (state * query[..., None]).sum(-2), state",
                "before = state\n"
                "    state = state + key[..., None] * correction[..., None, :]\n"
                "    return (before * query[..., None]).sum(-2), state",
            ),
        ),
    ),
    Mutant(
        "state-transposed",
        "the state is written as values by keys and read as keys by values",
        edits=(Edit(_RULE, "key[..., None] * correction[..., None, :]", "key[..., None, :] * correction[..., None]"),),
    ),
    Mutant(
        "states-not-reset",
        "a prompt begins with what another one left in the fixed states",
        edits=(
            Edit(
                "decoder.Decoder.forward",
                "states = FixedStates(conv_state, recurrent_state)",
                "left, self.left = getattr(self, 'left', None), (conv_state, recurrent_state)\n"
                "    if left is not None and position_ids.shape[1] == input_ids.shape[1]:\n"
                "        for store, value in zip(self.left, left, strict=True):\n"
                "            store.copy_(value)\n"
                "    states = FixedStates(conv_state, recurrent_state)",
            ),
        ),
        runs=2,
    ),
    Mutant(
        "state-slot-of-another-layer",
        "a layer reads the states of the next one",
        edits=(Edit(_LAYER, "states.read(self.index)", "states.read((self.index + 1) % len(states._stores[0]))"),),
    ),
    # -- gated delta net: the convolution
    Mutant(
        "conv-taps-reversed",
        "the first tap meets the newest token",
        weights=change(r"linear_attn\.conv1d\.weight$", lambda taps: taps.flip(-1)),
    ),
    Mutant(
        "conv-without-silu",
        "the activation after the convolution is left out",
        edits=(Edit(_GDN, "F.silu(mixed)", "mixed"),),
    ),
    Mutant(
        "conv-one-step-late",
        "the convolution ends at the token before",
        edits=(
            *(
                Edit(
                    conv,
                    "window = torch.cat((state, x.transpose(1, 2)), dim=-1)",
                    "window = torch.cat((state, x.transpose(1, 2)), dim=-1)\n    late = F.pad(window, (1, -1))",
                )
                for conv in _CONVS
            ),
            Edit(_CONVS[0], "F.conv1d(window", "F.conv1d(late"),
            Edit(_CONVS[1], "(window * self.weight)", "(late * self.weight)"),
        ),
    ),
    Mutant(
        "conv-state-not-advanced",
        "the oldest inputs are kept as state, not the newest",
        edits=(Edit(_CONVS[1], "window[..., 1:]", "window[..., :-1]"),),
    ),
    Mutant(
        "conv-state-after-activation",
        "the state holds what silu makes of the inputs",
        edits=(Edit(_CONVS[1], "window[..., 1:]", "torch.cat((state[..., 1:], F.silu(x.transpose(1, 2))), dim=-1)"),),
    ),
    Mutant(
        "conv-state-of-outputs",
        "the state holds the convolution's outputs",
        edits=(
            Edit(
                _CONVS[1],
                "window[..., 1:]",
                "torch.cat((state[..., 1:], (window * self.weight).sum(-1)[..., None]), dim=-1)",
            ),
        ),
    ),
    # -- feed-forward
    Mutant(
        "mlp-gate-and-up-swapped",
        "silu is applied to the up projection",
        DENSE,
        edits=(
            Edit(
                "feed_forward.MLP.forward",
                "F.silu(self.gate_proj(x)) * self.up_proj(x)",
                "F.silu(self.up_proj(x)) * self.gate_proj(x)",
            ),
        ),
    ),
    Mutant(
        "mlp-gelu", "the activation is GELU", DENSE, edits=(Edit("feed_forward.MLP.forward", "F.silu(", "F.gelu("),)
    ),
    Mutant(
        "expert-gate-and-up-swapped",
        "gate and up are read in the wrong order",
        MOE,
        edits=(Edit("feed_forward.Experts.forward", "gate, up = self", "up, gate = self"),),
    ),
    Mutant(
        "expert-gate-and-up-interleaved",
        "gate and up are read from alternating rows",
        MOE,
        edits=(
            Edit(
                "feed_forward.Experts.forward",
                "chosen).chunk(2, dim=-1)",
                "chosen).unflatten(-1, (-1, 2)).unbind(-1)",
            ),
        ),
    ),
    Mutant(
        "experts-rotated",
        "every expert answers to its neighbour's number",
        MOE,
        weights=change(r"\.experts\.", lambda stacked: stacked.roll(1, 0)),
    ),
    Mutant(
        "expert-down-projections-rotated",
        "the second halves of the experts are off by one from the first",
        MOE,
        weights=change(r"\.experts\..*down_proj", lambda stacked: stacked.roll(1, 0)),
    ),
    Mutant(
        "router-not-renormalised",
        "the chosen probabilities are not divided by their sum",
        MOE,
        edits=(Edit(_MOE, "weights / weights.sum(-1, keepdim=True)", "weights"),),
    ),
    Mutant(
        "router-over-tokens",
        "softmax runs over tokens instead of experts",
        MOE,
        edits=(Edit(_MOE, "self.gate(x).float(), dim=-1", "self.gate(x).float(), dim=1"),),
    ),
    Mutant(
        "router-sigmoid",
        "experts are weighed by a sigmoid instead of a softmax",
        MOE,
        edits=(Edit(_MOE, "torch.softmax(self.gate(x).float(), dim=-1)", "self.gate(x).float().sigmoid()"),),
    ),
    Mutant(
        "one-expert-fewer",
        "K - 1 experts are chosen",
        MOE,
        edits=(Edit(_MOE, "probabilities, self.top_k", "probabilities, self.top_k - 1"),),
    ),
    Mutant(
        "shared-expert-left-out",
        "the shared expert is left out",
        MOE,
        edits=(Edit(_MOE, "routed + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)", "routed"),),
    ),
    Mutant(
        "shared-expert-ungated",
        "the shared expert is added without its gate",
        MOE,
        edits=(Edit(_MOE, "self.shared_expert_gate(x).sigmoid() * self", "self"),),
    ),
    Mutant(
        "shared-gate-without-sigmoid",
        "the shared expert's gate is used as projected",
        MOE,
        edits=(Edit(_MOE, "self.shared_expert_gate(x).sigmoid()", "self.shared_expert_gate(x)"),),
    ),
    # -- the files of a quantized bundle
    Mutant(
        "scales-one-block-late",
        "each block has the scale of the block before",
        weights=change(r"weight\.0\.scales$", lambda scales: scales.roll(1, -1)),
        in_file=True,
    ),
    Mutant(
        "scales-of-the-row-before",
        "each row has the scales of the row before",
        weights=change(r"weight\.0\.scales$", lambda scales: scales.roll(1, 0)),
        in_file=True,
    ),
    Mutant(
        "negative-integers-lost",
        "integers are cut at zero, as unsigned ones would be",
        weights=change(r"weight\.original$", lambda codes: codes.clamp(min=0)),
        in_file=True,
    ),
    Mutant(
        "int4-as-int8",
        "the body is int4 where int8 is declared",
        recipe=INT4_BODY,
        declared=RECIPES["int8hu"],
        in_file=True,
    ),
    Mutant(
        "zero-points-forgotten",
        "zero points are taken for zero (body in uint8, asymmetric)",
        recipe=UINT8_BODY,
        weights=change(r"\.zero_points$", torch.zeros_like),
        in_file=True,
    ),
    Mutant(
        "nibbles-swapped",
        "the two integers of a byte are exchanged (`gdn.out` in int4)",
        recipe=INT4_GDN_OUT,
        weights=change(r"linear_attn\.out_proj\..*original$", swap_nibbles),
        in_file=True,
    ),
    Mutant(
        "head-clipped",
        "the head's integers are cut at half of their range",
        weights=change(r"^lm_head\..*original$", lambda codes: codes.clamp(-64, 64)),
        in_file=True,
    ),
)

MUTANTS = {mutant.name: mutant for mutant in _ALL}

# ---------------------------------------------------------------------------------------------------------------------
# Mistakes that no gate has to see
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Refusal:
    """A mistake in a checkpoint that is refused before anything is built.

    Attributes:
        name: short, in kebab case.
        mistake: what was done wrong, one phrase.
        change: of the checkpoint's tensors, by key.
        by: what refuses it, and a phrase of its error.
        phrase: that the error must hold.
        kinds: the samples that it is tried on.
    """

    name: str
    mistake: str
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    by: str
    phrase: str
    kinds: tuple[str, ...] = BOTH


def _each(pattern: str, function: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Change the tensors whose keys match `pattern`."""

    def apply(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert any(re.search(pattern, key) for key in tensors)
        return {
            key: function(tensor).contiguous() if re.search(pattern, key) else tensor for key, tensor in tensors.items()
        }

    return apply


def _mlx(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout of mlx-lm: 1 is added to the gains, and the taps stand before the channels."""
    tensors = _each(ONE_PLUS_NORM.replace("model", "(model|language_model)"), lambda gain: gain + 1)(tensors)
    return _each(r"conv1d\.weight$", lambda taps: taps.transpose(1, 2))(tensors)


def _without(pattern: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Leave out the first tensor whose key matches `pattern`."""

    def apply(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        victim = next(key for key in tensors if re.search(pattern, key))
        return {key: tensor for key, tensor in tensors.items() if key != victim}

    return apply


_PLAN = "the weight plan"
REFUSALS = (
    Refusal("mlx-layout", "a checkpoint converted for MLX", _mlx, f"{_PLAN}: misshapen", "misshapen: "),
    Refusal("tensor-left-out", "one norm is missing", _without(r"q_norm"), f"{_PLAN}: missing", "missing: "),
    Refusal(
        "tensor-of-another-model",
        "q_proj without its gate half",
        _each(r"q_proj", lambda w: w[: len(w) // 2]),
        f"{_PLAN}: misshapen",
        "misshapen: ",
    ),
    Refusal(
        "projection-transposed",
        "o_proj is stored as inputs by outputs",
        _each(r"o_proj", lambda w: w.T),
        f"{_PLAN}: misshapen",
        "misshapen: ",
    ),
    Refusal(
        "bias-added",
        "a projection has a bias",
        lambda tensors: tensors | {next(k for k in tensors if "k_proj" in k).replace("weight", "bias"): torch.zeros(1)},
        f"{_PLAN}: unknown key",
        "unknown to the weight map: ",
    ),
    Refusal(
        "expert-left-out",
        "one expert fewer than the config says",
        _each(r"mlp\.experts\.", lambda w: w[:-1]),
        f"{_PLAN}: misshapen",
        "misshapen: ",
        MOE,
    ),
)
