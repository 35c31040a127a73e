"""The toy once more, with a vocabulary of its own: roles, a recipe, bounds, and a reference to be gated against.

Everything else is the plugin of toy_plugin.py. The reference, in toy_reference.py, is the toy in plain PyTorch: all
tokens at once, without states, as whoever trained it would publish it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from attrs import evolve

import toy_plugin
from coreai_zoo import hookimpl
from coreai_zoo.bounds import Measured, MeasuredBounds
from coreai_zoo.gate import ReferenceModel
from coreai_zoo.overlay import COMMON_ROLES, Overlay, Role, WeightMap
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import QuantizationSpec, Recipe

if TYPE_CHECKING:
    import torch

ROLES = (
    *COMMON_ROLES,
    Role("toy.way-back", "the way back from the toy's wide layer", "body"),
    Role("toy.memory", "gains of what the toy remembers"),
)

RECIPE = Recipe.by_role(
    name="toy-int8",
    description="As int8hu, the way back from the wide layer in blocks of 16.",
    specs={**RECIPES["int8hu"].specs, "toy.way-back": QuantizationSpec("int8", "symmetric", 16)},
)

BOUNDS = MeasuredBounds(
    measured_on="no machine: round numbers that a toy with random weights keeps",
    layers=2,
    rows={
        ("int8", "runtime", "dense"): Measured(
            median_error=0.02,
            error=0.04,
            near_tie_error=0,
            cosine_distance=0.0005,
            median_kl=2e-4,
            kl=1e-3,
            hidden_error=0,
            over_control=0,
        )
    },
    router_gaps={},
)


def _role(source: str, role: str) -> str:
    """The toy's own role of a checkpoint key, where it has one."""
    return {"block.{i}.down": "toy.way-back", "block.{i}.gain_m": "toy.memory"}.get(source, role)


def make_reference(hf_config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The reference on the device that is current, as transformers lays a model out."""
    from toy_reference import ToyForCausalLM, ToyReferenceConfig

    fields = {name: value for name, value in hf_config.items() if name != "model_type"}
    return ToyForCausalLM._from_config(ToyReferenceConfig(**fields), dtype=dtype)


class ToyVocabulary(toy_plugin.ToyPlugin):
    """Every hook of the toy, and those that open a vocabulary."""

    @hookimpl
    def zoo_weight_map(self, overlay: Overlay) -> WeightMap | None:
        table = super().zoo_weight_map(overlay)
        if table is None:
            return None
        rules = tuple(evolve(rule, role=_role(rule.source, rule.role)) for rule in table.rules)
        return WeightMap(rules, table.drops, roles=ROLES)

    @hookimpl
    def zoo_recipes(self) -> Iterable[Recipe]:
        return [RECIPE]

    @hookimpl
    def zoo_oracle(self, overlay: Overlay) -> ReferenceModel | None:
        return ReferenceModel("toy 1.0", make_reference) if overlay.name == "toy" else None

    @hookimpl
    def zoo_gate_bounds(self, overlay: Overlay) -> MeasuredBounds | None:
        return BOUNDS if overlay.name == "toy" else None
