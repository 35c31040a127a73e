"""What `zoo gate` decides: prompts, oracle, candidate and control, put together for a bundle."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, frozen

from coreai_zoo.bounds import Kind, MeasuredBounds
from coreai_zoo.build.design import Design, design
from coreai_zoo.build.model import Model, read_model
from coreai_zoo.build.rebuild import recorded_request
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.layout import GATE_FOLDER
from coreai_zoo.bundle.verify import backend_of
from coreai_zoo.catalogue import find_entry, load_entries
from coreai_zoo.checkpoint.files import read_config
from coreai_zoo.errors import BadInput, CheckFailed, listing
from coreai_zoo.overlay import LayeredDecoder
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter

if TYPE_CHECKING:
    from coreai_zoo.gates.oracle import Oracle

# ---------------------------------------------------------------------------------------------------------------------
# What a bundle's record leads to
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_of(bundle: Bundle, plugins: Plugins, given: Path | None) -> Path:
    """The checkpoint that `bundle` was built from: as given, or the sample's."""
    if given is not None:
        return given
    if not bundle.build.get("sample"):
        raise BadInput(f"{bundle.directory.name} is not a sample.", "Pass its checkpoint with --checkpoint DIR.")
    entry, _ = find_entry(str(bundle.build["entry"].get("name")), plugins)
    return entry.sample_directory()


def _model_of(bundle: Bundle, plugins: Plugins, checkpoint: Path) -> Model:
    """What the overlay makes of the checkpoint's config, cut to the layers that were built."""
    model = read_model(read_config(checkpoint), plugins)
    layers = bundle.build["layers"]
    return model if layers == model.facts["layers"] else read_model(model.hf_config, plugins, layers)


