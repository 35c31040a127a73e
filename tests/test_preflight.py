"""What a build says that it needs, what it does when there is too little, and what it tells programs on the way."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attrs import evolve

import forked
from checkpoints import tiny_checkpoint
from command import zoo
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.build.design import design
from coreai_zoo.build.preflight import LEAST_MEMORY, Disk, Preflight, preflight
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.build.workspace import Workspace
from coreai_zoo.contracts import CONTRACTS
from coreai_zoo.dtypes import size
from coreai_zoo.errors import CheckFailed, EnvironmentLacks
from coreai_zoo.plugins import default_plugins
from coreai_zoo.progress import EventReporter
from disks import small_disks

SmallDisk = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("preflight") / "checkpoint")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Mounts a small file system, or changes its size."""
    with small_disks(tmp_path / "disk") as make:
        yield make


def build(checkpoint: Path, output: Path, *more: object) -> subprocess.CompletedProcess[str]:
    arguments = ("build", "qwen3.6-27b", "--checkpoint", checkpoint, "--custom", "-o", output, *more)
    return forked.run(*arguments, before="traces:inherit")  # the trace is not what is looked at


def test_a_bundle_that_does_not_fit_on_its_disk_is_refused_with_the_numbers(
    checkpoint: Path, tmp_path: Path, small_disk: SmallDisk
) -> None:
    output = small_disk("64k")

    result = build(checkpoint, output, "--work-dir", tmp_path / "work")

    assert result.returncode == 3
    error = result.stderr.splitlines()[-1]
    assert f"KiB of disk space at {output}, where 60.0 KiB are free" in error
    assert "-o DIR" in error
    assert "weights " not in result.stderr, "refused before a weight was read"
    assert list(output.iterdir()) == [] and not (tmp_path / "work").exists()


@pytest.mark.parametrize("chosen_by", ["--work-dir DIR", "HF_HOME"])
def test_a_disk_that_is_too_small_is_named_by_what_chooses_another(tmp_path: Path, chosen_by: str) -> None:
    full = Preflight(7, 7, 9, 9, (Disk(tmp_path, 7, 1, chosen_by),), None)
    with pytest.raises(EnvironmentLacks) as caught:
        full.require()
    assert f"use another disk with {chosen_by};" in caught.value.hint and "-o DIR" not in caught.value.hint


@pytest.mark.slow
def test_a_disk_that_fills_up_is_an_error_from_which_a_build_goes_on_when_there_is_space(
    checkpoint: Path, tmp_path: Path, small_disk: SmallDisk
) -> None:
    # Small files take whole pages of 4 KiB, more than was counted beforehand: there is room for the weights, and none
    # for all that is written after them.
    output = small_disk("160k")

    full = build(checkpoint, output)

    assert full.returncode == 3, full.stderr
    error = full.stderr.splitlines()[-1]
    assert "28 computed" in full.stderr and "verify" not in full.stderr
    (partial,) = output.glob(".*.partial")
    assert "no space left" in error and f"Finished weights are kept in {partial}" in error
    assert [path.name for path in output.iterdir()] == [partial.name]

    small_disk("2m")
    again = build(checkpoint, output, "--json")

    assert again.returncode == 0, again.stderr
    answer = json.loads(again.stdout)
    assert answer["weights"] == {"computed": 0, "reused": 28}
    assert answer["preflight"]["disks"][0]["needs"] < answer["preflight"]["written"] / 2, "what is there counts"
    assert [path.name for path in output.iterdir()] == [answer["name"]]


