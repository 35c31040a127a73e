"""Whether a bundle holds what it says, what it was built from, and what its engine asks.

Files, records, tokenizer, then the asset: its functions, its weights, the engine's rules, and real steps where the
model is small. Two copies of one object agree whatever they say, so each thing is compared with a source of its own:
the asset with what its toolchain reads in it, the rest with `Expected`, which is of checkpoint, entry and contract.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

from coreai_zoo.backend import Backend, Check, Stepper
from coreai_zoo.bundle.bundle import Bundle, signature_record
from coreai_zoo.bundle.expected import Expected
from coreai_zoo.bundle.layout import bytes_below, file_digests
from coreai_zoo.bundle.metadata import METADATA_VERSION, MODEL_DEFINITION, chunk_keys, leaves, unreadable
from coreai_zoo.bundle.same_tokenizer import copy_problems
from coreai_zoo.bundle.stored import check_stored
from coreai_zoo.bundle.verify_tokenizer import tokenizer_problems
from coreai_zoo.checkpoint.tokenizer import highest_token_id, tokenizer_class
from coreai_zoo.dates import build_date
from coreai_zoo.engine import Interface, sentence
from coreai_zoo.errors import BadInput, CheckFailed, ZooError, listing
from coreai_zoo.json_files import read_object
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import Recipe
from coreai_zoo.signature import Signature, TraceSpec

# Weights up to this size are run for one step; beyond it the CPU interpreter needs minutes for a token.
SMOKE_STEP_BYTES = 64 * 2**20


def verify(
    bundle: Bundle,
    backends: Mapping[str, Backend],
    tokenizer_classes: Mapping[str, str],
    *,
    recipes: Mapping[str, Recipe] = RECIPES,
    expected: Expected | None = None,
    recorded_only: bool = False,
) -> list[Check]:
    """The checks of a bundle: files, metadata, tokenizer, then the asset, which is only opened if the files are right.

    Args:
        bundle: the bundle.
        backends: the installed backends, by name.
        tokenizer_classes: see `Plugins.tokenizer_classes`.
        recipes: the installed recipes, by name.
        expected: what the bundle has to hold by what it was built from; None where that is not known here.
        recorded_only: leave files out of account that the record does not name.

    Raises:
        BadInput: when the bundle was written by a backend that is not installed.
    """
    backend = backend_of(bundle, backends)
    files = check_files(bundle, recorded_only=recorded_only)
    checks = [
        files,
        _metadata(bundle, backend),
        _tokenizer(bundle, set(tokenizer_classes.values())),
    ]
    if expected is not None:
        checks.append(_source(bundle, expected))
        if expected.checkpoint is not None:
            checks.append(check_copy(bundle, expected.checkpoint, tokenizer_classes))
    if files.passed:
        checks += _asset(bundle, backend, recipes, expected)
    return checks


def backend_of(bundle: Bundle, backends: Mapping[str, Backend]) -> Backend:
    """The backend that wrote `bundle`.

    Raises:
        BadInput: when it is not installed.
    """
    name = str(bundle.build.get("backend"))
    if name not in backends:
        raise BadInput(f"{bundle.directory} was written by the backend {name!r}, which is not installed.")
    return backends[name]


def require(checks: Sequence[Check]) -> None:
    """Refuse failed checks.

    Raises:
        CheckFailed: with every failed check.
    """
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    if failed:
        raise CheckFailed(f"The bundle does not verify: {'; '.join(failed)}.")


def require_asset(bundle: Bundle) -> None:
    """Refuse an asset that is not as it was built before it is loaded: the runtime aborts on damaged bytecode.

    Raises:
        CheckFailed: naming what is missing or was changed.
    """
    _require_asset(bundle, file_digests(bundle.directory, bundle.asset.name))


def require_unchanged(bundle: Bundle) -> None:
    """Refuse a bundle of which any file is not as it was built, the asset first; every file is read once.

    Raises:
        CheckFailed: naming what is missing or was changed.
    """
    found = file_digests(bundle.directory)
    _require_asset(bundle, found)
    require([_compare_files(bundle, found)])


def _require_asset(bundle: Bundle, found: Mapping[str, Any]) -> None:
    folder = f"{bundle.asset.name}/"
    recorded = {path: record for path, record in bundle.build["files"].items() if path.startswith(folder)}
    damaged = [path for path, record in recorded.items() if found.get(path) != record]
    if damaged or not recorded:
        raise CheckFailed(
            f"{bundle.directory} cannot be run: {listing(damaged) or bundle.asset.name} is missing or was changed.",
            "Build the bundle again.",
        )


def check_files(bundle: Bundle, *, recorded_only: bool = False) -> Check:
    """The check of every file against its record, which reads all of them; see `verify`."""
    found = file_digests(bundle.directory)
    if recorded_only:
        found = {path: digest for path, digest in found.items() if path in bundle.build["files"]}
    return _compare_files(bundle, found)


def _compare_files(bundle: Bundle, found: Mapping[str, Any]) -> Check:
    recorded: Mapping[str, Any] = bundle.build.get("files", {})
    problems = [f"{path} is missing" for path in sorted(set(recorded) - set(found))]
    problems += [f"{path} is not in the record" for path in sorted(set(found) - set(recorded))]
    problems += [f"{path} was changed" for path in sorted(set(found) & set(recorded)) if found[path] != recorded[path]]
    total = sum(digest["bytes"] for digest in found.values())
    return Check(
        "files", not problems, listing(problems) or f"{len(found)} files, {total:,} bytes, SHA-256 as recorded"
    )


def _metadata(bundle: Bundle, backend: Backend) -> Check:
    """The check of metadata.json: Apple's loader can read it, and every key is what a build writes there."""
    data = bundle.metadata
    found, wanted = leaves(data), leaves(_metadata_of(bundle, backend))
    problems = [
        f"{key} is {found.get(key)!r}, not {wanted.get(key)!r}"
        for key in dict.fromkeys((*wanted, *found))
        if found.get(key) != wanted.get(key) or type(found.get(key)) is not type(wanted.get(key))
    ]
    problems += [f"{key} is null, where a build writes no such key" for key in found if found[key] is None]
    problems += [f"Apple's loader cannot read it: {problem}" for problem in unreadable(data)]
    if not bundle.asset.is_dir():
        problems.append(f"there is no asset {bundle.asset.name}")
    return Check(
        "metadata", not problems, listing(problems) or f"version {METADATA_VERSION}, {len(found)} keys as recorded"
    )


