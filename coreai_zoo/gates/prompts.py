"""The prompts of a gate: the built-in set, their tokens, and whether the oracle is sure enough to judge by one.

A prompt can only show a flip where the oracle is sure of itself. One with ties at more than one position in eight says
little, however long it is, and is refused before the candidate runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from attrs import evolve, frozen

from coreai_zoo.bounds import CONFIDENT_MARGIN
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.generate import chat_text
from coreai_zoo.checkpoint.end_of_turn import end_tokens
from coreai_zoo.checkpoint.tokenizer import encode, load_tokenizer
from coreai_zoo.errors import BadInput, did_you_mean
from coreai_zoo.gates.corpus import BUILTIN, WINDOW, read_corpus
from coreai_zoo.json_files import read_text

DEFAULT_POSITIONS = 64
"""Positions of a prompt that has as many."""

LONG_POSITIONS = 512
"""Positions of a long prompt: errors of a recurrent state compound with context."""

FEWEST_POSITIONS = 24
"""Positions that a built-in prompt has in any tokenizer that reads all of it; one with fewer shows nothing."""

WEAK_FRACTION = 1 / 8
"""A prompt is weak when oracle margins are below `CONFIDENT_MARGIN` at more than this part of its positions."""

CORPUS_WINDOWS = 6
"""Windows of the built-in corpus by which a small bundle is judged as well: 3,072 positions, which, without a flip,
exclude a rate of a thousandth."""

UNNAMED = "prompt"
"""The name of a prompt that came without one."""

ANCHOR = "code"
"""The built-in prompt that must be strong: otherwise a run of the default set says nothing."""


@frozen
class Prompt:
    """A prompt as text or as the turns of a chat.

    Attributes:
        name: its name in the report.
        text: what is tokenized; None for a chat.
        turns: of a chat, (role, content) pairs that the bundle's chat template renders.
        positions: how many tokens at most; None for all.
        minimum: fewer tokens than this are an error.
        required: whether a weak prompt ends the gate; otherwise it is only left out.
        running_text: whether it is a piece of running text, on which a routed model may flip as `rule.flips_allowed`
            says; on any other prompt no model may.
    """

    name: str
    text: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    positions: int | None = DEFAULT_POSITIONS
    minimum: int = 1
    required: bool = True
    running_text: bool = False


@frozen
class TokenizedPrompt:
    """A prompt as the bundle's own tokenizer reads it.

    Attributes:
        prompt: the prompt.
        tokens: its P token ids.
        pieces: each token as text.
        stop: id of the end-of-turn token, for a chat; None otherwise, or where the checkpoint names none.
        whole: whether these are all of its tokens.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    stop: int | None = None
    whole: bool = True

    @property
    def ends_turns(self) -> bool:
        """Whether a turn ends in it: whether it is a chat, and not cut before that."""
        return bool(self.prompt.turns) and (self.whole or self.stop is None or self.stop in self.tokens[1:])

    @property
    def name(self) -> str:
        """Name of the prompt."""
        return self.prompt.name

    @property
    def long(self) -> bool:
        """Whether it is too long for a runtime that takes one token at a time on a slow machine."""
        return len(self.tokens) >= LONG_POSITIONS


@frozen
class Strength:
    """The oracle's margins along a prompt: how sure it is of itself.

    Attributes:
        positions: number of positions.
        ties: number of those with an oracle margin below `CONFIDENT_MARGIN`.
        median_margin: the median oracle margin, in logits.
    """

    positions: int
    ties: int
    median_margin: float

    @property
    def weak(self) -> bool:
        """Whether there are too many ties to judge by the prompt."""
        return self.ties > WEAK_FRACTION * self.positions

    def __str__(self) -> str:
        return (
            f"{self.ties} of {self.positions} oracle margins are below {CONFIDENT_MARGIN} (at most "
            f"{int(WEAK_FRACTION * self.positions)} may be; median margin {self.median_margin:.2f})"
        )


def strength(oracle_logits: np.ndarray[Any, Any]) -> Strength:
    """The strength of a prompt, from the oracle's logits [P, V]."""
    top = np.partition(oracle_logits, -2, axis=-1)[:, -2:].astype(np.float64)
    margins = top[:, 1] - top[:, 0]
    return Strength(len(margins), int((margins < CONFIDENT_MARGIN).sum()), float(np.median(margins)))


# ---------------------------------------------------------------------------------------------------------------------
# The built-in set
# ---------------------------------------------------------------------------------------------------------------------

_CODE = '''def main(argv=None):
    """Read the command line and run the program."""
    parser = argparse.ArgumentParser(description="Print the lines of a file.")
    parser.add_argument("name", help="the name of the file to read")
    args = parser.parse_args(argv)
    with open(args.name) as f:
        for line in f:
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''

_TEXT = (
    "The following sections describe the standard types that are built into the interpreter. Some operations are "
    "supported by several object types; in particular, all objects can be compared for equality, tested for truth "
    "value, and converted to a string."
)

_DIGITS = "".join(f"7 x {factor} = {7 * factor}\n" for factor in range(1, 11))

_SPANISH = (
    "El perro está en la casa y los niños juegan en el jardín. La casa es grande y el sol brilla. Mañana vamos a la "
    "playa con la familia."
)

_CHAT = (
    ("user", "What is 12 + 30?"),
    ("assistant", "42"),
    ("user", "What is argparse.ArgumentParser?"),
    ("assistant", "Object for parsing command line strings into Python objects."),
)

_LONG = '''"""Count the words of text files and print the most frequent ones.

The module can be used from the command line or imported. The class Counter holds the
counts of one or more files; the function main reads the command line.
"""

