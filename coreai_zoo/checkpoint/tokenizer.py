"""A tokenizer folder, of a checkpoint or a bundle: which files it has, its tokens, and whether an engine can use it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from coreai_zoo.checkpoint.folder import member
from coreai_zoo.checkpoint.pointers import refuse_pointer_at
from coreai_zoo.errors import BadInput, listing
from coreai_zoo.json_files import read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_TOKENIZER_FILES = {
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "chat_template.jinja": False,
    "chat_template.json": False,
    "additional_chat_templates/default.jinja": False,
    "special_tokens_map.json": False,
    "generation_config.json": False,
    "added_tokens.json": False,
    "vocab.json": False,
    "merges.txt": False,
}

TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""How an added token is found in a text, and whether engines cut it from one."""

_USUAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_ANY_READER = "PreTrainedTokenizer"
"""The class that takes a byte-pair encoding as its `tokenizer.json` describes it."""


def tokenizer_files(checkpoint: Path) -> list[Path]:
    """The checkpoint's tokenizer files: names that we know, never names that a file gives.

    Raises:
        BadInput: when one is a link that leads out of the checkpoint: what it points to would be published.
    """
    return [member(checkpoint, name, str(checkpoint)) for name in _TOKENIZER_FILES if (checkpoint / name).is_file()]


def check_tokenizer(checkpoint: Path, vocab_size: int, classes: Mapping[str, str]) -> dict[str, Any]:
    """Read the checkpoint's `tokenizer_config.json` and check that an engine can use the tokenizer.

    Args:
        checkpoint: its folder.
        vocab_size: of the model.
        classes: see `Plugins.tokenizer_classes`.

    Raises:
        BadInput: when a file is missing or unreadable, the class is unknown to engines, or a token id is out of range.
    """
    missing = [name for name, required in _TOKENIZER_FILES.items() if required and not (checkpoint / name).is_file()]
    if missing:
        hint = "A bundle needs the checkpoint's tokenizer."
        if all((checkpoint / name).is_file() for name in ("vocab.json", "merges.txt")):
            hint = (
                "transformers makes it of the others: `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`."
            )
        raise BadInput(f"{checkpoint} has no {' and no '.join(missing)}.", hint)
    for path in tokenizer_files(checkpoint):
        refuse_pointer_at(path)
    config = read_object(checkpoint / "tokenizer_config.json")
    if class_for_engines(checkpoint, classes) is None:
        raise BadInput(
            f"tokenizer_class in {checkpoint / 'tokenizer_config.json'} is {config.get('tokenizer_class')!r}, which "
            f"the runtime does not know.",
            f"It knows {listing(sorted(set(classes.values())))}. A plugin that knows better says so in "
            "zoo_tokenizer_classes.",
        )
    highest = highest_token_id(checkpoint)
    if highest < 0 or highest >= vocab_size:
        raise BadInput(
            f"The tokenizer in {checkpoint} has token ids up to {highest}, but the model's vocabulary is {vocab_size}."
        )
    return config


def highest_token_id(directory: Path) -> int:
    """The highest id of a token of the tokenizer in `directory`, added tokens included; -1 where it has none.

    Ids may have gaps: the number of tokens says nothing of it.

    Raises:
        BadInput: when there is no tokenizer, or it cannot be read.
    """
    return max(load_tokenizer(directory).get_vocab(with_added_tokens=True).values(), default=-1)


def chat_templates(directory: Path) -> str:
    """The text of every chat template in `directory`, wherever it is kept; empty where there is none to be read."""
    path = directory / "chat_template.jinja"
    found = [path.read_text(encoding="utf-8", errors="replace")] if path.is_file() else []
    for name in ("chat_template.json", "tokenizer_config.json"):
        with contextlib.suppress(BadInput):
            template = read_object(directory / name).get("chat_template")
            named = template if isinstance(template, list) else [{"template": template}]
            found += [str(item.get("template") or "") for item in named if isinstance(item, dict)]
    return "\n".join(found).strip()


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, which neither cuts nor fills up what it encodes, nor draws lots on the way.

    Truncation, padding and the dropout of merges are settings of the training run that saved the file; transformers
    switches the first two off as well where it is not asked for them. Tokens that other files have and `tokenizer.json`
    has not are added, as transformers does.

    Raises:
        BadInput: when there is none, it cannot be read, or it is not clear which id an added token has.
    """
    from tokenizers import AddedToken

    tokenizer = read_tokenizer_file(directory)
    added = added_tokens(directory)
    for token in added.others:
        add = tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens
        add([AddedToken(**{key: value for key, value in token.items() if key != "id"})])
    for token in (*added.stored, *added.others):
        if (found := tokenizer.token_to_id(token["content"])) != token["id"]:
            raise BadInput(
                f"{directory} says that the token {token['content']!r} has the id {token['id']}, and its tokenizer "
                f"makes it {found}: who reads the files takes other tokens than who loads them.",
                "Save the tokenizer again: `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`.",
            )
    return tokenizer


def read_tokenizer_file(directory: Path) -> Tokenizer:
    """What the library reads in `tokenizer.json` alone, without truncation, padding and dropout.

    Raises:
        BadInput: when there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
    except Exception as error:  # tokenizers raises nothing more precise
        raise BadInput(f"{path} cannot be read as a tokenizer: {error}.") from error
    return tokenizer


