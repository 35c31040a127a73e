"""Whether a bundle's tokenizer is its checkpoint's: byte for byte, but for what a build changes on purpose.

A wrong id goes through every other check: oracle and candidate are fed the same wrong tokens. So the folder is compared
in two ways that have no more in common than how a file is opened and which tokens other files name. It is made again
from the checkpoint, and every byte compared. And the two are read with the library, and asked the same questions: what
is each id, how is this text encoded, how do its tokens read, which of the checkpoint's fields differ. The second way
finds a mistake in what makes the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from coreai_zoo.checkpoint.chat_template import (
    check_chat_template,
    engine_chat_template,
    find_chat_template,
    render_chat,
)
from coreai_zoo.checkpoint.end_of_turn import EndTokens, end_tokens
from coreai_zoo.checkpoint.portable_tokenizer import copy_tokenizer, kept_in_text
from coreai_zoo.checkpoint.tokenizer import (
    TOKEN_FLAGS,
    added_tokens,
    read_tokenizer_file,
    token_texts,
    tokens_engines_know,
)
from coreai_zoo.disk import temporary_folder
from coreai_zoo.errors import BadInput, listing
from coreai_zoo.json_files import read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SHOWN = 4

_TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 3:45 p.m., isn't it? “Yes” — naïve café, e\u0301te\u0301.",
    "Быстрая лиса. Γρήγορη αλεπού. Straße, Łódź, tiếng Việt, İstanbul.",
    "الثعلب البني. השועל החום. तेज़ लोमड़ी। สุนัขจิ้งจอก",
    "敏捷的棕色狐狸跳过了懒狗。すばやい茶色のキツネが、뜨거운 갈색 여우가.",
    "0 1 12 123 1234 12345 3.14159 67890 -2e-10 1,000,000 0x1F 2026-11-26 50% $9.99 ½ ٤٢ Ⅲ",
    " leading,  two,    four\tone tab\t\ttwo\n\n\nlines\r\nand\u00a0no break\u3000wide \u200bnone  \n   trailing   ",
    "def f(x: int = 0) -> str:\n    return f'{x!r:>10}'  # [TODO]\n\nif __name__ == '__main__':\n\tprint(f(1))\n",
    "https://example.org/a_b?c=d&e=%20#f <a href='x'>y</a> {\"k\": [1, null]} \\frac{a}{b} a<|b|>c </s> [INST]",
    "🦊👍🏽👩\u200d💻 🇩🇪 ↔\ufe0f ∞ ∑x² ©™ \U00010348 \ufffd \x00\x07",
)
"""Texts in which any step of a tokenizer shows: scripts, digits, white space, code, marks, characters of all widths."""

# The fields that a build may change, each for a reason that `checkpoint.portable_tokenizer` has beside it.
_MAY_CHANGE: Mapping[str, frozenset[str]] = {
    "tokenizer.json": frozenset({"truncation", "padding", "post_processor", "added_tokens", "model"}),
    "tokenizer_config.json": frozenset(
        {
            *("tokenizer_class", "add_bos_token", "add_eos_token", "eos_token"),
            *("additional_special_tokens", "added_tokens_decoder", "chat_template"),
        }
    ),
    "special_tokens_map.json": frozenset({"eos_token", "additional_special_tokens"}),
    "generation_config.json": frozenset({"eos_token_id"}),
}


def copy_problems(checkpoint: Path, folder: Path, classes: Mapping[str, str], *, of_this_zoo: bool = True) -> list[str]:
    """Where a bundle's tokenizer folder is not that of its checkpoint, one phrase each; empty where nothing is wrong.

    Args:
        checkpoint: the checkpoint's folder.
        folder: the bundle's.
        classes: see `Plugins.tokenizer_classes`.
        of_this_zoo: whether this version made it; another one may have changed more, or less.
    """
    try:
        theirs, ours = _library(checkpoint), _library(folder)
        return [
            *_ids(theirs, ours),
            *_texts(theirs, ours),
            *_fields(checkpoint, folder, theirs),
            *_template(checkpoint, folder),
            *_ends(checkpoint, folder, theirs),
            *(_made_again(checkpoint, folder, classes) if of_this_zoo else ()),
        ]
    except BadInput as error:
        return [f"cannot be compared with the checkpoint's: {error}"]


# ---------------------------------------------------------------------------------------------------------------------
# As the library reads them
# ---------------------------------------------------------------------------------------------------------------------


def _library(folder: Path) -> Tokenizer:
    """The tokenizer of a folder as the library reads its file, with the tokens that other files add.

    Not `load_tokenizer`, which the build goes by as well.
    """
    from tokenizers import AddedToken

    tokenizer = read_tokenizer_file(folder)
    for token in added_tokens(folder).others:
        added = AddedToken(token["content"], **{flag: token[flag] for flag in TOKEN_FLAGS})
        tokenizer.add_tokens([added])
        if tokenizer.token_to_id(added.content) != token["id"]:
            raise BadInput(f"{folder} gives {added.content!r} the id {token['id']}, which it cannot have.")
    return tokenizer


def _ids(theirs: Tokenizer, ours: Tokenizer) -> Iterator[str]:
    """Each id stands for the same token: the whole vocabulary, gaps included."""
    known, found = (tokenizer.get_vocab(with_added_tokens=True) for tokenizer in (theirs, ours))
    highest = max([*known.values(), *found.values()], default=-1)
    shown = [
        f"{number} is {ours.id_to_token(number)!r} and not {theirs.id_to_token(number)!r}"
        for number in range(highest + 1)
        if theirs.id_to_token(number) != ours.id_to_token(number)
    ]
    shown += [
        f"{text!r} is {found.get(text)} and not {known.get(text)}"
        for text in sorted({*known, *found})
        if known.get(text) != found.get(text)
    ]
    if shown:
        yield f"the ids are others than the checkpoint's: {listing(shown, _SHOWN)}"


def _texts(theirs: Tokenizer, ours: Tokenizer) -> Iterator[str]:
    """A text is encoded alike and its tokens read alike: texts of many kinds, and every added token in one."""
    added = sorted({token.content for token in theirs.get_added_tokens_decoder().values()})
    texts = [*_TEXTS, *(f"a{token}b {token} c\n{token}{token}" for token in added)]
    encoded = [[tokenizer.encode(text, add_special_tokens=False).ids for text in texts] for tokenizer in (theirs, ours)]
    differing = [text for text, known, found in zip(texts, *encoded, strict=True) if known != found]
    if differing:
        shown = [repr(text[:24]) for text in differing]
        yield f"{len(differing)} texts are encoded otherwise than by the checkpoint's: {listing(shown, _SHOWN)}"
    read = [
        text
        for text, ids in zip(texts, encoded[0], strict=True)
        if theirs.decode(ids, skip_special_tokens=False) != ours.decode(ids, skip_special_tokens=False)
    ]
    if read:
        shown = [repr(text[:24]) for text in read]
        yield f"tokens of {len(read)} texts read otherwise than by the checkpoint's: {listing(shown, _SHOWN)}"


# ---------------------------------------------------------------------------------------------------------------------
# Field by field
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class _Reasons:
    """The tokens that a build may name otherwise than the checkpoint does.

    Attributes:
        markup: those that mark parts of an answer, which need not be special.
        ends: those that end a turn, which engines are told of.
        added: all that are added to the vocabulary by any file, each with how it is found in a text.
    """

    markup: frozenset[str]
    ends: frozenset[str]
    added: Mapping[str, Mapping[str, bool]]

    @classmethod
    def of(cls, checkpoint: Path, theirs: Tokenizer) -> _Reasons:
        """Those of a checkpoint and its tokenizer."""
        ends, config = end_tokens(checkpoint), read_object(checkpoint / "tokenizer_config.json")
        tokens = theirs.get_added_tokens_decoder().values()
        added = {token.content: {flag: bool(getattr(token, flag)) for flag in TOKEN_FLAGS} for token in tokens}
        markup = kept_in_text([*added, *token_texts(config.get("additional_special_tokens"))], ends)
        return cls(frozenset(markup), frozenset(end.text for end in ends.tokens), added)

    def allow(self, before: Any, after: Any) -> bool:
        """Whether an added token is as it was or is read, or no longer special where it marks a part of an answer."""
        if before == after or not isinstance(before, dict):
            return bool(before == after)
        forms = [before, {**before, **self.added.get(str(before.get("content")), {})}]
        if before.get("content") in self.markup:
            forms += [{**form, "special": False} for form in forms]
        return after in forms


def _fields(checkpoint: Path, folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """No field differs but those that a build may change, and no file is there that is not of the checkpoint."""
    reasons = _Reasons.of(checkpoint, tokenizer)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in ("chat_template.jinja", "chat_template.json"):  # `_template` compares what they say
            continue
        if name == "generation_config.json" and not (checkpoint / name).is_file():
            theirs: Mapping[str, Any] = {}
        elif not (checkpoint / name).is_file():
            yield f"{name} is not a file of the checkpoint"
            continue
        elif (checkpoint / name).read_bytes() == path.read_bytes():
            continue
        elif name not in _MAY_CHANGE:
            yield f"{name} is not the checkpoint's"
            continue
        else:
            theirs = read_object(checkpoint / name)
        ours = read_object(path)
        changed = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        unexplained = [
            key for key in changed if key not in _MAY_CHANGE[name] or not _may_become(key, theirs, ours, reasons)
        ]
        if unexplained:
            yield f"{listing(unexplained, _SHOWN)} in {name} is not the checkpoint's"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            yield f"{name} is missing"


def _may_become(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], reasons: _Reasons) -> bool:
    """Whether a field that may be changed was changed to what it may become."""
    before, after = theirs.get(key), ours.get(key)
    match key:
        case "truncation" | "padding" | "chat_template":
            return after is None
        case "add_bos_token" | "add_eos_token":
            return after is False
        case "model":
            models = [value if isinstance(value, dict) else {} for value in (before, after)]
            return {**models[0], "dropout": None} == {**models[1], "dropout": None}
        case "added_tokens":
            same, more = (after or [])[: len(before or [])], (after or [])[len(before or []) :]
            named_elsewhere = {*token_texts(more)} <= reasons.added.keys() - {*token_texts(before)}
            return named_elsewhere and all(map(reasons.allow, before or [], same)) and len(same) == len(before or [])
        case "added_tokens_decoder":
            first, second = (value if isinstance(value, dict) else {} for value in (before, after))
            return first.keys() == second.keys() and all(reasons.allow(first[at], second[at]) for at in first)
        case "additional_special_tokens":
            known, named = ({*token_texts(value)} for value in (before, after))
            return isinstance(after, list) and named - known <= reasons.ends and known - named <= reasons.markup
    return True  # `_texts` judges a post-processor by what it does, `_ends` a token that ends a turn


def _template(checkpoint: Path, folder: Path) -> Iterator[str]:
    """Engines take the checkpoint's chat template, unless nobody can use it."""
    try:
        wanted = find_chat_template(checkpoint)
        if wanted is not None:
            check_chat_template(wanted)
    except BadInput:
        wanted = None
    taken = engine_chat_template(folder)
    if (taken and taken.text) != (wanted and wanted.text):
        dropped = " and is left out" if taken is None else ""
        yield f"the chat template is not the checkpoint's{dropped}"