def _metadata_of(bundle: Bundle, backend: Backend) -> dict[str, Any]:
    """What metadata.json has to say by the record of the build."""
    build, spec, origin = bundle.build, bundle.signature, bundle.origin
    name, recipe = build.get("name"), build.get("recipe")
    context = build.get("max_context")
    source = {"hf_model_id": origin.get("hf_id"), "hf_revision": origin.get("revision")}
    return {
        "metadata_version": METADATA_VERSION,
        "kind": "llm",
        "name": name,
        "assets": {"main": f"{name}{backend.asset_suffix}"},
        "language": {
            "tokenizer": origin.get("hf_id") or name,
            # The sampler is sized by it: it must be the width of the logits.
            "vocab_size": spec.outputs[0].shape[-1],
            "max_context_length": context,
            "embedded_tokenizer": bundle.tokenizer.is_dir(),
            **(chunk_keys(bundle.functions, context) if isinstance(context, int) else {}),
            "function_map": {"main": [bundle.decode]},
            "states": {state.name: state.kind for state in spec.states},
        },
        "source": {
            "model_definition": MODEL_DEFINITION,
            **{key: value for key, value in source.items() if value is not None},
        },
        "compression": recipe.get("published_name") if isinstance(recipe, Mapping) else None,
        "compilation": {"date": build_date(int(build.get("source_date_epoch", 0))), "targets": []},
        "user_data": {"sample": "true"} if build.get("sample") else {},
    }


def _source(bundle: Bundle, expected: Expected) -> Check:
    """The check of name, context, functions and states against what the bundle was built from."""
    language = {key: value for key, value in _language(bundle).items() if key != "tokenizer"}
    functions = {name: signature_record(spec) for name, spec in bundle.functions.items()}
    wanted_functions = {name: signature_record(spec) for name, spec in expected.functions.items()}
    pairs: dict[str, tuple[object, object]] = {
        "name": (bundle.metadata.get("name"), expected.name),
        "the name in build.json": (bundle.build.get("name"), expected.name),
        "the asset": (bundle.asset.name, expected.asset),
        "compression": (bundle.metadata.get("compression"), expected.compression),
        **{
            f"language.{key}": (leaves(language).get(key), leaves(expected.language).get(key))
            for key in dict.fromkeys((*leaves(expected.language), *leaves(language)))
        },
    }
    recorded, wanted_record = leaves(bundle.build), leaves(json.loads(json.dumps(expected.recorded)))
    # What is there and should not be is compared as well: a gate would go by it.
    within = tuple(f"{path}." for path in expected.recorded)
    keys = dict.fromkeys((*wanted_record, *(key for key in recorded if key.startswith(within))))
    pairs |= {f"{key} in build.json": (recorded.get(key), wanted_record.get(key)) for key in keys}
    problems = [f"{key} is {found!r}, not {wanted!r}" for key, (found, wanted) in pairs.items() if found != wanted]
    problems += [f"build.json has no function {name}" for name in wanted_functions if name not in functions]
    problems += [f"the contract has no function {name}" for name in functions if name not in wanted_functions]
    for name in wanted_functions.keys() & functions.keys():
        wrong = [part for part, wanted in wanted_functions[name].items() if functions[name].get(part) != wanted]
        problems += [f"the {part} of {name} in build.json are not those of the contract" for part in wrong]
    return Check("source", not problems, listing(problems) or f"name, context and functions as by {expected.by}")


