"""The row quantizer against coreai-opt itself, bit for bit; recipes; 4-bit packing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from attrs import evolve
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization import QuantizationSpec as AppleSpec
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity
from coreai_opt.quantization.spec.factory import QuantizationComponentFactory
from coreai_torch._compression._intx import IntxTensor, UintxTensor
from hypothesis import example, given, settings

from coreai_zoo.catalogue import find_recipe
from coreai_zoo.errors import BadInput
from coreai_zoo.overlay import RoleKind
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import HeadQuantization, QuantizationSpec, Recipe
from coreai_zoo.weights.formats import (
    Format,
    has_zero_points,
    integer_range,
    pack_int4,
    pack_uint6,
    unpack_int4,
    unpack_uint6,
)
from coreai_zoo.weights.quantizer import CHUNK_ELEMENTS, dequantize_rows, quantize_rows
from coreai_zoo_overlays.qwen3_5.table import ROLES
from recipe_roles import spec_of_role

INTEGERS: tuple[Any, ...] = ("int4", "int8", "uint4", "uint8")
SCHEMES: tuple[Any, ...] = ("symmetric", "symmetric_with_clipping", "asymmetric")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def apple_spec(spec: QuantizationSpec) -> AppleSpec:
    granularity = (
        PerChannelGranularity(axis=0)
        if spec.block_size is None
        else PerBlockGranularity(axis=1, block_size=spec.block_size)
    )
    return AppleSpec(dtype=getattr(torch, spec.dtype), qscheme=spec.scheme, granularity=granularity)


def apple_end_to_end(weight: torch.Tensor, spec: QuantizationSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points of a finalized nn.Linear."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    config = ModuleQuantizerConfig(op_state_spec={"weight": apple_spec(spec)}, op_input_spec=None, op_output_spec=None)
    quantizer = Quantizer(torch.nn.Sequential(linear), QuantizerConfig(global_config=config, execution_mode="eager"))
    quantizer.prepare((torch.zeros(1, weight.shape[1], dtype=weight.dtype),))
    final: Any = quantizer.finalize()
    stored = final[0].parametrizations.weight[0]
    return stored.quantized_data, stored.scale, stored.zero_point


def apple_directly(weight: torch.Tensor, spec: QuantizationSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same from coreai-opt's fake-quantize object, without a model around it."""
    fake_quantize = QuantizationComponentFactory.create_fake_quantizer(apple_spec(spec), CompressionTargetTensor.WEIGHT)
    with torch.no_grad():
        fake_quantize(weight)
        scale, zero_point, minval = fake_quantize.calculate_qparams()
        zero_point = zero_point.to(fake_quantize.target_dtype)
        codes = fake_quantize.quantize(weight, scale.to(weight.dtype), zero_point, minval)
    return codes, scale.to(weight.dtype), zero_point


def assert_same_bits(weight: torch.Tensor, spec: QuantizationSpec, theirs: tuple[torch.Tensor, ...]) -> None:
    ours = quantize_rows(weight, spec)
    codes, scales, zero_points = theirs
    assert ours.codes.dtype == codes.dtype and ours.scales.dtype == scales.dtype == weight.dtype
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scales, scales.reshape(ours.scales.shape))
    if ours.zero_points is None:
        assert not zero_points.any()
    else:
        assert ours.zero_points.dtype == zero_points.dtype
        assert torch.equal(ours.zero_points, zero_points.reshape(ours.zero_points.shape))


