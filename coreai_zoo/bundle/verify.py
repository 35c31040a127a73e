"""Whether a bundle holds what it says: files, records, signature, and a real step where the model is small."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from coreai_zoo.backend import Backend, Check, Signature
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.layout import bytes_below, file_digests
from coreai_zoo.bundle.metadata import CHUNKS, METADATA_VERSION
from coreai_zoo.bundle.verify_tokenizer import tokenizer_problems
from coreai_zoo.checkpoint.tokenizer import highest_token_id, tokenizer_class
from coreai_zoo.errors import BadInput, CheckFailed, ZooError, listing
from coreai_zoo.json_files import read_object
from coreai_zoo.signature import TensorSpec, TraceSpec

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
    checks = [files, _metadata(bundle), _tokenizer(bundle, set(tokenizer_classes.values()))]
    if checks[0].passed:
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
    """The check of the fields that Apple's loader requires: they are there and agree with the signature."""
    data = bundle.metadata
    language = data.get("language")
    language = language if isinstance(language, Mapping) else {}
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
    if not isinstance(language.get("tokenizer"), str):
        problems.append("language.tokenizer is not text")
    user_data = data.get("user_data", {})
    if not isinstance(user_data, Mapping) or any(not isinstance(value, str) for value in user_data.values()):
        problems.append("user_data holds something other than text")
    if not bundle.asset.is_dir():
        problems.append(f"there is no asset {bundle.asset.name}")
    return Check(
        "metadata", not problems, listing(problems) or f"version {METADATA_VERSION}, agrees with the signature"
    )


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
        problems = _compare_signatures(backend.signatures(bundle.asset), bundle.functions)
    except ZooError as error:
        return [*checks, Check("signature", False, str(error))]
    summary = "; ".join(
        _shown(spec) if len(bundle.functions) == 1 else f"{name}: {_shown(spec)}"
        for name, spec in bundle.functions.items()
    )
    checks.append(Check("signature", not problems, listing(problems) or summary))
    size = bytes_below(bundle.asset)
    if not problems and size <= SMOKE_STEP_BYTES:
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

    def shape(tensor: TensorSpec) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in tensor.shape)

    problems = []
    groups = (
        ("input", found.inputs, spec.inputs),
        ("state", found.states, spec.states),
        ("output", found.outputs, spec.outputs),
    )
    for kind, saved, wanted in groups:
        if list(saved) != [tensor.name for tensor in wanted]:
            problems.append(f"{kind}s are {list(saved)}, not {[tensor.name for tensor in wanted]}")
            continue
        problems += [
            f"{kind} {tensor.name} is {saved[tensor.name]}, not {(shape(tensor), tensor.dtype)}"
            for tensor in wanted
            if saved[tensor.name] != (shape(tensor), tensor.dtype)
        ]
    return problems


def _smoke_step(bundle: Bundle, backend: Backend) -> Check:
    import numpy as np

    others = {name: spec.query_length or 2 for name, spec in bundle.functions.items() if name != bundle.decode}
    try:
        with backend.stepper(bundle.asset, bundle.functions, capacity=max([4, *others.values()])) as stepper:
            logits = [stepper.step(0), stepper.step(1)]
            for name, length in others.items():
                stepper.reset()
                given = stepper.call(name, [0] * length)
                logits += [] if given is None else [given]
    except (CheckFailed, RuntimeError) as error:
        return Check("step", False, str(error))
    finite = all(bool(np.isfinite(each).all()) for each in logits)
    called = "".join(f", {name} with {length}" for name, length in others.items())
    return Check(
        "step",
        finite and not np.array_equal(logits[0], logits[1]),
        f"two tokens{called}, logits {'' if finite else 'not '}finite",
    )
