"""`zoo sensitivity -o`: results that outlive any interruption, and are the same whoever measures."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from attrs import evolve
from click.testing import Result

import forked
from command import zoo
from coreai_zoo.build.design import design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.catalogue import find_entry
from coreai_zoo.errors import CheckFailed
from coreai_zoo.gates import sensitivity_work
from coreai_zoo.gates.sensitivity import Part, Sensitivity
from coreai_zoo.gates.sensitivity_chart import picture
from coreai_zoo.gates.sensitivity_work import Work, determined_by, measure_part, write_reference
from coreai_zoo.plugins import default_plugins
from suite import NIGHTLY

ENTRY = "qwen3.6-27b"
WHAT = ("sensitivity", ENTRY, "--sample", "--layers", "4", "--as", "int4", "--per-tensor", "--positions", "12")
TENSORS = 32
PATIENCE = 120  # seconds, on a machine that is busy with other things


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process that nothing interrupted."""
    folder = tmp_path_factory.mktemp("sensitivity") / "whole"
    result = zoo(*WHAT, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sensitivity.json").read_text(encoding="utf-8"))
    return found


def same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == ["reference.npy", "sensitivity.json", "sensitivity.svg"]
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def gone_on(folder: Path, *options: object) -> Result:
    result = zoo(*WHAT, "-o", folder, *options)
    assert result.exit_code == 0, result.output
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def test_each_tensor_is_in_the_file_once_in_an_order_of_its_own(whole: Path) -> None:
    found = record(whole)
    assert {key: found[key] for key in ("schema", "entry", "positions", "from")} == {
        "schema": 1,
        "entry": ENTRY,
        "positions": 12,
        "from": "fp16",
    }
    parts = found["parts"]
    assert len({part["tensor"] for part in parts}) == len(parts) == TENSORS
    assert [part["layer"] for part in parts] == sorted(
        (part["layer"] for part in parts), key=lambda n: -1 if n is None else n
    )
    assert all(part["mean_kl_divergence"] > 0 and part["saved_bytes"] > 0 for part in parts)
    assert all(part["saved_bytes"] == part["from_bytes"] - part["as_bytes"] for part in parts)
    assert {part["as"] for part in parts} == {"int4:block32:symmetric_with_clipping"}
    assert str(whole) not in (whole / "sensitivity.json").read_text(encoding="utf-8")


def test_a_run_that_goes_on_measures_what_is_missing_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "cut"))
    kept = record(folder)
    kept["parts"] = kept["parts"][::2]
    changed = kept["parts"][3]
    changed["margin_lost"] = 1234.5  # what is there is taken as it is
    (folder / "sensitivity.json").write_text(json.dumps(kept), encoding="utf-8")
    (folder / "sensitivity.svg").unlink()

    result = gone_on(folder)

    assert "16 of 32 parts were measured before, 16 to go" in result.stderr
    found = record(folder)
    expected = record(whole)
    (at,) = (index for index, part in enumerate(expected["parts"]) if part["tensor"] == changed["tensor"])
    expected["parts"][at]["margin_lost"] = 1234.5
    assert found == expected


def test_a_run_goes_on_without_the_logits_of_the_reference_and_where_all_is_there(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "cut"))
    (folder / "reference.npy").write_bytes(b"torn")
    assert "32 of 32 parts were measured before" in gone_on(folder).stderr

    kept = record(folder)
    kept["parts"] = kept["parts"][1:]
    (folder / "sensitivity.json").write_text(json.dumps(kept), encoding="utf-8")
    gone_on(folder)
    assert same(folder, whole)


def test_a_folder_takes_more_parts_and_formats_of_the_same_model(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "more"))
    options = ("--sample", "--layers", "4", "--role", "mlp", "--positions", "12", "-o", folder)
    for more in (("--as", "int8"), ("--as", "uint8"), ("--as", "int4", "--per-layer")):
        assert zoo("sensitivity", ENTRY, *options, *more).exit_code == 0
    found = [
        (part["role"], part["layer"], part["as"][:4]) for part in record(folder)["parts"] if part["tensor"] is None
    ]
    assert found == [("mlp", None, "int8"), ("mlp", None, "uint"), *(("mlp", layer, "int4") for layer in range(4))]
    assert len(record(folder)["parts"]) == TENSORS + 6


def test_a_run_does_not_go_on_where_the_reference_comes_out_otherwise(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "elsewhere"))
    kept = {**record(folder), "reference_sha256": "0" * 64, "parts": record(folder)["parts"][1:]}
    (folder / "sensitivity.json").write_text(json.dumps(kept), encoding="utf-8")

    result = zoo(*WHAT, "-o", folder)
    assert result.exit_code == 2
    assert "this machine computes otherwise. Go on where it was begun" in result.stderr
    assert record(folder) == kept


