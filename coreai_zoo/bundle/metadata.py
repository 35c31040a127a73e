"""`metadata.json`, as Apple's loader parses it and published bundles carry it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import cattrs
from attrs import frozen

from coreai_zoo.engine import CHUNKS, PREFILL
from coreai_zoo.signature import TraceSpec

METADATA_VERSION = "0.2"
MODEL_DEFINITION = "torch"
"""What the model was defined in before it was converted; Apple's exporter writes the same."""

# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def metadata(
    *,
    name: str,
    asset: str,
    language: Mapping[str, Any],
    hf_id: str | None,
    hf_revision: str | None,
    compression: str,
    date: str,
    user_data: Mapping[str, str],
) -> dict[str, Any]:
    """The content of `metadata.json`; `language` is what `language_block` gives."""
    source = {"model_definition": MODEL_DEFINITION, "hf_model_id": hf_id, "hf_revision": hf_revision}
    return {
        "metadata_version": METADATA_VERSION,
        "kind": "llm",
        "name": name,
        "assets": {"main": asset},
        "language": {"tokenizer": hf_id or name, **language},
        "source": {key: value for key, value in source.items() if value is not None},
        "compression": compression,
        "compilation": {"date": date, "targets": []},
        "user_data": dict(user_data),
    }


def language_block(functions: Mapping[str, TraceSpec], vocab_size: int, max_context_length: int) -> dict[str, Any]:
    """The block `language`, but for the name of the tokenizer.

    Args:
        functions: the first one decodes: engines find it as the role `main`, and every other one by its name.
        vocab_size: width of the logits.
        max_context_length: positions that the bundle allows.
    """
    decode, signature = next(iter(functions.items()))
    return {
        "vocab_size": vocab_size,
        "max_context_length": max_context_length,
        "embedded_tokenizer": True,
        **chunk_keys(functions, max_context_length),
        "function_map": {"main": [decode]},
        "states": {state.name: state.kind for state in signature.states},
    }


def chunk_keys(functions: Mapping[str, TraceSpec], max_context_length: int) -> dict[str, int]:
    """What tells engines in which chunks to send a prompt, where the function that reads it has a limit.

    They would send 2,048 tokens at once otherwise (apple/coreai-models since #240; earlier ones go by the signature).
    """
    most_tokens = (functions.get(PREFILL) or next(iter(functions.values()))).most_tokens
    return dict.fromkeys(CHUNKS, most_tokens) if most_tokens < max_context_length else {}


# ---------------------------------------------------------------------------------------------------------------------
# Reading, as Apple's loader does: a field of another type than here throws there
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class _Language:
    tokenizer: str
    vocab_size: int
    max_context_length: int
    embedded_tokenizer: bool | None = None
    function_map: dict[str, list[str]] | None = None
    states: dict[str, Literal["kv_cache", "sliding_cache", "fixed"]] | None = None
    prefill_chunk_size: int | None = None
    prefill_chunk_threshold: int | None = None


@frozen
class _Metadata:
    metadata_version: str
    kind: str
    name: str
    assets: dict[str, str]
    language: _Language
    user_data: dict[str, str] | None = None


def unreadable(data: Mapping[str, Any]) -> list[str]:
    """Every field of a `metadata.json` that Apple's loader would not take, a phrase each with its path."""
    try:
        _CONVERTER.structure(data, _Metadata)
    except cattrs.BaseValidationError as error:
        return cattrs.transform_error(error, path="metadata.json", format_exception=_phrase)
    return []


def leaves(data: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """The leaves of nested objects by their paths, such as `language.vocab_size`; an empty object is a leaf."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{key}{separator}{path}": leaf for path, leaf in leaves(value, separator).items()}
        else:
            found[key] = value
    return found


def _phrase(error: BaseException, _type: object) -> str:
    return "a required field is missing" if isinstance(error, KeyError) else str(error)


def _strict(value: object, kind: type) -> object:
    """The value, if it is of just this type: a boolean is no number, and a number is no text."""
    if type(value) is not kind:
        raise ValueError(f"{value!r} is no {_KINDS[kind]}")
    return value


_KINDS = {str: "text", int: "integer", bool: "boolean"}
_CONVERTER = cattrs.Converter()
for _kind in _KINDS:
    _CONVERTER.register_structure_hook(_kind, _strict)
