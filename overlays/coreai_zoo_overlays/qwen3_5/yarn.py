"""YaRN: rotary frequencies for a context longer than the one that a model was trained with (Peng et al. 2023,
arXiv 2309.00071, sections 3.2 and 3.4).

Differs from transformers' `_compute_yarn_parameters` in that defaults are settled when a config is read, so that a bad
value is complained about before anything is built. The family's releases have it off; a config turns it on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from .reader import Reader, shown

if TYPE_CHECKING:
    from torch import Tensor


@frozen
class Yarn:
    """How frequencies are stretched.

    Attributes:
        factor: by how much the context is longer than the original.
        original_context: positions that the model was trained with.
        beta_fast: dimensions that turn at least this often within the original context keep their frequency.
        beta_slow: dimensions that turn at most this often have theirs divided by `factor`.
        whole_dimensions: whether the range between the two is widened to whole dimensions.
        attention_factor: what cos and sin are multiplied by, so that attention stays as sharp as it was.
    """

    factor: float
    original_context: float
    beta_fast: float
    beta_slow: float
    whole_dimensions: bool
    attention_factor: float

    def stretched(self, frequency: Tensor, theta: float) -> Tensor:
        """The frequencies [R / 2] of R rotated dimensions with base `theta`, stretched."""
        import torch

        pairs = frequency.shape[0]
        low, high = (self._dimension(turns, theta, 2 * pairs) for turns in (self.beta_fast, self.beta_slow))
        if self.whole_dimensions:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        width = high - low or 0.001  # a step instead of a ramp
        slow = ((torch.arange(pairs, dtype=torch.float32, device=frequency.device) - low) / width).clamp(0, 1)
        return frequency / self.factor * slow + frequency * (1 - slow)

    def _dimension(self, turns: float, theta: float, rotary_dim: int) -> float:
        """The dimension that turns so often within the original context."""
        return rotary_dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))


def read_yarn(read: Reader, rope: Mapping[str, Any]) -> Yarn:
    """The settings of YaRN among those of the rotary embedding; silence and null are as in transformers."""
    context = read.size("max_position_embeddings", 32768)
    # A flat key wins over the one among the settings, as in transformers.
    original = {"original_max_position_embeddings": context, **rope, **_flat(read, "original_max_position_embeddings")}
    original_context = read.number("original_max_position_embeddings", 1.0, original)
    if "factor" not in rope:
        read.problems.append("rope_type is 'yarn', and its factor is missing")
    if read.number("rope_theta", 10_000.0, rope) <= 1:
        read.problems.append(f"rope_theta is {shown(rope['rope_theta'])}; YaRN needs more than 1")
    given = {key: value for key, value in rope.items() if value is not None}
    factor = read.number("factor", context / original_context, given)
    for name in ("mscale", "mscale_all_dim"):
        if not isinstance(given.get(name, 1.0), int | float):
            read.problems.append(f"{name} is {shown(given[name])}, not a number")
            return Yarn(factor, original_context, 32.0, 1.0, True, 1.0)
    return Yarn(
        factor=factor,
        original_context=original_context,
        beta_fast=read.number("beta_fast", 32.0, given),
        beta_slow=read.number("beta_slow", 1.0, given),
        whole_dimensions=bool(rope.get("truncate", True)),
        attention_factor=read.number("attention_factor", _attention_factor(factor, given), given),
    )


def _flat(read: Reader, name: str) -> dict[str, Any]:
    return {name: read.fields[name]} if name in read.fields else {}


def _attention_factor(factor: float, given: Mapping[str, Any]) -> float:
    """0.1 ln(factor) + 1 (section 3.4), or the quotient of two such with the factors of DeepSeek's configs."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    one, other = given.get("mscale"), given.get("mscale_all_dim")
    return of(one) / of(other) if one and other else of(1.0)