def make_weight(rows: int, columns: int, dtype: torch.dtype, kind: str, seed: int) -> torch.Tensor:
    random = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    info = torch.finfo(dtype)
    match kind:
        case "normal":
            values = random * 0.02
        case "zero blocks":
            values = random * (torch.arange(columns) >= columns // 2)
        case "subnormal":
            values = random * info.smallest_normal
        case "huge":
            values = random.clamp(-1, 1) * info.max * 0.49  # the range of a block of both signs still fits
        case "negative":
            values = -random.abs() - 1e-3
        case "positive":
            values = random.abs() + 1e-3
        case "outliers":
            values = torch.where(random > 2, random * 300, random * 0.01)
        case "halves":
            values = (random * 254).round() / 2  # every quotient at or near a tie
        case _:
            raise AssertionError(kind)
    return values.to(dtype)


WEIGHT_KINDS = get_args(RoleKind)
KINDS = ("normal", "zero blocks", "subnormal", "huge", "negative", "positive", "outliers", "halves")


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, QuantizationSpec]:
    block = draw(st.sampled_from([None, 2, 4, 6, 16, 32, 64, 128]))
    blocks = draw(st.integers(1, 5))
    columns = 2 * draw(st.integers(1, 70)) if block is None else block * blocks
    spec = QuantizationSpec(draw(st.sampled_from(INTEGERS)), draw(st.sampled_from(SCHEMES)), block)
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(FLOATS))
    return make_weight(draw(st.integers(1, 9)), columns, dtype, kind, draw(st.integers(0, 2**32))), spec


@settings(max_examples=600, deadline=None)
@given(cases())
def test_every_bit_equals_coreai_opts_for_any_shape_dtype_and_scheme(
    case: tuple[torch.Tensor, QuantizationSpec],
) -> None:
    weight, spec = case
    assert_same_bits(weight, spec, apple_directly(weight, spec))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 0x7BFF) | st.integers(0x8000, 0xFBFF), min_size=32, max_size=32),
    st.sampled_from(INTEGERS),
    st.sampled_from(SCHEMES),
)
@example([0x7BFF, 0xFBFF] * 16, "int8", "symmetric")
@example([0x8000] * 32, "uint4", "asymmetric")
@example([0x0001] * 32, "int8", "symmetric_with_clipping")
def test_every_bit_equals_coreai_opts_for_arbitrary_float16_bits(bits: list[int], dtype: Any, scheme: Any) -> None:
    weight = torch.tensor(bits, dtype=torch.uint16).view(torch.float16).view(2, 16)
    spec = QuantizationSpec(dtype, scheme, 8)
    assert_same_bits(weight, spec, apple_directly(weight, spec))


@pytest.mark.parametrize("block", [32, None])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("integer", INTEGERS)
def test_every_bit_equals_a_finalized_linear(integer: Any, scheme: Any, block: int | None) -> None:
    spec = QuantizationSpec(integer, scheme, block)
    for seed, dtype in enumerate(FLOATS):
        weight = make_weight(6, 96, dtype, "outliers", seed)
        assert_same_bits(weight, spec, apple_end_to_end(weight, spec))


def test_chunks_and_workers_do_not_change_a_bit() -> None:
    rows = 3 * CHUNK_ELEMENTS // 1024 + 5
    weight = make_weight(rows, 1024, torch.float16, "outliers", 1)
    spec = QuantizationSpec("uint4", "asymmetric", 32)
    whole = quantize_rows(weight, spec)
    assert_same_bits(weight, spec, apple_directly(weight, spec))
    for start in (0, 7, rows - 3):
        part = quantize_rows(weight[start : start + 3], spec)
        assert torch.equal(part.codes, whole.codes[start : start + 3])
        assert torch.equal(part.scales, whole.scales[start : start + 3])


_THREADS = """
import json, threading, torch
from coreai_zoo.weights.quantizer import CHUNK_ELEMENTS, quantize_rows, workers
from coreai_zoo.recipes import QuantizationSpec

def threads():
    torch.ones(2 * CHUNK_ELEMENTS).half()  # a thread settles on a number when it first computes
    return torch.get_num_threads()

torch.set_num_threads(3)
quantize_rows(torch.ones(2, 2 * CHUNK_ELEMENTS), QuantizationSpec("int8", "symmetric", 32))
of_workers = sorted({workers().submit(threads).result() for _ in range(8)})
others = []
thread = threading.Thread(target=lambda: others.append(threads()))
thread.start()
thread.join()
print(json.dumps([of_workers, threads(), others]))
"""


