"""The structure of a bundle, everything of it that can be compared: of one on disk, and of one that was never built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attrs import evolve, field, frozen

from coreai_zoo.backend import Backend, Traced
from coreai_zoo.build.design import Design, design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.build.target import backend_of
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.metadata import leaves
from coreai_zoo.catalogue import find_contract
from coreai_zoo.dtypes import packed_bytes
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput
from coreai_zoo.lowering.graph import Graph, count, telling_depth
from coreai_zoo.names import parameter_of
from coreai_zoo.overlay import Role
from coreai_zoo.plugins import Plugins
from coreai_zoo.program import Program
from coreai_zoo.recipes import PLAIN, recorded_text, stored_text
from coreai_zoo.signature import TraceSpec
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan, active_share


@frozen
class RoleWeights:
    """All weights of one role.

    Attributes:
        stored: how they are quantized, in words.
        bytes: what they take in the asset.
        role: the role itself; None where a bundle does not record it.
    """

    stored: str
    tensors: int
    parameters: int
    bytes: int
    role: Role | None


@frozen
class StoredWeight:
    """One tensor that an asset stores.

    Attributes:
        shape: its shape in elements.
        dtype: its logical dtype, for example `int8`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes that it takes in the asset."""
        return packed_bytes(self.shape, self.dtype)


@frozen
class Structure:
    """Everything of a bundle that is compared.

    Attributes:
        label: names it for the reader.
        overlay: name of the overlay.
        facts: what the overlay knows of the config.
        signatures: the signature of each function that an engine calls, by name.
        graphs: operation counts of these functions, of all layers.
        program: the operations themselves; of the traced layers only, where `traced` says how many these are.
        traced: number of layers that `program` has; None for all.
        stored: the stored tensors by name; codes, scales and zero points of a weight are one each.
        roles: the weights by role.
        metadata: what the bundle says about itself, as flat keys; empty where there is none.
    """

    label: str
    overlay: str
    contract: str
    backend: str
    facts: Mapping[str, Any]
    signatures: Mapping[str, TraceSpec]
    graphs: Mapping[str, Graph]
    program: Program = field(repr=False)
    traced: int | None
    stored: Mapping[str, StoredWeight] = field(repr=False)
    roles: Mapping[str, RoleWeights]
    metadata: Mapping[str, str]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(weight.bytes for weight in self.stored.values())

    @property
    def bytes_per_token(self) -> int | None:
        """Bytes of weights that one decode step reads: all but the embedding table, of experts those that are active.

        None where that is not known: how many experts are active, or, of an old bundle, what its roles are.
        """
        total = 0.0
        for weights in self.roles.values():
            if weights.role is None:
                return None
            if weights.role.kind == "embedding":
                continue
            share = active_share(weights.role, self.facts)
            if share is None:
                return None
            total += weights.bytes * share
        return round(total)


# ---------------------------------------------------------------------------------------------------------------------
# Of a bundle on disk
# ---------------------------------------------------------------------------------------------------------------------


def of_bundle(bundle: Bundle, backend: Backend) -> Structure:
    """The structure of a bundle on disk.

    Raises:
        CheckFailed: when its asset cannot be read.
        BadInput: when its record lacks what is compared.
    """
    program = backend.program(bundle.asset)
    build = bundle.build
    try:
        recipe, known = build["recipe"]["roles"], build.get("roles", {})
        roles = {
            role: RoleWeights(
                recorded_text(recipe[role]),
                counts["tensors"],
                counts["parameters"],
                counts["bytes"],
                Role(**known[role]) if role in known else None,
            )
            for role, counts in build["weights"].items()
        }
        return Structure(
            label=bundle.directory.name,
            overlay=build["overlay"]["name"],
            contract=build["contract"]["name"],
            backend=build["backend"],
            facts=build["facts"],
            signatures=bundle.functions,
            graphs=count(program),
            program=program,
            traced=None,
            stored={_weight_name(name): StoredWeight(*kind) for name, kind in program.stored.items()},
            roles=roles,
            metadata={key: str(value) for key, value in flattened(bundle.metadata, ".").items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"build.json of {bundle.directory} lacks what is compared: {error!r}.") from error


def contents(bundle: Bundle, backend: Backend) -> dict[str, memoryview]:
    """The bytes of a bundle's stored tensors, mapped, by the names that `Structure.stored` has."""
    return {_weight_name(name): view for name, view in backend.constants(bundle.asset).items()}


def _weight_name(state: str) -> str:
    """A stored tensor's name without how torch presents a quantized weight: the parameter, and which part of it."""
    return " ".join(parameter_of(state)).rstrip()


