"""Plans: bundles that are not built, for `zoo plan`."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import evolve, frozen

from coreai_zoo.build.design import design
from coreai_zoo.build.figures import Figures
from coreai_zoo.build.preflight import Preflight, preflight
from coreai_zoo.build.request import DEFAULT_OUTPUT, BuildRequest
from coreai_zoo.build.workspace import Workspace
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput
from coreai_zoo.plugins import Plugins

_UNBUILT = ".plan"  # no build is called so: what it writes is counted from nothing


@frozen
class Plan(Figures):
    """A bundle that was not built: its figures, and what building it would take.

    Attributes:
        name: what the model is called, see `Design.label`.
        build: what a build reads, writes and needs on this machine.
    """

    name: str
    build: Preflight


def plan(request: BuildRequest, plugins: Plugins, entry: Entry | None = None) -> Plan:
    """The plan for a dry request.

    Args:
        request: what was asked for.
        plugins: the plugins that bring what it names.
        entry: the entry itself; None to look it up by the name in the request.

    Raises:
        BadInput: when there is no such entry, recipe or contract, the entry states too little, nothing can be built
            from the config and the headers of the weights that are there, or the backend cannot hold it.
        PluginError: when the answer of a plugin is not usable.
    """
    designed = design(request, plugins, entry)
    designed.backend.require(designed.signatures, designed.weights.quantizations)
    return Plan(designed, designed.label, preflight(designed, Workspace.of(DEFAULT_OUTPUT, _UNBUILT, None, keep=False)))


def plans_by_recipe(request: BuildRequest, plugins: Plugins) -> tuple[Mapping[str, Plan], Mapping[str, str]]:
    """The plans for a dry request by every recipe that is installed, and why there is none by the others.

    Raises:
        BadInput: when there is none at all.
        PluginError: as `plan`.
    """
    plans, misfits, refused = {}, {}, None
    for name in plugins.recipes():
        try:
            plans[name] = plan(evolve(request, recipe=name), plugins)
        except BadInput as error:
            misfits[name], refused = error.message, error
    if not plans and refused is not None:
        raise refused
    return plans, misfits
