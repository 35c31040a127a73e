"""Bounds on the measures: damage that flips nothing is caught all the same."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from attrs import evolve

from coreai_zoo.bounds import GENERAL, Bounds, Measured, MeasuredBounds
from coreai_zoo.errors import BadInput
from coreai_zoo.gate import Activations
from coreai_zoo.gates.bounds import BoundCheck, check_bounds, check_control
from coreai_zoo.gates.rule import Position, Verdict, compare, router_swaps
from coreai_zoo.gates.run import _bounds
from coreai_zoo.plugins import default_plugins
from coreai_zoo_qwen36.bounds import BOUNDS as SAMPLES

BOUNDS = Bounds(
    "test",
    "torch",
    median_error=0.01,
    error=0.05,
    near_tie_error=0.5,
    cosine=0.99,
    median_kl=0.001,
    kl=0.01,
    hidden_error=0.02,
    over_control=2.0,
    layers=8,
    measured_on="nothing",
    router_gap=0.005,
)
PLAIN = SAMPLES.of_recipe({}, 8, "torch", "routed")
ROUTER_NEAR_TIE = 0.005


def position(index: int = 0, **changes: object) -> Position:
    plain = Position(
        index=index,
        token=0,
        oracle=1,
        candidate=1,
        margin=3.0,
        cosine=1.0,
        max_abs_logit_error=0.0,
        kl_divergence=0.0,
        router_margin=None,
        relative_error=0.005,
    )
    return evolve(plain, **changes)


def broken(verdict: Verdict) -> list[str]:
    return [check.name for check in check_bounds(verdict, BOUNDS) if not check.passed]


def test_a_candidate_within_its_bounds_breaks_none() -> None:
    verdict = Verdict(tuple(position(index) for index in range(5)), hidden_error=(0.0, 0.01, 0.02))

    assert broken(verdict) == []
    assert len(check_bounds(verdict, BOUNDS)) == 6


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"relative_error": 0.051}, "largest relative error"),
        ({"cosine": 0.9899}, "lowest cosine"),
        ({"kl_divergence": 0.011}, "largest KL"),
    ],
)
def test_one_bad_position_breaks_the_bound_on_extremes(change: dict[str, float], name: str) -> None:
    positions = [position(index) for index in range(5)]
    positions[3] = evolve(positions[3], **change)

    assert broken(Verdict(tuple(positions))) == [name]


@pytest.mark.parametrize(
    ("change", "name"),
    [({"relative_error": 0.011}, "median relative error"), ({"kl_divergence": 0.0011}, "median KL")],
)
def test_damage_that_is_small_everywhere_breaks_the_bound_on_the_median(change: dict[str, float], name: str) -> None:
    assert broken(Verdict(tuple(position(index, **change) for index in range(5)))) == [name]


def test_one_bad_layer_breaks_the_bound_on_hidden_states() -> None:
    verdict = Verdict((position(),), hidden_error=(0.0, 0.021, 0.0))

    assert broken(verdict) == ["largest hidden-state error of a layer"]


def test_logits_that_are_not_finite_break_bounds() -> None:
    bad = position(relative_error=math.inf, kl_divergence=math.inf, cosine=0.0)

    assert set(broken(Verdict((bad,)))) >= {"median relative error", "largest relative error", "lowest cosine"}


# ---------------------------------------------------------------------------------------------------------------------
# Routers
# ---------------------------------------------------------------------------------------------------------------------


def test_a_position_at_a_router_near_tie_is_held_to_the_looser_bound_and_to_the_median() -> None:
    swapped = position(2, relative_error=0.4, cosine=0.9, kl_divergence=0.2, router_margin=ROUTER_NEAR_TIE / 2)
    firm = [position(index, router_margin=1.0) for index in (0, 1)]

    assert broken(Verdict((*firm, swapped))) == []
    assert broken(Verdict((*firm, evolve(swapped, relative_error=0.51)))) == [
        "largest relative error at router near-ties"
    ]
    assert "largest relative error" in broken(Verdict((*firm, evolve(swapped, router_margin=ROUTER_NEAR_TIE))))
    assert "median relative error" in broken(Verdict((firm[0], swapped, evolve(swapped, index=3))))


def test_where_the_router_is_known_only_a_swap_at_a_near_tie_excuses() -> None:
    near = {"relative_error": 0.4, "router_margin": ROUTER_NEAR_TIE / 2}

    assert position(**near).near_tie(ROUTER_NEAR_TIE)
    assert not position(**near, experts_changed=False).near_tie(ROUTER_NEAR_TIE)
    assert position(**near, experts_changed=True, swap_margin=ROUTER_NEAR_TIE / 2).near_tie(ROUTER_NEAR_TIE)
    assert not position(**near, experts_changed=True, swap_margin=1.0).near_tie(ROUTER_NEAR_TIE)


def test_a_swap_is_told_by_the_oracles_gap_in_the_first_layer_that_differs() -> None:
    first = np.array([[4.0, 1.0, 3.0, 2.5], [0.0, 9.0, 8.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    second = np.array([[1.0, 2.0, 3.0, 0.0], [5.0, 5.1, 4.0, 4.5], [1.0, 2.0, 3.0, 4.0]])
    ours = first.copy(), second.copy()
    ours[0][0] = [4.0, 1.0, 2.5, 3.2]  # the second chosen and the first rejected change places, half a logit apart
    ours[1][0] = [3.0, 2.0, 1.0, 0.0]  # and then so do others, a logit apart
    ours[1][1] = [5.1, 5.0, 4.0, 4.5]  # another order of the chosen is no swap

    assert router_swaps((first, second), ours, chosen=2) == [(True, 0.5), (False, None), (False, None)]


def test_comparing_gives_hidden_states_and_swaps_where_both_show_them() -> None:
    generator = np.random.default_rng(0)
    rows, hidden = generator.normal(size=(4, 9)), [generator.normal(size=(4, 6)) for _ in range(3)]
    routers = [generator.normal(size=(4, 8)) for _ in range(2)]
    oracle = Activations(rows, hidden, routers)
    off = [hidden[0], hidden[1] * 1.01, hidden[2] * 0.98]

    both = compare([1, 2, 3, 4], oracle, Activations(rows, off, routers), experts_per_token=2)
    plain = compare([1, 2, 3, 4], oracle, Activations(rows), experts_per_token=2)

    assert both.hidden_error == pytest.approx((0.0, 0.01, 0.02))
    assert [p.experts_changed for p in both.positions] == [False] * 4
    assert plain.hidden_error is None
    assert [p.experts_changed for p in plain.positions] == [None] * 4
    assert [p.router_margin is None for p in plain.positions] == [False] * 4


def test_the_hidden_error_of_a_layer_is_the_median_and_what_is_not_finite_is_as_far_off_as_can_be() -> None:
    rows, stream = np.eye(3), np.ones((3, 2))
    one, two = stream.copy(), stream.copy()
    one[1:] = [[1.1, 1.1], [math.nan, 1.0]]
    two[1:] = [[1.0, math.inf], [math.nan, 1.0]]

    found = compare([0, 1, 2], Activations(rows, [stream] * 2), Activations(rows, [one, two]))

    assert found.hidden_error == pytest.approx((0.1, math.inf))


def test_the_relative_error_is_in_units_of_the_oracles_spread() -> None:
    oracle = np.array([[11.0, 9.0, 13.0, 7.0]])  # standard deviation: root of 5
    candidate = oracle + np.array([[0.1, -0.1, 0.1, -0.1]])

    (found,) = compare([0], Activations(oracle), Activations(candidate)).positions

    assert found.relative_error == pytest.approx(0.1 / math.sqrt(5))


# ---------------------------------------------------------------------------------------------------------------------
# Recipes, depth, control
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "name"),
    [
        ({"mlp": None}, "fp16"),
        ({"mlp": {"dtype": "int8"}, "head": None}, "int8"),
        ({"mlp": {"dtype": "uint4"}, "head": {"dtype": "int8"}}, "int4"),
        ({"mlp": {"dtype": "int8"}, "head": {"dtype": "uint8"}}, "int8"),
    ],
)
def test_a_recipe_has_the_bounds_of_its_coarsest_integers(roles: dict[str, dict[str, str] | None], name: str) -> None:
    assert SAMPLES.of_recipe(roles, SAMPLES.layers, "runtime") == SAMPLES.of_class(name, "runtime")
    in_bfloat16 = SAMPLES.of_recipe(roles, SAMPLES.layers, "runtime", compute_dtype="bfloat16")
    assert in_bfloat16 == SAMPLES.of_class("bf16" if name == "fp16" else f"{name}-bf16", "runtime")


@pytest.mark.parametrize("key", SAMPLES.rows, ids=" ".join)
def test_a_flip_is_an_error_from_the_margin_of_its_precision_on_or_twice_what_was_measured(
    key: tuple[Any, ...],
) -> None:
    measured = SAMPLES.rows[key].flip_margin
    if key[0].endswith("bf16"):
        assert SAMPLES.of_class(*key).margin == max(0.8, 2 * measured)
    else:
        assert measured == 0 and SAMPLES.of_class(*key).margin == 0.1


@pytest.mark.parametrize("arithmetic", ["torch", "runtime"])
def test_coarser_recipes_have_wider_bounds(arithmetic: str) -> None:
    fp16, int8, int6, int4 = (SAMPLES.of_class(name, arithmetic) for name in ("fp16", "int8", "int6", "int4"))

    for key in ("median_error", "error", "kl", "over_control"):
        assert getattr(fp16, key) < getattr(int8, key) < getattr(int6, key) < getattr(int4, key)
    assert fp16.cosine > int8.cosine > int6.cosine > int4.cosine


@pytest.mark.parametrize("key", GENERAL.rows, ids=" ".join)
def test_the_general_bounds_are_looser_than_those_of_the_samples_but_not_idle(key: tuple[Any, ...]) -> None:
    ours, general = SAMPLES.of_class(*key), GENERAL.of_class(*key)

    for name in ("median_error", "error", "near_tie_error", "median_kl", "kl", "hidden_error", "over_control"):
        looser, tighter = (getattr(bounds, name) for bounds in (general, ours))
        assert looser >= 1.9 * tighter, name  # of routed models at least twice, but for rounding
    assert general.cosine < ours.cosine
    # Coarse integers of miniatures allow nearly anything but a flip; the others must still say something.
    cosine, error = {
        "fp16": (0.97, 0.04),
        "int8": (0.95, 0.04),
        "int6": (0.9, 0.12),
        "int4": (-2, 0.4),
        "bf16": (0.94, 0.08),
        "int8-bf16": (0.86, 0.11),
        "int6-bf16": (0.93, 0.11),
        "int4-bf16": (-2, 0.4),
    }[key[0]]
    assert general.cosine > cosine and general.median_error < error


def test_a_class_of_recipes_that_a_family_did_not_measure_has_the_general_bounds() -> None:
    row = Measured(0.001, 0.002, 0, 1e-5, 1e-6, 1e-5, 0.001, 1.0)
    family = MeasuredBounds("two models", 4, {("fp16", "torch", "dense"): row}, {})

    assert family.of_class("fp16", "torch").error == 0.004
    assert (family.of_class("fp16", "torch").layers, family.of_class("fp16", "torch").measured_on) == (4, "two models")
    assert family.of_class("int8", "torch") == GENERAL.of_class("int8", "torch")
    assert family.of_recipe({}, 16, "torch").error == pytest.approx(0.008), "errors grow from the measured depth on"
    with pytest.raises(BadInput, match=r"no bounds for recipes of the class int3\..*zoo_gate_bounds"):
        family.of_recipe({"mlp": {"dtype": "int3"}}, 4, "torch")


def test_a_routed_row_without_a_router_gap_is_refused() -> None:
    row = Measured(0.001, 0.002, 0.1, 1e-5, 1e-6, 1e-5, 0.001, 1.0)

    with pytest.raises(ValueError, match="no router gap for fp16"):
        MeasuredBounds("two models", 4, {("fp16", "torch", "routed"): row}, {})


@pytest.mark.parametrize("measured", [SAMPLES, GENERAL], ids=["samples", "general"])
def test_the_documentation_has_the_bounds(root: Path, measured: MeasuredBounds) -> None:
    assert measured.table() in (root / "docs" / "gate.md").read_text(encoding="utf-8")


def test_deeper_models_have_wider_bounds_and_shallower_ones_have_not_narrower_ones() -> None:
    bounds, deeper = SAMPLES.of_class("int8", "torch"), 4 * SAMPLES.layers

    assert SAMPLES.of_recipe({"mlp": {"dtype": "int8"}}, deeper, "torch").error == pytest.approx(2 * bounds.error)
    assert bounds.for_depth(deeper).kl == pytest.approx(4 * bounds.kl)
    assert bounds.for_depth(2).error == bounds.error


def test_a_candidate_that_is_far_worse_than_its_control_fails() -> None:
    control = Verdict((position(relative_error=1e-4),))
    fine, worse = (Verdict((position(relative_error=error),)) for error in (2e-4, 2.1e-4))

    assert {check.passed for check in check_control(fine, control, BOUNDS, PLAIN)} == {True}
    assert [check.name for check in check_control(worse, control, BOUNDS, PLAIN) if not check.passed] == [
        "median relative error over the control's"
    ]


def test_a_candidate_beside_a_control_without_an_error_is_infinitely_worse() -> None:
    right, wrong = (Verdict((position(relative_error=error),)) for error in (0.0, 1e-9))

    assert [check_control(found, right, BOUNDS, PLAIN)[0].passed for found in (right, wrong)] == [True, False]


def test_the_bounds_of_plain_weights_are_the_controls_and_not_the_candidates() -> None:
    control, noisy = (Verdict((position(relative_error=error),)) for error in (5e-4, 5e-3))
    checks = check_control(noisy, control, SAMPLES.of_class("int8", "torch"), SAMPLES.of_recipe({}, 8, "torch"))

    assert [check.name for check in checks if not check.passed] == []


def test_what_is_no_number_keeps_no_bound() -> None:
    assert not BoundCheck("error", math.nan, 1.0).passed
    assert not BoundCheck("cosine", math.nan, 0.5, at_least=True).passed


def test_a_control_that_is_wrong_itself_fails_a_bundle_of_any_recipe() -> None:
    wrong = Verdict((position(relative_error=0.04, cosine=0.999),))
    checks = check_control(wrong, wrong, SAMPLES.of_class("int4", "torch"), SAMPLES.of_recipe({}, 8, "torch"))

    failed = [check.name for check in checks if not check.passed]
    assert "control: median relative error" in failed
    assert all(name.startswith("control: ") for name in failed)


@pytest.mark.parametrize(
    ("record", "own"),
    [
        ({"sample": True, "entry": {"name": "it", "differences": ["layers is 8"]}}, True),
        ({"sample": False, "entry": {"name": "it", "differences": []}}, True),
        ({"sample": False, "entry": {"name": "it", "differences": ["layers is 8"]}}, False),
        ({"sample": False, "entry": None}, False),
    ],
)
def test_the_familys_bounds_hold_for_samples_and_models_of_entries_alone(record: dict[str, Any], own: bool) -> None:
    plugins = default_plugins()
    overlay, _ = plugins.claim_overlay("qwen3_5", {"model_type": "qwen3_5"})
    bundle: Any = SimpleNamespace(build=record)
    assert _bounds(bundle, overlay, plugins) is (plugins.gate_bounds(overlay) if own else GENERAL)
