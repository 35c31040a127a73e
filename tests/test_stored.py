"""What an asset shows of how its weights are stored, and what a bundle's name claims of that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attrs import evolve

from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import checkpoint_of
from coreai_zoo.bundle.stored import StoredForm, _uses_lowest, check_stored, stored_forms
from coreai_zoo.gates.verify import expected_of
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import HeadQuantization, QuantizationSpec, published_as
from coreai_zoo.weights.convert import bytes_of
from coreai_zoo.weights.formats import Format, integer_range, pack_int4, packed_codes
from coreai_zoo.weights.quantizer import quantize_rows

SIGNED = [(dtype, scheme) for dtype in ("int4", "int8") for scheme in ("symmetric", "symmetric_with_clipping")]


def integers(spec: QuantizationSpec, rows: torch.Tensor, scales: torch.dtype = torch.float16) -> memoryview:
    """The bytes of a weight's integers as an asset holds them."""
    codes = quantize_rows(rows, spec, scales).codes
    return bytes_of(pack_int4(codes) if spec.bits == 4 else codes)


@pytest.mark.parametrize(("dtype", "scheme"), SIGNED)
@pytest.mark.parametrize("seed", range(4))
def test_the_scheme_shows_in_the_integers(dtype: str, scheme: str, seed: int) -> None:
    rows = torch.randn(64, 160, generator=torch.Generator().manual_seed(seed)).half()
    spec = QuantizationSpec(dtype, scheme, 32)  # type: ignore[arg-type]
    assert _uses_lowest(integers(spec, rows), dtype, "float16") is (scheme == "symmetric")


@pytest.mark.parametrize(("dtype", "scheme"), SIGNED)
@pytest.mark.parametrize("seed", range(4))
def test_with_scales_of_bfloat16_no_scheme_is_taken_for_the_other(dtype: str, scheme: str, seed: int) -> None:
    """In int8 the largest of a block is then the integer above the lowest, by either scheme, but for powers of two."""
    rows = torch.randn(64, 160, generator=torch.Generator().manual_seed(seed)).bfloat16()
    spec = QuantizationSpec(dtype, scheme, 32)  # type: ignore[arg-type]
    lowest = _uses_lowest(integers(spec, rows, torch.bfloat16), dtype, "bfloat16")
    form = StoredForm((64, 160), dtype, "bfloat16", 32, lowest=lowest)
    assert form.is_of(Format((64, 160), "bfloat16", spec))
    if dtype == "int4":
        assert lowest is (scheme == "symmetric")
    else:
        assert lowest is None or scheme == "symmetric"


