"""metadata.json of the samples' bundles against the golden file, and that the file is complete and has reasons."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from command import zoo
from coreai_zoo.build.pipeline import BuildResult
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.errors import BadInput
from coreai_zoo.review import check
from coreai_zoo.review.golden_metadata import golden_metadata_path, metadata_differences

GOLDENS = Path(__file__).parent / "goldens"
SAMPLES = ("qwen3.6-27b", "qwen3.6-35b-a3b")
ROWS: Mapping[str, Any] = tomllib.loads(golden_metadata_path(GOLDENS).read_text(encoding="utf-8"))


@pytest.mark.parametrize("entry", SAMPLES)
def test_the_metadata_of_a_sample_is_golden(entry: str, built: Callable[[str, str], Bundle]) -> None:
    assert metadata_differences(built(entry, "int8hu"), GOLDENS) == []


def test_every_key_has_a_reason_of_its_own_in_words() -> None:
    reasons = [row["why"] for row in ROWS.values()]
    assert all(len(reason.split()) >= 3 for reason in reasons)
    assert len(reasons) == len({*reasons}) >= 20


@pytest.mark.parametrize("key", [key for key in ROWS if not key.startswith("state ")])
def test_a_key_that_is_gone_or_another_is_told_with_the_reason(
    key: str, built: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    bundle = built(SAMPLES[0], "int8hu")
    for value in (None, "another"):
        metadata = json.loads(json.dumps(bundle.metadata))
        *path, last = key.split(".")
        within = metadata
        for part in path:
            within = within[part]
        if value is None:
            del within[last]
        else:
            within[last] = value
        problems = metadata_differences(evolve(bundle, metadata=metadata), GOLDENS)
        assert any(problem.startswith(f"{key} is ") for problem in problems), problems
        assert value is None or any(problem.endswith(ROWS[key]["why"]) for problem in problems)


def test_a_key_without_a_reason_is_told(built: Callable[[str, str], Bundle]) -> None:
    bundle = built(SAMPLES[0], "int8hu")
    more = evolve(bundle, metadata={**bundle.metadata, "author": "someone"})
    assert metadata_differences(more, GOLDENS) == ["author is 'someone', and no reason is given for it"]


def test_a_state_of_another_precision_is_told(built: Callable[[str, str], Bundle]) -> None:
    bundle = built(SAMPLES[0], "int8hu")
    build = json.loads(json.dumps(bundle.build))
    build["functions"]["main"]["states"][3]["dtype"] = "float32"
    (problem,) = metadata_differences(Bundle(bundle.directory, bundle.metadata, build), GOLDENS)
    assert problem.startswith("state recState is 'float32 [6, 1, 6, 32, 32]', not 'float16 [6, 1, 6, 32, 32]'")


def test_the_date_is_made_from_the_record(built: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    bundle = built(SAMPLES[0], "int8hu")
    later = Bundle(bundle.directory, bundle.metadata, {**bundle.build, "source_date_epoch": 86400})
    (problem,) = metadata_differences(later, GOLDENS)
    assert "not '1970-01-02T00:00:00Z'" in problem


@pytest.mark.parametrize("damage", ["", "[kind]\nvalue = 'llm'\n", "[kind]\nwhy = 'x'\n", "= 1\n"])
def test_a_golden_file_that_cannot_be_used_is_refused(
    damage: str, built: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    path = golden_metadata_path(tmp_path)
    path.parent.mkdir()
    if damage:
        path.write_text(damage, encoding="utf-8")
    with pytest.raises(BadInput, match=r"metadata\.toml"):
        metadata_differences(built(SAMPLES[0], "int8hu"), tmp_path)


def test_zoo_check_builds_a_sample_of_other_metadata_and_fails_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Callable[[str, str], Bundle]
) -> None:
    path = golden_metadata_path(tmp_path)
    path.parent.mkdir()
    text = golden_metadata_path(GOLDENS).read_text(encoding="utf-8")
    path.write_text(text.replace("value = 4096", "value = 4095"), encoding="utf-8")
    result = BuildResult.of_existing(built(SAMPLES[0], "int8hu"))
    monkeypatch.setattr(check, "build", lambda *_: result)

    (outcome,) = json.loads(zoo("check", "--only", "samples", "--goldens", tmp_path, "--json").stdout)["checks"]

    assert not outcome["passed"]
    assert "language.max_context_length is 4096, not 4095: a conversation grows up to it" in outcome["detail"]
