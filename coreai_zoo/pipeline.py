"""A build, from a name to a bundle: resolve, weights, lower, bundle, verify."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata as distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from coreai_zoo import bundle as bundles
from coreai_zoo import card
from coreai_zoo.backends import Backend
from coreai_zoo.checkpoint import Checkpoint, read_config
from coreai_zoo.contracts import MINIMUM_CONTEXT, Contract, find_contract
from coreai_zoo.entry import Entry, find_entry
from coreai_zoo.errors import BadInput, EnvironmentLacks, listing
from coreai_zoo.overlay import HeadQuantization, LayerRewrite, Overlay, TraceSpec
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.quantize import QUANTIZER_VERSION, Recipe, find_recipe
from coreai_zoo.store import WeightStore
from coreai_zoo.verify import Check, require, verify
from coreai_zoo.weights import PlannedTensor, WeightPlan, plan_weights

if TYPE_CHECKING:
    from torch import nn

DEFAULT_OUTPUT = Path("exports")


@frozen
class BuildRequest:
    """What the user asked for; see `zoo build --help`."""

    entry: str
    checkpoint: Path | None = None
    sample: bool = False
    recipe: str | None = None
    contract: str | None = None
    backend: str = "coreai"
    output: Path = DEFAULT_OUTPUT
    max_context: int | None = None
    layers: int | None = None
    work_dir: Path | None = None
    keep_weights: bool = False
    force: bool = False


@frozen
class Resolved:
    """Everything that is decided before a weight is read.

    Attributes:
        name: of the bundle.
        differences: facts of the entry that this checkpoint does not have (another size of the same architecture).
        revision: commit of the checkpoint on the hub, where that is known.
        parameters: of the decoder, by role.
    """

    name: str
    entry: Entry
    sample: bool
    checkpoint: Checkpoint
    revision: str | None
    hf_config: Mapping[str, Any]
    overlay: Overlay
    overlay_plugin: str
    config: Any
    facts: Mapping[str, Any]
    differences: tuple[str, ...]
    contract: Contract
    backend: Backend
    recipe: Recipe
    head: HeadQuantization | None
    rewrites: tuple[tuple[str, LayerRewrite], ...]
    signature: TraceSpec
    module: nn.Module = field(eq=False)
    weights: WeightPlan
    max_context: int


@frozen
class BuildResult:
    """A finished bundle.

    Attributes:
        path: the bundle's directory.
        bytes: size of all its files.
        computed: weights that were quantized or converted in this run.
        reused: weights that an earlier run had left in the work directory.
        seconds: time of each stage.
        checks: what verification found.
    """

    path: Path
    name: str
    bytes: int
    computed: int
    reused: int
    seconds: Mapping[str, float]
    checks: tuple[Check, ...]


def build(request: BuildRequest, plugins: Plugins, report: Reporter | None = None) -> BuildResult:
    """Build a bundle.

    The output path is untouched until the bundle is complete and verified.

    Raises:
        ZooError: for anything that the user can mend; see errors.
    """
    report = report or Reporter(silent=True)
    with report.stage("resolve", request.entry):
        resolved = resolve(request, plugins)
        destination = request.output / resolved.name
        _check_output(destination, request.force)
        for difference in resolved.differences:
            report.note(f"differs from the entry: {difference}")
    with _partial_directory(destination) as partial, _work_directory(request, resolved.name) as work:
        store = WeightStore(work)
        with report.stage("weights", f"{len(resolved.weights.tensors)} tensors as {resolved.recipe.name}"):
            filled = _fill(store, resolved, report)
            report.note(f"{filled.computed} computed, {filled.reused} reused")
        with report.stage("lower", f"{resolved.backend.name}, contract {resolved.contract.name}"):
            _lower(resolved, store, partial)
        with report.stage("bundle", resolved.name):
            _write_records(resolved, store, partial)
        with report.stage("verify"):
            checks = verify(bundles.Bundle.open(partial), {resolved.backend.name: resolved.backend})
            require(checks)
        _move_into_place(partial, destination)
    total = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    return BuildResult(
        destination, resolved.name, total, filled.computed, filled.reused, dict(report.seconds), tuple(checks)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Resolve
# ---------------------------------------------------------------------------------------------------------------------


def resolve(request: BuildRequest, plugins: Plugins) -> Resolved:
    """Decide everything, on metadata only.

    Raises:
        ZooError: for every input that cannot be built from.
    """
    entry, _ = find_entry(request.entry, plugins)
    contract = find_contract(request.contract or entry.contract)
    recipe = find_recipe(request.recipe or entry.recipe)
    backend = _find_backend(request.backend, plugins)
    _check_output_folder(request.output)
    directory, revision = locate_checkpoint(entry, request.checkpoint, sample=request.sample)

    hf_config: Mapping[str, Any] = read_config(directory)
    model_type = str(hf_config.get("model_type"))
    overlay, overlay_plugin = plugins.claim_overlay(model_type, hf_config)
    if model_type not in entry.model_type:
        raise BadInput(
            f"{directory} is a {model_type} checkpoint, but entry {entry.name} is for {' or '.join(entry.model_type)} "
            f"({entry.facts.ffn} feed-forward).",
            "Choose the entry that fits the checkpoint: `zoo list` shows the feed-forward kind of each.",
        )
    with plugins.blame(overlay_plugin, f"overlay {overlay.name!r}"):
        if request.layers is not None:
            hf_config = overlay.with_layers(hf_config, request.layers)
        config = overlay.read_config(hf_config)
        facts = overlay.facts(config)
        kv_cache = overlay.kv_cache(config)
    # A sample and a slice are other sizes on purpose.
    differences = () if request.sample or request.layers else compare_facts(entry, facts)
    max_context = _max_context(request, entry, facts)
    bundles.check_tokenizer(directory, facts["vocab_size"])
    checkpoint = Checkpoint.open(directory)

    head = plugins.head_quantization(overlay, entry, config)
    recipe = recipe.with_head(head)
    rewrites = tuple(plugins.layer_rewrites(overlay, config, contract))
    signature = contract.trace_spec(
        kv_cache,
        plugins.extra_states(overlay, config, contract),
        facts["vocab_size"],
        max_context,
    )

    from coreai_zoo import export

    def decoder() -> nn.Module:
        with plugins.blame(overlay_plugin, f"overlay {overlay.name!r}"):
            return overlay.decoder(config, contract)

    module = export.build_module(decoder, rewrites)
    weights = plan_weights(
        plugins.weight_map(overlay, config), export.parameters_of(module), checkpoint.tensors, recipe
    )
    return Resolved(
        name=_bundle_name(request, entry, recipe, contract, differences),
        entry=entry,
        sample=request.sample,
        checkpoint=checkpoint,
        revision=revision,
        hf_config=hf_config,
        overlay=overlay,
        overlay_plugin=overlay_plugin,
        config=config,
        facts=facts,
        differences=differences,
        contract=contract,
        backend=backend,
        recipe=recipe,
        head=head if recipe.roles["head"] is not None else None,
        rewrites=rewrites,
        signature=signature,
        module=module,
        weights=weights,
        max_context=max_context,
    )


def locate_checkpoint(entry: Entry, directory: Path | None, *, sample: bool) -> tuple[Path, str | None]:
    """Where the checkpoint is, and its commit on the hub where that is known.

    Raises:
        BadInput: for both a directory and the sample.
        EnvironmentLacks: when it would have to be fetched and cannot be.
    """
    if directory is not None and sample:
        raise BadInput("--checkpoint and --sample exclude each other.")
    if directory is not None:
        return directory, None
    if sample:
        return entry.sample_directory(), None
    return _fetch(entry)


def _fetch(entry: Entry) -> tuple[Path, str]:
    """Download the entry's revision, or the newest if the entry pins none; (directory, commit)."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        directory = huggingface_hub.snapshot_download(
            entry.hf_id,
            revision=entry.hf_revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise EnvironmentLacks(
            f"The checkpoint {entry.hf_id} is not on this machine and cannot be fetched: {reason}",
            "Pass --checkpoint DIR with a local copy, or --sample to build the miniature that ships with the entry.",
        ) from error
    return Path(directory), Path(directory).name