def test_each_worker_computes_on_one_core_and_all_other_threads_on_as_many_as_before() -> None:
    """In a process of its own: the tests themselves run on one thread each."""
    done = subprocess.run([sys.executable, "-c", _THREADS], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[1], 3, [3]]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("source", [*FLOATS, torch.float64])
def test_rows_are_rounded_to_the_dtype_of_the_weight_first(
    source: torch.dtype, dtype: torch.dtype, scheme: Any
) -> None:
    rows = make_weight(5, 96, torch.float16, "subnormal", 4).to(source) * 1.37
    spec = QuantizationSpec("int8", scheme, 32)
    direct, stepwise = quantize_rows(rows, spec, dtype), quantize_rows(rows.float().to(dtype), spec)
    assert torch.equal(direct.codes, stepwise.codes) and torch.equal(direct.scales, stepwise.scales)
    assert direct.scales.dtype == dtype


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**32))
def test_integers_of_6_bits_are_packed_from_the_lowest_bit_on_and_can_be_unpacked(
    rows: int, fours: int, seed: int
) -> None:
    codes = torch.randint(0, 64, (rows, 4 * fours), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_uint6(codes)
    stream = "".join(f"{int(code):06b}"[::-1] for code in codes.flatten())
    expected = [int(stream[at : at + 8][::-1], 2) for at in range(0, len(stream), 8)]
    assert packed.shape == (rows, 3 * fours) and packed.flatten().tolist() == expected
    assert torch.equal(unpack_uint6(packed), codes.view(torch.uint8))


@pytest.mark.parametrize("scheme", ["symmetric", "symmetric_with_clipping"])
@pytest.mark.parametrize("scales", ["absmax", "mse"])
def test_integers_of_6_bits_are_those_of_their_scales_and_within_their_range(scheme: Any, scales: Any) -> None:
    spec, weight = QuantizationSpec("int6", scheme, 32, scales), make_weight(16, 96, torch.float16, "outliers", 4)
    found = quantize_rows(weight, spec)
    low, high = (-32, 31) if scheme == "symmetric" else (-31, 31)
    assert (int(found.codes.min()), int(found.codes.max())) == (low, high)
    scaled = weight.float() / found.scales.float().repeat_interleave(32, dim=1)
    assert torch.equal(found.codes.float(), scaled.round().clamp(low, high))
    format_ = Format((16, 96), "float16", spec)
    assert {kind: (array.shape, array.dtype) for kind, array in format_.arrays.items()} == {
        "data": ((16, 96), "uint6"), "scales": ((16, 3), "float16"), "table": ((1, 1, 64, 1), "int8"),
    }  # fmt: skip
    assert format_.bytes == 16 * 96 * 6 // 8 + 16 * 3 * 2 + 64
    with pytest.raises(ValueError, match="30 columns are not divisible by 4"):
        Format((2, 30), "float16", evolve(spec, block_size=None))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_dequantized_values_equal_coreai_opts(case: tuple[torch.Tensor, QuantizationSpec]) -> None:
    weight, spec = case
    fake_quantize = QuantizationComponentFactory.create_fake_quantizer(apple_spec(spec), CompressionTargetTensor.WEIGHT)
    with torch.no_grad():
        expected = fake_quantize(weight)
    assert torch.equal(dequantize_rows(quantize_rows(weight, spec), spec).to(weight.dtype), expected)


def test_dequantizing_needs_the_zero_points_of_the_scheme() -> None:
    quantized = quantize_rows(torch.ones(2, 32), QuantizationSpec("int8", "asymmetric"))
    with pytest.raises(ValueError, match="does not fit rows with zero points"):
        dequantize_rows(quantized, QuantizationSpec("int8", "symmetric"))


# ---------------------------------------------------------------------------------------------------------------------
# Scales of the least squared error
# ---------------------------------------------------------------------------------------------------------------------


def searched(block: list[float], spec: QuantizationSpec, dtype: Any) -> dict[float, float]:
    """The squared error of a block by each scale that the search is to try, computed one value at a time, exactly."""
    low, high = integer_range(spec)

    def rounded(scale: float) -> float:
        return max(float(np.float32(dtype(np.float32(scale)))), 2.0**-23)

    def integers(scale: float) -> list[int]:
        quotients = (float(np.float32(value) / np.float32(scale)) for value in block)
        return [min(max(round(quotient), low), high) for quotient in quotients]  # to even, as torch

    def error(scale: float) -> float:
        return math.fsum((code * scale - value) ** 2 for code, value in zip(integers(scale), block, strict=True))

    first = rounded(dtype(max(map(abs, block))) / dtype((high - low) / 2))
    tried = [first, *(rounded(first * (0.95 + 0.1 * step / 15)) for step in range(16))]
    best = min(tried, key=error)
    codes = integers(best)
    squares = math.fsum(code**2 for code in codes)
    if squares:
        tried.append(rounded(math.fsum(c * v for c, v in zip(codes, block, strict=True)) / squares))
    return {scale: error(scale) for scale in tried}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["symmetric", "symmetric_with_clipping"])
