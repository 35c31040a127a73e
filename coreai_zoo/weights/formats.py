"""How a weight lies in memory: plain values, or integers with scales and perhaps zero points.

A `Format` is what plan, quantizer, store, graph, backends and gates have to agree on: which arrays there are, their
shapes and dtypes, and how many bytes they take. No torch is needed to know it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from coreai_zoo.dtypes import as_matrix, bits_of, packed_bytes
from coreai_zoo.names import quantized_names
from coreai_zoo.recipes import QuantizationSpec

if TYPE_CHECKING:
    import torch

ArrayKind = Literal["data", "scales", "zero_points", "table"]

TABLE = tuple(range(-32, 32))
"""The integers of 6 bits in the order of their indices."""


@frozen
class StoredArray:
    """One array of a stored weight.

    Attributes:
        kind: `data` holds the plain values, the integers, or the indices of integers in the `table`.
        shape: in elements.
        dtype: of an element, for example `float16`, `int8` or `int4`; elements of less than 8 bits lie one after the
            other from the lowest bit on: two of 4 bits in a byte, four of 6 bits in three bytes. What is left of the
            last byte is unused.
    """

    kind: ArrayKind
    shape: tuple[int, ...]
    dtype: str

    @property
    def packed(self) -> bool:
        """Whether elements share bytes."""
        return bits_of(self.dtype) < 8

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""
        return packed_bytes(self.shape, self.dtype)

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """The shape of the array in memory: of packed integers [rows, bytes], of packed zero points [bytes]."""
        if not self.packed:
            return self.shape
        rows, bits = math.prod(self.shape[:-1]), bits_of(self.dtype)
        return (rows, self.shape[-1] * bits // 8) if self.kind == "data" else (self.bytes,)

    @property
    def memory_dtype(self) -> str:
        """The dtype of the array in memory: of a packed one, `uint8`."""
        return "uint8" if self.packed else self.dtype


@frozen
class Format:
    """The stored form of a weight: its arrays, their shapes and dtypes, and the bytes that they take.

    Attributes:
        shape: of the weight.
        dtype: of the plain values, or of the scales.
        quantization: how it is quantized, None for plain values.
        read_transposed: whether a decoder reads it with the last two axes exchanged, so that plain values are stored
            in this order.

    Raises:
        ValueError: when the block does not divide the weight's width, integers would share a byte across rows, or one
            of fewer than three axes is read transposed.
    """

    shape: tuple[int, ...]
    dtype: str
    quantization: QuantizationSpec | None = None
    read_transposed: bool = False

    def __attrs_post_init__(self) -> None:
        if self.read_transposed and len(self.shape) < 3:
            raise ValueError(f"a weight of shape {list(self.shape)} is no stack of matrices to be read transposed")
        if self.quantization is not None:
            require_divisible(self.columns, self.quantization)

    @property
    def rows(self) -> int:
        """Rows of the weight seen as a matrix along its last axis."""
        return as_matrix(self.shape)[0]

    @property
    def columns(self) -> int:
        """Size of the last axis, 1 for a scalar."""
        return as_matrix(self.shape)[1]

    @property
    def transposed(self) -> bool:
        """Whether it is stored with its last two axes exchanged."""
        return self.read_transposed and self.quantization is None

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """[*shape[:-1], blocks]: one scale for each block of a row; () of a weight that is not quantized."""
        spec = self.quantization
        return () if spec is None else (*self.shape[:-1], self.columns // (spec.block_size or self.columns))

    @cached_property
    def arrays(self) -> Mapping[ArrayKind, StoredArray]:
        """The stored arrays by kind, in the order in which they are written."""
        spec = self.quantization
        if spec is None:
            shape = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape
            return {"data": StoredArray("data", shape, self.dtype)}
        arrays: dict[ArrayKind, StoredArray] = {
            "data": StoredArray("data", self.shape, "uint6" if has_table(spec) else spec.dtype),
            "scales": StoredArray("scales", self.scales_shape, self.dtype),
        }
        if has_table(spec):  # one entry along each axis of the weight: all of it has this table
            arrays["table"] = StoredArray("table", (*(1 for _ in self.shape), len(TABLE), 1), "int8")
        if has_zero_points(spec):
            arrays["zero_points"] = StoredArray("zero_points", self.scales_shape, spec.dtype)
        return arrays

    @cached_property
    def bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.bytes for array in self.arrays.values())

    def state_names(self, parameter: str) -> Mapping[ArrayKind, str]:
        """Under which name each array is in the state of a decoder whose parameter is called `parameter`."""
        if self.quantization is None:
            return {"data": parameter}
        data, scales, zero_points, table = quantized_names(parameter)
        names: dict[ArrayKind, str] = {"data": data, "scales": scales, "zero_points": zero_points, "table": table}
        return {kind: names[kind] for kind in self.arrays}


def require_divisible(columns: int, spec: QuantizationSpec) -> None:
    """Refuse a width that `spec` does not fit.

    Raises:
        ValueError: saying why.
    """
    size = spec.block_size or columns
    if columns == 0 or columns % size:
        raise ValueError(f"{columns} columns are not divisible by the block size {size}")
    if spec.bits == 4 and columns % 2:
        raise ValueError(f"{columns} columns are odd, 4-bit integers are packed in pairs")
    if spec.bits == 6 and columns % 4:
        raise ValueError(f"{columns} columns are not divisible by 4, 6-bit integers are packed in fours")


def integer_range(spec: QuantizationSpec) -> tuple[int, int]:
    """The lowest and highest integer in use."""
    if not spec.signed:
        return 0, 2**spec.bits - 1
    high = 2 ** (spec.bits - 1) - 1
    return (-high if spec.scheme == "symmetric_with_clipping" else -high - 1), high


def has_zero_points(spec: QuantizationSpec) -> bool:
    """Whether zero points are stored: they are zero everywhere for signed integers without an asymmetric scheme."""
    return spec.scheme == "asymmetric" or not spec.signed


def has_table(spec: QuantizationSpec) -> bool:
    """Whether integers are stored as indices into a table of them."""
    return spec.dtype == "int6"


# ---------------------------------------------------------------------------------------------------------------------
# Integers that share bytes
# ---------------------------------------------------------------------------------------------------------------------


def packed_codes(codes: torch.Tensor, spec: QuantizationSpec) -> torch.Tensor:
    """Integers [..., C] as they are stored: as they are, packed [..., C * bits / 8], or as packed indices of them."""
    if spec.bits == 4:
        return pack_int4(codes)
    return pack_uint6(codes - TABLE[0]) if has_table(spec) else codes


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit integers in pairs, the first in the low half: [..., C] int8 or uint8 to [..., C / 2] uint8.

    Raises:
        ValueError: when C is odd or the dtype is another.
    """
    import torch

    if codes.dtype not in (torch.int8, torch.uint8) or codes.shape[-1] % 2:
        raise ValueError(f"cannot pack {tuple(codes.shape)} {codes.dtype}: needs pairs of int8 or uint8")
    raw = codes.contiguous().view(torch.uint8)
    return (raw[..., 1::2] << 4).bitwise_or_(raw[..., ::2] & 15)


