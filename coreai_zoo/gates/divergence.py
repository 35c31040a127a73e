"""Perplexity and KL divergence of a candidate against its oracle over a text, with their uncertainties.

The conventions are those of `llama-perplexity --kl-divergence` of llama.cpp (tools/perplexity/perplexity.cpp of
ggml-org/llama.cpp, and the README beside it), so that figures can be set side by side: an uncertainty is the standard
error of a mean, positions taken as independent; that of a perplexity follows from ln PPL to first order; the two
perplexities are paired, so the error of their ratio leaves out what they share; percentiles are interpolated between
neighbours; the error of an agreement is binomial. One thing differs: llama.cpp keeps the reference's log-probabilities
in 16 bits and leaves out tokens below exp(-16), which can make a divergence slightly negative; here all of both
distributions is summed in float64.

The 95 % intervals are ours: normal for means, on the logarithmic scale for perplexities and their ratio, of Clopper and
Pearson for the agreement, and between order statistics for percentiles, which holds whatever the distribution is.

Shapes: P positions, V tokens in the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from coreai_zoo.gates.power import CONFIDENCE, at_most, interval

PERCENTILES = (0.5, 0.99, 0.999)

_Z = 1.959963984540054  # of the normal distribution, 2.5 % is above it
_BLOCK_ELEMENTS = 1 << 21  # logits that are compared at a time: 16 MiB in float64

Array = np.ndarray[Any, Any]


@frozen
class Compared:
    """Oracle and candidate after each of P tokens: arrays [P].

    Attributes:
        margin: the oracle's largest logit minus its second largest.
        oracle: the oracle's argmax.
        candidate: the candidate's; -1 where its logits are not finite.
        kl: KL(oracle || candidate) in nats; infinite where the candidate's logits are not finite.
        oracle_nll: minus the log-probability that the oracle gives the token that follows, in nats.
        candidate_nll: the same of the candidate.
    """

    margin: Array
    oracle: Array
    candidate: Array
    kl: Array
    oracle_nll: Array
    candidate_nll: Array

    def __getitem__(self, rows: slice) -> Compared:
        return Compared(*(values[rows] for values in self.arrays))

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All of them, in the order of the attributes."""
        return (self.margin, self.oracle, self.candidate, self.kl, self.oracle_nll, self.candidate_nll)

    @classmethod
    def joined(cls, parts: Sequence[Compared]) -> Compared:
        """The positions of all parts, in order."""
        return cls(*(np.concatenate(arrays) for arrays in zip(*(part.arrays for part in parts), strict=True)))


