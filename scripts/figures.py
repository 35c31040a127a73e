"""Measure the figures that README.md and docs/ state, and write them where they stand.

Usage: python scripts/figures.py                       before a release; takes some twenty minutes
       python scripts/figures.py --check [BUNDLE ...]  compare what follows from the code and from bundles of samples

A figure stands between `<!-- figure: NAME -->` and `<!-- end -->`. With --check nothing is written, and the exit code
is 1 if a figure differs. What the machine decides (times, rates, memory) is not compared then.

Not from here: sizes, times and memory of models of true size are those of benchmarks/README.md, which
benchmarks/bench.py prints; the outputs of the tutorial are written by scripts/tutorial.py.
"""

from __future__ import annotations

import functools
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coreai_zoo.plugins import default_plugins

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"(?<=<!-- figure: )(?P<name>[\w-]+) -->(?P<text>.*?)(?=<!-- end -->)", re.DOTALL)

ENTRIES = ("qwen3.6-27b", "qwen3.6-35b-a3b")
CORPUS_POSITIONS = 1024
COLUMNS = (
    "entry",
    "recipe",
    "`main.mlirb`",
    "argmax",
    "lowest cosine",
    "median cosine",
    "median max abs logit error",
    "largest KL",
    "mean KL, running text",
)
CORE_ML_COLUMNS = ("entry", "recipe", "`weight.bin`", *COLUMNS[3:-1])


def zoo(*arguments: object, codes: Sequence[int] = (0,)) -> str:
    """What `zoo` prints on stdout.

    Raises:
        SystemExit: when its exit code is none of `codes`.
    """
    return run("-m", "coreai_zoo", *arguments, codes=codes).stdout


def run(*arguments: object, codes: Sequence[int] = (0,)) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in the root of the repository; raises as `zoo`."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}exit code {done.returncode}")
    return done


# ---------------------------------------------------------------------------------------------------------------------
# What follows from the code
# ---------------------------------------------------------------------------------------------------------------------


def mistakes() -> str:
    """How many mistakes in porting the gate is tested with."""
    sys.path.insert(0, str(ROOT / "tests"))
    from mutants import MUTANTS

    return str(len(MUTANTS))


def sample_parameters() -> str:
    """Parameters of the sample of the first entry, in millions."""
    from coreai_zoo.build.design import design
    from coreai_zoo.build.request import BuildRequest
    from coreai_zoo.plugins import default_plugins

    sample = design(BuildRequest(ENTRIES[0], sample=True, dry=True), default_plugins())
    return f"{sample.weights.parameters / 1e6:.1f} million"


def planned(what: str) -> str:
    """What a build of the first entry at true size reads or writes, in GiB."""
    return f"{_plan()['build'][what] / 2**30:.0f} GiB"


@functools.cache
def _plan() -> Any:
    return json.loads(zoo("plan", ENTRIES[0], "--json"))


KNOWN: Mapping[str, Callable[[], str]] = {
    "mistakes": mistakes,
    "sample-parameters": sample_parameters,
    "bytes-read": lambda: planned("read"),
    "bytes-written": lambda: planned("written"),
}

# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def demo() -> str:
    """What `make demo` prints."""
    done = run("-c", "import sys; sys.argv[1:] = ['qwen3.6-27b']; from coreai_zoo.cli.demo import demo; demo()")
    return f"\n\n```\n{done.stderr}{done.stdout.rstrip()}\n```\n\n"


def costs() -> str:
    """The table of what each recipe costs on the samples."""
    return table(
        COLUMNS,
        (
            (*row_of(entry, recipe, bundle), *judged(bundle, "coreai"), running_text(bundle))
            for entry, recipe, bundle in bundles("coreai")
        ),
    )


def core_ml_costs() -> str:
    """The table of each recipe that a Core ML package can hold."""
    rows = []
    for entry, recipe, bundle in bundles("coreml"):
        (weights,) = bundle.rglob("weight.bin")
        rows.append((entry, f"`{recipe}`", f"{weights.stat().st_size:,}", *judged(bundle, "mil")))
    return table(CORE_ML_COLUMNS, rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ("---",) * len(columns), *rows))


def bundles(backend: str) -> Iterator[tuple[str, str, Path]]:
    """Entry, recipe and bundle of every sample by every recipe that a backend writes, each there until the next."""
    for entry in ENTRIES:
        for recipe in default_plugins().recipes():
            with tempfile.TemporaryDirectory(prefix="figures-") as folder:
                options = ("--sample", "--recipe", recipe, "--backend", backend, "-o", folder, "--json")
                made = run("-m", "coreai_zoo", "build", entry, *options, codes=(0, 2))
                if made.returncode == 0:
                    yield entry, recipe, Path(json.loads(made.stdout)["path"])
                elif "does not write" not in made.stderr:
                    raise SystemExit(made.stderr)


