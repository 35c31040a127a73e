"""`zoo new`, and what an entry means at a build: its facts are the checkpoint's, or it is refused."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from checkpoints import text_config, tiny_checkpoint, write_json
from command import zoo
from coreai_zoo import hookspecs
from coreai_zoo.build.design import design
from coreai_zoo.build.rebuild import recorded_request
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.catalogue import find_entry
from coreai_zoo.entry import load_entry
from coreai_zoo.errors import BadInput
from coreai_zoo.planning.scaffold import NEEDED_HOOKS, USUAL_HOOKS
from coreai_zoo.plugins import default_plugins
from decoders import OVERLAY
from documents import read

ENTRY = "qwen3.6-27b"
WRAPPED = {"model_type": "qwen3_5", "text_config": text_config("dense"), "vision_config": {"depth": 2}}


def error_of(result: Result, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    last = result.stderr.splitlines()[-1]  # a build reports its progress before
    assert last.startswith("error: ")
    return last


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "sibling")


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder that has nothing but a `config.json`."""

    def make(config: dict[str, Any]) -> Path:
        folder = tmp_path / "bare"
        folder.mkdir(exist_ok=True)
        write_json(folder / "config.json", config)
        return folder

    return make


# ---------------------------------------------------------------------------------------------------------------------
# From a checkpoint to a bundle
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my models", "it's mine", "$HOME;ls", "-o", 'a "b"', "plain"])
def test_the_commands_that_are_printed_can_be_pasted_whatever_a_folder_is_called(
    checkpoint: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, Path(name))
    (tmp_path / "x" / name).mkdir(parents=True)

    made = zoo("new", "tiny-sibling", f"--from=./{name}", f"--output=x/{name}")
    assert made.exit_code == 0, made.stderr

    commands = [shlex.split(line) for line in made.stdout.splitlines() if line.startswith("    zoo ")]
    plan, build = ([word.removeprefix("./") for word in command] for command in commands)
    assert plan == ["zoo", "plan", f"x/{name}/tiny-sibling.toml"]
    assert build[:5] == ["zoo", "build", f"x/{name}/tiny-sibling.toml", "--checkpoint", name]
    assert commands[1][4] == (f"./{name}" if name.startswith("-") else name), "it would be an option"
    refused = zoo("build", ENTRY, "--checkpoint", commands[1][4])
    assert shlex.join(["zoo", "new", "NAME", "--from", commands[1][4]]) in error_of(refused)


@pytest.mark.slow
def test_a_sibling_is_planned_built_and_gated_from_the_entry_that_was_written_for_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    made = zoo("new", "tiny-sibling", "--from", checkpoint, "-o", tmp_path)
    path = tmp_path / "tiny-sibling.toml"
    assert made.exit_code == 0, made.stderr
    assert f"zoo build {path} --checkpoint {checkpoint}" in made.stdout
    planned = json.loads(zoo("plan", path, "--json").stdout)

    result = zoo("build", path, "--checkpoint", checkpoint, "-o", tmp_path)

    assert result.exit_code == 0, result.stderr
    bundle = Bundle.open(tmp_path / "tiny_sibling_decode_int8hu_block32_sym")
    card = (bundle.directory / "README.md").read_text(encoding="utf-8")
    assert "The facts of the entry `tiny-sibling` were not compared with the published checkpoint." in card
    assert "The facts of entry tiny-sibling were not compared with the published checkpoint." in result.stderr
    assert (bundle.build["compared"], bundle.build["entry"]["differences"]) == (False, [])
    assert bundle.origin["hf_id"] is None and "https://huggingface.co" not in card
    roles = {role: (sums["parameters"], sums["bytes"]) for role, sums in planned["roles"].items()}
    assert {role: (sums["parameters"], sums["bytes"]) for role, sums in bundle.build["weights"].items()} == roles
    # The graph is allowed for generously; what matters is the weights, and that a plan never promises too little.
    allowance = planned["asset_bytes"] - sum(size for _, size in roles.values())
    assert 0 <= planned["asset_bytes"] - (bundle.asset / "main.mlirb").stat().st_size < allowance < 100 * 2**10
    # The entry is in no plugin: the gate does without it.
    gate = ("gate", bundle.directory, "--checkpoint", checkpoint, "--positions", "16", "--prompts", "code", "--json")
    judged = zoo(*gate)
    record = json.loads(judged.stdout)
    (prompt,) = record["prompts"]
    assert (len(prompt["positions"]), prompt["confident_flips"]) == (16, 0)
    # Its random weights may miss bounds that were measured on trained ones, and nothing else.
    missed = [reason for reason in record["verdict"]["reasons"] if "is allowed" not in reason]
    assert missed == [] and judged.exit_code == (1 if record["verdict"]["reasons"] else 0)


