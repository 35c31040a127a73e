"""A build may die at any moment: the next one goes on from there, ends with the same bytes, and nothing is left over.

Each chain kills one build again and again, each time further on, and then lets it finish. Where: at file operations,
which are what a kill can fall between; after cutting off the end of the file that was being written, which is what a
kill inside of a write leaves; and at times while the toolchain lowers, where Python sees no operations.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest

from checkpoints import tiny_checkpoint
from coreai_zoo.weights.store import JOURNAL, WeightStore
from killing import Job, Outcome, run
from suite import NIGHTLY

NAME = "qwen3_6_27b_custom_decode_int8hu_block32_sym"
CHAINS = 7
# By day the one that is also killed while the toolchain writes, and the one that is when the bundle is in its place.
RUN = range(CHAINS) if NIGHTLY else (4, 6)


@attrs.frozen
class Undisturbed:
    """A build that nothing happened to: its files, and how many file operations it took until all weights were there,
    and from then on.
    """

    files: dict[str, bytes]
    tensors: int
    weights: int
    from_bundle: int


@attrs.frozen
class Place:
    """Where a chain builds."""

    checkpoint: Path
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "it's out"  # a name that a shell has to quote

    @property
    def arguments(self) -> list[str]:
        where = ["--checkpoint", str(self.checkpoint), "-o", str(self.output)]
        return ["build", "qwen3.6-27b", "--custom", *where, "--json"]

    @property
    def partial(self) -> Path:
        return self.output / f".{NAME}.partial"

    @property
    def lock(self) -> Path:
        """What a build writes to when it begins, just before it lowers."""
        return self.output / f".zoo-lock-{NAME}"

    def run(self, **kill: object) -> Outcome:
        self.folder.mkdir(exist_ok=True)
        return run(Job(self.arguments, str(self.folder / "log"), str(self.output), **kill))  # type: ignore[arg-type]

    def log(self, suffix: str) -> str:
        return (self.folder / f"log{suffix}").read_text()

    def finished(self) -> int:
        """How many tensors the weight stores on disk vouch for."""
        lines = [file.read_text(errors="replace") for file in self.output.rglob(JOURNAL)]
        names = set(re.findall(r'"name":"([^"@]+)"', "".join(lines)))
        stores = [WeightStore(file.parent) for file in self.output.rglob(JOURNAL)]
        return sum(name in store for store in stores for name in names)

    def left_over(self) -> list[str]:
        return sorted(path.name for path in self.output.iterdir() if path.name != NAME)

    def bundle(self) -> dict[str, bytes]:
        return contents(self.output / NAME)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("resume") / "checkpoint")


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    place = Place(checkpoint, tmp_path_factory.mktemp("undisturbed"))
    outcome = place.run(after="tokenizer")
    assert outcome.status == 0, place.log(".err")
    weights = json.loads(place.log(".out"))["weights"]
    assert weights["reused"] == 0
    return Undisturbed(place.bundle(), weights["computed"], outcome.before, outcome.operations)


def kills_of(chain: int, place: Place, whole: Undisturbed) -> Iterator[dict[str, object]]:
    """Where the builds of a chain are killed; the chains together cover the whole build."""
    first = whole.weights * (chain + 1) // (CHAINS + 2)
    yield {"survive": first, "tear": chain % 2 == 1}
    # Of the next, which have fewer tensors left: at their very first operations, and somewhat further on.
    yield {"survive": chain, "tear": chain % 2 == 0}
    yield {"survive": 11 + 9 * chain, "tear": chain % 2 == 1}
    lowering = {0: 0.02, 3: 0.1, 4: 0.3, 5: 0.2}  # the decoder is traced by then
    if chain in lowering:
        yield {"written_to": str(place.lock), "seconds": lowering[chain]}
    # The tokenizer, the renames that move the bundle and the journal, then the removal of the journal; a build that did
    # not make the work directory does not remove it, so the last operations are fewer.
    late = [0, 4, 11, 12, 13, whole.from_bundle // 2, whole.from_bundle - 6][chain]
    yield {"after": "tokenizer", "survive": late, "tear": chain % 3 == 1}


def run_chain(chain: int, place: Place, whole: Undisturbed) -> int:
    """Kill builds, finish one, check it; how many were killed."""
    killed = finished = 0
    for kill in kills_of(chain, place, whole):
        outcome = place.run(**kill)
        assert outcome.status == -signal.SIGKILL, (kill, outcome, place.log(".err"))
        killed += 1
        in_place = (place.output / NAME).exists()
        # What one build finished, the next did not lose; a line that was torn is one tensor.
        assert in_place or place.finished() >= finished - bool(kill.get("tear")), (kill, outcome)
        finished = place.finished()
    final = place.run()
    if in_place:
        assert final.status == 0 and json.loads(place.log(".out"))["preflight"] is None, (chain, outcome)
    else:
        assert final.status == 0, (chain, outcome, place.log(".err"))
        weights = json.loads(place.log(".out"))["weights"]
        assert weights == {"computed": whole.tensors - finished, "reused": finished}, (chain, outcome)
    assert place.bundle() == whole.files, (chain, outcome)
    assert place.left_over() == [], (chain, outcome)
    return killed


@pytest.mark.slow
def test_a_build_killed_anywhere_goes_on_to_the_same_bytes(
    checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    assert undisturbed.weights > 100 and undisturbed.from_bundle > 20

    def killed_in(chain: int) -> int:
        return run_chain(chain, Place(checkpoint, tmp_path / str(chain)), undisturbed)

    with ThreadPoolExecutor(2) as pool:
        killed = sum(pool.map(killed_in, RUN))
    assert killed >= (30 if NIGHTLY else 9)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["weights", "verify"])
def test_an_interrupted_build_says_how_to_resume_and_does(
    checkpoint: Path, tmp_path: Path, undisturbed: Undisturbed, stage: str
) -> None:
    place = Place(checkpoint, tmp_path / "build")
    if stage == "weights":
        outcome = place.run(survive=undisturbed.weights * 2 // 3, signal=int(signal.SIGINT))
    else:
        outcome = place.run(after="tokenizer", survive=5, signal=int(signal.SIGINT))

    assert outcome.status == 130
    said = place.log(".err").splitlines()
    assert "Finished weights are kept. To resume, run:" in said
    command = said[said.index("Finished weights are kept. To resume, run:") + 1]
    assert shlex.split(command) == ["zoo", *place.arguments]
    assert not any("Traceback" in line for line in said)
    assert place.left_over() == [f".{NAME}.partial"]
    finished = place.finished()
    assert 0 < finished < undisturbed.tensors if stage == "weights" else finished == undisturbed.tensors

    assert place.run().status == 0
    assert json.loads(place.log(".out"))["weights"]["reused"] == finished
    assert place.bundle() == undisturbed.files
    assert place.left_over() == []
