"""What the engines that load a bundle ask of it: one list of rules, each with its reason.

A design is held against them before any work, and `zoo verify` holds the saved asset and its metadata against them. The
rules were read in the source of the engines (docs/contracts.md has them as a table); an engine that is given a bundle
which breaks one refuses it, or gives wrong text without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from attrs import frozen

from coreai_zoo.signature import Signature

PREFILL = "prefill"
"""The function that engines find by its name and send a prompt to."""

LARGEST_CHUNK = 2048
"""Tokens of a prompt that engines send at once to a function that takes any number of them."""

CHUNKS = ("prefill_chunk_size", "prefill_chunk_threshold")
"""Keys of the block `language` that tell an engine how many tokens of a prompt to send at once."""

_INPUTS = ("input_ids", "position_ids")
_LEAST_STATES, _MOST_STATES = 2, 4
_CACHE = re.compile("cache|kv", re.IGNORECASE)
_OTHER_MODELS = re.compile(r"extend.*|load_embeddings|image_encode|text_encode|detect|tracker_step")


@frozen
class Interface:
    """What an engine sees of a bundle.

    Attributes:
        functions: the signature of each function of the asset, by name.
        language: the block `language` of metadata.json.
        positions: what the functions were made for, which an asset does not say; None where that is not known.
    """

    functions: Mapping[str, Signature]
    language: Mapping[str, Any]
    positions: int | None

    @property
    def decode(self) -> str:
        """Name of the function that an engine decodes with."""
        functions = self.language.get("function_map")
        names = functions.get("main") if isinstance(functions, Mapping) else None
        return str(names[0]) if isinstance(names, list) and names else "main"

    @property
    def decoder(self) -> Signature:
        """That function; where the asset has none of that name, which is a breach by itself, one without tensors."""
        return self.functions.get(self.decode, Signature({}, {}, {}))


@frozen
class Breach:
    """One thing that breaks a rule.

    Attributes:
        what: it and where it is, as the beginning of a sentence.
        states: the states that it is about, by which a design names the plugin.
    """

    what: str
    states: tuple[str, ...] = ()


@frozen
class Rule:
    """One rule of an engine.

    Attributes:
        name: as it is told where the rule is broken.
        reason: why the engine cares, as the end of a sentence.
        breaches: everything about an interface that breaks it.
    """

    name: str
    reason: str
    breaches: Callable[[Interface], Iterator[Breach]]


@frozen
class Engine:
    """An engine, as far as bundles are held against it.

    Attributes:
        name: as build.json records it.
        title: which one that is, for people.
        rules: what it asks of a bundle.
    """

    name: str
    title: str
    rules: tuple[Rule, ...]

    def breaches(self, seen: Interface) -> list[tuple[Rule, Breach]]:
        """Everything about a bundle that breaks a rule."""
        return [(rule, breach) for rule in self.rules for breach in rule.breaches(seen)]


def sentence(rule: Rule, breach: Breach) -> str:
    """A breach with the engine's reason, in one sentence without its full stop."""
    return f"{breach.what}, but {rule.reason} (rule {rule.name})"


def _rule(name: str, reason: str) -> Callable[[Callable[[Interface], Iterator[Breach]]], Rule]:
    return lambda breaches: Rule(name, reason, breaches)


def _shown(tensor: tuple[tuple[int, ...], str]) -> str:
    shape, dtype = tensor
    return f"{dtype} [{', '.join('?' if size < 0 else str(size) for size in shape)}]"


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


@_rule(
    "decoder", "an engine decodes with the first name that `function_map` has for `main`, and without one with `main`"
)
def _decoder(seen: Interface) -> Iterator[Breach]:
    if seen.decode not in seen.functions:
        yield Breach(f"the asset has no function {seen.decode}")
    elif seen.decode != "main" and "main" in seen.functions:
        yield Breach(f"`function_map` names {seen.decode}, and the asset has a function main beside it")


@_rule("function-names", "by such a name an asset is taken for another kind of model, which another engine runs")
def _function_names(seen: Interface) -> Iterator[Breach]:
    for name in seen.functions:
        if _OTHER_MODELS.fullmatch(name):
            yield Breach(f"a function is called {name}")


