"""Whether a bundle holds what it says, and what its engine asks: files, records, signature, the engine's rules, and
real steps where the model is small.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from coreai_zoo.backend import Backend, Check, Stepper
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.layout import bytes_below, file_digests
from coreai_zoo.bundle.metadata import CHUNKS, METADATA_VERSION, unreadable
from coreai_zoo.bundle.verify_tokenizer import tokenizer_problems
from coreai_zoo.checkpoint.tokenizer import highest_token_id, tokenizer_class
from coreai_zoo.engine import Interface, sentence
from coreai_zoo.errors import BadInput, CheckFailed, ZooError, listing
from coreai_zoo.json_files import read_object
from coreai_zoo.signature import Signature, TraceSpec

# Weights up to this size are run for one step; beyond it the CPU interpreter needs minutes for a token.
SMOKE_STEP_BYTES = 64 * 2**20


def verify(
    bundle: Bundle,
    backends: Mapping[str, Backend],
    tokenizer_classes: Mapping[str, str],
    *,
    recorded_only: bool = False,
) -> list[Check]:
    """The checks of a bundle: files, metadata, tokenizer, then the asset, which is only opened if the files are right.

    Args:
        bundle: the bundle.
        backends: the installed backends, by name.
        tokenizer_classes: see `Plugins.tokenizer_classes`.
        recorded_only: leave files out of account that the record does not name.

    Raises:
        BadInput: when the bundle was written by a backend that is not installed.
    """
    backend = backend_of(bundle, backends)
    files = check_files(bundle, recorded_only=recorded_only)
    checks = [
        files,
        _metadata(bundle),
        _tokenizer(bundle, set(tokenizer_classes.values())),
    ]
    if files.passed:
        checks += _asset(bundle, backend)
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


def _metadata(bundle: Bundle) -> Check:
    """The check of metadata.json: Apple's loader can read it, and it agrees with the record."""
    data, language = bundle.metadata, _language(bundle)
    spec = bundle.signature
    expected = {
        "metadata_version": (data.get("metadata_version"), METADATA_VERSION),
        "kind": (data.get("kind"), "llm"),
        "name": (data.get("name"), bundle.build.get("name")),
        # The sampler is sized by it: it must be the width of the logits.
        "language.vocab_size": (language.get("vocab_size"), spec.outputs[0].shape[-1]),
        "language.max_context_length": (language.get("max_context_length"), bundle.build.get("max_context")),
        "language.function_map": (language.get("function_map"), {"main": [bundle.decode]}),
        "language.states": (language.get("states"), {state.name: state.kind for state in spec.states}),
        **{f"language.{key}": (language.get(key), spec.query_length) for key in CHUNKS},
    }
    problems = [f"{key} is {found!r}, not {wanted!r}" for key, (found, wanted) in expected.items() if found != wanted]
    problems += [f"Apple's loader cannot read it: {problem}" for problem in unreadable(data)]
    if not bundle.asset.is_dir():
        problems.append(f"there is no asset {bundle.asset.name}")
    return Check(
        "metadata", not problems, listing(problems) or f"version {METADATA_VERSION}, agrees with the signature"
    )


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


def _asset(bundle: Bundle, backend: Backend) -> list[Check]:
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
    compared = [Check("signature", not problems, listing(problems) or summary), _engine(bundle, found)]
    checks += compared
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
            again = _smoke_logits(stepper, others, unwritten)
    except (CheckFailed, RuntimeError) as error:
        return Check("step", False, str(error))
    called = "".join(f", {name} with {length}" for name, length in others.items())
    if not all(bool(np.isfinite(each).all()) for each in logits):
        return Check("step", False, f"two tokens{called}, logits not finite")
    if np.array_equal(logits[0], logits[1]):
        return Check("step", False, f"two tokens{called}, the same logits after both")
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
