"""The checks that a maintainer's CI runs on a change: entries, overlays, goldens, samples, stress samples, docs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from attrs import frozen

from coreai_zoo.build.chips import CHIPS
from coreai_zoo.build.design import design
from coreai_zoo.build.model import TooLittleStated
from coreai_zoo.build.pipeline import build
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.catalogue import load_entries
from coreai_zoo.disk import temporary_folder
from coreai_zoo.entry import Entry
from coreai_zoo.errors import CheckFailed, ZooError, did_you_mean, listing, near_names
from coreai_zoo.gates.run import GateOptions, failure, run_gate, write_report
from coreai_zoo.gates.stress import judge_all
from coreai_zoo.machine import cores
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.review.golden_metadata import golden_metadata_path, metadata_differences
from coreai_zoo.review.goldens import compare, made_of_sample, read, take, wanted, write


@frozen
class Outcome:
    """The outcome of one check.

    Attributes:
        name: name of the check.
        passed: None where there was nothing to check.
        detail: one line: what was found, or why it failed.
        seconds: how long it took.
    """

    name: str
    passed: bool | None
    detail: str
    seconds: float


@frozen
class Checks:
    """Everything that the checks need.

    Attributes:
        plugins: what is installed.
        folder: the repository.
        golden_folder: folder of the golden graphs.
        update_goldens: whether these are written instead of compared.
        report: of progress.
    """

    plugins: Plugins
    folder: Path
    golden_folder: Path
    update_goldens: bool
    report: Reporter

    def run(self, only: Sequence[str] = ()) -> Iterator[Outcome]:
        """Run the checks in their order; one that fails does not keep the others from running."""
        for name, check in CHECKS.items():
            if only and name not in only:
                continue
            started = time.monotonic()
            with self.report.stage(name):
                try:
                    detail, passed = check(self)
                except ZooError as error:
                    detail, passed = str(error), False
                self.report.note(detail)
            yield Outcome(name, passed, detail, time.monotonic() - started)


_Found = tuple[str, bool | None]


def _entries(self: Checks) -> _Found:
    """No plugin is broken, each entry file is valid, names what there is, and a bundle can be designed from it."""
    entries = load_entries(self.plugins)
    problems: list[str] = []
    silent: list[str] = []
    for entry, _ in entries.values():
        problems += [f"{entry.name}: {problem}" for problem in _strange_measurements(entry, self.plugins)]
        try:
            if entry.sample is not None:
                entry.sample_directory()
                design(BuildRequest(entry.name, sample=True, dry=True), self.plugins, entry)
            design(BuildRequest(entry.name, dry=True), self.plugins, entry)
        except ZooError as error:
            if isinstance(error, TooLittleStated) and entry.status == "unverified":
                silent.append(entry.name)
            else:
                problems.append(f"{entry.name}: {error}")
    _raise([*map(str, self.plugins.problems), *problems])
    unknown = f"; {listing(silent)} do not state every size" if silent else ""
    return f"{len(entries)} entries are valid{unknown}", True if entries else None


def _strange_measurements(entry: Entry, plugins: Plugins) -> Iterator[str]:
    """Names in an entry's published measurements that nothing has: what is told of them would be shown nowhere.

    A machine may be one that no table has, but not a misspelt one.
    """
    chips = [chip.name for chip in CHIPS]
    for measured in entry.published:
        for what, name, known in (
            ("recipe", measured.recipe, plugins.recipes()),
            ("contract", measured.contract or entry.contract, plugins.contracts()),
        ):
            if name not in known:
                yield f"published: There is no {what} {name!r}. {did_you_mean(name, known)}"
        if measured.machine not in chips and (near := near_names(measured.machine, chips, 1, 0.8)):
            yield f"published: No chip is called {measured.machine!r}. {near}"


def _overlays(self: Checks) -> _Found:
    """Exactly one plugin claims each architecture of each entry."""
    problems: list[str] = []
    known = len(self.plugins.problems)  # those of the entries' check
    claimed: dict[str, str] = {}
    for entry, _ in load_entries(self.plugins).values():
        for model_type in entry.model_type:
            try:
                overlay, plugin = self.plugins.claim_overlay(model_type, {"model_type": model_type}, of_entry=True)
                claimed[model_type] = f"{overlay.name} of {plugin}"
            except ZooError as error:
                problems.append(f"{model_type}: {error}")
    problems += [str(error) for error in self.plugins.problems[known:]]
    _raise(list(dict.fromkeys(problems)))
    return f"{len(claimed)} architectures, each claimed by one overlay", True if claimed else None


def _samples(self: Checks) -> _Found:
    """Every sample builds, verifies, and passes its gate."""
    problems: list[str] = []
    passed = 0
    with temporary_folder("zoo-check-") as folder:
        for name, entry in _with_samples(self.plugins).items():
            request = BuildRequest(entry.name, sample=True, output=folder)
            try:
                bundle = Bundle.open(build(request, self.plugins, Reporter(silent=True)).path)
                _require_golden_metadata(bundle, self.golden_folder)
                judge_sample(bundle, self.plugins)
                passed += 1
                self.report.note(f"{name}: gate passed")
            except ZooError as error:
                problems.append(f"{name}: {error}")
    _raise(problems)
    return f"{passed} samples build and pass their gates", True if passed else None


def _require_golden_metadata(bundle: Bundle, folder: Path) -> None:
    """Refuse metadata that is not as the golden file says; a repository without one has nothing to compare."""
    if golden_metadata_path(folder).is_file() and (problems := metadata_differences(bundle, folder)):
        raise CheckFailed(f"metadata.json: {listing(problems, 4)}.", f"{golden_metadata_path(folder)} has the reasons.")


def judge_sample(bundle: Bundle, plugins: Plugins) -> None:
    """Judge a bundle as `zoo gate` does without options, plugins' gates and the report included."""
    (record,) = run_gate([bundle], GateOptions(jobs=cores()), plugins, Reporter(silent=True))
    write_report(bundle, [record])
    if not record["verdict"]["passed"]:
        raise failure(bundle.directory.name, record["verdict"]["reasons"])


