"""The margin rule: a disagreement counts only where the oracle was sure.

Where the oracle's two largest logits are closer than `CONFIDENT_MARGIN`, either answer is right within the noise of any
half-precision implementation, and a flip is a tie. From there on a flip is an error of the candidate, and one fails the
gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import frozen

CONFIDENT_MARGIN = 0.1
"""Oracle top-2 margin, in logits, from which a flip is an error; the rule of the published 27B results."""


@frozen
class Position:
    """Oracle and candidate after one token.

    Attributes:
        index: position, from 0.
        token: the token that was fed.
        oracle: the oracle's argmax.
        candidate: the candidate's argmax.
        margin: the oracle's largest logit minus its second largest.
        cosine: between the two logit vectors.
        max_abs_logit_error: largest absolute difference of a logit.
        kl_divergence: KL(oracle || candidate) of the two distributions, in nats.
        router_margin: of the oracle, see `router_margins`; None without a router.
    """

    index: int
    token: int
    oracle: int
    candidate: int
    margin: float
    cosine: float
    max_abs_logit_error: float
    kl_divergence: float
    router_margin: float | None

    @property
    def verdict(self) -> str:
        """`match`, `tie` (a flip that does not count) or `FLIP`."""
        if self.oracle == self.candidate:
            return "match"
        return "FLIP" if self.margin >= CONFIDENT_MARGIN else "tie"


@frozen
class Verdict:
    """All positions of one prompt, and what follows from them."""

    positions: tuple[Position, ...]

    @property
    def passed(self) -> bool:
        """No confident flip."""
        return not self.confident_flips

    @property
    def confident_flips(self) -> tuple[Position, ...]:
        """Flips where the oracle was sure, worst margin first."""
        flips = [position for position in self.positions if position.verdict == "FLIP"]
        return tuple(sorted(flips, key=lambda position: -position.margin))

    @property
    def ties(self) -> int:
        """Flips that do not count."""
        return sum(position.verdict == "tie" for position in self.positions)

    @property
    def matched(self) -> int:
        """Positions where the argmax agrees."""
        return sum(position.verdict == "match" for position in self.positions)

    @property
    def confident_positions(self) -> int:
        """Positions where the oracle was sure; the rest could not fail."""
        return sum(position.margin >= CONFIDENT_MARGIN for position in self.positions)


def judge(
    tokens: Sequence[int],
    oracle: np.ndarray[Any, Any],
    candidate: np.ndarray[Any, Any],
    router_margins: np.ndarray[Any, Any] | None = None,
) -> Verdict:
    """Compare logits [positions, V] after each of `tokens`.

    Raises:
        ValueError: when shapes differ. Logits that are not finite are not an error here: they never match.
    """
    if oracle.shape != candidate.shape or len(tokens) != len(oracle):
        raise ValueError(f"{len(tokens)} tokens, oracle logits {oracle.shape}, candidate logits {candidate.shape}")
    return Verdict(
        tuple(
            _position(
                index,
                token,
                oracle[index].astype(np.float64),
                candidate[index].astype(np.float64),
                None if router_margins is None else float(router_margins[index]),
            )
            for index, token in enumerate(tokens)
        )
    )


def _position(
    index: int, token: int, oracle: np.ndarray[Any, Any], candidate: np.ndarray[Any, Any], router_margin: float | None
) -> Position:
    second, first = np.partition(oracle, -2)[-2:]
    if not np.isfinite(candidate).all():
        # argmax of a vector with a NaN is the NaN's place, which could happen to be the right token.
        worst = float("inf")
        return Position(index, token, int(oracle.argmax()), -1, float(first - second), 0.0, worst, worst, router_margin)
    norms = np.linalg.norm(oracle) * np.linalg.norm(candidate)
    return Position(
        index=index,
        token=token,
        oracle=int(oracle.argmax()),
        candidate=int(candidate.argmax()),
        margin=float(first - second),
        cosine=float(oracle @ candidate / norms) if norms else 0.0,
        max_abs_logit_error=float(np.abs(oracle - candidate).max()),
        kl_divergence=_kl(oracle, candidate),
        router_margin=router_margin,
    )


def _kl(oracle: np.ndarray[Any, Any], candidate: np.ndarray[Any, Any]) -> float:
    p, q = (logits - logits.max() for logits in (oracle, candidate))
    p, q = (logits - np.log(np.exp(logits).sum()) for logits in (p, q))
    return float((np.exp(p) * (p - q)).sum())


def router_margins(router_logits: Sequence[np.ndarray[Any, Any]], chosen: int) -> np.ndarray[Any, Any]:
    """Smallest gap over all layers between the router logits of the last chosen and the first rejected expert.

    Args:
        router_logits: one array [positions, experts] per layer.
        chosen: experts per token.

    Returns:
        float32 [positions]; infinite where every expert is chosen, for then nothing can be swapped.
    """
    gaps = []
    for logits in router_logits:
        if chosen == logits.shape[-1]:
            return np.full(len(logits), np.inf, dtype=np.float32)
        ranked = -np.partition(-logits.astype(np.float32), (chosen - 1, chosen), axis=-1)
        gaps.append(ranked[:, chosen - 1] - ranked[:, chosen])
    smallest: np.ndarray[Any, Any] = np.min(gaps, axis=0)
    return smallest
