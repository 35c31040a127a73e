"""Names under which a decoder's state is stored."""

from __future__ import annotations


def quantized_names(name: str) -> tuple[str, str, str]:
    """Names of the integers, scales and zero points of the quantized parameter `name`, as `bind` makes them."""
    path, _, leaf = name.rpartition(".")
    state = f"{path}.parametrizations.{leaf}." if path else f"parametrizations.{leaf}."
    return state + "original", state + "0.scales", state + "0.zero_points"


def scales_name(codes: str) -> str:
    """Name of the scales that belong to the integers called `codes`; see `quantized_names`."""
    return f"{codes.removesuffix('original')}0.scales"
