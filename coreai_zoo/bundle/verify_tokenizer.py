"""The rules of a bundle's tokenizer folder, each with its reason in docs/contracts.md.

A build writes the folder so that they hold (`checkpoint.portable_tokenizer`); here the folder is read as engines do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from coreai_zoo.checkpoint.chat_template import check_chat_template, engine_chat_template, find_chat_template
from coreai_zoo.checkpoint.end_of_turn import EndTokens, end_tokens
from coreai_zoo.checkpoint.portable_tokenizer import kept_in_text, without_added_tokens
from coreai_zoo.checkpoint.tokenizer import highest_token_id, token_texts, tokenizer_class, tokens_engines_know
from coreai_zoo.errors import BadInput, listing
from coreai_zoo.json_files import read_object


def tokenizer_problems(directory: Path, width: int, known: Collection[str]) -> list[str]:
    """What engines would take wrongly of a bundle's tokenizer folder, one phrase each; empty where nothing is wrong.

    Args:
        directory: the folder.
        width: number of logits of the model.
        known: the classes that engines know.
    """
    try:
        ends = end_tokens(directory)
        return [
            *_class_and_ids(directory, width, known),
            *_encoding(directory),
            *_ends(directory, ends),
            *_cut_markup(directory, ends),
            *_chat_template(directory),
        ]
    except BadInput as error:
        return [f"cannot be loaded: {error}"]


def _class_and_ids(directory: Path, width: int, known: Collection[str]) -> Iterator[str]:
    name = tokenizer_class(read_object(directory / "tokenizer_config.json"))
    if name not in known:
        yield f"engines do not know the tokenizer_class {name!r}"
    highest = highest_token_id(directory)
    if not 0 <= highest < width:
        yield f"{f'token ids up to {highest}' if highest >= 0 else 'no token'} for {width} logits"


def _encoding(directory: Path) -> Iterator[str]:
    content = read_object(directory / "tokenizer.json")
    for key, does in (("truncation", "cut"), ("padding", "filled up")):
        if content.get(key) is not None:
            yield f"tokenizer.json has {key}, by which prompts are {does}"
    if (content.get("model") or {}).get("dropout") is not None:
        yield "tokenizer.json has a dropout, by which the tokens of a prompt are a matter of chance"
    processor = content.get("post_processor")
    if without_added_tokens(processor) != processor:
        yield "tokenizer.json has a post-processor that adds special tokens to a rendered chat"
    config = read_object(directory / "tokenizer_config.json")
    for key in ("add_bos_token", "add_eos_token"):
        if config.get(key):
            yield f"tokenizer_config.json has {key}, by which a token is added to a rendered chat"


def _ends(directory: Path, ends: EndTokens) -> Iterator[str]:
    known = tokens_engines_know(directory)
    unknown = [end.text for end in ends.tokens if end.added and end.text not in known]
    if unknown:
        yield f"no engine stops at the end of turn {listing(unknown)}, which tokenizer_config.json does not name"
    eos = read_object(directory / "tokenizer_config.json").get("eos_token")
    if eos is not None and not isinstance(eos, (str, dict)):
        yield f"eos_token in tokenizer_config.json is {eos!r} and not one token"


def _cut_markup(directory: Path, ends: EndTokens) -> Iterator[str]:
    added = read_object(directory / "tokenizer.json").get("added_tokens") or []
    special = [token for token in added if isinstance(token, dict) and token.get("special")]
    cut = kept_in_text([*token_texts(special), *sorted(tokens_engines_know(directory))], ends)
    if cut:
        yield f"engines cut {listing(cut)} from the text, for the tokenizer calls them special"


def _chat_template(directory: Path) -> Iterator[str]:
    try:
        taken, ours = engine_chat_template(directory), find_chat_template(directory)
        if taken is not None:
            check_chat_template(taken)
    except BadInput as error:
        yield error.message.rstrip(".")
        return
    if (taken and taken.text) != (ours and ours.text):
        yield "engines take another chat template than transformers does, or an empty one"
