"""Recipes, and the quantizer that turns rows of a weight into integers, scales and zero points.

The arithmetic is coreai-opt 0.3.0's, bit for bit, so that a bundle's integers can be checked against Apple's own tool:
ranges, scales and zero points are computed in the weight's dtype, integers in float32. It is written for row chunks: a
block never spans rows, so quantizing in pieces gives the same bits as quantizing whole.

Shape letters: R rows, C columns, N blocks per row, B columns per block (C = N * B).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, local
from types import MappingProxyType
from typing import TYPE_CHECKING

from attrs import evolve, field, frozen

from coreai_zoo.errors import BadInput, listing
from coreai_zoo.overlay import ROLES, HeadQuantization, QuantizationSpec

if TYPE_CHECKING:
    import torch

QUANTIZER_VERSION = 1
"""Raised with every change that changes a bit of the output: weight stores key on it."""

SCALE_FLOOR = 2.0**-23
"""Smallest scale, coreai-opt's `finfo(float32).eps`: a block of zeros gets it instead of a division by zero."""

CHUNK_ELEMENTS = 1 << 19
"""Elements that one worker handles at a time: 2 MiB in float32, which stays in its cache."""

FLOAT_DTYPES = ("float16", "bfloat16", "float32")


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


def _decides_every_role(instance: Recipe, _attribute: object, roles: Mapping[str, QuantizationSpec | None]) -> None:
    undecided, unknown = sorted(set(ROLES) - set(roles)), sorted(set(roles) - set(ROLES))
    problems = [
        *([f"leaves {listing(undecided)} undecided"] if undecided else []),
        *([f"decides {listing(unknown)}, which no weight has"] if unknown else []),
    ]
    if problems:
        raise BadInput(
            f"The recipe {instance.name!r} {' and '.join(problems)}.",
            "A recipe gives each role a spec, or None to keep it as it is: a role that is left out would be skipped "
            f"without a word. The roles are {listing(list(ROLES), len(ROLES))}.",
        )


def _frozen_mapping(
    roles: Mapping[str, QuantizationSpec | None],
) -> Mapping[str, QuantizationSpec | None]:
    return MappingProxyType(dict(roles))


@frozen
class Recipe:
    """What is quantized and how, by role.

    Attributes:
        name: what a user types.
        published_name: the suffix of a bundle's name.
        description: one sentence for `zoo show`.
        roles: a spec for each role of `overlay.ROLES`, None to keep the parameter's own dtype.

    Raises:
        BadInput: when a role is undecided or unknown, naming each.
    """

    name: str
    published_name: str
    description: str
    roles: Mapping[str, QuantizationSpec | None] = field(converter=_frozen_mapping, validator=_decides_every_role)

    def with_head(self, policy: HeadQuantization | None, *, allow_per_channel: bool = False) -> Recipe:
        """The recipe with the overlay's head policy in place of its own head spec.

        A recipe that keeps the head as it is stays so: whether to quantize is the recipe's choice, how is the policy's.

        Args:
            policy: the policy, or None for the recipe's own.
            allow_per_channel: accept a head with one scale per row.

        Raises:
            BadInput: for a per-channel head that is not allowed.
        """
        own = self.roles["head"]
        if own is None:
            return self
        spec = policy.spec if policy else own
        if spec.block_size is None and not allow_per_channel:
            raise BadInput(
                f"Recipe {self.name} would quantize the head per channel ({spec}): per-channel int8 weights give "
                "garbage on the GPU delegate, where blocks of 32 are right and fast.",
                "Use a block size of 32, or force the per-channel head if you know your runtime.",
            )
        # Two policies for one head are two bundles: the name tells them apart.
        published_name = self.published_name if spec == own else f"{self.published_name}_head_{_slug(spec)}"
        return evolve(self, roles={**self.roles, "head": spec}, published_name=published_name)


def _slug(spec: QuantizationSpec) -> str:
    blocks = "channel" if spec.block_size is None else f"block{spec.block_size}"
    return f"{spec.dtype}_{blocks}_{_SCHEME_SLUGS[spec.scheme]}"


