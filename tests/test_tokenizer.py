"""What a bundle gets of a checkpoint's tokenizer, and what is said where that cannot be used. No bundle is built."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from coreai_zoo.bundle.same_tokenizer import copy_problems
from coreai_zoo.bundle.verify_tokenizer import tokenizer_problems
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint import chat_template
from coreai_zoo.checkpoint.chat_template import find_chat_template, render_chat
from coreai_zoo.checkpoint.end_of_turn import end_tokens
from coreai_zoo.checkpoint.portable_tokenizer import copy_tokenizer
from coreai_zoo.checkpoint.tokenizer import (
    AddedTokens,
    added_tokens,
    check_tokenizer,
    encode,
    load_tokenizer,
    quiet_transformers,
    special_tokens,
    tokenizer_files,
)
from coreai_zoo.errors import BadInput
from coreai_zoo.json_files import read_object, write_json
from coreai_zoo.plugins import default_plugins

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
END_OF_TEXT, TURN_END = 256, 258
WIDTH = 288
CHAT = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
HELLO = [("user", "hello")]
TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="session")
def classes() -> Any:
    return default_plugins().tokenizer_classes()


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer without merges, one token for each byte; `<think>` is an ordinary added token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(text, special="think" not in text, normalized=False) for text in SPECIAL])
    content: dict[str, Any] = json.loads(made.to_str())
    return content | changes


def tokenizer_config(**changes: Any) -> dict[str, Any]:
    fields = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "chat_template": CHAT} | changes
    return {key: value for key, value in fields.items() if value is not None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint without weights, nothing odd in it."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    write_json(path / "tokenizer.json", tokenizer_json())
    write_json(path / "tokenizer_config.json", tokenizer_config())
    write_json(path / "config.json", {"model_type": "qwen3_5"})
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path, classes: Any) -> Callable[[], tuple[Path, list[str]]]:
    """Makes the copy of `folder` that a bundle gets, and holds it against every rule for one and against `folder`."""

    def copy() -> tuple[Path, list[str]]:
        copy, again = tmp_path / "tokenizer", tmp_path / "again"
        changes = copy_tokenizer(folder, copy, classes)
        assert tokenizer_problems(copy, WIDTH, set(classes.values())) == []
        assert copy_problems(folder, copy, classes) == []
        copy_tokenizer(copy, again, classes)
        assert contents(again) == contents(copy)
        return copy, changes

    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def adding(token: str) -> dict[str, Any]:
    """A post-processor that appends a token."""
    number = 256 + SPECIAL.index(token)
    made = processors.TemplateProcessing(single=f"$A {token}", pair=f"$A $B {token}", special_tokens=[(token, number)])
    content: dict[str, Any] = json.loads(made.__getstate__())
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Nothing to mend
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["qwen3.6-27b", "qwen3.6-35b-a3b"])
def test_the_tokenizer_of_a_sample_is_copied_byte_for_byte(entry: str, tmp_path: Path, classes: Any) -> None:
    sample = find_entry(entry, default_plugins())[0].sample_directory()

    assert copy_tokenizer(sample, tmp_path / "copy", classes) == []
    assert contents(tmp_path / "copy") == {path.name: path.read_bytes() for path in tokenizer_files(sample)}
    assert [end.places[0] for end in end_tokens(sample).tokens] == ["the chat template"]


def test_a_tokenizer_that_engines_read_right_is_copied_byte_for_byte(
    folder: Path, copied: Callable[[], tuple[Path, list[str]]]
) -> None:
    text = json.dumps(tokenizer_json(post_processor=json.loads(processors.ByteLevel().__getstate__())))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    write_json(folder / "generation_config.json", {"eos_token_id": TURN_END, "temperature": 0.6})

    copy, changes = copied()

    assert changes == []
    assert contents(copy) == {path.name: path.read_bytes() for path in tokenizer_files(folder)}


# ---------------------------------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------------------------------

BYTE_LEVEL = json.loads(processors.ByteLevel(trim_offsets=False).__getstate__())
CUT = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
FILL = {
    "strategy": {"Fixed": 60},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": END_OF_TEXT,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}
PAIRS = {"sep": ["<|im_end|>", TURN_END], "cls": ["<|im_start|>", 257]}
ROBERTA = {"type": "RobertaProcessing", **PAIRS, "trim_offsets": True, "add_prefix_space": False}


@pytest.mark.parametrize(
    ("saved", "kept"),
    [
        ({"truncation": CUT}, None),
        ({"truncation": CUT | {"direction": "Left", "strategy": "OnlyFirst", "max_length": 1}}, None),
        ({"padding": FILL}, None),
        ({"padding": FILL | {"strategy": "BatchLongest", "pad_to_multiple_of": 64}}, None),
        ({"post_processor": adding("<|endoftext|>")}, None),
        ({"post_processor": {"type": "BertProcessing", **PAIRS}}, None),
        ({"post_processor": ROBERTA}, None),
        ({"post_processor": {"type": "Sequence", "processors": [ROBERTA]}}, None),
        (
            {"post_processor": {"type": "Sequence", "processors": [BYTE_LEVEL, adding("<|im_end|>")]}, "padding": FILL},
            {"type": "Sequence", "processors": [BYTE_LEVEL]},
        ),
    ],
    ids=["cut", "cut to 1", "fill", "multiples", "template", "bert", "roberta", "sequence", "all"],
)
def test_a_prompt_is_its_whole_text_and_nothing_else(
    folder: Path, copied: Callable[[], tuple[Path, list[str]]], saved: dict[str, Any], kept: Any
) -> None:
    write_json(folder / "tokenizer.json", tokenizer_json(**saved))

    copy, changes = copied()

    for directory in (folder, copy):
        tokenizer = load_tokenizer(directory)
        assert len(encode(tokenizer, TEXT)) == len(TEXT)
        assert encode(tokenizer, "<|im_start|>hi")[0] == 257
    # An engine that does everything the file says does the same.
    assert len(Tokenizer.from_file(str(copy / "tokenizer.json")).encode(TEXT).ids) == len(TEXT)
    assert len(changes) == len(saved)
    assert read_object(copy / "tokenizer.json") == tokenizer_json(post_processor=kept)


def test_tokens_are_no_matter_of_chance(folder: Path, copied: Callable[[], tuple[Path, list[str]]]) -> None:
    content = tokenizer_json()
    content["model"] |= {"dropout": 0.5}
    content["model"]["vocab"] |= {"th": 256, "the": 257}
    content["model"]["merges"] = [["t", "h"], ["th", "e"]]
    content["added_tokens"] = [{**token, "id": token["id"] + 2} for token in content["added_tokens"]]
    write_json(folder / "tokenizer.json", content)

    copy, (change,) = copied()

    assert "dropout" in change
    for directory in (folder, copy):
        assert encode(load_tokenizer(directory), "the" * 50) == [257] * 50


def test_what_the_copy_depends_on_is_among_the_files_that_a_build_looks_at(folder: Path) -> None:
    for name in ("generation_config.json", "special_tokens_map.json"):
        write_json(folder / name, {})
    jinja(folder, CHAT)
    in_folder(folder, CHAT)

    names = {path.relative_to(folder).as_posix() for path in tokenizer_files(folder)}

    assert {"generation_config.json", "special_tokens_map.json", "chat_template.jinja"} < names
    assert "additional_chat_templates/default.jinja" in names


def test_a_tokenizer_config_adds_no_token(folder: Path, copied: Callable[[], tuple[Path, list[str]]]) -> None:
    write_json(folder / "tokenizer_config.json", tokenizer_config(add_eos_token=True, add_bos_token=False))

    copy, (change,) = copied()

    assert "add_eos_token" in change
    assert read_object(copy / "tokenizer_config.json") == tokenizer_config(add_eos_token=False, add_bos_token=False)


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates
# ---------------------------------------------------------------------------------------------------------------------


def test_nobody_waits_twice_for_a_template_that_does_not_end(
    folder: Path, copied: Callable[[], tuple[Path, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    deadline = chat_template._deadline

    def counted(seconds: float) -> contextlib.AbstractContextManager[None]:
        waited.append(seconds)
        return deadline(seconds)

    monkeypatch.setattr(chat_template, "_deadline", counted)
    monkeypatch.setattr(chat_template, "_MOST_SECONDS", 0.5)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{# anew #}{% endfor %}{% endfor %}"
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=endless))

    copy, _ = copied()
    for turns in (HELLO, (*HELLO, ("assistant", "Yes?"))):
        with pytest.raises(BadInput, match="does not come to an end"):
            render_chat(copy, turns)
    assert waited == [0.5]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('A system message is required.') }}", "A system message is required"),
        ("{{ messages[0].nothing.there }}", "has no attribute 'nothing'"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if messages is no_such_test %}{% endif %}", "No test named 'no_such_test'"),
        ("{% if true %}{{ messages | no_such_filter }}{% endif %}", "No filter named 'no_such_filter'"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}", "an end"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not come to an end"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% extends 'other' %}", "no loader"),
    ],
)
def test_a_template_that_does_not_take_a_chat_says_why_in_one_paragraph(
    folder: Path,
    copied: Callable[[], tuple[Path, list[str]]],
    template: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coreai_zoo.checkpoint.chat_template._MOST_SECONDS", 0.5)
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=template))

    copy, changes = copied()

    assert changes == []
    with pytest.raises(BadInput, match=r"chat template in tokenizer_config\.json") as error:
        render_chat(copy, HELLO)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHAT[:-25], "cannot be parsed: line 1"),
        ("{{ messages | no_such_filter }}", "No filter named 'no_such_filter'"),
        ("{{ messages is no_such_test }}", "No test named 'no_such_test'"),
        ("{% no_such_tag %}", "unknown tag 'no_such_tag'"),
        (5, "is no text, but 5"),
        ([1, 2], "is no text"),
        ([{"name": "tool_use", "template": CHAT}], "holds 'tool_use' and none that is called 'default'"),
        ([{"name": "default", "template": 7}], "is no text, but 7"),
        ([{"template": CHAT}], "is no text"),
        ([], "holds no template"),
    ],
)
def test_a_template_that_nobody_can_use_is_left_out_and_the_build_says_why(
    folder: Path, copied: Callable[[], tuple[Path, list[str]]], template: Any, words: str
) -> None:
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=template))

    copy, (change,) = copied()

    assert change.startswith("the chat template is left out")
    assert words in change
    assert str(folder) not in change
    assert find_chat_template(copy) is None
    with pytest.raises(BadInput):
        render_chat(folder, HELLO)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_template_file_that_cannot_be_read_is_left_out(
    folder: Path, copied: Callable[[], tuple[Path, list[str]]], name: str
) -> None:
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=None))
    (folder / name).write_bytes(b"\xff{")

    copy, changes = copied()

    assert name in changes[0]
    assert find_chat_template(copy) is None


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_template_is_none(folder: Path, copied: Callable[[], tuple[Path, list[str]]], empty: str) -> None:
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=empty))

    copy, (change,) = copied()

    assert "empty chat template" in change
    assert "chat_template" not in read_object(copy / "tokenizer_config.json")


def jinja(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def in_json(folder: Path, text: str) -> None:
    write_json(folder / "chat_template.json", {"chat_template": text})


def in_folder(folder: Path, text: str, name: str = "default") -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("put", "key", "wanted"),
    [
        (lambda folder: jinja(folder, "file"), "key", "file"),
        (lambda folder: (jinja(folder, "file"), in_json(folder, "json")), None, "file"),
        (lambda folder: in_json(folder, "json"), "key", "key"),
        (lambda folder: in_json(folder, "json"), None, "json"),
        (lambda folder: jinja(folder, ""), "key", "key"),
        (lambda folder: None, [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        (lambda folder: None, {"tool_use": "t", "default": "d"}, "d"),
        (lambda folder: in_folder(folder, "folder"), "key", "folder"),
        (lambda folder: (jinja(folder, "file"), in_folder(folder, "t", "tool_use")), None, "file"),
    ],
    ids=["file", "file, json", "json, key", "json", "empty file", "list", "object", "folder", "file, folder"],
)
def test_engines_take_the_template_that_transformers_takes(
    folder: Path, copied: Callable[[], tuple[Path, list[str]]], put: Callable[[Path], Any], key: Any, wanted: str
) -> None:
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=key))
    put(folder)

    copy, _ = copied()

    assert render_chat(folder, HELLO) == render_chat(copy, HELLO) == wanted
    if wanted != "json":  # only processors read that one there
        assert rendered_by_transformers(folder) == wanted


def rendered_by_transformers(folder: Path) -> str:
    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    messages = [{"role": role, "content": content} for role, content in HELLO]
    if tokenizer.chat_template == "" and (folder / "chat_template.jinja").is_file():
        (folder / "chat_template.jinja").unlink()  # an empty file says nothing: that is our reading
        return rendered_by_transformers(folder)
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def test_a_template_renders_as_in_transformers(folder: Path) -> None:
    template = (
        "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ {'a': '<é>'} | tojson }}|{{ strftime_now('%Y') }}|"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}\n  {% if tools is none and documents is none %}\n  yes\n  {% endif %}\n"
    )
    fields = {"bos_token": "<|im_start|>", "image_token": "<think>"}
    write_json(folder / "tokenizer_config.json", tokenizer_config(chat_template=template, eos_token=None, **fields))
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})

    assert special_tokens(folder) == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "image_token": "<think>"}
    assert render_chat(folder, HELLO) == rendered_by_transformers(folder)


# ---------------------------------------------------------------------------------------------------------------------
# End of turn
# ---------------------------------------------------------------------------------------------------------------------

ENTRY = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
NAMELESS = CHAT.replace("<|im_end|>", "")  # a template that ends no turn
ENDS_BY_EOS = CHAT.replace("'<|im_end|>\\n'", "eos_token")


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"special_tokens_map": {"eos_token": ENTRY}, "tokenizer_config": {"eos_token": None}}, [TURN_END]),
        ({"generation_config": {"eos_token_id": TURN_END}, "tokenizer_config": {"eos_token": None}}, [TURN_END]),
        (
            {
                "generation_config": {"eos_token_id": [END_OF_TEXT, TURN_END]},
                "tokenizer_config": {"eos_token": "<|endoftext|>"},
            },
            [TURN_END, END_OF_TEXT],
        ),
        ({"config": {"eos_token_id": TURN_END}, "tokenizer_config": {"eos_token": None}}, [TURN_END]),
        (
            {"config": {"text_config": {"eos_token_id": [TURN_END]}}, "tokenizer_config": {"eos_token": None}},
            [TURN_END],
        ),
        (
            {
                "config": {"eos_token_id": [TURN_END, END_OF_TEXT]},
                "tokenizer_config": {"eos_token": None, "chat_template": None},
            },
            [TURN_END, END_OF_TEXT],
        ),
        ({"tokenizer_config": {"eos_token": None}}, [TURN_END]),
        ({"tokenizer_config": {"eos_token": "<|endoftext|>"}}, [TURN_END, END_OF_TEXT]),
        ({"tokenizer_config": {"eos_token": ["<|endoftext|>", "<|im_end|>"]}}, [TURN_END, END_OF_TEXT]),
        ({"tokenizer_config": {"eos_token": ENTRY}}, [TURN_END]),
        ({"tokenizer_config": {"eos_token": "<|endoftext|>", "chat_template": ENDS_BY_EOS}}, [END_OF_TEXT]),
        # What begins the next turn ends this one, if a file says so.
        ({"tokenizer_config": {"eos_token": None, "chat_template": NAMELESS}}, []),
        (
            {
                "tokenizer_config": {"eos_token": "<|endoftext|>", "chat_template": NAMELESS},
                "generation_config": {"eos_token_id": [END_OF_TEXT, 257]},
            },
            [257, END_OF_TEXT],
        ),
        ({"tokenizer_config": {"eos_token": None, "chat_template": "{% broken"}}, []),
    ],
)
def test_every_end_of_turn_is_found_wherever_it_is_named_and_engines_know_it(
    folder: Path, copied: Callable[[], tuple[Path, list[str]]], files: dict[str, Any], ids: list[int]
) -> None:
    for name, fields in files.items():
        content = tokenizer_config(**fields) if name == "tokenizer_config" else fields
        write_json(folder / f"{name}.json", content)

    copy, _ = copied()

    assert [end.id for end in end_tokens(folder).tokens] == ids
    assert [end.id for end in end_tokens(copy).tokens] == ids
    config = read_object(copy / "tokenizer_config.json")
    texts = [SPECIAL[number - 256] for number in ids]
    assert config.get("eos_token") in ([texts[0], ENTRY] if texts else [None])
    assert set(texts[1:]) <= set(config.get("additional_special_tokens", ()))
    if find_chat_template(copy):
        assert render_chat(copy, HELLO) == render_chat(folder, HELLO)


def test_the_eos_token_stays_where_the_template_would_render_another(
    folder: Path, copied: Callable[[], tuple[Path, list[str]]]
) -> None:
    template = "{{ eos_token }}" + CHAT
    write_json(folder / "tokenizer_config.json", tokenizer_config(eos_token="<|endoftext|>", chat_template=template))

    copy, _ = copied()

    config = read_object(copy / "tokenizer_config.json")
    assert (config["eos_token"], config["additional_special_tokens"]) == ("<|endoftext|>", ["<|im_end|>"])
    assert render_chat(copy, HELLO) == render_chat(folder, HELLO)
    assert [end.id for end in end_tokens(copy).tokens] == [TURN_END, END_OF_TEXT]


@pytest.mark.parametrize("value", [WIDTH + 10**6, 2**70, -1, 1.5, True, "x", {"a": 1}, ["<|im_end|>", 999]])
def test_an_end_that_is_no_token_is_noted_and_ignored(
    folder: Path, copied: Callable[[], tuple[Path, list[str]]], value: Any
) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": value})
    write_json(folder / "tokenizer_config.json", tokenizer_config(eos_token="<|nowhere|>"))

    _, changes = copied()

    assert [end.id for end in end_tokens(folder).tokens] == ([TURN_END, ord("x") - 33] if value == "x" else [TURN_END])
    assert any("<|nowhere|>" in change and "no token of the tokenizer" in change for change in changes)


def test_an_id_that_is_left_over_in_a_config_and_names_ordinary_text_ends_nothing(folder: Path) -> None:
    write_json(folder / "config.json", {"eos_token_id": 2})

    ends = end_tokens(folder)

    assert [end.id for end in ends.tokens] == [TURN_END]
    assert "config.json is 2, which is the ordinary text '#'" in ends.ignored[0]


@pytest.mark.parametrize("name", ["special_tokens_map.json", "generation_config.json"])
def test_a_file_that_need_not_be_there_and_cannot_be_read_is_left_out(
    folder: Path, copied: Callable[[], tuple[Path, list[str]]], name: str
) -> None:
    (folder / name).write_text("{", encoding="utf-8")

    copy, (change,) = copied()

    assert f"{name} is left out" in change
    assert not (copy / name).exists()


def test_marks_within_an_answer_are_not_cut_from_it(folder: Path, copied: Callable[[], tuple[Path, list[str]]]) -> None:
    special = [{**token, "special": True} for token in tokenizer_json()["added_tokens"]]
    write_json(folder / "tokenizer.json", tokenizer_json(added_tokens=special))
    listed = ["<|im_start|>", "<think>", {**ENTRY, "content": "</think>"}]
    decoder = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in special}
    fields = {"additional_special_tokens": listed, "added_tokens_decoder": decoder}
    write_json(folder / "tokenizer_config.json", tokenizer_config(**fields))

    copy, (change,) = copied()

    assert "</think>, <think>" in change
    assert read_object(copy / "tokenizer.json") == tokenizer_json()
    config = read_object(copy / "tokenizer_config.json")
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    assert [entry["special"] for entry in config["added_tokens_decoder"].values()] == [True] * 3 + [False] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Class
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "in_config", "known_as"),
    [
        (None, None, "PreTrainedTokenizer"),
        ("", None, "PreTrainedTokenizer"),
        (None, "Qwen2TokenizerFast", "Qwen2Tokenizer"),
        ("Qwen3_5Tokenizer", None, "Qwen2Tokenizer"),
    ],
)
def test_a_class_that_is_not_named_is_that_of_the_config_or_the_one_that_reads_any(
    folder: Path, copied: Callable[[], tuple[Path, list[str]]], classes: Any, named: Any, in_config: Any, known_as: str
) -> None:
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer_class=named))
    write_json(folder / "config.json", {"tokenizer_class": in_config})

    check_tokenizer(folder, WIDTH, classes)
    copy, _ = copied()

    assert read_object(copy / "tokenizer_config.json")["tokenizer_class"] == known_as


# ---------------------------------------------------------------------------------------------------------------------
# Rules for a bundle: each is broken once
# ---------------------------------------------------------------------------------------------------------------------


def change_config(**fields: Any) -> Callable[[Path], None]:
    return lambda copy: write_json(copy / "tokenizer_config.json", tokenizer_config(**fields))


def change_tokenizer(**fields: Any) -> Callable[[Path], None]:
    return lambda copy: write_json(copy / "tokenizer.json", tokenizer_json(**fields))


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (change_config(tokenizer_class="NoTokenizer"), "do not know the tokenizer_class 'NoTokenizer'"),
        (lambda copy: (copy / "tokenizer_config.json").unlink(), "cannot be loaded"),
        (change_tokenizer(truncation=CUT), "truncation, by which prompts are cut"),
        (change_tokenizer(model=tokenizer_json()["model"] | {"dropout": 0.1}), "are a matter of chance"),
        (change_tokenizer(padding=FILL), "padding, by which prompts are filled up"),
        (change_tokenizer(post_processor=adding("<|endoftext|>")), "adds special tokens to a rendered chat"),
        (change_config(add_eos_token=True), "has add_eos_token"),
        (change_config(eos_token=None), "no engine stops at the end of turn <|im_end|>"),
        (change_config(eos_token=["<|im_end|>"]), "and not one token"),
        (change_config(additional_special_tokens=["<think>"]), "engines cut <think> from the text"),
        (change_config(chat_template="{% broken"), "cannot be parsed"),
        (change_config(chat_template={"default": CHAT}), "is an object, which engines do not take"),
        (lambda copy: in_json(copy, "another"), "another chat template than transformers does"),
        (lambda copy: jinja(copy, ""), "or an empty one"),
    ],
)
def test_a_rule_that_is_broken_is_told(
    folder: Path,
    copied: Callable[[], tuple[Path, list[str]]],
    classes: Any,
    breaks: Callable[[Path], Any],
    words: str,
) -> None:
    copy, _ = copied()
    shutil.rmtree(folder)

    breaks(copy)

    problems = tokenizer_problems(copy, WIDTH, set(classes.values()))
    assert len(problems) == 1
    assert words in problems[0]


def test_a_vocabulary_beyond_the_logits_is_told(folder: Path, classes: Any) -> None:
    (problem,) = tokenizer_problems(folder, 260, set(classes.values()))

    assert problem == "token ids up to 260 for 260 logits"


# ---------------------------------------------------------------------------------------------------------------------
# Added tokens
# ---------------------------------------------------------------------------------------------------------------------


def decoder_of(content: dict[str, Any]) -> dict[str, Any]:
    """`added_tokens_decoder` of a `tokenizer.json`."""
    return {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in content["added_tokens"]}


@pytest.mark.parametrize("kept", [2, 4])
def test_tokens_that_the_config_alone_adds_are_added(kept: int, tmp_path: Path, classes: Any) -> None:
    content = tokenizer_json()
    write_json(tmp_path / "tokenizer.json", content | {"added_tokens": content["added_tokens"][:kept]})
    config = tokenizer_config(added_tokens_decoder=decoder_of(content))
    write_json(tmp_path / "tokenizer_config.json", config)
    changes = copy_tokenizer(tmp_path, tmp_path / "copy", classes)
    lost = [token["content"] for token in content["added_tokens"][kept:]]
    assert any(all(text in change for text in lost) and "as other files have it" in change for change in changes)

    text = "".join(f"a{text}" for text in SPECIAL)
    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast

        expected = PreTrainedTokenizerFast.from_pretrained(str(tmp_path)).encode(text, add_special_tokens=False)
    for folder in (tmp_path, tmp_path / "copy"):
        assert encode(load_tokenizer(folder), text) == expected
    written = Tokenizer.from_file(str(tmp_path / "copy" / "tokenizer.json"))
    assert written.encode(text, add_special_tokens=False).ids == expected


def test_files_that_transformers_makes_a_tokenizer_of_are_to_be_saved_again(folder: Path, classes: Any) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"has no tokenizer.json\. A bundle needs"):
        check_tokenizer(folder, WIDTH, classes)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    with pytest.raises(BadInput, match="save_pretrained"):
        check_tokenizer(folder, WIDTH, classes)


def named_in(folder: Path, name: str, **fields: Any) -> None:
    """Have a file of the tokenizer say something more."""
    path = folder / name
    write_json(path, (read_object(path) if path.is_file() else {}) | fields)


def add_in_both(folder: Path) -> None:
    """A token that takes the spaces around it by `tokenizer_config.json`, and does not by `tokenizer.json`."""
    decoder = decoder_of(read_object(folder / "tokenizer.json"))
    decoder["259"] |= {"lstrip": True, "rstrip": True}
    named_in(folder, "tokenizer_config.json", added_tokens_decoder=decoder)


NAMED_ELSEWHERE: dict[str, Callable[[Path], None]] = {
    "additional": lambda folder: named_in(
        folder, "tokenizer_config.json", additional_special_tokens=["<|b|>", "<|a|>"]
    ),
    "extra": lambda folder: named_in(folder, "tokenizer_config.json", extra_special_tokens=["<|a|>", "<|b|>"]),
    "in the map": lambda folder: named_in(
        folder, "special_tokens_map.json", additional_special_tokens=["<|a|>", "<|b|>"]
    ),
    "behind another": lambda folder: named_in(
        folder, "tokenizer_config.json", pad_token="<|pad|>", additional_special_tokens=["<|a|>", "<|b|>"]
    ),
    "with an id": lambda folder: named_in(folder, "added_tokens.json", **{"<|b|>": 261, "<|a|>": 262}),
    "of the vocabulary": lambda folder: named_in(folder, "tokenizer_config.json", pad_token="a"),
    "of a kind of its own": lambda folder: named_in(folder, "tokenizer_config.json", image_token="<|a|>"),
    "found otherwise": add_in_both,
}


@pytest.mark.parametrize("where", NAMED_ELSEWHERE)
def test_a_token_that_another_file_names_is_one_as_it_is_for_transformers(
    where: str, tmp_path: Path, classes: Any
) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    write_json(tmp_path / "tokenizer_config.json", tokenizer_config())
    write_json(tmp_path / "config.json", {"model_type": "qwen3_5", "text_config": {"vocab_size": WIDTH}})
    NAMED_ELSEWHERE[where](tmp_path)
    text = "x<|a|>y<|b|><|pad|> aa <think> z"

    changes = copy_tokenizer(tmp_path, tmp_path / "copy", classes)

    assert any("as other files have it" in change for change in changes)
    with quiet_transformers():
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(str(tmp_path))
    expected = made.encode(text, add_special_tokens=False)
    for folder in (tmp_path, tmp_path / "copy"):
        assert encode(load_tokenizer(folder), text) == expected
    written = Tokenizer.from_file(str(tmp_path / "copy" / "tokenizer.json"))
    assert written.encode(text, add_special_tokens=False).ids == expected
    contents = [token["content"] for token in read_object(tmp_path / "copy" / "tokenizer.json")["added_tokens"]]
    assert len(contents) == len(set(contents))
    assert copy_problems(tmp_path, tmp_path / "copy", classes) == []


@pytest.mark.parametrize("own", [True, False], ids=["", "of the architecture's class"])
def test_ids_of_tokens_are_those_of_the_class_that_transformers_takes_for_the_checkpoint(
    own: bool, tmp_path: Path, classes: Any
) -> None:
    """The class of the architecture adds a token of its own, which no file names, before those that are named."""
    content = tokenizer_json()
    for token in content["added_tokens"]:
        token["content"] = token["content"].replace("endoftext", "end")
    write_json(tmp_path / "tokenizer.json", content)
    named = "PreTrainedTokenizerFast" if own else None
    config = tokenizer_config(additional_special_tokens=["<|a|>"], tokenizer_class=named)
    write_json(tmp_path / "tokenizer_config.json", config)
    write_json(tmp_path / "config.json", {"model_type": "qwen3_5", "text_config": {"vocab_size": WIDTH}})
    with quiet_transformers():
        from transformers import AutoTokenizer

        expected = AutoTokenizer.from_pretrained(str(tmp_path)).convert_tokens_to_ids("<|a|>")
    copy_tokenizer(tmp_path, tmp_path / "copy", classes)
    for folder in (tmp_path, tmp_path / "copy"):
        assert load_tokenizer(folder).token_to_id("<|a|>") == expected
    assert copy_problems(tmp_path, tmp_path / "copy", classes) == []


@pytest.mark.parametrize("size", [261, 262, 263, None])
def test_a_token_for_which_the_model_has_no_id_is_none(size: int | None, tmp_path: Path, classes: Any) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    fields = {"pad_token": "[PAD]", "additional_special_tokens": ["<|a|>", "<|b|>"]}
    write_json(tmp_path / "tokenizer_config.json", tokenizer_config(**fields))
    write_json(tmp_path / "config.json", {"model_type": "qwen3_5"} | ({"vocab_size": size} if size else {}))
    changes = copy_tokenizer(tmp_path, tmp_path / "copy", classes)
    highest = load_tokenizer(tmp_path / "copy").get_vocab_size(with_added_tokens=True) - 1
    assert highest == {261: 260, 262: 260, 263: 262, None: 263}[size]
    left = {261: "<|a|>, <|b|>", 262: "<|a|>, <|b|>", 263: "<|b|>", None: ""}[size]
    told = [change for change in changes if change.startswith("no id of the model is known")]
    assert told == ([f"no id of the model is known for what other files name as tokens: {left}"] if left else [])
    assert copy_problems(tmp_path, tmp_path / "copy", classes) == []


def test_the_pieces_of_a_unigram_are_its_vocabulary(tmp_path: Path) -> None:
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.5)], unk_id=0))
    made.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"unk_token": "<unk>", "pad_token": "[PAD]"})
    assert added_tokens(tmp_path) == AddedTokens([], [], frozenset({"<unk>"}))


@pytest.mark.parametrize(
    "decoder", [{"257": {"content": "<|im_start|>"}}, {"5": {"special": True}}, {"x": {}, "7": 3}, []]
)
def test_a_decoder_that_says_nothing_new_changes_nothing(decoder: Any, tmp_path: Path, classes: Any) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    write_json(tmp_path / "tokenizer_config.json", tokenizer_config(added_tokens_decoder=decoder))
    assert added_tokens(tmp_path).others == []
    copy_tokenizer(tmp_path, tmp_path / "copy", classes)
    assert copy_problems(tmp_path, tmp_path / "copy", classes) == []


def test_a_name_that_transformers_cannot_load_is_noted(folder: Path, classes: Any, tmp_path: Path) -> None:
    write_json(folder / "tokenizer_config.json", tokenizer_config(extra_special_tokens=[{"content": "<|a|>"}, ""]))
    changes = copy_tokenizer(folder, tmp_path / "copy", classes)
    assert "no id of the model is known for what other files name as tokens: <|a|>" in changes


def test_the_tokenizer_of_a_bundle_is_what_its_files_say(folder: Path) -> None:
    """Engines know no other, and transformers takes a second to load."""
    write_json(folder / "tokenizer_config.json", tokenizer_config(additional_special_tokens=["<|a|>"]))
    assert load_tokenizer(folder).token_to_id("<|a|>") is not None
    (folder / "config.json").unlink()
    assert load_tokenizer(folder).token_to_id("<|a|>") is None


def test_halves_of_characters_are_no_tokens(folder: Path, classes: Any, tmp_path: Path) -> None:
    text = (folder / "tokenizer_config.json").read_text()
    named = '"additional_special_tokens": ["\\ud800x"], "added_tokens_decoder": {"300": {"content": "\\ud800"}}'
    (folder / "tokenizer_config.json").write_text(f"{{{named}, {text.strip()[1:]}")
    assert added_tokens(folder).others == [] and not added_tokens(folder).unknown
    assert not any("d800" in change for change in copy_tokenizer(folder, tmp_path / "copy", classes))


def test_a_token_is_normalized_unless_it_is_special_or_says_so(tmp_path: Path, classes: Any) -> None:
    content = tokenizer_json(normalizer={"type": "Lowercase"})
    write_json(tmp_path / "tokenizer.json", content)
    decoder = {**decoder_of(content), "261": {"content": "<|a|>"}, "262": {"content": "<|b|>", "special": True}}
    write_json(tmp_path / "tokenizer_config.json", tokenizer_config(added_tokens_decoder=decoder))
    made = load_tokenizer(tmp_path)
    assert (encode(made, "<|A|>"), 262 in encode(made, "<|B|>")) == ([261], False)
    copy_tokenizer(tmp_path, tmp_path / "copy", classes)
    assert copy_problems(tmp_path, tmp_path / "copy", classes) == []


def test_an_id_that_the_library_does_not_give_is_a_problem_of_the_copy(tmp_path: Path, classes: Any) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    write_json(tmp_path / "tokenizer_config.json", tokenizer_config())
    copy_tokenizer(tmp_path, tmp_path / "copy", classes)
    named_in(tmp_path / "copy", "tokenizer_config.json", added_tokens_decoder={"270": {"content": "<|a|>"}})
    (problem,) = copy_problems(tmp_path, tmp_path / "copy", classes)
    assert "copy gives '<|a|>' the id 270, which it cannot have" in problem


def test_a_name_of_no_token_makes_none(tmp_path: Path, classes: Any) -> None:
    """A model need not have the id that it would get."""
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    write_json(tmp_path / "tokenizer_config.json", tokenizer_config(pad_token="[PAD]"))
    before = load_tokenizer(tmp_path).get_vocab_size(with_added_tokens=True)
    assert before == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size(with_added_tokens=True)
    assert not any("[PAD]" in change for change in copy_tokenizer(tmp_path, tmp_path / "copy", classes))


def test_ids_that_two_files_dispute_are_refused(tmp_path: Path, classes: Any) -> None:
    content = tokenizer_json()
    write_json(tmp_path / "tokenizer.json", content)
    decoder = decoder_of(content)
    first, second, *_ = decoder
    decoder[first], decoder[second] = decoder[second], decoder[first]
    write_json(tmp_path / "tokenizer_config.json", tokenizer_config(added_tokens_decoder=decoder))
    with pytest.raises(BadInput, match=r"has the id .* and its tokenizer makes it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("prefixes", [False, True])
def test_a_space_that_engines_do_not_put_before_a_text_is_noted(prefixes: bool, tmp_path: Path, classes: Any) -> None:
    content = tokenizer_json()
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": prefixes, "trim_offsets": True, "use_regex": True}],
    }
    write_json(tmp_path / "tokenizer.json", content)
    write_json(tmp_path / "tokenizer_config.json", tokenizer_config(add_prefix_space=True))
    changes = copy_tokenizer(tmp_path, tmp_path / "copy", classes)
    assert any("add_prefix_space" in change for change in changes) is not prefixes


@pytest.mark.parametrize("number", [259, 287, 400, 10**9])
def test_an_added_token_whose_id_is_not_the_one_that_loading_gives_it_is_refused(number: int, tmp_path: Path) -> None:
    content = tokenizer_json()
    content["added_tokens"][2]["id"] = number
    write_json(tmp_path / "tokenizer.json", content)
    write_json(tmp_path / "tokenizer_config.json", tokenizer_config())
    with pytest.raises(BadInput, match=f"has the id {number}, and its tokenizer makes it 258"):
        load_tokenizer(tmp_path)


def test_a_chat_template_that_renders_half_a_character_says_so(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    write_json(tmp_path / "tokenizer_config.json", tokenizer_config(chat_template="{{ '\\ud800' }}" + CHAT))
    with pytest.raises(BadInput, match="renders half of a character"):
        render_chat(tmp_path, HELLO)
