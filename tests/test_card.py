"""The card of a bundle: front matter that the hub takes, text that says what is known, and what a gate adds."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.build.design import design
from coreai_zoo.build.figures import needs
from coreai_zoo.build.record import describe
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import signature_record
from coreai_zoo.bundle.card import Needs, render, with_measurements, without_measurements
from coreai_zoo.checkpoint.origin import Origin
from coreai_zoo.checkpoint.readme import read_front_matter
from coreai_zoo.planning.plan import plan
from coreai_zoo.plugins import default_plugins

COMMIT = "6a9e13bd6fc8f0983b9b99948120bc37f49c13e9"
HF_ID = "Qwen/Qwen3.6-27B"
FETCHED = {
    "kind": "hub",
    "hf_id": HF_ID,
    "revision": COMMIT,
    "made_from": [],
    "text": f"fetched from the Hugging Face hub at commit {COMMIT}",
}
UNKNOWN = {"kind": "none", "hf_id": None, "revision": None, "made_from": [], "text": "not known"}
APACHE = {"id": "apache-2.0", "name": None, "link": None, "source": "the page of the checkpoint"}
NO_LICENCE = dict.fromkeys(("id", "name", "link", "source"))

DENSE = design(BuildRequest("qwen3.6-27b", dry=True), default_plugins())
MOE = design(BuildRequest("qwen3.6-35b-a3b", dry=True), default_plugins())
NEEDS = needs(DENSE)
FILES = {
    "metadata.json": {"bytes": 700, "sha256": "a" * 64},
    "toy.aimodel/main.mlirb": {"bytes": 3 * 2**30, "sha256": "b" * 64},
    "tokenizer/tokenizer.json": {"bytes": 2**20, "sha256": "c" * 64},
}
STEP = {"name": "loop-free-step", "reason": "a loop does not lower", "functions": ["main"]}
INT8 = {"dtype": "int8", "scheme": "symmetric_with_clipping", "block": 32}


def record(**changed: Any) -> dict[str, Any]:
    """What a build of the 27B records, as far as its card asks for it."""
    return {
        "name": "toy",
        "title": "Qwen3.6 27B",
        "entry": {"name": "qwen3.6-27b", "differences": []},
        "origin": FETCHED,
        "licence": APACHE,
        "language": ["en"],
        "compared": True,
        "command": ["zoo", "build", "qwen3.6-27b"],
        "sample": False,
        "backend": "coreai",
        "overlay": {"name": "qwen3_5", "rewrites": [STEP]},
        "facts": {"layers": 64, "ffn": "dense"},
        "layers": 64,
        "whole_layers": 64,
        "contract": {
            "name": "static-s1",
            "prerequisites": DENSE.contract.needs,
            "on_devices": DENSE.contract.on_devices,
            "usage": DENSE.contract.usage,
        },
        "remarks": [],
        "notes": [],
        "recipe": {"name": "int8hu", "roles": {"mlp": INT8, "norm": None}, "head_reason": "Heads are fat-tailed."},
        "roles": {"mlp": {"meaning": "feed-forward"}, "norm": {"meaning": "gains"}},
        "weights": {"mlp": {"parameters": 1000, "bytes": 1062}, "norm": {"parameters": 10, "bytes": 20}},
        "max_context": 32768,
        "functions": {name: signature_record(signature) for name, signature in DENSE.signatures.items()},
        "zoo": "0.1",
        "versions": {"torch": "2.13.0"},
        "source_date_epoch": 0,
        "source": {"files": {"model.safetensors": {"size": 5}}, "precision": "bfloat16"},
        "dropped": {"vision tower: the bundle is text only": 333, "a reason of one": 1},
    } | changed


def rendered(needed: Needs = NEEDS, **changed: Any) -> str:
    return render(record(**changed), FILES, needed, CoreAIBackend())


def front_matter(**changed: Any) -> dict[str, Any]:
    """As `huggingface_hub` reads it back."""
    fields: dict[str, Any] = ModelCard(rendered(**changed)).data.to_dict()
    return fields


def section(text: str, heading: str) -> str:
    (body,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return str(body)


# ---------------------------------------------------------------------------------------------------------------------
# Front matter
# ---------------------------------------------------------------------------------------------------------------------


def test_the_front_matter_says_what_the_hub_indexes_by() -> None:
    assert front_matter() == {
        "license": "apache-2.0",
        "base_model": [HF_ID],
        "base_model_relation": "quantized",
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "library_name": "coreai",
        "tags": ["core-ai", "coreai", "apple", "qwen3_5", "dense", "text-generation"],
    }


def test_what_is_not_known_is_not_in_the_front_matter() -> None:
    fields = front_matter(origin=UNKNOWN, licence=NO_LICENCE, language=[])
    assert set(fields) == {"pipeline_tag", "library_name", "tags"}


def test_a_base_model_is_claimed_as_far_as_the_evidence_goes() -> None:
    assert front_matter(origin=UNKNOWN | {"made_from": ["acme/base", "no id"]})["base_model"] == ["acme/base"]
    assert front_matter(origin=FETCHED | {"made_from": ["acme/base"]})["base_model"] == [HF_ID]


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        ({"id": "Apache-2.0"}, {"license": "apache-2.0"}),
        ({"id": "other", "name": "acme", "link": "https://a.example/licence"}, "all"),
        ({"id": "other", "name": "acme"}, {}),
        ({"id": "other", "link": "https://a.example/licence"}, {}),
    ],
)
def test_another_licence_is_given_with_name_and_link_or_not_at_all(
    licence: dict[str, str], fields: dict[str, str] | str
) -> None:
    found = front_matter(licence=NO_LICENCE | licence)
    if fields == "all":
        fields = {"license": "other", "license_name": "acme", "license_link": "https://a.example/licence"}
    assert {key: value for key, value in found.items() if key.startswith("license")} == fields


@given(
    texts=st.lists(st.text(min_size=1, max_size=20), min_size=3, max_size=3),
    language=st.lists(st.sampled_from(["no", "en", "y", "zh-Hant", "not a language", "code"])),
)
def test_odd_names_come_back_as_they_were_and_never_break_the_page(texts: list[str], language: list[str]) -> None:
    name, title, overlay = texts
    known = {"license": "other", "license_name": name, "license_link": "https://a.example/"}
    text = rendered(
        title=title,
        licence={"id": "other", "name": name, "link": "https://a.example/", "source": None},
        overlay={"name": overlay, "rewrites": []},
        language=language,
    )
    fields = ModelCard(text).data.to_dict()
    assert {key: fields[key] for key in known} == known
    assert overlay in fields["tags"]
    assert fields.get("language", []) == [each for each in language if each in {"no", "en", "zh-Hant", "code"}]
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# toy"]
    card = text.encode()
    assert without_measurements(with_measurements(card, "numbers")) == card


@pytest.mark.parametrize(
    "word", ["yes", "no", "on", "null", "1.5", "2026-01-01", "- a", "a: b", "#", "'", "é", "\U00010000"]
)
def test_a_name_that_yaml_would_take_for_something_else_stays_text(word: str) -> None:
    licence = {"id": "other", "name": word, "link": "https://a.example/", "source": None}
    assert front_matter(licence=licence)["license_name"] == word


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def test_the_sections_stand_in_the_order_in_which_a_stranger_asks() -> None:
    assert re.findall(r"^## (.+)$", rendered(), re.MULTILINE) == [
        "The bundle",
        "What it needs",
        "How to run it",
        "Numerics",
        "Architecture",
        "What was left out",
        "How to reproduce it",
        "Licence and attribution",
    ]


def test_the_first_words_say_of_what_model_it_is_and_how_that_is_known() -> None:
    text = rendered()
    assert "Qwen3.6 27B for Core AI" in text and f"[{HF_ID}](https://huggingface.co/{HF_ID})" in text
    assert "The facts of the entry `qwen3.6-27b` agree with the published checkpoint at that commit." in text
    elsewhere = rendered(origin=FETCHED | {"text": "fetched from the hub"})
    assert f"at commit `{COMMIT}`." in elsewhere

    unknown = rendered(origin=UNKNOWN | {"made_from": ["acme/base"]}, compared=False)
    assert "Origin not known; the architecture is that of Qwen3.6 27B." in unknown
    assert "made from [acme/base](https://huggingface.co/acme/base)" in unknown
    assert "The facts of the entry `qwen3.6-27b` were not compared with the published checkpoint." in unknown
    assert HF_ID not in unknown


def test_a_checkpoint_without_an_entry_passes_for_nothing_else() -> None:
    text = rendered(entry=None, title="My fine-tune", origin=UNKNOWN, compared=False, licence=NO_LICENCE)
    assert "My fine-tune for Core AI" in text and "Origin not known." in text
    assert "entry" not in text.partition("## The bundle")[0] and "architecture is that" not in text


def test_a_sample_a_slice_and_another_model_say_so_first() -> None:
    sample = rendered(sample=True, origin=UNKNOWN, licence=NO_LICENCE)
    assert "**A sample, not Qwen3.6 27B.**" in sample and "Origin" not in sample and "not known" not in sample
    assert "**A slice: the first 4 of 64 layers**" in rendered(layers=4)
    other = rendered(entry={"name": "x", "differences": ["layers is 4, the entry says 64"]}, origin=UNKNOWN)
    assert "**Not Qwen3.6 27B, but a model of its architecture**" in other and "layers is 4" in other
    assert "the architecture is that of" not in other


def test_the_bundle_is_told_with_its_files_and_its_recipe() -> None:
    text = section(rendered(), "The bundle")
    assert text.startswith("\n3.0 GiB in 3 files: `metadata.json` (700 bytes), `toy.aimodel/` (3.0 GiB) and ")
    assert "`mlp` as int8 in blocks of 32 (symmetric with clipping); `norm` as they are." in text
    assert "8.57 bits for each of 1,010 parameters" in text
    assert "Why the head is stored as it is: Heads are fat-tailed." in text
    assert "Why the head" not in rendered(recipe=record()["recipe"] | {"head_reason": None})


def test_the_card_and_the_plan_say_the_same_numbers() -> None:
    planned = plan(BuildRequest("qwen3.6-27b", dry=True), default_plugins())
    text = section(rendered(), "What it needs")
    assert (NEEDS.asset, NEEDS.states, NEEDS.resident) == (planned.asset, planned.state_bytes, planned.resident)
    assert "| M4 Max | 48 GB | 15.8 |" in text and "| M4 |" not in text
    assert "states, 2.1 GiB when all 32,768 positions are in use, 64.0 KiB for each position" in text
    assert "15.9 tokens/s on M4 Max" in text and "8.7 tokens/s on M4 Pro" in text and "22.2" not in text


def test_the_rate_of_experts_is_a_bound_and_what_fits_nowhere_says_so() -> None:
    assert "tokens/s at most" in rendered(needs(MOE)) and "at most" not in rendered()
    nowhere = evolve(NEEDS, machines=tuple(evolve(machine, memory=None) for machine in NEEDS.machines))
    assert "It fits none of the Macs" in rendered(nowhere) and "| chip |" not in rendered(nowhere)


def test_no_rate_is_predicted_of_a_miniature_or_a_slice() -> None:
    for request in (
        BuildRequest("qwen3.6-27b", sample=True, dry=True),
        BuildRequest("qwen3.6-27b", layers=4, dry=True),
    ):
        needed = needs(design(request, default_plugins()))
        assert (needed.machines, needed.published) == ((), ())
        assert "tokens/s" not in rendered(needed)


def test_the_lines_to_run_it_are_those_of_the_contract_with_the_bundles_name() -> None:
    text = section(rendered(name="a b"), "How to run it")
    assert "llm-runner --model 'a b' --warmup off" in text and "llm-benchmark --model 'a b'" in text
    assert "CoreAILanguageModel(resourcesAt:" in text and "BUNDLE" not in text
    assert "COREAI_CHUNK_THRESHOLD" not in rendered()
    toy = {"name": "toy-pair", "prerequisites": ["a box of toys"], "usage": "", "on_devices": "No box has run it."}
    plain = rendered(contract=toy)
    assert "It needs a box of toys.\n\nNo box has run it.\n" in plain and "llm-runner" not in plain


def test_a_form_of_a_layer_is_told_with_its_function_where_it_is_not_in_all() -> None:
    assert "- `loop-free-step`: a loop does not lower\n" in rendered()
    (main,) = record()["functions"].values()
    both = {"main": main, "prefill": main}
    assert "- `loop-free-step`, in `main`: a loop does not lower\n" in rendered(functions=both)


def test_what_was_left_out_is_told_with_the_reason() -> None:
    text = section(rendered(), "What was left out")
    assert "- vision tower: the bundle is text only (333 tensors)" in text and "- a reason of one (1 tensor)" in text
    assert "every tensor of the checkpoint is in the bundle" in rendered(dropped={})


def test_it_can_be_reproduced_from_the_card() -> None:
    text = section(rendered(command=["zoo", "build", "a b"]), "How to reproduce it")
    assert "SOURCE_DATE_EPOCH=0 zoo build 'a b'\n" in text
    assert "coreai-zoo 0.1 and torch 2.13.0" in text
    assert f"The SHA-256 of `toy.aimodel/main.mlirb` is `{'b' * 64}`" in text


def test_the_licence_is_told_with_its_source_or_as_not_known() -> None:
    assert "Their licence is apache-2.0, as the page of the checkpoint says" in rendered()
    assert "Their licence is not known" in rendered(licence=NO_LICENCE)


# ---------------------------------------------------------------------------------------------------------------------
# What a gate adds
# ---------------------------------------------------------------------------------------------------------------------


def test_measurements_take_the_place_of_the_note_and_give_it_back() -> None:
    card = rendered().encode()
    assert b"Not gated yet: `zoo gate toy`" in card
    once = with_measurements(card, "**Passed.**\n\nnumbers")
    twice = with_measurements(once, "again and again")

    assert b"numbers" in once and b"numbers" not in twice and b"again and again" in twice
    shown = re.sub(rb"<!--.*?-->", b"", twice, flags=re.DOTALL)
    assert b"Not gated yet" not in shown and b"again and again" in shown
    assert twice.index(b"## Numerics") < twice.index(b"again and again") < twice.index(b"## Architecture")
    assert without_measurements(once) == without_measurements(twice) == without_measurements(card) == card
    assert ModelCard(twice.decode()).data.to_dict() == front_matter()


def test_the_card_of_an_earlier_version_is_given_back_too() -> None:
    earlier = b"# toy\n\n## Running it\n\nSo.\n"
    block = b"<!-- measured by zoo gate -->\n## Measured\n<!-- end of what was measured -->\n\n"
    assert without_measurements(earlier.replace(b"## Running", block + b"## Running")) == earlier
    assert without_measurements(with_measurements(earlier, "numbers")) == earlier


@pytest.mark.parametrize(
    "mark", ["<!-- measured by zoo gate -->", "<!-- end of what was measured -->", "<!-- in the place of"]
)
def test_measurements_may_not_hold_the_marks_that_they_stand_between(mark: str) -> None:
    with pytest.raises(ValueError, match="marks"):
        with_measurements(rendered().encode(), mark)


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint's own page says
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("---\nlicense: mit\nlanguage:\n- en\n---\n# A page\n", {"license": "mit", "language": ["en"]}),
        ("# A page\n\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\n---\n", {}),
        ("", {}),
    ],
)
def test_a_page_that_cannot_be_read_says_nothing(text: str, fields: Mapping[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_front_matter(tmp_path) == fields


def test_a_checkpoint_needs_no_page_and_a_page_no_text(tmp_path: Path) -> None:
    assert read_front_matter(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert read_front_matter(tmp_path) == {}


# ---------------------------------------------------------------------------------------------------------------------
# What a build records for it
# ---------------------------------------------------------------------------------------------------------------------


def test_licence_and_languages_are_taken_from_the_page_of_the_checkpoint(tmp_path: Path) -> None:
    assert DENSE.entry is not None
    folder = tmp_path / "fine-tune"
    shutil.copytree(DENSE.entry.sample_directory(), folder)
    request = BuildRequest("qwen3.6-27b", checkpoint=folder, custom=True, dry=True, recipe="int4lin", max_context=512)
    assert describe(design(request, default_plugins()))["licence"] == NO_LICENCE, "the entry's is of another model"
    page = "---\nlicense: other\nlicense_name: acme\nlicense_link: LICENSE\nlanguage: [en, 3]\n---\n"
    (folder / "README.md").write_text(page)

    described = describe(design(request, default_plugins()))
    licence = {"id": "other", "name": "acme", "link": None, "source": "the checkpoint's model card"}
    assert (described["licence"], described["language"]) == (licence, ["en"])
    words = ["--checkpoint", "CHECKPOINT", "--custom", "--recipe", "int4lin", "--max-context", "512"]
    assert described["command"] == ["zoo", "build", "qwen3.6-27b", *words]


def test_the_command_of_a_build_that_asked_for_nothing_special_is_bare(tmp_path: Path) -> None:
    sample = design(BuildRequest("qwen3.6-27b", sample=True, dry=True), default_plugins())
    assert describe(sample)["command"] == ["zoo", "build", "qwen3.6-27b", "--sample"]
    fetched = describe(evolve(DENSE, source=evolve(DENSE.source, origin=Origin("hub", HF_ID, COMMIT))))
    assert (fetched["command"], fetched["compared"]) == (["zoo", "build", "qwen3.6-27b"], True)
    assert fetched["origin"] == {**FETCHED, "made_from": ()}
    text = Path("zoo_entries/qwen3.6-27b.toml").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(text.replace('name = "qwen3.6-27b"', 'name = "mine"'), encoding="utf-8")
    loose = describe(design(BuildRequest(str(path), layers=4, dry=True), default_plugins()))
    assert loose["command"][2:] == ["mine.toml", "--checkpoint", "CHECKPOINT", "--layers", "4"]


@pytest.mark.parametrize(("contract", "words"), [("dynamic", "in half precision"), ("dynamic-bf16", "in bfloat16")])
def test_a_card_says_in_which_precision_what_is_not_quantized_is(contract: str, words: str) -> None:
    designed = design(BuildRequest("qwen3.6-27b", contract=contract, dry=True), default_plugins())
    functions = {name: signature_record(signature) for name, signature in designed.signatures.items()}
    plain = {"name": "fp16", "roles": {"mlp": None, "norm": None}, "head_reason": "-"}
    assert f"its text model, {words}, not quantized, as a bundle" in rendered(recipe=plain, functions=functions)
