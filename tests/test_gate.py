"""`zoo gate` on a shipped sample: what it writes, what it refuses, and that a gated bundle is still the bundle."""

from __future__ import annotations

import html
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import Result

from command import zoo
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.bounds import Measured, MeasuredBounds
from coreai_zoo.build.rebuild import differences
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.contracts import STATIC_S1
from coreai_zoo.gate import ReferenceModel
from coreai_zoo.gates.huggingface import _by_config
from coreai_zoo.gates.run import replaced_by_less
from coreai_zoo.plugins import Plugins
from coreai_zoo_qwen36.bounds import BOUNDS as SAMPLES

MakePlugin = Callable[..., types.ModuleType]
ENTRY = "qwen3.6-27b"
# Of this prompt no oracle margin is a tie, also not in its first tokens.
SHORT = ("--prompts", "digits", "--positions", "6")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle's results, for all tests of this file."""
    return tmp_path_factory.mktemp("oracle")


@pytest.fixture(scope="module")
def original(built: Callable[[str, str], Bundle]) -> Path:
    return built(ENTRY, "int8hu").directory


@pytest.fixture(scope="module")
def gated(original: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A copy of the sample's bundle that was gated, and what the command said."""
    copy = tmp_path_factory.mktemp("gated") / original.name
    shutil.copytree(original, copy)
    result = zoo("gate", copy, *SHORT, "--oracle-cache", cache)
    assert result.exit_code == 0, result.output
    return copy, result


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / original.name)
    return tmp_path / original.name


