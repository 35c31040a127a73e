"""Each way in which a bundle's tokenizer can differ from its checkpoint's is told by the comparison that is for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from checkpoints import write_json
from coreai_zoo.bundle import same_tokenizer
from coreai_zoo.bundle.same_tokenizer import copy_problems
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.portable_tokenizer import copy_tokenizer
from coreai_zoo.plugins import default_plugins

CLASSES = default_plugins().tokenizer_classes()
TRUNCATION = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}


@pytest.fixture
def checkpoint() -> Path:
    return find_entry("qwen3.6-27b", default_plugins())[0].sample_directory()


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """The tokenizer of a bundle as it is built."""
    copy_tokenizer(checkpoint, tmp_path / "tokenizer", CLASSES)
    return tmp_path / "tokenizer"


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        change(content)
        write_json(path, content)

    return edit


def exchange(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def add_an_ordinary_one(content: dict[str, Any]) -> None:
    text, number = list(content["model"]["vocab"].items())[300]
    content["added_tokens"].append({**content["added_tokens"][0], "id": number, "content": text})


def forget_the_end(folder: Path) -> None:
    """Engines know no end of a turn any more, though every file names the right one."""
    edited("tokenizer_config.json", lambda content: content.update(eos_token="<|im_start|>"))(folder)
    edited("generation_config.json", lambda content: content.update(eos_token_id=2))(folder)


DIFFERENCES: Mapping[str, tuple[Callable[[Path], None], str, str]] = {
    "two ids": (edited("tokenizer.json", exchange), "_ids", "the ids are others than the checkpoint's: 300 is"),
    "a token more": (
        edited(
            "tokenizer.json",
            lambda content: content["added_tokens"].append(
                {**content["added_tokens"][0], "id": 1024, "content": "<|more|>"}
            ),
        ),
        "_ids",
        "1024 is '<|more|>' and not None",
    ),
    "another order of merges": (
        edited("tokenizer.json", lambda content: content["model"]["merges"].reverse()),
        "_texts",
        "texts are encoded otherwise than by the checkpoint's: 'The quick brown fox jump'",
    ),
    "a normalizer": (
        edited("tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"})),
        "_texts",
        "texts are encoded otherwise",
    ),
    "a decoder": (
        edited("tokenizer.json", lambda content: content.update(decoder={"type": "Fuse"})),
        "_texts",
        "texts read otherwise than by the checkpoint's",
    ),
    "an added token that takes the space before it": (
        edited("tokenizer.json", lambda content: content["added_tokens"][2].update(lstrip=True)),
        "_texts",
        "texts are encoded otherwise than by the checkpoint's: 'a<|im_end|>b",
    ),
    "a field": (
        edited("tokenizer_config.json", lambda content: content.update(model_max_length=8)),
        "_fields",
        "model_max_length in tokenizer_config.json is not the checkpoint's",
    ),
    "a field that may be changed, to what it may not become": (
        edited("tokenizer.json", lambda content: content.update(truncation=TRUNCATION)),
        "_fields",
        "truncation in tokenizer.json is not the checkpoint's",
    ),
    "an added token's flag": (
        edited("tokenizer.json", lambda content: content["added_tokens"][0].update(single_word=True)),
        "_fields",
        "added_tokens in tokenizer.json is not the checkpoint's",
    ),
    "an added token that engines would show": (
        edited("tokenizer.json", lambda content: content["added_tokens"][2].update(special=False)),
        "_fields",
        "added_tokens in tokenizer.json is not the checkpoint's",
    ),
    "an ordinary token among the added ones": (
        edited("tokenizer.json", add_an_ordinary_one),
        "_fields",
        "added_tokens in tokenizer.json is not the checkpoint's",
    ),
    "a word that engines would cut": (
        edited("tokenizer_config.json", lambda content: content.update(additional_special_tokens=["def"])),
        "_fields",
        "additional_special_tokens in tokenizer_config.json is not the checkpoint's",
    ),
    "a file more": (
        lambda folder: (folder / "vocab.json").write_text("{}") and None,
        "_fields",
        "vocab.json is not a file of the checkpoint",
    ),
    "no template": (
        lambda folder: (folder / "chat_template.jinja").unlink(),
        "_template",
        "the chat template is not the checkpoint's and is left out",
    ),
    "another template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}") and None,
        "_template",
        "the chat template is not the checkpoint's",
    ),
    "another end": (
        edited("tokenizer_config.json", lambda content: content.update(eos_token="<|endoftext|>")),
        "_ends",
        "turns end with",
    ),
    "an end more": (
        edited("generation_config.json", lambda content: content.update(eos_token_id=[2, 300])),
        "_ends",
        "turns end with <|im_end|>, ",
    ),
    "an end that engines do not know": (
        forget_the_end,
        "_ends",
        "the chat template ends a turn with '<|im_end|>', at which no engine stops",
    ),
    "bytes that say the same": (
        lambda folder: (
            (folder / "tokenizer_config.json").write_text(
                (folder / "tokenizer_config.json").read_text(encoding="utf-8") + " "
            )
            and None
        ),
        "_made_again",
        "tokenizer_config.json is not what the checkpoint's becomes",
    ),
}


@pytest.mark.parametrize(("change", "by", "words"), DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_a_difference_is_told_by_its_own_comparison_and_not_told_without_it(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], by: str, words: str
) -> None:
    assert copy_problems(checkpoint, folder, CLASSES) == []
    change(folder)

    assert any(words in problem for problem in copy_problems(checkpoint, folder, CLASSES))

    monkeypatch.setattr(same_tokenizer, by, lambda *_: ())
    assert not any(words in problem for problem in copy_problems(checkpoint, folder, CLASSES))


def test_what_another_version_of_the_zoo_changed_otherwise_is_no_difference(checkpoint: Path, folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert copy_problems(checkpoint, folder, CLASSES, of_this_zoo=False) == []
    (folder / "chat_template.jinja").unlink()
    assert copy_problems(checkpoint, folder, CLASSES, of_this_zoo=False) != []


def test_a_tokenizer_that_cannot_be_read_is_told_and_not_raised(checkpoint: Path, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (problem,) = copy_problems(checkpoint, folder, CLASSES)
    assert problem.startswith("cannot be compared with the checkpoint's: ")


def test_the_texts_have_digits_white_space_and_characters_of_every_width() -> None:
    letters = {letter for text in same_tokenizer._TEXTS for letter in text}
    assert {len(letter.encode()) for letter in letters} == {1, 2, 3, 4}
    for start, end in (("\u0400", "\u04ff"), ("\u0590", "\u05ff"), ("\u0600", "\u06ff"), ("\u0900", "\u097f")):
        assert any(start <= letter <= end for letter in letters)
    for start, end in (("\u0e00", "\u0e7f"), ("\u3040", "\u30ff"), ("\u4e00", "\u9fff"), ("\uac00", "\ud7a3")):
        assert any(start <= letter <= end for letter in letters)
    assert {"\t", "\n", "\r", "\u00a0", "\u3000", "\u200b", "\u200d", "\u0301", *"0123456789"} <= letters
