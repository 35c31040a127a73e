"""What a gate says it could have seen: exact limits of a rate, against published values and by counting every case."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest

from coreai_zoo.gates.power import (
    CONFIDENCE,
    NOTABLE_RATE,
    Power,
    at_most,
    interval,
    lower_limit,
    most_successes,
    percent_above,
    positions_to_exclude,
    upper_limit,
)


def exactly_at_most(successes: int, trials: int, rate: Fraction) -> Fraction:
    """The binomial distribution function in fractions, by its definition."""
    return sum(
        (comb(trials, count) * rate**count * (1 - rate) ** (trials - count) for count in range(successes + 1)),
        Fraction(0),
    )


@pytest.mark.parametrize("trials", [1, 2, 7, 40, 150])
@pytest.mark.parametrize("rate", [Fraction(1, 1000), Fraction(1, 7), Fraction(1, 2), Fraction(99, 100)])
def test_the_binomial_distribution_is_that_of_its_definition(trials: int, rate: Fraction) -> None:
    for successes in {0, 1, trials // 2, trials - 1, trials}:
        exact = float(exactly_at_most(successes, trials, rate))
        assert at_most(successes, trials, float(rate)) == pytest.approx(exact, rel=1e-9, abs=1e-300)


def test_where_the_terms_are_below_the_smallest_double_the_sum_is_right() -> None:
    assert at_most(5, 100_000, 0.5) == 0.0
    assert at_most(50_000, 100_001, 0.5) == pytest.approx(0.5, rel=1e-7)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Two-sided 95 % intervals as every table of Clopper and Pearson has them.
    [(0, 10, 0.0, 0.3085), (2, 10, 0.0252, 0.5561), (5, 20, 0.0866, 0.4910), (1, 100, 0.0003, 0.0545)],
)
def test_intervals_are_the_published_ones(successes: int, trials: int, low: float, high: float) -> None:
    assert interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_one_sided_limits_are_where_the_chance_is_what_they_say() -> None:
    assert upper_limit(0, 3072) == pytest.approx(1 - 0.05 ** (1 / 3072), rel=1e-12)
    assert upper_limit(0, 3072) == pytest.approx(3 / 3072, rel=2e-3), "the rule of three"
    assert upper_limit(1, 10) == pytest.approx(0.3942, abs=5e-5)
    assert upper_limit(10, 10) == 1.0 and lower_limit(0, 10) == 0.0
    for successes, trials in ((1, 10), (3, 200), (9, 60)):
        limit = Fraction(upper_limit(successes, trials))
        assert float(exactly_at_most(successes, trials, limit)) == pytest.approx(1 - CONFIDENCE, rel=1e-6)
        limit = Fraction(lower_limit(successes, trials))
        assert float(1 - exactly_at_most(successes - 1, trials, limit)) == pytest.approx(1 - CONFIDENCE, rel=1e-6)


@pytest.mark.parametrize("trials", [1, 5, 30, 120])
def test_the_limit_holds_at_least_as_often_as_it_says_for_every_true_rate(trials: int) -> None:
    limits = [upper_limit(successes, trials) for successes in range(trials + 1)]
    least = 1.0
    for step in range(1, 200):
        rate = step / 200
        chances = [comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(trials + 1)]
        covered = sum(chance for chance, limit in zip(chances, limits, strict=True) if limit >= rate)
        least = min(least, covered)
    assert CONFIDENCE - 1e-9 <= least < 1.0


def test_counts_that_are_none_are_refused() -> None:
    for successes, trials in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="is no count"):
            upper_limit(successes, trials)


def test_of_829_positions_a_rate_of_a_thousandth_is_not_excluded_and_of_3072_it_is() -> None:
    assert upper_limit(0, 829) > 1e-3 > upper_limit(0, 3072)
    needed = positions_to_exclude(1e-3)
    assert upper_limit(0, needed) <= 1e-3 < upper_limit(0, needed - 1)


def test_the_statement_counts_and_never_claims_more_than_the_limit() -> None:
    assert Power(3072, 0).statement == (
        "0 confident flips in 3,072 positions where the oracle is sure: a rate above 0.098 % is excluded at 95 %"
    )
    assert Power(3072, 1).statement.startswith("1 confident flip in 3,072 positions")
    assert Power(0, 0).statement == "no position where the oracle is sure: nothing is excluded"
    for positions in range(1, 4000, 37):
        for flips in (0, 1, min(positions, 5)):
            power = Power(positions, flips)
            said = float(power.statement.split("a rate above ")[1].split(" %")[0]) / 100
            assert said >= power.excluded_rate - 1e-9
            assert said <= power.excluded_rate * 1.1 + 1e-9
    assert [percent_above(rate) for rate in (1.0, 0.1, 0.0123, 0.00123, 0.0001)] == [
        "100 %",
        "10 %",
        "1.3 %",
        "0.13 %",
        "0.010 %",
    ]


def test_fewer_positions_than_exclude_one_percent_are_a_smoke_test() -> None:
    needed = positions_to_exclude(NOTABLE_RATE)
    assert needed == 299
    assert Power(needed, 0).caution is None
    for positions in (0, 16, needed - 1):
        caution = Power(positions, 0).caution
        assert caution is not None and "smoke test: fewer than 299 positions" in caution
    # The length of a run decides, not how well it went.
    assert Power(needed, 7).caution is None


def test_a_number_of_flips_shows_a_higher_rate_only_when_chance_seldom_gives_so_many() -> None:
    for trials in (100, 470, 3072):
        most = most_successes(0.003, trials)
        assert lower_limit(most, trials) <= 0.003 < lower_limit(most + 1, trials)
    assert most_successes(0.0, 470) == 0
    assert most_successes(1.0, 4) == 4
