"""The same inputs give the same bytes, whatever the process and its surroundings; `zoo verify --rebuild` checks it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import forked
from checkpoints import read_weights, tiny_checkpoint, write_json, write_weights
from shared import Shared

ENTRIES = {"dense": "qwen3.6-27b", "moe": "qwen3.6-35b-a3b"}
EPOCH = 1_700_000_000

# Of the interpreter, of torch, and of everything that a program may ask the system for.
SURROUNDINGS: tuple[Mapping[str, str], Mapping[str, str]] = (
    {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "LC_ALL": "C", "LANG": "C", "TZ": "UTC"},
    {
        "PYTHONHASHSEED": "77",
        "OMP_NUM_THREADS": "2",
        "LC_ALL": "C.UTF-8",
        "LANG": "tr_TR.UTF-8",
        "TZ": "Asia/Kathmandu",
    },
)


def zoo(*arguments: object, cwd: Path, before: str | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    """`zoo` in a process of its own; `before` is called first."""
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"} | settings
    return forked.run(*arguments, cwd=cwd, env=environment, before=before)


def build(kind: str, checkpoint: Path, cwd: Path, **settings: str) -> Path:
    """Build in a process of its own, which inherits the trace; the bundle."""
    cwd.mkdir(parents=True)
    command = ("build", ENTRIES[kind], "--checkpoint", checkpoint, "--custom", "--json")
    result = zoo(*command, cwd=cwd, before="traces:inherit", **settings)
    assert result.returncode == 0, result.stderr
    return cwd / json.loads(result.stdout)["path"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def dense(shared: Shared) -> Path:
    return shared.folder("tiny-dense", tiny_checkpoint)


@pytest.fixture(scope="module")
def moe(shared: Shared) -> Path:
    return shared.folder("tiny-moe", lambda folder: tiny_checkpoint(folder, "moe"))


@pytest.fixture(scope="module")
def dated(dense: Path, shared: Shared) -> Path:
    """A bundle of the dense checkpoint that carries a date."""
    output = shared.folder(
        "tiny-dated", lambda folder: build("dense", dense, folder / "here", SOURCE_DATE_EPOCH=str(EPOCH))
    )
    (record,) = output.rglob("build.json")
    return record.parent


# Commands one after the other, in one process.
_COMMANDS = """
import json, sys
from coreai_zoo.cli.app import cli
for command in json.loads(sys.argv[1]):
    cli.main(command, prog_name="zoo", standalone_mode=False)
"""


@pytest.fixture(scope="module")
def places(dense: Path, moe: Path, shared: Shared) -> list[Path]:
    """Folders in which a process has built both checkpoints, each in surroundings and in an order of its own.

    One is a fork of a process that has traced another decoder, the other is fresh.
    """
    checkpoints = {"dense": dense, "moe": moe}

    def fill(number: int, folder: Path) -> None:
        kinds = sorted(checkpoints, reverse=bool(number))
        options = ("--custom", "--json", "-o")
        where = ("a", "another place/deeper")[number]
        commands = [
            ["build", ENTRIES[kind], "--checkpoint", str(checkpoints[kind]), *options, f"{where}/{kind}"]
            for kind in kinds
        ]
        environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
        environment |= SURROUNDINGS[number]
        told = json.dumps(commands)
        if number:
            program = [sys.executable, "-c", _COMMANDS, told]
            result = subprocess.run(program, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        else:
            result = forked.run(told, _COMMANDS, call="forked:execute", env=environment, cwd=folder)
        assert result.returncode == 0, result.stderr

    with ThreadPoolExecutor(2) as pool:
        return list(
            pool.map(lambda number: shared.folder(f"surroundings-{number}", functools.partial(fill, number)), (0, 1))
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_two_processes_in_other_surroundings_give_the_same_bytes(places: list[Path], kind: str) -> None:
    one, other = (contents(next(place.rglob(kind))) for place in places)

    assert one and sorted(one) == sorted(other)
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.slow
def test_source_date_epoch_changes_the_dates_and_nothing_else(places: list[Path], dated: Path) -> None:
    (plain,) = next(places[0].rglob("dense")).iterdir()

    one, other = contents(plain), contents(dated)
    asset = f"{plain.name}.aimodel/metadata.json"
    assert sorted(one) == sorted(other)
    # The card has the date in the command that reproduces it, and so its hash is in build.json.
    assert {name for name in one if one[name] != other[name]} == {asset, "metadata.json", "build.json", "README.md"}
    texts = {name: (json.loads(one[name]), json.loads(other[name])) for name in (asset, "metadata.json", "build.json")}
    assert changed(*texts[asset]) == {"creationDate"}
    assert changed(*texts["metadata.json"]) == {"compilation.date"}
    assert texts["metadata.json"][1]["compilation"]["date"] == "2023-11-14T22:13:20Z"
    assert changed(*texts["build.json"]) == {
        "source_date_epoch",
        f"files.{asset}.sha256",
        "files.metadata.json.sha256",
        "files.README.md.sha256",
        "files.README.md.bytes",
    }
    assert texts["build.json"][1]["source_date_epoch"] == EPOCH


def changed(one: object, other: object, where: str = "") -> set[str]:
    """The places at which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {*one, *other}
        return {at for key in keys for at in changed(one.get(key), other.get(key), f"{where}.{key}".lstrip("."))}
    return set() if one == other else {where}


