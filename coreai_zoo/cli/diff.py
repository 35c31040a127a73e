"""`zoo diff`: what a change does to a bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from coreai_zoo.build.pipeline import build
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.verify import backend_of
from coreai_zoo.catalogue import find_entry, find_recipe, load_entries
from coreai_zoo.commands import json_option, new_table, plugins_of, print_json, print_table
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, CheckFailed
from coreai_zoo.gates.run import checkpoint_of, oracle_of
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.review.verdict import Next

if TYPE_CHECKING:
    import numpy as np

    from coreai_zoo.gates.rule import Verdict
    from coreai_zoo.review.diff import Difference, Section
    from coreai_zoo.review.structure import Structure

_POSITIONS = 32
_AFTER_CODE = Next(
    verify=("zoo check --only samples",),
    gate=("zoo check --only samples",),
    goldens=("zoo check --only goldens --update-goldens",),
)


@frozen
class EntryRecipe:
    """`ENTRY` or `ENTRY:RECIPE` on the command line."""

    entry: Entry
    recipe: str


@frozen
class Options:
    """How to compare; see `zoo diff --help`."""

    checkpoint: Path | None
    positions: int
    numerics: bool


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option("--rev", "revisions", multiple=True, metavar="REV", help="Compare the code at REV with the working tree.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="To run two bundles on. Not needed for samples.",
)
@click.option(
    "--positions", type=click.IntRange(1), default=_POSITIONS, show_default=True, metavar="N", help="Tokens to run."
)
@click.option("--no-numerics", is_flag=True, help="Run nothing: compare graph and weights only.")
@click.option("--markdown", is_flag=True, help="Print Markdown, to be pasted into a review.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 when anything differs, whatever the kind.")
@json_option
@click.pass_context
def diff(
    ctx: click.Context,
    a: str,
    b: str | None,
    revisions: tuple[str, ...],
    checkpoint: Path | None,
    positions: int,
    no_numerics: bool,
    markdown: bool,
    exit_code: bool,
    as_json: bool,
) -> None:
    """What differs between two bundles, entries, recipes or revisions of the code.

    A and B are two bundles, two entries, or two recipes of one entry (ENTRY:RECIPE). With --rev, A is an entry: its
    sample is built with the code at REV and with the working tree, or at both of two --rev. Operations are counted per
    kind of layer; weights are compared byte by byte and logits bit by bit where both sides are bundles. Entries are
    compared without weights, at their true sizes. The last line is the verdict: what kind of change it is, and what to
    run next.

    \b
    Example:
        zoo diff qwen3.6-27b qwen3.6-35b-a3b
        zoo diff qwen3.6-27b:int8hu qwen3.6-27b:int4lin
        zoo diff qwen3.6-27b --rev main --markdown
        zoo diff exports/one exports/other
    """
    from coreai_zoo.review import diff as differences
    from coreai_zoo.review.verdict import judge

    if markdown and as_json:
        raise BadInput("--markdown and --json exclude each other.")
    if (b is None) == (not revisions) or len(revisions) > 2:
        raise click.UsageError("Give two things to compare, or one entry and --rev REV (at most two).")
    plugins, report = plugins_of(ctx), Reporter(silent=as_json or markdown)
    options = Options(checkpoint, positions, not no_numerics)
    if b is None:
        found, following = _of_revisions(_entry_recipe(a, plugins), revisions, options, plugins, report), _AFTER_CODE
    else:
        found, following = _of_two(a, b, options, plugins, report)
    verdict = judge(found, following)
    if as_json:
        print_json({**differences.as_json(found), "verdict": verdict.as_json()})
    elif markdown:
        click.echo(f"{differences.as_markdown(found)}\n**{verdict}**")
    else:
        _print(found)
        click.echo(str(verdict))
    if exit_code and verdict.changed:
        raise CheckFailed(f"{found.a} and {found.b} differ.")


# ---------------------------------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------------------------------


def _of_two(a: str, b: str, options: Options, plugins: Plugins, report: Reporter) -> tuple[Difference, Next]:
    if b.startswith(":"):
        b = a.partition(":")[0] + b
    is_bundle = [Path(name).is_dir() and name not in load_entries(plugins) for name in (a, b)]
    if all(is_bundle):
        bundles = Bundle.open(Path(a)), Bundle.open(Path(b))
        return _of_bundles(*bundles, options, plugins, report), _after_bundle(bundles[1], options)
    if any(is_bundle):
        bundle, other = (a, b) if is_bundle[0] else (b, a)
        raise BadInput(
            f"{bundle} is a bundle and {other} is none: they cannot be compared.",
            "Give two bundles, or two entries; `zoo build ENTRY --sample` makes a bundle of an entry.",
        )
    sides = _entry_recipe(a, plugins), _entry_recipe(b, plugins)
    return _of_entries(*sides, options, plugins, report), _after_entry(b.partition(":")[0], sides[1])


def _after_bundle(bundle: Bundle, options: Options) -> Next:
    checkpoint = "" if bundle.build.get("sample") else f" --checkpoint {options.checkpoint or 'DIR'}"
    return Next((f"zoo verify {bundle.directory}",), (f"zoo gate {bundle.directory}{checkpoint}",))


def _after_entry(name: str, side: EntryRecipe) -> Next:
    build = f"zoo build {name} --recipe {side.recipe}"
    return Next((f"zoo plan {name} --recipe {side.recipe}",), (build, "zoo gate BUNDLE"))


def _entry_recipe(text: str, plugins: Plugins) -> EntryRecipe:
    """Parse `ENTRY` or `ENTRY:RECIPE`.

    Raises:
        BadInput: when there is no such entry or recipe, or the text looks like something else.
    """
    name, _, recipe = text.partition(":")
    if not name.endswith(".toml") and ("/" in text or Path(text).exists()):
        raise BadInput(f"{text} is neither a bundle's folder nor an entry.", "`zoo list` shows the entries.")
    if name in plugins.recipes() and not recipe and name not in load_entries(plugins):
        raise BadInput(f"{name} is a recipe: two are compared on an entry.", f"Write it as ENTRY:{name}.")
    entry, _ = find_entry(name, plugins)
    return EntryRecipe(entry, find_recipe(recipe or entry.recipe, plugins).name)


def _of_bundles(a: Bundle, b: Bundle, options: Options, plugins: Plugins, report: Reporter) -> Difference:
    from coreai_zoo.review import diff as differences
    from coreai_zoo.review import structure

    backends = backend_of(a, plugins.backends()), backend_of(b, plugins.backends())
    with report.stage("read", f"{a.directory.name} and {b.directory.name}"):
        sides = structure.of_bundle(a, backends[0]), structure.of_bundle(b, backends[1])
        differences.require_comparable(*sides)
        contents = differences.Contents(
            *(structure.contents(side, backend) for side, backend in zip((a, b), backends, strict=True))
        )
    return differences.compare(*sides, contents, _numerics(a, b, options, plugins, report))


def _of_entries(a: EntryRecipe, b: EntryRecipe, options: Options, plugins: Plugins, report: Reporter) -> Difference:
    from coreai_zoo.review import diff as differences

    if options.checkpoint is not None:
        raise BadInput("--checkpoint is for two bundles: entries are compared without weights.")
    sides = _structure(a, plugins, report), _structure(b, plugins, report)
    differences.require_comparable(*sides)
    return differences.compare(*sides, None, _numerics_of_samples(a, b, options, plugins, report))


def _structure(side: EntryRecipe, plugins: Plugins, report: Reporter) -> Structure:
    from coreai_zoo.review import structure

    with report.stage("lower", f"{side.entry.name} as {side.recipe}, without weights"):
        return structure.of_entry(side.entry, plugins, recipe=side.recipe)


def _numerics_of_samples(
    a: EntryRecipe, b: EntryRecipe, options: Options, plugins: Plugins, report: Reporter
) -> Section:
    """Of two recipes of one entry: what they do to its sample."""
    from coreai_zoo.review import diff as differences

    if not options.numerics:
        return differences.numerics_missing("they were left out")
    if a.entry.name != b.entry.name:
        return differences.numerics_missing("two entries are two models, and no checkpoint is both")
    if a.entry.sample is None:
        return differences.numerics_missing(f"{a.entry.name} has no sample to run; build two bundles and compare them")
    with tempfile.TemporaryDirectory(prefix="zoo-diff-") as folder:
        one, other = (
            Bundle.open(build(request, plugins, report).path)
            for request in (
                BuildRequest(side.entry.name, sample=True, recipe=side.recipe, output=Path(folder) / letter)
                for letter, side in (("a", a), ("b", b))
            )
        )
        return _numerics(one, other, options, plugins, report)


def _of_revisions(
    side: EntryRecipe, revisions: Sequence[str], options: Options, plugins: Plugins, report: Reporter
) -> Difference:
    from coreai_zoo.review.revision import build_sample, worktree

    if side.entry.sample is None:
        raise BadInput(f"{side.entry.name} has no sample, and --rev builds it at both revisions.")
    labelled: list[str | None] = [*revisions, None][:2]
    bundles: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="zoo-diff-") as folder:
        for letter, revision in zip("ab", labelled, strict=True):
            label = revision or "the working tree"
            with report.stage("build", f"the sample of {side.entry.name} at {label}"), worktree(revision) as tree:
                bundles.append(build_sample(side.entry.name, side.recipe, tree, Path(folder) / letter, label))
        found = _of_bundles(Bundle.open(bundles[0]), Bundle.open(bundles[1]), options, plugins, report)
    labels = [f"{side.entry.name} sample at {revision or 'the working tree'}" for revision in labelled]
    return found.labelled(*labels)


# ---------------------------------------------------------------------------------------------------------------------
# Numerics
# ---------------------------------------------------------------------------------------------------------------------


def _numerics(a: Bundle, b: Bundle, options: Options, plugins: Plugins, report: Reporter) -> Section:
    """Run both bundles on the same tokens and judge both by the same oracle."""
    from coreai_zoo.gates import prompts, teacher_forced
    from coreai_zoo.gates.oracle import default_cache
    from coreai_zoo.review import diff as differences

    if not options.numerics:
        return differences.numerics_missing("they were left out")
    if _source(a) != _source(b):
        return differences.numerics_missing("they were built from different checkpoints")
    if options.checkpoint is None and not (a.build.get("sample") and b.build.get("sample")):
        return differences.numerics_missing("they are no samples; pass --checkpoint DIR")
    if a.build["layers"] != b.build["layers"]:
        return differences.numerics_missing("they have different numbers of layers")
    checkpoint = checkpoint_of(a, plugins, options.checkpoint)
    for bundle in (a, b):
        teacher_forced.check_checkpoint(bundle, checkpoint)
    count = min(options.positions, a.max_context, b.max_context)
    tokens = prompts.tokenize(a, prompts.cut(prompts.named_prompts([prompts.ANCHOR])[0], count)).tokens
    oracle = oracle_of(a, plugins, checkpoint, cache=default_cache()).run(tokens)
    one, other = (_run(bundle, tokens, oracle, plugins, report, letter) for bundle, letter in ((a, "A"), (b, "B")))
    of_sample = "the sample" if options.checkpoint is None else checkpoint.name
    return differences.compare_numerics(
        one,
        other,
        note=f"{count} positions of {of_sample}, both on this machine's runtime, the oracle Hugging Face in fp32",
    )


def _source(bundle: Bundle) -> Mapping[str, Any]:
    return {key: bundle.build["source"].get(key) for key in ("config_sha256", "files")}


def _run(
    bundle: Bundle, tokens: Sequence[int], oracle: Any, plugins: Plugins, report: Reporter, letter: str
) -> tuple[np.ndarray[Any, Any], Verdict]:
    from coreai_zoo.gates.candidate import AssetCandidate
    from coreai_zoo.gates.rule import judge

    with report.steps(f"run      {letter}, {len(tokens)} positions", len(tokens)) as step:
        logits = AssetCandidate(bundle, backend_of(bundle, plugins.backends()), step).run(tokens).logits
    return logits, judge(tokens, oracle.logits, logits)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def _print(found: Difference) -> None:
    click.echo(f"A  {found.a}\nB  {found.b}\n")
    for section in found.sections:
        if section.changes:
            table = new_table("", "A", "B", title=section.name)
            for change in section.changes:
                table.add_row(change.what, *("-" if side is None else side for side in (change.before, change.after)))
            print_table(table)
        elif section.missing:
            click.echo(f"{section.name}: not compared, {section.missing}")
        else:
            click.echo(f"{section.name}: no change")
        if section.note:
            click.echo(f"({section.note})")
        click.echo()
    click.echo(found.summary)