def compare_facts(entry: Entry, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What the entry states and the checkpoint is not, one phrase each."""
    return tuple(
        f"{name} is {facts[name]}, the entry says {stated}"
        for name, stated in entry.facts.stated.items()
        if name in facts and facts[name] != stated
    )


def _find_backend(name: str, plugins: Plugins) -> Backend:
    backends = plugins.backends()
    if name not in backends:
        raise BadInput(f"There is no backend {name!r}.", f"There is {listing(sorted(backends))}.")
    return backends[name]


def _max_context(request: BuildRequest, entry: Entry, facts: Mapping[str, Any]) -> int:
    limit = int(facts["max_context_length"])
    if request.max_context is not None and not MINIMUM_CONTEXT <= request.max_context <= limit:
        raise BadInput(
            f"--max-context {request.max_context} is not between {MINIMUM_CONTEXT} and {limit}, the model's own limit."
        )
    chosen = request.max_context or min(entry.bundle.max_context, limit)
    if chosen < MINIMUM_CONTEXT:
        raise BadInput(
            f"The bundle would allow {chosen} positions (the model {limit}, the entry {entry.bundle.max_context}); "
            f"{MINIMUM_CONTEXT} is the least."
        )
    return chosen


def _bundle_name(
    request: BuildRequest, entry: Entry, recipe: Recipe, contract: Contract, differences: tuple[str, ...]
) -> str:
    parts = [entry.slug]
    if request.sample:
        parts.append("sample")
    if differences:
        parts.append("custom")
    if request.layers is not None:
        parts.append(f"{request.layers}layers")
    parts.append("decode" if contract.query_length == 1 else "dynamic")
    return "_".join([*parts, recipe.published_name])


# ---------------------------------------------------------------------------------------------------------------------
# Weights and lowering
# ---------------------------------------------------------------------------------------------------------------------


def _fill(store: WeightStore, resolved: Resolved, report: Reporter) -> Any:
    with report.bytes(resolved.weights.stored_bytes) as counter:

        def progress(tensor: PlannedTensor, elements: int) -> None:
            counter.advance(tensor.name, elements * tensor.stored_bytes // tensor.parameters)

        return store.fill(resolved.weights, resolved.checkpoint, progress)


def _lower(resolved: Resolved, store: WeightStore, partial: Path) -> None:
    from coreai_zoo import export

    constants = export.bind(resolved.module, store, values=False)
    asset = partial / f"{resolved.name}{resolved.backend.asset_suffix}"
    resolved.backend.compile(resolved.module, resolved.signature, constants, asset)


# ---------------------------------------------------------------------------------------------------------------------
# Bundle
# ---------------------------------------------------------------------------------------------------------------------


def _write_records(resolved: Resolved, store: WeightStore, partial: Path) -> None:
    bundles.copy_tokenizer(resolved.checkpoint.directory, partial / "tokenizer")
    record = build_record(resolved, store)
    bundles.write_json(
        partial / "metadata.json",
        bundles.metadata(
            bundles.Description(
                name=resolved.name,
                asset=f"{resolved.name}{resolved.backend.asset_suffix}",
                vocab_size=resolved.facts["vocab_size"],
                max_context_length=resolved.max_context,
                hf_id=resolved.entry.hf_id,
                hf_revision=resolved.revision,
                compression=resolved.recipe.published_name,
                states={state.name: state.kind for state in resolved.signature.states},
                user_data={"sample": "true"} if resolved.sample else {},
            )
        ),
    )
    sizes = {path: digest["bytes"] for path, digest in bundles.file_digests(partial).items()}
    (partial / "README.md").write_text(card.render(record, sizes), encoding="utf-8")
    bundles.write_json(partial / "build.json", {**record, "files": bundles.file_digests(partial)})


def build_record(resolved: Resolved, store: WeightStore) -> dict[str, Any]:
    """Everything that determines the bytes of a bundle; `build.json` without the files' hashes."""
    roles: dict[str, Counter[str]] = {}
    for tensor in resolved.weights.tensors:
        counts = roles.setdefault(tensor.role, Counter())
        counts.update(tensors=1, parameters=tensor.parameters, bytes=tensor.stored_bytes)
    return {
        "schema": bundles.BUILD_SCHEMA,
        "name": resolved.name,
        "zoo": distributions.version("coreai-zoo"),
        "versions": {**resolved.backend.versions, "torch": distributions.version("torch").split("+")[0]},
        "quantizer": QUANTIZER_VERSION,
        "entry": {
            "name": resolved.entry.name,
            "title": resolved.entry.title,
            "hf_id": resolved.entry.hf_id,
            "status": resolved.entry.status,
            "differences": list(resolved.differences),
        },
        "sample": resolved.sample,
        "source": {
            "hf_revision": resolved.revision,
            **resolved.checkpoint.identity(),
            "values_sha256": _values_digest(resolved, store),
        },
        "dropped": dict(Counter(reason for _, reason in resolved.weights.dropped)),
        "overlay": {
            "name": resolved.overlay.name,
            "plugin": resolved.overlay_plugin,
            "rewrites": [
                {"name": rewrite.name, "plugin": plugin, "pattern": rewrite.pattern, "reason": rewrite.reason}
                for plugin, rewrite in resolved.rewrites
            ],
        },
        "facts": dict(resolved.facts),
        "layers": resolved.facts["layers"],
        "contract": {"name": resolved.contract.name, "prerequisites": list(resolved.contract.prerequisites)},
        "backend": resolved.backend.name,
        "recipe": {
            "name": resolved.recipe.name,
            "published_name": resolved.recipe.published_name,
            "roles": {
                role: None if spec is None else {"dtype": spec.dtype, "scheme": spec.scheme, "block": spec.block_size}
                for role, spec in resolved.recipe.roles.items()
                if role in roles
            },
            "head_reason": resolved.head.reason if resolved.head else None,
        },
        "weights": {role: dict(counts) for role, counts in sorted(roles.items())},
        "max_context": resolved.max_context,
        "function": bundles.signature_record(resolved.signature),
    }


def _values_digest(resolved: Resolved, store: WeightStore) -> str:
    """SHA-256 over the digests of all source values: what tells two fine-tunes of one model apart."""
    digests = [f"{tensor.name} {store[tensor.name].source_digest}\n" for tensor in resolved.weights.tensors]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Directories: nothing half-written is ever at the output path
# ---------------------------------------------------------------------------------------------------------------------


def _check_output_folder(output: Path) -> None:
    """Refuse an output folder that cannot be written to, before anything is read."""
    path = output.absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists() or parent.is_symlink())
    if not existing.is_dir():
        raise BadInput(
            f"The output folder {output} cannot be made: {existing} is no folder.", "Choose another with -o DIR."
        )
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".zoo-"):
            pass
    except OSError as error:
        raise BadInput(
            f"The output folder {output} cannot be written to: {error.strerror}.", "Choose another with -o DIR."
        ) from error