@pytest.mark.parametrize(
    ("options", "other"),
    [
        (("--positions", "11"), "prompt"),
        (("--from", "int8"), "format of the rest"),
        (("--layers", "5"), "model"),
    ],
)
def test_results_of_something_else_are_refused_until_they_are_to_be_forgotten(
    options: tuple[str, ...], other: str, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "of_something_else"))
    arguments = (*WHAT, *options, "--role", "head", "-o", folder)

    refused = zoo(*arguments)
    assert refused.exit_code == 2
    assert (
        f"was measured with another {other}. Choose another -o, or forget what is there with --fresh." in refused.stderr
    )
    assert same(folder, whole)

    assert zoo(*arguments, "--fresh").exit_code == 0
    assert [part["role"] for part in record(folder)["parts"]] == ["head"]


def test_another_checkpoint_of_the_same_sizes_is_another(whole: Path, tmp_path: Path) -> None:
    sample = find_entry(ENTRY, default_plugins())[0].sample_directory()
    copy = Path(shutil.copytree(sample, tmp_path / "fine_tune"))
    weights = max(copy.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start] ^= 1  # the least bit of the first value of the first tensor
    weights.write_bytes(content)
    folder = Path(shutil.copytree(whole, tmp_path / "results"))

    result = zoo(*(each for each in WHAT if each != "--sample"), "--custom", "--checkpoint", copy, "-o", folder)
    assert result.exit_code == 2
    assert "was measured with another checkpoint" in result.stderr


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    for text, said in (("{", "cannot be read as JSON"), ("{}", "holds no results of `zoo sensitivity`")):
        (tmp_path / "sensitivity.json").write_text(text, encoding="utf-8")
        result = zoo(*WHAT, "-o", tmp_path)
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_what_takes_more_bytes_is_ranked_by_what_it_changes(tmp_path: Path) -> None:
    options = ("--sample", "--layers", "4", "--from", "int4", "--as", "fp16", "--positions", "6")
    found = json.loads(zoo("sensitivity", ENTRY, *options, "--json").stdout)
    assert found["from"] == "int4:block32:symmetric_with_clipping"
    assert all(part["saved_bytes"] < 0 and part["kl_per_mib_saved"] is None for part in found["parts"])
    changes = [part["mean_kl_divergence"] for part in found["parts"]]
    assert changes == sorted(changes, reverse=True) and changes[-1] > 0

    told = zoo("sensitivity", ENTRY, *options, "-o", tmp_path)
    assert "reference: int4:block32:symmetric_with_clipping" in told.stdout
    assert "Ranked by KL: nothing is saved." in told.stdout
    svg = ET.fromstring((tmp_path / "sensitivity.svg").read_text(encoding="utf-8"))
    assert "0" in texts(svg, "tick") and any(tick.startswith("-") for tick in texts(svg, "tick"))


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def running(*arguments: object, call: str = forked.ZOO) -> Iterator[forked.Process]:
    """`zoo` in its own session; it and what it started are gone after the block."""
    with forked.Process(*arguments, call=call, before="os:setsid") as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_until(true: Callable[[], bool], process: forked.Process | subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def measured(folder: Path) -> int:
    """How many parts are in the file; it is whole at any time."""
    return len(record(folder)["parts"]) if (folder / "sensitivity.json").exists() else 0


ENDS = [(number, jobs) for number in (signal.SIGKILL, signal.SIGINT) for jobs in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "jobs"), ENDS if NIGHTLY else ENDS[::3])
def test_a_run_that_was_ended_in_the_middle_goes_on(jobs: int, number: int, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ended"
    with running(*WHAT, "-o", folder, "--jobs", jobs) as process:
        wait_until(lambda: measured(folder) > 2, process)
        # In a terminal Ctrl-C reaches all processes of the command.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        # A worker that outlived it would hold these pipes open.
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if number == signal.SIGINT else -number), stderr
    assert "Traceback" not in stderr
    done = measured(folder)
    assert 2 < done < TENSORS

    assert f"{done} of {TENSORS} parts were measured before" in gone_on(folder).stderr
    assert same(folder, whole)


def workers_of(process: forked.Process) -> list[int]:
    """The ids of the processes that measure: forked by a server, which the run has started."""
    return [pid for server in servers_of(process) for pid in children_of(server)]


def servers_of(process: forked.Process) -> list[int]:
    return [pid for pid in children_of(process.pid) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def children_of(pid: int) -> list[int]:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("only Linux says here which processes a process has started")
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split())]


