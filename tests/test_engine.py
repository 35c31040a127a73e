"""The rules of the engines on declared signatures: each broken in every way that was thought of, one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from attrs import evolve

from coreai_zoo.bundle.metadata import language_block
from coreai_zoo.contracts import CONTRACTS, STATIC_S1, Contract
from coreai_zoo.engine import COREAI_MODELS, Interface, sentence
from coreai_zoo.signature import KVCache, Signature, StateSpec
from documents import read

VOCABULARY, CONTEXT = 264, 32
EXTRA = (StateSpec(name="meanState", shape=(2, 1, 8)), StateSpec(name="sumState", shape=(2, 1, 8), dtype="float32"))


def interface(contract: Contract = STATIC_S1) -> Interface:
    """What an engine sees of a bundle with two states beside the pair."""
    functions = contract.functions(KVCache(2, 1, 16), EXTRA, VOCABULARY, CONTEXT)
    (decoder, *_) = functions.values()
    declared = {name: spec.declared for name, spec in functions.items()}
    return Interface(declared, language_block(functions, VOCABULARY, CONTEXT), decoder.positions)


def dynamic() -> Interface:
    return interface(evolve(STATIC_S1, query_length=None))


def with_prefill(**changes: Any) -> Interface:
    """The dynamic contract with a prefill as it should be, or with one that has `changes`."""
    seen = dynamic()
    main = seen.functions["main"]
    prefill = evolve(main, **{"outputs": {}, **changes})
    return evolve(seen, functions={"main": main, "prefill": prefill})


def main(seen: Interface, **changes: Any) -> Interface:
    """The interface with another `main`."""
    return evolve(seen, functions={**seen.functions, "main": evolve(seen.functions["main"], **changes)})


def tensor(seen: Interface, kind: str, name: str, shape: tuple[int, ...], dtype: str) -> Interface:
    """The interface with one tensor of `main` declared otherwise."""
    return main(seen, **{kind: {**getattr(seen.functions["main"], kind), name: (shape, dtype)}})


def renamed(seen: Interface, kind: str, **names: str) -> Interface:
    """The interface with tensors of `main` called otherwise, in their places."""
    found = getattr(seen.functions["main"], kind)
    return main(seen, **{kind: {names.get(name, name): value for name, value in found.items()}})


def ordered(seen: Interface, kind: str, *names: str) -> Interface:
    """The interface with those tensors of `main` that are named, in that order."""
    found = getattr(seen.functions["main"], kind)
    return main(seen, **{kind: {name: found[name] for name in names}})


def more_states(seen: Interface, **states: tuple[tuple[int, ...], str]) -> Interface:
    return main(seen, states={**seen.functions["main"].states, **states})


def language(seen: Interface, **changes: Any) -> Interface:
    return evolve(seen, language={**seen.language, **changes})


def called(seen: Interface, **functions: Signature) -> Interface:
    return evolve(seen, functions={**seen.functions, **functions})


def broken(seen: Interface) -> list[str]:
    return [sentence(rule, breach) for rule, breach in COREAI_MODELS.breaches(seen)]


KV = ((2, 1, 1, -1, 16), "float16")
MAIN = interface().functions["main"]

BREAKS: Mapping[str, tuple[str, str, Callable[[], Interface]]] = {
    "no such decoder": (
        "decoder",
        "the asset has no function decode",
        lambda: language(interface(), function_map={"main": ["decode"]}),
    ),
    "another decoder beside main": (
        "decoder",
        "`function_map` names other, and the asset has a function main beside it",
        lambda: language(called(interface(), other=MAIN), function_map={"main": ["other"]}),
    ),
    "extend": ("function-names", "a function is called extend_512_8", lambda: called(interface(), extend_512_8=MAIN)),
    "embeddings": (
        "function-names",
        "a function is called load_embeddings",
        lambda: called(interface(), load_embeddings=MAIN),
    ),
    "a segmenter": ("function-names", "a function is called detect", lambda: called(interface(), detect=MAIN)),
    "positions first": (
        "inputs",
        "the inputs of main are position_ids, input_ids instead of input_ids, position_ids",
        lambda: ordered(interface(), "inputs", "position_ids", "input_ids"),
    ),
    "one input": ("inputs", "the inputs of main are input_ids", lambda: ordered(interface(), "inputs", "input_ids")),
    "three inputs": (
        "inputs",
        "the inputs of main are input_ids, position_ids, mask",
        lambda: tensor(interface(), "inputs", "mask", (1, -1), "int32"),
    ),
    "other input names": (
        "inputs",
        "the inputs of main are tokens, position_ids",
        lambda: renamed(interface(), "inputs", input_ids="tokens"),
    ),
    "int64 tokens": (
        "input-shapes",
        "the input input_ids of main is int64 [1, 1]",
        lambda: tensor(interface(), "inputs", "input_ids", (1, 1), "int64"),
    ),
    "two sequences": (
        "input-shapes",
        "the input input_ids of main is int32 [2, 1]",
        lambda: tensor(interface(), "inputs", "input_ids", (2, 1), "int32"),
    ),
    "flat positions": (
        "input-shapes",
        "the input position_ids of main is int32 [?]",
        lambda: tensor(interface(), "inputs", "position_ids", (-1,), "int32"),
    ),
    "one position": (
        "input-shapes",
        "the input position_ids of main is int32 [1, 1]",
        lambda: tensor(interface(), "inputs", "position_ids", (1, 1), "int32"),
    ),
    "no output": ("logits", "main gives no output", lambda: main(interface(), outputs={})),
    "float32 logits": (
        "logits",
        "the output logits of main is float32 [1, 1, 264]",
        lambda: tensor(interface(), "outputs", "logits", (1, 1, VOCABULARY), "float32"),
    ),
    "flat logits": (
        "logits",
        "the output logits of main is float16 [1, 264]",
        lambda: tensor(interface(), "outputs", "logits", (1, VOCABULARY), "float16"),
    ),
    "logits of more tokens": (
        "logits",
        "the output logits of main is float16 [1, 4, 264]",
        lambda: tensor(interface(), "outputs", "logits", (1, 4, VOCABULARY), "float16"),
    ),
    "logits of one token where a call takes any number": (
        "logits",
        "the output logits of main is float16 [1, 1, 264]",
        lambda: tensor(dynamic(), "outputs", "logits", (1, 1, VOCABULARY), "float16"),
    ),
    "hidden states first": (
        "logits",
        "the output hidden of main is float32 [1, 1, 8]",
        lambda: main(interface(), outputs={"hidden": ((1, 1, 8), "float32"), **MAIN.outputs}),
    ),
    "another vocabulary": (
        "vocab-size",
        "`vocab_size` is 300 and logits has 264 logits",
        lambda: language(interface(), vocab_size=300),
    ),
    "five states": (
        "state-count",
        "main has 5 states, keyCache, valueCache, meanState, sumState, oneMore",
        lambda: more_states(interface(), oneMore=((1,), "float16")),
    ),
    "one state": ("state-count", "main has 1 states, keyCache", lambda: ordered(interface(), "states", "keyCache")),
    "no state": ("state-count", "main has 0 states, none at all", lambda: main(interface(), states={})),
    "a fixed state first": (
        "kv-pair",
        "the state meanState of main, one of the first two, is float16 [2, 1, 8]",
        lambda: ordered(interface(), "states", "meanState", "keyCache", "valueCache"),
    ),
    "static capacity": (
        "kv-pair",
        "the state valueCache of main, one of the first two, is float16 [2, 1, 1, 32, 16]",
        lambda: tensor(interface(), "states", "valueCache", (2, 1, 1, 32, 16), "float16"),
    ),
    "growing along another axis": (
        "kv-pair",
        "the state keyCache of main, one of the first two, is float16 [2, 1, ?, 1, 16]",
        lambda: tensor(interface(), "states", "keyCache", (2, 1, -1, 1, 16), "float16"),
    ),
    "growing along two axes": (
        "kv-pair",
        "the state keyCache of main, one of the first two, is float16 [2, ?, 1, ?, 16]",
        lambda: tensor(interface(), "states", "keyCache", (2, -1, 1, -1, 16), "float16"),
    ),
    "a cache of one layer": (
        "kv-pair",
        "the state keyCache of main, one of the first two, is float16 [1, 1, ?, 16]",
        lambda: tensor(interface(), "states", "keyCache", (1, 1, -1, 16), "float16"),
    ),
    "keys and values of different heads": (
        "kv-pair",
        "the state keyCache is float16 [2, 1, 1, ?, 16] and valueCache is float16 [2, 1, 2, ?, 16]",
        lambda: tensor(interface(), "states", "valueCache", (2, 1, 2, -1, 16), "float16"),
    ),
    "keys and values of different types": (
        "kv-pair",
        "the state keyCache is float16 [2, 1, 1, ?, 16] and valueCache is float32 [2, 1, 1, ?, 16]",
        lambda: tensor(interface(), "states", "valueCache", KV[0], "float32"),
    ),
    "a third growing state": (
        "static-states",
        "the state meanState of main is float16 [2, 1, ?]",
        lambda: tensor(interface(), "states", "meanState", (2, 1, -1), "float16"),
    ),
    "called a cache": (
        "state-names",
        "a state beside the key / value pair is called meanCACHE",
        lambda: language(renamed(interface(), "states", meanState="meanCACHE"), states=None),
    ),
    "called kv": (
        "state-names",
        "a state beside the key / value pair is called myKVmean",
        lambda: language(renamed(interface(), "states", meanState="myKVmean"), states=None),
    ),
    "a fixed state said to be a cache": (
        "state-kinds",
        "`states` calls meanState kv_cache and it is fixed",
        lambda: language(interface(), states={"meanState": "kv_cache"}),
    ),
    "a state that is none": (
        "state-kinds",
        "`states` calls other fixed and it is no state",
        lambda: language(interface(), states={"other": "fixed"}),
    ),
    "a prefill with logits": ("prefill", "prefill gives logits", lambda: with_prefill(outputs=MAIN.outputs)),
    "a prefill with other inputs": (
        "prefill",
        "prefill has the inputs input_ids, main input_ids, position_ids",
        lambda: with_prefill(inputs={"input_ids": ((1, -1), "int32")}),
    ),
    "a prefill with fewer states": (
        "prefill",
        "prefill has the states keyCache, valueCache, main keyCache, valueCache, meanState, sumState",
        lambda: with_prefill(states={"keyCache": KV, "valueCache": KV}),
    ),
    "a prefill with a state of another type": (
        "prefill",
        "the state meanState is float32 [2, 1, 8] of prefill and float16 [2, 1, 8] of main",
        lambda: with_prefill(states={**MAIN.states, "meanState": ((2, 1, 8), "float32")}),
    ),
    "a prefill of whole chunks": (
        "prefill",
        "the input input_ids of prefill is int32 [1, 16]",
        lambda: called(interface(), prefill=evolve(MAIN, inputs={**MAIN.inputs, "input_ids": ((1, 16), "int32")})),
    ),
    "a prefill beside a main that declares one token": (
        "prefill",
        "the input input_ids is int32 [1, ?] of prefill and int32 [1, 1] of main",
        lambda: called(interface(), prefill=with_prefill().functions["prefill"]),
    ),
    "chunks that are not said": (
        "prefill-chunks",
        "`prefill_chunk_size` is None and a call of main takes 1",
        lambda: language(interface(), prefill_chunk_size=None),
    ),
    "another threshold": (
        "prefill-chunks",
        "`prefill_chunk_threshold` is 2048 and a call of main takes 1",
        lambda: language(interface(), prefill_chunk_threshold=2048),
    ),
    "chunks of nothing": (
        "prefill-chunks",
        "`prefill_chunk_size` is 0",
        lambda: language(dynamic(), prefill_chunk_size=0),
    ),
    "a longer context": (
        "max-context",
        "`max_context_length` is 33, and the functions were made for 32 positions",
        lambda: language(interface(), max_context_length=33),
    ),
}


@pytest.mark.parametrize(("rule", "what", "seen"), BREAKS.values(), ids=BREAKS.keys())
def test_a_bundle_that_breaks_a_rule_is_told_so_in_one_sentence_with_the_reason(
    rule: str, what: str, seen: Callable[[], Interface]
) -> None:
    found = {sentence: rule for rule, sentence in zip(rules_of(seen()), broken(seen()), strict=True)}

    (told,) = (sentence for sentence, name in found.items() if name == rule and sentence.startswith(what))
    (known,) = (each for each in COREAI_MODELS.rules if each.name == rule)
    assert told.endswith(f", but {known.reason} (rule {rule})")


def rules_of(seen: Interface) -> list[str]:
    return [rule.name for rule, _ in COREAI_MODELS.breaches(seen)]


def test_every_rule_is_broken_by_a_test() -> None:
    assert {rule for rule, _, _ in BREAKS.values()} == {rule.name for rule in COREAI_MODELS.rules}


@pytest.mark.parametrize("seen", [interface, dynamic, with_prefill], ids=["static", "dynamic", "with a prefill"])
def test_a_bundle_as_an_engine_wants_it_breaks_no_rule(seen: Callable[[], Interface]) -> None:
    assert broken(seen()) == []


def test_a_function_that_no_engine_knows_may_be_anything() -> None:
    other = Signature({"pixels": ((3, 3), "float32")}, {}, {})
    assert broken(called(interface(), pair=other, step=other)) == []


def test_the_decoder_may_have_any_name_that_means_nothing_else() -> None:
    seen = evolve(interface(), functions={"step": MAIN})
    assert broken(language(seen, function_map={"main": ["step"]})) == []
    assert rules_of(language(evolve(seen, functions={"prefill": MAIN}), function_map={"main": ["prefill"]})) == [
        "prefill",
        "prefill",
    ]


@pytest.mark.parametrize(
    "strange", [None, [], {"function_map": []}, {"function_map": {"main": []}}, {"function_map": {"main": "x"}}]
)
def test_metadata_that_is_no_metadata_breaks_rules_instead_of_the_check(strange: Any) -> None:
    seen = evolve(interface(), language=strange if isinstance(strange, dict) else {})
    assert {"vocab-size", "prefill-chunks"} <= set(rules_of(seen))
    assert rules_of(Interface({}, {}, None)) == ["decoder"]


def test_the_rules_are_those_of_contracts_for_core_ai_only() -> None:
    assert {name: contract.engine for name, contract in CONTRACTS.items()} == {
        "static-s1": COREAI_MODELS,
        "chunked": COREAI_MODELS,
        "chunked-unrolled": COREAI_MODELS,
        "dynamic": COREAI_MODELS,
        "dynamic-bf16": COREAI_MODELS,
        "fixed-s1": None,
    }


def test_the_documentation_has_every_rule_with_its_reason() -> None:
    rows = dict(re.findall(r"^\| `([\w-]+)` \| .* \| (.*) \|$", read("contracts.md"), re.MULTILINE))
    assert {name: reason for name, reason in rows.items() if name in {rule.name for rule in COREAI_MODELS.rules}} == {
        rule.name: rule.reason for rule in COREAI_MODELS.rules
    }
