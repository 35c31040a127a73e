"""FP8 weights with block scales as the floats that they stand for.

Such a checkpoint holds a matrix X in 8 bits, and under the name `X_scale_inv` a factor for each of its blocks, of 128 x
128 as a rule. A value is the product of the two, in float32, as in transformers' `Fp8Dequantize`. Whoever reads the
checkpoint sees X in float32 and no scales. Products are made of the rows that are read, when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from coreai_zoo.checkpoint.headers import TensorInfo
from coreai_zoo.checkpoint.originals import quantization_sections
from coreai_zoo.errors import BadInput, listing

if TYPE_CHECKING:
    import torch

_SCALE = "_scale_inv"
_FP8 = ("float8_e4m3fn", "float8_e5m2")
_SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
_EXPONENT_BIAS = 127  # of a power of two that is stored as a byte
# Of inputs that were quantized with a fixed scale: it says nothing about the weights.
_ACTIVATION_SCALE = re.compile(r".*\.(activation|input)_scale")


@frozen
class BlockScales:
    """The factors of one matrix.

    Attributes:
        info: the tensor that holds them, [row blocks, column blocks] (an expert after the other, where there are more).
        rows: rows of the matrix in a block.
        columns: columns in a block.
    """

    info: TensorInfo
    rows: int
    columns: int

    def applied(
        self, stored: torch.Tensor, start: int, read_rows: Callable[[TensorInfo, int, int], torch.Tensor]
    ) -> torch.Tensor:
        """Rows of the matrix, float32.

        Args:
            stored: the rows as they are stored, [rows, columns].
            start: which row of the matrix the first one is.
            read_rows: reads rows of a tensor, here of the scales.
        """
        import torch

        first, last = start // self.rows, -(-(start + len(stored)) // self.rows)
        scales = read_rows(self.info, first, last)
        factors = (
            (scales.float() - _EXPONENT_BIAS).exp2() if scales.dtype == torch.uint8 else scales.to(torch.float32)
        ).repeat_interleave(self.rows, dim=0)[start - first * self.rows :][: len(stored)]
        blocks = stored.to(torch.float32).unflatten(-1, (-1, self.columns))
        values: torch.Tensor = (blocks * factors.unsqueeze(-1)).flatten(-2)
        return values


def fold_scales(
    where: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], dict[str, BlockScales]]:
    """The tensors of a checkpoint without the scales of others, and these scales by the name of what they scale.

    Args:
        where: the checkpoint, for an error.
        config: its `config.json`, which may state the size of a block.
        tensors: what its headers describe.

    Raises:
        BadInput: when scales do not fit their matrix.
    """
    stated = _stated_block(config)
    scales: dict[str, BlockScales] = {}
    problems: list[str] = []
    for key, info in tensors.items():
        scale = tensors.get(f"{key}{_SCALE}")
        if scale is None or info.dtype not in _FP8:
            continue
        block = _block(info, scale, stated)
        if block is None:
            problems.append(f"{scale.key} ({scale.dtype} {list(scale.shape)}) for {list(info.shape)}")
        else:
            scales[key] = BlockScales(scale, *block)
    if problems:
        raise BadInput(
            f"{where} holds FP8 weights whose scales do not divide them into equal blocks: {listing(problems, 4)}.",
            "Download it again, or use the original in bf16.",
        )
    kept = names_without_scales(tensors) if scales else tensors
    return {key: evolve(tensors[key], dtype="float32") if key in scales else tensors[key] for key in kept}, scales


def _stated_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """`weight_block_size` of a config, wherever it speaks of quantization, where it is two numbers."""
    for _, section in quantization_sections(config):
        size = section.get("weight_block_size")
        if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size):
            return size[0], size[1]
    return None


def _block(info: TensorInfo, scale: TensorInfo, stated: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of a block, or None where shapes and dtype do not tell them beyond doubt."""
    if scale.dtype not in _SCALES or len(info.shape) < 2:
        return None
    if scale.rows == scale.columns == 1:
        return info.rows, info.columns
    if len(scale.shape) != len(info.shape) or scale.shape[:-2] != info.shape[:-2]:
        return None
    size, grid = info.shape[-2:], scale.shape[-2:]
    if 0 in grid or size[0] % grid[0] or size[1] % grid[1]:
        return None
    block = size[0] // grid[0], size[1] // grid[1]
    # Where the stated size does not divide the matrix, its last blocks are smaller: equal ones would be wrong.
    if stated is not None and list(block) != [min(pair) for pair in zip(stated, size, strict=True)]:
        return None
    return block


def names_without_scales(names: Iterable[str]) -> list[str]:
    """The names of a checkpoint's tensors without those that scale others or their inputs."""
    names = list(names)
    known = set(names)
    return [
        name
        for name in names
        if not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in known) and not _ACTIVATION_SCALE.fullmatch(name)
    ]


def described(scales: Mapping[str, BlockScales]) -> str:
    """The precision of FP8 weights, in words."""
    blocks = sorted({(scale.rows, scale.columns) for scale in scales.values()})
    return f"FP8 with a scale for each block of {listing([f'{rows} x {columns}' for rows, columns in blocks], 3)}"
