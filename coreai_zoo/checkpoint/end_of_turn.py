"""The tokens that end a turn, wherever a tokenizer folder names them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from coreai_zoo.checkpoint.chat_template import render_chat
from coreai_zoo.checkpoint.tokenizer import load_tokenizer, optional_object, token_texts
from coreai_zoo.errors import BadInput
from coreai_zoo.json_files import read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONFIG = "eos_token_id in config.json"

_ANSWER = "Answer"  # of the chat that is rendered to see what follows an answer
_QUESTION = ("user", "Question")
_SYSTEM = ("system", "Instruction")


@frozen
class EndToken:
    """A token at which a model ends its turn.

    Attributes:
        id: its id.
        text: its text.
        added: whether it is one of the tokenizer's added tokens, which text is never split across; else it is an
            ordinary piece of text.
        places: what names it.
    """

    id: int
    text: str
    added: bool
    places: tuple[str, ...]


@frozen
class EndTokens:
    """The tokens at which a model ends its turn.

    Attributes:
        tokens: that of the chat template first, then in the order of the files that name them; empty where none does.
        ignored: what names a token that there is not, one phrase each.
    """

    tokens: tuple[EndToken, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def ids(self) -> frozenset[int]:
        """Their ids."""
        return frozenset(token.id for token in self.tokens)


def end_tokens(directory: Path) -> EndTokens:
    """Every end-of-turn token that a folder names, of a checkpoint or the tokenizer of a bundle.

    They are what the chat template emits behind an answer, `eos_token` in `tokenizer_config.json` and
    `special_tokens_map.json`, and `eos_token_id` in `generation_config.json` and `config.json`. An id of `config.json`
    is often left over from the defaults of a class, so that one counts only if it is of an added token, or nothing else
    names an end.

    Raises:
        BadInput: when the tokenizer or its config cannot be read.
    """
    tokenizer = load_tokenizer(directory)
    added = tokenizer.get_added_tokens_decoder()
    sure: dict[int, EndToken] = {}
    left_over: dict[int, EndToken] = {}
    ignored = []
    for place, value in _named(directory):
        token = _id(tokenizer, value)
        if token is None:
            ignored.append(f"{place} is {value!r}, which is no token of the tokenizer")
            continue
        found = left_over if place == _CONFIG and token not in added else sure
        before = found.get(token, EndToken(token, str(tokenizer.id_to_token(token)), token in added, ()))
        found[token] = evolve(before, places=(*before.places, place))
    ends = list(sure.values())
    if (emitted := _emitted(directory, tokenizer, sure)) is not None:
        ends = [emitted, *(end for end in ends if end.id != emitted.id)]
    if ends:
        ignored += [f"{_CONFIG} is {end.id}, which is the ordinary text {end.text!r}" for end in left_over.values()]
    return EndTokens(tuple(ends or left_over.values()), tuple(ignored))


def _named(directory: Path) -> Iterator[tuple[str, object]]:
    """Every end that a file names, as a text or an id, with the file and the key."""
    contents = {
        "tokenizer_config.json": read_object(directory / "tokenizer_config.json"),
        "special_tokens_map.json": optional_object(directory / "special_tokens_map.json"),
    }
    for name, content in contents.items():
        value = content.get("eos_token")
        texts = token_texts(value)
        yield from ((f"eos_token in {name}", text) for text in texts)
        if value is not None and not texts and value != "":
            yield f"eos_token in {name}", value
    for name in ("generation_config.json", "config.json"):
        content = optional_object(directory / name)
        text = content.get("text_config")
        for part in (content, *([text] if isinstance(text, Mapping) else [])):
            value = part.get("eos_token_id")
            for each in value if isinstance(value, list) else [] if value is None else [value]:
                yield f"eos_token_id in {name}", each


def _id(tokenizer: Tokenizer, value: object) -> int | None:
    """The id of a token that is named by its text or its id; None where there is no such token."""
    if isinstance(value, str):
        found: int | None = tokenizer.token_to_id(value)
        return found
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return value if isinstance(value, int) and whole and tokenizer.id_to_token(value) is not None else None


# ---------------------------------------------------------------------------------------------------------------------
# The chat template
# ---------------------------------------------------------------------------------------------------------------------


def _emitted(directory: Path, tokenizer: Tokenizer, named: Mapping[int, EndToken]) -> EndToken | None:
    """The token that the chat template puts behind an answer; None where it puts none, or cannot be asked.

    Behind the last answer it is the end of a turn. Some templates end an answer only by beginning the next turn: that
    counts where a file names it as well.
    """
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    known = added | {end.text: end.id for end in named.values()}
    answered = (_QUESTION, ("assistant", _ANSWER))
    for turns, must_be_named in ((answered, False), ((*answered, _QUESTION), True)):
        for chat in (turns, (_SYSTEM, *turns)):
            text = _behind_answer(directory, chat, known)
            if text is not None and (known[text] in named or not must_be_named):
                end = named.get(known[text], EndToken(known[text], text, text in added, ()))
                return evolve(end, places=("the chat template", *end.places))
    return None


def _behind_answer(directory: Path, chat: tuple[tuple[str, str], ...], known: Mapping[str, int]) -> str | None:
    """The one of the known tokens that stands right behind the answer of a rendered chat."""
    try:
        rendered = render_chat(directory, chat)
    except BadInput:  # whoever renders a chat is told
        return None
    _, answer, rest = rendered.rpartition(_ANSWER)
    tokens = "|".join(re.escape(text) for text in sorted(known, key=len, reverse=True) if text)
    match = re.match(rf"\s*({tokens})", rest) if answer and tokens else None
    return None if match is None else match[1]
