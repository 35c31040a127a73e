"""The scripts under benchmarks/ run: what they measure is another matter."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import forked
from checkpoints import text_config
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.build.design import design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.checkpoint.hub import HubSource, Repository
from coreai_zoo.lowering import module
from coreai_zoo.plugins import default_plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.weights.store import WeightStore
from decoders import tensors_of
from hub import Hub
from suite import NIGHTLY

# As `python SCRIPT` does, but for the seconds of imports.
AS_A_PROGRAM = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


def done(root: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run(root / "benchmarks" / script, *arguments, AS_A_PROGRAM, call="forked:execute")


def run(root: Path, script: str, *arguments: object) -> str:
    result = done(root, script, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module", params=["dense", "moe"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("config") / "config.json"
    # The embedding is more than the script writes at a time.
    path.write_text(json.dumps(text_config(request.param, vocab_size=140_000)))
    return path


@pytest.mark.parametrize("fill", ["random", "sparse"])
def test_a_synthetic_checkpoint_has_no_two_equal_tensors_but_gains(
    fill: str, config: Path, root: Path, tmp_path: Path
) -> None:
    run(root, "synthetic_checkpoint.py", "--config", str(config), "--fill", fill, "-o", str(tmp_path / "made"))
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    seen: dict[bytes, str] = {}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "made" / file, "pt") as shard:
            values = shard.get_tensor(name).float().numpy().tobytes()
        if "norm" not in name:
            assert any(values), name
            assert seen.setdefault(values, name) == name
    assert seen


def test_an_entry_without_a_sample_borrows_a_tokenizer(root: Path, tmp_path: Path) -> None:
    options = ("--layers", "4", "--vocab", "2048", "--fill", "sparse", "-o", str(tmp_path / "made"))

    run(root, "synthetic_checkpoint.py", "qwen3.5-2b", *options)

    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"} <= made


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("qwen3.6-27",), "error: no entry is called 'qwen3.6-27'. Did you mean qwen3.6-27b"),
        (("qwen3.5-2b", "--layers", "3"), "error: "),
        (("--config", "nowhere.json"), "error: nowhere.json cannot be read"),
        ((), "error: name an entry, or give --config"),
    ],
    ids=" ".join,
)
def test_a_synthetic_checkpoint_of_what_is_none_is_refused_in_words(
    root: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = done(root, "synthetic_checkpoint.py", *arguments, "-o", tmp_path / "made")

    assert result.returncode == 2
    assert words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_the_baseline_writes_the_constants_that_a_build_writes(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(text_config("dense")))
    run(root, "synthetic_checkpoint.py", "--config", str(path), "-o", str(tmp_path / "made"))
    answer: dict[str, Any] = json.loads(
        run(root, "whole_model_baseline.py", str(tmp_path / "made"), "-o", str(tmp_path / "whole")).splitlines()[-1]
    )
    assert set(answer) == {"load", "quantize", "convert", "seconds"}
    planned = design(BuildRequest(checkpoint=tmp_path / "made", recipe="int8hu", dry=True), default_plugins())
    store = WeightStore(tmp_path / "store")
    store.fill(planned.weights, planned.checkpoint)
    constants = module.constants(tensors_of(store, planned.weights.tensors))
    # The toolchain writes what is smaller among the operations.
    expected = {name: each.data.tobytes() for name, each in constants.items() if each.data.nbytes >= 1024}
    written = CoreAIBackend().constants(tmp_path / "whole" / "whole_model.aimodel")
    assert len(expected) >= 16  # the table, and the integers of every linear
    assert set(expected.values()) - {bytes(view) for view in written.values()} == set()


def test_the_disk_that_a_build_takes_is_seen_and_a_mapped_file_is_served(
    root: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(root / "benchmarks")
    stream = importlib.import_module("stream")
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text("{}")
    weights = np.random.default_rng(1).integers(0, 256, 2**21, np.uint8).tobytes()
    (made / "model.safetensors").write_bytes(weights)
    hub.add(stream.ID, stream.contents(made), commit=stream.COMMIT)
    source = HubSource.open(Repository(stream.ID), Reporter(silent=True))

    path = source.fetch_apart("model.safetensors", hub.home / "apart", lambda _what, _count: None)
    assert path.read_bytes() == weights and source.first_bytes("model.safetensors", 9) == weights[:9]
    remove = f"import pathlib, time; time.sleep(0.5); pathlib.Path({str(path)!r}).unlink(); time.sleep(0.2)"
    told = stream.measure([sys.executable, "-c", remove], folders=[hub.home])
    assert 2**21 <= told["peak_disk_bytes"] < 2**22 and not path.exists()


def test_lowering_is_timed_at_true_width(root: Path) -> None:
    command = [sys.executable, root / "benchmarks" / "lowering.py", "qwen3.6-27b", "--layers", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["layers"] == 4
    assert 0 < told["trace"] <= told["both"] and told["lower"] > 0 and told["cpu"] > 0.5


def test_contracts_stand_side_by_side_as_medians(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(root / "benchmarks")
    contracts = importlib.import_module("contracts")

    def result(seconds: float) -> dict[str, Any]:
        stages = {name: {"seconds": seconds} for name in ("resolve", "trace", "lower", "weights")}
        total = {"cpu_seconds": 5 * seconds, "seconds": 4 * seconds, "peak_anonymous_bytes": 3e9, "stages": stages}
        return {**total, "output": {"bytes": 2_000_000_000}}

    measured = {"a": [result(1), result(9), result(2)], "b": [result(3), result(3), result(1)]}
    told = contracts.medians(measured, contracts.MEASURES)
    assert told.splitlines()[0] == "|  | a | b |" and told.splitlines()[2:] == [
        "| CPU seconds | 10.00 (1.00) | 15.00 (1.50) |",
        "| wall seconds | 8.00 (1.00) | 12.00 (1.50) |",
        "| of them tracing and lowering | 4.00 (1.00) | 6.00 (1.50) |",
        "| peak anonymous memory, GB | 3.00 (1.00) | 3.00 (1.00) |",
        "| bundle, GB | 2.00 (1.00) | 2.00 (1.00) |",
    ]


@pytest.mark.skipif(not NIGHTLY, reason="builds an entry at its true width; make nightly")
def test_contracts_are_built_in_turn(root: Path) -> None:
    shape = ("--layers", "4", "--vocab", "1024", "--contract", "static-s1", "--contract", "chunked")
    command = [sys.executable, root / "benchmarks" / "contracts.py", "qwen3.5-0.8b", *shape]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stderr.splitlines()[-2:]] == ["run 1, static-s1", "run 1, chunked"]
    head, _, *rows = done.stdout.splitlines()[-7:]
    assert head == "|  | static-s1 | chunked |"
    assert all(float(value) > 0 for row in rows for value in re.findall(r"[\d.]+", row))


def test_measure_tells_time_memory_and_stages(root: Path) -> None:
    script = (
        'import sys, time; print(\'{"event": "stage", "stage": "a", "state": "start"}\', file=sys.stderr, '
        'flush=True); held = bytearray(b\'x\') * 60_000_000; time.sleep(0.3); print(\'{"event": "stage", "stage": '
        '"a", "state": "end", "seconds": 0.3}\', file=sys.stderr, flush=True); print(\'[1, 2]\')'
    )
    command = [sys.executable, "-W", "ignore", root / "benchmarks" / "measure.py", "--", sys.executable, "-c", script]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert answer["exit_code"] == 0
    assert answer["output"] == [1, 2]
    assert answer["seconds"] >= 0.3
    assert 60_000_000 <= answer["peak_anonymous_bytes"] <= answer["peak_rss_bytes"] < 120_000_000
    assert answer["stages"]["a"]["peak_anonymous_bytes"] >= 60_000_000
