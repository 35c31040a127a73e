"""How a quantized weight lies in memory: blocks, integers, pairs of 4-bit integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coreai_zoo.recipes import QuantizationSpec

if TYPE_CHECKING:
    import torch


# ---------------------------------------------------------------------------------------------------------------------
# Geometry of a quantized weight; no torch
# ---------------------------------------------------------------------------------------------------------------------


def blocks_per_row(columns: int, spec: QuantizationSpec) -> int:
    """Number of scales per row.

    Raises:
        ValueError: when the block size does not divide `columns`, or two 4-bit integers would share a byte across rows.
    """
    size = spec.block_size or columns
    if columns == 0 or columns % size:
        raise ValueError(f"{columns} columns are not divisible by the block size {size}")
    if spec.bits == 4 and columns % 2:
        raise ValueError(f"{columns} columns are odd, 4-bit integers are packed in pairs")
    return columns // size


def integer_range(spec: QuantizationSpec) -> tuple[int, int]:
    """The lowest and highest integer in use."""
    if not spec.signed:
        return 0, 2**spec.bits - 1
    high = 2 ** (spec.bits - 1) - 1
    return (-high if spec.scheme == "symmetric_with_clipping" else -high - 1), high


def has_zero_points(spec: QuantizationSpec) -> bool:
    """Whether zero points are stored: they are zero everywhere for signed integers without an asymmetric scheme."""
    return spec.scheme == "asymmetric" or not spec.signed


# ---------------------------------------------------------------------------------------------------------------------
# Two 4-bit integers in a byte
# ---------------------------------------------------------------------------------------------------------------------


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
