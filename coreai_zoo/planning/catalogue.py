"""The catalogue: every entry by every recipe and contract, with what each bundle would hold, need and run at.

Each is what `zoo plan` says of it. The record holds no date and nothing of this machine, so that the same installation
gives the same bytes; `catalogue.schema.json` beside this module describes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from coreai_zoo import __version__
from coreai_zoo.build.chips import CHIPS, EFFICIENCY, EFFICIENCY_SOURCE, GPU_SHARE_SOURCE, gpu_bytes
from coreai_zoo.build.request import DEFAULT_BACKEND, BuildRequest
from coreai_zoo.build.target import backend_of
from coreai_zoo.catalogue import load_entries
from coreai_zoo.contracts import Contract
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, PluginError, zoo_command
from coreai_zoo.planning.describe import IDEAL_GATHERING, describe_bundle, describe_decode, describe_published
from coreai_zoo.planning.plan import Plan, plan
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.recipes import Recipe

SCHEMA = 1
"""Of the record. It counts up when a key changes its meaning or goes."""

SCHEMA_FILE = Path(__file__).with_name("catalogue.schema.json")

MEMORIES = tuple(sorted({memory for chip in CHIPS for memory in chip.memory}))
"""Every memory that a chip is sold with, in GiB, ascending: 16 to 128, and more where the chips have more."""


@frozen
class Refused:
    """A combination that there is no bundle of, with the reason."""

    entry: str
    recipe: str
    contract: str
    reason: str


@frozen
class Catalogue:
    """Everything that could be built, in the order of entries, recipes and contracts.

    Attributes:
        entries: each with the plugin that brings it.
        plans: of the bundles.
        refused: the combinations of which there is no bundle.
    """

    entries: Sequence[tuple[Entry, str]]
    recipes: Sequence[Recipe]
    contracts: Sequence[Contract]
    plans: Sequence[Plan]
    refused: Sequence[Refused]


def read_catalogue(plugins: Plugins, report: Reporter) -> Catalogue:
    """The catalogue of what the plugins bring, planned one by one, each by the backend that is usual for its contract.

    Args:
        plugins: bring entries, recipes and contracts.
        report: counts the plans.
    """
    entries = [*load_entries(plugins).values()]
    recipes, contracts = list(plugins.recipes().values()), list(plugins.contracts().values())
    plans, refused = [], []
    with report.steps("planning every bundle", len(entries) * len(recipes) * len(contracts)) as count:
        for (entry, _plugin), recipe, contract in product(entries, recipes, contracts):
            request = BuildRequest(
                entry.name, recipe=recipe.name, contract=contract.name, backend=backend_of(contract), dry=True
            )
            try:
                plans.append(plan(request, plugins, entry))
            except (BadInput, PluginError) as error:
                refused.append(Refused(entry.name, recipe.name, contract.name, error.message))
            count()
    return Catalogue(entries, recipes, contracts, plans, refused)


def as_record(catalogue: Catalogue) -> dict[str, Any]:
    """The catalogue as `catalogue.json` has it."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "chips": [
            {
                "name": chip.name,
                "bandwidth_gb_per_second": chip.bandwidth,
                "memory_gib": list(chip.memory),
                "tflops": chip.tflops,
            }
            for chip in CHIPS
        ],
        "memories": [{"gib": memory, "gpu_bytes": gpu_bytes(memory)} for memory in MEMORIES],
        "efficiency": {"share": EFFICIENCY, "source": EFFICIENCY_SOURCE},
        "fits_source": GPU_SHARE_SOURCE,
        "gathering": IDEAL_GATHERING,
        "entries": [_entry(entry, plugin) for entry, plugin in catalogue.entries],
        "recipes": [
            {"name": recipe.name, "description": recipe.description, "quality": recipe.quality or None}
            for recipe in catalogue.recipes
        ],
        "contracts": [
            {
                "name": contract.name,
                "summary": contract.summary,
                "systems": [str(system) for system in contract.systems],
            }
            for contract in catalogue.contracts
        ],
        "bundles": [_bundle(made) for made in catalogue.plans],
        "refused": [asdict(one) for one in catalogue.refused],
    }


def _entry(entry: Entry, plugin: str) -> Mapping[str, Any]:
    return {
        "name": entry.name,
        "title": entry.title,
        "summary": entry.summary,
        "plugin": plugin,
        "hf_id": entry.hf_id,
        "hf_revision": entry.hf_revision,
        "licence": entry.licence,
        "status": entry.status,
        "ffn": entry.facts.ffn,
        "parameters": entry.facts.parameters,
        "max_context_length": entry.facts.max_context_length,
        "recipe": entry.recipe,
        "contract": entry.contract,
    }


def _bundle(made: Plan) -> Mapping[str, Any]:
    design = made.design
    assert design.entry is not None
    return {
        "entry": design.entry.name,
        "recipe": design.recipe.name,
        "published_name": design.recipe.published_name,
        **describe_bundle(made),
        "bits_per_parameter": made.bits,
        "command": _command(made),
        "fits": [
            {"memory_gib": memory, "most_context": made.context_within(gpu_bytes(memory)) or None}
            for memory in MEMORIES
        ],
        "machines": [describe_decode(made, chip, EFFICIENCY) for chip in CHIPS],
        "published": describe_published(made),
    }


def _command(made: Plan) -> str:
    """What builds the bundle."""
    design = made.design
    assert design.entry is not None
    backend = [] if design.backend.name == DEFAULT_BACKEND else ["--backend", design.backend.name]
    return zoo_command(
        "build", design.entry.name, "--recipe", design.recipe.name, "--contract", design.contract.name, *backend
    )