def unpack_int4(packed: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Undo `pack_int4`: [..., P] uint8 to [..., 2 * P] int8 when `signed`, else uint8."""
    import torch

    pairs = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    if not signed:
        return pairs
    # Shift the sign bit of the nibble to the sign bit of the byte and back.
    return (pairs << 4).view(torch.int8) >> 4


def pack_uint6(codes: torch.Tensor) -> torch.Tensor:
    """Pack numbers of 0 to 63 in fours, the first in the lowest bits: [..., C] int8 to [..., C * 3 / 4] uint8.

    Raises:
        ValueError: when C is not divisible by 4.
    """
    import torch

    if codes.shape[-1] % 4:
        raise ValueError(f"cannot pack {tuple(codes.shape)}: needs fours")
    first, second, third, fourth = codes.contiguous().view(torch.uint8).unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack((first | second << 6, second >> 2 | third << 4, third >> 4 | fourth << 2), dim=-1).flatten(-2)


def unpack_uint6(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_uint6`: [..., 3 * P] uint8 to [..., 4 * P] uint8."""
    import torch

    first, second, third = packed.unflatten(-1, (-1, 3)).unbind(-1)
    fours = (first & 63, first >> 6 | (second & 15) << 2, second >> 4 | (third & 3) << 4, third >> 2)
    return torch.stack(fours, dim=-1).flatten(-2)


def unpacked_rows(packed: torch.Tensor, dtype: str) -> torch.Tensor:
    """The elements of packed rows: [R, bytes] uint8 to [R, C] int8 or uint8."""
    if bits_of(dtype) == 6:
        return unpack_uint6(packed)
    return unpack_int4(packed, signed=not dtype.startswith("u"))


def unpacked(memory: torch.Tensor, array: StoredArray) -> torch.Tensor:
    """The elements of an array, [shape], from its memory."""
    if not array.packed:
        return memory.view(array.shape)
    codes = unpacked_rows(memory.reshape(-1), array.dtype)
    # The last half-byte may be unused.
    return codes[: math.prod(array.shape)].view(array.shape)
