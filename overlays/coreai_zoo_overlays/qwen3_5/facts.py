"""Facts: what an entry states of a model and a card prints, from a config and back to one.

transformers has no such thing: its configuration is read from a checkpoint. An entry states the sizes that matter to a
reader, so that `zoo plan` answers before anything is fetched and a build refuses a checkpoint with other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from coreai_zoo.errors import BadInput, listing

from .config import Qwen35Config
from .dense_or_moe import kind_of
from .weights import LM_HEAD, parameters

# Fact to the field of config.json that holds it. Layer counts, rotary_dim and parameters are derived, and the kind of
# feed-forward brings its own.
_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "max_context_length": "max_position_embeddings",
    "tied_head": "tie_word_embeddings",
    "attention_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "gdn_key_heads": "linear_num_key_heads",
    "gdn_value_heads": "linear_num_value_heads",
    "gdn_key_head_dim": "linear_key_head_dim",
    "gdn_value_head_dim": "linear_value_head_dim",
    "conv_kernel": "linear_conv_kernel_dim",
}
_OPTIONAL_FACTS = {"max_context_length"}


def facts_of(config: Qwen35Config) -> dict[str, Any]:
    """The facts of a config."""
    feed_forward = config.feed_forward
    return {
        "ffn": feed_forward.name,
        **{fact: getattr(config, field) for fact, field in _FIELDS.items()},
        **{fact: getattr(feed_forward, size) for fact, size in feed_forward.facts.items()},
        "linear_attention_layers": config.linear_layers,
        "full_attention_layers": config.full_layers,
        "rotary_dim": config.rotary_dim,
        "parameters": _stored_parameters(config),
    }


def _stored_parameters(config: Qwen35Config) -> int:
    """Number of values in a checkpoint's text model, where a tied head is the embedding table and stored once."""
    table = parameters(config, "float32")
    if config.tie_word_embeddings:
        del table[LM_HEAD]
    return sum(math.prod(parameter.shape) for parameter in table.values())


def config_of_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A wrapped `config.json` of the model that `facts` describes; full attention comes at regular intervals.

    Raises:
        BadInput: naming the facts that are not known.
        ValueError: naming the facts that are no sizes.
    """
    kind = kind_of(facts.get("ffn"))
    fields = {**_FIELDS, **kind.facts}
    needed = [*fields, "full_attention_layers", "rotary_dim"]
    unknown = [fact for fact in needed if fact not in facts and fact not in _OPTIONAL_FACTS]
    if unknown:
        raise BadInput(f"No config follows from these facts: {listing(unknown)} not known.")
    bad = [
        f"{fact} is {facts[fact]!r}, not {'true or false' if fact == 'tied_head' else 'a positive integer'}"
        for fact in needed
        if fact in facts and not _fits(fact, facts[fact])
    ]
    if bad:
        raise ValueError(listing(bad, 40))
    wrapper, flat = kind.model_types
    text = {field: facts[fact] for fact, field in fields.items() if fact in facts}
    text |= {
        "model_type": flat,
        "full_attention_interval": facts["layers"] // facts["full_attention_layers"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": facts["rotary_dim"] / facts["head_dim"],
            # Three planes that share the rotated pairs; equal for text, so only their sum matters.
            "mrope_section": _thirds(facts["rotary_dim"] // 2),
            "mrope_interleaved": True,
        },
    }
    return {"model_type": wrapper, "text_config": text, "tie_word_embeddings": facts["tied_head"]}


def _fits(fact: str, value: object) -> bool:
    """Whether a value can be that of a fact: they are sizes and counts, and whether the head is tied."""
    if fact == "tied_head":
        return isinstance(value, bool)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _thirds(pairs: int) -> list[int]:
    return [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3]