def compare_logits(oracle: Array, candidate: Array, following: Sequence[int]) -> Compared:
    """Compare logits [P, V] before each of P `following` tokens, a few rows at a time: no copy of all is made.

    Raises:
        ValueError: when shapes differ.
    """
    if oracle.shape != candidate.shape or len(following) != len(oracle):
        raise ValueError(f"{len(following)} tokens, oracle logits {oracle.shape}, candidate logits {candidate.shape}")
    step = max(1, _BLOCK_ELEMENTS // oracle.shape[1])
    return Compared.joined(
        [
            _compare_block(
                oracle[start : start + step], candidate[start : start + step], following[start : start + step]
            )
            for start in range(0, len(oracle), step)
        ]
    )


def _compare_block(oracle: Array, candidate: Array, following: Sequence[int]) -> Compared:
    log_p, next_tokens = _log_probabilities(oracle), np.asarray(following)[:, None]
    top = np.partition(oracle.astype(np.float64), -2, axis=-1)[:, -2:]
    finite = np.asarray(np.isfinite(candidate).all(axis=-1))
    log_q = _log_probabilities(np.where(finite[:, None], candidate, 0))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    candidate_nll = -np.take_along_axis(log_q, next_tokens, axis=-1)[:, 0]
    return Compared(
        margin=top[:, 1] - top[:, 0],
        oracle=oracle.argmax(axis=-1),
        candidate=np.where(finite, candidate.argmax(axis=-1), -1),
        kl=np.where(finite, kl, np.inf),
        oracle_nll=-np.take_along_axis(log_p, next_tokens, axis=-1)[:, 0],
        candidate_nll=np.where(finite, candidate_nll, np.inf),
    )


def _log_probabilities(logits: Array) -> Array:
    """[P, V] in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Estimate:
    """A figure and how well it is known.

    Attributes:
        value: the figure.
        error: its standard error; None where there is none, or it is not known.
        low: lower end of the 95 % interval; None where the positions do not give one.
        high: upper end.
    """

    value: float
    error: float | None
    low: float | None
    high: float | None


@frozen
class Statistics:
    """The figures of a candidate over P positions of a text.

    Attributes:
        counted: P.
        oracle_perplexity: PPL(oracle).
        perplexity: PPL(candidate).
        perplexity_ratio: PPL(candidate) / PPL(oracle).
        log_perplexity_ratio: its logarithm.
        perplexity_difference: PPL(candidate) - PPL(oracle).
        perplexity_correlation: of ln PPL(candidate) and ln PPL(oracle); None where one of them does not vary.
        kl_mean: mean KL divergence in nats.
        kl_median: the median; `kl_percentile_99` and `kl_percentile_99_9` further up.
        kl_max: the largest, which has no error.
        top1_agreement: the share of positions at which both prefer the same token.
    """

    counted: int
    oracle_perplexity: Estimate
    perplexity: Estimate
    perplexity_ratio: Estimate
    log_perplexity_ratio: Estimate
    perplexity_difference: Estimate
    perplexity_correlation: float | None
    kl_mean: Estimate
    kl_median: Estimate
    kl_percentile_99: Estimate
    kl_percentile_99_9: Estimate
    kl_max: float
    top1_agreement: Estimate


def statistics(compared: Compared) -> Statistics:
    """The figures of all positions of `compared`."""
    with np.errstate(invalid="ignore", over="ignore"):  # of a candidate that is not finite they are infinite or nan
        oracle, candidate = mean(compared.oracle_nll), mean(compared.candidate_nll)
        log_ratio = mean(compared.candidate_nll - compared.oracle_nll)
        median, high, highest = (quantile(compared.kl, part) for part in PERCENTILES)
        return Statistics(
            counted=len(compared.kl),
            oracle_perplexity=_exponential(oracle),
            perplexity=_exponential(candidate),
            perplexity_ratio=_exponential(log_ratio),
            log_perplexity_ratio=log_ratio,
            perplexity_difference=_difference(compared),
            perplexity_correlation=_correlation(compared),
            kl_mean=mean(compared.kl),
            kl_median=median,
            kl_percentile_99=high,
            kl_percentile_99_9=highest,
            kl_max=float(compared.kl.max()),
            top1_agreement=_share(int((compared.oracle == compared.candidate).sum()), len(compared.kl)),
        )


def mean(values: Array) -> Estimate:
    """The mean of independent values, its standard error, and a normal interval."""
    value = float(values.mean())
    if len(values) < 2 or not math.isfinite(value):
        return Estimate(value, None, None, None)
    return _normal(value, float(values.std(ddof=1) / math.sqrt(len(values))))


def quantile(values: Array, part: float) -> Estimate:
    """A quantile, interpolated between neighbours, between the order statistics that hold it with 95 %.

    So many of P values are below the true quantile as a binomial variable says. A quantile far out of few values has no
    upper end.
    """
    ranked, count, missed = np.sort(values), len(values), (1 - CONFIDENCE) / 2
    place = part * (count - 1)
    below, above = ranked[math.floor(place)], ranked[math.ceil(place)]
    value = float(below if below == above else below + (place - math.floor(place)) * (above - below))
    first = _fewest(lambda rank: at_most(rank, count, part) > missed, count)
    last = _fewest(lambda rank: at_most(rank, count, part) >= 1 - missed, count)
    low = float(ranked[first - 1]) if first > 0 else None
    return Estimate(value, None, low, float(ranked[last]) if last < count else None)


def _fewest(holds: Callable[[int], bool], count: int) -> int:
    """The smallest number from which on `holds`, which is true of `count`."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _normal(value: float, error: float) -> Estimate:
    return Estimate(value, error, value - _Z * error, value + _Z * error)


def _exponential(logarithm: Estimate) -> Estimate:
    """The figure whose logarithm was estimated; to first order its error is the value times that of the logarithm."""
    value = float(np.exp(logarithm.value))
    if logarithm.error is None:
        return Estimate(value, None, None, None)
    low, high = (float(np.exp(logarithm.value + sign * _Z * logarithm.error)) for sign in (-1, 1))
    return Estimate(value, value * logarithm.error, low, high)


def _difference(compared: Compared) -> Estimate:
    """PPL(candidate) - PPL(oracle), paired: to first order the mean of what each position moves it."""
    ours, theirs = (float(np.exp(nll.mean())) for nll in (compared.candidate_nll, compared.oracle_nll))
    if not math.isfinite(ours) or len(compared.kl) < 2:
        return Estimate(ours - theirs, None, None, None)
    moves = ours * compared.candidate_nll - theirs * compared.oracle_nll
    return _normal(ours - theirs, float(moves.std(ddof=1) / math.sqrt(len(moves))))


def _correlation(compared: Compared) -> float | None:
    both = np.stack([compared.candidate_nll, compared.oracle_nll])
    if both.shape[1] < 2 or not np.isfinite(both).all() or not both.std(axis=1).all():
        return None
    return float(np.corrcoef(both)[0, 1])


def _share(count: int, total: int) -> Estimate:
    """A share of independent trials, its binomial standard error and its exact interval."""
    share = count / total
    error = math.sqrt(share * (1 - share) / (total - 1)) if total > 1 else None
    return Estimate(share, error, *interval(count, total))
