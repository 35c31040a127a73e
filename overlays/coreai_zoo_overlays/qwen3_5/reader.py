"""Fields of a `config.json`, each checked as it is read.

Values are those that transformers' configuration classes end up with, whatever the spelling; a null is refused where
they refuse it. Differs from them in that a field is never taken as it comes: a wrong size would show as an error inside
a layer, a variant that is not implemented as text that is almost right. Complaints are collected, so that all of them
are reported at once, before anything is built.
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
        if name not in self.fields and default is None:
            self.problems.append(f"{name} is missing")
        elif not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            self.problems.append(f"{name} is {shown(value)}, not a positive integer")
        else:
            return value
        return 1

    def number(
        self, name: str, default: float, fields: Mapping[str, Any] | None = None, largest: float = sys.float_info.max
    ) -> float:
        """A positive number, at most `largest`."""
        value = (self.fields if fields is None else fields).get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= largest:
            limit = "" if largest == sys.float_info.max else f" of at most {largest:g}"
            self.problems.append(f"{name} is {shown(value)}, not a positive number{limit}")
            return default
        return float(value)

    def divides(self, small: str, large: str) -> None:
        """Require that one field is a multiple of another; sizes that are no sizes have been complained about."""
        small_size, large_size = self.fields.get(small), self.fields.get(large)
        if isinstance(small_size, int) and isinstance(large_size, int) and small_size > 0 and large_size % small_size:
            self.problems.append(f"{large} ({large_size}) is not a multiple of {small} ({small_size})")

    def only(self, name: str, allowed: Any) -> None:
        """Refuse a variant that the overlay does not implement."""
        if self.fields.get(name, allowed) != allowed:
            self.problems.append(f"{name} is {shown(self.fields[name])}; only {allowed!r} is implemented")


def shown(value: object) -> str:
    """A value as a complaint quotes it."""
    return "null" if value is None else reprlib.repr(value)


def text_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The text config, with the tie flag that counts; in a multimodal wrapper it is under `text_config`.

    Raises:
        BadInput: when it is not there.
    """
    if str(hf_config.get("model_type")).endswith("_text"):
        return {"tie_word_embeddings": False, **hf_config}
    text, model_type = hf_config.get("text_config"), hf_config.get("model_type")
    if not isinstance(text, Mapping):
        raise BadInput(
            f"text_config in config.json is {'not an object' if 'text_config' in hf_config else 'missing'}, and "
            f"model_type {model_type!r} is that of a wrapper: transformers would take default sizes.",
            f'If the text model\'s fields stand beside model_type, write "model_type": "{model_type}_text" there.',
        )
    for name in ("rope_scaling", "rope_parameters"):
        beside = hf_config.get(name)
        if isinstance(beside, Mapping) and beside.get("rope_type", beside.get("type", "default")) != "default":
            raise BadInput(
                f"{name} in config.json stands beside text_config, where no text model reads it.",
                "Move it into text_config if positions are to be scaled, or take it out.",
            )
    # The head is the wrapper's and goes by its flag, unless the text model is to be taken out of the wrapper.
    taken_out = "ForCausalLM" in str(hf_config.get("architectures"))
    flags = [
        fields.get("tie_word_embeddings", False) for fields in ((text, hf_config) if taken_out else (hf_config, text))
    ]
    tied = next((flag for flag in flags if not isinstance(flag, bool)), flags[0])  # a bad one is complained about
    return {**text, "tie_word_embeddings": tied}