def _with_samples(plugins: Plugins) -> Mapping[str, Entry]:
    """The entries whose samples are looked at, by what to call each: one of all that make the same of a sample."""
    chosen: dict[tuple[object, str], tuple[str, Entry]] = {}
    for entry, _ in load_entries(plugins).values():
        if (sample := entry.sample) is not None:
            called = f"sample {PurePosixPath(sample.path).name} of {sample.package} as {entry.name}"
            chosen.setdefault((sample, made_of_sample(entry, plugins)), (called, entry))
    return dict(chosen.values())


def _stress(self: Checks) -> _Found:
    """Every stress sample keeps its bounds: each step of the arithmetic is right where a mistake cannot hide."""
    problems: list[str] = []
    passed = 0
    with temporary_folder("zoo-check-") as folder:
        for name, entry in _with_samples(self.plugins).items():
            for found in judge_all(entry, self.plugins, folder):
                if found.reasons:
                    reasons = listing([*found.reasons], 3)
                    problems.append(f"{name}, {found.sample.name} ({found.sample.reason}): {reasons}")
                    continue
                passed += 1
                self.report.note(f"{name}, {found.sample.name}: {len(found.verdict.positions)} positions passed")
    _raise(problems)
    return f"{passed} stress samples keep their bounds", True if passed else None


def _goldens(self: Checks) -> _Found:
    """The golden graphs are those that the code gives."""
    problems, equal = [], []
    for each in wanted(self.golden_folder, self.folder, self.plugins):
        found = take(each.entry, self.plugins, self.report.note, each.contract)
        if self.update_goldens:
            write(found, each.path)
        problems += [f"{each.path.name}: {problem}" for problem in compare(read(each.path), found)]
        equal.append(each.path.name)
    if problems:
        raise CheckFailed(
            f"{listing(problems, 6)}.",
            "If that is meant, write them with `zoo check --only goldens --update-goldens` and say why.",
        )
    if not equal:
        return f"no entry with a sample asks for a golden graph, and {self.golden_folder} has none", None
    verb = "written" if self.update_goldens else "equal"
    return f"{len(equal)} golden graphs {verb}", True


def _docs(self: Checks) -> _Found:
    """The repository's own tests of its documentation pass."""
    tests = self.folder / "tests" / "test_docs.py"
    if not tests.is_file():
        return "there is no tests/test_docs.py here", None
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(tests)],
        cwd=self.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.strip().splitlines()[-1:] or ["pytest printed nothing"]
    if done.returncode != 0:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise CheckFailed(f"{listing(failed or last, 3)}.", f"Run pytest {tests} to see why.")
    return last[0].strip("= "), True


CHECKS: Mapping[str, Callable[[Checks], _Found]] = {
    "entries": _entries,
    "overlays": _overlays,
    "goldens": _goldens,
    "samples": _samples,
    "stress": _stress,
    "docs": _docs,
}
"""The checks by name, in their order."""


def _raise(problems: list[str]) -> None:
    if problems:
        raise CheckFailed("; ".join(problem.removesuffix(".") for problem in problems) + ".")
