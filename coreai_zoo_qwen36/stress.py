"""Stress samples of the family: both samples, each changed so that one kind of arithmetic carries the result.

Every factor is a power of two, so that what is scaled keeps its digits. tests/test_stress.py shows for each what it
catches and what passes without it; scripts/measure_bounds.py --stress measures the bounds again.

Shapes: D hidden, Dh head width, Hq query heads, C channels of the convolution, of which the first 2 Hk Dk are q and k.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from coreai_zoo.bounds import MeasuredBounds
from coreai_zoo.stress import Change, StressSample
from coreai_zoo_overlays.qwen3_5.config import FULL, LINEAR, Qwen35Config
from coreai_zoo_qwen36.bounds import stress_bounds

if TYPE_CHECKING:
    from torch import Tensor

Weights = dict[str, "Tensor"]

_WRITES_THE_STREAM = r"(o_proj|out_proj|down_proj)(\.weight)?$"
_STREAM = rf"embed_tokens\.weight$|{_WRITES_THE_STREAM}"
_READS_THE_STREAM = (
    r"((gate|up|gate_up|[qkv])_proj|in_proj_(qkv|z|a|b)|mlp\.gate|shared_expert_gate|lm_head)(\.weight)?$"
)


def stress_samples(config: Qwen35Config) -> Sequence[StressSample]:
    """The stress samples of the sample with this config."""
    made = partial(_sample, config)
    found = [
        made(
            "small-activations",
            "what every norm is given is as small as its eps, so that any other eps is another model",
            _small_activations,
        ),
        made(
            "slow-decay",
            "decays are near 1 and made of constants beyond what half precision holds, so that the recurrent state "
            "keeps every rounding for a hundred tokens",
            _slow_decay,
            positions=128 if config.feed_forward.name == "dense" else 64,  # later experts are swapped all the time
        ),
        made(
            "large-activations",
            "the residual stream comes near the largest number of half precision, which no square of it fits in",
            partial(_large_activations, config=config),
        ),
        made(
            "offset-scores",
            "all keys have one large part in common, which softmax cancels: scores are differences of large numbers",
            partial(_offset_scores, config=config),
        ),
        made(
            "fat-tailed-head",
            "each row of the head has one weight far above the others, as in large vocabularies: what is cut is lost",
            _fat_tailed_head,
            recipe="int8hu",
        ),
    ]
    if config.feed_forward.name == "dense":  # attention is the same code in a mixture
        found.append(
            made(
                "long-context",
                "positions go beyond 2,048 and 4,096, where half precision holds every second and every fourth number",
                _last_period_only,
                positions=4160,
                first=2048,
                at_once=True,
            )
        )
    return found


def _sample(config: Qwen35Config, name: str, reason: str, change: Change, **options: Any) -> StressSample:
    bounds: MeasuredBounds = stress_bounds(name, layers=2 if name == "long-context" else len(config.layer_types))
    return StressSample(name, reason, change, bounds, **options)


# ---------------------------------------------------------------------------------------------------------------------
# The changes
# ---------------------------------------------------------------------------------------------------------------------


def _small_activations(weights: Weights, _config: dict[str, Any]) -> None:
    """The residual stream scaled as a whole, which only an eps can tell; and what goes into the other norms."""
    _scale(weights, _STREAM, 2.0**-8)
    _scale(weights, r"self_attn\.[qk]_proj\.weight$", 2.0**-7)
    _scale(weights, r"in_proj_qkv\.weight$", 2.0**-4)


def _slow_decay(weights: Weights, _config: dict[str, Any]) -> None:
    """A below the smallest normal number of half precision, times a softplus above the largest: decays of 0.97 to 1."""
    for key in _keys(weights, r"A_log$"):
        weights[key] -= 26 * math.log(2)
    for key in _keys(weights, r"dt_bias$"):
        weights[key].fill_(2.0**17)
    _scale(weights, r"in_proj_a\.weight$", 2.0**4)


def _large_activations(weights: Weights, _config: dict[str, Any], *, config: Qwen35Config) -> None:
    """The residual stream scaled as a whole; keys and queries of the delta rule, brought to length 1; routers."""
    _scale(weights, _STREAM, 2.0**11)
    for key in _keys(weights, r"in_proj_qkv\.weight$"):
        weights[key][: 2 * config.key_dim] *= 2.0**10
    if config.feed_forward.name == "moe":
        _scale(weights, r"mlp\.gate\.weight$", 2.0**4)


def _offset_scores(weights: Weights, _config: dict[str, Any], *, config: Qwen35Config) -> None:
    """Channel 0 of the stream is constant and read by queries and keys only, which put it into their last dimension.

    RoPE does not rotate that one. All other dimensions keep their size by a larger gain of the norm.
    """
    channel, share = 16.0, 300 / math.sqrt(config.hidden_size)
    for key in _keys(weights, _WRITES_THE_STREAM):
        weights[key][..., 0, :] = 0
    for key in _keys(weights, _READS_THE_STREAM):
        weights[key][..., 0] = 0
    for key in _keys(weights, r"layernorm\.weight$"):
        weights[key][0] = 0
    (embedding,) = _keys(weights, r"embed_tokens\.weight$")
    weights[embedding][:, 0] = channel
    last = config.head_dim - 1
    for key in _keys(weights, r"self_attn\.[qk]_proj\.weight$"):
        heads = weights[key].view(-1, (2 if "q_proj" in key else 1) * config.head_dim, config.hidden_size)
        heads[:, last] = 0  # of a query, the row before its gate
        heads[:, last, 0] = share
    for key in _keys(weights, r"[qk]_norm\.weight$"):
        weights[key] = (1 + weights[key]) * 2.0**10 - 1
        weights[key][last] = 2.0**3 - 1


def _fat_tailed_head(weights: Weights, _config: dict[str, Any]) -> None:
    """One weight of each row, at a place of its own, is made 16 times as large as the others."""
    import torch

    (key,) = _keys(weights, r"lm_head\.weight$")
    head = weights[key]
    places = torch.randint(head.shape[1], (len(head), 1), generator=torch.Generator().manual_seed(0))
    sizes = head.square().mean(1, keepdim=True).sqrt() * 2.0**4
    head.scatter_(1, places, torch.copysign(sizes, head.gather(1, places)))


def _last_period_only(weights: Weights, config: dict[str, Any]) -> None:
    """Two layers, one of each kind, so that thousands of tokens take some seconds."""
    text = config.get("text_config", config)
    last = len(text["layer_types"]) - 1 - text["layer_types"][::-1].index(FULL)
    kept = {last - 1: 0, last: 1}
    for key in list(weights):
        if match := re.search(r"(?<=layers\.)\d+(?=\.)", key):
            tensor = weights.pop(key)
            if (place := kept.get(int(match[0]))) is not None:
                weights[f"{key[: match.start()]}{place}{key[match.end() :]}"] = tensor
    text |= {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "max_position_embeddings": 8192}


def _scale(weights: Weights, pattern: str, factor: float) -> None:
    for key in _keys(weights, pattern):
        weights[key] *= factor


def _keys(weights: Weights, pattern: str) -> list[str]:
    """The keys that match; there must be one."""
    found = [key for key in weights if re.search(pattern, key)]
    if not found:
        raise KeyError(f"no tensor of the sample matches {pattern}")
    return found
