"""The work of `zoo gate`: a bundle's prompts through the oracle, the candidate and its control, and a report of it.

Commands import this module to show their help as well, so what needs torch is imported where it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, frozen

from coreai_zoo.backend import Interpreting
from coreai_zoo.bounds import CONFIDENT_MARGIN, GENERAL, Arithmetic, Bounds, MeasuredBounds, kind_of
from coreai_zoo.build.design import Design, design
from coreai_zoo.build.rebuild import recorded_request
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import checkpoint_of
from coreai_zoo.bundle.layout import GATE_FOLDER, REPORT, TRANSCRIPT, bytes_below
from coreai_zoo.bundle.verify import backend_of, check_copy, require, require_unchanged
from coreai_zoo.catalogue import load_entries
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.tokenizer import load_tokenizer, token_text
from coreai_zoo.disk import existing_parent
from coreai_zoo.engine import PREFILL
from coreai_zoo.errors import BadInput, CheckFailed, ZooError, did_you_mean, listing
from coreai_zoo.gate import Activations, GateResult
from coreai_zoo.gates import prompts, report, transcript
from coreai_zoo.gates.candidate import AssetCandidate
from coreai_zoo.gates.corpus import Corpus, read_corpus
from coreai_zoo.gates.corpus_run import CorpusResult, measure, run_oracle_on
from coreai_zoo.gates.cost import Cost, active_parameters
from coreai_zoo.gates.oracle import Oracle
from coreai_zoo.gates.slice import Slice
from coreai_zoo.gates.teacher_forced import (
    GateReport,
    Models,
    Reference,
    Runner,
    Ticker,
    check_checkpoint,
    gate,
    run_oracle,
)
from coreai_zoo.json_files import read_object
from coreai_zoo.machine import available_memory
from coreai_zoo.overlay import LayeredDecoder, Overlay
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.recipes import PLAIN, recorded_forms

if TYPE_CHECKING:
    from coreai_zoo.backend import Backend
    from coreai_zoo.gates.weights import AssetWeights, WeightSource

# Up to this size the CPU interpreter takes some tokens a second; beyond it a token takes minutes.
_INTERPRETED_BYTES = 64 * 2**20
_INTERPRETER_BYTES = 2**28  # of memory, for one process with a small asset (half of them at 3 MB)
_MAC = sys.platform == "darwin"  # which has a runtime of its own for what it can load

_SHARED = ("oracle", "windows")  # stages whose results all bundles are judged by

_SHOWN_REASONS = 5  # of a bundle that fails badly


@frozen
class GateOptions:
    """The options of a gate; see `zoo gate --help`.

    Attributes:
        candidate: `auto`, `torch`, or the runtime of an installed backend.
        jobs: how many prompts may run at a time, in processes of their own; these import the main module again.
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
    corpus: str | None = None
    jobs: int = 1

    def __attrs_post_init__(self) -> None:
        given = [self.prompt is not None, self.prompts is not None, bool(self.prompt_file)]
        if sum(given) > 1:
            raise BadInput("Give one of --prompt, --prompts and --prompt-file.")
        if self.corpus is not None and any(given):
            raise BadInput(
                "--corpus is measured beside the built-in prompts: leave out --prompt, --prompts and --prompt-file.",
                "A file is read as running text with --corpus FILE, and as one prompt with --prompt-file FILE.",
            )
        if self.cached_only and self.oracle_cache is None:
            raise BadInput("--cached-only needs a cache.", "Pass it with --oracle-cache DIR.")

    @property
    def arguments(self) -> list[str]:
        """The options as words of a command line, with names in the place of folders."""
        values = {"--prompt": self.prompt, "--prompts": self.prompts, "--positions": self.positions}
        values |= {"--candidate": self.candidate, "--oracle-dtype": self.oracle_dtype}
        defaults = {"--candidate": "auto", "--oracle-dtype": "float32"}
        words = [word for name, value in values.items() if value != defaults.get(name) for word in (name, str(value))]
        words += [] if self.corpus is None else ["--corpus", Path(self.corpus).name]
        words += [word for path in self.prompt_file for word in ("--prompt-file", path.name)]
        words += ["--checkpoint", "CHECKPOINT"] * (self.checkpoint is not None)
        words += ["--allow-weak-prompt"] * self.allow_weak_prompt
        return words + ["--no-control"] * (not self.control)


