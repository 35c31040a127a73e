"""Fields of a `config.json`, each checked as it is read.

Differs from transformers' configuration classes in that a field is never taken as it comes: a wrong size would show as
an error inside a layer, a variant that is not implemented as text that is almost right. Complaints are collected, so
that all of them are reported at once, before anything is built.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from coreai_zoo.errors import BadInput


class Reader:
    """Reads typed fields out of a config and collects every complaint, so that they are reported together."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.problems: list[str] = []

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; `default` where the config is silent, required if there is none."""
        value = self.fields.get(name, default)
        value = default if value is None else value
        if value is None:
            self.problems.append(f"{name} is missing")
        elif not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            self.problems.append(f"{name} is {reprlib.repr(value)}, not a positive integer")
        else:
            return value
        return 1

    def number(
        self, name: str, default: float, fields: Mapping[str, Any] | None = None, largest: float = sys.float_info.max
    ) -> float:
        """A positive number, at most `largest`."""
        value = (self.fields if fields is None else fields).get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= largest:
            limit = "" if largest == sys.float_info.max else f" of at most {largest:g}"
            self.problems.append(f"{name} is {reprlib.repr(value)}, not a positive number{limit}")
            return default
        return float(value)

    def divides(self, small: str, large: str) -> None:
        """Require that one field is a multiple of another; sizes that are no sizes have been complained about."""
        small_size, large_size = self.fields.get(small), self.fields.get(large)
        if isinstance(small_size, int) and isinstance(large_size, int) and small_size > 0 and large_size % small_size:
            self.problems.append(f"{large} ({large_size}) is not a multiple of {small} ({small_size})")

    def only(self, name: str, allowed: Any) -> None:
        """Refuse a variant that the overlay does not implement."""
        if self.fields.get(name) not in (allowed, None):
            self.problems.append(f"{name} is {reprlib.repr(self.fields[name])}; only {allowed!r} is implemented")


def text_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The text config, whether wrapped (`text_config`) or flat."""
    text = hf_config.get("text_config")
    if text is None and ("text_config" not in hf_config or "hidden_size" in hf_config):
        text = hf_config
    if not isinstance(text, Mapping):
        raise BadInput("text_config in config.json is not an object.")
    # Released wrappers carry the tie flag at the top; a text config's own wins. Null is silence.
    tied = text.get("tie_word_embeddings")
    tied = hf_config.get("tie_word_embeddings") if tied is None else tied
    return {**text, "tie_word_embeddings": False if tied is None else tied}