@pytest.mark.slow
def test_progress_as_json_is_one_event_a_line_that_adds_up(checkpoint: Path, tmp_path: Path) -> None:
    result = build(checkpoint, tmp_path / "out", "--json", "--progress", "json")

    assert result.returncode == 0, result.stderr
    events = [json.loads(line) for line in result.stderr.splitlines()]
    stages = [(event["stage"], event["state"]) for event in events if event["event"] == "stage"]
    names = ("resolve", "trace", "lower", "weights", "bundle", "verify")
    assert stages == [(name, state) for name in names for state in ("start", "end")]
    counted = [event for event in events if event["event"] == "bytes"]
    assert [event["done"] for event in counted] == sorted(event["done"] for event in counted)
    assert counted[-1]["done"] == counted[-1]["total"] and counted[-1]["left"] == 0
    assert all(event["stage"] == "weights" and event["rate"] > 0 and event["what"] for event in counted)
    needs = json.loads(result.stdout)["preflight"]
    assert needs["read"] > 0 and needs["written"] > counted[-1]["total"]
    assert sum(disk["needs"] for disk in needs["disks"]) == needs["written"]


def test_progress_as_json_says_which_stage_failed(checkpoint: Path, tmp_path: Path) -> None:
    result = build(checkpoint, tmp_path / "out", "--progress", "json", "--max-context", "1")

    assert result.returncode == 2
    start, stage, last = [json.loads(line) for line in result.stderr.splitlines()]
    assert (start["state"], stage["state"], last["event"]) == ("start", "failed", "failed")
    for event in (stage, last):
        assert (event["stage"], event["exit_code"]) == ("resolve", 2)
        assert "max-context" in event["message"]


def test_progress_as_json_tells_a_failure_outside_of_every_stage(checkpoint: Path, tmp_path: Path) -> None:
    result = build(checkpoint, tmp_path / "out", "--progress", "json", "--sample")

    (last,) = [json.loads(line) for line in result.stderr.splitlines()]
    assert last == {
        "event": "failed",
        "stage": "",
        "message": "--checkpoint and --sample exclude each other.",
        "exit_code": 2,
    }
    assert result.returncode == 2


def test_an_interrupted_build_says_as_an_event_how_to_resume(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("build", "qwen3.6-27b", "--checkpoint", checkpoint, "--custom", "-o", tmp_path, "--progress", "json")
    command = [sys.executable, "-m", "coreai_zoo", *map(str, arguments)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        events = [json.loads(line) for line in (first, *process.stderr)]

    assert process.returncode == 130
    note, last = events[-2:]
    assert "To resume, run: " in note["text"] and "--progress json" in note["text"]
    assert (last["event"], last["message"], last["exit_code"]) == ("failed", "interrupted", 130)


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (CheckFailed("3 flips.", "Look."), "3 flips. Look.", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero", 1),
    ],
)
def test_a_stage_that_fails_says_why(
    error: BaseException, message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)), EventReporter().stage("weights"):
        raise error

    failed = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (failed["state"], failed["message"], failed["exit_code"]) == ("failed", message, code)


def test_words_of_one_run_do_not_become_events_of_the_next() -> None:
    assert json.loads(zoo("build", "no-such", "--progress", "json").stderr.splitlines()[-1])["exit_code"] == 2
    assert zoo("build", "no-such").stderr.splitlines()[-1].startswith("error: no entry is called 'no-such'")


def test_a_full_disk_is_told_wherever_something_is_written(tmp_path: Path) -> None:
    """Here in a folder for temporary files, which no command looks after."""
    command = [sys.executable, "-m", "coreai_zoo", "build", "qwen3.6-27b", "--sample", "-o", str(tmp_path / "out")]
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    script = f"import os, resource; {limit}; os.execv({command[0]!r}, {command!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 3
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: There is no space left for ") and "Traceback" not in result.stderr
    assert "run the same command again" in error and "TMPDIR" in error


