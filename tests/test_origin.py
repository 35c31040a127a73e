"""Where a checkpoint comes from: what each kind of evidence shows, and what none of them may be taken for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from checkpoints import write_json
from coreai_zoo.build.source import Source, other_model
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.origin import Licence, Origin, find_licence, find_origin
from coreai_zoo.checkpoint.readme import read_front_matter
from coreai_zoo.plugins import default_plugins

COMMIT, OTHER = "a" * 40, "b" * 40
OURS, SIBLING = "Qwen/Qwen3.6-27B", "Qwen/Qwen3.5-27B"
LINK = "https://huggingface.co/{}/blob/main/LICENSE"


def with_card(folder: Path, front_matter: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# A model\n", encoding="utf-8")
    return folder


def downloaded(folder: Path, **commits: str) -> Path:
    """A folder as `hf download --local-dir` leaves it: three lines beside each file."""
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for name, commit in commits.items():
        file = folder / name.replace("_", ".")
        file.write_text("{}")
        (notes / f"{file.name}.metadata").write_text(f"{commit}\n{'e' * 40}\n{file.stat().st_mtime}\n")
    return folder


def origin(folder: Path, config: dict[str, Any] | None = None) -> Origin:
    return find_origin(folder, config or {}, read_front_matter(folder), {OURS: COMMIT, SIBLING: None})


def test_a_snapshot_in_the_cache_says_repository_and_commit(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3.5-27B" / "snapshots" / COMMIT
    found = origin(with_card(folder, f"base_model: {OURS}"))
    assert (found.kind, found.hf_id, found.revision, found.proven) == ("hub", SIBLING, COMMIT, True)


def test_a_folder_of_that_name_without_a_commit_is_no_snapshot(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3.5-27B" / "snapshots" / "main"
    folder.mkdir(parents=True)
    assert origin(folder) == Origin()


def test_a_download_to_a_folder_is_known_by_its_commit(tmp_path: Path) -> None:
    found = origin(downloaded(tmp_path / "known", config_json=COMMIT, model_safetensors=COMMIT))
    assert (found.kind, found.hf_id, found.revision, found.proven) == ("download", OURS, COMMIT, True)

    unknown = origin(downloaded(tmp_path / "unknown", config_json=OTHER))
    assert (unknown.hf_id, unknown.revision, unknown.proven) == (None, OTHER, False)
    assert (
        str(unknown)
        == f"of a repository that is not known, by the metadata that its download left beside it at commit {OTHER}"
    )


def test_what_was_changed_after_its_download_is_made_from_it_at_most(tmp_path: Path) -> None:
    for name, spoil in {
        "edited": lambda folder: os.utime(folder / "config.json", (2e9, 2e9)),
        "added to": lambda folder: (folder / "more.safetensors").write_text("of another making"),
        "without config": lambda folder: (folder / "config.json").unlink(),
    }.items():
        folder = downloaded(tmp_path / name, config_json=COMMIT, model_safetensors=COMMIT)
        assert origin(folder).proven
        spoil(folder)
        assert origin(folder) == Origin("download", None, None, (OURS,)), name
        assert "or a model made from it" in str(origin(folder))


def test_a_link_to_a_snapshot_is_the_snapshot(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--Qwen3.5-27B" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    assert origin(tmp_path / "link") == origin(folder / ".." / COMMIT) == Origin("hub", SIBLING, COMMIT)


def test_files_of_two_commits_show_nothing(tmp_path: Path) -> None:
    assert origin(downloaded(tmp_path / "mixed", config_json=COMMIT, model_safetensors=OTHER)) == Origin()


@pytest.mark.parametrize(
    ("front_matter", "hf_id", "made_from"),
    [
        (f"license: apache-2.0\nlicense_link: {LINK.format(SIBLING)}", SIBLING, ()),
        (f"base_model: {SIBLING}", None, (SIBLING,)),
        (f"base_model: https://huggingface.co/{SIBLING}", None, (SIBLING,)),
        (f"base_model:\n- {SIBLING}\n- {OURS}", None, (SIBLING, OURS)),
        # A fine-tune keeps the link of the model that it was made from.
        (f"base_model: {SIBLING}\nlicense_link: {LINK.format(SIBLING)}", None, (SIBLING,)),
        (f"base_model: acme/tuned\nlicense_link: {LINK.format(SIBLING)}", None, (SIBLING, "acme/tuned")),
        (f"license_link: {LINK.format(SIBLING)}\nbase_model_relation: finetune", None, (SIBLING,)),
        ("license_link: LICENSE", None, ()),
        ("license_link: https://example.org/Qwen/Qwen3.5-27B", None, ()),
        ("base_model: a model that I found", None, ()),
        ("base_model: {deep: [1]}", None, ()),
        ("license: [unclosed", None, ()),
    ],
)
def test_a_card_names_its_repository_or_what_the_model_was_made_from(
    tmp_path: Path, front_matter: str, hf_id: str | None, made_from: tuple[str, ...]
) -> None:
    found = origin(with_card(tmp_path, front_matter))
    assert (found.hf_id, found.made_from) == (hf_id, made_from)
    assert found.kind == ("readme" if hf_id or made_from else "none")
    assert not found.proven and found.revision is None


@pytest.mark.parametrize(
    ("name", "made_from"),
    [
        (SIBLING, (SIBLING,)),
        (f"{SIBLING}-Base".lower(), (SIBLING,)),
        ("/home/me/checkpoint", ()),
        ("output/checkpoint-500", ()),  # of the trainer's usual folders; no repository
        ("", ()),
        (None, ()),
        (["a/b"], ()),
    ],
)
def test_a_name_in_the_config_is_the_model_or_its_base(tmp_path: Path, name: object, made_from: tuple[str]) -> None:
    found = origin(tmp_path, {"_name_or_path": name})
    assert (found.hf_id, found.made_from) == (None, made_from)
    assert ("or a model made from it" in str(found)) == bool(made_from)


def test_a_card_goes_before_the_name_in_the_config(tmp_path: Path) -> None:
    found = origin(with_card(tmp_path, f"base_model: {OURS}"), {"_name_or_path": SIBLING})
    assert found.made_from == (OURS,)


@pytest.mark.parametrize(
    ("found", "refused"),
    [
        (Origin("hub", OURS, COMMIT), False),
        (Origin("hub", OURS.lower(), COMMIT), False),
        (Origin("hub", SIBLING, COMMIT), True),
        (Origin("hub", "acme/tuned", COMMIT), True),  # whatever it was made from, it is not this one
        (Origin("readme", SIBLING), True),
        (Origin("readme", None, None, (SIBLING,)), True),
        (Origin("readme", None, None, (f"{SIBLING}-Base",)), True),
        (Origin("readme", None, None, (f"{SIBLING}-FP8",)), True),
        (Origin("readme", None, None, (f"{OURS}-Base",)), False),
        (Origin("readme", None, None, (OURS, "acme/adapter")), False),
        (Origin("readme", None, None, ("acme/unheard-of",)), False),
        (Origin("config", None, None, ("Qwen/Qwen3.8-27B",)), True),
        (Origin("download", None, OTHER), False),
        (Origin(), False),
    ],
)
def test_evidence_for_a_sibling_speaks_against_an_entry(found: Origin, refused: bool) -> None:
    plugins = default_plugins()
    entry, _ = find_entry("qwen3.6-27b", plugins)
    phrase = other_model(Source({}, origin=found), entry, plugins)
    assert (phrase is not None) == refused
    if phrase is not None:
        assert phrase.startswith(f"it is {found.hf_id or found.made_from[0]}") and phrase.endswith(OURS)


OURS_HAS = "{{ preserve_thinking is defined and preserve_thinking is true }}"


@pytest.mark.parametrize("keep", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "a list"])
def test_a_chat_template_tells_siblings_apart_wherever_it_is_kept(tmp_path: Path, keep: str) -> None:
    def phrase(entry_name: str, template: str, found: Origin | None = None) -> str | None:
        if keep.endswith(".jinja"):
            (tmp_path / keep).write_text(template, encoding="utf-8")
        else:
            value: Any = [{"name": "default", "template": template}] if keep == "a list" else template
            write_json(tmp_path / keep.replace("a list", "tokenizer_config.json"), {"chat_template": value})
        plugins = default_plugins()
        source = Source({}, tmp_path, found or Origin())
        return other_model(source, find_entry(entry_name, plugins)[0], plugins)

    assert phrase("qwen3.6-27b", OURS_HAS) is None
    assert phrase("qwen3.5-27b", OURS_HAS) == (
        "its chat template has 'preserve_thinking is defined and preserve_thinking is true', "
        "as that of Qwen/Qwen3.6-27B has"
    )
    assert "has no 'preserve_thinking" in str(phrase("qwen3.6-27b", "{{ messages }}"))
    assert phrase("qwen3.5-27b", "{{ messages }}") is None
    assert phrase("qwen3.5-9b", OURS_HAS) is None, "no sibling of these sizes has it"
    # Who was made from the entry's model may have a template of its own; and the hub's word is better.
    assert phrase("qwen3.6-27b", "{{ messages }}", Origin("readme", None, None, (OURS,))) is None
    assert phrase("qwen3.6-27b", "{{ messages }}", Origin("hub", OURS, COMMIT)) is None
    assert phrase("qwen3.6-27b", "") is None


# ---------------------------------------------------------------------------------------------------------------------
# Licence
# ---------------------------------------------------------------------------------------------------------------------


def test_the_licence_is_what_the_card_says_then_the_text_then_the_entry(tmp_path: Path) -> None:
    card = {"license": "other", "license_name": "acme", "license_link": "https://acme.example/licence"}
    ours, nobody = Origin("hub", OURS, COMMIT), Origin()
    entry = (OURS, "mit")

    said = find_licence(tmp_path, card, nobody, entry)
    assert said == Licence("other", "acme", "https://acme.example/licence", "the checkpoint's model card")
    file = {**card, "license_link": "LICENSE.md"}
    assert find_licence(tmp_path, file, ours, entry).link == f"https://huggingface.co/{OURS}/blob/{COMMIT}/LICENSE.md"
    assert find_licence(tmp_path, file, nobody, entry).link is None
    assert find_licence(tmp_path, {"license": ["mit"]}, nobody, (None, None)).id == "mit"

    (tmp_path / "LICENSE").write_text("\n        Apache License\n   Version 2.0, January 2004\n", encoding="utf-8")
    assert find_licence(tmp_path, {}, ours, entry) == Licence("apache-2.0", source="the checkpoint's LICENSE")
    (tmp_path / "LICENSE").write_text("All rights reserved.\n", encoding="utf-8")
    assert find_licence(tmp_path, {}, ours, entry) == Licence("mit", source="the zoo's entry")
    # The entry's licence is that of the entry's model, which this one is not known to be.
    assert find_licence(tmp_path, {"license": 3}, nobody, entry) == Licence()