import argparse
import os
import sys


class Error(Exception):
    """Base class for the exceptions of this module."""


class FileError(Error):
    """Raised when a file cannot be read."""

    def __init__(self, name, message):
        Exception.__init__(self, message)
        self.name = name
        self.message = message

    def __str__(self):
        return "%s: %s" % (self.name, self.message)


class Counter:
    """Count the words of files.

    If the optional argument ignore_case is true, words that differ only in the case of
    their letters are the same word.
    """

    def __init__(self, ignore_case=False):
        self.ignore_case = ignore_case
        self.counts = {}
        self.names = []

    def add(self, word, count=1):
        """Add a word to the counts."""
        if not isinstance(word, str):
            raise TypeError("word must be a string, not %r" % type(word))
        if self.ignore_case:
            word = word.lower()
        self.counts[word] = self.counts.get(word, 0) + count

    def read(self, name):
        """Read the file with the given name and add all of its words."""
        if not os.path.exists(name):
            raise FileError(name, "the file does not exist")
        with open(name, encoding="utf-8") as f:
            for line in f:
                for word in line.split():
                    self.add(word)
        self.names.append(name)

    def get(self, word, default=0):
        """Return the count of a word, or default if there is no such word."""
        return self.counts.get(word, default)

    def keys(self):
        """Return a list of all words."""
        return list(self.counts.keys())

    def most_common(self, n=None):
        """Return a list of the n most frequent words and their counts.

        If n is None, all words are returned.
        """
        items = sorted(self.counts.items(), key=lambda item: item[1], reverse=True)
        if n is None:
            return items
        return items[:n]

    def __len__(self):
        return len(self.counts)

    def __contains__(self, word):
        return word in self.counts

    def __iter__(self):
        return iter(self.counts)

    def __repr__(self):
        return "%s(%r)" % (self.__class__.__name__, self.counts)


def main(argv=None):
    """Read the command line and run the program."""
    parser = argparse.ArgumentParser(description="Count the words of files.")
    parser.add_argument("names", nargs="*", help="the names of the files to read")
    parser.add_argument("-n", type=int, default=10, help="the number of words to print")
    parser.add_argument("-i", "--ignore-case", action="store_true", help="ignore case")
    args = parser.parse_args(argv)
    counter = Counter(args.ignore_case)
    for name in args.names:
        try:
            counter.read(name)
        except FileError as e:
            print(e, file=sys.stderr)
            return 1
    for word, count in counter.most_common(args.n):
        print("%6d %s" % (count, word))
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''

BUILT_IN: Mapping[str, Prompt] = MappingProxyType(
    {
        prompt.name: prompt
        for prompt in (
            Prompt(ANCHOR, _CODE),
            Prompt("text", _TEXT),
            Prompt("digits", _DIGITS),
            Prompt("spanish", _SPANISH),
            Prompt("chat", turns=_CHAT, positions=2 * DEFAULT_POSITIONS),
            Prompt("long", _LONG, positions=LONG_POSITIONS, minimum=LONG_POSITIONS, running_text=True),
        )
    }
)
"""The built-in prompts by name, in the order in which they run."""


def default_prompts(
    bundle: Bundle, checkpoint: Path, positions: int | None = None, windows: int = 0
) -> tuple[list[TokenizedPrompt], list[str]]:
    """The built-in prompts that a bundle can take, and why others are left out; only the anchor must be strong.

    Args:
        bundle: what is judged; a long prompt needs the context, a chat needs a chat template that takes it.
        checkpoint: the folder of its checkpoint.
        positions: the length to which all are cut, and that all must have; None for their own.
        windows: how many windows of the built-in corpus follow; a context that holds none leaves them out.

    Raises:
        BadInput: when the anchor cannot be taken.
    """
    limit = min(bundle.max_context, positions or bundle.max_context)
    taken, left_out = [], []
    for prompt in BUILT_IN.values():
        if prompt.minimum > limit:
            left_out.append(
                f"prompt {prompt.name!r} is left out: it is {prompt.minimum} positions, of which {limit} fit"
            )
            continue
        required = prompt.name == ANCHOR
        asked = at_least(prompt, bundle) if positions is None else cut(prompt, positions)
        try:
            taken.append(tokenize(bundle, evolve(asked, required=required), checkpoint))
        except BadInput as error:
            if required:
                raise
            left_out.append(f"prompt {prompt.name!r} is left out: {error.message}")
    if windows:
        try:
            taken += _windows(bundle, windows)
        except BadInput as error:
            left_out.append(f"windows of the built-in corpus are left out: {error.message}")
    return taken, left_out