def judged(bundle: Path, candidate: str) -> tuple[str, ...]:
    """The cells of a row that a gate on one prompt fills. A coarse recipe may fail it."""
    options = ("--prompts", "code", "--positions", 64, "--candidate", candidate, "--no-control", "--json")
    (prompt,) = json.loads(zoo("gate", bundle, *options, codes=(0, 1)))["prompts"]
    positions = prompt["positions"]
    verdicts = [position["verdict"] for position in positions]
    cosines = [position["cosine"] for position in positions]
    return (
        f"{verdicts.count('match')} of {len(positions)}, {verdicts.count('tie')} ties, {verdicts.count('FLIP')} flips",
        f"{min(cosines):.6f}",
        f"{np.median(cosines):.6f}",
        f"{np.median([position['max_abs_logit_error'] for position in positions]):.3f}",
        f"{max(position['kl_divergence'] for position in positions):.1e}",
    )


def running_text(bundle: Path) -> str:
    """The mean KL divergence over running text in PyTorch, with half the width of its 95 % interval."""
    options = ("--corpus", "builtin", "--positions", CORPUS_POSITIONS, "--candidate", "torch", "--no-control", "--json")
    mean = json.loads(zoo("gate", bundle, *options, codes=(0, 1)))["corpus"]["kl_mean"]
    return f"{mean['value']:.2e} ± {(mean['high'] - mean['low']) / 2:.0e}"


def row_of(entry: str, recipe: str, bundle: Path) -> tuple[str, str, str]:
    """The cells of that row which no gate is needed for."""
    (bytecode,) = bundle.glob("*.aimodel/main.mlirb")
    return entry, f"`{recipe}`", f"{bytecode.stat().st_size:,}"


def check_minutes() -> str:
    """How long one core takes for `zoo check`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    zoo("check")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return f"{(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60:.0f} minutes of one core"


MEASURED: Mapping[str, Callable[[], str]] = {
    "demo": demo,
    "costs": costs,
    "core-ml-costs": core_ml_costs,
    "check-minutes": check_minutes,
}

# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------


def places() -> Iterator[tuple[Path, str, str]]:
    """Page, name and text of every figure.

    Raises:
        SystemExit: when a name is not known, or a figure stands nowhere.
    """
    found = [
        (page, place["name"], place["text"]) for page in PAGES for place in PLACE.finditer(page.read_text("utf-8"))
    ]
    differing = {name for _, name, _ in found} ^ {*KNOWN, *MEASURED}
    if differing:
        raise SystemExit(f"not known, or stated nowhere: {', '.join(sorted(differing))}")
    yield from found


def differences(bundles: Sequence[Path]) -> list[str]:
    """What a page states otherwise than the code and these bundles of samples say, one line each."""
    stated = {name: (page, text) for page, name, text in places()}
    expected = [(name, [value()]) for name, value in KNOWN.items()]
    for bundle in bundles:
        record: Mapping[str, Any] = json.loads((bundle / "build.json").read_text("utf-8"))
        entry, recipe = record["entry"]["name"], record["recipe"]["name"]
        expected.append(("costs", [f"| {' | '.join(row_of(entry, recipe, bundle))} |"]))
        if (entry, recipe) == (ENTRIES[0], "int8hu"):
            total = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
            expected.append(("demo", [f"bytes               {total:,}\n", f"weights  {tensors(record)} tensors as"]))
    return [
        f"{stated[name][0].name}: {name} is {text.strip()!r}"
        for name, texts in expected
        for text in texts
        if (text not in stated[name][1] if name in MEASURED else text != stated[name][1])
    ]


def tensors(record: Mapping[str, Any]) -> int:
    """How many tensors the record of a build counts."""
    return sum(role["tensors"] for role in record["weights"].values())


def write() -> None:
    """Measure every figure and write it wherever it stands."""
    names = {name for _, name, _ in places()}
    values = {name: value() for name, value in {**KNOWN, **MEASURED}.items() if name in names}
    for page in PAGES:
        before = page.read_text("utf-8")
        after = PLACE.sub(lambda place: f"{place['name']} -->{values[place['name']]}", before)
        if after != before:
            page.write_text(after, "utf-8")


def main(arguments: Sequence[str]) -> int:
    """Write, or compare; the exit code."""
    if not arguments:
        write()
        return 0
    if arguments[0] != "--check":
        print(__doc__, file=sys.stderr)
        return 2
    found = differences([Path(each) for each in arguments[1:]])
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