_SCHEME_SLUGS = {"symmetric": "sym", "symmetric_with_clipping": "clip", "asymmetric": "asym"}

_BODY = ("attention", "gdn.in", "gdn.out", "mlp", "moe.expert")


def _roles(body: QuantizationSpec | None, head: QuantizationSpec | None = None) -> dict[str, QuantizationSpec | None]:
    # Everything outside of the body is small and sensitive (router, gates, norms, decays, convolutions) or is looked
    # up instead of multiplied (embedding).
    return {**dict.fromkeys(ROLES), **dict.fromkeys(_BODY, body), "head": head}


_INT8 = QuantizationSpec("int8", "symmetric_with_clipping", 32)
_INT4 = QuantizationSpec("int4", "symmetric_with_clipping", 32)
_INT8_ABSMAX = QuantizationSpec("int8", "symmetric", 32)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("fp16", "fp16", "No quantization: the reference for the others.", _roles(None)),
            Recipe("int8lin", "int8lin_block32", "Body in int8 blocks of 32, head in fp16.", _roles(_INT8)),
            Recipe(
                "int8hu",
                "int8hu_block32_sym",
                "Body and untied head in int8 blocks of 32, the head with absmax scales.",
                _roles(_INT8, _INT8_ABSMAX),
            ),
            Recipe("int4lin", "int4lin_block32", "Body in int4 blocks of 32, head in fp16.", _roles(_INT4)),
        )
    }
)
"""The built-in recipes by name."""


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        BadInput: when there is none, with the nearest names.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are {listing(list(RECIPES))}."
    raise BadInput(f"There is no recipe {name!r}.", hint)


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
# Rows to integers and back
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class QuantizedRows:
    """Quantized rows.

    Attributes:
        codes: int8 or uint8 [R, C], one integer per element even at 4 bits.
        scales: [R, N] in the dtype of the weight.
        zero_points: [R, N] in the dtype of `codes`, or None when all are zero (see `has_zero_points`).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None


def quantize_rows(rows: torch.Tensor, spec: QuantizationSpec, dtype: torch.dtype | None = None) -> QuantizedRows:
    """Quantize rows of a weight.

    Args:
        rows: [R, C] floating point, finite. A value that is not makes the scale of its block not finite, and so does a
            value or a range that overflows the dtype.
        spec: how.
        dtype: float16, bfloat16 or float32: what the weight is in, to which the rows are rounded first; theirs by
            default.

    Raises:
        ValueError: for another dtype or rank, or a block size that does not divide C.
    """
    import torch

    dtype = dtype or rows.dtype
    if rows.ndim != 2 or str(dtype).removeprefix("torch.") not in FLOAT_DTYPES or not rows.is_floating_point():
        raise ValueError(f"rows must be [R, C] in one of {FLOAT_DTYPES}, not {tuple(rows.shape)} {rows.dtype}")
    count, columns = rows.shape
    blocks = blocks_per_row(columns, spec)
    integer = torch.int8 if spec.signed else torch.uint8
    codes = torch.empty(count, columns, dtype=integer)
    scales = torch.empty(count, blocks, dtype=dtype)
    offsets = torch.empty(count, blocks, dtype=integer) if has_zero_points(spec) else None

    def quantize(part: slice) -> None:
        _quantize_chunk(rows[part], spec, codes[part], scales[part], None if offsets is None else offsets[part])

    step = chunk_rows(columns)
    parts = [slice(start, start + step) for start in range(0, count, step)]
    if len(parts) > 1:
        list(workers().map(quantize, parts))
    else:  # also what a worker does with a chunk, so that workers never wait for workers
        quantize(slice(count))
    return QuantizedRows(codes, scales, offsets)


def chunk_rows(columns: int) -> int:
    """Rows of a chunk: as many as fit `CHUNK_ELEMENTS`, at least one."""
    return max(1, CHUNK_ELEMENTS // columns)


@cache
def workers() -> ThreadPoolExecutor:
    """One thread per core, each running torch on that core alone.

    Chunks that stay in one core's cache from reading to integers are much faster than operations that torch spreads
    over all cores one after the other, above all on a busy machine.
    """
    import torch

    threads = torch.get_num_threads()
    ready = Barrier(threads + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        # A thread takes over the process's number of threads when it first computes, and asking counts as that. Unless
        # it is asked while the number is 1, every worker would start as many threads again as there are cores.
        torch.get_num_threads()
        ready.wait()

    # The setting is per thread, and also the default of threads that torch has not seen yet: put that back.
    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantize", initializer=alone)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)
    return pool


_scratch = local()


def scratch(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 tensors of `shape` that belong to this thread until it asks again, as quantizing does.

    Fresh memory costs a page fault per 4 KiB, which is more than most operations on its values.
    """
    import torch

    if getattr(_scratch, "shape", None) != shape:  # most chunks of a tensor have one shape
        size = max(shape.numel(), CHUNK_ELEMENTS)
        if not hasattr(_scratch, "memory") or _scratch.memory.numel() < 2 * size:
            _scratch.memory = torch.empty(2, size, dtype=torch.float32)
        _scratch.pair = tuple(half[: shape.numel()].view(shape) for half in _scratch.memory)
        _scratch.shape = shape
    first, second = _scratch.pair
    return first, second


