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


def parameter_of(state: str) -> tuple[str, str]:
    """The parameter that a state belongs to, and its part: `scales`, `zero points`, or nothing for the values."""
    name = state.replace(".parametrizations.", ".")
    for ending, part in ((".original", ""), (".0.scales", "scales"), (".0.zero_points", "zero points")):
        if name.endswith(ending):
            return name.removesuffix(ending), part
    return name, ""
