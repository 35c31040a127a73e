"""Checkpoints that are not the original: weights that were quantized already are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coreai_zoo.checkpoint.folder import CONFIG
from coreai_zoo.checkpoint.headers import TensorInfo
from coreai_zoo.errors import BadInput, listing

_QUANTIZED_DTYPE = re.compile(r"u?int[48]|float[468]_.*")
# Names that GPTQ, AWQ, compressed-tensors and fp8 checkpoints use. Bare "scale" is not among them: models have those.
_QUANTIZED_KEY = re.compile(
    r"(.*\.)?(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_zero_point|\w+_scale_inv|SCB)"
)
_QUANTIZED_CONFIG = ("quantization_config", "compression_config", "quantization")
_USE_ORIGINAL = "Pre-quantized weights are not supported: use the original bf16 checkpoint."


def refuse_quantized(directory: Path, config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> None:
    """Refuse weights that were quantized already.

    Raises:
        BadInput: when the config says that they are, or dtypes or names of tensors show it.
    """
    sections = {"": config, **{name: part for name, part in config.items() if isinstance(part, dict)}}
    for name, section in sections.items():
        for key in _QUANTIZED_CONFIG:
            if section.get(key):
                method = section[key].get("quant_method") if isinstance(section[key], dict) else None
                where = f"{name}.{key}" if name else key
                raise BadInput(f"{directory / CONFIG} has a {where}{f' ({method})' if method else ''}.", _USE_ORIGINAL)
    quantized = [
        f"{tensor.key} ({tensor.dtype})"
        for tensor in tensors
        if _QUANTIZED_DTYPE.fullmatch(tensor.dtype) or _QUANTIZED_KEY.fullmatch(tensor.key)
    ]
    if quantized:
        raise BadInput(f"{directory} holds quantized tensors: {listing(quantized, 6)}.", _USE_ORIGINAL)
