"""Names under which a decoder's state is stored, and names in names."""

from __future__ import annotations

import re

_PARTS = {".original": "", ".0.scales": "scales", ".0.zero_points": "zero points", ".0.table": "table"}


def slug(name: str) -> str:
    """A name as a part of a bundle's name: `acme_1_5_7b` for `Acme-1.5-7B`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "model"


def quantized_names(name: str) -> tuple[str, str, str, str]:
    """Names of the integers, scales, zero points and table of the quantized `name` as torch parametrizes it."""
    path, _, leaf = name.rpartition(".")
    return names_beside(f"{path}.parametrizations.{leaf}.original" if path else f"parametrizations.{leaf}.original")


def names_beside(codes: str) -> tuple[str, str, str, str]:
    """As `quantized_names`, of the parameter whose integers are called `codes`."""
    state = codes.removesuffix("original")
    return codes, state + "0.scales", state + "0.zero_points", state + "0.table"


def parameter_of(state: str) -> tuple[str, str]:
    """The parameter that a state belongs to, and its part: `scales`, `zero points`, `table`, or '' for the values."""
    name = state.replace(".parametrizations.", ".")
    for ending, part in _PARTS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), part
    return name, ""