def _windows(bundle: Bundle, count: int) -> list[TokenizedPrompt]:
    """The first windows of the built-in corpus, as many as it has of `count`.

    Raises:
        BadInput: when the corpus has none of this length, or the bundle's context does not hold one.
    """
    if bundle.max_context < WINDOW:
        raise BadInput(f"one is {WINDOW} positions, of which {bundle.max_context} fit.")
    tokenizer, corpus = load_tokenizer(bundle.tokenizer), read_corpus(bundle, BUILTIN)
    return [
        TokenizedPrompt(
            Prompt(f"corpus-{number}", positions=WINDOW, minimum=WINDOW, required=False, running_text=True),
            tokens,
            _pieces(tokenizer, tokens),
        )
        for number, tokens in enumerate(corpus.windows[:count], 1)
    ]


def at_least(prompt: Prompt, bundle: Bundle) -> Prompt:
    """A built-in prompt that must have as many positions as a prompt needs to show anything."""
    return evolve(prompt, minimum=max(prompt.minimum, min(FEWEST_POSITIONS, bundle.max_context)))


def cut(prompt: Prompt, positions: int) -> Prompt:
    """The prompt cut to a number of positions, which it must have."""
    return evolve(prompt, positions=positions, minimum=positions)


def named_prompts(names: Sequence[str]) -> list[Prompt]:
    """Built-in prompts by name, each of which must be strong.

    Raises:
        BadInput: for an unknown name, with the nearest one.
    """
    unknown = [name for name in names if name not in BUILT_IN]
    if unknown:
        raise BadInput(f"There is no built-in prompt {unknown[0]!r}.", did_you_mean(unknown[0], BUILT_IN))
    return [BUILT_IN[name] for name in dict.fromkeys(names)]


def file_prompt(path: Path) -> Prompt:
    """A prompt that is the whole text of a file.

    Raises:
        BadInput: when it cannot be read as UTF-8.
    """
    text = read_text(path, "The prompt").replace("\r\n", "\n").replace("\r", "\n")
    return Prompt(path.name, text, positions=None)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def tokenize(bundle: Bundle, prompt: Prompt, checkpoint: Path) -> TokenizedPrompt:
    """A prompt in the bundle's own tokens.

    Args:
        bundle: the bundle.
        prompt: the prompt.
        checkpoint: the folder of its checkpoint, which says what ends a turn: a bundle could name another token, and be
            asked for that one.

    Raises:
        BadInput: when it is empty, shorter than it has to be, or longer than the bundle's context, when the chat
            template does not take it, or when the tokenizer has ids that the model has no logits for.
    """
    tokenizer = load_tokenizer(bundle.tokenizer)
    _require_vocabulary(bundle, tokenizer)
    text = _rendered(bundle, prompt.turns) if prompt.text is None else prompt.text
    tokens = encode(tokenizer, text)
    if not tokens:
        raise BadInput("The prompt is empty.", 'Give one with -p "...", or leave it out for the built-in ones.')
    if len(tokens) < prompt.minimum:
        name = "" if prompt.name == UNNAMED else f" {prompt.name!r}"
        asked = "were asked for" if prompt.minimum == prompt.positions else "are the fewest to judge by"
        raise BadInput(
            f"The prompt{name} is {len(tokens)} tokens, and {prompt.minimum} positions {asked}.",
            "Give a longer prompt, or fewer --positions.",
        )
    if prompt.minimum > bundle.max_context or (prompt.positions is None and len(tokens) > bundle.max_context):
        wanted = prompt.minimum if prompt.positions is not None else len(tokens)
        raise BadInput(
            f"{wanted} positions are more than this bundle's context of {bundle.max_context}.",
            "Give a shorter prompt, or fewer --positions.",
        )
    taken = tokens[: min(prompt.positions or len(tokens), bundle.max_context)]
    stop = _end_of_turn(checkpoint) if prompt.turns else None
    return TokenizedPrompt(prompt, tuple(taken), _pieces(tokenizer, taken), stop, whole=len(taken) == len(tokens))


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, ...]:
    return tuple(tokenizer.decode([token], skip_special_tokens=False) for token in tokens)


def _rendered(bundle: Bundle, turns: Sequence[tuple[str, str]]) -> str:
    try:
        return chat_text(bundle, turns)
    except BadInput as error:
        others = ",".join(name for name, prompt in BUILT_IN.items() if not prompt.turns)
        raise BadInput(error.message, f"Choose other prompts, as --prompts {others}.") from error


def _end_of_turn(checkpoint: Path) -> int | None:
    """Id of the token that ends the turns of a chat; None where nothing in the checkpoint names one."""
    ends = end_tokens(checkpoint).tokens
    return ends[0].id if ends else None


def _require_vocabulary(bundle: Bundle, tokenizer: Any) -> None:
    width = int(bundle.signature.outputs[0].shape[-1])
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= width:
        raise BadInput(
            f"The tokenizer of {bundle.directory.name} has token ids up to {highest}, but its model has logits for "
            f"{width} tokens.",
            "It is not this model's tokenizer: build the bundle again.",
        )
