"""What a bundle is made of, as far as two of them can be compared: of one on disk, and of one that was never built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import evolve, field, frozen

from coreai_zoo.backend import Backend, Traced
from coreai_zoo.build.model import Model, config_of_entry, read_model, signature
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.checkpoint.files import read_config
from coreai_zoo.contracts import Contract, find_contract
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput
from coreai_zoo.lowering.graph import Graph, count, layer_names
from coreai_zoo.plugins import Plugins
from coreai_zoo.program import Program
from coreai_zoo.recipes import QuantizationSpec, Recipe, find_recipe
from coreai_zoo.signature import TraceSpec
from coreai_zoo.weights.formats import blocks_per_row, has_zero_points
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan, active_share, plan_without_checkpoint

if TYPE_CHECKING:
    from torch import nn


_PLAIN = "fp16"  # the recipe that quantizes nothing


@frozen
class RoleWeights:
    """All weights of one role: how they are stored, and how much they are."""

    stored: str
    tensors: int
    parameters: int
    bytes: int


@frozen
class StoredWeight:
    """One tensor that an asset stores.

    Attributes:
        shape: in elements.
        dtype: logical, for example `int8`.
        bytes: in the asset.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int


@frozen
class Structure:
    """What is compared of a bundle.

    Attributes:
        label: for the reader.
        overlay: name of the overlay.
        facts: what the overlay knows of the config.
        signatures: of each function that an engine calls, by its name.
        graphs: operation counts of each function, of all layers.
        program: the operations themselves; of the traced layers only, where `traced` says how many these are.
        traced: number of layers that `program` has, if not all.
        stored: by name; codes, scales and zero points of a weight are one each.
        roles: the recipe and what it comes to.
        bytes_per_token: that a decode step reads, see `bytes_per_token`.
        metadata: what the bundle says about itself, flat; empty where there is none.
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

        None when there are experts and the overlay does not say how many are active.
        """
        total = 0.0
        for role, weights in self.roles.items():
            if role == "embedding":
                continue
            share = active_share(role, self.facts)
            if share is None:
                return None
            total += weights.bytes * share
        return round(total)


# ---------------------------------------------------------------------------------------------------------------------
# Of a bundle on disk
# ---------------------------------------------------------------------------------------------------------------------


def of_bundle(bundle: Bundle, backend: Backend) -> Structure:
    """Read a bundle's structure.

    Raises:
        CheckFailed: when its asset cannot be read.
        BadInput: when its record lacks what is compared.
    """
    program = backend.program(bundle.asset)
    stored = {
        _weight_name(name): StoredWeight(shape, dtype, _size(shape, dtype))
        for name, (shape, dtype) in program.stored.items()
    }
    build = bundle.build
    try:
        recipe = build["recipe"]["roles"]
        roles = {
            role: RoleWeights(_spec_text(recipe[role]), counts["tensors"], counts["parameters"], counts["bytes"])
            for role, counts in build["weights"].items()
        }
        return Structure(
            label=bundle.directory.name,
            overlay=build["overlay"]["name"],
            contract=build["contract"]["name"],
            backend=build["backend"],
            facts=build["facts"],
            signatures=dict.fromkeys(program.functions, bundle.signature),
            graphs=count(program),
            program=program,
            traced=None,
            stored=stored,
            roles=roles,
            metadata=_flat(bundle.metadata),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"build.json of {bundle.directory} lacks what is compared: {error!r}.") from error


def contents(bundle: Bundle, backend: Backend) -> dict[str, memoryview]:
    """The bytes of a bundle's stored tensors, mapped, by the names that `Structure.stored` has."""
    return {_weight_name(name): view for name, view in backend.constants(bundle.asset).items()}


def _size(shape: tuple[int, ...], dtype: str) -> int:
    bits = 8 if dtype == "bool" else int("".join(filter(str.isdigit, dtype)))
    return math.ceil(math.prod(shape) * bits / 8)


def _weight_name(name: str) -> str:
    """The name of a stored tensor without how torch presents a quantized weight."""
    return (
        name.replace(".parametrizations.", ".")
        .replace(".0.scales", " scales")
        .replace(".0.zero_points", " zero points")
        .removesuffix(".original")
    )


def _spec_text(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "not quantized"
    return str(QuantizationSpec(record["dtype"], record["scheme"], record["block"]))


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)
    return flat


# ---------------------------------------------------------------------------------------------------------------------
# Of an entry, without weights
# ---------------------------------------------------------------------------------------------------------------------


