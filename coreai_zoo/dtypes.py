"""Dtypes: the names that every other module uses, and the size of an element of each."""

from __future__ import annotations

import re
from functools import cache

DTYPES = ("float16", "float32", "bfloat16", "int32")
"""The dtypes of inputs, states, outputs and parameters."""

STORED_DTYPES = ("float16", "float32")
"""The dtypes in which an unquantized weight is stored."""

FLOAT_DTYPES = ("float16", "bfloat16", "float32")
"""The dtypes from which a weight is quantized."""


@cache
def bits_of(dtype: str) -> int:
    """Bits of an element, for example 4 of `uint4`, 16 of `bfloat16` and 8 of `bool`."""
    return 8 if dtype == "bool" else int("".join(re.findall(r"\d+", dtype)[:1]))
