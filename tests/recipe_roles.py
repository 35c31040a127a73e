"""What a recipe says of a role, where it asks for no more than that."""

from __future__ import annotations

from coreai_zoo.overlay import Role
from coreai_zoo.recipes import QuantizationSpec, Recipe


def spec_of_role(recipe: Recipe, role: Role) -> QuantizationSpec | None:
    """How a weight of a role is stored, whatever its name and layer."""
    rule = recipe.rule_for("", role, 1)
    assert rule is not None
    return recipe.spec_of(rule)
