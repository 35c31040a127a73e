"""Formats as a user types them."""

from __future__ import annotations

import itertools
from typing import get_args

import attrs
import pytest

from coreai_zoo.errors import BadInput
from coreai_zoo.format_text import format_text, read_format
from coreai_zoo.recipes import IntegerDtype, QuantizationSpec, Scheme


def test_what_is_written_is_read_again() -> None:
    schemes, blocks = get_args(Scheme), (None, 2, 32, 128)
    specs = [QuantizationSpec(*each) for each in itertools.product(get_args(IntegerDtype), schemes, blocks)]
    specs += [QuantizationSpec("int4", "symmetric", block, "mse") for block in blocks]
    assert [read_format(format_text(spec)) for spec in [*specs, None]] == [*specs, None]
    assert len({format_text(spec) for spec in [*specs, None]}) == len(specs) + 1


def test_the_text_has_every_field() -> None:
    # A field that is not in the text would be lost between a command line and what it asks for.
    assert {field.name for field in attrs.fields(QuantizationSpec)} == {"dtype", "scheme", "block_size", "scales"}


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("int4", QuantizationSpec("int4", "symmetric_with_clipping", 32)),
        ("uint8", QuantizationSpec("uint8", "asymmetric", 32)),
        ("int8:channel", QuantizationSpec("int8", "symmetric_with_clipping", None)),
        ("uint4:block64", QuantizationSpec("uint4", "asymmetric", 64)),
        ("int8:symmetric", QuantizationSpec("int8", "symmetric", 32)),
        ("int4:block64:symmetric", QuantizationSpec("int4", "symmetric", 64)),
        ("int8:mse", QuantizationSpec("int8", "symmetric_with_clipping", 32, "mse")),
        ("int8:channel:symmetric:mse", QuantizationSpec("int8", "symmetric", None, "mse")),
        ("fp16", None),
    ],
)
def test_what_is_left_out_is_what_engines_are_fast_with(text: str, spec: QuantizationSpec | None) -> None:
    assert read_format(text) == spec


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is none of int4, int6, int8, uint4, uint8"),
        ("int5", "'int5' is none of int4"),
        ("int4:", "'' is none of symmetric, "),
        ("int4:32", "'32' is none of symmetric, "),
        ("int4:block", "'block' is no block of at least 2 inputs"),
        ("int4:block1", "'block1' is no block of at least 2 inputs"),
        ("int4:block-32", "'block-32' is no block"),
        ("int4:symmetric:block32", "'block32' is too much"),
        ("int4:block32:symmetric:more", "'more' is too much"),
        ("fp16:block32", "'fp16' is none of int4"),
        ("INT4", "'INT4' is none of int4"),
        ("int4:mse:symmetric", "'mse' is none of symmetric, "),
        ("uint4:mse", "scales by mse are for signed integers"),
    ],
)
def test_another_text_is_refused_with_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(BadInput) as raised:
        read_format(text)
    assert f"The format {text!r} cannot be read: {why}" in str(raised.value)
    assert "for example int4 or int4:block64:symmetric, or fp16." in str(raised.value)
