"""What a count can show: exact confidence limits of a rate, and the words in which a gate says what it could have seen.

A gate that finds no confident flip has shown something only as far as it has looked. Every position where the oracle is
sure is taken as a trial that flips with the same unknown chance; the limits are those of Clopper and Pearson (1934),
whose coverage is at least what they claim for every rate and every number of trials. Neighbouring positions of a text
are not independent, so that a claim about other text is weaker than the words; docs/gate.md says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from attrs import frozen

CONFIDENCE = 0.95
"""How often the limits of a rate hold."""

NOTABLE_RATE = 0.01
"""A gate that cannot even exclude this rate of flips is a smoke test."""

_HALVINGS = 60  # of [0, 1]: to the last bit of a rate


@frozen
class Power:
    """What a number of positions, some of which flipped, says of the rate of flips.

    Attributes:
        positions: positions where the oracle is sure, which are the ones that can flip.
        flips: how many of them flipped.
    """

    positions: int
    flips: int

    @property
    def excluded_rate(self) -> float:
        """Rates above this one are excluded at `CONFIDENCE`; 1 where nothing is."""
        return upper_limit(self.flips, self.positions) if self.positions else 1.0

    @property
    def smoke_test(self) -> bool:
        """Whether there are so few positions that they would let `NOTABLE_RATE` pass without a single flip."""
        return self.positions < positions_to_exclude(NOTABLE_RATE)

    @property
    def statement(self) -> str:
        """What was counted and what that excludes, as a clause."""
        if not self.positions:
            return "no position where the oracle is sure: nothing is excluded"
        plural = "" if self.flips == 1 else "s"
        counted = f"{self.flips:,} confident flip{plural} in {self.positions:,} positions where the oracle is sure"
        return f"{counted}: a rate above {percent_above(self.excluded_rate)} is excluded at {percent(CONFIDENCE)}"

    @property
    def caution(self) -> str | None:
        """Why a smoke test is one, as a sentence; None for a gate that shows more."""
        if not self.smoke_test:
            return None
        needed = positions_to_exclude(NOTABLE_RATE)
        return (
            f"This is a smoke test: fewer than {needed} positions where the oracle is sure cannot exclude that "
            f"{percent(NOTABLE_RATE)} of them flip."
        )


def upper_limit(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided upper limit of a rate: the rate at which so few successes or fewer have the chance 1 - confidence.

    Without a success that is 1 - (1 - confidence) ** (1 / trials), about 3 / trials.
    """
    _require_counts(successes, trials)
    if successes == trials:
        return 1.0
    if successes == 0:
        return -math.expm1(math.log1p(-confidence) / trials)
    return _crossing(lambda rate: at_most(successes, trials, rate) > 1 - confidence)


def lower_limit(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided lower limit of a rate: the rate at which so many or more have the chance 1 - confidence."""
    _require_counts(successes, trials)
    return _crossing(lambda rate: at_most(successes - 1, trials, rate) > confidence) if successes else 0.0


def interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The two-sided interval of a rate: half of what may be missed is missed on either side."""
    each = (1 + confidence) / 2
    return lower_limit(successes, trials, each), upper_limit(successes, trials, each)


def most_successes(rate: float, trials: int, confidence: float = CONFIDENCE) -> int:
    """The largest number of successes that does not show, at a confidence, that the rate is higher than `rate`."""
    most = 0
    while most < trials and at_most(most, trials, rate) <= confidence:  # else most + 1 or more are too rare
        most += 1
    return most


def positions_to_exclude(rate: float, confidence: float = CONFIDENCE) -> int:
    """The fewest positions that exclude a rate when none of them flips."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-rate))


def at_most(successes: int, trials: int, rate: float) -> float:
    """The chance of so many successes or fewer among independent trials: the binomial distribution function."""
    if successes < 0:
        return 0.0
    if successes >= trials or rate <= 0:
        return 1.0
    if rate >= 1:
        return 0.0
    odds = math.log(rate) - math.log1p(-rate)
    # The terms are summed relative to the largest, in logarithms: alone they are below the smallest double.
    terms = [_log_choose(trials, count) + count * odds for count in range(successes + 1)]
    largest = max(terms)
    log_sum = largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
    return min(1.0, math.exp(log_sum + trials * math.log1p(-rate)))


def percent(rate: float) -> str:
    """A rate as a percentage, with as many digits as it needs."""
    return f"{100 * rate:g} %"


def percent_above(rate: float) -> str:
    """A rate as a percentage with two digits, rounded up, so that what is above the words is above the rate."""
    percent = 100 * rate
    digits = 1 - math.floor(math.log10(percent)) if percent > 0 else 1
    return f"{math.ceil(percent * 10**digits - 1e-9) / 10**digits:.{max(digits, 0)}f} %"


def _crossing(below: Callable[[float], bool]) -> float:
    """The rate up to which `below` holds."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return high


def _log_choose(trials: int, count: int) -> float:
    return math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)


def _require_counts(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} of {trials} is no count of successes.")
