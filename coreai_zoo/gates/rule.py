"""The margin rule: a disagreement counts only where the oracle was sure.

Where the oracle's two largest logits are closer than a margin, either answer is right within the noise of any
implementation in the candidate's precision, and a flip is a tie. At that margin and above, a flip is an error of the
candidate, and one such flip fails the gate. It is `CONFIDENT_MARGIN` in half precision; bounds say another one.

Shape letters: P positions, V tokens in the vocabulary, D hidden, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen

from coreai_zoo.bounds import CONFIDENT_MARGIN
from coreai_zoo.gate import Activations
from coreai_zoo.gates.power import most_successes

ROUTED_FLIP_RATE = 0.003
"""Confident flips of a routed model over running text, as a share of the positions where the oracle is sure, that are
no error: rounding swaps experts at near-ties of the router. Twice what the untouched routed sample shows over 13
windows of the built-in corpus (10 flips in 6,656 positions; its unquantized weights 4)."""

Swaps = Sequence[tuple[bool, float | None]]
"""A pair for each position: whether the candidate's router chose other experts in any layer, and the oracle's gap in
the first such layer."""


def flips_allowed(positions: int, *, routed: bool) -> int:
    """How many confident flips over running text are no error; none of a model without a router.

    A routed model may have so many that they do not show, at 95 %, a rate above `ROUTED_FLIP_RATE`.

    Args:
        positions: those where the oracle is sure.
        routed: whether a router chooses experts.
    """
    return most_successes(ROUTED_FLIP_RATE, positions) if routed and positions else 0


@frozen
class Position:
    """Candidate and oracle compared after one token.

    Attributes:
        index: the position, from 0.
        token: the token that was fed.
        oracle: the oracle's argmax.
        candidate: the candidate's argmax.
        margin: the oracle's largest logit minus its second largest.
        cosine: between the two logit vectors.
        max_abs_logit_error: largest absolute difference of a logit.
        kl_divergence: KL(oracle || candidate) of the two distributions, in nats.
        router_margin: the oracle's, see `router_margins`; None without a router.
        relative_error: root mean square of the logits' error over the standard deviation of the oracle's logits.
        swap_margin: the oracle's router gap in the first layer that chose other experts; None where all layers chose
            the same ones, or it is not known.
        experts_changed: whether any layer chose other experts; None without a router, or when the candidate does not
            show its router.
        sure_from: the margin from which a flip is an error.
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
    relative_error: float = 0.0
    swap_margin: float | None = None
    experts_changed: bool | None = None
    sure_from: float = CONFIDENT_MARGIN

    def near_tie(self, gap: float) -> bool:
        """Whether the router was so undecided here that errors may have swapped an expert.

        Where the candidate shows its router, an expert was swapped, and the first layer that swapped one has a gap
        below `gap`. Where it does not, any layer has such a gap.
        """
        if self.experts_changed is None:
            return self.router_margin is not None and self.router_margin < gap
        return self.swap_margin is not None and self.swap_margin < gap

    @property
    def sure(self) -> bool:
        """Whether the oracle is so sure that a flip is an error."""
        return self.margin >= self.sure_from

    @property
    def verdict(self) -> str:
        """`match`, `tie` (a flip that does not count) or `FLIP`."""
        if self.oracle == self.candidate:
            return "match"
        return "FLIP" if self.sure else "tie"


@frozen
class Verdict:
    """The positions of one prompt, and what follows from them.

    Attributes:
        positions: in order.
        hidden_error: after the embedding and after each layer, the median over positions of |error| / |oracle| of the
            residual stream; None where the candidate does not show it.
    """

    positions: tuple[Position, ...]
    hidden_error: tuple[float, ...] | None = None

    @property
    def passed(self) -> bool:
        """Whether there is no confident flip."""
        return not self.confident_flips

    @property
    def confident_flips(self) -> tuple[Position, ...]:
        """Flips where the oracle was sure, worst margin first."""
        flips = [position for position in self.positions if position.verdict == "FLIP"]
        return tuple(sorted(flips, key=lambda position: -position.margin))

    @property
    def ties(self) -> int:
        """Number of flips that do not count."""
        return sum(position.verdict == "tie" for position in self.positions)

    @property
    def matched(self) -> int:
        """Number of positions where the argmax agrees."""
        return sum(position.verdict == "match" for position in self.positions)

    @property
    def confident_positions(self) -> int:
        """Number of positions where the oracle was sure; the others cannot fail."""
        return sum(position.sure for position in self.positions)


def flips_told(verdict: Verdict) -> list[str]:
    """The confident flips as one phrase; none where there are none."""
    flips = verdict.confident_flips
    if not flips:
        return []
    plural = "s" * (len(flips) > 1)
    worst = f"the worst at position {flips[0].index} with an oracle margin of {flips[0].margin:.2f}"
    return [f"{len(flips)} confident flip{plural}, {worst}"]


def judge(
    tokens: Sequence[int],
    oracle: np.ndarray[Any, Any],
    candidate: np.ndarray[Any, Any],
    router_margins: np.ndarray[Any, Any] | None = None,
    swaps: Swaps | None = None,
    sure_from: float = CONFIDENT_MARGIN,
) -> Verdict:
    """The verdict on a candidate's logits [P, V] after each of `tokens`; logits that are not finite never match.

    Raises:
        ValueError: when shapes differ.
    """
    if oracle.shape != candidate.shape or len(tokens) != len(oracle):
        raise ValueError(f"{len(tokens)} tokens, oracle logits {oracle.shape}, candidate logits {candidate.shape}")
    positions = []
    for index, token in enumerate(tokens):
        position = _position(index, token, oracle[index].astype(np.float64), candidate[index].astype(np.float64))
        gap = None if router_margins is None else float(router_margins[index])
        changed, swap = (None, None) if swaps is None else swaps[index]
        position = evolve(position, router_margin=gap, experts_changed=changed, swap_margin=swap, sure_from=sure_from)
        positions.append(position)
    return Verdict(tuple(positions))