@pytest.mark.parametrize("integer", ["int4", "int8"])
@pytest.mark.parametrize("size", [32, 6])
def test_a_scale_by_mse_is_the_best_of_those_tried(integer: Any, scheme: Any, dtype: torch.dtype, size: int) -> None:
    spec = QuantizationSpec(integer, scheme, size, "mse")
    for kind in ("normal", "zero blocks", "outliers", "positive"):
        weight = make_weight(6, 2 * size, dtype, kind, 7)
        scales = quantize_rows(weight, spec).scales
        numpy = {torch.float16: np.float16, torch.float32: np.float32}[dtype]
        for row, found in zip(weight.float().tolist(), scales.float().tolist(), strict=True):
            for at, scale in enumerate(found):
                errors = searched(row[at * size : (at + 1) * size], spec, numpy)
                nearest = min(errors, key=lambda tried: abs(tried - scale))
                assert scale == pytest.approx(nearest, rel=1e-6)
                assert errors[nearest] <= min(errors.values()) * (1 + 1e-5)  # our sums are in float32


def test_integers_by_mse_are_those_that_coreai_opts_arithmetic_makes_of_the_scales() -> None:
    weight = make_weight(8, 64, torch.float16, "outliers", 3)
    for scheme in ("symmetric", "symmetric_with_clipping"):
        spec = QuantizationSpec("int8", scheme, 32, "mse")
        found = quantize_rows(weight, spec)
        low, high = integer_range(spec)
        scales = found.scales.float().repeat_interleave(32, dim=1)
        assert torch.equal(found.codes.float(), (weight.float() / scales).round().clamp(low, high))


@pytest.mark.parametrize(("integer", "most"), [("int8", 0.82), ("int4", 0.91)])
def test_scales_by_mse_have_less_error_than_those_by_the_largest_magnitude(integer: Any, most: float) -> None:
    weight = make_weight(64, 1024, torch.float16, "normal", 5)
    scheme: Any = "symmetric_with_clipping"
    blocks = {
        scales: (dequantize_rows(quantize_rows(weight, spec), spec) - weight.float()).view(64, 32, 32).square().sum(-1)
        for scales in ("absmax", "mse")
        for spec in [QuantizationSpec(integer, scheme, 32, scales)]  # type: ignore[arg-type]
    }
    assert (blocks["mse"] <= blocks["absmax"] * (1 + 1e-6)).all(), "in no block is it worse"
    assert blocks["mse"].sum() < most * blocks["absmax"].sum()


