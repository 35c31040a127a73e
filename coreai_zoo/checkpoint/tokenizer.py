"""A checkpoint's tokenizer: which files it has, whether an engine can use it, how a chat is rendered."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coreai_zoo.checkpoint.folder import member
from coreai_zoo.checkpoint.pointers import refuse_pointer_at
from coreai_zoo.errors import BadInput, listing
from coreai_zoo.json_files import read_object, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_TOKENIZER_FILES = {
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "chat_template.jinja": False,
    "chat_template.json": False,
    "special_tokens_map.json": False,
    "added_tokens.json": False,
    "vocab.json": False,
    "merges.txt": False,
}


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
        raise BadInput(f"{checkpoint} has no {' and no '.join(missing)}.", "A bundle needs the checkpoint's tokenizer.")
    for path in tokenizer_files(checkpoint):
        refuse_pointer_at(path)
    config = read_object(checkpoint / "tokenizer_config.json")
    if tokenizer_class(config) not in classes:
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
    """The tokenizer in `directory`.

    Raises:
        BadInput: when there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise BadInput(f"{path} cannot be read as a tokenizer: {error}.") from error


def token_text(tokenizer: Tokenizer, token: int) -> str | None:
    """The text of one token, its name in the vocabulary where it is but a part of a character; None for no token."""
    name: str | None = tokenizer.id_to_token(token) if token >= 0 else None
    if name is None:
        return None
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    return name if not text or "\N{REPLACEMENT CHARACTER}" in text else text


def copy_tokenizer(checkpoint: Path, destination: Path, classes: Mapping[str, str]) -> None:
    """Copy the checkpoint's tokenizer files to `destination`, its class under the name by which engines know it."""
    destination.mkdir()
    for path in tokenizer_files(checkpoint):
        shutil.copyfile(path, destination / path.name)
    config = read_object(destination / "tokenizer_config.json")
    name = tokenizer_class(config)
    if classes[name] != name:
        write_json(destination / "tokenizer_config.json", {**config, "tokenizer_class": classes[name]})


def tokenizer_class(config: Mapping[str, Any]) -> str:
    """The class in a `tokenizer_config.json`, which engines look up without the suffix of the fast ones."""
    return str(config.get("tokenizer_class", "")).removesuffix("Fast")


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