def compare(
    tokens: Sequence[int],
    oracle: Activations,
    candidate: Activations,
    experts_per_token: int | None = None,
    sure_from: float = CONFIDENT_MARGIN,
) -> Verdict:
    """The verdict on everything that a candidate shows: logits, and where there are any, hidden states and routers.

    Args:
        tokens: P token ids.
        oracle: the reference.
        candidate: what is judged.
        experts_per_token: how many a router chooses; None without a router.
        sure_from: the oracle's margin from which a flip is an error.

    Raises:
        ValueError: when shapes differ.
    """
    margins = swaps = None
    if oracle.router_logits is not None and experts_per_token is not None:
        margins = router_margins(oracle.router_logits, experts_per_token)
        if candidate.router_logits is not None:
            swaps = router_swaps(oracle.router_logits, candidate.router_logits, experts_per_token)
    verdict = judge(tokens, oracle.logits, candidate.logits, margins, swaps, sure_from)
    return evolve(verdict, hidden_error=_hidden_error(oracle.hidden, candidate.hidden))


def _position(index: int, token: int, oracle: np.ndarray[Any, Any], candidate: np.ndarray[Any, Any]) -> Position:
    second, first = np.partition(oracle, -2)[-2:]
    margin = float(first - second)
    if not np.isfinite(candidate).all():
        # argmax of a vector with a NaN is the NaN's place, which could happen to be the right token.
        worst = float("inf")
        return Position(index, token, int(oracle.argmax()), -1, margin, 0.0, worst, worst, None, worst)
    norms = np.linalg.norm(oracle) * np.linalg.norm(candidate)
    error = candidate - oracle
    spread = oracle.std()
    return Position(
        index=index,
        token=token,
        oracle=int(oracle.argmax()),
        candidate=int(candidate.argmax()),
        margin=margin,
        cosine=float(oracle @ candidate / norms) if norms else 0.0,
        max_abs_logit_error=float(np.abs(error).max()),
        kl_divergence=_kl(oracle, candidate),
        router_margin=None,
        relative_error=float(np.sqrt((error * error).mean()) / spread) if spread else float(bool(error.any())),
    )


def _kl(oracle: np.ndarray[Any, Any], candidate: np.ndarray[Any, Any]) -> float:
    p, q = (logits - logits.max() for logits in (oracle, candidate))
    p, q = (logits - np.log(np.exp(logits).sum()) for logits in (p, q))
    return float((np.exp(p) * (p - q)).sum())


def _hidden_error(
    oracle: Sequence[np.ndarray[Any, Any]] | None, candidate: Sequence[np.ndarray[Any, Any]] | None
) -> tuple[float, ...] | None:
    if oracle is None or candidate is None:
        return None
    medians = []
    for expected, found in zip(oracle, candidate, strict=True):  # [P, D] each
        expected64 = expected.astype(np.float64)
        error = np.linalg.norm(found.astype(np.float64) - expected64, axis=-1)
        relative = error / np.maximum(np.linalg.norm(expected64, axis=-1), np.finfo(np.float32).tiny)
        medians.append(float(np.median(np.where(np.isfinite(relative), relative, np.inf))))
    return tuple(medians)


def router_gaps(router_logits: np.ndarray[Any, Any], chosen: int) -> np.ndarray[Any, Any]:
    """Gaps between the last chosen and the first rejected expert of one layer: [P, E] router logits to float32 [P].

    A gap is infinite where every expert is chosen, for then nothing can be swapped.
    """
    if chosen == router_logits.shape[-1]:
        return np.full(len(router_logits), np.inf, dtype=np.float32)
    ranked = -np.partition(-router_logits.astype(np.float32), (chosen - 1, chosen), axis=-1)
    gaps: np.ndarray[Any, Any] = ranked[:, chosen - 1] - ranked[:, chosen]
    return gaps


def router_margins(router_logits: Sequence[np.ndarray[Any, Any]], chosen: int) -> np.ndarray[Any, Any]:
    """The smallest of all layers' gaps at each position, float32 [P]; see `router_gaps`.

    Args:
        router_logits: one array [P, E] per layer.
        chosen: experts per token.
    """
    smallest: np.ndarray[Any, Any] = np.min([router_gaps(logits, chosen) for logits in router_logits], axis=0)
    return smallest


def router_swaps(
    oracle: Sequence[np.ndarray[Any, Any]], candidate: Sequence[np.ndarray[Any, Any]], chosen: int
) -> Swaps:
    """At each position, whether any layer chose other experts than the oracle's, and the oracle's gap in the first.

    Later layers see another input once an expert was swapped, so only the first says whether rounding can explain it.
    """
    swaps: list[tuple[bool, float | None]] = [(False, None)] * len(oracle[0])
    for expected, found in zip(oracle, candidate, strict=True):  # [P, E] each
        gaps = router_gaps(expected, chosen)
        theirs, ours = (np.sort(np.argsort(-logits, axis=-1)[:, :chosen], axis=-1) for logits in (expected, found))
        for position in np.flatnonzero((theirs != ours).any(axis=-1)):
            if not swaps[position][0]:
                swaps[position] = (True, float(gaps[position]))
    return swaps
