"""The tokenizer as a bundle gets it: the checkpoint's own files, with the least changed by which engines read it right.

What is saved with a tokenizer may be a setting of a training run, or be in a place that only transformers reads. Each
mend below is a function from the folder of the copy to what it changed, one phrase each; a file of which nothing had to
be changed keeps its bytes, and a second run changes nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coreai_zoo.checkpoint.chat_template import (
    KEY,
    TEMPLATE_FILE,
    check_chat_template,
    engine_chat_template,
    find_chat_template,
    render_chat,
)
from coreai_zoo.checkpoint.end_of_turn import EndToken, EndTokens, end_tokens
from coreai_zoo.checkpoint.tokenizer import (
    AddedTokens,
    added_tokens,
    class_for_engines,
    optional_object,
    token_texts,
    tokenizer_class,
    tokenizer_files,
    tokens_engines_know,
)
from coreai_zoo.disk import temporary_folder
from coreai_zoo.errors import BadInput, listing
from coreai_zoo.json_files import read_object, write_json

_KEPT_IN_TEXT = re.compile(
    r"(?<![a-z])(?:think|thinking|thought|reasoning|answer|(?:tool|function)_?calls?|tool_?response)(?![a-z])",
    re.IGNORECASE,
)
"""Tokens that mark parts of an answer, as `<think>`, `</tool_call>`, `[TOOL_CALLS]`: whoever reads it needs them."""

_CHATS = (
    (("user", "Question"), ("assistant", "Answer")),
    (("system", "Instruction"), ("user", "Question"), ("assistant", "Answer"), ("user", "Question")),
)


def copy_tokenizer(checkpoint: Path, destination: Path, classes: Mapping[str, str]) -> list[str]:
    """Copy the checkpoint's tokenizer to `destination`, changed where engines would take it otherwise.

    Args:
        checkpoint: its folder.
        destination: a folder that is made.
        classes: see `Plugins.tokenizer_classes`.

    Returns:
        What was changed, and what could not be used, one phrase each.

    Raises:
        BadInput: when a file cannot be read, or engines do not know the class.
    """
    destination.mkdir()
    for path in tokenizer_files(checkpoint):
        if path.parent == checkpoint:
            shutil.copyfile(path, destination / path.name)
    ends = end_tokens(checkpoint)
    mends: list[Callable[[Path], Iterator[str]]] = [
        _readable_files,
        lambda folder: _added_tokens(folder, added_tokens(checkpoint)),
        lambda folder: _chat_template(checkpoint, folder),
        _encoding,
        lambda folder: _class(folder, class_for_engines(checkpoint, classes)),
        lambda folder: _markup(folder, ends),
        lambda folder: _end_of_turn(folder, ends),
    ]
    return [change for mend in mends for change in mend(destination)] + list(ends.ignored)


def tokenizer_changes(checkpoint: Path, classes: Mapping[str, str]) -> list[str]:
    """What `copy_tokenizer` will change, found by doing it; for a build to say so before anything is computed."""
    with temporary_folder("zoo-tokenizer-") as folder:
        return copy_tokenizer(checkpoint, folder / "tokenizer", classes)


def _edit(path: Path, changed: Mapping[str, Any]) -> bool:
    """Write a JSON object in the place of what a file holds, if it is another one; whether it is."""
    if json.dumps(read_object(path)) == json.dumps(changed):
        return False
    write_json(path, changed)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _readable_files(folder: Path) -> Iterator[str]:
    """Leave out files that need not be there and that nobody can read."""
    for name in ("special_tokens_map.json", "generation_config.json", "chat_template.json"):
        if (folder / name).is_file():
            try:
                read_object(folder / name)
            except BadInput as error:
                (folder / name).unlink()
                yield f"{name} is left out: {_within(error, folder)}"


def _within(error: BadInput, folder: Path) -> str:
    """What an error says of a file of the copy, by the name that it has in the checkpoint too."""
    return error.message.replace(f"{folder}/", "").rstrip(".")


def _chat_template(checkpoint: Path, folder: Path) -> Iterator[str]:
    """Engines take the template that transformers takes, or none where that one cannot be used."""
    others = [path.name for path in sorted(checkpoint.glob("additional_chat_templates/*")) if path.stem != "default"]
    if others:
        yield f"additional_chat_templates holds {listing(others)}, which engines do not read: left out"
    try:
        template = find_chat_template(checkpoint)
        if template is not None:
            check_chat_template(template)
    except BadInput as error:
        _remove_templates(folder)
        yield f"the chat template is left out, so that there is no chat: {_within(error, checkpoint)}"
        return
    taken = _engine_text(folder)
    if taken == (template.text if template else None):
        return
    if template is None:
        _remove_templates(folder)
        yield "an empty chat template is left out"
    elif template.place == KEY and isinstance(read_object(folder / "tokenizer_config.json")["chat_template"], str):
        for name in (TEMPLATE_FILE, "chat_template.json"):
            (folder / name).unlink(missing_ok=True)
        yield "a chat template in a file of its own is left out: transformers goes by that in tokenizer_config.json"
    else:
        _remove_templates(folder)
        (folder / TEMPLATE_FILE).write_text(template.text, encoding="utf-8")
        yield f"the chat template in {template.place} is written as {TEMPLATE_FILE}, which engines read first"


def _engine_text(folder: Path) -> str | None:
    try:
        found = engine_chat_template(folder)
    except BadInput:
        return ""
    return None if found is None else found.text


def _remove_templates(folder: Path) -> None:
    """Take every chat template out of a folder."""
    for name in (TEMPLATE_FILE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    config = read_object(folder / "tokenizer_config.json")
    _edit(folder / "tokenizer_config.json", {key: config[key] for key in config if key != "chat_template"})


# ---------------------------------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------------------------------


def _added_tokens(folder: Path, added: AddedTokens) -> Iterator[str]:
    """Engines find every added token in `tokenizer.json`, as it is for transformers."""
    if added.unknown:
        yield f"no id of the model is known for what other files name as tokens: {listing(sorted(added.unknown))}"
    if added.others:
        path = folder / "tokenizer.json"
        content = read_object(path)
        given = {token["content"]: token for token in added.others}
        kept = [given.pop("".join(token_texts(token)), token) for token in content.get("added_tokens") or []]
        _edit(path, content | {"added_tokens": [*kept, *given.values()]})
        yield f"tokenizer.json is given {listing(token_texts(added.others))}, as other files have it"


def _encoding(folder: Path) -> Iterator[str]:
    """Engines encode the whole text and nothing but the text."""
    path = folder / "tokenizer.json"
    content = read_object(path)
    for key in ("truncation", "padding"):
        if content.get(key) is not None:
            content[key] = None
            yield f"{key} is taken out of tokenizer.json"
    model = content.get("model")
    if isinstance(model, dict) and model.get("dropout") is not None:
        model["dropout"] = None
        yield "the dropout of merges is taken out of tokenizer.json"
    processor = content.get("post_processor")
    plain = without_added_tokens(processor)
    if plain != processor:
        content["post_processor"] = plain
        yield "the post-processor that adds special tokens is taken out of tokenizer.json"
    _edit(path, content)
    config = read_object(folder / "tokenizer_config.json")
    prefixed = _prefixes(content.get("pre_tokenizer")) or '"Prepend"' in json.dumps(content.get("normalizer"))
    if config.get("add_prefix_space") and not prefixed:
        yield "add_prefix_space is not in tokenizer.json, which engines go by: no space is put before a text"
    if config.get("split_special_tokens"):
        yield "split_special_tokens is not in tokenizer.json, which engines go by: special tokens in a text are tokens"
    added = [key for key in ("add_bos_token", "add_eos_token") if config.get(key)]
    if added:
        _edit(folder / "tokenizer_config.json", config | dict.fromkeys(added, False))
        yield f"{' and '.join(added)} in tokenizer_config.json says false"


_PREPENDING = ("always", "first")


def _prefixes(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer of a `tokenizer.json` puts a space before the text."""
    if not isinstance(pre_tokenizer, Mapping):
        return False
    parts = pre_tokenizer.get("pretokenizers")
    inside = any(map(_prefixes, parts)) if isinstance(parts, list) else False
    return inside or bool(pre_tokenizer.get("add_prefix_space")) or pre_tokenizer.get("prepend_scheme") in _PREPENDING


