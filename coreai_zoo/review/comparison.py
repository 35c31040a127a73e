"""What `zoo diff` compares: two bundles, two entries or recipes, or the sample of an entry at two revisions.

`diff` puts two structures side by side. Here they are found, built where they have to be, and run; `verdict` says what
the difference comes to.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, frozen

from coreai_zoo.backend import read_prompt
from coreai_zoo.build.pipeline import build
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import checkpoint_of, named_bundle
from coreai_zoo.bundle.verify import backend_of
from coreai_zoo.catalogue import find_entry, find_recipe, is_file, load_entries, recipe_path
from coreai_zoo.disk import temporary_folder
from coreai_zoo.engine import PREFILL
from coreai_zoo.entry import Entry, load_entry
from coreai_zoo.errors import BadInput, ZooError, zoo_command
from coreai_zoo.gates.run import margin_of_asset, oracle_of
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.review import diff, structure
from coreai_zoo.review.diff import Computed, Difference, Section, numerics_missing
from coreai_zoo.review.revision import build_sample, repository, worktree
from coreai_zoo.review.structure import Structure
from coreai_zoo.review.verdict import ChangeVerdict, Next, judge

_AFTER_CODE = Next(
    verify=("zoo check --only samples",),
    gate=("zoo check --only samples",),
    goldens=("zoo check --only goldens --update-goldens",),
    beyond=("zoo check --only goldens",),
)


@frozen
class Comparison:
    """Everything that differs between A and B, and what that comes to."""

    difference: Difference
    verdict: ChangeVerdict


@frozen
class EntryRecipe:
    """An entry under one recipe: `ENTRY` or `ENTRY:RECIPE` on the command line, where it was called `name`.

    Attributes:
        recipe: the recipe by its name, or the path of its file.
    """

    name: str
    entry: Entry
    recipe: str

    @property
    def subject(self) -> str:
        """What builds it, from any folder: the name of the entry, or the path of its file."""
        return str(Path(self.name).resolve()) if self.name.endswith(".toml") else self.entry.name


@frozen
class Comparer:
    """Compares two bundles, two entries or recipes, or two revisions of the code.

    Attributes:
        plugins: what is installed.
        report: of progress.
        checkpoint: what two bundles are run on; None for the checkpoint of their sample.
        positions: how many tokens are run.
        numerics: whether anything is run; without, graph and weights alone are compared.
        contract: by which entries are compared; None for their own.
    """

    plugins: Plugins
    report: Reporter
    checkpoint: Path | None
    positions: int
    numerics: bool
    contract: str | None = None

    def compare(self, a: str, b: str) -> Comparison:
        """Compare two bundles, by their folders or names, or two entries, each `ENTRY` or `ENTRY:RECIPE`.

        `:RECIPE` alone is another recipe of A's entry.

        Raises:
            BadInput: when one is neither, or nothing of one corresponds to anything of the other.
        """
        if b.startswith(":"):
            b = a.partition(":")[0] + b
        entries = load_entries(self.plugins)
        folders = [None if name in entries else _bundle_folder(name) for name in (a, b)]
        if any(folders):  # beside a bundle, the name of an entry means its bundle
            folders = [folder or _bundle_folder(name) for folder, name in zip(folders, (a, b), strict=True)]
        first, second = folders
        if self.contract is not None and (first or second):
            raise BadInput("--contract is for entries: a bundle was built by its own.")
        if first and second:
            one, other = Bundle.open(first), Bundle.open(second)
            found = self._of_bundles(one, other)
            return Comparison(found, judge(found, self._after_bundle(other)))
        if first or second:
            bundle, entry = (a, b) if first else (b, a)
            raise BadInput(
                f"{bundle} is a bundle and {entry} is none: they cannot be compared.",
                "Give two bundles, or two entries; `zoo build ENTRY --sample` makes a bundle of an entry.",
            )
        sides = self._entry_recipe(a), self._entry_recipe(b)
        found = self._of_entries(*sides)
        return Comparison(found, judge(found, self._after_entry(sides[1])))

    def compare_revisions(self, entry: str, revisions: Sequence[str]) -> Comparison:
        """Compare the sample of `ENTRY` or `ENTRY:RECIPE` as two revisions of the code build it.

        Args:
            entry: the entry, with or without a recipe.
            revisions: two, or one that the working tree is compared with.

        Raises:
            BadInput: when there is no such sample or revision, or the code there does not build it.
        """
        side = self._entry_recipe(entry)
        name = side.entry.name
        if side.entry.sample is None:
            raise BadInput(f"{name} has no sample, and --rev builds it at both revisions.")
        commits: list[str | None] = [*revisions, None][:2]
        labels = [commit or "the working tree" for commit in commits]
        bundles: list[Bundle] = []
        entries: list[Mapping[str, Any]] = []
        with temporary_folder("zoo-diff-") as folder:
            for letter, commit, label in zip("ab", commits, labels, strict=True):
                with self.report.stage("build", f"the sample of {name} at {label}"), worktree(commit) as tree:
                    built = build_sample(
                        side.subject,
                        side.recipe,
                        tree,
                        folder / letter,
                        label,
                        self.plugins,
                        contract=self.contract,
                    )
                    bundles.append(Bundle.open(built))
                    entries.append({} if side.subject.endswith(".toml") else self._entry_in(tree, side.entry))
            found = self._of_bundles(*bundles)
            contract = bundles[1].build["contract"]["name"]
        if all(entries):
            found = evolve(found, sections=(diff.of_entry_files(*entries), *found.sections))
        found = evolve(found, a=f"{name} sample at {labels[0]}", b=f"{name} sample at {labels[1]}")
        after = evolve(_AFTER_CODE, unseen=f"; it was compared by contract {contract} and by no other")
        return Comparison(found, judge(found, after))

    def _entry_in(self, tree: Path, entry: Entry) -> Mapping[str, Any]:
        """What the file of an installed entry says in a tree; nothing where it is not there, or not to be read."""
        top = repository().resolve()
        for _, path in self.plugins.entries():
            with contextlib.suppress(ZooError):
                if path.resolve().is_relative_to(top) and load_entry(path).name == entry.name:
                    there = load_entry(tree / path.resolve().relative_to(top))
                    return structure.flattened(json.loads(json.dumps(asdict(there), default=str)), ".")
        return {}

    # -- the two sides

    def _entry_recipe(self, text: str) -> EntryRecipe:
        name, _, recipe = text.partition(":")
        if not name.endswith(".toml") and ("/" in name or Path(text).exists()):
            raise BadInput(f"{text} is neither a bundle's folder nor an entry.", "`zoo list` shows the entries.")
        if name in self.plugins.recipes() and not recipe and name not in load_entries(self.plugins):
            raise BadInput(f"{name} is a recipe: two are compared on an entry.", f"Write it as ENTRY:{name}.")
        entry, _ = find_entry(name, self.plugins)
        recipe = recipe or entry.recipe
        find_recipe(recipe, self.plugins)
        # Other revisions of the code run in their own folder.
        return EntryRecipe(name, entry, str(recipe_path(recipe).resolve()) if is_file(recipe) else recipe)

    def _of_bundles(self, a: Bundle, b: Bundle) -> Difference:
        backends = [backend_of(bundle, self.plugins.backends()) for bundle in (a, b)]
        with self.report.stage("read", f"{a.directory.name} and {b.directory.name}"):
            sides = structure.of_bundle(a, backends[0]), structure.of_bundle(b, backends[1])
            diff.require_comparable(*sides)
            contents = diff.Contents(structure.contents(a, backends[0]), structure.contents(b, backends[1]))
        return diff.compare(*sides, contents, self._numerics(a, b))

    def _of_entries(self, a: EntryRecipe, b: EntryRecipe) -> Difference:
        if self.checkpoint is not None:
            raise BadInput("--checkpoint is for two bundles: entries are compared without weights.")
        sides = self._structure(a), self._structure(b)
        diff.require_comparable(*sides)
        return diff.compare(*sides, None, self._numerics_of_samples(a, b))

    def _structure(self, side: EntryRecipe) -> Structure:
        with self.report.stage("lower", f"{side.entry.name} as {side.recipe}, without weights"):
            return structure.of_entry(side.entry, self.plugins, recipe=side.recipe, contract=self.contract)

    def _after_bundle(self, bundle: Bundle) -> Next:
        checkpoint = () if bundle.build.get("sample") else ("--checkpoint", self.checkpoint or "DIR")
        folder = bundle.directory
        return Next((zoo_command("verify", folder),), (zoo_command("gate", folder, *checkpoint),))

    def _after_entry(self, side: EntryRecipe) -> Next:
        name = Path(side.name) if side.name.endswith(".toml") else side.name
        contract = ("--contract", self.contract) if self.contract is not None else ()
        what = name, "--recipe", side.recipe, *contract
        return Next((zoo_command("plan", *what),), (zoo_command("build", *what), "zoo gate BUNDLE"))

    # -- what they compute

    def _numerics_of_samples(self, a: EntryRecipe, b: EntryRecipe) -> Section:
        """What two recipes do to the sample of one entry."""
        if not self.numerics:
            return numerics_missing("they were left out")
        if a.entry.name != b.entry.name:
            return numerics_missing("two entries are two models, and no checkpoint is both")
        if a.entry.sample is None:
            return numerics_missing(f"{a.entry.name} has no sample to run; build two bundles and compare them")
        bundles: list[Bundle] = []
        with temporary_folder("zoo-diff-") as folder:
            for letter, side in (("a", a), ("b", b)):
                request = BuildRequest(
                    side.subject,
                    sample=True,
                    recipe=side.recipe,
                    contract=self.contract,
                    output=folder / letter,
                )
                bundles.append(Bundle.open(build(request, self.plugins, self.report).path))
            return self._numerics(*bundles)

    def _numerics(self, a: Bundle, b: Bundle) -> Section:
        """Run both bundles on the same tokens and judge both by the same oracle."""
        from coreai_zoo.gates import prompts, teacher_forced
        from coreai_zoo.gates.oracle import default_cache

        if not self.numerics:
            return numerics_missing("they were left out")
        if _source(a) != _source(b):
            return numerics_missing("they were built from different checkpoints")
        if self.checkpoint is None and not (a.build.get("sample") and b.build.get("sample")):
            return numerics_missing("they are no samples; pass --checkpoint DIR")
        if a.build["layers"] != b.build["layers"]:
            return numerics_missing("they have different numbers of layers")
        checkpoint = checkpoint_of(a, self.plugins, self.checkpoint)
        for bundle in (a, b):
            teacher_forced.check_checkpoint(bundle, checkpoint)
        count = min(self.positions, a.max_context, b.max_context)
        anchor = prompts.cut(prompts.named_prompts([prompts.ANCHOR])[0], count)
        tokens = prompts.tokenize(a, anchor, checkpoint).tokens
        oracle = oracle_of(a, self.plugins, checkpoint, cache=default_cache()).run(tokens)
        twice = all(PREFILL in bundle.functions for bundle in (a, b))
        one, other = (
            self._run(bundle, checkpoint, tokens, oracle, letter, twice=twice)
            for bundle, letter in ((a, "A"), (b, "B"))
        )
        of_sample = "the sample" if self.checkpoint is None else checkpoint.name
        ran = f"{count} positions of {of_sample}" + (f", token by token and by {PREFILL}" if twice else "")
        return diff.compare_numerics(
            one, other, note=f"{ran}, both on this machine's runtime, the oracle Hugging Face in fp32"
        )

    def _run(
        self, bundle: Bundle, checkpoint: Path, tokens: Sequence[int], oracle: Any, letter: str, *, twice: bool
    ) -> Computed:
        from coreai_zoo.gates import rule
        from coreai_zoo.gates.candidate import AssetCandidate

        backend = backend_of(bundle, self.plugins.backends())
        with self.report.steps(f"run      {letter}, {len(tokens)} positions", len(tokens)) as step:
            logits = AssetCandidate(bundle, backend, step).run(tokens).logits
        margin = margin_of_asset(bundle, self.plugins, checkpoint)
        verdict = rule.judge(tokens, oracle.logits, logits, sure_from=margin)
        if not twice:
            return Computed(logits, verdict)
        with (
            self.report.stage("run", f"{letter}, {len(tokens)} positions at once"),
            backend.stepper(bundle.asset, bundle.functions, capacity=len(tokens)) as stepper,
        ):
            last = read_prompt(stepper, bundle.functions, tokens)
            states = {state.name: stepper.state(state.name) for state in bundle.signature.states}
        return Computed(logits, verdict, {"the last token's logits": last, **states})


def _bundle_folder(name: str) -> Path | None:
    """The folder of the bundle `name`; None where that is no bundle."""
    found = named_bundle(name)
    return found if found is not None and found.is_dir() else None


def _source(bundle: Bundle) -> Mapping[str, Any]:
    return {key: bundle.build["source"].get(key) for key in ("config_sha256", "files")}