def of_entry(entry: Entry, plugins: Plugins, *, recipe: str | None = None, sample: bool = False) -> Structure:
    """The structure of the bundle that an entry would give, from its facts.

    No weight is at hand and none is needed: as many layers are lowered as show each kind twice, with nothing in their
    weights, and counted. Everything else is told by the sizes.

    Args:
        entry: which.
        plugins: what claims it.
        recipe: another than the entry's.
        sample: at the sizes of the entry's sample instead of its own.

    Raises:
        BadInput: when the entry does not state what its config needs.
    """
    contract, chosen = find_contract(entry.contract), find_recipe(recipe or entry.recipe)
    hf_config = _config_of(entry, plugins, sample=sample)
    whole = _Unbuilt.of(hf_config, entry, contract, chosen, plugins)
    names = layer_names(tensor.name for tensor in whole.plan.tensors)
    depth = _telling_depth(names)
    part = whole
    if depth < len(names):
        part = _Unbuilt.of(hf_config, entry, contract, chosen, plugins, depth)
    backend = _backend(plugins)
    program = _lowered(part.traced(backend, part.signature(contract, entry, plugins)), part.plan)
    return Structure(
        label=f"{entry.name} as {chosen.name}" + (" (sample)" if sample else ""),
        overlay=whole.model.overlay.name,
        contract=contract.name,
        backend=backend.name,
        facts=whole.model.facts,
        signatures=dict.fromkeys(program.functions, whole.signature(contract, entry, plugins)),
        graphs=_repeated(count(program), names),
        program=program,
        traced=depth if depth < len(names) else None,
        stored={name: weight for tensor in whole.plan.tensors for name, weight in _stored(tensor)},
        roles=_roles(whole.plan),
        metadata={},
    )


def _repeated(graphs: Mapping[str, Graph], names: Sequence[str]) -> dict[str, Graph]:
    return {function: graph.repeated(names) for function, graph in graphs.items()}


def graphs(entry: Entry, plugins: Plugins, recipes: Iterable[str]) -> Iterator[tuple[str, dict[str, Graph]]]:
    """For each recipe the graphs that `of_entry` counts, by function, in a fraction of the time.

    Recipes differ in how weights are stored and not in what is computed with them, so the decoder is traced once, with
    plain weights, and lowered once per recipe with the weights as that stores them. Of experts there are only twice as
    many as a token takes: their number is the size of a tensor and no more to the graph, and the toolchain would
    transpose each that is plain, which took most of the time.

    Raises:
        BadInput: when the entry does not state what its config needs.
    """
    contract, plain = find_contract(entry.contract), find_recipe(_PLAIN)
    hf_config = config_of_entry(_with_few_experts(entry), plugins)
    whole = _Unbuilt.of(hf_config, entry, contract, plain, plugins)
    names = layer_names(tensor.name for tensor in whole.plan.tensors)
    depth = _telling_depth(names)
    part = whole if depth == len(names) else _Unbuilt.of(hf_config, entry, contract, plain, plugins, depth)
    traced = part.traced(_backend(plugins), part.signature(contract, entry, plugins))
    for recipe in recipes:
        plan = _planned(part.model, part.module, find_recipe(recipe), entry, plugins)
        yield recipe, _repeated(count(_lowered(traced, plan)), names)


def _with_few_experts(entry: Entry) -> Entry:
    experts, chosen = (entry.facts.stated.get(name) for name in ("experts", "experts_per_token"))
    if not isinstance(experts, int) or not isinstance(chosen, int):
        return entry
    return evolve(entry, facts=evolve(entry.facts, more={**entry.facts.more, "experts": min(experts, 2 * chosen)}))


def _backend(plugins: Plugins) -> Backend:
    backends = plugins.backends()
    if "coreai" not in backends:
        raise BadInput("The backend coreai is not installed, and a graph is counted as it lowers it.")
    return backends["coreai"]


def _config_of(entry: Entry, plugins: Plugins, *, sample: bool) -> Mapping[str, Any]:
    if sample:
        return read_config(entry.sample_directory())
    return config_of_entry(entry, plugins)


def _telling_depth(names: list[str]) -> int:
    """How many of the first layers show each kind twice: a state of one slot is compiled otherwise than others."""
    wanted = {name: min(2, names.count(name)) for name in names}
    return next(
        depth
        for depth in range(1, len(names) + 1)
        if all(names[:depth].count(name) >= count for name, count in wanted.items())
    )