def test_a_scale_that_would_overflow_is_not_taken() -> None:
    weight = make_weight(4, 64, torch.float16, "huge", 2)
    weight[0, 0] = torch.finfo(torch.float16).max
    spec = QuantizationSpec("int4", "symmetric", 32, "mse")
    found = quantize_rows(weight * 1.0, spec)
    assert found.scales.isfinite().all()
    assert (dequantize_rows(found, spec) - weight.float()).abs().max() < weight.abs().max() / 7


def test_chunks_and_blocks_of_any_size_do_not_change_a_scale_by_mse() -> None:
    rows = 2 * CHUNK_ELEMENTS // 1024 + 5
    weight = make_weight(rows, 1024, torch.float16, "outliers", 1)
    spec = QuantizationSpec("int8", "symmetric", 32, "mse")
    whole = quantize_rows(weight, spec)
    for start in (0, 7, rows - 3):
        part = quantize_rows(weight[start : start + 3], spec)
        assert torch.equal(part.codes, whole.codes[start : start + 3])
        assert torch.equal(part.scales, whole.scales[start : start + 3])


@pytest.mark.parametrize(
    ("integer", "scheme"), [("uint8", "symmetric"), ("int8", "asymmetric"), ("uint4", "asymmetric")]
)
def test_scales_by_mse_are_for_signed_integers_alone(integer: Any, scheme: Any) -> None:
    with pytest.raises(ValueError, match="scales by mse are for signed integers without zero points"):
        QuantizationSpec(integer, scheme, 32, "mse")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_shows_in_the_scale_of_its_block(value: float) -> None:
    weight = torch.ones(2, 64, dtype=torch.float16)
    weight[1, 40] = value
    for spec in (
        QuantizationSpec("int8", "symmetric", 32),
        QuantizationSpec("int8", "asymmetric", 32),
        QuantizationSpec("int8", "symmetric", 32, "mse"),
    ):
        scales = quantize_rows(weight, spec).scales
        assert scales.isfinite().tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("rows", "spec", "message"),
    [
        (torch.ones(2, 48), QuantizationSpec("int8", "symmetric", 32), "48 columns are not divisible by the block"),
        (torch.ones(2, 5), QuantizationSpec("int4", "symmetric", None), "5 columns are odd"),
        (torch.ones(2, 0), QuantizationSpec("int8", "symmetric", 32), "0 columns"),
        (torch.ones(64), QuantizationSpec("int8", "symmetric", 32), r"must be \[R, C\]"),
        (torch.ones(2, 32, dtype=torch.float64), QuantizationSpec("int8", "symmetric", 32), "float64"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: torch.Tensor, spec: QuantizationSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_rows(rows, spec)


def test_zero_points_are_left_out_exactly_where_they_are_all_zero() -> None:
    weight = make_weight(4, 64, torch.float16, "normal", 3)
    for integer in INTEGERS:
        for scheme in SCHEMES:
            spec = QuantizationSpec(integer, scheme, 32)
            _, _, theirs = apple_directly(weight, spec)
            assert (quantize_rows(weight, spec).zero_points is not None) == has_zero_points(spec) == bool(theirs.any())


# ---------------------------------------------------------------------------------------------------------------------
# 4-bit packing
# ---------------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32), st.booleans())
def test_packing_is_coreai_torchs_and_can_be_undone(rows: int, pairs: int, seed: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 2 * pairs), generator=generator, dtype=torch.uint8)
    if signed:
        codes = (codes.to(torch.int8) - 8).to(torch.int8)
    apple = (IntxTensor if signed else UintxTensor).from_unpacked(codes, 4)
    packed = pack_int4(codes)
    assert packed.shape == (rows, pairs)
    assert torch.equal(packed.flatten(), apple.elem)
    assert torch.equal(unpack_int4(packed, signed=signed), codes)


@pytest.mark.parametrize("codes", [torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 4, dtype=torch.int16)])
def test_what_cannot_be_packed_is_refused(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="cannot pack"):
        pack_int4(codes)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_built_in_recipes_are_these() -> None:
    assert {name: recipe.published_name for name, recipe in RECIPES.items()} == {
        "fp16": "fp16",
        "int8lin": "int8lin_block32",
        "int8hu": "int8hu_block32_sym",
        "int8mse": "int8hu_block32_mse_sym",
        "int4lin": "int4lin_block32",
        "int4hu8": "int4hu_block32_embedding_head_int8_block32_sym",
    }
    body = {"attention", "gdn.in", "gdn.out", "mlp", "moe.expert"}
    quantized = {name: {role.name for role in ROLES if spec_of_role(recipe, role)} for name, recipe in RECIPES.items()}
    with_head = body | {"head"}
    assert quantized == {
        "fp16": set(),
        "int8lin": body,
        "int8hu": with_head,
        "int8mse": with_head,
        "int4lin": body,
        "int4hu8": with_head | {"embedding"},
    }
    assert str(RECIPES["int8hu"].specs["head"]) == "int8 block 32 symmetric"
    assert str(RECIPES["int8hu"].specs["body"]) == "int8 block 32 symmetric_with_clipping"
    assert str(RECIPES["int4lin"].specs["body"]) == "int4 block 32 symmetric_with_clipping"


