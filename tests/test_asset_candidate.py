"""A bundle on its runtime, several prompts at a time: processes of their own, which end with the gate."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve, field, frozen

from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.backends.coreml.backend import CoreMLBackend
from coreai_zoo.build.design import design
from coreai_zoo.build.rebuild import recorded_request
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import checkpoint_of
from coreai_zoo.errors import CheckFailed
from coreai_zoo.gates import candidate
from coreai_zoo.gates.candidate import AssetCandidate
from coreai_zoo.gates.run import GateOptions, _models, at_once
from coreai_zoo.plugins import default_plugins
from test_sensitivity_run import running, servers_of, wait_until, workers_of

PROMPTS = ([5, 80, 17], [250, 3], [99, 41, 7, 120])


@pytest.fixture(scope="module")
def bundle(built: Callable[[str, str], Bundle]) -> Bundle:
    return built("qwen3.6-27b", "int8hu")


@pytest.fixture
def worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few positions are worth processes, so that they are soon done."""
    monkeypatch.setattr(candidate, "_WORTH_PROCESSES", 1)


@frozen
class Telling(CoreAIBackend):
    """Says for each prompt which process runs it."""

    folder: Path = Path()

    def stepper(self, *arguments: Any, **keywords: Any) -> Any:
        (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        return super().stepper(*arguments, **keywords)


@frozen
class Ending(Telling):
    """Ends any other process that is to run a prompt, as a system that has no memory left does."""

    here: int = field(factory=os.getpid)

    def stepper(self, *arguments: Any, **keywords: Any) -> Any:
        if os.getpid() != self.here:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().stepper(*arguments, **keywords)


@frozen
class Refusing(Telling):
    def stepper(self, *arguments: Any, **keywords: Any) -> Any:
        super().stepper(*arguments, **keywords)
        raise CheckFailed("This asset is not to be run.", "Build another.")


@frozen
class OfThisProcess(Telling):
    """Holds what cannot be given to another process."""

    held: Callable[[], None] = lambda: None


@frozen
class WithoutMemory(CoreMLBackend):
    """Core ML's, which does not look into the asset."""

    def require_memory(self, asset: Path) -> None:
        pass


def processes_in(folder: Path) -> list[int]:
    """The process of each prompt."""
    return [int(path.name.partition("-")[0]) for path in folder.iterdir()]


@pytest.mark.usefixtures("worth")
def test_prompts_side_by_side_have_the_bits_that_each_has_alone(bundle: Bundle, tmp_path: Path) -> None:
    steps: list[int] = []
    together = AssetCandidate(bundle, Telling(folder=tmp_path), lambda: steps.append(1), jobs=2)
    found = together.run_many(PROMPTS)
    assert len(steps) == sum(map(len, PROMPTS))
    ran = processes_in(tmp_path)
    assert len(ran) == len(PROMPTS) and len(set(ran)) == 2 and os.getpid() not in ran

    alone = AssetCandidate(bundle, CoreAIBackend())
    for tokens, activations in zip(PROMPTS, found, strict=True):
        assert activations.logits.shape[0] == len(tokens)
        assert np.array_equal(activations.logits, alone.run(tokens).logits)


@pytest.mark.parametrize(
    ("jobs", "prompts", "backend"), [(1, PROMPTS, Telling), (2, PROMPTS[:1], Telling), (2, PROMPTS, OfThisProcess)]
)
@pytest.mark.usefixtures("worth")
def test_one_prompt_or_a_backend_that_stays_here_runs_here(
    jobs: int, prompts: Any, backend: type[Telling], bundle: Bundle, tmp_path: Path
) -> None:
    AssetCandidate(bundle, backend(folder=tmp_path), jobs=jobs).run_many(prompts)
    assert processes_in(tmp_path) == [os.getpid()] * len(prompts)


def test_a_few_positions_run_here(bundle: Bundle, tmp_path: Path) -> None:
    AssetCandidate(bundle, Telling(folder=tmp_path), jobs=2).run_many(PROMPTS)
    assert processes_in(tmp_path) == [os.getpid()] * len(PROMPTS)


@pytest.mark.usefixtures("worth")
def test_what_goes_wrong_in_a_process_is_told_as_if_it_were_here(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="This asset is not to be run") as refused:
        AssetCandidate(bundle, Refusing(folder=tmp_path), jobs=2).run_many(PROMPTS)
    assert refused.value.hint == "Build another."
    assert os.getpid() not in processes_in(tmp_path), "it is not tried once more here"


@pytest.mark.usefixtures("worth")
def test_where_processes_are_killed_this_one_runs_the_prompts(bundle: Bundle, tmp_path: Path) -> None:
    found = AssetCandidate(bundle, Ending(folder=tmp_path), jobs=2).run_many(PROMPTS)
    assert processes_in(tmp_path) == [os.getpid()] * len(PROMPTS)
    assert [len(each.logits) for each in found] == [len(tokens) for tokens in PROMPTS]


@pytest.mark.usefixtures("worth")
def test_where_no_process_can_be_made_this_one_runs_the_prompts(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", "/dev/shm")

    monkeypatch.setattr(candidate, "processes", refused)
    AssetCandidate(bundle, Telling(folder=tmp_path), jobs=2).run_many(PROMPTS)
    assert processes_in(tmp_path) == [os.getpid()] * len(PROMPTS)


@pytest.mark.usefixtures("worth")
def test_the_logits_for_a_device_are_kept_from_there_too(bundle: Bundle, tmp_path: Path) -> None:
    kept = AssetCandidate(bundle, CoreAIBackend(), keep_in=tmp_path, jobs=2)
    found = kept.run_many(PROMPTS)
    files = [np.load(path) for path in tmp_path.iterdir()]
    assert sorted(file["tokens"].tolist() for file in files) == sorted(PROMPTS)
    by_tokens = {tuple(file["tokens"].tolist()): file["logits"] for file in files}
    for tokens, activations in zip(PROMPTS, found, strict=True):
        assert np.array_equal(by_tokens[tuple(tokens)], activations.logits)


@pytest.mark.parametrize(("backend", "jobs", "expected"), [("coreai", 2, 2), ("coreai", 1, 1), ("coreml", 2, 1)])
def test_a_runtime_that_takes_the_whole_machine_runs_a_prompt_at_a_time(
    backend: str, jobs: int, expected: int, bundle: Bundle
) -> None:
    """The reference interpreter of Core ML is torch, which has its own threads."""
    request, _ = recorded_request(bundle, checkpoint_of(bundle, default_plugins(), None), bundle.directory.parent)
    runtimes = {"coreai": CoreAIBackend(), "coreml": WithoutMemory()}
    shipped = evolve(design(evolve(request, dry=True), default_plugins()), backend=runtimes[backend])
    models = _models(bundle, shipped, None, GateOptions(jobs=jobs), None)
    assert isinstance(models.candidate.model, AssetCandidate)
    assert models.candidate.model.jobs == expected


@pytest.mark.parametrize(
    ("size", "cores", "memory", "expected"),
    [
        (2**20, 8, None, 8),
        (2**20, 8, 2**33, 8),
        (2**20, 8, 2**30, 3),
        (2**26, 8, 2**31, 4),  # an asset is held more than once while it is loaded
        (2**20, 8, 2**20, 1),
        (2**20, 1, 2**33, 1),
    ],
)
def test_so_many_prompts_run_at_a_time_as_cores_and_memory_take(
    size: int, cores: int, memory: int | None, expected: int
) -> None:
    assert at_once(size, cores, memory) == expected


def works(pid: int) -> bool:
    """Whether a process is there and not only its number, which waits for somebody to read how it ended."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text(encoding="ascii")


@pytest.mark.slow
@pytest.mark.parametrize("started", [servers_of, workers_of])
def test_a_gate_is_interrupted_with_the_processes_that_it_started(
    started: Callable[..., list[int]], bundle: Bundle, tmp_path: Path
) -> None:
    options = ("--prompts", "code,text", "--positions", "60", "--no-control", "-o", tmp_path / "report")
    with running("gate", bundle.directory, *options) as process:
        wait_until(lambda: bool(started(process)), process)
        ran = started(process)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "interrupted" and "Traceback" not in stderr
    assert not any(map(works, ran))
    assert not (tmp_path / "report").exists()
