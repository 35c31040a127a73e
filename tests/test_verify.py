"""`zoo verify` and the design of a build against the rules of the engines, on real assets and through real plugins.

tests/test_engine.py breaks every rule on signatures. Here a built sample gets other metadata, or another asset: a small
one that the real toolchain wrote, with a record that agrees with it. So what is found is read from the asset.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from torch import Tensor, nn

import toys
from assets import save
from checkpoints import write_json
from command import zoo
from coreai_zoo import hookimpl
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.bundle.bundle import Bundle, signature_record
from coreai_zoo.bundle.layout import file_digests
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint import portable_tokenizer
from coreai_zoo.contracts import STATIC_S1, Contract
from coreai_zoo.engine import COREAI_MODELS
from coreai_zoo.gates.rule import judge
from coreai_zoo.gates.verify import _judged
from coreai_zoo.plugins import Plugins, default_plugins
from coreai_zoo.signature import KVCache, StateSpec, TraceSpec
from toy_plugin import ToyPlugin

# ---------------------------------------------------------------------------------------------------------------------
# Bundles that say of themselves what is not so
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(built: Callable[[str, str], Bundle], tmp_path: Path) -> Path:
    """A copy of a built sample that a test may change."""
    original = built("qwen3.6-27b", "int8hu").directory
    return shutil.copytree(original, tmp_path / original.name)


def record(bundle: Path, **changes: Any) -> None:
    """Write the record anew, so that all files are as recorded."""
    build = json.loads((bundle / "build.json").read_text()) | changes
    write_json(bundle / "build.json", build | {"files": file_digests(bundle)})


def checks(bundle: Path) -> dict[str, Any]:
    """What `zoo verify` finds, by the name of the check; its exit code says the same."""
    result = zoo("verify", bundle, "--json")
    found = {check["name"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == (0 if all(check["passed"] for check in found.values()) else 1)
    return found


def reason(rule: str) -> str:
    (found,) = (each.reason for each in COREAI_MODELS.rules if each.name == rule)
    return f", but {found} (rule {rule})"


def test_a_sample_as_it_is_built_keeps_every_rule(bundle: Path) -> None:
    found = checks(bundle)
    assert all(check["passed"] for check in found.values()), found
    assert found["engine"]["detail"] == f"{len(COREAI_MODELS.rules)} rules of apple/coreai-models hold"
    assert found["step"]["detail"].endswith("and the same after a reset with nan in the rest of the cache")
    assert found["source"]["detail"] == "name, context and functions as by checkpoint dense"
    assert found["copy"]["detail"] == "the checkpoint's, byte for byte"
    assert found["logits"]["detail"].startswith("6 of 6 tokens as by Hugging Face on the checkpoint")


METADATA: Mapping[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"vocab_size": 1025}, f"`vocab_size` is 1025 and logits has 1024 logits{reason('vocab-size')}"),
    "chunk size": (
        {"prefill_chunk_size": 2048},
        f"`prefill_chunk_size` is 2048 and a call of main takes 1{reason('prefill-chunks')}",
    ),
    "chunk threshold": (
        {"prefill_chunk_threshold": None},
        f"`prefill_chunk_threshold` is None and a call of main takes 1{reason('prefill-chunks')}",
    ),
    "function": ({"function_map": {"main": ["decode"]}}, f"the asset has no function decode{reason('decoder')}"),
    "states": (
        {"states": {"convState": "sliding_cache"}},
        f"`states` calls convState sliding_cache and it is fixed{reason('state-kinds')}",
    ),
    "context": ({"max_context_length": 10**6}, reason("max-context")),
}


@pytest.mark.parametrize(("changes", "words"), METADATA.values(), ids=METADATA.keys())
def test_metadata_that_breaks_a_rule_does_not_verify(bundle: Path, changes: dict[str, Any], words: str) -> None:
    metadata = json.loads((bundle / "metadata.json").read_text())
    write_json(bundle / "metadata.json", metadata | {"language": metadata["language"] | changes})
    record(bundle)

    found = checks(bundle)

    assert found["files"]["passed"]
    assert not found["engine"]["passed"] and "step" not in found
    assert words in found["engine"]["detail"]


LOADER: Mapping[str, tuple[dict[str, Any], str]] = {
    "no version": ({"metadata_version": None}, "None is no text @ metadata.json.metadata_version"),
    "another version": ({"metadata_version": "0.3"}, "metadata_version is '0.3', not '0.2'"),
    "another kind": ({"kind": "vlm"}, "kind is 'vlm', not 'llm'"),
    "a path for an asset": ({"assets": {"main": 5}}, "5 is no text @ metadata.json.assets['main']"),
    "user data of numbers": ({"user_data": {"sample": True}}, "True is no text @ metadata.json.user_data['sample']"),
    "no tokenizer": ({"language": {"tokenizer": None}}, "None is no text @ metadata.json.language.tokenizer"),
    "a vocabulary in words": (
        {"language": {"vocab_size": "1024"}},
        "'1024' is no integer @ metadata.json.language.vocab_size",
    ),
    "a context that is null": (
        {"language": {"max_context_length": None}},
        "None is no integer @ metadata.json.language.max_context_length",
    ),
    "a chunk that is true": (
        {"language": {"prefill_chunk_size": True}},
        "True is no integer @ metadata.json.language.prefill_chunk_size",
    ),
    "an embedded tokenizer in words": (
        {"language": {"embedded_tokenizer": "yes"}},
        "'yes' is no boolean @ metadata.json.language.embedded_tokenizer",
    ),
    "a function that is no list": (
        {"language": {"function_map": {"main": 1}}},
        "@ metadata.json.language.function_map['main']",
    ),
    "an unknown kind of state": (
        {"language": {"states": {"convState": "recurrent"}}},
        "@ metadata.json.language.states['convState']",
    ),
}


@pytest.mark.parametrize(("changes", "words"), LOADER.values(), ids=LOADER.keys())
def test_metadata_that_apples_loader_would_not_take_does_not_verify(
    bundle: Path, changes: dict[str, Any], words: str
) -> None:
    metadata = json.loads((bundle / "metadata.json").read_text())
    language = metadata["language"] | changes.get("language", {})
    write_json(bundle / "metadata.json", metadata | changes | {"language": language})

    found = checks(bundle)

    assert not found["metadata"]["passed"]
    assert words in found["metadata"]["detail"]


@pytest.mark.parametrize("key", ["name", "kind", "metadata_version", "language"])
def test_metadata_without_a_field_that_apples_loader_needs_does_not_verify(bundle: Path, key: str) -> None:
    metadata = json.loads((bundle / "metadata.json").read_text())
    write_json(bundle / "metadata.json", {name: value for name, value in metadata.items() if name != key})

    detail = checks(bundle)["metadata"]["detail"]

    assert f"a required field is missing @ metadata.json.{key}" in detail


def test_a_function_of_another_name_is_told_as_one_that_is_there_and_one_that_is_not(bundle: Path) -> None:
    build = json.loads((bundle / "build.json").read_text())
    write_json(bundle / "build.json", build | {"functions": {"read4": build["functions"]["main"]}})
    detail = checks(bundle)["source"]["detail"]
    assert "build.json has no function main" in detail and "the contract has no function read4" in detail
    assert "are not those of the contract" not in detail


def test_a_bundle_for_another_engine_is_held_against_no_rule_and_says_so(bundle: Path) -> None:
    build = json.loads((bundle / "build.json").read_text())
    write_json(bundle / "build.json", build | {"contract": build["contract"] | {"engine": None}})
    assert checks(bundle)["engine"]["detail"].startswith("no rules: the contract is for none")

    write_json(bundle / "build.json", build | {"contract": build["contract"] | {"engine": "acme"}})
    assert "is for the engine 'acme', whose rules this zoo does not know" in checks(bundle)["engine"]["detail"]

    # A record of before contracts had an engine.
    older = {key: value for key, value in build["contract"].items() if key != "engine"}
    write_json(bundle / "build.json", build | {"contract": older})
    assert checks(bundle)["engine"]["detail"].endswith("rules of apple/coreai-models hold")


# ---------------------------------------------------------------------------------------------------------------------
# Assets
# ---------------------------------------------------------------------------------------------------------------------

WIDTH = 1024  # of the sample's logits
EXTRA = (StateSpec(name="convState", shape=(2, 1, 4)), StateSpec(name="recState", shape=(2, 1, 4), dtype="float32"))
SPEC = STATIC_S1.functions(KVCache(2, 1, 8), EXTRA, WIDTH, 32)["main"]
FOUR = STATIC_S1.signature(4, KVCache(2, 1, 8), EXTRA, WIDTH, 32)


class Sums(nn.Module):
    """Logits that are a sum of everything that a decoder may read; keys and values are written at T - 1.

    Args:
        spec: the signature.
        mask: what it makes of the keys beyond T: it does not read them, or reads them in vain.

    Where `forgets` is set, the logits are of the new token alone.
    """

    forgets = False

    def __init__(self, spec: TraceSpec, mask: Callable[[Tensor, int], Tensor] | None = None) -> None:
        super().__init__()
        self.outputs, self.mask = spec.outputs, mask or (lambda keys, length: keys[:, :, :, :length])

    def forward(self, ids: Tensor, positions: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        seen = ids.sum() + positions.sum() + 1
        total = seen.to(torch.float32)
        for state in states:
            if state.dim() == 5:
                length = positions.shape[-1]
                state[:, :, :, length - ids.shape[1] : length] = total.to(state.dtype)
                total = total + self.mask(state, length).float().sum()
            else:
                state.add_(1)
                total = total + state.float().sum()
        total = ids.sum().to(torch.float32) + 1 + 0 * total if self.forgets else total
        return tuple((total * torch.ones(output.shape)).to(getattr(torch, output.dtype)) for output in self.outputs)


def forwarding(count: int, inputs: str) -> type[Sums]:
    """`Sums` with so many states by name: torch.export wants a dynamic shape for each argument.

    Args:
        count: how many.
        inputs: its inputs in the order in which it is given them.
    """
    names = ", ".join(f"state_{index}" for index in range(count))
    space: dict[str, Any] = {"Sums": Sums}
    exec(  # a signature of a given length
        f"def forward(self, {inputs}, {names}):\n    return Sums.forward(self, ids, positions, {names})", space
    )
    return type("Sums", (Sums,), {"forward": space["forward"]})


def net(spec: TraceSpec, mask: Callable[[Tensor, int], Tensor] | None = None) -> nn.Module:
    swapped = spec.inputs[0].name == "position_ids"
    return forwarding(len(spec.states), "positions, ids" if swapped else "ids, positions")(spec, mask)


def put(bundle: Path, modules: Mapping[str, nn.Module], functions: Mapping[str, TraceSpec], **language: Any) -> None:
    """Give a bundle another asset, that the toolchain writes, and metadata and a record that agree with it."""
    metadata = json.loads((bundle / "metadata.json").read_text())
    asset = bundle / metadata["assets"]["main"]
    shutil.rmtree(asset)
    save(CoreAIBackend().trace(modules, functions), {}, asset)
    (decoder, *_) = functions.values()
    states = {state.name: state.kind for state in decoder.states}
    chunk = decoder.query_length
    language = {"states": states, "prefill_chunk_size": chunk, "prefill_chunk_threshold": chunk} | language
    write_json(bundle / "metadata.json", metadata | {"language": metadata["language"] | {**language}})
    record(bundle, functions={name: signature_record(spec) for name, spec in functions.items()})


def with_tensor(spec: TraceSpec, group: str, called: str, /, **changes: Any) -> TraceSpec:
    """The signature with one tensor declared otherwise, and without the ranges that nothing uses any more."""
    groups = {each: getattr(spec, each) for each in ("inputs", "states", "outputs")}
    groups[group] = tuple(evolve(each, **changes) if each.name == called else each for each in groups[group])
    used = {size for each in (*groups["inputs"], *groups["states"]) for size in each.shape}
    return evolve(spec, **groups, axes={name: axis for name, axis in spec.axes.items() if name in used})


def test_a_small_asset_that_keeps_the_rules_verifies_in_a_samples_place(bundle: Path) -> None:
    put(bundle, {"main": net(SPEC)}, {"main": SPEC}, max_context_length=32)
    found = checks(bundle)
    failed = [name for name, check in found.items() if not check["passed"]]
    assert failed == ["metadata", "source", "weights"], found  # it is not the sample, but what it says it is
    assert found["metadata"]["detail"].startswith("language.max_context_length is 32")  # the record has the sample's


ASSETS: Mapping[str, tuple[str, str, Callable[[], TraceSpec]]] = {
    "positions first": (
        "inputs",
        "the inputs of main are position_ids, input_ids instead of input_ids, position_ids",
        lambda: evolve(SPEC, inputs=SPEC.inputs[::-1]),
    ),
    "one position": (
        "input-shapes",
        "the input position_ids of main is int32 [1, 1]",
        lambda: with_tensor(SPEC, "inputs", "position_ids", shape=(1, 1)),
    ),
    "tokens that are no integers": (
        "input-shapes",
        "the input input_ids of main is float32 [1, 1]",
        lambda: with_tensor(SPEC, "inputs", "input_ids", dtype="float32"),
    ),
    "float32 logits": (
        "logits",
        "the output logits of main is float32 [1, 1, 1024]",
        lambda: with_tensor(SPEC, "outputs", "logits", dtype="float32"),
    ),
    "flat logits": (
        "logits",
        "the output logits of main is float16 [1, 1024]",
        lambda: with_tensor(SPEC, "outputs", "logits", shape=(1, WIDTH)),
    ),
    "narrow logits": (
        "vocab-size",
        "`vocab_size` is 1024 and logits has 1000 logits",
        lambda: with_tensor(SPEC, "outputs", "logits", shape=(1, 1, 1000)),
    ),
    "five states": (
        "state-count",
        "main has 5 states, keyCache, valueCache, convState, recState, more",
        lambda: evolve(SPEC, states=(*SPEC.states, StateSpec(name="more", shape=(1, 4)))),
    ),
    "a fixed state first": (
        "kv-pair",
        "the state convState of main, one of the first two, is float16 [2, 1, 4]",
        lambda: evolve(SPEC, states=(SPEC.states[2], *SPEC.states[:2], SPEC.states[3])),
    ),
    "keys and values of different types": (
        "kv-pair",
        "the state keyCache is float16 [2, 1, 1, ?, 8] and valueCache is float32 [2, 1, 1, ?, 8]",
        lambda: with_tensor(SPEC, "states", "valueCache", dtype="float32"),
    ),
    "values of static capacity": (
        "kv-pair",
        "the state valueCache of main, one of the first two, is float16 [2, 1, 1, 64, 8]",
        lambda: with_tensor(SPEC, "states", "valueCache", shape=(2, 1, 1, 64, 8)),
    ),
    "a third cache": (
        "static-states",
        "the state convState of main is float16 [2, 1, 1, ?, 8]",
        lambda: with_tensor(SPEC, "states", "convState", shape=(2, 1, 1, "capacity", 8), kind="kv_cache"),
    ),
    "a state called a cache": (
        "state-names",
        "a state beside the key / value pair is called convCache",
        lambda: with_tensor(SPEC, "states", "convState", name="convCache"),
    ),
}


@pytest.mark.parametrize(("rule", "what", "spec"), ASSETS.values(), ids=ASSETS.keys())
def test_an_asset_that_breaks_a_rule_does_not_verify_even_where_its_record_agrees(
    bundle: Path, rule: str, what: str, spec: Callable[[], TraceSpec]
) -> None:
    put(bundle, {"main": net(spec())}, {"main": spec()})

    found = checks(bundle)

    assert found["files"]["passed"] and found["signature"]["passed"], found
    assert not found["engine"]["passed"] and "step" not in found
    assert f"{what}{reason(rule)}" in found["engine"]["detail"]


@pytest.mark.parametrize(
    ("name", "spec", "rule", "what"),
    [
        ("extend_512_8", SPEC, "function-names", "a function is called extend_512_8"),
        ("load_embeddings", SPEC, "function-names", "a function is called load_embeddings"),
        ("prefill", FOUR, "prefill", "prefill gives logits"),
        ("prefill", FOUR, "prefill", "the input input_ids of prefill is int32 [1, 4]"),
        (
            "prefill",
            FOUR,
            "prefill",
            "the input input_ids is int32 [1, 4] of prefill and int32 [1, 1] of main",
        ),
    ],
    ids=["extend", "embeddings", "a prefill with logits", "a prefill of whole chunks", "another main"],
)
def test_an_asset_with_a_function_that_means_something_else_does_not_verify(
    bundle: Path, name: str, spec: TraceSpec, rule: str, what: str
) -> None:
    functions = {"main": SPEC, name: spec}
    put(bundle, {each: net(one) for each, one in functions.items()}, functions)
    found = checks(bundle)
    assert found["signature"]["passed"] and not found["engine"]["passed"], found
    assert f"{what}{reason(rule)}" in found["engine"]["detail"]


def beyond(keys: Tensor, length: int) -> Tensor:
    """All keys, those beyond T multiplied by zero: a mask that a NaN passes."""
    return keys * (torch.arange(keys.shape[3]) < length).to(keys.dtype)[None, None, None, :, None]


def test_an_asset_that_reads_beyond_the_positions_so_far_does_not_verify(bundle: Path) -> None:
    put(bundle, {"main": net(SPEC, beyond)}, {"main": SPEC}, max_context_length=32)

    found = checks(bundle)

    assert found["engine"]["passed"], found
    assert found["step"]["detail"].startswith(
        "after a reset the logits are others where the key / value cache holds nan beyond the positions so far"
    )
    assert not found["step"]["passed"]


def test_an_asset_that_carries_nothing_from_token_to_token_does_not_verify(bundle: Path) -> None:
    forgetful = net(SPEC)
    forgetful.forgets = True  # type: ignore[assignment]
    put(bundle, {"main": forgetful}, {"main": SPEC}, max_context_length=32)

    found = checks(bundle)

    assert found["engine"]["passed"] and not found["step"]["passed"], found
    assert found["step"]["detail"] == "two tokens, and the second has the logits that it has alone"


# ---------------------------------------------------------------------------------------------------------------------
# Designs
# ---------------------------------------------------------------------------------------------------------------------


class States:
    """A plugin that adds states to the toy's."""

    def __init__(self, *states: StateSpec) -> None:
        self.states = states

    @hookimpl
    def zoo_extra_states(self) -> Sequence[StateSpec]:
        return self.states