# ---------------------------------------------------------------------------------------------------------------------
# A gate
# ---------------------------------------------------------------------------------------------------------------------


def run_gate(
    bundles: Sequence[Bundle], options: GateOptions, plugins: Plugins, progress: Reporter, keep_in: Path | None = None
) -> list[dict[str, Any]]:
    """Judge bundles of one checkpoint on the same oracle; a transcript for each. Nothing is written.

    Args:
        bundles: the first one's prompts and oracle are used for all.
        options: what was asked for.
        plugins: for overlays, backends and gates.
        progress: is told of each stage.
        keep_in: folder for the logits of a bundle that brings a script to compare them with; None to keep none.

    Raises:
        BadInput: for anything that was given and does not fit.
        CheckFailed: when a bundle is not as it was built, or cannot be run.
        EnvironmentLacks: when the machine cannot run the oracle or the bundle.
    """
    first = bundles[0]
    _check_candidate(options.candidate, plugins)
    checkpoint = checkpoint_of(first, plugins, options.checkpoint)
    subjects = []
    for bundle in bundles:
        check_checkpoint(bundle, checkpoint)  # before its config is cut to the bundle's layers
        _require_unchanged(bundle)
        _require_same_tokenizer(first, bundle)
        subjects.append(_subject(bundle, options, plugins, checkpoint, keep_in if bundle is first else None))
    asked, remarks = _prompts(subjects[0], checkpoint, options)
    corpus = None if options.corpus is None else read_corpus(first, options.corpus, options.positions)
    # Both sides of a gate are fed what this tokenizer makes of the prompts: no other stage would see a wrong one.
    require([check_copy(first, checkpoint, plugins.tokenizer_classes())])
    for remark in remarks:
        progress.note(remark)
    for cost in _costs(subjects, asked, corpus):
        progress.note(cost.note())
    ticker = Ticker()
    oracle = oracle_of(first, plugins, checkpoint, options.oracle_dtype, options.oracle_cache, ticker)
    if options.cached_only:
        _require_cached(oracle, {prompt.name: prompt.tokens for prompt in asked})
        if corpus is not None:
            _require_cached(oracle, {f"window {at}": tokens for at, tokens in enumerate(corpus.windows, 1)})
    runner = Runner(oracle, ticker, lambda _prompt: int(first.build["layers"]))
    references = run_oracle(runner, asked, progress)
    measuring = None if corpus is None else _measuring(corpus, runner, first, keep_in, progress)
    controls: dict[str, dict[str, Activations]] = {}  # by what they compute in, and by prompt
    records = []
    for subject in subjects:
        control = controls.setdefault(subject.shipped.contract.compute_dtype, {})
        progress.seconds = {stage: took for stage, took in progress.seconds.items() if stage in _SHARED}
        judged = _judge(subject, references, control, progress, allow_weak=options.allow_weak_prompt)
        run = transcript.Run(
            subject.bundle,
            oracle.name,
            None if subject.models.control is None else subject.models.control.model.name,
            [subject.bundle.directory.name, *options.arguments],
            progress.seconds,
            [
                *_stored(subject, progress),
                *_slices(subject, options, plugins, checkpoint, references[0].prompt, progress),
                *_prefill(subject, references, options, progress),
                *_run_plugin_gates(subject, plugins, checkpoint),
            ],
            partial(token_text, load_tokenizer(subject.bundle.tokenizer)),
            remarks,
            None if measuring is None else measuring(subject),
        )
        records.append(transcript.transcript(run, judged))
    return records


