"""`zoo bench` measures what it says, and what it prints is what an entry may hold."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from command import zoo
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.bundle.bench import bench
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.entry import Published, load_entry
from coreai_zoo.json_files import write_json
from coreai_zoo.machine import operating_system, peak_memory, processor
from coreai_zoo.progress import Reporter
from coreai_zoo.toml_files import toml_lines
from shared import Shared
from test_contracts import build

DENSE = "qwen3.6-27b"
LOADS = (9.0, 2.0, 3.0)
STEPS = (0.5, 0.25, 0.125)


class Clocked:
    """A stepper by whose calls a clock goes on: so many seconds for each token."""

    def __init__(self, clock: list[float], width: int, seconds: float) -> None:
        self._clock, self._width, self._seconds = clock, width, seconds
        self.read: list[int] = []

    def step(self, token: int) -> np.ndarray[Any, Any]:
        self._clock[0] += self._seconds
        self.read.append(token)
        logits = np.zeros(self._width, np.float16)
        logits[len(self.read)] = 1
        return logits

    def call(self, function: str, tokens: Sequence[int]) -> np.ndarray[Any, Any] | None:
        raise AssertionError("there is one function")

    def reset(self, unwritten: float = 0.0) -> None:
        raise AssertionError("a stepper that was just loaded needs no reset")

    def state(self, name: str) -> np.ndarray[Any, Any]:
        raise AssertionError("nobody looks")

    def reserve(self, capacity: int) -> None:
        raise AssertionError("there was room for all of it")


@pytest.fixture
def clocked(built: Callable[[str, str], Bundle], monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle, list[Clocked]]:
    """A bundle whose runtime takes the seconds of `LOADS` and `STEPS`, run by run, and the steppers of these runs."""
    bundle = built(DENSE, "int8hu")
    clock, steppers = [100.0], list[Clocked]()
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    @contextlib.contextmanager
    def stepper(_self: object, _asset: Path, _functions: object, capacity: int) -> Iterator[Clocked]:
        assert capacity == 5 + 9
        run = len(steppers)
        clock[0] += LOADS[run]
        steppers.append(Clocked(clock, int(bundle.signature.outputs[0].shape[-1]), STEPS[run]))
        yield steppers[run]
        clock[0] += 1000  # what comes after belongs to no figure

    monkeypatch.setattr(CoreAIBackend, "stepper", stepper)
    return bundle, steppers


@pytest.mark.slow
def test_every_figure_is_of_its_own_part_of_a_run(clocked: tuple[Bundle, list[Clocked]]) -> None:
    bundle, steppers = clocked
    measured = bench(bundle, CoreAIBackend(), 5, 9, 3, Reporter(silent=True))
    assert [run.load for run in measured.runs] == list(LOADS)
    assert [run.first_token for run in measured.runs] == [5 * seconds for seconds in STEPS]
    assert [run.prefill_rate for run in measured.runs] == [1 / seconds for seconds in STEPS]
    assert [run.decode_rate for run in measured.runs] == [1 / seconds for seconds in STEPS]
    assert measured.median(lambda run: run.load) == 3 and measured.spread(lambda run: run.load) == (2, 9)
    # The same prompt each time, and then what was most probable after each token.
    assert len({tuple(stepper.read) for stepper in steppers}) == 1
    assert steppers[0].read[5:] == [5, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.slow
def test_what_is_printed_are_medians_with_the_least_and_the_largest(clocked: tuple[Bundle, list[Clocked]]) -> None:
    bundle, _ = clocked
    result = zoo("bench", bundle.directory, "-p", 5, "-g", 9)
    assert result.exit_code == 0, result.output
    rows = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    assert rows["load"] == ["load", "3", "2", "9", "s"]
    assert rows["first token"] == ["first", "token", "1.25", "0.625", "2.5", "s"]
    assert rows["decode"] == ["decode", "4", "2", "8", "tokens/s"]
    assert f"llm-benchmark --model {bundle.directory} -p 5 -g 9 -n 3" in result.stdout
    # Here an interpreter runs it: it says so, and offers nothing to be published.
    assert "say nothing about a Mac" in result.stdout and "[[published]]" not in result.stdout
    assert "Nothing for an entry's file: a sample, not the model." in result.stdout


@pytest.mark.slow
def test_what_json_has_can_be_pasted_into_the_file_of_an_entry(
    built: Callable[[str, str], Bundle], root: Path, tmp_path: Path
) -> None:
    bundle = built(DENSE, "int8hu")
    result = zoo("bench", bundle.directory, "-p", 3, "-g", 3, "-n", 2, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    source = root / "zoo_entries" / f"{DENSE}.toml"
    pasted = tmp_path / source.name
    pasted.write_text(f"{source.read_text(encoding='utf-8')}\n{told['published_toml']}", encoding="utf-8")
    *others, mine = load_entry(pasted).published
    assert tuple(others) == load_entry(source).published
    assert mine == Published(**told["published"])
    assert (mine.recipe, mine.contract, mine.prompt_tokens) == ("int8hu", "static-s1", 3)
    assert mine.asset_bytes is None  # nobody is to compare it with the model's
    assert mine.note == "a sample, not the model, by an interpreter, which says nothing about a Mac"
    assert told["interpreted"] is True
    assert mine.system == operating_system() and processor() in {mine.machine, f"Apple {mine.machine}"}
    assert "coreai-core " in str(mine.versions) and "coreai-zoo " in str(mine.versions)
    assert mine.peak_memory == told["peak_memory"]
    assert [sorted(run) for run in told["runs"]] == 2 * [["decode", "first_token", "load", "prefill"]]
    assert mine.decode == pytest.approx(told["medians"]["decode"], rel=1e-3)
    assert told["medians"]["load"] == pytest.approx(sum(run["load"] for run in told["runs"]) / 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "note"),
    [
        ({"sample": False}, None),
        ({"sample": False, "whole_layers": 64}, "a slice, not the model"),
        ({"sample": False, "entry": None}, "built from no entry, not the model"),
        ({"sample": False, "recipe": {"name": "int8hu", "installed": False}}, "built by a recipe file, not the model"),
    ],
)
def test_on_a_real_runtime_what_is_the_model_can_be_published(
    clocked: tuple[Bundle, list[Clocked]],
    record: dict[str, object],
    note: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, _ = clocked
    bundle = tmp_path / source.directory.name
    shutil.copytree(source.directory, bundle)
    write_json(bundle / "build.json", {**source.build, **record})
    monkeypatch.setattr("coreai_zoo.cli.bench.interpreter_note", lambda _backend: "")
    result = zoo("bench", bundle, "-p", 5, "-g", 9)
    assert result.exit_code == 0, result.output
    _, found, table = result.stdout.partition("For the entry's file:\n\n")
    assert bool(found) == (note is None)
    if note is None:
        (published,) = tomllib.loads(table.partition("The engine's")[0])["published"]
        assert published["load"] == 3 and published["decode"] == 4 and published["prefill"] == 4
        assert published["asset_bytes"] == Bundle.open(bundle).asset_bytes
        assert published["asset_bytes"] == sum(each.stat().st_size for each in source.asset.iterdir())
        assert "note" not in published
    else:
        assert f"Nothing for an entry's file: {note}." in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("damage", [{"recipe": {}}, {"recipe": {"name": ""}}, {"contract": {"name": 5}}])
def test_a_record_that_does_not_say_what_is_measured_is_refused_before(
    clocked: tuple[Bundle, list[Clocked]], damage: dict[str, object], tmp_path: Path
) -> None:
    source, steppers = clocked
    bundle = tmp_path / source.directory.name
    shutil.copytree(source.directory, bundle)
    write_json(bundle / "build.json", {**source.build, **damage})
    result = zoo("bench", bundle, "-p", 5, "-g", 9)
    (part,) = damage
    assert result.exit_code == 1 and f"names no {part}" in result.stderr and not steppers


@pytest.mark.slow
def test_a_prompt_is_read_by_prefill_where_there_is_one(shared: Shared) -> None:
    (chunked,) = shared.folder(f"{DENSE}-chunked-played", functools.partial(build, DENSE, "chunked")).iterdir()
    measured = bench(Bundle.open(chunked), CoreAIBackend(), 20, 2, 1, Reporter(silent=True))
    assert measured.prefill_calls == 1 and measured.runs[0].prompt_tokens == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-p", 9000), "A prompt of 9,000 tokens and an answer of 128 do not fit a context of"),
        (("-g", 1), "1 is not in the range x>=2"),
        (("-n", 0), "0 is not in the range x>=1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    built: Callable[[str, str], Bundle], options: tuple[object, ...], words: str
) -> None:
    result = zoo("bench", built(DENSE, "int8hu").directory, *options)
    assert result.exit_code == 2 and words in result.stderr and not result.stdout


def test_the_memory_at_the_peak_stays_when_it_is_free_again(tmp_path: Path) -> None:
    block = np.ones(2**28, np.uint8)
    during = peak_memory()
    assert during is not None and during > block.nbytes
    del block
    after = peak_memory()
    assert after is not None and after > 0.99 * during
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("VmPeak:\t9 kB\nVmHWM:\t     5 kB\nVmRSS:\t 4 kB\n", encoding="ascii")
    assert peak_memory(tmp_path) == 5 * 1024


def test_a_processor_is_called_as_it_is_sold(tmp_path: Path) -> None:
    assert processor(tmp_path) == platform.machine()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU™ @ 3 GHz\n", encoding="utf-8")
    assert processor(tmp_path) == "Some CPU™ @ 3 GHz"


def test_a_measurement_in_words_has_what_is_known_of_it() -> None:
    bare = Published(recipe="int8hu", machine="M4 Max", decode=15.9, source="a card")
    assert bare.sentence == "15.9 tokens/s on M4 Max (a card)"
    full = attrs.evolve(
        bare,
        note="on 128 GB",
        prompt_tokens=64,
        prefill=86.5,
        first_token=0.74,
        load=12,
        peak_memory=29 * 2**30,
        system="macOS 27.2",
        versions="coreai-core 1.0.0",
    )
    assert full.sentence == (
        "15.9 tokens/s on M4 Max, macOS 27.2, coreai-core 1.0.0, on 128 GB; a prompt of 64 tokens at 86.5 tokens/s, "
        "the first token after 0.74 s, loaded in 12 s, 29.0 GiB of memory at the peak (a card)"
    )


def test_a_measurement_stands_beside_the_prediction_for_its_own_contract(root: Path, tmp_path: Path) -> None:
    source = root / "zoo_entries" / f"{DENSE}.toml"
    pasted = tmp_path / source.name
    row = {"recipe": "int8hu", "machine": "M5 Max", "decode": 18.5, "source": "somebody", "contract": "chunked"}
    table = "\n".join(["[[published]]", *toml_lines(row), ""])
    pasted.write_text(f"{source.read_text(encoding='utf-8')}\n{table}", encoding="utf-8")
    chunked, usual = (zoo("plan", pasted, "--contract", name).stdout for name in ("chunked", "static-s1"))
    assert "Published: 18.5 tokens/s on M5 Max (somebody)." in chunked and "Published: 15.9" not in chunked
    assert "Published: 15.9 tokens/s on M4 Max" in usual and "somebody" not in usual