@frozen
class AddedTokens:
    """The added tokens of a folder, in the form of `tokenizer.json`; only those with a text and an id count.

    Attributes:
        stored: those of `tokenizer.json`.
        others: those that other files have beside them, or have otherwise, by their ids.
        unknown: what other files name as one, and the model has no id for.
    """

    stored: list[dict[str, Any]]
    others: list[dict[str, Any]]
    unknown: frozenset[str]


def added_tokens(directory: Path) -> AddedTokens:
    """The added tokens of a folder.

    `added_tokens_decoder` says ids and flags. Whatever else a checkpoint names, transformers adds behind them, in an
    order and with ids of its own, so it is asked then.
    """
    content = read_object(directory / "tokenizer.json")
    added, model = content.get("added_tokens") or [], content.get("model")
    stored = [token for token in added if isinstance(token, dict) and {"content", "id"} <= set(token)]
    tokens = {token["content"]: _added_token(token["id"], token) for token in stored}
    others = []
    for number, token in _decoded_tokens(directory):
        known = tokens.get(token["content"], {})
        made = _added_token(number, {**known, **token})
        if made != known:
            others.append(made)
        tokens[token["content"]] = made
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    pieces = vocabulary if isinstance(vocabulary, dict) else {piece for piece, *_ in vocabulary or ()}
    unknown = _named_texts(directory, pieces) - tokens.keys()
    if unknown:
        found = _named_by_transformers(directory, unknown, {*pieces, *tokens})
        others += found
        unknown -= {token["content"] for token in found}
    return AddedTokens(stored, sorted(others, key=lambda token: int(token["id"])), frozenset(unknown))