def _check_output(destination: Path, force: bool) -> None:
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise BadInput(
            f"{destination} exists and is no folder, so it is never replaced.",
            "Move it away, or choose another folder with -o DIR.",
        )
    if destination.exists() and not force:
        raise BadInput(f"{destination} exists.", "Pass --force to replace it, or another folder with -o DIR.")


@contextlib.contextmanager
def _work_directory(request: BuildRequest, name: str) -> Iterator[Path]:
    """The weight store's directory: kept when a build is interrupted, so that the next one resumes; else removed."""
    given = request.work_dir is not None
    work = (request.work_dir or request.output / ".zoo-work") / name
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_parents_of(work))
            work.mkdir(exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"The work directory {work} cannot be made: {error.strerror}.", "Choose another with --work-dir DIR."
            ) from error
        try:
            yield work
        except Exception:
            if not given and not request.keep_weights:
                _remove_work(work)
            raise
        if not request.keep_weights:
            _remove_work(work)


def _remove_work(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    if work.parent.name == ".zoo-work":  # ours, also when an interrupted build made it
        with contextlib.suppress(OSError):  # not empty: another build's store is beside it
            work.parent.rmdir()


@contextlib.contextmanager
def _parents_of(path: Path) -> Iterator[None]:
    """Make the folders above `path`; afterwards remove those that were made and are empty."""
    created = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in created:
            with contextlib.suppress(OSError):  # not empty: the build succeeded, or somebody else uses it
                parent.rmdir()


@contextlib.contextmanager
def _partial_directory(destination: Path) -> Iterator[Path]:
    """A directory beside `destination` to build in; gone afterwards unless it was moved into place."""
    with _parents_of(destination):
        partial = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
        partial.chmod(0o755)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _move_into_place(partial: Path, destination: Path) -> None:
    """Rename the finished bundle to `destination`, an existing one aside first."""
    aside = partial.with_name(partial.name + ".old")
    if destination.exists():
        os.rename(destination, aside)
    try:
        os.rename(partial, destination)
    except OSError:
        if aside.exists():
            os.rename(aside, destination)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    _sync(destination.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def request_json(request: BuildRequest, result: BuildResult) -> str:
    """A result for programs."""
    return json.dumps(
        {
            "entry": request.entry,
            "name": result.name,
            "path": str(result.path),
            "bytes": result.bytes,
            "weights": {"computed": result.computed, "reused": result.reused},
            "seconds": {stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
            "checks": [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in result.checks],
        },
        indent=2,
    )
