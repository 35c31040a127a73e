"""Dtypes: the names that every other module uses, and the size of an element of each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"float16": 2, "float32": 4, "bfloat16": 2, "int32": 4})
"""Bytes per element of every dtype that an input, a state, an output or a parameter can have."""

DTYPES = tuple(DTYPE_BYTES)

STORED_DTYPES = ("float16", "float32")
"""Dtypes that an unquantized weight can be stored in."""

FLOAT_DTYPES = ("float16", "bfloat16", "float32")