def without_added_tokens(processor: Any) -> Any:
    """A post-processor of a `tokenizer.json` without the parts that add special tokens; None where nothing is left."""
    if not isinstance(processor, Mapping):
        return processor
    kind = processor.get("type")
    if kind in {"BertProcessing", "RobertaProcessing"}:
        return None
    if kind == "TemplateProcessing":
        pieces = [*processor.get("single", ()), *processor.get("pair", ())]
        return None if any("SpecialToken" in piece for piece in pieces) else processor
    if kind == "Sequence":
        kept = [plain for each in processor.get("processors", ()) if (plain := without_added_tokens(each)) is not None]
        return {**processor, "processors": kept} if kept else None
    return processor


# ---------------------------------------------------------------------------------------------------------------------
# Class and tokens
# ---------------------------------------------------------------------------------------------------------------------


def _class(folder: Path, known_as: str | None) -> Iterator[str]:
    """Engines find the class under the name by which they know it."""
    path = folder / "tokenizer_config.json"
    config = read_object(path)
    if known_as is None:
        raise BadInput(f"tokenizer_class is {config.get('tokenizer_class')!r}, which the runtime does not know.")
    if tokenizer_class(config) != known_as:
        named = config.get("tokenizer_class")
        _edit(path, {**config, "tokenizer_class": known_as})
        if not named:
            yield f"tokenizer_config.json names no tokenizer_class and is given {known_as}"