def oracle_of(
    bundle: Bundle,
    plugins: Plugins,
    checkpoint: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    cache: Path | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> Oracle:
    """The oracle on the checkpoint of `bundle`, or on the slice of it that was built; see `Oracle` for the rest."""
    from coreai_zoo.checkpoint.files import Checkpoint
    from coreai_zoo.gates.oracle import Oracle

    model = _model_of(bundle, plugins, checkpoint)
    reference = plugins.oracle(model.overlay, model.hf_config)
    return Oracle(Checkpoint.open(checkpoint), model.hf_config, dtype, cache, on_layer, reference)


def run_plugin_gates(bundle: Bundle, plugins: Plugins, checkpoint: Path) -> list[Any]:
    """Results of the gates that plugins add."""
    overlay = _model_of(bundle, plugins, checkpoint).overlay
    entry, _ = load_entries(plugins).get(str(bundle.build["entry"].get("name")), (None, None))
    results = []
    for plugin, extra in plugins.gates(overlay, entry):
        with plugins.attribute_errors(plugin, f"gate {extra.name!r}"):
            results.append(extra.run(bundle, checkpoint))
    return results


# Up to this size the CPU interpreter takes some tokens a second; beyond it a token takes minutes.
_INTERPRETED_BYTES = 64 * 2**20

_PLAIN = "fp16"  # the recipe that quantizes nothing

_SHOWN_REASONS = 5  # of a bundle that fails badly


@frozen
class GateOptions:
    """What was asked for; see the options of `zoo gate`.

    Attributes:
        candidate: `auto`, `torch`, or the runtime of an installed backend.
    """

    checkpoint: Path | None = None
    prompt: str | None = None
    prompts: str | None = None
    prompt_file: Sequence[Path] = ()
    positions: int | None = None
    allow_weak_prompt: bool = False
    candidate: str = "auto"
    control: bool = True
    oracle_dtype: Literal["float32", "bfloat16"] = "float32"
    oracle_cache: Path | None = None
    cached_only: bool = False

    def __attrs_post_init__(self) -> None:
        given = [self.prompt is not None, self.prompts is not None, bool(self.prompt_file)]
        if sum(given) > 1:
            raise BadInput("Give one of --prompt, --prompts and --prompt-file.")
        if self.cached_only and self.oracle_cache is None:
            raise BadInput("--cached-only needs a cache.", "Pass it with --oracle-cache DIR.")

    @property
    def arguments(self) -> list[str]:
        """The same options again, with names in the place of folders."""
        values = {"--prompt": self.prompt, "--prompts": self.prompts, "--positions": self.positions}
        values |= {"--candidate": self.candidate, "--oracle-dtype": self.oracle_dtype}
        defaults = {"--candidate": "auto", "--oracle-dtype": "float32"}
        words = [word for name, value in values.items() if value != defaults.get(name) for word in (name, str(value))]
        words += [word for path in self.prompt_file for word in ("--prompt-file", path.name)]
        words += ["--checkpoint", "CHECKPOINT"] * (self.checkpoint is not None)
        words += ["--allow-weak-prompt"] * self.allow_weak_prompt
        return words + ["--no-control"] * (not self.control)


def run_gate(
    bundles: Sequence[Bundle], options: GateOptions, plugins: Plugins, report: Reporter, keep_in: Path | None = None
) -> list[dict[str, Any]]:
    """Judge bundles of one checkpoint on the same oracle; a transcript for each. No transcript is written.

    Args:
        bundles: the first is the one whose prompts and oracle they are.
        options: what was asked for.
        plugins: for overlays, backends and gates.
        report: for progress.
        keep_in: where the logits of a bundle that brings a script to compare them with go; None to keep none.

    Raises:
        BadInput: for anything that was given and does not fit.
        CheckFailed: when a bundle is not as it was built, or cannot be run.
        EnvironmentLacks: when the machine cannot run the oracle or the bundle.
    """
    from coreai_zoo.gates import teacher_forced

    _check_candidate(options.candidate, plugins)
    checkpoint = checkpoint_of(bundles[0], plugins, options.checkpoint)
    subjects = []
    for bundle in bundles:
        teacher_forced.check_checkpoint(bundle, checkpoint)  # before its config is cut to the bundle's layers
        _require_unchanged(bundle)
        _require_same_tokenizer(bundles[0], bundle)
        subjects.append(_subject(bundle, options, plugins, checkpoint, keep_in if bundle is bundles[0] else None))
    prompts = _prompts(bundles[0], options)
    oracle = _oracle(bundles[0], options, plugins, checkpoint)
    if options.cached_only:
        _require_cached(oracle.model, prompts)
    references = teacher_forced.run_oracle(oracle, prompts, report)
    controls: dict[str, Any] = {}
    return [_judge(subject, references, options, oracle.model.name, controls, report) for subject in subjects]


def write_report(bundle: Bundle, records: Sequence[Mapping[str, Any]], output: Path | None = None) -> Path:
    """Write transcript and report of `bundle`, the first of `records`, beside which the second is shown.

    Args:
        bundle: what was judged.
        records: transcripts, one or two.
        output: where to; None for the bundle's own folder, and then the card gets the numbers too.

    Returns:
        Path of the report.
    """
    from coreai_zoo.gates import report, transcript

    folder = report_folder(bundle, output)
    transcript.write(folder, records[0], report.render(*records))
    if output is None:
        transcript.write_card(bundle, report.markdown(records[0]))
    return folder / transcript.REPORT


def failure(name: str, reasons: list[str]) -> CheckFailed:
    """The error with which the gate of the bundle `name` fails; it tells the first reasons, the report all."""
    return CheckFailed(f"{name} fails the gate: {listing(reasons, _SHOWN_REASONS, '; ')}.")


def report_folder(bundle: Bundle, output: Path | None) -> Path:
    """Where the report on a bundle goes: to `output`, or into the bundle's own folder."""
    return bundle.directory / GATE_FOLDER if output is None else output


@frozen
class _Subject:
    """A bundle, what runs it, what it is held to, and what its record says of it."""

    bundle: Bundle
    models: Any
    measured: MeasuredBounds
    roles: Mapping[str, Any]
    experts_per_token: int | None
    plugin_gates: Callable[[], list[Any]]


def _subject(
    bundle: Bundle, options: GateOptions, plugins: Plugins, checkpoint: Path, keep_in: Path | None
) -> _Subject:
    try:
        roles, facts = dict(bundle.build["recipe"]["roles"]), bundle.build["facts"]
        experts = facts.get("experts_per_token")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"build.json of {bundle.directory} does not say how it was built: {error!r}."
        raise BadInput(message, "Build the bundle again.") from error
    models = _models(bundle, options, plugins, checkpoint, keep_in)
    measured = plugins.gate_bounds(_model_of(bundle, plugins, checkpoint).overlay)
    return _Subject(bundle, models, measured, roles, experts, lambda: run_plugin_gates(bundle, plugins, checkpoint))


def _judge(
    subject: _Subject,
    references: Any,
    options: GateOptions,
    oracle: str,
    controls: dict[str, Any],
    report: Reporter,
) -> dict[str, Any]:
    from coreai_zoo.gates import teacher_forced, transcript

    bundle, models, roles, layers = subject.bundle, subject.models, subject.roles, subject.bundle.build["layers"]
    kind: Kind = "dense" if subject.experts_per_token is None else "routed"
    report.seconds = {stage: took for stage, took in report.seconds.items() if stage == "oracle"}
    judged = teacher_forced.gate(
        references,
        models,
        lambda arithmetic: subject.measured.of_recipe(roles, layers, arithmetic, kind),
        report,
        control_bounds=subject.measured.of_recipe({}, layers, "torch", kind),
        experts_per_token=subject.experts_per_token,
        quantized=any(roles.values()),
        allow_weak=options.allow_weak_prompt,
        controls=controls,
    )
    run = transcript.Run(
        bundle,
        oracle,
        None if models.control is None else models.control.model.name,
        [bundle.directory.name, *options.arguments],
        report.seconds,
        subject.plugin_gates(),
    )
    return transcript.transcript(run, judged)


# ---------------------------------------------------------------------------------------------------------------------
# What is fed, and to what
# ---------------------------------------------------------------------------------------------------------------------


def _require_unchanged(bundle: Bundle) -> None:
    """Refuse a bundle that was edited: its report would be about something that nobody built."""
    from coreai_zoo.bundle.verify import check_files, require, require_asset
    from coreai_zoo.checkpoint.tokenizer import load_tokenizer

    load_tokenizer(bundle.tokenizer)  # says best what is wrong with it
    require_asset(bundle)
    require([check_files(bundle)])


def _require_same_tokenizer(one: Bundle, other: Bundle) -> None:
    path = "tokenizer/tokenizer.json"
    if one.build["files"].get(path) != other.build["files"].get(path):
        raise BadInput(
            f"{one.directory.name} and {other.directory.name} have different tokenizers: no prompt is the same in both."
        )


def _prompts(bundle: Bundle, options: GateOptions) -> list[Any]:
    from coreai_zoo.gates import prompts

    if options.prompt is not None:
        asked = [prompts.Prompt(prompts.UNNAMED, options.prompt)]
    elif options.prompt_file:
        asked = [prompts.file_prompt(path) for path in options.prompt_file]
    elif options.prompts is not None:
        asked = prompts.named_prompts([name.strip() for name in options.prompts.split(",")])
    else:
        return [prompts.tokenize(bundle, one) for one in prompts.default_prompts(bundle, options.positions)]
    if options.positions is not None:
        asked = [prompts.cut(prompt, options.positions) for prompt in asked]
    return [prompts.tokenize(bundle, prompt) for prompt in asked]


def _oracle(bundle: Bundle, options: GateOptions, plugins: Plugins, checkpoint: Path) -> Any:
    from coreai_zoo.gates.teacher_forced import Runner, Ticker

    ticker = Ticker()
    oracle = oracle_of(bundle, plugins, checkpoint, options.oracle_dtype, options.oracle_cache, ticker)
    return Runner(oracle, ticker, lambda _prompt: int(bundle.build["layers"]))


def _require_cached(oracle: Any, prompts: Sequence[Any]) -> None:
    missing = [prompt.name for prompt in prompts if not oracle.is_cached(prompt.tokens)]
    if missing:
        raise BadInput(
            f"{oracle.cache} holds no oracle result for {listing(missing)}.",
            "Leave out --cached-only to compute it; a result counts only for the same checkpoint, prompt and versions.",
        )


def _check_candidate(name: str, plugins: Plugins) -> None:
    """Refuse a candidate that no installed backend runs."""
    known = ["auto", "torch", *dict.fromkeys(backend.runtime for backend in plugins.backends().values())]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are {listing(known)}."
        raise BadInput(f"There is no candidate {name!r}.", f"{hint} {plugins.left_out()}".rstrip())


def _models(bundle: Bundle, options: GateOptions, plugins: Plugins, checkpoint: Path, keep_in: Path | None) -> Any:
    """What judges and what controls: auto is the asset where this machine runs it in time, else the overlay."""
    from coreai_zoo.gates.candidate import AssetCandidate
    from coreai_zoo.gates.teacher_forced import Models, Runner, Ticker
    from coreai_zoo.gates.weights import AssetWeights, CheckpointWeights

    backend = backend_of(bundle, plugins.backends())
    ticker = Ticker()
    if options.candidate not in {"auto", "torch", backend.runtime}:
        raise BadInput(
            f"{bundle.directory.name} is a {backend.name} bundle, which the candidate {options.candidate} cannot run.",
            f"Use --candidate {backend.runtime} or torch.",
        )
    arithmetic: Literal["torch", "runtime"] = "torch" if backend.accumulation == "single" else "runtime"
    candidate = AssetCandidate(bundle, backend, ticker, keep_in if backend.extra_files else None)
    asset = Runner(candidate, ticker, arithmetic=arithmetic)
    shipped = _design_of(bundle, plugins, checkpoint)
    module = shipped.modules[bundle.decode]
    overlay: Runner | None = None
    control: Runner | None = None
    # Not every overlay runs layer by layer: without that there is no control and no long prompt.
    if isinstance(module, LayeredDecoder) or options.candidate == "torch":
        weights = AssetWeights.open(bundle.asset, backend, bundle.decode, module, shipped.weights)
        overlay = _overlay_runner(shipped, weights)
        if options.control:
            plain = _design_of(bundle, plugins, checkpoint, recipe=_PLAIN)
            control = _overlay_runner(plain, CheckpointWeights("unquantized weights", plain.checkpoint, plain.weights))
    size = sum(path.stat().st_size for path in bundle.asset.rglob("*") if path.is_file())
    in_time = sys.platform == "darwin" or size <= _INTERPRETED_BYTES  # a Mac has the OS runtime
    runs_asset = options.candidate == backend.runtime or (options.candidate == "auto" and in_time)
    # A long prompt is the overlay's in any case but the one in which the asset was asked for.
    long_candidate = asset if options.candidate == backend.runtime else overlay
    return Models(asset if overlay is None or runs_asset else overlay, long_candidate, control)


def _design_of(bundle: Bundle, plugins: Plugins, checkpoint: Path, recipe: str | None = None) -> Design:
    """The design that `bundle` was built from, or the same by another recipe."""
    request, _ = recorded_request(bundle, checkpoint, bundle.directory.parent)
    return design(evolve(request, recipe=recipe or request.recipe), plugins)


def _overlay_runner(designed: Design, weights: Any) -> Any:
    """The candidate that runs the decoding function's overlay in PyTorch."""
    from coreai_zoo.gates.layered import TorchCandidate
    from coreai_zoo.gates.teacher_forced import Runner, Ticker

    ticker, layers, name = Ticker(), int(designed.facts["layers"]), designed.decode
    model = TorchCandidate(designed.modules[name], designed.weights, designed.signatures[name], weights, ticker)
    return Runner(model, ticker, lambda _prompt: layers, "torch")