@frozen
class _Unbuilt:
    """A decoder of some depth without weights."""

    model: Model
    module: nn.Module
    plan: WeightPlan

    @classmethod
    def of(
        cls,
        hf_config: Mapping[str, Any],
        entry: Entry,
        contract: Contract,
        recipe: Recipe,
        plugins: Plugins,
        layers: int | None = None,
    ) -> _Unbuilt:
        from coreai_zoo.lowering.module import build_module

        model = read_model(hf_config, plugins, layers)
        rewrites = plugins.layer_rewrites(model.overlay, entry, model.config, contract)
        module = build_module(lambda: model.overlay.decoder(model.config, contract), rewrites)
        return cls(model, module, _planned(model, module, recipe, entry, plugins))

    def signature(self, contract: Contract, entry: Entry, plugins: Plugins) -> TraceSpec:
        positions = min(entry.bundle.max_context, int(self.model.facts["max_context_length"]))
        return signature(self.model, entry, contract, positions, plugins)

    def traced(self, backend: Backend, spec: TraceSpec) -> Traced:
        """Trace it, its weights allocated as they are planned."""
        from coreai_zoo.lowering.module import allocate

        allocate(self.module, {tensor.name: tensor for tensor in self.plan.tensors})
        return backend.trace(self.module, spec)


def _planned(model: Model, module: nn.Module, recipe: Recipe, entry: Entry, plugins: Plugins) -> WeightPlan:
    """How a recipe stores the weights of a module that has them plain."""
    from coreai_zoo.lowering.module import parameters_of

    head = plugins.head_quantization(model.overlay, entry, model.config)
    weight_map = plugins.weight_map(model.overlay, entry, model.config)
    return plan_without_checkpoint(weight_map, parameters_of(module), recipe.with_head(head))


def _lowered(traced: Traced, plan: WeightPlan) -> Program:
    """Lower what was traced, every weight empty but for a number of its own."""
    from coreai_zoo.lowering.module import constants

    store = {tensor.name: _Empty(tensor, number) for number, tensor in enumerate(plan.tensors, start=1)}
    return traced.lowered(constants(store, store))


@frozen
class _Empty:
    """A weight of zeros, as the store gives one. Memory that nobody touches costs none; what touches it is a number at
    the start that keeps weights apart: the toolchain merges equal ones.
    """

    planned: PlannedTensor
    number: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.planned.shape

    @property
    def dtype(self) -> str:
        return self.planned.dtype

    @property
    def quantization(self) -> QuantizationSpec | None:
        return self.planned.quantization

    def data(self) -> np.ndarray[Any, Any]:
        spec = self.quantization
        if spec is None:
            return self._zeros(self.shape, self.dtype, 0)
        if spec.bits == 4:
            return self._zeros((self.planned.rows, self.planned.columns // 2), "uint8", 0)
        return self._zeros(self.shape, spec.dtype, 0)

    def scales(self) -> np.ndarray[Any, Any]:
        return self._zeros((*self.shape[:-1], self._blocks), self.dtype, 1)

    def zero_points(self) -> np.ndarray[Any, Any] | None:
        spec = self.quantization
        if spec is None or not has_zero_points(spec):
            return None
        if spec.bits == 4:
            return self._zeros((math.ceil(self.planned.rows * self._blocks / 2),), "uint8", 2)
        return self._zeros((*self.shape[:-1], self._blocks), spec.dtype, 2)

    @property
    def _blocks(self) -> int:
        assert self.quantization is not None  # who asks for scales has looked
        return blocks_per_row(self.planned.columns, self.quantization)

    def _zeros(self, shape: tuple[int, ...], dtype: str, kind: int) -> np.ndarray[Any, Any]:
        array = np.zeros(shape, dtype)
        start = array.reshape(-1).view(np.uint8)
        label = np.frombuffer((3 * self.number + kind).to_bytes(8, "little"), np.uint8)[: start.size]
        start[: label.size] = label
        return array


def _stored(tensor: PlannedTensor) -> list[tuple[str, StoredWeight]]:
    spec = tensor.quantization
    if spec is None:
        return [(tensor.name, StoredWeight(tensor.shape, tensor.dtype, tensor.stored_bytes))]
    scales = (*tensor.shape[:-1], blocks_per_row(tensor.columns, spec))
    stored = [(tensor.name, tensor.shape, spec.dtype), (f"{tensor.name} scales", scales, tensor.dtype)]
    if has_zero_points(spec):
        stored.append((f"{tensor.name} zero points", scales, spec.dtype))
    return [(name, StoredWeight(shape, dtype, _size(shape, dtype))) for name, shape, dtype in stored]


def _roles(plan: WeightPlan) -> dict[str, RoleWeights]:
    members: dict[str, list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        members.setdefault(tensor.role, []).append(tensor)
    return {
        role: RoleWeights(
            str(tensors[0].quantization or "not quantized"),
            len(tensors),
            sum(tensor.parameters for tensor in tensors),
            sum(tensor.stored_bytes for tensor in tensors),
        )
        for role, tensors in sorted(members.items())
    }
