"""The quantizer: it turns rows of a weight into integers, scales and zero points, and back.

The arithmetic is coreai-opt 0.3.0's, bit for bit, so that a bundle's integers can be checked against Apple's own tool:
ranges, scales and zero points are computed in the weight's dtype, integers in float32. Scales of the least squared
error are ours; their integers are those that coreai-opt's arithmetic makes of them. It is written for row chunks: a
block never spans rows, so quantizing in pieces gives the same bits as quantizing whole.

Shape letters: R rows, C columns, N blocks per row, B columns per block (C = N * B).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier, local
from typing import TYPE_CHECKING

from attrs import frozen

from coreai_zoo.dtypes import FLOAT_DTYPES
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.weights.formats import Format, has_zero_points, integer_range

if TYPE_CHECKING:
    import torch

QUANTIZER_VERSION = 1
"""Raised with every change that changes a bit of the output: weight stores key on it."""

SCALE_FLOOR = 2.0**-23
"""Smallest scale, coreai-opt's `finfo(float32).eps`: a block of zeros gets it instead of a division by zero."""

CHUNK_ELEMENTS = 1 << 19
"""Elements that one worker handles at a time: 2 MiB in float32, which stays in its cache."""


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
    scales_shape = Format((count, columns), "float32", spec).scales_shape
    integer = torch.int8 if spec.signed else torch.uint8
    codes = torch.empty(count, columns, dtype=integer)
    scales = torch.empty(scales_shape, dtype=dtype)
    offsets = torch.empty(scales_shape, dtype=integer) if has_zero_points(spec) else None

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes in this thread on one core; the workers are as many as before."""
    import torch

    workers()  # they are made once, as many as torch has threads then: before it has one
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
        if spec.scales == "mse":
            scales.copy_(_least_error_scales(values.view(blocked), other.view(blocked), scales, low, high))
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


_FACTORS = tuple(0.95 + 0.1 * step / 15 for step in range(16))
"""By what a block's scale is multiplied in search of a better one.

Of 32 normal values in int8, the best of these has 17 % less squared error than the scale by the largest magnitude, and
20 % less with one step of least squares after it; a wider or finer grid gives up to 1 % more.
"""


def _least_error_scales(
    blocks: torch.Tensor, work: torch.Tensor, scales: torch.Tensor, low: int, high: int
) -> torch.Tensor:
    """The scales [R, N] by which the squared error of each block is least, of those that are tried.

    Tried are multiples of `scales`, and what the integers of the best one ask for by least squares. Of equals the first
    stays, and a scale that overflows is never better.

    Args:
        blocks: [R, N, B] float32, the values.
        work: as `blocks`; what is in it is lost.
        scales: [R, N], by the largest magnitude.
        low: the lowest integer.
        high: the highest.
    """
    import torch

    def codes(tried: torch.Tensor) -> torch.Tensor:
        return torch.div(blocks, tried.float().unsqueeze(-1), out=work).round_().clamp_(low, high)

    def error(tried: torch.Tensor) -> torch.Tensor:
        return _sums(codes(tried).mul_(tried.float().unsqueeze(-1)).sub_(blocks).square_())

    def better(tried: torch.Tensor) -> None:
        tried = tried.to(scales.dtype).clamp_(min=SCALE_FLOOR)
        found = error(tried)
        smaller = found < least
        best[smaller], least[smaller] = tried[smaller], found[smaller]

    best, least = scales.clone(), error(scales)
    for factor in _FACTORS:
        better(scales.float() * factor)
    integers = codes(best)
    products = _sums(integers * blocks)
    better(products / _sums(integers.square_()))
    return best


def _sums(blocks: torch.Tensor) -> torch.Tensor:
    """The sum of each block [R, N, B], whose values are lost: [R, N], the same bits on every processor.

    Halves are added to each other element by element; torch's own sum adds in an order that depends on the machine.
    """
    size = blocks.shape[-1]
    while size > 1:
        half = size // 2
        blocks[..., :half] += blocks[..., size - half : size]
        size -= half
    return blocks[..., 0].clone()


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