@_rule(
    "prefill",
    "an engine sends a prompt to the function of that name in chunks of any length, with inputs that it lays out for "
    "the decoder and with the decoder's states, and takes no output from it",
)
def _prefill(seen: Interface) -> Iterator[Breach]:
    prefill, decoder = seen.functions.get(PREFILL), seen.decoder
    if prefill is None:
        return
    tokens = prefill.inputs.get(_INPUTS[0])
    if tokens is not None and tokens[0][-1] >= 0:
        yield Breach(f"the input {_INPUTS[0]} of {PREFILL} is {_shown(tokens)}")
    if prefill.outputs:
        yield Breach(f"{PREFILL} gives {', '.join(prefill.outputs)}")
    for kind, own, wanted in (
        ("input", prefill.inputs, decoder.inputs),
        ("state", prefill.states, decoder.states),
    ):
        if list(own) != list(wanted):
            yield Breach(f"{PREFILL} has the {kind}s {', '.join(own) or 'none'}, {seen.decode} {', '.join(wanted)}")
            continue
        for name in own:
            if own[name] != wanted[name]:
                yield Breach(
                    f"the {kind} {name} is {_shown(own[name])} of {PREFILL} and {_shown(wanted[name])} of {seen.decode}"
                )


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and outputs of the function that decodes
# ---------------------------------------------------------------------------------------------------------------------


@_rule("inputs", "an engine gives two inputs, finds them by these names, and binds them in this order")
def _inputs(seen: Interface) -> Iterator[Breach]:
    if seen.decoder.inputs and tuple(seen.decoder.inputs) != _INPUTS:
        yield Breach(
            f"the inputs of {seen.decode} are {', '.join(seen.decoder.inputs)} instead of {', '.join(_INPUTS)}"
        )


@_rule(
    "input-shapes",
    "an engine writes S tokens as int32 [1, S] and all positions so far as int32 [1, T], whose length is how the "
    "function knows where to write",
)
def _input_shapes(seen: Interface) -> Iterator[Breach]:
    for name, (shape, dtype) in seen.decoder.inputs.items():
        static = name == _INPUTS[1] and len(shape) == 2 and shape[1] >= 0
        if dtype != "int32" or len(shape) != 2 or shape[0] != 1 or static:
            yield Breach(f"the input {name} of {seen.decode} is {_shown((shape, dtype))}")


@_rule("logits", "an engine reads the first output as the logits of the S tokens, float16 [1, S, vocabulary]")
def _logits(seen: Interface) -> Iterator[Breach]:
    if not seen.decoder.outputs:
        if seen.decoder.inputs:
            yield Breach(f"{seen.decode} gives no output")
        return
    name, (shape, dtype) = next(iter(seen.decoder.outputs.items()))
    tokens = seen.decoder.inputs.get(_INPUTS[0], ((1, -1), ""))[0][-1]
    # Where there is a `prefill`, all that is declared by its inputs gets one token per call.
    lengths = {tokens, 1} if PREFILL in seen.functions and tokens < 0 else {tokens}
    if dtype != "float16" or len(shape) != 3 or shape[0] != 1 or shape[1] not in lengths or shape[2] < 1:
        yield Breach(f"the output {name} of {seen.decode} is {_shown((shape, dtype))}")


# ---------------------------------------------------------------------------------------------------------------------
# States
# ---------------------------------------------------------------------------------------------------------------------


@_rule("state-count", "an engine takes 2 to 4: the key / value pair, and two beside it at the most")
def _state_count(seen: Interface) -> Iterator[Breach]:
    states = tuple(seen.decoder.states)
    if seen.decoder.inputs and not _LEAST_STATES <= len(states) <= _MOST_STATES:
        yield Breach(f"{seen.decode} has {len(states)} states, {', '.join(states) or 'none at all'}", states[2:])


@_rule(
    "kv-pair",
    "an engine takes the first two states for keys and values, [layers, 1, heads, T, width] and alike, which it makes "
    "for 256 positions and lets grow along T",
)
def _kv_pair(seen: Interface) -> Iterator[Breach]:
    pair = list(seen.decoder.states.items())[:2]
    for name, (shape, dtype) in pair:
        growing = [axis for axis, size in enumerate(shape) if size < 0]
        if len(shape) != 5 or growing != [3] or shape[1] != 1:
            yield Breach(
                f"the state {name} of {seen.decode}, one of the first two, is {_shown((shape, dtype))}", (name,)
            )
    if len(pair) == 2 and pair[0][1] != pair[1][1]:
        (key, key_type), (value, value_type) = pair
        yield Breach(f"the state {key} is {_shown(key_type)} and {value} is {_shown(value_type)}", (key, value))