def check_copy(bundle: Bundle, checkpoint: Path, tokenizer_classes: Mapping[str, str]) -> Check:
    """The check of the tokenizer's folder against the checkpoint's; see `same_tokenizer`."""
    made_by_this = bundle.build.get("zoo") == distributions.version("coreai-zoo")
    problems = copy_problems(checkpoint, bundle.tokenizer, tokenizer_classes, of_this_zoo=made_by_this)
    recorded = bundle.build.get("tokenizer")
    changes = recorded.get("changes") if isinstance(recorded, Mapping) else None
    kept = f"the checkpoint's, changed on purpose: {listing(changes)}" if changes else "the checkpoint's, byte for byte"
    return Check("copy", not problems, listing(problems) or kept)


def _language(bundle: Bundle) -> Mapping[str, Any]:
    """The block `language` of metadata.json; empty where there is none."""
    language = bundle.metadata.get("language")
    return language if isinstance(language, Mapping) else {}


def _tokenizer(bundle: Bundle, known: Collection[str]) -> Check:
    width = int(bundle.signature.outputs[0].shape[-1])
    if problems := tokenizer_problems(bundle.tokenizer, width, known):
        return Check("tokenizer", False, listing(problems))
    name = tokenizer_class(read_object(bundle.tokenizer / "tokenizer_config.json"))
    return Check("tokenizer", True, f"{name}, token ids up to {highest_token_id(bundle.tokenizer)} for {width} logits")


def _asset(bundle: Bundle, backend: Backend, recipes: Mapping[str, Recipe], expected: Expected | None) -> list[Check]:
    integrity = backend.check_integrity(bundle.asset)
    checks = [] if integrity is None else [integrity]
    try:
        found = backend.signatures(bundle.asset)
    except ZooError as error:
        return [*checks, Check("signature", False, str(error))]
    problems = _compare_signatures(found, bundle.functions)
    summary = "; ".join(
        _shown(spec) if len(bundle.functions) == 1 else f"{name}: {_shown(spec)}"
        for name, spec in bundle.functions.items()
    )
    compared = [
        Check("signature", not problems, listing(problems) or summary),
        _states(bundle, found),
        _engine(bundle, found),
    ]
    checks += compared
    try:
        checks.append(check_stored(bundle, backend, recipes, expected))
    except (ZooError, KeyError, TypeError) as error:
        checks.append(Check("weights", False, f"cannot be read: {error}"))
    # What is declared otherwise cannot be stepped, and ends in an error of the runtime that says less.
    if all(check.passed for check in compared) and bytes_below(bundle.asset) <= SMOKE_STEP_BYTES:
        checks.append(_smoke_step(bundle, backend))
    return checks


def _shown(spec: TraceSpec) -> str:
    inputs, states, outputs = (
        ", ".join(tensor.name for tensor in tensors) for tensors in (spec.inputs, spec.states, spec.outputs)
    )
    return "; ".join(filter(None, (inputs, f"states {states}", outputs)))


def _compare_signatures(found: Mapping[str, Signature], functions: Mapping[str, TraceSpec]) -> list[str]:
    """The differences between the functions of a saved asset and their specs, one phrase each."""
    problems = [f"the function {name} is missing" for name in functions if name not in found]
    problems += [f"the function {name} was not built" for name in found if name not in functions]
    for name, spec in functions.items():
        if name in found:
            where = "" if len(functions) == 1 else f"{name}: "
            problems += [f"{where}{problem}" for problem in _compare_signature(found[name], spec)]
    return problems


def _compare_signature(found: Signature, spec: TraceSpec) -> list[str]:
    """The differences between a saved function and its spec, one phrase each."""
    problems = []
    groups = (
        ("input", found.inputs, spec.declared.inputs),
        ("state", found.states, spec.declared.states),
        ("output", found.outputs, spec.declared.outputs),
    )
    for kind, saved, wanted in groups:
        if list(saved) != list(wanted):
            problems.append(f"{kind}s are {list(saved)}, not {list(wanted)}")
            continue
        problems += [
            f"{kind} {name} is {saved[name]}, not {wanted[name]}" for name in wanted if saved[name] != wanted[name]
        ]
    return problems