def write_report(bundle: Bundle, records: Sequence[Mapping[str, Any]], output: Path | None = None) -> Path:
    """Write transcript and report of `bundle`, the first of `records`, beside which the second is shown.

    Args:
        bundle: what was judged.
        records: transcripts, one or two.
        output: where to; None for the bundle's own folder, and then the card gets the numbers too.

    Returns:
        Path of the report.
    """
    folder = report_folder(bundle, output)
    transcript.write(folder, records[0], report.render(*records))
    if output is None:
        transcript.write_card(bundle, report.markdown(records[0]))
    return folder / REPORT


def replaced_by_less(bundle: Bundle, record: Mapping[str, Any], output: Path | None = None) -> str | None:
    """A sentence on a verdict that a report replaces, where that was on more of the same build; to ask before.

    Args:
        bundle: what was judged.
        record: its transcript.
        output: as for `write_report`.
    """
    try:
        earlier = read_object(report_folder(bundle, output) / TRANSCRIPT)
        alike = earlier["bundle"]["build_sha256"] == record["bundle"]["build_sha256"]
        before = report.power(earlier).positions
    except (ZooError, KeyError, TypeError):  # there is none, or one that cannot be read
        return None
    if not alike or report.power(record).positions >= before:
        return None
    return f"This takes the place of a verdict on {before:,} sure positions; -o DIR keeps a short one apart."


def failure(name: str, reasons: list[str]) -> CheckFailed:
    """The error with which the gate of the bundle `name` fails; it tells the first reasons, the report all."""
    return CheckFailed(f"{name} fails the gate: {listing(reasons, _SHOWN_REASONS, '; ')}.")


def report_folder(bundle: Bundle, output: Path | None) -> Path:
    """Where the report on a bundle goes: to `output`, or into the bundle's own folder."""
    return bundle.directory / GATE_FOLDER if output is None else output


# ---------------------------------------------------------------------------------------------------------------------
# What is judged, and on what
# ---------------------------------------------------------------------------------------------------------------------


def _check_candidate(name: str, plugins: Plugins) -> None:
    """Refuse a candidate that no installed backend runs."""
    known = ["auto", "torch", *dict.fromkeys(backend.runtime for backend in plugins.backends().values())]
    if name not in known:
        raise plugins.not_found(f"There is no candidate {name!r}.", did_you_mean(name, known, 2))


def _require_unchanged(bundle: Bundle) -> None:
    """Refuse a bundle that was edited: its report would be about something that nobody built."""
    load_tokenizer(bundle.tokenizer)  # says best what is wrong with it
    require_unchanged(bundle)


def _require_same_tokenizer(one: Bundle, other: Bundle) -> None:
    path = "tokenizer/tokenizer.json"
    if one.build["files"].get(path) != other.build["files"].get(path):
        raise BadInput(
            f"{one.directory.name} and {other.directory.name} have different tokenizers: no prompt is the same in both."
        )


@frozen
class _Subject:
    """A bundle to judge: what runs it, what it is held to, and what its record says of its weights and experts."""

    bundle: Bundle
    overlay: Overlay
    shipped: Design
    weights: AssetWeights | None
    models: Models
    measured: MeasuredBounds
    roles: Mapping[str, Any]
    experts_per_token: int | None

    def held_to(self, arithmetic: Arithmetic, *, layers: int | None = None, plain: bool = False) -> Bounds:
        """The bounds of the bundle; of a slice of it with so many layers; or of one that is not quantized."""
        return _held_to(self.bundle, self.shipped, self.measured, arithmetic, layers=layers, plain=plain)


def _held_to(
    bundle: Bundle,
    designed: Design,
    measured: MeasuredBounds,
    arithmetic: Arithmetic,
    *,
    layers: int | None = None,
    plain: bool = False,
) -> Bounds:
    return measured.of_recipe(
        {} if plain else bundle.build["recipe"]["roles"],
        layers or int(bundle.build["layers"]),
        arithmetic,
        kind_of(bundle.build["facts"].get("experts_per_token")),
        designed.contract.compute_dtype,
    )


