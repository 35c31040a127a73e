"""The margin rule on logits made for it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coreai_zoo.bounds import CONFIDENT_MARGIN, kind_of
from coreai_zoo.gate import Activations
from coreai_zoo.gates.rule import Position, Verdict, compare, judge, router_margins

Logits = np.ndarray[Any, Any]


def logits(*rows: list[float], dtype: type = np.float32) -> Logits:
    return np.array(rows, dtype)


def judged(oracle: list[float], candidate: list[float]) -> Position:
    """One position; in double precision, so that a margin is exactly what is written."""
    (position,) = judge([7], logits(oracle, dtype=np.float64), logits(candidate, dtype=np.float64)).positions
    return position


# ---------------------------------------------------------------------------------------------------------------------
# One position
# ---------------------------------------------------------------------------------------------------------------------


def test_the_same_top_token_is_a_match_whatever_the_margin() -> None:
    close = judged([1.0, 1.001, 0.0], [5.0, 6.0, 0.0])
    far = judged([1.0, 9.0, 0.0], [5.0, 5.001, 0.0])

    assert [(p.verdict, p.oracle, p.candidate) for p in (close, far)] == [("match", 1, 1), ("match", 1, 1)]


def test_a_flip_below_the_margin_is_a_tie() -> None:
    below = math.nextafter(CONFIDENT_MARGIN, 0.0)

    position = judged([0.0, below, -3.0], [1.0, 0.0, -3.0])

    assert (position.margin, position.verdict) == (below, "tie")


@pytest.mark.parametrize("margin", [CONFIDENT_MARGIN, math.nextafter(CONFIDENT_MARGIN, 1.0), 0.5, 30.0])
def test_a_flip_from_the_margin_on_is_a_flip(margin: float) -> None:
    position = judged([0.0, margin, -3.0], [1.0, 0.0, -3.0])

    assert (position.margin, position.verdict) == (margin, "FLIP")


@pytest.mark.parametrize(("margin", "verdict"), [(0.5, "tie"), (0.75, "FLIP"), (3.0, "FLIP")])
def test_what_computes_in_another_precision_may_have_another_margin(margin: float, verdict: str) -> None:
    oracle, candidate = (Activations(logits(row, dtype=np.float64)) for row in ([0.0, margin], [1.0, 0.0]))
    found = compare([7], oracle, candidate, sure_from=0.75)

    assert [position.verdict for position in found.positions] == [verdict]
    assert found.confident_positions == len(found.confident_flips) == (verdict == "FLIP")


def test_the_margin_is_a_tenth_of_a_logit() -> None:
    assert CONFIDENT_MARGIN == 0.1


def test_who_chooses_experts_is_routed() -> None:
    assert (kind_of(None), kind_of(8)) == ("dense", "routed")


def test_the_margin_is_the_oracles_and_not_the_candidates() -> None:
    sure_candidate = judged([0.05, 0.0], [0.0, 50.0])
    unsure_candidate = judged([50.0, 0.0], [0.0, 0.05])

    assert (sure_candidate.verdict, unsure_candidate.verdict) == ("tie", "FLIP")


def test_an_oracle_with_two_equal_largest_logits_has_no_margin() -> None:
    position = judged([3.0, 3.0, 1.0], [1.0, 3.0, 1.0])

    assert (position.margin, position.verdict) == (0.0, "tie")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", range(3))
def test_a_candidate_that_is_not_finite_never_matches(bad: float, at: int) -> None:
    candidate = [0.0, 0.0, 5.0]
    candidate[at] = bad

    position = judged([0.0, 1.0, 5.0], candidate)

    assert position.verdict == "FLIP"
    assert position.candidate == -1
    assert (position.cosine, position.max_abs_logit_error, position.kl_divergence) == (0.0, math.inf, math.inf)
    assert (position.oracle, position.margin) == (2, 4.0)


# ---------------------------------------------------------------------------------------------------------------------
# Measures, against sums written out by hand
# ---------------------------------------------------------------------------------------------------------------------


def kl_by_hand(oracle: list[float], candidate: list[float]) -> float:
    """Sum of p log(p / q) over softmax probabilities, term by term."""
    p = [math.exp(value) / math.fsum(map(math.exp, oracle)) for value in oracle]
    q = [math.exp(value) / math.fsum(map(math.exp, candidate)) for value in candidate]
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def cosine_by_hand(oracle: list[float], candidate: list[float]) -> float:
    dot = math.fsum(a * b for a, b in zip(oracle, candidate, strict=True))
    return dot / (math.hypot(*oracle) * math.hypot(*candidate))


ROWS = [
    ([1.0, 2.0, 3.0], [1.0, 2.0, 3.5]),
    ([-4.0, 0.25, 11.0, 2.0], [3.0, 1.0, -2.0, 0.0]),
    ([0.0, 0.0, 1.0], [1.0, 0.0, 0.0]),
]


@pytest.mark.parametrize(("oracle", "candidate"), ROWS)
def test_the_measures_are_what_their_definitions_say(oracle: list[float], candidate: list[float]) -> None:
    position = judged(oracle, candidate)

    assert position.kl_divergence == pytest.approx(kl_by_hand(oracle, candidate), rel=1e-12)
    assert position.cosine == pytest.approx(cosine_by_hand(oracle, candidate), rel=1e-12)
    assert position.max_abs_logit_error == max(abs(a - b) for a, b in zip(oracle, candidate, strict=True))


def test_the_divergence_is_from_the_oracle_and_not_the_other_way_round() -> None:
    oracle, candidate = [0.0, 4.0], [0.0, 0.0]

    assert kl_by_hand(oracle, candidate) != pytest.approx(kl_by_hand(candidate, oracle), rel=0.1)
    assert judged(oracle, candidate).kl_divergence == pytest.approx(kl_by_hand(oracle, candidate), rel=1e-12)


def test_a_known_divergence() -> None:
    # Probabilities 3/4, 1/4 against 1/2, 1/2.
    position = judged([math.log(3.0), 0.0], [0.0, 0.0])

    assert position.kl_divergence == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12)


def test_large_logits_do_not_overflow() -> None:
    position = judged([1e4, 1e4 - 1.0, -1e4], [1e4, 1e4 - 2.0, -1e4])

    assert position.kl_divergence == pytest.approx(kl_by_hand([0.0, -1.0, -700.0], [0.0, -2.0, -700.0]), rel=1e-9)


def test_half_precision_candidates_are_compared_in_double_precision() -> None:
    # 60000 squared is beyond float16, and so would be the norm.
    oracle, candidate = logits([60000.0, 1.0]), logits([60000.0, 2.0], dtype=np.float16)

    (position,) = judge([0], oracle, candidate).positions

    assert position.cosine == pytest.approx(1.0)
    assert position.max_abs_logit_error == 1.0


def test_logits_that_are_all_zero_have_no_direction() -> None:
    assert judged([1.0, 0.0], [0.0, 0.0]).cosine == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------------


def position(index: int, margin: float, *, flipped: bool) -> Position:
    return Position(
        index=index,
        token=0,
        oracle=1,
        candidate=2 if flipped else 1,
        margin=margin,
        cosine=1.0,
        max_abs_logit_error=0.0,
        kl_divergence=0.0,
        router_margin=None,
    )


def test_a_verdict_counts_matches_ties_and_flips_and_puts_the_worst_first() -> None:
    verdict = Verdict(
        (
            position(0, 3.0, flipped=False),
            position(1, 0.05, flipped=True),
            position(2, 0.1, flipped=True),
            position(3, 0.01, flipped=False),
            position(4, 0.9, flipped=True),
        )
    )

    assert (verdict.matched, verdict.ties, [flip.index for flip in verdict.confident_flips]) == (2, 1, [4, 2])
    assert verdict.confident_positions == 3
    assert not verdict.passed


def test_ties_alone_pass() -> None:
    verdict = Verdict((position(0, 0.0999, flipped=True), position(1, 0.0, flipped=True)))

    assert (verdict.passed, verdict.ties, verdict.confident_positions) == (True, 2, 0)


def test_the_router_margin_is_the_smallest_gap_over_layers_between_the_last_chosen_and_the_first_rejected() -> None:
    first = np.array([[4.0, 1.0, 3.0, 2.5], [0.0, 9.0, 8.0, 1.0]], dtype=np.float32)
    second = np.array([[1.0, 2.0, 3.0, 0.0], [5.0, 5.0, 4.0, 4.0]], dtype=np.float32)
    assert router_margins([first, second], chosen=2).tolist() == [0.5, 1.0]
    assert np.isinf(router_margins([first, second], chosen=4)).all()


def test_positions_carry_their_index_token_and_router_margin() -> None:
    rows = logits([0.0, 1.0], [1.0, 0.0])

    routed = judge([11, 12], rows, rows, np.array([0.5, 0.25], np.float32)).positions
    dense = judge([11, 12], rows, rows).positions

    assert [(p.index, p.token, p.router_margin) for p in routed] == [(0, 11, 0.5), (1, 12, 0.25)]
    assert [p.router_margin for p in dense] == [None, None]


@pytest.mark.parametrize(
    ("tokens", "oracle", "candidate"),
    [
        ([1], (1, 4), (1, 5)),
        ([1, 2], (2, 4), (1, 4)),
        ([1], (2, 4), (2, 4)),
        ([1, 2, 3], (2, 4), (2, 4)),
    ],
    ids=["vocabulary", "positions", "fewer tokens", "more tokens"],
)
def test_shapes_that_differ_are_an_error_that_says_them(
    tokens: list[int], oracle: tuple[int, int], candidate: tuple[int, int]
) -> None:
    with pytest.raises(
        ValueError, match=rf"{len(tokens)} tokens, oracle logits \({oracle[0]}, {oracle[1]}\), candidate"
    ):
        judge(tokens, np.zeros(oracle), np.zeros(candidate))


# ---------------------------------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 4), st.integers(2, 12))
VALUES = st.floats(-50, 50, width=32)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Logits, Logits]:
    """Oracle and candidate of one shape, the candidate often near the oracle."""
    shape = draw(SHAPES)
    oracle = draw(arrays(np.float32, shape, elements=VALUES))
    if draw(st.booleans()):
        return oracle, draw(arrays(np.float32, shape, elements=VALUES))
    return oracle, oracle + draw(arrays(np.float32, shape, elements=st.floats(-0.25, 0.25, width=32)))


@given(arrays(np.float32, SHAPES, elements=VALUES))
def test_a_candidate_equal_to_the_oracle_always_passes_without_divergence(oracle: Logits) -> None:
    verdict = judge([0] * len(oracle), oracle, oracle.copy())

    assert verdict.passed
    assert verdict.matched == len(oracle)
    assert [p.kl_divergence for p in verdict.positions] == [0.0] * len(oracle)
    assert [p.max_abs_logit_error for p in verdict.positions] == [0.0] * len(oracle)


@given(pairs(), st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_a_constant_on_all_logits_changes_no_verdict_and_no_divergence(
    pair: tuple[Logits, Logits], of_oracle: int, of_candidate: int
) -> None:
    # In double precision with few bits: sums with the constants are exact, and so are the margins.
    oracle, candidate = (np.round(part.astype(np.float64) * 64) / 64 for part in pair)
    tokens = [0] * len(oracle)

    plain = judge(tokens, oracle, candidate)
    shifted = judge(tokens, oracle + of_oracle, candidate + of_candidate)

    assert [p.verdict for p in shifted.positions] == [p.verdict for p in plain.positions]
    assert [p.margin for p in shifted.positions] == [p.margin for p in plain.positions]
    for before, after in zip(plain.positions, shifted.positions, strict=True):
        assert after.kl_divergence == pytest.approx(before.kl_divergence, rel=1e-9, abs=1e-12)


@given(arrays(np.float32, SHAPES, elements=VALUES), st.data())
def test_a_confident_flip_always_fails(oracle: Logits, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(oracle) - 1))
    best = int(oracle[row].argmax())
    other = data.draw(st.integers(0, oracle.shape[1] - 1))
    assume(other != best)
    second = np.partition(oracle[row].astype(np.float64), -2)[-2]
    assume(float(oracle[row, best]) - second >= CONFIDENT_MARGIN)
    candidate = oracle.copy()
    candidate[row, other] = oracle[row, best] + np.float32(1)

    verdict = judge([0] * len(oracle), oracle, candidate)

    assert not verdict.passed
    assert [flip.index for flip in verdict.confident_flips] == [row]


@given(pairs())
def test_divergence_is_never_negative_and_the_counts_are_complete(pair: tuple[Logits, Logits]) -> None:
    oracle, candidate = pair

    verdict = judge([0] * len(oracle), oracle, candidate)

    assert all(p.kl_divergence >= -1e-12 for p in verdict.positions)
    assert all(-1 - 1e-12 <= p.cosine <= 1 + 1e-12 for p in verdict.positions)
    assert verdict.matched + verdict.ties + len(verdict.confident_flips) == len(oracle)
    assert verdict.passed == (not verdict.confident_flips)