def _states(bundle: Bundle, found: Mapping[str, Signature]) -> Check:
    """The check of the block `language` against the function of the asset that decodes.

    A state that holds something of every position grows with them, or has an axis as long as the context. What a bundle
    says of its states is held against that, whether or not its engine has rules of its own.
    """
    language, context = _language(bundle), bundle.max_context
    decoder = found.get(bundle.decode, Signature({}, {}, {}))
    width = next((shape[-1] for shape, _ in decoder.outputs.values()), None)
    problems = []
    if language.get("vocab_size") != width:
        problems.append(f"`vocab_size` is {language.get('vocab_size')!r} and the asset has {width} logits")
    said = language.get("states")
    kinds = said if isinstance(said, Mapping) else {}
    if [*kinds] != [*decoder.states]:
        problems.append(f"`states` names {listing([*kinds])} and the asset has {listing([*decoder.states])}")
    for name, (shape, _dtype) in decoder.states.items():
        if kinds.get(name) == "kv_cache" and not {-1, context} & {*shape}:
            problems.append(f"`states` calls {name} kv_cache, and no axis of {list(shape)} is of all positions")
        if kinds.get(name) == "fixed" and -1 in shape:
            problems.append(f"`states` calls {name} fixed, and it grows: {list(shape)}")
    return Check("states", not problems, listing(problems) or f"{len(kinds)} states and {width} logits as declared")


def _engine(bundle: Bundle, functions: Mapping[str, Signature]) -> Check:
    """The check of the asset's own functions, and of the metadata beside it, against the rules of the engine."""
    try:
        engine = bundle.engine
    except CheckFailed as error:
        return Check("engine", False, str(error))
    if engine is None:
        return Check("engine", True, "no rules: the contract is for none of the engines that this zoo knows")
    broken = engine.breaches(Interface(functions, _language(bundle), bundle.signature.positions))
    problems = [sentence(rule, breach) for rule, breach in broken]
    return Check(
        "engine", not problems, listing(problems, separator="; ") or f"{len(engine.rules)} rules of {engine.name} hold"
    )


# What a cache may hold where no token has been: engines grow it into memory that nobody cleared. A cache of full length
# was cleared once, and keeps what an earlier conversation left.
_GROWN, _LEFT_OVER = float("nan"), 1.0


def _smoke_step(bundle: Bundle, backend: Backend) -> Check:
    import numpy as np

    others = {name: spec.query_length or 2 for name, spec in bundle.functions.items() if name != bundle.decode}
    grows = any(isinstance(size, str) for state in bundle.signature.states for size in state.shape)
    unwritten = _GROWN if grows else _LEFT_OVER
    capacity = max([4, *(length + 1 for length in others.values())])
    try:
        with backend.stepper(bundle.asset, bundle.functions, capacity=capacity) as stepper:
            logits = _smoke_logits(stepper, others)
            stepper.reset()
            alone = stepper.step(1)
            again = _smoke_logits(stepper, others, unwritten)
    except (CheckFailed, RuntimeError) as error:
        return Check("step", False, str(error))
    called = "".join(f", {name} with {length}" for name, length in others.items())
    if not all(bool(np.isfinite(each).all()) for each in logits):
        return Check("step", False, f"two tokens{called}, logits not finite")
    if np.array_equal(logits[0], logits[1]):
        return Check("step", False, f"two tokens{called}, the same logits after both")
    if np.array_equal(logits[1], alone):
        return Check("step", False, f"two tokens{called}, and the second has the logits that it has alone")
    if not all(np.array_equal(one, other) for one, other in zip(logits, again, strict=True)):
        return Check(
            "step",
            False,
            f"after a reset the logits are others where the key / value cache holds {unwritten} beyond the positions "
            "so far, but no engine clears it there: the function reads what it should mask",
        )
    detail = f"two tokens{called}, logits finite, and the same after a reset with {unwritten} in the rest of the cache"
    return Check("step", True, detail)


def _smoke_logits(stepper: Stepper, others: Mapping[str, int], unwritten: float = 0.0) -> list[Any]:
    """The logits of two steps from position 0; then, of each other function, its own and those of a step behind it.

    Args:
        stepper: a loaded asset.
        others: tokens for a call of each function that does not decode.
        unwritten: see `Stepper.reset`.
    """
    stepper.reset(unwritten)
    logits: list[Any] = [stepper.step(0), stepper.step(1)]
    for name, length in others.items():
        stepper.reset(unwritten)
        logits += [stepper.call(name, [0] * length), stepper.step(1)]
    return [each for each in logits if each is not None]