def test_a_native_library_that_ends_the_process_is_told_as_the_last_event(tmp_path: Path) -> None:
    script = (
        "import ctypes, os, sys\n"
        "from pathlib import Path\n"
        "from coreai_zoo.backends.native import exit_explained\n"
        "from coreai_zoo.errors import tell_failure_as\n"
        "from coreai_zoo.progress import EventReporter\n"
        "tell_failure_as(EventReporter().failure_line)\n"
        "with exit_explained(Path(sys.argv[1])):\n"
        "    os.write(2, b'error: No space left on device')\n"
        "    ctypes.CDLL(None).exit(1)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, tmp_path / "x"], capture_output=True, text=True, check=False)

    last = json.loads(result.stderr.splitlines()[-1])
    assert (result.returncode, last["exit_code"]) == (3, 3)
    assert last["message"].startswith(f"There is no space left to write {tmp_path / 'x'}")


def test_a_process_that_complains_of_what_is_removed_does_not_hide_what_the_library_said(tmp_path: Path) -> None:
    script = (
        "import ctypes, os, sys\n"
        "from pathlib import Path\n"
        "from coreai_zoo.backends import native\n"
        "native.shutil.rmtree = lambda *_, **__: os.write(2, 9 * b'No such file or directory. ')\n"
        "with native.exit_explained(Path(sys.argv[1])):\n"
        "    os.write(2, b'error: No space left on device')\n"
        "    ctypes.CDLL(None).exit(1)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, tmp_path / "x"], capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert result.stderr.startswith(f"error: There is no space left to write {tmp_path / 'x'}")


@pytest.mark.parametrize(
    ("contract", "layers", "measured"),
    [
        ("static-s1", 4, 340),
        ("static-s1", 64, 430),
        ("chunked", 8, 389),
        ("chunked", 64, 665),
        ("dynamic", 64, 634),
        ("chunked-unrolled", 64, 965),
    ],
)
def test_the_memory_of_a_build_is_as_it_was_measured(contract: str, layers: int, measured: int) -> None:
    """Peak anonymous MB of `benchmarks/lowering.py`, at 4 layers of the whole build in `benchmarks/bench.py`."""
    prefill = CONTRACTS[contract].prefill
    told = CoreAIBackend().memory(layers, 2 if prefill else 1, prefill.steps if prefill else 1)
    assert measured < told / 1e6 < 1.1 * measured


@pytest.mark.parametrize(
    ("backend", "contract"), [("coreai", None), ("coreai", "dynamic"), ("coreai", "chunked-unrolled"), ("coreml", None)]
)
@pytest.mark.parametrize("layers", [8, 64])
def test_memory_that_does_not_suffice_is_refused_with_the_numbers(
    backend: str, contract: str | None, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coreai_zoo.build.preflight.available_memory", lambda: 300 * 2**20)
    request = BuildRequest("qwen3.6-27b", sample=True, backend=backend, contract=contract, output=tmp_path)
    resolved = design(request, default_plugins())
    deep = evolve(resolved, model=evolve(resolved.model, facts={**resolved.facts, "layers": layers}))
    needs = preflight(deep, Workspace.of(tmp_path, resolved.name, None, keep=False))
    functions = 2 if contract else 1
    steps = resolved.contract.prefill.steps if resolved.contract.prefill else 1
    wanted = max(LEAST_MEMORY, resolved.backend.memory(layers, functions, steps))
    # A deep decoder takes more than any build does, and so does a recurrence that stands many times in a prefill.
    assert (wanted > LEAST_MEMORY) is (layers == 64 or steps > 1)
    words = re.escape(f"needs {size(wanted)} of memory at least, and 300.0 MiB are available")
    with pytest.raises(EnvironmentLacks, match=words):
        needs.require()


def test_the_largest_matrix_that_is_written_transposed_has_its_room(tmp_path: Path) -> None:
    def least(recipe: str) -> int:
        request = BuildRequest("qwen3.6-35b-a3b", sample=True, recipe=recipe, output=tmp_path)
        resolved = design(request, default_plugins())
        return preflight(resolved, Workspace.of(tmp_path, resolved.name, None, keep=False)).least_memory

    resolved = design(BuildRequest("qwen3.6-35b-a3b", sample=True, recipe="fp16", output=tmp_path), default_plugins())
    stacks = [each.format for each in resolved.weights.stored if each.format.transposed]
    assert stacks and least("int8hu") == LEAST_MEMORY
    assert least("fp16") == LEAST_MEMORY + 2 * max(each.bytes // each.shape[0] for each in stacks)