def margin_of_asset(bundle: Bundle, plugins: Plugins, checkpoint: Path) -> float:
    """The oracle's margin from which a flip of the asset on its runtime is an error, as a gate has it."""
    if bundle.compute_dtype == "float16":
        return CONFIDENT_MARGIN
    designed = _design_of(bundle, plugins, checkpoint)
    measured = _bounds(bundle, designed.model.overlay, plugins)
    return _held_to(bundle, designed, measured, _arithmetic(designed.backend)).margin


def _subject(
    bundle: Bundle, options: GateOptions, plugins: Plugins, checkpoint: Path, keep_in: Path | None
) -> _Subject:
    try:
        roles, facts = dict(bundle.build["recipe"]["roles"]), bundle.build["facts"]
        experts = facts.get("experts_per_token")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"build.json of {bundle.directory} does not say how it was built: {error!r}."
        raise BadInput(message, "Build the bundle again.") from error
    _require_runnable(bundle, backend_of(bundle, plugins.backends()), options.candidate)
    shipped = _design_of(bundle, plugins, checkpoint)
    weights = _stored_weights(bundle, shipped, options)
    models = _models(bundle, shipped, weights, options, keep_in)
    overlay = shipped.model.overlay
    return _Subject(bundle, overlay, shipped, weights, models, _bounds(bundle, overlay, plugins), roles, experts)


def _bounds(bundle: Bundle, overlay: Overlay, plugins: Plugins) -> MeasuredBounds:
    """What the family's plugin measured, for its samples and for the models of its entries; else the general bounds.

    A model of other sizes rounds otherwise than those that were measured, however faithfully it is converted.
    """
    entry = bundle.build.get("entry")
    own = bundle.build.get("sample") or (isinstance(entry, dict) and not entry.get("differences"))
    return plugins.gate_bounds(overlay) if own else GENERAL


def _prompts(
    subject: _Subject, checkpoint: Path, options: GateOptions
) -> tuple[list[prompts.TokenizedPrompt], list[str]]:
    """The prompts to judge by, and what has to be said about those that are not, or not wholly, used."""
    bundle = subject.bundle
    if options.prompt is not None:
        asked = [prompts.Prompt(prompts.UNNAMED, options.prompt)]
    elif options.prompt_file:
        asked = [prompts.file_prompt(path) for path in options.prompt_file]
    elif options.prompts is not None:
        named = prompts.named_prompts([name.strip() for name in options.prompts.split(",")])
        asked = [prompts.at_least(prompt, bundle) for prompt in named]
    else:
        # Beside a corpus, positions are those of the corpus, and its windows are measured anyway.
        positions = options.positions if options.corpus is None else None
        windows = _windows(subject, options) if options.positions is None and options.corpus is None else 0
        taken, left_out = prompts.default_prompts(bundle, checkpoint, positions, windows)
        if windows == 0 and positions is None and options.corpus is None and _small(bundle):
            left_out.append("windows of the built-in corpus are left out: only the overlay in PyTorch takes them")
        return taken, [*left_out, *_endless(taken)]
    if options.positions is not None:
        asked = [prompts.cut(prompt, options.positions) for prompt in asked]
    taken = [prompts.tokenize(bundle, prompt, checkpoint) for prompt in asked]
    return taken, _endless(taken)


def _windows(subject: _Subject, options: GateOptions) -> int:
    """How many windows of the built-in corpus are prompts by default: of a small bundle, and in PyTorch."""
    in_pytorch = options.candidate in {"auto", "torch"} and subject.models.long_candidate is not None
    return prompts.CORPUS_WINDOWS if in_pytorch and _small(subject.bundle) else 0


def _small(bundle: Bundle) -> bool:
    return bytes_below(bundle.asset) <= _INTERPRETED_BYTES


