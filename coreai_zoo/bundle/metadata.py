"""`metadata.json`, as Apple's loader parses it and published bundles carry it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

METADATA_VERSION = "0.2"


@frozen
class Description:
    """What a bundle says about itself; see `metadata`.

    Attributes:
        decode: name of the function that decodes; engines find it as the role `main`, and every other by its name.
    """

    name: str
    asset: str
    decode: str
    vocab_size: int
    max_context_length: int
    hf_id: str | None
    hf_revision: str | None
    compression: str
    states: Mapping[str, str]
    date: str
    user_data: Mapping[str, str] = field(factory=dict)


def metadata(description: Description) -> dict[str, Any]:
    """The content of `metadata.json`, as Apple's loader parses it and published bundles carry it."""
    source = {"model_definition": "torch", "hf_model_id": description.hf_id, "hf_revision": description.hf_revision}
    return {
        "metadata_version": METADATA_VERSION,
        "kind": "llm",
        "name": description.name,
        "assets": {"main": description.asset},
        "language": {
            "tokenizer": description.hf_id or description.name,
            "vocab_size": description.vocab_size,
            "max_context_length": description.max_context_length,
            "embedded_tokenizer": True,
            "function_map": {"main": [description.decode]},
            "states": dict(description.states),
        },
        "source": {key: value for key, value in source.items() if value is not None},
        "compression": description.compression,
        "compilation": {"date": description.date, "targets": []},
        "user_data": dict(description.user_data),
    }