def test_a_recipe_must_decide_every_kind_of_weight() -> None:
    specs = dict.fromkeys(WEIGHT_KINDS)
    del specs["other"]
    with pytest.raises(BadInput, match=r"'half' leaves other undecided\. .*The kinds are embedding, head, "):
        Recipe.by_role("half", "", specs)


def test_a_recipe_may_decide_single_roles_otherwise_than_their_kind() -> None:
    one, other = QuantizationSpec("int8", "symmetric"), QuantizationSpec("int4", "symmetric")
    recipe = Recipe.by_role("r", "", {**dict.fromkeys(WEIGHT_KINDS), "body": one, "mlp": other, "moe.router": one})
    found = {role.name: spec_of_role(recipe, role) for role in ROLES}
    chosen = {"attention": one, "gdn.in": one, "gdn.out": one, "moe.expert": one, "mlp": other}
    assert found == {**dict.fromkeys(found), **chosen, "moe.router": one}


def test_a_recipe_cannot_be_changed_through_the_mapping_that_made_it() -> None:
    roles: dict[str, QuantizationSpec | None] = dict.fromkeys(WEIGHT_KINDS)
    recipe = Recipe.by_role("r", "", roles)
    roles["head"] = QuantizationSpec("int8", "symmetric")
    assert recipe.specs["head"] is None


def test_the_head_policy_decides_how_and_the_recipe_whether() -> None:
    policy = HeadQuantization(QuantizationSpec("uint8", "asymmetric", 64), "a reason")
    assert RECIPES["int8hu"].with_head(policy).specs["head"] == policy.spec
    assert RECIPES["int8hu"].with_head(None) == RECIPES["int8hu"]
    assert RECIPES["int8lin"].with_head(policy) is RECIPES["int8lin"]


def test_another_head_policy_than_the_recipes_own_shows_in_the_name() -> None:
    own, recipe = RECIPES["int8hu"].specs["head"], RECIPES["int8hu"]
    assert own is not None
    assert recipe.with_head(HeadQuantization(own, "a reason")).published_name == "int8hu_block32_sym"
    other = HeadQuantization(QuantizationSpec("uint8", "asymmetric", 64), "a reason")
    assert recipe.with_head(other).published_name == "int8hu_block32_sym_head_uint8_block64_asym"
    assert RECIPES["int8lin"].with_head(other).published_name == "int8lin_block32"


def test_an_unknown_recipe_is_answered_with_the_nearest_names() -> None:
    assert find_recipe("int8hu", default_plugins()) is RECIPES["int8hu"]
    with pytest.raises(BadInput, match=r"no recipe 'int8hy'\. Did you mean int8hu"):
        find_recipe("int8hy", default_plugins())
    with pytest.raises(BadInput, match="There are fp16, int4hu8, int4lin, int8hu, int8lin, int8mse"):
        find_recipe("zzz", default_plugins())