def kept_in_text(texts: Sequence[str], ends: EndTokens) -> list[str]:
    """Those of some special tokens that mark parts of an answer, as `<think>` does: engines would cut them from it."""
    ending = {end.text for end in ends.tokens}
    return [text for text in dict.fromkeys(texts) if _KEPT_IN_TEXT.search(text) and text not in ending]


def _markup(folder: Path, ends: EndTokens) -> Iterator[str]:
    """Engines leave the parts of an answer in its text."""
    path, special = folder / "tokenizer.json", folder / "special_tokens_map.json"
    content, config, older = read_object(path), read_object(folder / "tokenizer_config.json"), optional_object(special)
    added = [token for token in content.get("added_tokens") or [] if isinstance(token, dict)]
    named = [*token_texts([token for token in added if token.get("special")]), *tokens_engines_know(folder)]
    kept = kept_in_text([*named, *token_texts(older.get("additional_special_tokens"))], ends)
    if not kept:
        return
    ordinary = [{**token, "special": False} if token.get("content") in kept else token for token in added]
    _edit(path, content | {"added_tokens": ordinary})
    _edit(folder / "tokenizer_config.json", _without(config, kept))
    if older:
        _edit(special, _without(older, kept))
    yield f"{listing(sorted(kept))} is not special: engines would cut it from the text"


def _without(fields: dict[str, Any], kept: list[str]) -> dict[str, Any]:
    """The fields of a file that names special tokens, with some tokens named no more."""
    fields = dict(fields)
    if isinstance(listed := fields.get("additional_special_tokens"), list):
        fields["additional_special_tokens"] = [item for item in listed if not set(token_texts(item)) & set(kept)]
    if isinstance(decoder := fields.get("added_tokens_decoder"), Mapping):
        fields["added_tokens_decoder"] = {
            number: {**item, "special": False} if isinstance(item, dict) and item.get("content") in kept else item
            for number, item in decoder.items()
        }
    return fields


def _end_of_turn(folder: Path, ends: EndTokens) -> Iterator[str]:
    """Engines know every end of a turn, that of the chat as `eos_token`; they never read `generation_config.json`."""
    nameable = [end for end in ends.tokens if end.added]
    if nameable:
        yield from _eos(folder, nameable[0])
        unknown = [end.text for end in nameable if end.text not in tokens_engines_know(folder)]
        if unknown:
            path = folder / "tokenizer_config.json"
            config = read_object(path)
            listed = config.get("additional_special_tokens")
            _edit(
                path, config | {"additional_special_tokens": [*(listed if isinstance(listed, list) else []), *unknown]}
            )
            yield f"additional_special_tokens names the end of turn {listing(unknown)} too"
    if end_tokens(folder).ids != ends.ids:
        path = folder / "generation_config.json"
        write_json(path, optional_object(path) | {"eos_token_id": [end.id for end in ends.tokens]})
    if not ends.tokens:
        yield "nothing names a token that ends a turn: text goes on until its limit"
    for end in ends.tokens:
        if not end.added:
            yield f"the end of turn {end.text!r} ({end.places[0]}) is ordinary text: engines will not stop at it"


def _eos(folder: Path, end: EndToken) -> Iterator[str]:
    """Make a token the `eos_token`, unless the chat template would render something else by it."""
    paths = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    before = {path: path.read_bytes() for path in paths if path.is_file()}
    rendered = _rendered(folder)
    for path in before:
        content = read_object(path)
        named = content.get("eos_token")
        if path == paths[0] or named is not None:
            same = token_texts(named) == [end.text] and not isinstance(named, list)
            _edit(path, content if same else {**content, "eos_token": end.text})
    if all(path.read_bytes() == content for path, content in before.items()):
        return
    named = json.loads(before[paths[0]]).get("eos_token")
    if token_texts(named) and _rendered(folder) != rendered:
        for path, kept in before.items():
            path.write_bytes(kept)
        if isinstance(named, list):
            _edit(paths[0], read_object(paths[0]) | {"eos_token": token_texts(named)[0]})
        return
    yield f"eos_token is {end.text} ({end.places[0]})"


def _rendered(folder: Path) -> list[str]:
    """Some chats in the template of a folder; of one that it does not take, why."""
    rendered = []
    for chat in _CHATS:
        for answer_follows in (False, True):
            try:
                rendered.append(render_chat(folder, chat, answer_follows=answer_follows))
            except BadInput as error:
                rendered.append(error.message)
    return rendered
