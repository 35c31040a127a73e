"""`zoo gate --corpus` on a shipped sample: what the command measures, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from command import zoo
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.catalogue import find_entry
from coreai_zoo.gates import run
from coreai_zoo.gates.corpus import BUILTIN, read_corpus
from coreai_zoo.gates.prompts import default_prompts
from coreai_zoo.gates.run import GateOptions
from coreai_zoo.plugins import default_plugins

ENTRY = "qwen3.6-27b"


@pytest.fixture(scope="module")
def original(built: Callable[[str, str], Bundle]) -> Bundle:
    return built(ENTRY, "int8hu")


@pytest.mark.slow
def test_a_sample_is_measured_over_the_built_in_text_beside_its_prompts(original: Bundle, tmp_path: Path) -> None:
    sample = find_entry(ENTRY, default_plugins())[0].sample_directory()
    options = ("--candidate", "torch", "--no-control", "--oracle-cache", tmp_path / "cache", "-o", tmp_path / "report")

    result = zoo("gate", original.directory, "--corpus", BUILTIN, "--positions", 300, *options, "--json")

    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    found, corpus = record["corpus"], read_corpus(original, BUILTIN, 300)
    taken, _ = default_prompts(original, sample)
    assert [prompt["name"] for prompt in record["prompts"]] == [prompt.name for prompt in taken], "no window of it"
    assert [len(prompt["tokens"]) for prompt in record["prompts"]] == [len(prompt.tokens) for prompt in taken]
    assert (found["windows"], found["counted"], found["sha256"]) == (2, 510, corpus.sha256)
    assert found["passed"] and found["flips"] == [] and found["power"]["positions"] > 800
    # The text is what the sample learned, and integers move little of it.
    assert 2 < found["oracle_perplexity"]["value"] < 20
    assert abs(found["log_perplexity_ratio"]["value"]) < 0.01 and 0 < found["kl_mean"]["value"] < 1e-3
    assert found["top1_agreement"]["low"] > 0.95
    assert "The corpus builtin: 510 positions count" in (tmp_path / "report" / "report.html").read_text(
        encoding="utf-8"
    )
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.html", "transcript.json"]
    assert not (original.directory / "gate").exists()
    assert {"windows", "corpus"} <= set(record["environment"]["seconds"])

    cached = zoo(
        "gate", original.directory, "--corpus", BUILTIN, "--positions", 511, *options, "--cached-only", "--json"
    )
    assert cached.exit_code == 2
    assert "holds no oracle result for window 3" in cached.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--corpus", "nowhere.txt"), "The corpus nowhere.txt cannot be read: No such file"),
        (("--corpus", "README.md", "-p", "def"), "leave out --prompt, --prompts and --prompt-file"),
        (("--corpus", BUILTIN, "--positions", 10**6), "1000000 positions were asked for"),
        (("--corpus", BUILTIN, "--sensitivity"), "--sensitivity goes with"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_measured_is_said_before_anything_runs(
    original: Bundle, options: tuple[object, ...], words: str
) -> None:
    result = zoo("gate", original.directory, *options)

    assert result.exit_code == 2, result.output
    assert words in result.stderr and "oracle   " not in result.stderr


def test_windows_of_the_built_in_text_are_prompts_of_small_bundles_that_pytorch_judges(original: Bundle) -> None:
    plugins = default_plugins()
    checkpoint = run.checkpoint_of(original, plugins, None)
    said: list[str] = []

    def windows(**given: object) -> int:
        options = GateOptions(control=False, **given)  # type: ignore[arg-type]
        subject = run._subject(original, options, plugins, checkpoint, None)
        taken, said[:] = run._prompts(subject, checkpoint, options)
        return sum(prompt.name.startswith("corpus-") for prompt in taken)

    assert windows(candidate="coreai") == 0
    assert "windows of the built-in corpus are left out: only the overlay in PyTorch takes them" in said
    assert windows(positions=24) == 0 and not any("windows" in remark for remark in said)
    assert windows() == windows(candidate="torch") == 6
    assert windows(positions=40) == windows(corpus=BUILTIN) == 0
    assert windows(prompts="code") == windows(prompt="def main():") == 0


def test_a_large_bundle_is_not_judged_by_windows(original: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = default_plugins()
    options = GateOptions(control=False, candidate="torch")
    subject = run._subject(original, options, plugins, run.checkpoint_of(original, plugins, None), None)
    monkeypatch.setattr(run, "_INTERPRETED_BYTES", 1000)

    assert run._windows(subject, options) == 0