@pytest.mark.parametrize(
    "rows", [torch.zeros(64, 160), torch.rand(64, 160), torch.randn(2, 32)], ids=["zero", "positive", "few"]
)
@pytest.mark.parametrize(("dtype", "scheme"), SIGNED)
def test_where_integers_do_not_show_the_scheme_nothing_is_said_against_any(
    dtype: str, scheme: str, rows: torch.Tensor
) -> None:
    spec = QuantizationSpec(dtype, scheme, 32)  # type: ignore[arg-type]
    lowest = _uses_lowest(integers(spec, rows.half()), dtype, "float16")
    form = StoredForm((64, 160), dtype, "float16", 32, lowest=lowest)
    assert lowest is None or scheme == "symmetric"
    assert form.is_of(Format((64, 160), "float16", spec))


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dtype", "scheme"), SIGNED)
@pytest.mark.parametrize("levels", [[1.0], [6.0, 4.0, 3.0], [1 / 7.5, 6 / 7.5]], ids=str)
def test_weights_of_few_values_tell_no_scheme_that_is_not_theirs(
    dtype: str, scheme: str, scales: torch.dtype, levels: list[float]
) -> None:
    """Signs, or what was trained for four bits: all scales may be rounded the same way."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([*levels, *(-level for level in levels)])
    rows = values[torch.randint(len(values), (64, 160), generator=generator)].to(scales)
    spec = QuantizationSpec(dtype, scheme, 32)  # type: ignore[arg-type]
    made = quantize_rows(rows, spec, scales)
    codes = bytes_of(pack_int4(made.codes) if spec.bits == 4 else made.codes)
    name = str(scales).removeprefix("torch.")
    lowest = _uses_lowest(codes, dtype, name, bytes_of(made.scales))
    assert StoredForm((64, 160), dtype, name, 32, lowest=lowest).is_of(Format((64, 160), name, spec))


INT8 = QuantizationSpec("int8", "symmetric", 32)
FORM = StoredForm((8, 64), "int8", "float16", 32, lowest=True)


@pytest.mark.parametrize(
    "other",
    [
        evolve(FORM, shape=(8, 32)),
        evolve(FORM, dtype="int4"),
        evolve(FORM, scales="float32"),
        evolve(FORM, scales=None),
        evolve(FORM, block_size=16),
        evolve(FORM, zero_points=True),
        evolve(FORM, lowest=False),
    ],
)
def test_a_form_that_differs_in_one_thing_is_not_of_a_format(other: StoredForm) -> None:
    format_ = Format((8, 64), "float16", INT8)
    assert FORM.is_of(format_) and evolve(FORM, lowest=None).is_of(format_)
    assert not other.is_of(format_)


def test_every_weight_of_a_sample_is_found_as_it_was_stored(built: Callable[[str, str], Bundle]) -> None:
    bundle = built("qwen3.6-35b-a3b", "int8hu")
    forms = stored_forms(bundle.asset, CoreAIBackend())
    schemes = {form.lowest for form in forms.values() if form.scales is not None}
    assert {True, False} <= schemes
    assert forms["lm_head.weight"].lowest is True, "the head uses all 256 codes"
    assert str(forms["lm_head.weight"]) == "int8 [1024, 128] in blocks of 32, the whole range"


@pytest.mark.parametrize("known", [True, False], ids=["by the design", "by the record alone"])
@pytest.mark.parametrize(
    "claimed", ["fp16", "int8lin_block32", "int4lin_block32", "int8hu_block32_sym_head_int8_block32_clip"]
)
def test_a_name_that_claims_another_storage_does_not_pass(
    claimed: str, known: bool, built: Callable[[str, str], Bundle]
) -> None:
    bundle, plugins = built("qwen3.6-27b", "int8hu"), default_plugins()
    expected = expected_of(bundle, checkpoint_of(bundle, plugins, None), plugins) if known else None
    backend = CoreAIBackend()
    name = str(bundle.metadata["name"]).replace("int8hu_block32_sym", claimed)
    other = evolve(bundle, metadata={**bundle.metadata, "compression": claimed, "name": name})

    assert check_stored(bundle, backend, RECIPES, expected).passed
    found = check_stored(other, backend, RECIPES, expected)
    assert not found.passed, found


def test_a_name_that_no_recipe_is_published_as_does_not_pass(built: Callable[[str, str], Bundle]) -> None:
    bundle = built("qwen3.6-27b", "int8hu")
    other = evolve(bundle, metadata={**bundle.metadata, "compression": "int8"})
    found = check_stored(other, CoreAIBackend(), RECIPES, None)
    assert "neither a recipe that is installed nor the one in build.json is published as int8" in found.detail
    assert "the bundle is called qwen3_6_27b_sample_decode_int8hu_block32_sym and its compression int8" in found.detail


# ---------------------------------------------------------------------------------------------------------------------
# Names of recipes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_published_name_leads_back_to_its_recipe() -> None:
    assert all(published_as(recipe.published_name, RECIPES.values()) == recipe for recipe in RECIPES.values())


@pytest.mark.parametrize(
    "spec", [QuantizationSpec("uint8", "asymmetric", 64), QuantizationSpec("int8", "symmetric_with_clipping", 16)]
)
def test_a_head_of_another_policy_is_read_from_the_name(spec: QuantizationSpec) -> None:
    recipe = RECIPES["int8hu"].with_head(HeadQuantization(spec, "a reason"))
    assert published_as(recipe.published_name, RECIPES.values()) == recipe


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fp8",
        "int8hu_block32_sym_head_",
        "int8hu_block32_sym_head_int9_block32_sym",
        "int8lin_block32_head_int8_block32_sym",
    ],
)
def test_a_name_that_nothing_is_published_as_is_none(name: str) -> None:
    assert published_as(name, RECIPES.values()) is None


@pytest.mark.parametrize(
    "spec", [QuantizationSpec(dtype, "symmetric", 32) for dtype in ("int4", "int6", "int8")], ids=str
)
def test_integers_show_whether_the_lowest_is_in_use(spec: QuantizationSpec) -> None:
    low, high = integer_range(spec)
    dtype = Format((4, 64), "float16", spec).arrays["data"].dtype
    codes = torch.arange(low + 1, high + 1).repeat(64).to(torch.int8)
    for lowest, expected in (([], False), ([low], True)):
        values = torch.cat([codes, torch.tensor([*lowest, *[0] * (12 - len(lowest))], dtype=torch.int8)])
        values = torch.cat([values, values.new_zeros(-len(values) % 4)])
        assert _uses_lowest(bytes_of(packed_codes(values, spec)), dtype, "float16") is expected
    assert _uses_lowest(bytes_of(packed_codes(codes.new_zeros(64), spec)), dtype, "float16") is None
