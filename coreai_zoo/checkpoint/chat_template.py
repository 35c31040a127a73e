"""The chat template of a tokenizer folder: where it is kept, what it renders, and why one cannot be used.

A template is code that came with a checkpoint. It runs in the sandbox in which transformers runs it, and whatever it
does there ends in one paragraph.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from attrs import frozen

from coreai_zoo.checkpoint.tokenizer import quiet_transformers, special_tokens
from coreai_zoo.errors import BadInput, listing
from coreai_zoo.json_files import read_object

TEMPLATE_FILE = "chat_template.jinja"
KEY = "tokenizer_config.json:chat_template"
"""Where most templates are: a file, and a key of a file, as `ChatTemplate.place` says it."""

# No chat of a few turns comes near these; a template that does is stuck in a loop.
_MOST_CHARACTERS, _MOST_SECONDS = 2**22, 10.0

# Templates that did not come to an end, and how many characters they had made: nobody waits for one twice.
_endless: dict[str, int] = {}

_SHOWN_CHARACTERS = 300  # of what a template says when it fails


@frozen
class ChatTemplate:
    """A chat template.

    Attributes:
        text: its Jinja source.
        place: the file, or the key of a file, that it is in.
    """

    text: str
    place: str


# ---------------------------------------------------------------------------------------------------------------------
# Where it is
# ---------------------------------------------------------------------------------------------------------------------


def find_chat_template(directory: Path) -> ChatTemplate | None:
    """The template by which chats are rendered; None where there is none. An empty one counts as none.

    The order is that of transformers: a file of its own goes before the key in `tokenizer_config.json`.
    `chat_template.json`, which only its processors read, comes last.

    Raises:
        BadInput: when the one that goes first cannot be read, is no text, or is a list of named ones without a default.
    """
    return next((template for template in _templates(directory) if template.text.strip()), None)


def engine_chat_template(directory: Path) -> ChatTemplate | None:
    """The template that engines take: they read `chat_template.json` before the key in `tokenizer_config.json`.

    An empty one is a template to them.

    Raises:
        BadInput: as `find_chat_template`, and for named templates in an object, which transformers alone takes.
    """
    order = [TEMPLATE_FILE, "chat_template.json", "tokenizer_config.json"]
    found = {template.place.partition(":")[0]: template for template in _templates(directory)}
    name = next((name for name in order if name in found), None)
    if name is None:
        return None
    if name.endswith(".json") and isinstance(read_object(directory / name).get("chat_template"), Mapping):
        raise BadInput(f"chat_template in {directory / name} is an object, which engines do not take.", _MEND)
    return found[name]


def _templates(directory: Path) -> Iterator[ChatTemplate]:
    """The templates of a folder in the order of transformers, each read when it is asked for."""
    for name in ("additional_chat_templates/default.jinja", TEMPLATE_FILE):
        if (path := directory / name).is_file():
            try:
                yield ChatTemplate(path.read_text(encoding="utf-8"), name)
            except (OSError, UnicodeError) as error:
                raise BadInput(f"The chat template {path} cannot be read as UTF-8 text: {error}.") from error
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (path := directory / name).is_file() and (value := read_object(path).get("chat_template")) is not None:
            yield ChatTemplate(_default(value, path), f"{name}:chat_template")


def _default(value: object, path: Path) -> str:
    """The text of a `chat_template` key: itself, or the one called `default` of several."""
    named: object = value
    if isinstance(value, list):
        pairs = [(item.get("name"), item.get("template")) for item in value if isinstance(item, Mapping)]
        named = dict(pairs) if len(pairs) == len(value) and all(isinstance(name, str) for name, _ in pairs) else value
    if isinstance(named, Mapping):
        if "default" not in named:
            names = listing([repr(name) for name in named]) or "no template"
            raise BadInput(f"chat_template in {path} holds {names} and none that is called 'default'.", _MEND)
        named = named["default"]
    if not isinstance(named, str):
        raise BadInput(f"chat_template in {path} is no text, but {_shortened(repr(named))}.", _MEND)
    return named


_MEND = "Mend the template, or take it out."


# ---------------------------------------------------------------------------------------------------------------------
# What it renders
# ---------------------------------------------------------------------------------------------------------------------


def check_chat_template(template: ChatTemplate) -> None:
    """Refuse a template that cannot be parsed, or that names a filter, test or tag that does not exist.

    Raises:
        BadInput: with the line and what is wrong there.
    """
    _compiled(template)


def template_variables(template: ChatTemplate) -> frozenset[str]:
    """The names of what a template reads and does not set itself: what whoever renders a chat can say by it.

    Raises:
        BadInput: when it cannot be parsed.
    """
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_compiled(template).environment.parse(template.text)))


def render_chat(
    directory: Path,
    turns: Sequence[tuple[str, str]],
    *,
    answer_follows: bool = False,
    variables: Mapping[str, object] | None = None,
) -> str:
    """(role, content) turns in the chat template of a folder, with the beginning of the next answer where asked for.

    Args:
        directory: the folder.
        turns: the turns.
        answer_follows: whether the beginning of the next answer is asked for.
        variables: further variables of the template, by name.

    Raises:
        BadInput: when there is no chat template, it cannot be used, or it does not take these turns.
    """
    template = find_chat_template(directory)
    if template is None:
        raise BadInput(f"There is no chat template in {directory}.")
    further = {**special_tokens(directory), **(variables or {})}
    return _rendered(template, further, turns, answer_follows=answer_follows)


def _rendered(
    template: ChatTemplate, further: Mapping[str, object], turns: Sequence[tuple[str, str]], *, answer_follows: bool
) -> str:
    compiled = _compiled(template)
    messages = [{"role": role, "content": content} for role, content in turns]
    variables = {**further, "tools": None, "documents": None, "add_generation_prompt": answer_follows}
    if template.text in _endless:
        raise _without_end(template)
    pieces: list[str] = []
    length = 0
    try:
        with _deadline(_MOST_SECONDS):
            for piece in compiled.generate(messages=messages, **variables):
                pieces.append(piece)
                length += len(piece)
                if length > _MOST_CHARACTERS:
                    raise TimeoutError
    except TimeoutError as error:
        _endless[template.text] = length
        raise _without_end(template) from error
    except Exception as error:  # a template can raise anything
        raise BadInput(f"The chat template in {template.place} does not take this chat: {_reason(error)}.") from error
    rendered = "".join(pieces)
    if not rendered.isascii() and any("\ud800" <= letter <= "\udfff" for letter in rendered):
        raise BadInput(f"The chat template in {template.place} renders half of a character, which is no text.")
    return rendered


def _without_end(template: ChatTemplate) -> BadInput:
    length = _endless[template.text]
    return BadInput(f"The chat template in {template.place} does not come to an end: {length:,} characters so far.")


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` within the block once it takes longer, between two lines of any Python that it calls."""
    until, before = time.monotonic() + seconds, sys.gettrace()

    def watch(_frame: FrameType, _event: str, _value: object) -> Any:
        if time.monotonic() > until:
            raise TimeoutError
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _compiled(template: ChatTemplate) -> Any:
    """The template in the environment of transformers, with its filters, functions and tags."""
    try:
        with quiet_transformers():
            from transformers.utils.chat_template_utils import _compile_jinja_template

            return _compile_jinja_template(template.text)
    except Exception as error:  # Jinja lets through what Python says to the code it makes
        raise BadInput(f"The chat template in {template.place} cannot be parsed: {_reason(error)}.", _MEND) from error


def _reason(error: Exception) -> str:
    """What an error of a template says, in one line and without a full stop."""
    import jinja2

    if isinstance(error, jinja2.TemplateSyntaxError):
        said = f"line {error.lineno}: {error.message}"
    elif isinstance(error, jinja2.TemplateError):
        said = error.message or type(error).__name__
    else:
        said = f"{type(error).__name__}: {error}"
    return _shortened(said)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return (line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]} ...").rstrip(".")
