"""What an overlay tells the host: the vocabulary shared by hooks, plugins and the pipeline.

An overlay is a model's decoder re-authored for export, with everything that the host must know to convert it: which
states a step mutates, which checkpoint tensor fills which parameter, and how the head is quantized. These are plain
frozen data; nothing here imports torch at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from attrs import field, frozen
from attrs.validators import deep_iterable, ge, in_, min_len, optional

from coreai_zoo.dtypes import STORED_DTYPES
from coreai_zoo.signature import KVCache

if TYPE_CHECKING:
    import torch
    from torch import nn

    from coreai_zoo.contracts import Contract, Prefill


@frozen
class ParameterInfo:
    """Shape and dtype of a parameter of the decoder.

    Attributes:
        shape: sizes; `()` is a scalar.
        dtype: one of `STORED_DTYPES`, what an unquantized weight is stored in.
    """

    shape: tuple[int, ...] = field(validator=deep_iterable(ge(1)))
    dtype: str = field(validator=in_(STORED_DTYPES))


@frozen
class LayerRewrite:
    """Replaces every module whose dotted path matches `pattern` by `apply(module)`.

    Attributes:
        name: short, for reports and for the error when two rewrites meet on one layer.
        pattern: shell-style pattern on the module path, for example `model.layers.*.linear_attn`.
        reason: why the contract needs it, one sentence.
        apply: takes the module, returns its replacement; parameters keep their values and dtypes.
        keeps_parameters: promise that the replacement has the same parameters, in name, shape and dtype. A plan then
            needs no decoder to know them; a build holds the rewrite to it.
    """

    name: str
    pattern: str
    reason: str
    apply: Callable[[nn.Module], nn.Module]
    keeps_parameters: bool = False


@frozen
class TokenizerClass:
    """A `tokenizer_class` of a `tokenizer_config.json` whose tokenizer engines can use.

    Attributes:
        name: the class, without the suffix `Fast`.
        known_as: the class as which engines know the same `tokenizer.json`, where they do not know `name`: a bundle
            is written with that. None for a class that engines know by its own name.
    """

    name: str = field(validator=min_len(1))
    known_as: str | None = field(default=None, validator=optional(min_len(1)))


# ---------------------------------------------------------------------------------------------------------------------
# Weight map
# ---------------------------------------------------------------------------------------------------------------------


RoleKind = Literal["embedding", "head", "body", "other"]


@frozen
class Role:
    """What a group of weights does in a model: what recipes, reports and gates know a weight by.

    Attributes:
        name: short, for example `attention`.
        meaning: in words, for the card.
        kind: which part of a recipe decides it. `embedding` is looked up by rows, `head` gives the logits, `body` is
            the large matrices that a token is multiplied by, `other` is small and sensitive and stays as it is.
        routed: whether it holds experts, of which a token reads only those that a router chooses.
        router: whether its product chooses experts: a gate watches how close the choice was.
    """

    name: str = field(validator=min_len(1))
    meaning: str = field(validator=min_len(1))
    kind: RoleKind = field(default="other", validator=in_(get_args(RoleKind)))
    routed: bool = False
    router: bool = False


COMMON_ROLES = (
    Role("embedding", "token embedding table", "embedding"),
    Role("head", "output projection to the vocabulary", "head"),
    Role("attention", "q, k, v and o projections of softmax attention", "body"),
    Role("mlp", "dense feed-forward projections", "body"),
    Role("norm", "normalisation gains"),
)
"""The roles that weights have in most decoders; a weight map that says nothing has these."""


@frozen
class Transform:
    """A named change of values on the way from checkpoint to parameter.

    Attributes:
        name: what it does, for reports.
        apply: maps a block of rows, float32 [rows, columns], to float32 [rows, columns]; must not look across rows, and
            must take any finite values: the weight store tells a changed transform by what it makes of some.
        usual_mean: between what two numbers the mean of a stored tensor lies as a rule, where it can show that the
            change was made already. It is looked at in small tensors only. A build notes it when most are outside, and
            does nothing else about it: values alone never decide.
    """

    name: str
    apply: Callable[[torch.Tensor], torch.Tensor]
    usual_mean: tuple[float, float] | None = None


@frozen
class Part:
    """Says that a source fills only a slab of its target: one expert, and one of several equal pieces of its rows.

    Attributes:
        index: which placeholder of the source pattern is the position along the target's axis 0.
        piece: which piece of axis 1, from 0.
        pieces: how many equal pieces axis 1 has.
    """

    index: str
    piece: int = 0
    pieces: int = 1


@frozen
class WeightRule:
    """One row of the table: checkpoint key to parameter.

    A key and a parameter are dotted names in which `{name}` stands for one number, the same on both sides.

    Attributes:
        source: pattern of the checkpoint key, after `WeightMap.prefixes`.
        target: pattern of the parameter of the overlay's decoder.
        role: name of one of the map's roles.
        transform: change of values, or None.
        source_shape: the checkpoint's shape from the parameter's, when they hold the same rows in another shape.
        part: which slab of the target this source fills, or None for all of it.
        fallback: take this source only when no other rule fills the target.
        read_transposed: whether the decoder reads of the target, of three axes or more, nothing but its transpose in
            the last two. Plain values are then stored in this order, and a build of such refuses a decoder that does
            otherwise.
    """

    source: str
    target: str
    role: str
    transform: Transform | None = None
    source_shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None
    part: Part | None = None
    fallback: bool = False
    read_transposed: bool = False


@frozen
class Drop:
    """Checkpoint keys that are left out, and why.

    Attributes:
        source: pattern of the key; `{name}` stands for a number and a trailing `**` for the rest of the key.
        reason: one phrase, printed in the build report.
        noted: whether a build notes it, too: for keys that released checkpoints do not have.
    """

    source: str
    reason: str = field(validator=min_len(1))
    noted: bool = False


@frozen
class Prefix:
    """Another spelling of the start of a key.

    Attributes:
        found: as it is in a checkpoint; empty where `meant` is missing.
        meant: as the rules and drops have it.
        written_by: what names keys so, for a build to note; None for the released checkpoints, of which there is
            nothing to note.
    """

    found: str
    meant: str
    written_by: str | None = None


@frozen
class WeightMap:
    """The whole table. A key that no rule takes and no drop names is an error, as is an unfilled parameter.

    Attributes:
        rules: keys to parameters. One key may fill several parameters.
        drops: keys to leave out.
        prefixes: other spellings of the start of a key, tried in this order after the key as it is. What a wrapper of
            any model adds (`module.`, `_orig_mod.`) is taken off before, and is not among them.
        roles: what the weights do, in the order in which reports name them.

    Raises:
        ValueError: when a rule has a role that is not among `roles`, or two of these have one name.
    """

    rules: tuple[WeightRule, ...]
    drops: tuple[Drop, ...] = ()
    prefixes: tuple[Prefix, ...] = ()
    roles: tuple[Role, ...] = field(default=COMMON_ROLES, kw_only=True)

    def __attrs_post_init__(self) -> None:
        names = [role.name for role in self.roles]
        unknown = sorted({rule.role for rule in self.rules} - set(names))
        if unknown:
            raise ValueError(f"the weight map does not say what the roles {', '.join(unknown)} of its rules are")
        if len(set(names)) < len(names):
            raise ValueError(f"the weight map names a role twice: {', '.join(sorted(names))}")


# ---------------------------------------------------------------------------------------------------------------------
# Decoders and overlays
# ---------------------------------------------------------------------------------------------------------------------


@runtime_checkable
class LayeredDecoder(Protocol):
    """A decoder that can also be run one layer at a time, so that a model of any size is gated in the memory of one.

    A decoder need not offer this; the candidate `torch` needs it. The steps compute what `forward` computes:

        x = embed(input_ids)
        for index in range(len(layer_paths)): x = layer(index, x, position_ids, states)
        logits = head(x)

    The host runs a layer over all tokens of a prompt, one call after the other in their order, before it goes on to the
    next layer. So a layer writes its part of the states at once, where `forward` may wait until the end of the step.
    Parameters are filled before the step that uses them and emptied after it; those of the kinds `embedding` and
    `head` hold only some of their rows, the ids being numbered accordingly and the logits being those of these rows.
    """

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Module path of each layer, in order. A layer's parameters are all below its path and used by it alone."""

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids` int32 [1, S] to [1, S, D]."""

    def layer(
        self, index: int, x: torch.Tensor, position_ids: torch.Tensor, states: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """[1, S, D] to [1, S, D] by one layer.

        Args:
            index: which.
            x: output of the layer before.
            position_ids: int32 [1, T], as the decoder takes them: the S tokens are the last of T; with a fixed context
                they are all of T.
            states: all states in the order of the trace spec; the layer mutates its part in place.
        """

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """[1, S, D] after the last layer to logits [1, S, rows of the head], in the dtype of `forward`'s."""


@runtime_checkable
class BatchedDecoder(LayeredDecoder, Protocol):
    """A layered decoder whose steps also take the tokens of B prompts at once: a gate runs its prompts side by side.

    Every 1 in front of the shapes is a B then, and a prompt's values are what they are without the others, but for the
    order of sums.
    """

    @property
    def batch_axis(self) -> int:
        """The axis of every state that counts prompts."""


@runtime_checkable
class Overlay(Protocol):
    """A decoder re-authored for export, for one family of architectures.

    `config` objects are the overlay's own; the host only hands them back. An overlay may also be a `Variant`, and may
    have a parameter table (`HasParameterTable`), and count operations (`HasOperationCount`).
    """

    @property
    def name(self) -> str:
        """Short name, for example `acme_hybrid`."""

    def read_config(self, hf_config: Mapping[str, Any]) -> Any:
        """Parse and check a Hugging Face `config.json`.

        Raises:
            BadInput: naming every field that is missing, ill-typed or out of range.
        """

    def facts(self, config: Any) -> Mapping[str, Any]:
        """What the host and an entry need to know of a config.

        Required: `vocab_size`, `layers`, `max_context_length` (int) and `ffn` (str, for example `dense` or `moe`);
        where a role of the weights is `routed`, also `experts` and `experts_per_token` (int). Anything further is
        compared with the entry's facts and printed in the card.
        """

    def kv_cache(self, config: Any) -> KVCache:
        """Geometry of the key / value pair."""

    def decoder(self, config: Any, contract: Contract) -> nn.Module:
        """The decoder, uninitialised, called as `decoder(input_ids, position_ids, *states)` and returning the logits.

        States come in the order of the trace spec and are mutated in place. Parameters are created in the dtype that
        an unquantized weight is stored in, as a rule `contract.compute_dtype`; logits are given in
        `contract.logits_dtype`; the caller decides the device (the host uses `meta`).
        """

    def config_of_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """A `config.json` with the sizes that `facts` states: what an entry's checkpoint looks like, without one.

        Raises:
            BadInput: naming the facts that are not known.
            ValueError: naming the facts whose values cannot be, and what they are instead of.
        """

    def with_layers(self, hf_config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """The config of a slice that keeps the first `layers` layers.

        Raises:
            BadInput: when a slice of that depth is not a model.
        """


@runtime_checkable
class Variant(Protocol):
    """An overlay that refines another one: it wins over that one where both claim an architecture."""

    @property
    def refines(self) -> str:
        """Name of the overlay that it refines, which has to claim the architecture too."""


@runtime_checkable
class HasParameterTable(Protocol):
    """An overlay that tells its decoder's parameters without building it, so that `zoo plan` answers without torch.

    A build compares what is told with the decoder itself. An overlay without this is planned too, only slower.
    """

    def parameters(self, config: Any, contract: Contract) -> Mapping[str, ParameterInfo]:
        """Every parameter of `Overlay.decoder(config, contract)` by name, before any layer rewrite."""


@runtime_checkable
class HasOperationCount(Protocol):
    """An overlay that counts what its layers compute beside the products with their weights.

    `zoo plan --contracts` adds it to these. Without it only they are counted, and the plan says so.
    """

    def operations(self, config: Any, prefill: Prefill | None, tokens: int, positions: int) -> int:
        """Floating-point operations of one call: attention, recurrences and the like; an addition is one.

        Args:
            config: the overlay's own.
            prefill: the form of the contract's function that reads prompts; None in the one that decodes.
            tokens: of the call.
            positions: tokens so far, with those of the call.
        """