class Contracts:
    """A plugin that brings a contract."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract

    @hookimpl
    def zoo_contracts(self) -> list[Contract]:
        return [self.contract]


def host(folder: Path, plugin: object) -> Plugins:
    plugins = toys.host(ToyPlugin(toys.write_entry(folder / "toy.toml")))
    plugins.register(plugin, "acme")
    return plugins


FIXED = StateSpec(name="oneState", shape=(1, 4))
STATES: Mapping[str, tuple[tuple[StateSpec, ...], str]] = {
    "too many": (
        (FIXED, evolve(FIXED, name="otherState")),
        "main has 5 states, keyCache, valueCache, meanState, oneState, otherState" + reason("state-count"),
    ),
    "a cache by name": (
        (evolve(FIXED, name="oneKVState"),),
        "a state beside the key / value pair is called oneKVState" + reason("state-names"),
    ),
    "another growing state": (
        (StateSpec(name="oneState", shape=(1, "capacity"), kind="kv_cache"),),
        "the state oneState of main is float16 [1, ?]" + reason("static-states"),
    ),
}


@pytest.mark.parametrize("command", ["plan", "build"])
@pytest.mark.parametrize(("states", "words"), STATES.values(), ids=STATES.keys())
def test_states_that_break_a_rule_are_refused_before_any_work_with_the_plugin(
    tmp_path: Path, command: str, states: tuple[StateSpec, ...], words: str
) -> None:
    plugins = host(tmp_path, States(*states))
    arguments: list[object] = ["plan", "toy-mean"]
    if command == "build":
        checkpoint = toys.write_checkpoint(tmp_path / "checkpoint")
        arguments = ["build", "toy-mean", "--checkpoint", checkpoint, "-o", tmp_path / "out"]

    result = zoo(*arguments, plugins=plugins)

    assert result.exit_code == 2
    said = " ".join(result.stderr.splitlines()[-1].split())
    assert f"by the contract static-s1 this bundle would break rules of {COREAI_MODELS.title}: {words}" in said
    assert "from plugin 'acme'" in said
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (evolve(FIXED, name="keyCache"), "the function names keyCache more than once"),
        (StateSpec(name="oneState", shape=(1, "more"), kind="kv_cache"), "tensors use the axes"),
    ],
    ids=["the name of a key cache", "an axis of its own"],
)
def test_a_state_that_no_signature_can_have_is_told_with_its_plugin_and_without_a_traceback(
    tmp_path: Path, state: StateSpec, words: str
) -> None:
    result = zoo("plan", "toy-mean", plugins=host(tmp_path, States(state)))
    assert result.exit_code == 2, result.output
    assert words in result.stderr and f"{state.name} from plugin 'acme'" in result.stderr
    assert "Traceback" not in result.stderr


class OneState(Contract):
    """A contract whose function has keys and no values."""

    def functions(
        self, kv: KVCache, extra: Sequence[StateSpec], vocab_size: int, max_context: int
    ) -> Mapping[str, TraceSpec]:
        (main,) = super().functions(kv, (), vocab_size, max_context).values()
        return {"main": evolve(main, states=main.states[:1])}


class WideLogits(Contract):
    """A contract whose logits are in what the decoder computes in."""

    logits_dtype = "bfloat16"


class TwoFunctions(Contract):
    """A contract with a `prefill` that gives logits as well."""

    def functions(
        self, kv: KVCache, extra: Sequence[StateSpec], vocab_size: int, max_context: int
    ) -> Mapping[str, TraceSpec]:
        main = self.signature(None, kv, extra, vocab_size, max_context)
        return {"main": main, "prefill": main}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (OneState, "main has 1 states, keyCache" + reason("state-count")),
        (TwoFunctions, "prefill gives logits" + reason("prefill")),
    ],
    ids=["one state", "a prefill with logits"],
)
def test_a_contract_of_a_plugin_is_held_against_the_rules_unless_it_is_for_another_engine(
    tmp_path: Path, kind: type[Contract], words: str
) -> None:
    contract = kind("acme", "For a test.", 1, ())
    plan = ("plan", "toy-mean", "--contract", "acme")

    refused = zoo(*plan, plugins=host(tmp_path, Contracts(contract)))
    assert refused.exit_code == 2
    assert words in " ".join(refused.stderr.splitlines()[-1].split())

    freed = zoo(*plan, plugins=host(tmp_path, Contracts(evolve(contract, engine=None))))
    assert freed.exit_code == 0, freed.output


def test_a_contract_in_another_precision_is_refused_since_engines_read_float16(tmp_path: Path) -> None:
    wide = WideLogits("acme", "For a test.", 1, ())
    refused = zoo("plan", "toy-mean", "--contract", "acme", plugins=host(tmp_path, Contracts(wide)))
    assert refused.exit_code == 2
    assert "the output logits of main is bfloat16 [1, 1, 264]" in refused.stderr


def test_the_contract_of_core_ml_is_bound_by_no_rule_of_core_ai(tmp_path: Path) -> None:
    plugins = host(tmp_path, States(evolve(FIXED, name="oneCache"), evolve(FIXED, name="twoCache")))
    planned = zoo("plan", "toy-mean", "--contract", "fixed-s1", "--backend", "coreml", plugins=plugins)
    assert planned.exit_code == 2
    # Of the toy's own state, and no word of the two others.
    refusal = "Core ML cannot hold this decoder: state meanState is float32, and a state is float16."
    assert planned.stderr.splitlines()[-1] == f"error: {refusal} Use another contract, or the backend coreai."


# ---------------------------------------------------------------------------------------------------------------------
# Against the checkpoint. What each check catches, tests/product_mutants.py has.
# ---------------------------------------------------------------------------------------------------------------------


def test_another_checkpoint_than_the_bundles_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = find_entry("qwen3.6-35b-a3b", default_plugins())[0].sample_directory()
    refused = zoo("verify", bundle, "--checkpoint", other)
    assert refused.exit_code == 2
    assert f"{other} is not the checkpoint that {bundle.name} was built from" in refused.stderr

    nowhere = zoo("verify", bundle, "--checkpoint", tmp_path / "nowhere")
    assert nowhere.exit_code == 2 and "There is no checkpoint at" in nowhere.stderr


def test_a_checkpoint_that_is_given_is_compared_with(bundle: Path) -> None:
    sample = find_entry("qwen3.6-27b", default_plugins())[0].sample_directory()
    result = zoo("verify", bundle, "--checkpoint", sample, "--json")
    found = {check["name"]: check["passed"] for check in json.loads(result.stdout)}
    assert result.exit_code == 0 and {"source", "copy", "weights", "logits"} <= set(found)


def test_what_is_not_compared_for_want_of_a_checkpoint_is_said(bundle: Path) -> None:
    record(bundle, entry=None, sample=False)
    found = checks(bundle)
    assert found["checkpoint"]["detail"] == (
        "name, functions, tokenizer and weights are not compared with it: The checkpoint of "
        f"{bundle.name} is not at hand: where it is was not recorded"
    )
    assert not {"source", "copy", "logits"} & set(found)
    assert not found["metadata"]["passed"], "it still says that it is a sample"


def test_without_a_checkpoint_a_bundle_is_held_against_the_facts_of_its_entry(bundle: Path) -> None:
    record(bundle, sample=False)  # a miniature that passes for the model itself
    found = checks(bundle)
    assert not found["source"]["passed"]
    assert (
        "name is 'qwen3_6_27b_sample_decode_int8hu_block32_sym', not 'qwen3_6_27b_decode" in found["source"]["detail"]
    )


@pytest.mark.parametrize(
    ("scale", "shift", "words"),
    [
        (1.0, 0, "4 of 4 tokens as by Hugging Face on the checkpoint, median relative error 0"),
        (2.0, 0, "but the median relative error is 1"),
        (float("nan"), 0, "0 of 4 tokens"),
        (1.0, 1, "0 of 4 tokens as by Hugging Face on the checkpoint, 4 flips where it is sure, by up to 9.00"),
    ],
)
def test_logits_that_are_finite_are_not_right_for_that(scale: float, shift: int, words: str) -> None:
    wanted = np.eye(5)[[0, 1, 2, 3]] * 9.0
    check = _judged(judge([0, 1, 2, 3], wanted, np.roll(wanted, shift, axis=1) * scale))
    assert words in check.detail
    assert check.passed == (scale == 1.0 and not shift)


def test_a_build_that_copies_the_tokenizer_wrongly_leaves_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake is in the code that copies, so making the folder again makes it again."""
    copyfile = shutil.copyfile

    def exchange(source: Path, target: Path) -> None:
        copyfile(source, target)
        if source.name == "tokenizer.json":
            content = json.loads(target.read_text(encoding="utf-8"))
            vocabulary = content["model"]["vocab"]
            one, other = list(vocabulary)[40:42]
            vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
            write_json(target, content)

    monkeypatch.setattr(portable_tokenizer.shutil, "copyfile", exchange)
    checkpoint = toys.write_checkpoint(tmp_path / "checkpoint")
    plugins = toys.host(ToyPlugin(toys.write_entry(tmp_path / "toy.toml")))

    built = zoo("build", "toy-mean", "--checkpoint", checkpoint, "-o", tmp_path / "out", plugins=plugins)

    assert built.exit_code == 1, built.output
    assert "The bundle does not verify: copy: the ids are others than the checkpoint's" in built.stderr
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
