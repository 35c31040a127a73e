"""From checkpoint values to stored values, a chunk of rows at a time and on all cores."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, wait
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from attrs import evolve, frozen

from coreai_zoo import machine
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.errors import BadInput
from coreai_zoo.overlay import Transform
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.weights.formats import packed_codes
from coreai_zoo.weights.plan import PlannedTensor
from coreai_zoo.weights.quantizer import (
    QuantizedRows,
    chunk_rows,
    dequantize_rows,
    quantize_rows,
    scratch,
    workers,
)

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")

# Zero, and both signs of what is small, usual and large in float32.
_SIZES = tuple(1.7 * 10 ** (step / 4) for step in (-120, -32, *range(-16, 9), 19, 36, 152))
_PROBE = (0.0, *_SIZES, *(-size for size in _SIZES))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row order, without a copy when it is contiguous."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


@frozen
class Chunk:
    """Rows `start` to `stop` of the checkpoint tensor `key`; their elements are handled by one worker."""

    planned: PlannedTensor
    key: str
    start: int
    stop: int
    last: bool


def chunks_of(planned: PlannedTensor) -> Iterator[Chunk]:
    """The rows of a planned tensor in order."""
    step = chunk_rows(planned.format.columns)
    for source in planned.sources:
        rows = source.stop - source.start
        for start in range(0, rows, step):
            last = source is planned.sources[-1] and start + step >= rows
            yield Chunk(planned, source.key, start, min(start + step, rows), last)


@frozen
class Result:
    """The outcome of a chunk: the hash of its source, and plain values or integers as they are stored."""

    chunk: Chunk
    source: bytes
    values: torch.Tensor | QuantizedRows


def convert_chunk(checkpoint: Checkpoint, chunk: Chunk) -> Result:
    """Read, hash, convert and quantize a chunk."""
    planned = chunk.planned
    rows = checkpoint.read_rows(chunk.key, chunk.start, chunk.stop)
    source = hashlib.sha256(bytes_of(rows)).digest()
    if planned.quantization is None:
        return Result(chunk, source, _convert(rows, chunk))
    quantized = _quantize(rows, chunk, planned.quantization)
    codes = packed_codes(quantized.codes, planned.quantization)
    return Result(chunk, source, evolve(quantized, codes=codes))


def _quantize(rows: torch.Tensor, chunk: Chunk, spec: QuantizationSpec) -> QuantizedRows:
    import torch

    planned = chunk.planned
    values = rows if planned.transform is None else _transform(rows, planned.transform)
    quantized = quantize_rows(values, spec, getattr(torch, planned.dtype))
    if not quantized.scales.isfinite().all():
        _convert(rows, chunk)  # raises when it is a value that is not finite
        raise BadInput(
            f"{chunk.key} has values of both signs in one block whose distance overflows {planned.dtype} "
            f"(rows {chunk.start} to {chunk.stop}).",
            "Use a recipe with a symmetric scheme.",
        )
    return quantized


def values_of(checkpoint: Checkpoint, planned: PlannedTensor, key: str, start: int, stop: int) -> torch.Tensor:
    """Rows of a source as a bundle has them: [stop - start, columns], float32 where they are quantized.

    Args:
        checkpoint: the checkpoint.
        planned: the parameter that they are part of; where it is quantized, the rows are, and are turned back.
        key: one of its sources.
        start: first row of that.
        stop: one past the last row.

    Raises:
        BadInput: as for a build.
    """
    chunk = Chunk(planned, key, start, stop, last=False)
    rows = checkpoint.read_rows(key, start, stop)
    if planned.quantization is None:
        return _convert(rows, chunk)
    return dequantize_rows(_quantize(rows, chunk, planned.quantization), planned.quantization)


def run_in_order(jobs: Iterable[Callable[[], _T]]) -> Generator[_T, None, None]:
    """The results of jobs that the workers run, in order, with only a few of them waiting at a time."""
    # Enough that the workers go on through a pause of the disk, and only some MB.
    pool, ahead = workers(), 4 * max(2, machine.cores())
    waiting: deque[Future[_T]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


def _transform(rows: torch.Tensor, transform: Transform) -> torch.Tensor:
    """The transform of checkpoint values, in float32."""
    import torch

    # A transform may work in place, and a float32 source is a view of the checkpoint.
    values = transform.apply(rows.to(torch.float32, copy=True))
    if values.shape != rows.shape or values.dtype != torch.float32:
        raise ValueError(f"transform {transform.name!r} gave {tuple(values.shape)} {values.dtype}")
    return values


@cache
def effect_digest(transform: Transform, columns: int) -> str:
    """SHA-256 of what a transform makes of fixed rows of a width: it changes with what the transform computes."""
    import torch

    probe = torch.tensor(_PROBE)
    rows = probe[(torch.arange(len(probe))[:, None] + torch.arange(columns)) % len(probe)]
    # One row at a time: so few values are computed alike on any number of threads.
    values = torch.cat([_transform(row, transform) for row in rows.split(1)])
    values[values.isnan()] = torch.nan  # which has many bit patterns
    return hashlib.sha256(bytes_of(values)).hexdigest()


@cache
def storage_digest(columns: int, dtype: str, spec: QuantizationSpec | None) -> str:
    """SHA-256 of what storing makes of fixed rows: it changes with what quantizer, cast and packing compute.

    Args:
        columns: width of the rows.
        dtype: of the plain values, or of the scales.
        spec: how they are quantized, None for plain values.
    """
    import torch

    rows = _stored_probe(columns)
    digest = hashlib.sha256()
    if spec is None:
        digest.update(bytes_of(rows.to(getattr(torch, dtype))))
        return digest.hexdigest()
    # One row at a time, as above.
    for quantized in (quantize_rows(row, spec, getattr(torch, dtype)) for row in rows.split(1)):
        parts = (packed_codes(quantized.codes, spec), quantized.scales, quantized.zero_points)
        for part in (part for part in parts if part is not None):
            digest.update(bytes_of(part))
    return digest.hexdigest()


def _stored_probe(columns: int) -> torch.Tensor:
    """Rows in which every step of a quantizer shows: both signs and one alone, zeros, an outlier, values half-way."""
    import torch

    spread = (torch.arange(columns, dtype=torch.float64) * 0.6180339887 + 0.3) % 1 * 2 - 1  # no two alike
    halves = (torch.arange(columns) % 255 - 127 + 0.5) / 127
    outlier = torch.where(torch.arange(columns) == 0, -40.0, spread)
    rows = [spread, spread.abs(), -spread.abs(), spread * 0, outlier, -outlier, halves, spread * 1e-6, spread * 3e3]
    return torch.stack(rows).to(torch.float32)


def _convert(rows: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Checkpoint values to values of the parameter: float32, transform, cast.

    Raises:
        BadInput: when a value is not finite, before or after.
    """
    import torch

    transform = chunk.planned.transform
    values = scratch(rows.shape)[0].copy_(rows) if transform is None else _transform(rows, transform)
    cast = values.to(getattr(torch, chunk.planned.dtype), copy=True)  # the scratch is used again
    low, high = torch.aminmax(cast)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise _not_finite(rows, values, cast, chunk)
    return cast


