"""`zoo publish` against a hub on this machine: what arrives there, what does not, and what is refused before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from command import zoo
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.publish import Publication
from hub import Hub

REPO = "somebody/Sample-coreai"
GATE = ("--prompts", "digits", "--positions", "6")


@pytest.fixture(scope="module")
def passed(built: Callable[[str, str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that has passed its gate. Tests copy it."""
    original = built("qwen3.6-27b", "int8hu").directory
    copy = tmp_path_factory.mktemp("gated") / original.name
    shutil.copytree(original, copy)
    result = zoo("gate", copy, *GATE)
    assert result.exit_code == 0, result.output
    return copy


@pytest.fixture
def gated(passed: Path, tmp_path: Path) -> Path:
    shutil.copytree(passed, tmp_path / passed.name)
    return tmp_path / passed.name


@pytest.fixture
def ungated(gated: Path) -> Path:
    """As it was built."""
    shutil.rmtree(gated / "gate")
    return gated


@pytest.fixture
def token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """A token of this machine that the hub knows."""
    hub.tokens.add("hf_good")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    return "hf_good"


def error_of(code: int, *arguments: object) -> str:
    result = zoo("publish", *arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    return result.stderr.partition("error: ")[2]


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def arrived(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    stored = hub.repositories[REPO]
    return {name: content for name, content in stored.commits[stored.revisions[revision]].items() if name[0] != "."}


def written(hub: Hub) -> list[str]:
    """Requests that change something on the hub."""
    asked = [request.path for request in hub.requests if request.method in {"POST", "PUT"}]
    return [path for path in asked if not path.endswith("validate-yaml")]


# ---------------------------------------------------------------------------------------------------------------------
# What arrives
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("token")
def test_a_gated_bundle_arrives_whole_with_its_report_and_its_page_is_printed(gated: Path, hub: Hub) -> None:
    result = zoo("publish", gated, REPO)

    assert result.exit_code == 0, result.output
    assert result.stdout == f"{hub.endpoint}/{REPO}\n"
    assert arrived(hub) == files(gated)
    assert {"gate/report.html", "gate/transcript.json", "build.json", "README.md"} <= arrived(hub).keys()
    assert not hub.repositories[REPO].private
    card = arrived(hub)["README.md"].decode()
    assert ModelCard(card).data.library_name == "coreai" and "**The gate passed.**" in card


@pytest.mark.usefixtures("token")
def test_what_has_arrived_verifies(gated: Path, hub: Hub, tmp_path: Path) -> None:
    assert zoo("publish", gated, REPO).exit_code == 0
    for name, content in arrived(hub).items():
        (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(content)

    assert zoo("verify", tmp_path / "fetched").exit_code == 0
    assert Publication(Bundle.open(tmp_path / "fetched")).verdict == "passed"


@pytest.mark.usefixtures("token")
def test_nothing_else_that_lies_in_the_folder_is_uploaded_and_what_is_skipped_is_said(gated: Path, hub: Hub) -> None:
    before = files(gated)
    strays = [".DS_Store", "notes.txt", "tokenizer/.DS_Store", "gate/old.html", ".cache/huggingface/x", "token[1].txt"]
    for name in strays:
        (gated / name).parent.mkdir(parents=True, exist_ok=True)
        (gated / name).write_text("a secret")
    (gated / "nowhere").symlink_to("/nowhere")

    result = zoo("publish", gated, REPO)

    assert result.exit_code == 0, result.output
    assert arrived(hub) == before
    assert all(name in result.stderr.partition("not uploaded: ")[2] for name in [*strays, "nowhere"])
    assert zoo("verify", gated).exit_code == 1, "only publishing leaves them out"


@pytest.mark.usefixtures("token")
def test_a_private_repository_and_a_branch_are_made(gated: Path, hub: Hub) -> None:
    result = zoo("publish", gated, REPO, "--private", "--revision", "v1")

    assert result.exit_code == 0, result.output
    assert result.stdout == f"{hub.endpoint}/{REPO}/tree/v1\n"
    assert hub.repositories[REPO].private
    assert arrived(hub, "v1") == files(gated) and arrived(hub) == {}


@pytest.mark.usefixtures("token")
def test_an_upload_that_broke_off_sends_nothing_twice(gated: Path, hub: Hub) -> None:
    hub.inject("/commit/main", status=500, times=-1, methods=("POST",))
    said = error_of(3, gated, REPO)
    assert "does not take the upload (500" in said and "Run the same command again" in said
    sent = [path for path in written(hub) if path.startswith("/lfs/")]
    assert sent

    hub.heal()
    hub.requests.clear()
    assert zoo("publish", gated, REPO).exit_code == 0
    assert arrived(hub) == files(gated)
    assert [path for path in written(hub) if path.startswith("/lfs/")] == []
    # And once more: there is nothing left to do.
    commits = len(hub.repositories[REPO].commits)
    again = zoo("publish", gated, REPO)
    assert again.exit_code == 0, again.output
    assert len(hub.repositories[REPO].commits) == commits


@pytest.mark.usefixtures("token", "hub")
def test_json_says_what_was_uploaded(gated: Path) -> None:
    told = json.loads(zoo("publish", gated, REPO, "--json").stdout)

    assert told["files"] == {name: len(content) for name, content in files(gated).items()}
    assert (told["repository"], told["revision"], told["gate"], told["skipped"]) == (REPO, "main", "passed", [])
    assert told["page"].endswith(REPO)


# ---------------------------------------------------------------------------------------------------------------------
# A bundle that may not be published
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("token")
def test_a_bundle_without_a_verdict_is_refused_before_the_hub_is_asked(ungated: Path, hub: Hub) -> None:
    said = error_of(1, ungated, REPO)
    assert "no verdict of a gate" in said and "zoo gate" in said and "--ungated" in said
    assert hub.requests == []


@pytest.mark.usefixtures("token")
def test_ungated_publishes_it_and_the_card_says_so(ungated: Path, hub: Hub) -> None:
    before = files(ungated)
    result = zoo("publish", ungated, REPO, "--ungated")

    assert result.exit_code == 0, result.output
    card = arrived(hub)["README.md"].decode()
    assert "**Not gated.** It was published with `--ungated`" in card
    assert "The gate passed" not in card, "the words of a gate whose report is gone"
    assert arrived(hub) | {"README.md": b""} == before | {"README.md": b""}
    assert files(ungated) == before


@pytest.mark.usefixtures("token", "hub")
@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        ({"verdict": {"passed": False, "reasons": ["it flips"]}}, "failed", "did not pass its gate"),
        ({"bundle": {"build_sha256": "0" * 64}}, "of another build", "on another build"),
        ({"bundle": []}, "damaged", "is damaged"),
        ({"verdict": None}, "damaged", "is damaged"),
        ({"verdict": {"passed": "yes"}}, "failed", "did not pass"),
    ],
)
def test_a_verdict_counts_only_if_it_passed_these_very_bytes(
    gated: Path, change: dict[str, object], verdict: str, said: str
) -> None:
    path = gated / "gate" / "transcript.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    assert said in error_of(1, gated, REPO)
    publication = Publication(Bundle.open(gated))
    assert publication.verdict == verdict
    # A report on other bytes is not uploaded either, and its words in the card are not.
    is_of_these = verdict == "failed"
    assert ("gate/report.html" in publication.files) == is_of_these
    assert (b"**Not gated.**" in publication.card) != is_of_these


@pytest.mark.usefixtures("token", "hub")
def test_a_transcript_that_is_no_json_is_no_verdict(gated: Path) -> None:
    (gated / "gate" / "transcript.json").write_text("{")
    assert "is damaged" in error_of(1, gated, REPO)


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("name", ["metadata.json", "README.md", "tokenizer/tokenizer.json"])
def test_a_bundle_that_was_changed_is_refused_before_anything_is_written(gated: Path, hub: Hub, name: str) -> None:
    with (gated / name).open("ab") as file:
        file.write(b" ")
    assert f"{name} was changed" in error_of(1, gated, REPO, "--ungated")
    (gated / name).unlink()
    assert name in error_of(2 if name == "metadata.json" else 1, gated, REPO, "--ungated")
    assert written(hub) == [] and REPO not in hub.repositories


# ---------------------------------------------------------------------------------------------------------------------
# Names, tokens, permission
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize(
    "name", ["sample", "a/b/c", "-a/b", "a/..", "", "a/b c", "a/b@main", "a/b.git", "http://x/a/b"]
)
def test_a_name_that_is_none_is_refused_before_anything_else(name: str, hub: Hub, tmp_path: Path) -> None:
    assert "owner/name" in error_of(2, tmp_path / "there is no bundle here", "--", name)
    assert hub.requests == []


@pytest.mark.usefixtures("token")
def test_a_branch_that_cannot_be_one_is_refused(gated: Path, hub: Hub) -> None:
    assert "--revision" in error_of(2, gated, REPO, "--revision", "a..b")
    assert hub.requests == []


def test_without_a_token_it_says_how_to_get_one(gated: Path, hub: Hub) -> None:
    said = error_of(3, gated, REPO)
    assert "has no token" in said and "hf auth login" in said
    assert hub.requests == []


def test_a_token_that_the_hub_does_not_know_is_told_before_anything_is_hashed(
    gated: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    said = error_of(3, gated, REPO)
    assert "does not accept the token" in said and "hf auth login" in said
    assert written(hub) == []
    assert "hf_bad" not in said


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/main", "/commit/main"])
def test_a_token_that_may_not_write_there_is_told(gated: Path, hub: Hub, path: str) -> None:
    hub.inject(path, status=403, times=-1, methods=("POST",))
    said = error_of(3, gated, REPO)
    assert f"may not write to {REPO} (403" in said and "hf auth login" in said


@pytest.mark.usefixtures("token")
def test_what_is_to_be_private_does_not_go_to_a_public_repository(gated: Path, hub: Hub) -> None:
    hub.add(REPO, {"README.md": b"mine"})
    assert "is there already, and public" in error_of(2, gated, REPO, "--private")
    assert arrived(hub) == {"README.md": b"mine"}


@pytest.mark.usefixtures("token")
def test_a_hub_that_is_not_there_is_told_in_one_paragraph(gated: Path, hub: Hub) -> None:
    hub.stop()
    assert "The connection to the hub fails" in error_of(3, gated, REPO)


@pytest.mark.usefixtures("token", "hub")
def test_offline_is_said_to_be_chosen(gated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in error_of(3, gated, REPO)


# ---------------------------------------------------------------------------------------------------------------------
# Trying it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("token")
def test_a_dry_run_lists_everything_and_asks_the_hub_nothing(gated: Path, hub: Hub) -> None:
    (gated / "notes.txt").write_text("mine")
    result = zoo("publish", gated, REPO, "--dry-run", "--private")

    assert result.exit_code == 0, result.output
    for name, content in files(gated).items():
        if name != "notes.txt":
            assert any(line.split() == [name, f"{len(content):,}"] for line in result.stdout.splitlines()), name
    assert f"to the private repository {REPO}; nothing was uploaded." in result.stdout
    assert "Would not be uploaded: notes.txt." in result.stdout
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
def test_a_dry_run_fails_as_the_upload_would_and_says_every_reason(ungated: Path) -> None:
    with (ungated / "metadata.json").open("ab") as file:
        file.write(b" ")
    result = zoo("publish", ungated, REPO, "--dry-run")

    assert result.exit_code == 1
    assert "no verdict of a gate" in result.stderr
    assert "Would be refused: The bundle does not verify: files: metadata.json was changed" in result.stdout
    assert "Would be refused: This machine has no token" in result.stdout


@pytest.mark.usefixtures("hub")
def test_a_dry_run_needs_no_token_and_speaks_json(gated: Path) -> None:
    result = zoo("publish", gated, REPO, "--dry-run", "--json")

    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["refused"], told["page"], told["gate"]) == ([], None, "passed")
    assert "no token" in told["token"]
