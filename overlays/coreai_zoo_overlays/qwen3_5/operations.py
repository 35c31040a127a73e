"""Floating-point operations of a call, beside the products with its weights: what `zoo plan` predicts prompts from.

transformers has no such thing. Products of two matrices are counted as the layers ask for them, a multiplication and an
addition each; of the delta rule token by token, which has no such product, every multiplication and addition is.

Shapes: S tokens against T positions, Hq query heads of width Dh; Hv value heads with a state Dk x Dv each; chunks of C
tokens.
"""

from __future__ import annotations

from coreai_zoo.contracts import Prefill

from .config import Qwen35Config


def operations(config: Qwen35Config, prefill: Prefill | None, tokens: int, positions: int) -> int:
    """Of `tokens` tokens, the last of `positions`, in the form of `prefill`, or token by token where that is None."""
    attention = config.full_layers * config.num_attention_heads * 4 * config.head_dim * tokens * positions
    return attention + config.linear_layers * config.linear_num_value_heads * _rule(config, prefill, tokens)


def _rule(config: Qwen35Config, prefill: Prefill | None, tokens: int) -> int:
    """Of the gated delta rule, one head of one layer."""
    if prefill is None or prefill.chunk is None or prefill.most_tokens is None:
        return tokens * _step(config)
    if prefill.chunk == 1:
        return prefill.most_tokens * _step(config)  # padding takes its steps, too
    return prefill.most_tokens // prefill.chunk * _chunk(config, prefill.chunk)


def _step(config: Qwen35Config) -> int:
    """Of `recurrent_gated_delta_rule`: decay, recall, write and read-out go through the state, [Dk, Dv]."""
    return 7 * config.linear_key_head_dim * config.linear_value_head_dim


def _chunk(config: Qwen35Config, chunk: int) -> int:
    """Of one chunk of `ChunkedGatedDeltaRule`, product by product, half of the operations each."""
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    decays = chunk**2 + chunk**3  # of the tokens, and of each pair of them
    scores = 2 * chunk**2 * key  # k k^T, q k^T
    inverse = 2 * chunk**3 * (chunk.bit_length() - 2)  # two products for each size of blocks but the smallest
    written = chunk**2 * (key + 2 * value)  # u_k; u_v and the output of what the chunk wrote
    state = 3 * chunk * key * value  # recall, write, read-out
    return 2 * (decays + scores + inverse + written + state)
