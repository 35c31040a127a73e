"""Dtypes: the names that every other module uses, and the size of an element of each."""

from __future__ import annotations

import re
from functools import cache

DTYPES = ("float16", "float32", "bfloat16", "int32")
"""What an input, a state, an output or a parameter can have."""

STORED_DTYPES = ("float16", "float32")
"""What an unquantized weight can be stored in."""

FLOAT_DTYPES = ("float16", "bfloat16", "float32")
"""What a weight can be quantized from."""


@cache
def bits_of(dtype: str) -> int:
    """Bits of an element, for example 4 of `uint4`, 16 of `bfloat16` and 8 of `bool`."""
    return 8 if dtype == "bool" else int("".join(re.findall(r"\d+", dtype)[:1]))
