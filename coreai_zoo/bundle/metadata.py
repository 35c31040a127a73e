"""`metadata.json`, as Apple's loader parses it and published bundles carry it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METADATA_VERSION = "0.2"
CHUNKS = ("prefill_chunk_size", "prefill_chunk_threshold")


def metadata(
    *,
    name: str,
    asset: str,
    decode: str,
    vocab_size: int,
    max_context_length: int,
    query_length: int | None,
    hf_id: str | None,
    hf_revision: str | None,
    compression: str,
    states: Mapping[str, str],
    date: str,
    user_data: Mapping[str, str],
) -> dict[str, Any]:
    """The content of `metadata.json`.

    `decode` is the function that decodes: engines find it as the role `main`, and every other one by its name. Where it
    takes a fixed number of tokens, `query_length`, engines are told to send a prompt in chunks of that: they would send
    2,048 at once otherwise (apple/coreai-models since #240; earlier ones go by the signature).
    """
    chunks = () if query_length is None else CHUNKS
    source = {"model_definition": "torch", "hf_model_id": hf_id, "hf_revision": hf_revision}
    return {
        "metadata_version": METADATA_VERSION,
        "kind": "llm",
        "name": name,
        "assets": {"main": asset},
        "language": {
            "tokenizer": hf_id or name,
            "vocab_size": vocab_size,
            "max_context_length": max_context_length,
            "embedded_tokenizer": True,
            **dict.fromkeys(chunks, query_length),
            "function_map": {"main": [decode]},
            "states": dict(states),
        },
        "source": {key: value for key, value in source.items() if value is not None},
        "compression": compression,
        "compilation": {"date": date, "targets": []},
        "user_data": dict(user_data),
    }
