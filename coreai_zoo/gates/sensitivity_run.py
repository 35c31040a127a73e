"""What `zoo sensitivity` calls: a bundle or an entry in, the ranking of its parts out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from coreai_zoo.build.design import Design, design
from coreai_zoo.build.rebuild import recorded_request
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import checkpoint_of, named_bundle
from coreai_zoo.catalogue import load_entries
from coreai_zoo.checkpoint.tokenizer import encode, load_tokenizer
from coreai_zoo.errors import BadInput
from coreai_zoo.format_text import format_text, read_format
from coreai_zoo.gates.prompts import ANCHOR, DEFAULT_POSITIONS, named_prompts
from coreai_zoo.gates.sensitivity import Granularity, Part, Sensitivity, Subject, measure, parts_of, ranked
from coreai_zoo.gates.sensitivity_chart import picture
from coreai_zoo.gates.sensitivity_results import Results, as_row
from coreai_zoo.gates.sensitivity_work import Work, cluster, determined_by, local, measured_by
from coreai_zoo.gates.teacher_forced import check_checkpoint
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.recipes import PLAIN, QuantizationSpec


@frozen
class SensitivityOptions:
    """What was asked for; see the options of `zoo sensitivity`."""

    checkpoint: Path | None = None
    sample: bool = False
    custom: bool = False
    recipe: str | None = None
    layers: int | None = None
    stored_from: str = PLAIN
    stored_as: str | None = None
    role: Sequence[str] = ()
    per_layer: bool = False
    per_tensor: bool = False
    prompt: str | None = None
    positions: int | None = None
    by: str = "kl"
    output: Path | None = None
    fresh: bool = False
    jobs: int = 1
    scheduler: str | None = None


@frozen
class Ranking:
    """The parts of a model in the order of what another format costs them.

    Attributes:
        design: the model.
        positions: number of tokens that it was run on.
        stored_from: the format of the rest.
        by: what they are ranked by.
        rows: the parts, the worst bargain first.
    """

    design: Design
    positions: int
    stored_from: str
    by: str
    rows: Sequence[Sensitivity]

    def as_json(self) -> dict[str, Any]:
        """The ranking as `--json` prints it."""
        return {
            "checkpoint": str(self.design.checkpoint.directory),
            "entry": self.design.entry.name if self.design.entry else None,
            "positions": self.positions,
            "from": self.stored_from,
            "ranked_by": self.by,
            "parts": [as_row(row) for row in self.rows],
        }


def rank_parts(subject: str, options: SensitivityOptions, plugins: Plugins, report: Reporter) -> Ranking:
    """Measure and rank the parts of a bundle, by its folder or name, or of an entry, by its name.

    Raises:
        BadInput: when there is no such bundle or entry, an option does not fit it, it cannot be run in parts, or the
            folder holds results of something else.
        EnvironmentLacks: when who is to do the work is not there, or does not stay.
        CheckFailed: when a worker has another checkpoint or other code.
    """
    _check(options)
    designed = design(_request(subject, options, plugins), plugins)
    tokens = _tokens(designed, options)
    asked = _asked(designed, options)
    measured = Subject.of(designed, asked.base)
    layers = measured.candidate(None).module.layer_paths  # refuses a decoder that cannot be run layer by layer
    granularity: Granularity = "tensor" if options.per_tensor else "layer" if options.per_layer else "role"
    parts = parts_of(designed.weights, asked.specs, layers, granularity, asked.base, asked.each)
    rest = format_text(read_format(options.stored_from))
    head = {
        "checkpoint": designed.checkpoint.directory.name,
        "entry": designed.entry.name if designed.entry else None,
        "positions": len(tokens),
        "from": rest,
        "determined_by": determined_by(designed, tokens, asked.base),
    }
    with Results.opened(options.output, head, fresh=options.fresh) as results:
        missing = [part for part in parts if results.find(part) is None]
        if len(missing) < len(parts):
            report.note(f"{len(parts) - len(missing)} of {len(parts)} parts were measured before, {len(missing)} to go")
        if missing:
            run = _Run(measured, designed, plugins.without, tokens, results, options)
            run.measure(missing, len(layers), report)
        rows = ranked((found for part in parts if (found := results.find(part))), options.by)
        ranking = Ranking(designed, len(tokens), rest, options.by, rows)
        if options.output is not None:
            results.draw(picture(rows, _title(ranking)))
    return ranking


def _title(ranking: Ranking) -> str:
    formats = {format_text(row.part.spec) for row in ranking.rows}
    one = f"in {formats.pop()}" if len(formats) == 1 else f"as recipe {ranking.design.recipe.name} has it"
    return f"{ranking.design.label}: a part {one} instead of {ranking.stored_from}, {ranking.positions} positions"


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class _Run:
    """The measuring of parts whose results are not there yet.

    Attributes:
        subject: the model in this process.
        design: what it was made of.
        without: names of plugins that are left out.
        tokens: the prompt.
        results: where results go, each as soon as there is one.
        options: who does the work.
    """

    subject: Subject
    design: Design
    without: tuple[str, ...]
    tokens: Sequence[int]
    results: Results
    options: SensitivityOptions

    def measure(self, parts: Sequence[Part], layers: int, report: Reporter) -> None:
        """Measure all of `parts`. A step of progress is a layer, in whatever process it runs."""
        reference = self.results.known_reference()
        what = f"{len(parts)} parts of {self.design.checkpoint.directory.name}, {len(self.tokens)} positions each"
        steps = (len(parts) + (reference is None)) * layers
        with report.stage("measure", what), report.steps("", steps) as step:
            if reference is None:
                reference = self.subject.logits(None, self.tokens, step)
                self.results.keep_reference(reference)
            if self.options.jobs == 1 and self.options.scheduler is None:
                for part in parts:
                    self.results.add(measure(self.subject, part, self.tokens, reference, step))
                return
            for found in self._elsewhere(parts, reference):
                self.results.add(found)
                for _ in range(layers):
                    step()

    def _elsewhere(self, parts: Sequence[Part], reference: np.ndarray[Any, Any]) -> Iterator[Sensitivity]:
        """The results of parts that other processes measure."""
        scheduler = self.options.scheduler
        with self.results.reference_file(reference) as file:
            executor = cluster(scheduler) if scheduler else local(min(self.options.jobs, len(parts)))
            with executor as pool:
                yield from measured_by(pool, self._work(file), parts)

    def _work(self, reference: Path) -> Work:
        sha256 = self.results.reference_sha256
        assert sha256 is not None
        base = self.subject.base
        return Work(
            self.design.request,
            self.without,
            tuple(sorted(base.items(), key=lambda item: item[0])),
            tuple(self.tokens),
            reference.absolute(),
            sha256,
            json.dumps(self.results.head["determined_by"]),
        )


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for
# ---------------------------------------------------------------------------------------------------------------------


def _check(options: SensitivityOptions) -> None:
    if options.per_layer and options.per_tensor:
        raise BadInput("--per-layer and --per-tensor exclude each other.", "A tensor says which layer it is of.")
    if options.scheduler and options.jobs != 1:
        raise BadInput("--jobs is for this machine; a --scheduler has its own workers.", "Leave out one of them.")
    if options.scheduler and options.output is None:
        raise BadInput(
            "--scheduler needs -o DIR: its workers read the logits of the reference there.",
            "Workers on other machines have to see that folder and the checkpoint below the same paths.",
        )
    if options.fresh and options.output is None:
        raise BadInput("--fresh forgets what is in a folder.", "Say in which one with -o DIR.")


def _request(subject: str, options: SensitivityOptions, plugins: Plugins) -> BuildRequest:
    """The build that made a bundle, or that would make one of an entry."""
    is_entry = subject.endswith(".toml") or (subject in load_entries(plugins) and not Path(subject).is_dir())
    path = None if is_entry else named_bundle(subject)
    if path is not None:
        if options.sample or options.custom or options.recipe or options.layers:
            raise BadInput(
                "--sample, --custom, --recipe and --layers are for an entry; a bundle says what it was built from."
            )
        bundle = Bundle.open(path)
        check_checkpoint(bundle, checkpoint_of(bundle, plugins, options.checkpoint))
        return recorded_request(bundle, options.checkpoint, path.parent)[0]
    return BuildRequest(
        model=subject,
        checkpoint=options.checkpoint,
        sample=options.sample,
        recipe=options.recipe,
        layers=options.layers,
        custom=options.custom,
    )


def _tokens(designed: Design, options: SensitivityOptions) -> list[int]:
    text = named_prompts([ANCHOR])[0].text if options.prompt is None else options.prompt
    tokens = encode(load_tokenizer(designed.checkpoint.directory), text or "")
    positions = options.positions or min(DEFAULT_POSITIONS, len(tokens))
    if not tokens or len(tokens) < positions:
        raise BadInput(
            f"The prompt is {len(tokens)} tokens, and {positions} positions were asked for.",
            "Give a longer prompt, or fewer --positions.",
        )
    return tokens[:positions]


@frozen
class _Asked:
    """What is stored in another format: see `parts_of`."""

    specs: Mapping[str, QuantizationSpec | None]
    base: Mapping[str, QuantizationSpec]
    each: Mapping[str, QuantizationSpec] | None


def _asked(designed: Design, options: SensitivityOptions) -> _Asked:
    """How each role that is asked for is stored, and how the rest is: the roles that the recipe quantizes, and those.

    Raises:
        BadInput: for a format that cannot be read, for a role that the recipe leaves alone, when nothing else says how,
            or when there is none at all.
    """
    of_recipe = {tensor.name: tensor for tensor in designed.weights.tensors if tensor.quantization is not None}
    recipe = dict.fromkeys(tensor.role for tensor in of_recipe.values())
    roles = options.role or tuple(recipe)
    if not roles:
        raise BadInput(
            f"Recipe {designed.recipe.name} quantizes nothing.", "Choose another --recipe, or name a --role and --as."
        )
    rest = read_format(options.stored_from)
    base = {} if rest is None else dict.fromkeys((*recipe, *roles), rest)
    if options.stored_as is not None:
        return _Asked(dict.fromkeys(roles, read_format(options.stored_as)), base, None)
    known = designed.weights.by_role()
    left = [role for role in roles if role in known and role not in recipe]
    if left:
        raise BadInput(f"Recipe {designed.recipe.name} leaves {' and '.join(left)} alone.", "Say how with --as.")
    each = {name: tensor.quantization for name, tensor in of_recipe.items() if tensor.quantization is not None}
    return _Asked(dict.fromkeys(roles), base, each)