def test_the_entry_states_what_the_overlay_makes_of_the_config(checkpoint: Path, tmp_path: Path) -> None:
    told = json.loads(zoo("new", "tiny", "--from", checkpoint, "-o", tmp_path, "--json").stdout)

    entry = load_entry(Path(told["path"]))
    assert entry.facts.stated == OVERLAY.facts(OVERLAY.read_config({"model_type": "qwen3_5", **text_config("dense")}))
    assert (entry.status, entry.hf_id, entry.hf_revision, entry.licence) == ("unverified", None, None, None)
    assert (entry.model_type, entry.bundle.max_context) == (("qwen3_5",), 512)
    assert told["not_known"] == ["hf_id", "hf_revision", "licence"]
    assert told["weights"]["fit"] and "4 are left out on purpose" in told["weights"]["detail"]
    assert (told["overlay"], told["plugin"], told["same_facts_as"]) == ("qwen3_5", "qwen36", None)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_config_alone_is_enough(bare: Callable[..., Path], tmp_path: Path) -> None:
    told = json.loads(zoo("new", "tiny", "--from", bare(WRAPPED), "-o", tmp_path, "--json").stdout)

    assert told["weights"] is None
    assert told["facts"]["hidden_size"] == 32

    folder = bare(WRAPPED)
    said = " ".join(zoo("new", "other", "--from", folder, "-o", tmp_path).stdout.split())
    build = f"zoo build {tmp_path / 'other.toml'} --checkpoint {folder}"
    assert f"A build needs weights and tokenizer, which are not in {folder}; put them there, then: {build}" in said
    arguments = ("--checkpoint", folder, "-o", tmp_path / "out")
    assert f"{folder} has no weights" in error_of(zoo("build", tmp_path / "other.toml", *arguments))


def test_fields_that_the_overlay_does_not_look_at_are_named(bare: Callable[..., Path], tmp_path: Path) -> None:
    folder = bare({**WRAPPED, "text_config": {**text_config("dense"), "mtp_num_hidden_layers": 1}})
    unread = json.loads(zoo("new", "tiny", "--from", folder, "-o", tmp_path, "--json").stdout)["not_looked_at"]

    assert {"vision_config", "text_config.mtp_num_hidden_layers", "text_config.attention_dropout"} <= set(unread)
    # Looked at, whether or not they are the default, whether or not another value would be accepted.
    looked_at = {"hidden_act", "head_dim", "rms_norm_eps", "tie_word_embeddings", "layer_types", "rope_parameters"}
    assert not {f"text_config.{name}" for name in looked_at} & set(unread)
    assert "text_config.rope_parameters.mrope_section" in unread
    assert "text_config.rope_parameters.rope_theta" not in unread
    assert "vision_config, text_config.attention_dropout" not in unread


