"""Dtypes and shapes: the names of dtypes that every other module uses, and the size of what has one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache

DTYPES = ("float16", "float32", "bfloat16", "int32")
"""The dtypes of inputs, states, outputs and parameters."""

STORED_DTYPES = ("float16", "bfloat16", "float32")
"""The dtypes in which an unquantized weight is stored."""

FLOAT_DTYPES = ("float16", "bfloat16", "float32")
"""The dtypes from which a weight is quantized."""


@cache
def bits_of(dtype: str) -> int:
    """Bits of an element, for example 4 of `uint4`, 16 of `bfloat16` and 8 of `bool`."""
    return 8 if dtype == "bool" else int("".join(re.findall(r"\d+", dtype)[:1]))


def packed_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor whose elements lie without gaps: two of 4 bits share one, and the last may be half used."""
    return math.ceil(math.prod(shape) * bits_of(dtype) / 8)


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix along its last axis; a vector or scalar is one row."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def size(count: int) -> str:
    """A number of bytes as text, in the largest binary unit of which there is one or more."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(max((count.bit_length() - 1) // 10, 0), len(units) - 1)
    return f"{count / 1024**power:,.1f} {units[power]}" if power else f"{count:,} bytes"