def _decoded_tokens(directory: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """What `added_tokens_decoder` in `tokenizer_config.json` says, by ids; what has no id or no text is left out."""
    decoder = optional_object(directory / "tokenizer_config.json").get("added_tokens_decoder")
    said = [
        (int(number), token)
        for number, token in (decoder.items() if isinstance(decoder, Mapping) else ())
        if isinstance(token, dict) and number.isdecimal() and _is_text(token.get("content"))
    ]
    return sorted(said, key=lambda item: item[0])


def _added_token(number: int, token: Mapping[str, Any]) -> dict[str, Any]:
    given = {"normalized": not token.get("special"), **token}  # as in the library
    return {"id": number, "content": token["content"], **{flag: bool(given.get(flag)) for flag in TOKEN_FLAGS}}


def _named_texts(directory: Path, vocabulary: Container[str]) -> set[str]:
    """The texts that transformers makes added tokens of because a file beside `tokenizer.json` names them.

    One that is named as `pad_token` or the like and that no vocabulary has is left out: it would get an id that the
    model was not trained with, and may not have, and stands in no text.
    """
    special = special_tokens(directory).items()
    named = {text for key, text in special if text in vocabulary or key not in _USUAL}
    named |= {*optional_object(directory / "added_tokens.json")}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        fields = optional_object(directory / name)
        for key in ("additional_special_tokens", "extra_special_tokens"):
            named |= {*token_texts(fields.get(key))}
    return {text for text in named if text and _is_text(text)}


def _is_text(value: object) -> bool:
    """Whether a value is a text that can be written: JSON has halves of characters, too."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _named_by_transformers(directory: Path, named: set[str], known: Collection[str]) -> list[dict[str, Any]]:
    """Of the added tokens that transformers has for a checkpoint, those that are named, and what their ids count on.

    Ids that the model does not have are left out: nothing can come of them.
    """
    tokens = _tokens_of_transformers(directory)
    size = _vocabulary_size(directory)
    wanted = [token for token in tokens if token["content"] in named and (size is None or token["id"] < size)]
    last = max((token["id"] for token in wanted if token["content"] not in known), default=-1)
    return [token for token in tokens if token in wanted or (token["id"] < last and token["content"] not in known)]


def _vocabulary_size(checkpoint: Path) -> int | None:
    """The number of ids that a model has, as its `config.json` says."""
    config = optional_object(checkpoint / "config.json")
    for fields in (config.get("text_config"), config):
        if isinstance(fields, Mapping) and isinstance(size := fields.get("vocab_size"), int):
            return size
    return None


def _tokens_of_transformers(directory: Path) -> Sequence[dict[str, Any]]:
    """The added tokens of the tokenizer that transformers makes of a checkpoint; none where it cannot.

    Which class it takes depends on `config.json`, which the tokenizer of a bundle has not: engines go by its files.
    """
    if not (directory / "config.json").is_file():
        return ()
    files = [path for path in sorted(directory.glob("*.json")) if path.is_file()]
    stamps = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return _loaded_tokens(str(directory.resolve()), stamps)


@functools.lru_cache(maxsize=4)
def _loaded_tokens(directory: str, _stamps: object) -> Sequence[dict[str, Any]]:
    try:
        with quiet_transformers():
            from transformers import AutoTokenizer

            made = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            tokens = made.added_tokens_decoder
    except Exception:  # noqa: BLE001  # it raises whatever a class of tokenizers does
        return ()
    fields = ("content", *TOKEN_FLAGS)
    return [
        _added_token(number, {field: getattr(token, field) for field in fields}) for number, token in tokens.items()
    ]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a prompt: of its text and nothing else.

    A chat template renders every special token that a chat needs, so a post-processor may add none, as in
    `apply_chat_template` of transformers. Plain text is taken the same way.
    """
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return tokens


def token_text(tokenizer: Tokenizer, token: int) -> str | None:
    """The text of one token, its name in the vocabulary where it is but a part of a character; None for no token."""
    name: str | None = tokenizer.id_to_token(token) if token >= 0 else None
    if name is None:
        return None
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    return name if not text or "\N{REPLACEMENT CHARACTER}" in text else text


def tokenizer_class(config: Mapping[str, Any]) -> str:
    """The class in a `tokenizer_config.json`, which engines look up without the suffix of the fast ones."""
    return str(config.get("tokenizer_class", "")).removesuffix("Fast")


def class_for_engines(directory: Path, classes: Mapping[str, str]) -> str | None:
    """The name by which engines know the class of a tokenizer; None for a class that they do not know.

    Where `tokenizer_config.json` names none, `config.json` may, as in transformers. A byte-pair encoding without any
    is taken as its `tokenizer.json` describes it.

    Args:
        directory: folder of the tokenizer.
        classes: see `Plugins.tokenizer_classes`.
    """
    config = read_object(directory / "tokenizer_config.json")
    if config.get("tokenizer_class"):
        return classes.get(tokenizer_class(config))
    named = classes.get(tokenizer_class(optional_object(directory / "config.json")))
    if named is not None:
        return named
    model = read_object(directory / "tokenizer.json").get("model")
    is_bpe = isinstance(model, dict) and (model.get("type") == "BPE" or "merges" in model)
    return classes.get(_ANY_READER) if is_bpe else None


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens
# ---------------------------------------------------------------------------------------------------------------------


def token_texts(value: object) -> list[str]:
    """The texts in a field that names tokens: a text, an object with `content`, or a list of such; none of the rest."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, Mapping):
        return token_texts(value.get("content")) if isinstance(value.get("content"), str) else []
    return [text for item in value for text in token_texts(item)] if isinstance(value, list) else []


def special_tokens(directory: Path) -> dict[str, str]:
    """The named special tokens, which transformers hands to a chat template as `eos_token` and so on."""
    config = read_object(directory / "tokenizer_config.json")
    named = dict(config)
    if "added_tokens_decoder" not in config:  # with it, transformers does not read the older file
        named |= optional_object(directory / "special_tokens_map.json")
    extra = config.get("extra_special_tokens")
    found = {key: token_texts(value) for key, value in named.items() if key.endswith("_token")}
    found |= {key: token_texts(value) for key, value in (extra.items() if isinstance(extra, Mapping) else ())}
    return {key: texts[0] for key, texts in found.items() if texts}


def tokens_engines_know(directory: Path) -> set[str]:
    """The special tokens that engines read from `tokenizer_config.json`: they end turns, and are cut from text."""
    config = read_object(directory / "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder")
    added = decoder.values() if isinstance(decoder, Mapping) else ()
    special = [item for item in added if isinstance(item, Mapping) and item.get("special")]
    return {
        *token_texts(config.get("eos_token")),
        *token_texts(config.get("additional_special_tokens")),
        *token_texts(special),
    }


def optional_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that need not be there; empty where it is not, or cannot be read."""
    try:
        return read_object(path) if path.is_file() else {}
    except BadInput:
        return {}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Import and run transformers without its progress bars and its advice on kernels that are not installed."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    noisy = [logging.getLogger(name) for name in ("torchao", "transformers", "torch.utils._pytree")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.utils import logging as transformers_logging

            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
