"""Planning: which checkpoint tensor fills which rows of which parameter, and every way in which that can fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from coreai_zoo.checkpoint.headers import TensorInfo
from coreai_zoo.checkpoint.originals import NotOriginal
from coreai_zoo.errors import BadInput
from coreai_zoo.overlay import Drop, Part, Prefix, Transform, WeightMap, WeightRule
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import QuantizationSpec, Recipe
from coreai_zoo.weights.plan import (
    ParameterInfo,
    PlannedTensor,
    Source,
    WeightPlan,
    plan_weights,
    plan_without_checkpoint,
)
from coreai_zoo_overlays.qwen3_5.table import ROLES
from recipe_roles import spec_of_role

FP16, INT8 = RECIPES["fp16"], RECIPES["int8hu"]
EXPERTS = (
    WeightRule("l.{n}.experts.gate_up", "l.{n}.gate_up", "moe.expert"),
    WeightRule("l.{n}.experts.{e}.gate.weight", "l.{n}.gate_up", "moe.expert", part=Part("e", 0, 2)),
    WeightRule("l.{n}.experts.{e}.up.weight", "l.{n}.gate_up", "moe.expert", part=Part("e", 1, 2)),
)


def tensors(dtype: str = "bfloat16", /, **shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(key, shape, dtype, Path("model.safetensors")) for key, shape in shapes.items()}


def floats(**shapes: tuple[int, ...]) -> dict[str, ParameterInfo]:
    return {name: ParameterInfo(shape, "float16") for name, shape in shapes.items()}


def rule(source: str, target: str = "", role: str = "mlp") -> WeightRule:
    return WeightRule(source, target or source, role)


def plan(
    rules: tuple[WeightRule, ...],
    parameters: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    recipe: Recipe = FP16,
    drops: tuple[Drop, ...] = (),
    prefixes: tuple[Prefix, ...] = (),
) -> WeightPlan:
    return plan_weights(WeightMap(rules, drops, prefixes, roles=ROLES), floats(**parameters), tensors(**found), recipe)


def test_planning_does_not_import_torch() -> None:
    code = "import coreai_zoo.weights.plan, coreai_zoo.weights.store, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tensors_follow_the_order_of_the_parameters_and_carry_role_and_spec() -> None:
    result = plan(
        (rule("l.{n}.w"), rule("norm", role="norm")),
        {"norm": (64,), "l.1.w": (2, 64), "l.0.w": (2, 64)},
        {"l.0.w": (2, 64), "l.1.w": (2, 64), "norm": (64,)},
        recipe=INT8,
    )
    assert [tensor.name for tensor in result.tensors] == ["norm", "l.1.w", "l.0.w"]
    assert [tensor.quantization for tensor in result.tensors] == [None, INT8.specs["body"], INT8.specs["body"]]
    assert [tensor.role for tensor in result.tensors] == ["norm", "mlp", "mlp"]
    assert result.tensors[1].sources == (Source("l.1.w", 0, 2),)
    assert result.parameters == 64 + 2 * 128


def test_one_key_may_fill_several_parameters() -> None:
    rules = (rule("embed", role="embedding"), rule("embed", "head", "head"))
    result = plan(rules, {"embed": (4, 32), "head": (4, 32)}, {"embed": (4, 32)}, recipe=INT8)
    assert [(tensor.name, tensor.sources[0].key) for tensor in result.tensors] == [
        ("embed", "embed"),
        ("head", "embed"),
    ]
    assert [tensor.quantization is None for tensor in result.tensors] == [True, False]


def test_experts_packed_in_one_key_fill_the_parameter_whole() -> None:
    result = plan(EXPERTS, {"l.3.gate_up": (2, 6, 5)}, {"l.3.experts.gate_up": (2, 6, 5)})
    assert result.tensors[0].sources == (Source("l.3.experts.gate_up", 0, 12),)


def test_experts_one_by_one_fill_slabs_in_order() -> None:
    keys = {f"l.0.experts.{e}.{part}.weight": (3, 5) for e in (1, 0) for part in ("up", "gate")}
    result = plan(EXPERTS, {"l.0.gate_up": (2, 6, 5)}, keys)
    assert result.tensors[0].sources == (
        Source("l.0.experts.0.gate.weight", 0, 3),
        Source("l.0.experts.0.up.weight", 3, 6),
        Source("l.0.experts.1.gate.weight", 6, 9),
        Source("l.0.experts.1.up.weight", 9, 12),
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.randoms())
def test_sources_cover_every_row_once_for_any_experts_and_pieces(
    experts: int, pieces: int, height: int, columns: int, random: object
) -> None:
    rules = tuple(WeightRule(f"e.{{i}}.p{p}", "w", "moe.expert", part=Part("i", p, pieces)) for p in range(pieces))
    keys = {f"e.{i}.p{p}": (height, columns) for i in range(experts) for p in range(pieces)}
    shuffled = dict(sorted(keys.items(), key=lambda _: random.random()))  # type: ignore[attr-defined]
    (tensor,) = plan(rules, {"w": (experts, pieces * height, columns)}, shuffled).tensors
    rows = [row for source in tensor.sources for row in range(source.start, source.stop)]
    assert rows == list(range(tensor.format.rows))
    for index, source in enumerate(tensor.sources):
        assert source.key == f"e.{index // pieces}.p{index % pieces}"


def test_a_prefix_is_another_spelling_and_does_not_touch_keys_spelled_in_full() -> None:
    prefixes = (Prefix("model.", "model.language_model."),)
    rules = (rule("model.language_model.w", "w"),)
    for key in ("model.w", "model.language_model.w"):
        assert plan(rules, {"w": (2, 4)}, {key: (2, 4)}, prefixes=prefixes).tensors[0].sources[0].key == key
    with pytest.raises(BadInput, match=r"filled twice: w by model\.language_model\.w and model\.w"):
        plan(rules, {"w": (2, 4)}, {"model.w": (2, 4), "model.language_model.w": (2, 4)}, prefixes=prefixes)


def test_drops_are_reported_with_their_reason_in_every_spelling() -> None:
    result = plan(
        (rule("m.w", "w"),),
        {"w": (4,)},
        {"m.w": (4,), "m.visual.blocks.0.w": (1,), "lm.m.visual.x": (1,), "mtp.3.bias": (1,)},
        drops=(Drop("m.visual.**", "vision tower"), Drop("mtp.{i}.bias", "extra head")),
        prefixes=(Prefix("lm.", ""),),
    )
    assert result.dropped == (
        ("m.visual.blocks.0.w", "vision tower"),
        ("lm.m.visual.x", "vision tower"),
        ("mtp.3.bias", "extra head"),
    )


def test_a_rule_whose_parameter_does_not_exist_leaves_its_key_to_the_drops() -> None:
    rules, drops = (rule("l.{n}.w"),), (Drop("l.{n}.w", "beyond the slice"),)
    result = plan(rules, {"l.0.w": (4,)}, {"l.0.w": (4,), "l.1.w": (4,)}, drops=drops)
    assert result.dropped == (("l.1.w", "beyond the slice"),)
    with pytest.raises(BadInput, match=r"unknown to the weight map: l\.1\.w"):
        plan(rules, {"l.0.w": (4,)}, {"l.0.w": (4,), "l.1.w": (4,)})


def test_literal_numbers_in_patterns_match_themselves_only() -> None:
    assert plan((rule("conv1d.{n}.w2"),), {"conv1d.5.w2": (4,)}, {"conv1d.5.w2": (4,)}).tensors[0].parameters == 4
    with pytest.raises(BadInput, match=r"unknown to the weight map: conv2d\.5\.w2"):
        plan((rule("conv1d.{n}.w2"),), {"conv1d.5.w2": (4,)}, {"conv1d.5.w2": (4,), "conv2d.5.w2": (4,)})


def test_one_placeholder_twice_must_be_the_same_number() -> None:
    rules = (rule("l.{n}.again.{n}", "l.{n}"),)
    with pytest.raises(BadInput, match=r"missing: l\.1\.again\.1 for l\.1; unknown to the weight map: l\.1\.again\.2"):
        plan(rules, {"l.1": (4,)}, {"l.1.again.2": (4,)})


def test_numbers_have_one_spelling() -> None:
    with pytest.raises(BadInput, match=r"unknown to the weight map: l\.01"):
        plan((rule("l.{n}"),), {"l.1": (4,)}, {"l.1": (4,), "l.01": (4,)})


def test_a_source_may_hold_the_same_rows_in_another_shape() -> None:
    conv = WeightRule("conv", "conv", "gdn.conv", source_shape=lambda shape: (shape[0], 1, shape[1]))
    assert plan((conv,), {"conv": (6, 4)}, {"conv": (6, 1, 4)}).tensors[0].sources == (Source("conv", 0, 6),)
    with pytest.raises(
        NotOriginal,
        match=r"converted for MLX.*misshapen: conv is \[6, 4, 1\], expected \[6, 1, 4\] for conv\. Use the or",
    ):
        plan((conv,), {"conv": (6, 4)}, {"conv": (6, 4, 1)})  # as MLX stores it


def test_every_problem_is_in_one_error() -> None:
    rules = (rule("a"), rule("b"), rule("c"), rule("d"), rule("d2", "d"), *EXPERTS)
    parameters = {"a": (2, 32), "b": (2, 32), "c": (2, 33), "d": (2, 32), "l.0.gate_up": (2, 4, 32), "lost": (3,)}
    found = tensors(b=(32, 2), c=(2, 33), d=(2, 32), d2=(2, 32), extra=(1,))
    found |= tensors(**{"l.0.experts.0.gate.weight": (2, 32)})
    found |= tensors("int32", **{"l.0.experts.1.up.weight": (2, 32)})
    with pytest.raises(BadInput) as caught:
        plan_weights(WeightMap(rules, roles=ROLES), floats(**parameters), found, INT8)
    assert str(caught.value) == (
        "The checkpoint does not fit the model (8 problems). "
        "missing: a, part of l.0.gate_up: l.0.experts.0.up.weight, l.0.experts.1.gate.weight, "
        "lost (no weight rule fills it); "
        "unknown to the weight map: extra; "
        "misshapen: b is [32, 2], expected [2, 32] for b; "
        "filled twice: d by d and d2; "
        "not floating point: l.0.experts.1.up.weight (int32); "
        "not divisible by the recipe's block: c (mlp, int8 block 32 symmetric_with_clipping: "
        "33 columns are not divisible by the block size 32). "
        "Check that it is a checkpoint of this architecture, complete and original."
    )


def test_problems_that_differ_in_a_number_are_one_with_their_count() -> None:
    wide = {f"l.{n}.up.w": (2, 33) for n in range(30)} | {f"l.{n}.q.w": (2, 33) for n in range(2)}
    table = WeightMap((rule("l.{n}.up.w"), rule("l.{n}.q.w", role="attention")))
    with pytest.raises(BadInput) as caught:
        plan_without_checkpoint(table, floats(**wide), INT8)
    spec = "int8 block 32 symmetric_with_clipping: 33 columns are not divisible by the block size 32"
    assert str(caught.value) == (
        "The recipe does not fit the model (32 problems). not divisible by the recipe's block: "
        f"30 x l.*.up.w (mlp, {spec}), l.0.q.w (attention, {spec}), l.1.q.w (attention, {spec}). "
        "Choose a recipe with blocks that divide them, or one that leaves these roles alone."
    )


def test_a_missing_parameter_names_every_key_that_could_fill_it() -> None:
    expected = (
        r"missing: l\.7\.experts\.gate_up or l\.7\.experts\.\{e\}\.gate\.weight or l\.7\.experts\.\{e\}\.up\.weight "
        r"for l\.7\.gate_up"
    )
    with pytest.raises(BadInput, match=expected):
        plan(EXPERTS, {"l.7.gate_up": (2, 4, 8)}, {})


def test_packed_and_single_experts_together_fill_rows_twice() -> None:
    keys = {"l.0.experts.gate_up": (1, 4, 8), "l.0.experts.0.gate.weight": (2, 8)}
    with pytest.raises(BadInput, match=r"filled twice: l\.0\.gate_up"):
        plan(EXPERTS, {"l.0.gate_up": (1, 4, 8)}, keys)


def test_an_expert_beyond_the_parameter_is_unknown() -> None:
    keys = {f"l.0.experts.{e}.{part}.weight": (2, 8) for e in (0, 1) for part in ("gate", "up")}
    with pytest.raises(
        BadInput, match=r"unknown to the weight map: l\.0\.experts\.1\.gate\.weight, l\.0\.experts\.1\.up"
    ):
        plan(EXPERTS, {"l.0.gate_up": (1, 4, 8)}, keys)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (rule("a", "b.{n}"), r"has no \{n\}"),
        (rule("w{e}", "w"), "not a whole part"),
        (WeightRule("a", "w", "mlp", part=Part("e")), r"has no \{e\}"),
        (WeightRule("w.{e}", "w", "mlp", part=Part("e", 0, 3)), "does not divide"),
        (WeightRule("w.{e}", "w", "mlp", part=Part("e", 2, 2)), "does not divide"),
        (WeightRule("w.{e}", "w", "mlp", part=Part("e"), source_shape=lambda s: (s[1], s[0])), "other rows"),
    ],
)
def test_a_table_that_cannot_work_is_the_overlays_bug(wrong: WeightRule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan((wrong,), {"w": (2, 4, 8)}, {"w.0": (4, 8)})


@pytest.mark.parametrize(
    "other",
    [
        WeightRule("e.{i}.b", "w", "moe.expert", Transform("double", lambda x: x * 2), part=Part("i", 1, 2)),
        WeightRule("e.{i}.b", "w", "mlp", part=Part("i", 1, 2)),
        WeightRule("e.{i}.b", "w", "moe.expert", part=Part("i", 1, 2), read_transposed=True),
    ],
)
def test_rules_that_fill_one_parameter_must_agree(other: WeightRule) -> None:
    rules = (WeightRule("e.{i}.a", "w", "moe.expert", part=Part("i", 0, 2)), other)
    with pytest.raises(ValueError, match="differ in role, transform or read_transposed"):
        plan(rules, {"w": (1, 2, 4)}, {"e.0.a": (1, 4), "e.0.b": (1, 4)})


@pytest.mark.parametrize(("shape", "dtype"), [((2, 0), "float16"), ((2, 2), "int8"), ((2, 2), "float64")])
def test_a_parameter_that_cannot_be_stored_is_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match=r"shape|dtype"):
        ParameterInfo(shape, dtype)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, 6 * 64 * 2),
        (QuantizationSpec("int8", "symmetric", 32), 6 * 64 + 12 * 2),
        (QuantizationSpec("int8", "asymmetric", 32), 6 * 64 + 12 * 2 + 12),
        (QuantizationSpec("uint4", "asymmetric", 32), 6 * 32 + 12 * 2 + 6),
        (QuantizationSpec("uint4", "symmetric", None), 6 * 32 + 6 * 2 + 3),
        (QuantizationSpec("int4", "symmetric", None), 6 * 32 + 6 * 2),
    ],
)
def test_stored_bytes_count_integers_scales_and_zero_points(spec: QuantizationSpec | None, expected: int) -> None:
    tensor = PlannedTensor("w", "mlp", (2, 3, 64), "float16", spec, None, ())
    assert (tensor.format.rows, tensor.format.columns, tensor.parameters, tensor.format.bytes) == (6, 64, 384, expected)


def test_every_recipe_can_plan_every_role() -> None:
    rules = tuple(rule(f"w.{role.name}", role=role.name) for role in ROLES)
    shapes = {f"w.{role.name}": (2, 64) for role in ROLES}
    for recipe in RECIPES.values():
        table = WeightMap(rules, roles=ROLES)
        result = plan_weights(table, floats(**shapes), tensors(**shapes), recipe)
        assert {tensor.role: tensor.quantization for tensor in result.tensors} == {
            role.name: spec_of_role(recipe, role) for role in ROLES
        }
