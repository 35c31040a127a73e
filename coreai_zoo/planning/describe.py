"""Plans for programs: what `zoo plan --json` and the catalogue have in common."""

from __future__ import annotations

from typing import Any

from attrs import asdict

from coreai_zoo.build.chips import Chip, tokens_per_second
from coreai_zoo.planning.plan import Plan

IDEAL_GATHERING = (
    "Of a mixture of experts the rate is that of ideal gathering; an engine that reads more than the chosen experts "
    "falls towards the rate of reading every one."
)
"""What has to be said beside the rates of a bundle that `gathers`."""


def describe_model(plan: Plan) -> dict[str, Any]:
    """What is planned, whatever its contract."""
    design = plan.design
    return {
        "name": plan.name,
        "entry": design.entry.name if design.entry else None,
        "status": design.entry.status if design.entry else None,
        "overlay": design.model.overlay.name,
        "plugin": design.model.plugin,
        "recipe": design.recipe.name,
        "published_name": design.recipe.published_name,
        "target": str(design.request.target) if design.request.target else None,
    }


def describe_published(plan: Plan) -> list[dict[str, Any]]:
    """What others measured of such bundles."""
    return [{**asdict(measured), "sentence": measured.sentence} for measured in plan.published]


def describe_bundle(plan: Plan) -> dict[str, Any]:
    """The bundle of a contract, and what a machine has to hold and read for it."""
    return {
        "bundle": plan.design.name,
        "contract": plan.design.contract.name,
        "backend": plan.design.backend.name,
        "asset_bytes": plan.asset,
        "tokenizer_bytes": plan.tokenizer,
        "bundle_bytes": plan.bundle,
        "decode": {
            "read_per_token": plan.read,
            "dense_read_per_token": plan.dense_read,
            "state_growth_per_position": plan.growth,
        },
        "states": {"context": plan.context, "bytes": plan.state_bytes, "by_name": dict(plan.states)},
    }


def describe_decode(plan: Plan, chip: Chip, efficiency: float) -> dict[str, Any]:
    """A machine, and how fast it decodes."""
    return {
        "name": chip.name,
        "bandwidth_gb_per_second": chip.bandwidth,
        "fits_from_gib": chip.smallest_memory(plan.resident),
        "tokens_per_second": tokens_per_second(plan.read, chip.bandwidth),
        "tokens_per_second_at_efficiency": tokens_per_second(plan.read, chip.bandwidth, efficiency),
        "tokens_per_second_dense_read": tokens_per_second(plan.dense_read, chip.bandwidth),
    }