@_rule(
    "static-states",
    "an engine lets every state with a dynamic axis grow as a cache, and zeroes none of them at a reset",
)
def _static_states(seen: Interface) -> Iterator[Breach]:
    for name, tensor in list(seen.decoder.states.items())[2:]:
        if any(size < 0 for size in tensor[0]):
            yield Breach(f"the state {name} of {seen.decode} is {_shown(tensor)}", (name,))


@_rule(
    "state-names",
    "an engine takes a state with 'cache' or 'kv' in its name for a window of the last tokens, and cuts it back where "
    "it should zero it",
)
def _state_names(seen: Interface) -> Iterator[Breach]:
    for name in list(seen.decoder.states)[2:]:
        if _CACHE.search(name):
            yield Breach(f"a state beside the key / value pair is called {name}", (name,))


@_rule(
    "state-kinds", "an engine that goes by the map `states` has to find what one that goes by names and shapes finds"
)
def _state_kinds(seen: Interface) -> Iterator[Breach]:
    said = seen.language.get("states")
    kinds = {name: _kind(name, shape) for name, (shape, _) in seen.decoder.states.items()}
    for name, kind in said.items() if isinstance(said, Mapping) else ():
        if kinds.get(name) != kind:
            yield Breach(f"`states` calls {name} {kind} and it is {kinds.get(name, 'no state')}", (name,))


def _kind(name: str, shape: tuple[int, ...]) -> str:
    """What an engine takes a state for that it knows nothing else of (`inferKind` of its StateHandlerFactory)."""
    if any(size < 0 for size in shape):
        return "kv_cache"
    return "sliding_cache" if _CACHE.search(name) else "fixed"


# ---------------------------------------------------------------------------------------------------------------------
# Metadata against the function that decodes
# ---------------------------------------------------------------------------------------------------------------------


@_rule("vocab-size", "an engine makes its sampler for `vocab_size` logits")
def _vocab_size(seen: Interface) -> Iterator[Breach]:
    for name, (shape, _dtype) in list(seen.decoder.outputs.items())[:1]:
        if shape[-1:] != (seen.language.get("vocab_size"),):
            width = shape[-1] if shape else "no"
            yield Breach(f"`vocab_size` is {seen.language.get('vocab_size')} and {name} has {width} logits")


@_rule(
    "prefill-chunks",
    "an engine sends a prompt in chunks of 2,048 tokens and more unless both are the tokens that a call takes",
)
def _prefill_chunks(seen: Interface) -> Iterator[Breach]:
    shape, _dtype = seen.decoder.inputs.get(_INPUTS[0], ((), ""))
    tokens = shape[-1] if shape else -1
    for key in CHUNKS:
        found = seen.language.get(key)
        if tokens > 0 and found != tokens:
            yield Breach(f"`{key}` is {found} and a call of {seen.decode} takes {tokens}")
        elif tokens < 0 and found is not None and not (isinstance(found, int) and found > 0):
            yield Breach(f"`{key}` is {found}")
    if tokens < 0 and len({seen.language.get(key) for key in CHUNKS}) > 1:
        yield Breach(f"{' and '.join(f'`{key}`' for key in CHUNKS)} differ")


@_rule("max-context", "an engine lets a conversation grow up to that length")
def _max_context(seen: Interface) -> Iterator[Breach]:
    found = seen.language.get("max_context_length")
    if isinstance(found, int) and seen.positions is not None and found > seen.positions:
        yield Breach(f"`max_context_length` is {found}, and the functions were made for {seen.positions} positions")


# ---------------------------------------------------------------------------------------------------------------------
# The engines
# ---------------------------------------------------------------------------------------------------------------------

COREAI_MODELS = Engine(
    name="apple/coreai-models",
    title="the engines of apple/coreai-models (sequential and pipelined, main from #227 on)",
    rules=(
        _decoder,
        _function_names,
        _inputs,
        _input_shapes,
        _logits,
        _vocab_size,
        _state_count,
        _kv_pair,
        _static_states,
        _state_names,
        _state_kinds,
        _prefill,
        _prefill_chunks,
        _max_context,
    ),
)

ENGINES: Mapping[str, Engine] = MappingProxyType({engine.name: engine for engine in (COREAI_MODELS,)})


def prompt_chunks(tokens: int, most: int) -> list[int]:
    """The lengths in which an engine sends `tokens` tokens of a prompt, at most `most` at once: as even as can be."""
    chunks = -(-tokens // most)
    return [tokens // chunks + (place < tokens % chunks) for place in range(chunks)]