def ignores_interruptions(pid: int) -> bool:
    masks = re.findall(
        r"^Sig(?:Blk|Ign):\s+(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="ascii"), re.MULTILINE
    )
    return any(int(mask, 16) >> (signal.SIGINT - 1) & 1 for mask in masks)


@pytest.mark.slow
@pytest.mark.parametrize("started", [servers_of, workers_of])
def test_an_interruption_while_workers_start_is_told_in_one_line(
    started: Callable[[forked.Process], list[int]], tmp_path: Path
) -> None:
    with running(*WHAT, "-o", tmp_path, "--jobs", 2) as process:
        wait_until((tmp_path / "reference.npy").exists, process)
        wait_until(lambda: bool(started(process)), process)
        assert all(ignores_interruptions(pid) for pid in started(process))
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert stderr.splitlines()[1:] == ["", "interrupted"]
    assert measured(tmp_path) == 0


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_a_run_that_then_goes_on(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    with running(*WHAT, "-o", folder, "--jobs", 2) as process:
        wait_until(lambda: measured(folder) > 0, process)  # all may be measured within a second
        os.kill(workers_of(process)[-1], signal.SIGKILL)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3, stderr
    assert "error: A worker process has ended in the middle of a part" in stderr
    gone_on(folder)
    assert same(folder, whole)


# ---------------------------------------------------------------------------------------------------------------------
# Who measures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_give_the_same_result(whole: Path, tmp_path: Path) -> None:
    gone_on(tmp_path / "processes", "--jobs", 2)
    assert same(tmp_path / "processes", whole)


@pytest.mark.slow
def test_processes_need_no_folder(whole: Path) -> None:
    result = zoo(*WHAT, "--jobs", 2, "--json")
    assert result.exit_code == 0, result.output
    expected = {part["tensor"]: part for part in record(whole)["parts"]}
    assert {part["tensor"]: part for part in json.loads(result.stdout)["parts"]} == expected


def dask(what: str, *options: object) -> AbstractContextManager[forked.Process]:
    return running("--no-dashboard", *options, call=f"distributed.cli.dask_{what}:main")


WORKER = ("--nthreads", "1", "--no-nanny", "--local-directory")


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[tuple[str, forked.Process]]:
    """The address and the process of a dask scheduler of our own."""
    pytest.importorskip("distributed", reason="dask.distributed is not installed: pip install 'coreai-zoo[cluster]'")
    told = tmp_path / "scheduler.json"
    with dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", told) as process:
        wait_until(lambda: told.exists() and told.read_text(encoding="utf-8").endswith("}"), process)
        yield json.loads(told.read_text(encoding="utf-8"))["address"], process


@pytest.mark.slow
def test_a_cluster_gives_the_same_result_though_a_worker_is_killed_in_the_middle(
    scheduler: tuple[str, forked.Process], whole: Path, tmp_path: Path
) -> None:
    from distributed import Client

    at, _ = scheduler
    folder = tmp_path / "cluster"
    options = (at, *WORKER, tmp_path)
    with (
        dask("worker", *options, "--name", "doomed") as doomed,
        dask("worker", *options, "--name", "other"),
        Client(at, set_as_default=False) as client,
    ):
        client.wait_for_workers(2, timeout=PATIENCE)
        workers = client.scheduler_info(n_workers=-1)["workers"]
        (address,) = (address for address, worker in workers.items() if worker["name"] == "doomed")
        with running(*WHAT, "-o", folder, "--scheduler", at) as process:
            wait_until(lambda: measured(folder) > 2, process)
            assert client.processing()[address], "the worker has nothing to lose"
            doomed.kill()
            assert measured(folder) < TENSORS
            _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, stderr
    assert doomed.returncode == -signal.SIGKILL
    assert same(folder, whole)


@pytest.mark.slow
def test_a_cluster_that_cannot_work_is_said(
    scheduler: tuple[str, forked.Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, _ = scheduler
    monkeypatch.setattr(sensitivity_work, "_CONNECT_SECONDS", 1)
    for address, said in (
        (at, f"The dask scheduler at {at} has no workers. Start some with `dask worker {at} --nthreads 1`."),
        ("tcp://127.0.0.1:1", "No dask scheduler answers at tcp://127.0.0.1:1 ("),
        ("nonsense", "No dask scheduler answers at nonsense ("),
    ):
        result = zoo(*WHAT, "-o", tmp_path, "--scheduler", address)
        assert (result.exit_code, said in result.stderr) == (3, True), result.stderr


@pytest.mark.slow
def test_a_scheduler_that_goes_leaves_what_was_measured(
    scheduler: tuple[str, forked.Process], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity_work, "_CONNECT_SECONDS", 5)
    at, process = scheduler
    folder = tmp_path / "left"

    def end() -> None:
        wait_until(lambda: measured(folder) > 2, process)
        process.kill()

    with dask("worker", at, *WORKER, tmp_path), ThreadPoolExecutor(1) as ending:
        ended = ending.submit(end)
        result = zoo(*WHAT, "-o", folder, "--scheduler", at)
        ended.result()
    assert result.exit_code == 3
    assert "The scheduler has gone in the middle of the work." in result.stderr
    assert measured(folder) < TENSORS
    gone_on(folder)
    assert same(folder, whole)


def test_without_dask_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    result = zoo(*WHAT, "-o", tmp_path, "--scheduler", "tcp://127.0.0.1:1")
    assert result.exit_code == 3
    assert "Install it with `pip install 'coreai-zoo[cluster]'`." in result.stderr


def test_a_worker_that_has_something_else_does_not_measure(tmp_path: Path) -> None:
    request = BuildRequest(ENTRY, sample=True, layers=4)
    designed = design(request, default_plugins())
    own = determined_by(designed, (1, 2), {})
    content, sha256 = write_reference(np.zeros((2, 512), np.float16))
    (tmp_path / "reference.npy").write_bytes(content)
    work = Work(request, (), (), (1, 2), tmp_path / "reference.npy", sha256, json.dumps(own))
    part = Part("head", None, None, None, (), 0, 0)
    for other, said in (
        (evolve(work, determined_by=json.dumps({**own, "code": "", "torch": ""})), "another code, torch than"),
        (evolve(work, reference_sha256="0"), "holds other logits"),
        (evolve(work, reference=tmp_path / "nowhere.npy"), "have to see the folder of -o below the same path"),
    ):
        with pytest.raises(CheckFailed, match=said):
            measure_part(other, part)


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: ET.Element, css: str) -> list[str]:
    return [str(text.text) for text in svg.iter(f"{SVG}text") if text.get("class") == css]


def test_the_picture_has_a_mark_for_each_part_and_says_the_worst(whole: Path) -> None:
    text = (whole / "sensitivity.svg").read_text(encoding="utf-8")
    svg = ET.fromstring(text)
    marks = [mark for mark in svg.iter(f"{SVG}circle") if "mark" in str(mark.get("class"))]
    worst = max(record(whole)["parts"], key=lambda part: part["kl_per_mib_saved"])["tensor"]

    assert len(marks) == TENSORS
    assert all(mark.find(f"{SVG}title") is not None for mark in marks)
    assert svg.findtext(f"{SVG}title") == texts(svg, "heading")[0]
    assert f"the worst first: {worst}, " in str(svg.findtext(f"{SVG}desc"))
    assert svg.get("aria-labelledby") == "title description"
    assert texts(svg, "label")[0] == worst.removesuffix(".weight")
    assert "@media (prefers-color-scheme: dark)" in text
    assert "KiB saved" in texts(svg, "title")


def cost(name: str, saved: int, kl: float) -> Sensitivity:
    return Sensitivity(Part("mlp", 0, name, None, (name,), max(saved, 0), max(-saved, 0)), kl, kl, 0.0, 0)


@pytest.mark.parametrize("size", [1, 2**10, 3 * 2**20, 24 * 2**30, 9 * 2**40])
def test_a_picture_is_drawn_of_any_size_and_of_any_harm(size: int) -> None:
    rows = [cost("<a>", size, float("inf")), cost("b", size, 0.5), cost("c", -size, 0.0), cost("d", 0, 1e-20)]
    svg = ET.fromstring(picture(rows, "a & b"))
    assert texts(svg, "label")[0] == "<a>"
    assert len(texts(svg, "tick")) > 3
    places = [(float(mark.attrib["cx"]), float(mark.attrib["cy"])) for mark in svg.iter(f"{SVG}circle")]
    assert places[0][1] < places[1][1] < places[2][1] == places[3][1]
    assert places[2][0] < places[3][0] < places[0][0] == places[1][0]


def test_no_label_is_written_over_another(whole: Path) -> None:
    rows = [cost(f"model.layers.{index}.a_projection.weight", 1000, 0.1 + index / 1e4) for index in range(40)]
    svg = ET.fromstring(picture(rows, "crowded"))
    heights = [float(text.attrib["y"]) for text in svg.iter(f"{SVG}text") if text.get("class") == "label"]
    assert 0 < len(heights) < 12
    assert len(heights) == len(set(heights))