def _quantize_chunk(
    rows: torch.Tensor,
    spec: QuantizationSpec,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
) -> None:
    """Quantize `rows` into `codes`, `scales` and `offsets`."""
    low, high = integer_range(spec)
    values, other = scratch(rows.shape)
    blocked = (*scales.shape, -1)  # [R, N, B]
    values.copy_(rows)
    if rows.dtype != scales.dtype:
        # Through float32, which holds every value of the others: torch has no fast way from bfloat16 to float16.
        rounded = other.view(-1).view(scales.dtype)[: values.numel()].view(values.shape)
        values.copy_(rounded.copy_(values))
    if offsets is not None and spec.scheme == "asymmetric":
        scale, zero = _asymmetric_scales(values, blocked, scales.dtype, low, high)
        scales.copy_(scale)
        offsets.copy_(zero)
    else:
        scales.copy_(_symmetric_scales(values, other, blocked, scales.dtype, high - low))
        if offsets is not None:
            offsets.fill_((low + high + 1) // 2)
    in_blocks = values.view(blocked)
    in_blocks.div_(scales.float().unsqueeze(-1)).round_()
    if offsets is not None:
        in_blocks.add_(offsets.float().unsqueeze(-1))
    codes.copy_(values.clamp_(low, high))


def _symmetric_scales(
    values: torch.Tensor, magnitudes: torch.Tensor, blocked: tuple[int, ...], dtype: torch.dtype, steps: int
) -> torch.Tensor:
    """Scales [R, N] from the largest magnitude of each block, in `dtype`."""
    import torch

    torch.abs(values, out=magnitudes)
    largest = magnitudes.view(blocked).amax(dim=-1).to(dtype)  # exact: every value came from `dtype`
    return (largest / (steps / 2)).clamp_(min=SCALE_FLOOR)


def _asymmetric_scales(
    values: torch.Tensor, blocked: tuple[int, ...], dtype: torch.dtype, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points, both [R, N] in `dtype`, from the range of each block widened to hold zero."""
    lowest = values.view(blocked).amin(dim=-1).clamp_(max=0).to(dtype)
    highest = values.view(blocked).amax(dim=-1).clamp_(min=0).to(dtype)
    scale = ((highest - lowest) / float(high - low)).clamp_(min=SCALE_FLOOR)
    return scale, (low - (lowest / scale).round_()).clamp_(low, high)


def dequantize_rows(quantized: QuantizedRows, spec: QuantizationSpec) -> torch.Tensor:
    """The values that quantized rows stand for: [R, C] float32."""
    if (quantized.zero_points is not None) != has_zero_points(spec):
        raise ValueError(
            f"{spec} does not fit rows {'without' if quantized.zero_points is None else 'with'} zero points"
        )
    values = quantized.codes.float().view(*quantized.scales.shape, -1)  # [R, N, B]
    if quantized.zero_points is not None:
        values.sub_(quantized.zero_points.float().unsqueeze(-1))
    return values.mul_(quantized.scales.float().unsqueeze(-1)).view(quantized.codes.shape)


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