def _ends(checkpoint: Path, folder: Path, theirs: Tokenizer) -> Iterator[str]:
    """Turns end with the tokens that end them in the checkpoint, and engines know the chat template's own."""
    known, found = end_tokens(checkpoint), end_tokens(folder)
    if [end.id for end in known.tokens][:1] != [end.id for end in found.tokens][:1] or known.ids != found.ids:
        yield f"turns end with {_named(found)}, in the checkpoint with {_named(known)}"
    eos = token_texts(read_object(folder / "tokenizer_config.json").get("eos_token"))
    stated = token_texts(read_object(checkpoint / "tokenizer_config.json").get("eos_token"))
    emitted = _behind_an_answer(checkpoint, theirs)
    if emitted is not None and emitted not in tokens_engines_know(folder):
        yield f"the chat template ends a turn with {emitted!r}, at which no engine stops"
    if emitted is not None and eos not in ([emitted], stated):
        yield f"eos_token is {listing(eos)}, and the chat template ends a turn with {emitted!r}"
    if emitted is None and stated and eos != stated and not {*eos} <= {end.text for end in known.tokens}:
        yield f"eos_token is {listing(eos)}, in the checkpoint {listing(stated)}"


def _named(ends: EndTokens) -> str:
    return listing([end.text for end in ends.tokens]) or "nothing"


def _behind_an_answer(checkpoint: Path, theirs: Tokenizer) -> str | None:
    """The added token that the checkpoint's chat template puts right behind the last answer; None for none."""
    try:
        chat = render_chat(checkpoint, (("user", "Question"), ("assistant", "Answer")))
    except BadInput:
        return None
    behind = chat.rpartition("Answer")[2].lstrip()
    added = [token.content for token in theirs.get_added_tokens_decoder().values()]
    return max((text for text in added if text and behind.startswith(text)), key=len, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Made again
# ---------------------------------------------------------------------------------------------------------------------


def _made_again(checkpoint: Path, folder: Path, classes: Mapping[str, str]) -> Iterator[str]:
    """The folder is what the checkpoint's becomes, byte for byte."""
    with temporary_folder("zoo-tokenizer-") as temporary:
        again = temporary / "tokenizer"
        copy_tokenizer(checkpoint, again, classes)
        contents = [
            {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
            for root in (folder, again)
        ]
    differing = sorted(name for name in {*contents[0], *contents[1]} if contents[0].get(name) != contents[1].get(name))
    if differing:
        yield f"{listing(differing, _SHOWN)} is not what the checkpoint's becomes"
