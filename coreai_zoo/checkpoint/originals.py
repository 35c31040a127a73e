"""What is no original checkpoint: weights that were quantized already, or laid out for another framework.

A config that says so is no proof: merges and copies in bf16 keep it. The tensors are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import frozen

from coreai_zoo.errors import BadInput, listing


class NotOriginal(BadInput):
    """A checkpoint that another one has to be used in the place of."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint or "Use the original Hugging Face checkpoint, in bf16 as a rule.")

    def instead(self, repository: str | None) -> None:
        """Name the repository of the original, where that is known."""
        if repository is not None:
            self.hint = f"Use the original in its place: {repository}."


@frozen
class Scheme:
    """A way in which others store quantized weights.

    Attributes:
        name: as people call it.
        method: what `quant_method` in a config says of it, an expression.
        keys: what the last part of its tensors' names is, an expression; scales that models have are not among them.
        dtypes: of its integers or floats, an expression, where these alone tell it.
    """

    name: str
    method: str
    keys: str
    dtypes: str = ""


SCHEMES = (
    # Of these, what `fp8` makes sense of is floats by now.
    Scheme("FP8 with block scales", "fp8", r"\w+_scale_inv"),
    Scheme("GPTQ", "", "g_idx"),
    Scheme("AWQ", "awq", "qweight|qzeros"),
    Scheme("GPTQ", "gptq|auto.?round", "qweight|qzeros"),
    Scheme("bitsandbytes", "bitsandbytes|bnb.*", r"(nested_)?absmax|(nested_)?quant_map|bitsandbytes__\w+|SCB"),
    Scheme("compressed-tensors", "compressed.tensors", "weight_(packed|scale|zero_point|shape|g_idx|global_scale)"),
    Scheme("ModelOpt", "modelopt.*|nvfp4", "weight_scale(_2)?|input_scale"),
    Scheme("FBGEMM", "fbgemm_fp8", "weight_scale|input_scale_ub"),
    Scheme("torchao", "torchao", "_?weight_(qdata|scale|scale_and_zero|zero_point|per_tensor_scale|act_pre_scale)"),
    Scheme("MXFP4", "mxfp4", r"\w+_blocks"),
    Scheme("HQQ", "hqq", "W_q"),
    Scheme("AQLM", "aqlm", "codes|codebooks"),
    Scheme("quanto", "quanto", "_data|_scale"),
    Scheme("MLX", "mlx", "", "uint32"),
    Scheme("FP8", "fp8.*", "", r"float8_.*"),
    Scheme("4-bit floats", "", "", r"float[46]_.*"),
    Scheme("integers", "", "", r"u?int[48]"),
)
"""Tried in this order, those first whose method the config names."""

# A model's own tensors are floats: of a method that is not in the table, these are the codes.
_CODES = frozenset({"int16", "uint16", "int32", "uint32", "int64", "uint64"})

_SECTIONS = ("quantization_config", "compression_config", "quantization")


def check_original(where: str, config: Mapping[str, Any], dtypes: Mapping[str, str | None]) -> tuple[str, ...]:
    """Refuse weights that were quantized already.

    Args:
        where: the checkpoint's folder or repository.
        config: its `config.json`.
        dtypes: of its tensors by key; None where only the names are known yet.

    Returns:
        What to note: that the config says so, and the tensors do not.

    Raises:
        NotOriginal: naming the scheme and some of the tensors.
    """
    said = dict(quantization_sections(config))
    if mlx := [name for name, section in said.items() if _is_mlx(name, section)]:
        raise NotOriginal(
            f"{where} was converted for MLX, which keeps the names but changes layouts and values: its config.json "
            f"has {listing(mlx)} with group_size and bits."
        )
    methods = [str(section["quant_method"]).lower() for section in said.values() if section.get("quant_method")]
    named = [scheme for scheme in SCHEMES if any(re.fullmatch(scheme.method, method) for method in methods)]
    for scheme in (*named, *SCHEMES):
        if found := [_with_dtype(key, dtype) for key, dtype in dtypes.items() if _shows(scheme, key, dtype)]:
            raise _quantized(where, scheme.name, found, said)
    if not said or None in dtypes.values():
        return ()
    if methods and (codes := [_with_dtype(key, dtype) for key, dtype in dtypes.items() if dtype in _CODES]):
        raise _quantized(where, listing(methods), codes, said)
    kinds = listing(sorted({str(dtype) for dtype in dtypes.values()}))
    return (f"config.json has {listing(_titles(said))}, but the tensors are not quantized ({kinds}): it is ignored",)


def _quantized(where: str, scheme: str, tensors: list[str], said: Mapping[str, Mapping[str, Any]]) -> NotOriginal:
    by = f", and config.json has {listing(_titles(said))}" if said else ""
    return NotOriginal(
        f"{where} holds weights that are quantized already ({scheme}): {listing(sorted(tensors), 4)}{by}. A bundle is "
        "quantized from the original weights."
    )


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of quantization: transformers would quantize what is not, or look for scales."""
    kept = {key: value for key, value in config.items() if key not in _SECTIONS}
    return {key: without_quantization(value) if isinstance(value, dict) else value for key, value in kept.items()}


def quantization_sections(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where a config speaks of quantization, at the top or in the config of a part, and what each place says."""
    for key, value in config.items():
        if key in _SECTIONS and value:
            yield f"{path}{key}", value if isinstance(value, dict) else {}
        elif isinstance(value, dict) and not path:
            yield from quantization_sections(value, f"{key}.")


def _is_mlx(name: str, section: Mapping[str, Any]) -> bool:
    """Whether a section is one that MLX alone writes."""
    return name.endswith("quantization") and {"group_size", "bits"} <= set(section)


def _titles(said: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{name} ({section['quant_method']})" if "quant_method" in section else name for name, section in said.items()
    ]


def _shows(scheme: Scheme, key: str, dtype: str | None) -> bool:
    named = bool(scheme.keys) and re.fullmatch(scheme.keys, key.rpartition(".")[2]) is not None
    return named or bool(scheme.dtypes and dtype and re.fullmatch(scheme.dtypes, dtype))


def _with_dtype(key: str, dtype: str | None) -> str:
    return key if dtype is None else f"{key} ({dtype})"