def transcript(bundle: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((bundle / "gate" / "transcript.json").read_text(encoding="utf-8"))
    return record


def test_the_verdict_is_printed_and_written_as_transcript_page_and_card(gated: tuple[Path, Result]) -> None:
    bundle, result = gated
    record = transcript(bundle)

    assert "passed:" in result.stdout and "6 of 6 matched" in result.stdout
    assert sorted(path.name for path in (bundle / "gate").iterdir()) == ["report.html", "transcript.json"]
    assert record["verdict"]["passed"]
    (prompt,) = record["prompts"]
    assert len(prompt["positions"]) == 6
    assert f"{bundle.name}.aimodel on the coreai runtime" == prompt["candidate"]
    assert "PyTorch" in record["inputs"]["control"]
    assert prompt["control"]["matched"] == 6
    assert len(prompt["control"]["hidden_error"]) == record["bundle"]["layers"] + 1
    assert bundle.name in (bundle / "gate" / "report.html").read_text(encoding="utf-8")
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert "**The gate passed.**" in card and "Of 6 positions, digits (6), the most probable next token was" in card


def test_a_verdict_on_less_says_what_it_takes_the_place_of(gated: tuple[Path, Result], tmp_path: Path) -> None:
    """In the bundle, where the last verdict is what is published."""
    bundle, record = Bundle.open(gated[0]), transcript(gated[0])
    (prompt,) = record["prompts"]
    short = {**record, "prompts": [{**prompt, "positions": prompt["positions"][:2]}]}
    assert replaced_by_less(bundle, short) == (
        "This takes the place of a verdict on 6 sure positions; -o DIR keeps a short one apart."
    )
    assert replaced_by_less(bundle, record) is None, "as much as before"
    assert replaced_by_less(bundle, short, tmp_path) is None, "there is none"
    of_another = {**short, "bundle": {**short["bundle"], "build_sha256": "0" * 64}}
    assert replaced_by_less(bundle, of_another) is None
    again = Path(shutil.copytree(gated[0], tmp_path / gated[0].name))
    said = zoo("gate", again, "--prompts", "digits", "--positions", "4", "--no-control").stderr
    assert "This takes the place of a verdict on 6 sure positions" in said


@pytest.mark.usefixtures("gated")  # fills the cache, in whatever process this runs
def test_the_headroom_of_the_oracle_is_told_and_little_of_it_is_a_note(
    original: Path, gated: tuple[Path, Result], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = transcript(gated[0])["headroom"]
    assert found["warning"] is None and found["places"][0]["factor"] > 1000
    assert {"embedding", "model.layers.7: residual stream"} <= {place["where"] for place in found["places"]}
    assert found["statement"][1:] in " ".join(gated[1].stdout.split())

    monkeypatch.setattr("coreai_zoo.gates.headroom.LITTLE", 1e9)
    options = (*SHORT, "--oracle-cache", cache, "--cached-only", "--no-control", "-o", tmp_path)
    result = zoo("gate", original, *options, "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 0 and record["verdict"]["passed"], "a remark, no failure"
    assert record["headroom"]["places"] == [place | {"little": True} for place in found["places"]]
    assert f"note: {record['headroom']['warning']}\n" in result.stderr


def test_the_samples_are_held_to_what_was_measured_on_them(gated: tuple[Path, Result]) -> None:
    (prompt,) = transcript(gated[0])["prompts"]

    bounds = SAMPLES.of_recipe({"mlp": {"dtype": "int8"}}, 8, "runtime")
    assert prompt["bounds"] == attrs.asdict(bounds)
    limits = {check["name"]: check["limit"] for check in prompt["checks"]}
    assert limits["median relative error"] == pytest.approx(8.04e-3 * 1.5)
    assert limits["control: median relative error"] == pytest.approx(8.53e-4 * 1.5)


def test_a_plugin_brings_a_runtime_a_reference_and_bounds(copy: Path, make_plugin: MakePlugin) -> None:
    build = json.loads((copy / "build.json").read_text(encoding="utf-8"))
    acme = {"backend": "acme", "contract": build["contract"] | {"name": "acme-s1"}}
    (copy / "build.json").write_text(json.dumps(build | acme), encoding="utf-8")
    unreachable = Measured(*[0.0] * 8)
    bounds = MeasuredBounds("nothing but wishes", 8, {("int8", "runtime", "dense"): unreachable}, {})
    hooks = {
        "zoo_backends": lambda: [CoreAIBackend(name="acme", runtime="acme-cpu")],
        "zoo_contracts": lambda: [attrs.evolve(STATIC_S1, name="acme-s1", backends=("acme",))],
        "zoo_oracle": lambda: ReferenceModel("acme-models 2.1", _by_config),
        "zoo_gate_bounds": lambda: bounds,
    }
    plugins = Plugins.discover()
    plugins.register(make_plugin(**hooks), "acme")

    result = zoo("gate", copy, *SHORT, "--candidate", "acme-cpu", plugins=plugins)

    assert result.exit_code == 1, result.output
    record = transcript(copy)
    (prompt,) = record["prompts"]
    assert prompt["candidate"] == f"{copy.name}.aimodel on the acme-cpu runtime"
    assert record["inputs"]["oracle"] == "acme-models 2.1 in float32"
    assert prompt["matched"] == 6, "the reference is the same model, whoever makes it"
    assert prompt["bounds"]["measured_on"] == "nothing but wishes"
    assert any("median relative error is" in reason for reason in record["verdict"]["reasons"])
    assert "measured on nothing but wishes" in (copy / "gate" / "report.html").read_text(encoding="utf-8")


def test_a_candidate_that_no_backend_runs_is_answered_with_the_nearest(original: Path) -> None:
    for name, answer in (("corai", "Did you mean coreai?"), ("qq", "There are auto, torch, coreai, mil.")):
        result = zoo("gate", original, "--candidate", name)
        assert (result.exit_code, result.stderr) == (2, f"error: There is no candidate {name!r}. {answer}\n")


def test_a_gated_bundle_verifies_and_equals_a_rebuild(gated: tuple[Path, Result], original: Path) -> None:
    bundle, _ = gated

    assert (bundle / "README.md").read_bytes() != (original / "README.md").read_bytes()
    assert differences(bundle, original) == []
    assert differences(original, bundle) == []
    result = zoo("verify", bundle)
    assert result.exit_code == 0, result.output
    with (bundle / "README.md").open("a") as file:
        file.write("more")
    assert differences(bundle, original) == ["README.md"]
    assert zoo("verify", bundle).exit_code == 1


@pytest.mark.slow
@pytest.mark.usefixtures("gated")  # fills the cache, in whatever process this runs
def test_the_overlay_on_the_assets_weights_agrees_and_two_bundles_stand_side_by_side(
    built: Callable[[str, str], Bundle], original: Path, cache: Path, tmp_path: Path
) -> None:
    worse = built(ENTRY, "int4lin").directory
    options = (*SHORT, "--oracle-cache", cache, "--cached-only", "--candidate", "torch")

    result = zoo("gate", original, "--against", worse, *options, "-o", tmp_path, "--json")

    record = json.loads(result.stdout)
    ours, theirs = (one["prompts"][0] for one in (record, record["against"]))
    assert record["verdict"]["passed"] and result.exit_code == 0, result.output
    assert max(ours["hidden_error"]) < max(theirs["hidden_error"])
    assert ours["control"] == theirs["control"]
    assert not (original / "gate").exists() and not (worse / "gate").exists()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Beside {worse.name}" in page


@pytest.mark.slow
def test_with_sensitivity_the_gate_says_of_a_bundle_what_the_command_of_that_name_says(original: Path) -> None:
    options = ("--positions", "3", "--json")

    asked, expected = zoo("gate", original, "--sensitivity", *options), zoo("sensitivity", original, *options)

    assert (asked.exit_code, expected.exit_code) == (0, 0), asked.output + expected.output
    assert json.loads(asked.stdout) == json.loads(expected.stdout)
    assert {part["role"] for part in json.loads(asked.stdout)["parts"]} == {
        "attention",
        "gdn.in",
        "gdn.out",
        "head",
        "mlp",
    }


def test_a_prompt_that_is_left_out_is_told_in_terminal_transcript_and_page(
    original: Path, cache: Path, tmp_path: Path
) -> None:
    options = ("--positions", "24", "--candidate", "torch", "--no-control", "--oracle-cache", cache, "-o", tmp_path)

    result = zoo("gate", original, *options)

    assert result.exit_code == 0, result.output
    words = "prompt 'long' is left out: it is 512 positions, of which 24 fit"
    record = json.loads((tmp_path / "transcript.json").read_text(encoding="utf-8"))
    assert words in record["remarks"] and words in result.stderr
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert words[1:] in page
    # The chat goes on, and two of its turns end within these positions.
    (chat,) = (prompt for prompt in record["prompts"] if prompt["name"] == "chat")
    assert not chat["judged"] or len(chat["stop"]["expected"]) >= 1


# ---------------------------------------------------------------------------------------------------------------------
# Refused before anything runs
# ---------------------------------------------------------------------------------------------------------------------


def refused(result: Result, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    assert "oracle   " not in result.stderr, "the oracle must not have run"
    return result.stderr


@pytest.mark.parametrize("name", ["metadata.json", "tokenizer/tokenizer_config.json", "README.md"])
def test_an_edited_bundle_is_refused(copy: Path, name: str) -> None:
    (copy / name).write_text((copy / name).read_text(encoding="utf-8") + " ", encoding="utf-8")

    assert f"{name} was changed" in refused(zoo("gate", copy, *SHORT), code=1)
    assert not (copy / "gate").exists()


def test_a_tokenizer_with_more_tokens_than_logits_is_refused(copy: Path) -> None:
    from coreai_zoo.bundle.layout import file_digests
    from coreai_zoo.json_files import write_json

    path = copy / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    last = max(tokenizer["model"]["vocab"].values())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": last + 1, "content": "<|extra|>"})
    write_json(path, tokenizer)
    write_json(copy / "build.json", {**json.loads((copy / "build.json").read_text()), "files": file_digests(copy)})

    text = refused(zoo("gate", copy, *SHORT))

    assert f"token ids up to {last + 1}, but its model has logits for {last + 1} tokens" in text


def test_a_checkpoint_that_is_not_there_is_refused(original: Path, tmp_path: Path) -> None:
    text = refused(zoo("gate", original, "--checkpoint", tmp_path / "nowhere"))

    assert f"There is no checkpoint at {tmp_path / 'nowhere'}" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-p", "def", "--positions", 60), "tokens, and 60 positions were asked for"),
        (("--prompts", "digits", "--positions", 400), "The prompt 'digits' is"),
        (("--prompts", "cod"), "Did you mean code"),
        (("-p", "def", "--prompts", "code"), "Give one of"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--cached-only",), "--cached-only needs a cache"),
        (("-o", "/dev/null/report"), "cannot be written"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_said(original: Path, options: tuple[object, ...], words: str) -> None:
    assert words in refused(zoo("gate", original, *options))


def test_a_cache_without_the_result_is_an_error_when_only_the_cache_may_be_used(original: Path, tmp_path: Path) -> None:
    text = refused(zoo("gate", original, *SHORT, "--oracle-cache", tmp_path, "--cached-only"))

    assert f"{tmp_path} holds no oracle result for digits" in text


def test_a_weak_prompt_is_refused_before_the_candidate_runs(original: Path, cache: Path) -> None:
    result = zoo("gate", original, "-p", "qzx jvk wqy bgh zzt plo mnr", "--oracle-cache", cache)

    assert result.exit_code == 2, result.output
    assert "is too weak to judge by" in result.stderr and "--allow-weak-prompt" in result.stderr
    assert "judge    " not in result.stderr and "control  " not in result.stderr
    assert not (original / "gate").exists()