def _not_finite(rows: torch.Tensor, values: torch.Tensor, cast: torch.Tensor, chunk: Chunk) -> BadInput:
    """The error about a value that is not finite: which one, and whether checkpoint, transform or dtype made it so."""
    import torch

    planned = chunk.planned

    def first(tensor: torch.Tensor) -> tuple[int, int]:
        row, column = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
        return row, column

    if not torch.isfinite(rows).all():
        row, column = first(rows)
        return BadInput(
            f"The checkpoint holds {rows[row, column].item()} in {chunk.key} at row {chunk.start + row}, "
            f"column {column}.",
            "Download it again, or use another revision.",
        )
    row, column = first(cast)
    where = f"{chunk.key} at row {chunk.start + row}, column {column}"
    if planned.transform is not None and not torch.isfinite(values).all():
        row, column = first(values)
        return BadInput(
            f"The transform {planned.transform.name!r} turns {rows[row, column].item()} of {where} into "
            f"{values[row, column].item()}.",
            "The checkpoint's values are outside of what the overlay expects.",
        )
    return BadInput(
        f"The value {values[row, column].item():g} of {where} overflows {planned.dtype}, whose largest value is "
        f"{torch.finfo(cast.dtype).max:g} (parameter {planned.name}).",
        "This checkpoint cannot be stored in that dtype."
        + (" A contract that computes in bfloat16 has the range of float32." if planned.dtype == "float16" else ""),
    )