@pytest.mark.parametrize("date", ["yesterday", "1e3", "9" * 30, ""])
def test_a_date_that_is_none_is_refused(dense: Path, tmp_path: Path, date: str) -> None:
    arguments = ("build", ENTRIES["dense"], "--checkpoint", dense, "--custom")
    result = zoo(*arguments, cwd=tmp_path, SOURCE_DATE_EPOCH=date)

    assert result.returncode == 2
    assert f"SOURCE_DATE_EPOCH is {date!r}, not seconds since 1970" in result.stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# zoo verify --rebuild
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rebuild_is_the_same_bytes_at_another_time_and_place(dense: Path, dated: Path, tmp_path: Path) -> None:
    before = contents(dated)

    result = zoo("verify", dated, "--rebuild", "--checkpoint", dense, "--json", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    check = next(check for check in json.loads(result.stdout) if check["name"] == "rebuild")
    assert check["passed"] and "every byte the same" in check["detail"]
    assert contents(dated) == before and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_rebuild_from_other_weights_names_the_files_that_differ(dense: Path, dated: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(dense, tmp_path / "edited")
    tensors = read_weights(edited)
    tensors["lm_head.weight"].view(-1)[0] += torch.tensor(1.0, dtype=torch.bfloat16)
    (edited / "model.safetensors").unlink()
    write_weights(edited, tensors)

    command = ("verify", dated, "--rebuild", "--checkpoint", edited, "--json")
    result = zoo(*command, cwd=tmp_path, before="traces:inherit")

    assert result.returncode == 1
    check = next(check for check in json.loads(result.stdout) if check["name"] == "rebuild")
    assert not check["passed"]
    assert set(check["detail"].split(", ")) == {
        "README.md",
        "build.json",
        f"{dated.name}.aimodel/main.hash",
        f"{dated.name}.aimodel/main.mlirb",
    }


@pytest.mark.parametrize(("field", "name"), [("zoo", "coreai-zoo"), ("versions", "coreai-torch")])
def test_a_rebuild_with_other_versions_is_refused(
    dense: Path, dated: Path, tmp_path: Path, field: str, name: str
) -> None:
    bundle = shutil.copytree(dated, tmp_path / dated.name)
    record = json.loads((bundle / "build.json").read_text())
    installed = record["zoo"] if field == "zoo" else record["versions"][name]
    record[field] = "0.0.7" if field == "zoo" else {**record["versions"], name: "0.0.7"}
    write_json(bundle / "build.json", record)

    result = zoo("verify", bundle, "--rebuild", "--checkpoint", dense, cwd=tmp_path)

    assert result.returncode == 3
    assert f"{name} is {installed}, the bundle was built with 0.0.7" in result.stderr