def test_weights_that_do_not_fit_are_told_and_the_entry_is_written_all_the_same(tmp_path: Path) -> None:
    odd = tiny_checkpoint(tmp_path / "odd", extra_keys=False)
    config = json.loads((odd / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 96
    write_json(odd / "config.json", config)

    told = json.loads(zoo("new", "odd", "--from", odd, "-o", tmp_path, "--json").stdout)

    assert not told["weights"]["fit"] and "misshapen" in told["weights"]["detail"]
    assert load_entry(tmp_path / "odd.toml").name == "odd"


def test_a_fine_tune_is_recognised_and_gets_the_sample_of_its_model(bare: Callable[..., Path], tmp_path: Path) -> None:
    twin, _ = find_entry("qwen3.5-27b", default_plugins())
    folder = bare(OVERLAY.config_of_facts(twin.facts.stated))

    told = json.loads(zoo("new", "fine-tune", "--from", folder, "-o", tmp_path, "--json").stdout)

    assert told["same_facts_as"] == "qwen3.5-27b"
    assert load_entry(Path(told["path"])).sample == twin.sample is not None


def test_a_snapshot_in_a_cache_gives_repository_and_revision(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--some-lab--Qwen-Tune" / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", WRAPPED)

    assert zoo("new", "tune", "--from", folder, "-o", tmp_path).exit_code == 0

    entry = load_entry(tmp_path / "tune.toml")
    assert (entry.hf_id, entry.hf_revision, entry.title) == ("some-lab/Qwen-Tune", "0123456789" * 4, "Qwen-Tune")


def test_the_entry_goes_where_entries_are(
    bare: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bare(WRAPPED)
    monkeypatch.chdir(tmp_path)
    assert zoo("new", "one", "--from", folder).exit_code == 0
    (tmp_path / "zoo_entries").mkdir()
    assert zoo("new", "two", "--from", folder).exit_code == 0

    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.toml"))] == [
        "one.toml",
        "zoo_entries/two.toml",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be made an entry
# ---------------------------------------------------------------------------------------------------------------------


def test_an_architecture_that_nobody_claims_is_answered_with_the_hooks_to_write(
    bare: Callable[..., Path], tmp_path: Path
) -> None:
    result = zoo("new", "stranger", "--from", bare({"model_type": "llama", "hidden_size": 8}), "-o", tmp_path)

    text = error_of(result)
    assert "'llama' is claimed by no plugin, so no entry was written" in text
    assert "docs/tutorial.md, docs/hooks.md and docs/overlay.md (Writing one) show how" in text
    assert "\n## Writing one\n" in read("overlay.md")
    for hook in (*NEEDED_HOOKS, *USUAL_HOOKS):
        assert hook in text and hook in result.stdout and hasattr(hookspecs, hook)
    assert "Claim an architecture." in result.stdout and "coreai_zoo.overlay.Overlay" in result.stdout
    assert not list(tmp_path.glob("*.toml"))


def test_a_claimed_config_that_the_overlay_cannot_use_is_refused(bare: Callable[..., Path], tmp_path: Path) -> None:
    folder = bare(text_config("dense", hidden_act="gelu"))

    text = error_of(zoo("new", "gelu", "--from", folder, "-o", tmp_path))

    assert "hidden_act is 'gelu'; only 'silu' is implemented" in text
    assert not list(tmp_path.glob("*.toml"))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (ENTRY, "There is an entry 'qwen3.6-27b' already, from plugin 'qwen36'"),
        ("Tiny", "name: 'Tiny' is not lowercase letters and digits"),
        ("a/b", "'a/b' is not a name but a path"),
        ("there", "there.toml exists. Pass --force"),
    ],
)
def test_a_name_that_is_none_or_is_taken_is_refused(
    bare: Callable[..., Path], tmp_path: Path, name: str, complaint: str
) -> None:
    (tmp_path / "there.toml").write_text("mine")

    assert complaint in error_of(zoo("new", name, "--from", bare(WRAPPED), "-o", tmp_path))

    assert [path.name for path in sorted(tmp_path.iterdir())] == ["bare", "there.toml"]
    assert (tmp_path / "there.toml").read_text() == "mine"
    if name == "there":
        assert zoo("new", name, "--from", tmp_path / "bare", "-o", tmp_path, "--force").exit_code == 0


@pytest.mark.parametrize("source", ["no/such/folder", "nothing", "file.txt"])
def test_a_source_that_is_neither_folder_nor_repository_is_refused(tmp_path: Path, source: str) -> None:
    said = "is no folder, and not the name of a repository" if "/" in source else f"no entry is called {source!r}"
    assert said in error_of(zoo("new", "x", "--from", source, "-o", tmp_path))


def test_a_repository_without_network_is_the_environments_fault_and_says_what_to_pass(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from coreai_zoo.cli.app import main; main()",
        "new",
        "x",
        "--from",
        "lab/model",
    ]
    process = subprocess.run(
        command,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},  # read once per process
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    assert process.returncode == 3, process.stderr
    assert process.stderr.startswith("error: lab/model is not to be fetched: HF_HUB_OFFLINE is set.")
    assert "give a folder with the checkpoint" in process.stderr and len(process.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("*.toml"))


# ---------------------------------------------------------------------------------------------------------------------
# The entry against the checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def test_every_fact_that_contradicts_the_checkpoint_is_listed(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    text = error_of(zoo("build", ENTRY, "--checkpoint", checkpoint, "-o", output), 2)

    stated = find_entry(ENTRY, default_plugins())[0].facts.stated
    told = design(BuildRequest(checkpoint=checkpoint, dry=True), default_plugins()).facts
    differing = [fact for fact in stated if told[fact] != stated[fact]]
    assert len(differing) > 10 and "tied_head" not in differing
    for fact in differing:
        assert f"{fact} is {told[fact]}, the entry says {stated[fact]}" in text
    assert text.count("the entry says") == len(differing) and "tied_head" not in text
    assert f"zoo new NAME --from {checkpoint}" in text and "--custom" in text
    assert not output.exists()


def test_a_slice_is_compared_as_a_whole(checkpoint: Path, tmp_path: Path) -> None:
    deeper = tiny_checkpoint(tmp_path / "deeper", num_hidden_layers=4)
    zoo("new", "deeper", "--from", deeper, "-o", tmp_path)
    entry = str(tmp_path / "deeper.toml")

    sliced = design(BuildRequest(entry, deeper, layers=2), default_plugins())
    assert (sliced.differences, sliced.facts["layers"]) == ((), 2)
    with pytest.raises(BadInput, match="layers is 2, the entry says 4"):
        design(BuildRequest(entry, checkpoint), default_plugins())


def test_custom_is_for_checkpoints_that_differ(checkpoint: Path, tmp_path: Path) -> None:
    zoo("new", "tiny", "--from", checkpoint, "-o", tmp_path)

    custom = design(BuildRequest(ENTRY, checkpoint, custom=True), default_plugins())
    assert custom.name == "qwen3_6_27b_custom_decode_int8hu_block32_sym"
    assert (custom.compared, custom.source.origin.hf_id) == (None, None)
    with pytest.raises(BadInput, match="nothing --custom about it"):
        design(BuildRequest(str(tmp_path / "tiny.toml"), checkpoint, custom=True), default_plugins())


@pytest.mark.parametrize("entry", [ENTRY, "qwen3.5-0.8b"])
def test_an_entry_that_was_compared_with_nothing_is_no_reason_to_refuse(checkpoint: Path, entry: str) -> None:
    text = error_of(zoo("build", entry, "--checkpoint", checkpoint))
    assert f"{checkpoint} is not the model of entry {entry}: " in text and "verified" not in text


def test_a_sample_claims_nothing_of_the_published_checkpoint() -> None:
    sample = design(BuildRequest(ENTRY, sample=True), default_plugins())
    assert (sample.compared, sample.source.origin.hf_id) == (None, None)


@pytest.mark.parametrize("differences", [[], ["layers is 2, the entry says 64"]])
def test_a_rebuild_asks_for_what_was_allowed(tmp_path: Path, differences: list[str]) -> None:
    build = {
        "entry": {"name": ENTRY, "differences": differences},
        "sample": False,
        "recipe": {"name": "fp16"},
        "contract": {"name": "static-s1"},
        "backend": "coreai",
        "max_context": 64,
        "request": {"layers": None},
        "source_date_epoch": 0,
    }
    request, _ = recorded_request(Bundle(tmp_path, {}, build), None, tmp_path)

    assert (request.model, request.custom) == (ENTRY, bool(differences))