def _endless(taken: Sequence[prompts.TokenizedPrompt]) -> list[str]:
    """The chats on which no end of turn can be checked."""
    chats = [prompt for prompt in taken if prompt.prompt.turns and not prompt.ends_turns]
    return [f"prompt {chat.name!r}: its {len(chat.tokens)} positions end before a turn does" for chat in chats]


# ---------------------------------------------------------------------------------------------------------------------
# The oracle
# ---------------------------------------------------------------------------------------------------------------------


def oracle_of(
    bundle: Bundle,
    plugins: Plugins,
    checkpoint: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    cache: Path | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> Oracle:
    """The oracle on the checkpoint of `bundle`, or on the slice of it that was built; see `Oracle` for the rest."""
    designed = _design_of(bundle, plugins, checkpoint)
    opened = designed.opened or Checkpoint.open(checkpoint)  # which says what is missing
    return Oracle.of(designed, opened, dtype=dtype, cache=cache, on_layer=on_layer)


def _require_cached(oracle: Oracle, asked: Mapping[str, Sequence[int]]) -> None:
    missing = [name for name, tokens in asked.items() if not oracle.is_cached(tokens)]
    if missing:
        raise BadInput(
            f"{oracle.cache} holds no oracle result for {listing(missing)}.",
            "Leave out --cached-only to compute it; a result counts only for the same checkpoint, prompt and versions.",
        )


def _costs(
    subjects: Sequence[_Subject], asked: Sequence[prompts.TokenizedPrompt], corpus: Corpus | None
) -> Iterator[Cost]:
    """What the prompts take, and the corpus. One control is enough for all bundles, and a corpus has none."""
    build = subjects[0].bundle.build
    layers, active, candidates = int(build["layers"]), active_parameters(build), len(subjects)
    control = subjects[0].models.control is not None
    readers = sum(each.weights is not None and each.shipped.contract.prefill is not None for each in subjects)
    yield Cost("prompts", sum(len(prompt.tokens) for prompt in asked), layers, active, candidates + control, readers)
    if corpus is not None:
        yield Cost("corpus", corpus.positions, layers, active, candidates)


def _measuring(
    corpus: Corpus, oracle: Runner, first: Bundle, keep_in: Path | None, progress: Reporter
) -> Callable[[_Subject], CorpusResult]:
    """A function that measures a bundle over a corpus. The oracle runs when it is first called, and once."""
    width = int(first.signature.outputs[0].shape[-1])
    folder = existing_parent(keep_in or first.directory)
    expected = cache(lambda: run_oracle_on(corpus, oracle, width, folder, progress))

    def measure_subject(subject: _Subject) -> CorpusResult:
        runner = subject.models.long_candidate or subject.models.candidate
        if isinstance(runner.model, AssetCandidate):
            runner = evolve(runner, model=evolve(runner.model, keep_in=None))
        routed, sure_from = subject.experts_per_token is not None, subject.held_to(runner.arithmetic).margin
        return measure(corpus, expected(), runner, progress, routed=routed, sure_from=sure_from)

    return measure_subject


# ---------------------------------------------------------------------------------------------------------------------
# Candidate and control
# ---------------------------------------------------------------------------------------------------------------------


def _require_runnable(bundle: Bundle, backend: Backend, candidate: str) -> None:
    if candidate not in {"auto", "torch", backend.runtime}:
        raise BadInput(
            f"{bundle.directory.name} is a {backend.name} bundle, which the candidate {candidate} cannot run.",
            f"Use --candidate {backend.runtime} or torch.",
        )


def _stored_weights(bundle: Bundle, shipped: Design, options: GateOptions) -> AssetWeights | None:
    """The weights in the asset of the function that decodes; None where the overlay does not run layer by layer."""
    from coreai_zoo.gates.weights import AssetWeights

    module = shipped.modules[bundle.decode]
    if not isinstance(module, LayeredDecoder) and options.candidate != "torch":
        return None
    return AssetWeights.open(bundle.asset, shipped.backend, bundle.decode, shipped.weights)


def _models(
    bundle: Bundle, shipped: Design, weights: AssetWeights | None, options: GateOptions, keep_in: Path | None
) -> Models:
    """Candidate and control. The candidate `auto` is the asset where this machine runs it in time, else the overlay."""
    from coreai_zoo.gates.weights import CheckpointWeights

    backend = shipped.backend
    ticker = Ticker()
    size, native = bytes_below(bundle.asset), _MAC and not isinstance(backend, Interpreting)
    alone = native or isinstance(backend, Interpreting) or size > _INTERPRETED_BYTES  # each takes the whole machine
    at_a_time = 1 if alone else at_once(size, options.jobs, available_memory())
    candidate = AssetCandidate(bundle, backend, ticker, keep_in if backend.extra_files else None, at_a_time)
    asset = Runner(candidate, ticker, arithmetic=_arithmetic(backend))
    overlay: Runner | None = None
    control: Runner | None = None
    if weights is not None:  # without them there is no control and no long prompt
        overlay = _overlay_runner(shipped, weights)
        if options.control:
            plain = shipped.with_recipe(PLAIN)
            control = _overlay_runner(plain, CheckpointWeights("unquantized weights", plain.checkpoint, plain.weights))
    runs_asset = overlay is None or judges_asset(options.candidate, backend.runtime, size, native=native)
    if runs_asset and isinstance(backend, Interpreting):
        backend.require_memory(bundle.asset)
    # The overlay takes the long prompts, unless the asset was asked for by name.
    long_candidate = asset if options.candidate == backend.runtime else overlay
    return Models(asset if runs_asset or overlay is None else overlay, long_candidate, control)


def at_once(size: int, cores: int, memory: int | None) -> int:
    """How many prompts the interpreter of an asset of `size` bytes runs at a time, on so many cores.

    Args:
        size: of the asset.
        cores: that this process may use.
        memory: bytes that are free; None where that is not known.
    """
    fitting = cores if memory is None else memory // (_INTERPRETER_BYTES + 4 * size)
    return max(1, min(cores, fitting))


def _arithmetic(backend: Backend) -> Arithmetic:
    """The arithmetic of a backend's runtime: one that sums in single precision rounds as PyTorch does."""
    return "torch" if backend.accumulation == "single" else "runtime"


def judges_asset(candidate: str, runtime: str, size: int, *, native: bool) -> bool:
    """Whether a gate runs the asset itself, and not the overlay on the asset's weights.

    Args:
        candidate: what was asked for; `auto` for the asset where it is run in time.
        runtime: the runtime of the asset's backend.
        size: bytes of the asset.
        native: whether that runtime is the operating system's own, on this machine.
    """
    return candidate == runtime or (candidate == "auto" and (native or size <= _INTERPRETED_BYTES))


def _design_of(bundle: Bundle, plugins: Plugins, checkpoint: Path) -> Design:
    """The design that `bundle` was built from. Nothing is built, so it is dry."""
    request, _ = recorded_request(bundle, checkpoint, bundle.directory.parent)
    return design(evolve(request, dry=True), plugins)


def _overlay_runner(
    designed: Design,
    weights: WeightSource,
    function: str | None = None,
    pieces: Callable[[int], Sequence[int]] | None = None,
) -> Runner:
    """A function's overlay in PyTorch, on given weights; that of the one that decodes unless another is named."""
    from coreai_zoo.gates.layered import TorchCandidate

    ticker, layers, name = Ticker(), int(designed.facts["layers"]), function or designed.decode
    signature = designed.signatures[name]
    model = TorchCandidate(designed.modules[name], designed.weights, signature, weights, ticker, pieces=pieces)
    return Runner(model, ticker, lambda _prompt: layers, "torch")


# ---------------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------------


def _judge(
    subject: _Subject,
    references: Sequence[Reference],
    controls: dict[str, Activations],
    progress: Reporter,
    *,
    allow_weak: bool,
) -> GateReport:
    return gate(
        references,
        subject.models,
        subject.held_to,
        progress,
        control_bounds=subject.held_to("torch", plain=True),
        experts_per_token=subject.experts_per_token,
        quantized=any(any(recorded_forms(stored)) for stored in subject.roles.values()),
        compute_dtype=subject.shipped.contract.compute_dtype,
        allow_weak=allow_weak,
        controls=controls,
    )


def _stored(subject: _Subject, progress: Reporter) -> list[GateResult]:
    """The verdict on the stored values, where they are read out of the asset at all."""
    from coreai_zoo.gates.stored import compare_weights
    from coreai_zoo.gates.weights import CheckpointWeights

    if subject.weights is None:
        return []
    plan = subject.shipped.weights
    made = CheckpointWeights("the checkpoint", subject.shipped.checkpoint, plan)
    return [compare_weights(plan, subject.weights, made, progress)]


def _slices(
    subject: _Subject,
    options: GateOptions,
    plugins: Plugins,
    checkpoint: Path,
    prompt: prompts.TokenizedPrompt,
    progress: Reporter,
) -> list[GateResult]:
    """The verdict on a slice, where the asset is too large to be run and nobody asked for anything else."""
    if options.candidate != "auto" or isinstance(subject.models.candidate.model, AssetCandidate):
        return []
    part = Slice(
        subject.bundle,
        subject.shipped,
        checkpoint,
        plugins,
        lambda bundle: oracle_of(bundle, plugins, checkpoint, options.oracle_dtype),
        lambda layers: subject.held_to(_arithmetic(subject.shipped.backend), layers=layers),
        subject.experts_per_token,
    )
    return [part.judge(prompt, progress)]


def _prefill(
    subject: _Subject, references: Sequence[Reference], options: GateOptions, progress: Reporter
) -> list[GateResult]:
    """The verdict on the function that reads prompts, where the contract has one; by prompts that are not too weak."""
    from coreai_zoo.gates.prefill import DECODED, PrefillGate, pieces_with_room, uneven_pieces, verdict

    shipped, bundle, prefill = subject.shipped, subject.bundle, subject.shipped.contract.prefill
    judged = [each for each in references if options.allow_weak_prompt or not each.strength.weak]
    if prefill is None or not judged:
        return []
    problems, read = [], []
    judging = PrefillGate(subject.experts_per_token)
    if subject.weights is not None:
        overlay = _overlay_runner(shipped, subject.weights, PREFILL, partial(uneven_pieces, prefill=prefill))
        problems += judging.judge_overlay(overlay, judged, subject.held_to("torch"), progress)
        read.append(f"{sum(len(each.prompt.tokens) for each in judged)} positions in PyTorch")
    longest = max(judged, key=lambda each: len(each.prompt.tokens))
    if isinstance(subject.models.candidate.model, AssetCandidate) and len(longest.prompt.tokens) > DECODED:
        backend = shipped.backend
        held_to = subject.held_to(_arithmetic(backend))
        problems += judging.judge_asset(bundle, backend, prefill, longest, held_to, progress)
        read.append(f"{sum(pieces_with_room(len(longest.prompt.tokens), prefill))} on the {backend.runtime} runtime")
    return [verdict(problems, " and ".join(read))] if read else []


def _run_plugin_gates(subject: _Subject, plugins: Plugins, checkpoint: Path) -> list[GateResult]:
    """The results of the gates that plugins add."""
    bundle = subject.bundle
    entry, _ = load_entries(plugins).get(str(bundle.entry), (None, None))
    results = []
    for plugin, extra in plugins.gates(subject.overlay, entry):
        with plugins.attribute_errors(plugin, f"gate {extra.name!r}"):
            results.append(extra.run(bundle, checkpoint))
    return results
