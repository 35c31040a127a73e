"""A running text, cut into windows of tokens: the built-in one, or a file.

The windows are those of `llama-perplexity --kl-divergence` of llama.cpp (tools/perplexity/perplexity.cpp of
ggml-org/llama.cpp, and the README beside it): 512 tokens, one after the other, each run by itself from an empty state;
the figures are of its second half, where a model has context to go by, without the last token, which has no successor
to predict. So 255 positions of 512 count. llama.cpp puts a beginning-of-text token in the place of a window's first one
where a tokenizer has such; here nothing is added to a text, as to no prompt.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from attrs import frozen

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.checkpoint.tokenizer import encode, load_tokenizer
from coreai_zoo.errors import BadInput, near_names
from coreai_zoo.json_files import read_text

BUILTIN = "builtin"
"""The name of the text that ships: of the Python language reference and standard library, see corpus_text/ORIGIN.md."""

WINDOW = 512
"""Tokens of a window, where the bundle's context is not shorter."""

COUNTED = 3072
"""Positions that count unless others are asked for: without a flip, they exclude a rate of a thousandth."""

BUILTIN_TEXT = Path(__file__).parent / "corpus_text" / "builtin.txt"


@frozen
class Corpus:
    """The windows of a text.

    Attributes:
        name: of the text.
        sha256: of its bytes.
        tokens: how many it has in all.
        windows: W windows of P token ids.
    """

    name: str
    sha256: str
    tokens: int
    windows: tuple[tuple[int, ...], ...]

    @property
    def window(self) -> int:
        """P: tokens of one window."""
        return len(self.windows[0])

    @property
    def positions(self) -> int:
        """Positions of all windows."""
        return self.window * len(self.windows)

    @property
    def counted(self) -> slice:
        """The positions of a window that the figures are of."""
        return _counted(self.window)


def read_corpus(bundle: Bundle, given: str, positions: int | None = None) -> Corpus:
    """The windows of a text, in the bundle's own tokens.

    Args:
        bundle: what is measured.
        given: `builtin`, or a file.
        positions: how many positions have to count, rounded up to whole windows; None for `COUNTED`, or as many as the
            text has.

    Raises:
        BadInput: when the text cannot be read as UTF-8, or is too short.
    """
    name, content = (given, BUILTIN_TEXT) if given == BUILTIN else (Path(given).name, Path(given))
    hint = near_names(given, [BUILTIN]) or "Give a text file, or --corpus builtin."
    text = read_text(content, "The corpus", hint)
    tokens = encode(load_tokenizer(bundle.tokenizer), text)
    window = min(WINDOW, bundle.max_context)
    each = len(range(window)[_counted(window)])
    if not each:
        raise BadInput(f"No position of a window counts in a context of {bundle.max_context}, as this bundle has.")
    there = len(tokens) // window
    if not there:
        raise BadInput(
            f"The corpus {name} is {len(tokens)} tokens, and one window takes {window}.", "Give a longer text."
        )
    needed = -(-(positions or COUNTED) // each)
    if positions is not None and needed > there:
        raise BadInput(
            f"{positions} positions were asked for, and {there * each} of the corpus {name} count: of its "
            f"{len(tokens)} tokens, the second half of each of {there} windows of {window}.",
            f"Give a longer text, or --positions {there * each}.",
        )
    windows = tuple(tuple(tokens[at * window : (at + 1) * window]) for at in range(min(needed, there)))
    return Corpus(name, hashlib.sha256(text.encode()).hexdigest(), len(tokens), windows)


def _counted(window: int) -> slice:
    return slice(window // 2, max(window // 2, window - 1))