def flattened(content: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """The values of nested tables, each by the keys that lead to it joined by a separator; an empty table has none."""
    return {path: value for path, value in leaves(content, separator).items() if not isinstance(value, Mapping)}


# ---------------------------------------------------------------------------------------------------------------------
# Of an entry, without weights
# ---------------------------------------------------------------------------------------------------------------------


def of_entry(
    entry: Entry, plugins: Plugins, *, recipe: str | None = None, contract: str | None = None, sample: bool = False
) -> Structure:
    """The structure of the bundle that an entry would give, from its facts.

    No weight is at hand and none is needed: as many layers are lowered as show each kind twice, with nothing in their
    weights, and counted. Everything else follows from the sizes.

    Args:
        entry: the entry.
        plugins: what is installed.
        recipe: name of a recipe; None for the entry's.
        contract: name of a contract; None for the entry's.
        sample: whether to take the sizes of the entry's sample.

    Raises:
        BadInput: when the entry does not state what its config needs.
    """
    request = BuildRequest(entry.name, sample=sample, recipe=recipe, **_aimed(entry, plugins, contract), dry=True)
    whole = design(request, plugins, entry)
    part = _telling_part(whole, plugins)
    program = _lowered(part.trace(), part.weights)
    return Structure(
        label=f"{entry.name} as {whole.recipe.name}" + (" (sample)" if sample else ""),
        overlay=whole.model.overlay.name,
        contract=whole.contract.name,
        backend=whole.backend.name,
        facts=whole.facts,
        signatures=whole.signatures,
        graphs=_repeated(count(program), whole),
        program=program,
        traced=None if part is whole else part.request.layers,
        stored={name: weight for tensor in whole.weights.stored for name, weight in _stored(tensor)},
        roles=_roles(whole.weights),
        metadata={},
    )


def _repeated(graphs: Mapping[str, Graph], whole: Design) -> dict[str, Graph]:
    return {function: graph.repeated(whole.layer_kinds) for function, graph in graphs.items()}


def graphs(
    entry: Entry, plugins: Plugins, recipes: Iterable[str], contract: str | None = None
) -> Iterator[tuple[str, dict[str, Graph]]]:
    """Each recipe with the graphs that `of_entry` counts under it, by function, in a fraction of the time.

    Recipes differ in how weights are stored and not in what is computed with them, so the decoder is traced once, with
    plain weights where a backend can, and lowered once per recipe with the weights as that stores them. Of experts
    there are only twice as many as a token takes: their number is the size of a tensor and no more to the graph, and
    the toolchain would transpose each that is plain, which took most of the time. `contract` is the entry's where it is
    None.

    Raises:
        BadInput: when the entry does not state what its config needs.
    """
    request = BuildRequest(entry.name, recipe=PLAIN, **_aimed(entry, plugins, contract), dry=True)
    whole = design(request, plugins, _with_few_experts(entry))
    part = _telling_part(whole, plugins)
    traced = None if part.backend.traces_quantized else part.trace()
    for recipe in recipes:
        stored = part.with_recipe(recipe)
        yield recipe, _repeated(count(_lowered(traced or stored.trace(), stored.weights)), whole)


def _aimed(entry: Entry, plugins: Plugins, contract: str | None) -> dict[str, Any]:
    """The part of a request that says for what: a contract, the entry's unless one is named, and who writes for it."""
    return {"contract": contract, "backend": backend_of(find_contract(contract or entry.contract, plugins))}


def _with_few_experts(entry: Entry) -> Entry:
    """The entry of a model with so few experts, of which the number of parameters is not known."""
    experts, chosen = (entry.facts.stated.get(name) for name in ("experts", "experts_per_token"))
    if not isinstance(experts, int) or not isinstance(chosen, int):
        return entry
    more = {**entry.facts.more, "experts": min(experts, 2 * chosen)}
    return evolve(entry, facts=evolve(entry.facts, parameters=None, more=more))


def _telling_part(whole: Design, plugins: Plugins) -> Design:
    """The design of as many layers as show each kind twice; `whole` itself where that is all of them."""
    kinds = whole.layer_kinds
    depth = telling_depth(kinds)
    return whole if depth == len(kinds) else design(evolve(whole.request, layers=depth), plugins, whole.entry)


def _lowered(traced: Traced, plan: WeightPlan) -> Program:
    """Lower what was traced."""
    from coreai_zoo.lowering.module import planned_constants

    return traced.lowered(planned_constants(plan))


def _stored(tensor: PlannedTensor) -> list[tuple[str, StoredWeight]]:
    suffixes = {"data": "", "scales": " scales", "zero_points": " zero points", "table": " table"}
    return [
        (f"{tensor.name}{suffixes[kind]}", StoredWeight(array.shape, array.dtype))
        for kind, array in tensor.format.arrays.items()
    ]


def _roles(plan: WeightPlan) -> dict[str, RoleWeights]:
    totals, stored_as = plan.totals(), plan.stored_as()
    return {
        name: RoleWeights(
            stored_text(stored_as[name]),
            totals[name].tensors,
            totals[name].parameters,
            totals[name].bytes,
            plan.roles[name],
        )
        for name, tensors in sorted(plan.by_role().items())
    }
