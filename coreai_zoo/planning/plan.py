"""What a bundle would hold, need and run at: added up from a config, without a weight and without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from coreai_zoo.build.model import Model, config_of_entry, contradictions, read_model, signature
from coreai_zoo.build.preflight import Preflight, asset_bytes, bytes_read, estimate_build, tokenizer_bytes
from coreai_zoo.build.request import DEFAULT_OUTPUT
from coreai_zoo.build.workspace import Workspace
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.files import Checkpoint, has_weights, read_config
from coreai_zoo.contracts import MINIMUM_CONTEXT, Contract, find_contract
from coreai_zoo.dtypes import bits_of
from coreai_zoo.entry import Entry, Published
from coreai_zoo.errors import BadInput, PluginError
from coreai_zoo.overlay import ROLES, HasParameterTable, ParameterInfo
from coreai_zoo.plugins import Plugins
from coreai_zoo.recipes import QuantizationSpec, Recipe, find_recipe
from coreai_zoo.signature import TraceSpec
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan, active_share, plan_weights, plan_without_checkpoint

DEFAULT_RECIPE, DEFAULT_CONTRACT, DEFAULT_CONTEXT = "int8hu", "static-s1", 32768
"""Of a checkpoint that is planned without an entry."""

_BYTES_PER_VALUE = 2  # of a checkpoint that is not at hand: released ones are bf16
_SCRATCH = ".plan"  # no build is called so: scratch is counted from nothing


@frozen
class RoleSum:
    """The weights of one role.

    Attributes:
        spec: how they are quantized, or None.
        bytes: that they take in the bundle.
        read: bytes of them that one decoded token reads.
    """

    role: str
    tensors: int
    parameters: int
    spec: QuantizationSpec | None
    bytes: int
    read: int

    @property
    def bits(self) -> float:
        """Bits per parameter, scales included."""
        return 8 * self.bytes / self.parameters


@frozen
class Plan:
    """A bundle that was not built.

    Attributes:
        name: of the entry, or of the checkpoint's folder.
        entry: the entry, or None for a bare checkpoint.
        model: what the overlay makes of the config.
        recipe: with the head policy in place.
        weights: how every parameter is stored; with sources when the checkpoint's headers were read.
        spec: the function's signature.
        context: positions that states are counted at.
        tokenizer: bytes of the tokenizer's files, None where they are not at hand.
        build: what a build reads, writes and needs on this machine.
    """

    name: str
    entry: Entry | None
    model: Model
    contract: Contract
    recipe: Recipe
    weights: WeightPlan
    spec: TraceSpec
    context: int
    tokenizer: int | None
    build: Preflight

    @property
    def roles(self) -> tuple[RoleSum, ...]:
        """The weights by role, in the order of `overlay.ROLES`."""
        by_role: dict[str, list[PlannedTensor]] = {}
        for tensor in self.weights.tensors:
            by_role.setdefault(tensor.role, []).append(tensor)
        return tuple(self._sum(role, by_role[role]) for role in ROLES if role in by_role)

    def _sum(self, role: str, tensors: list[PlannedTensor]) -> RoleSum:
        stored = sum(tensor.stored_bytes for tensor in tensors)
        return RoleSum(
            role=role,
            tensors=len(tensors),
            parameters=sum(tensor.parameters for tensor in tensors),
            spec=self.recipe.roles[role],
            bytes=stored,
            read=round(stored * self._share_read(role)),
        )

    def _share_read(self, role: str) -> float:
        """Which share of a role's weights a token reads: one row of the embedding table, the chosen experts."""
        if role == "embedding":
            return 1 / int(self.model.facts["vocab_size"])
        share = active_share(role, self.model.facts)
        assert share is not None, "a plan is not made without these facts"
        return share

    @property
    def asset(self) -> int:
        """Bytes of the asset: weights and graph."""
        return asset_bytes(self.weights, self.model.facts)

    @property
    def bundle(self) -> int:
        """Bytes of the bundle, without the tokenizer's files where those are not at hand."""
        return self.asset + (self.tokenizer or 0)

    @property
    def read(self) -> int:
        """Bytes of weights that a decoded token reads."""
        return sum(role.read for role in self.roles)

    @property
    def dense_read(self) -> int:
        """Bytes of weights that a decoded token would read if it read every expert; as `read` without experts."""
        return sum(role.bytes if role.role == "moe.expert" else role.read for role in self.roles)

    @property
    def states(self) -> Mapping[str, int]:
        """Bytes of each state at `context` positions."""
        return {
            state.name: bits_of(state.dtype)
            // 8
            * math.prod(self.context if isinstance(size, str) else size for size in state.shape)
            for state in self.spec.states
        }

    @property
    def state_bytes(self) -> int:
        """Bytes of all states at `context` positions."""
        return sum(self.states.values())

    @property
    def growth(self) -> int:
        """Bytes that the states grow by with each position."""
        return sum(self.states[state.name] for state in self.spec.states if state.kind == "kv_cache") // self.context

    @property
    def resident(self) -> int:
        """Bytes that a machine has to hold to run the bundle: the asset and the states, and nothing of the engine's."""
        return self.asset + self.state_bytes

    @property
    def published(self) -> tuple[Published, ...]:
        """What others measured of this entry with this recipe."""
        entries = self.entry.published if self.entry else ()
        return tuple(measured for measured in entries if measured.recipe == self.recipe.name)


# ---------------------------------------------------------------------------------------------------------------------
# Making one
# ---------------------------------------------------------------------------------------------------------------------


def plan_entry(
    name: str, plugins: Plugins, *, recipe: str | None = None, contract: str | None = None, context: int | None = None
) -> Plan:
    """The plan of an entry's model, from the facts that the entry states.

    Raises:
        BadInput: when there is no such entry, recipe or contract, or the entry states too little.
        PluginError: when what a plugin tells is not usable.
    """
    entry, _ = find_entry(name, plugins)
    hint = "Pass --checkpoint DIR with a folder that holds the model's config.json."
    model = read_model(config_of_entry(entry, plugins, hint), plugins)
    if problems := contradictions(entry, model.facts):
        raise BadInput(f"The facts of an entry contradict each other: {'; '.join(problems)}.", "Correct the entry.")
    context = context or min(entry.bundle.max_context, int(model.facts["max_context_length"]))
    return _plan(entry.name, entry, model, None, recipe or entry.recipe, contract or entry.contract, context, plugins)


def plan_checkpoint(
    directory: Path,
    plugins: Plugins,
    *,
    recipe: str | None = None,
    contract: str | None = None,
    context: int | None = None,
) -> Plan:
    """The plan of a checkpoint, or of a folder that has nothing but its `config.json`.

    Raises:
        BadInput: when the config, or the headers of weights that are there, cannot be built from.
        PluginError: when what a plugin tells is not usable.
    """
    model = read_model(read_config(directory), plugins)
    context = context or min(DEFAULT_CONTEXT, int(model.facts["max_context_length"]))
    name = directory.resolve().name
    return _plan(name, None, model, directory, recipe or DEFAULT_RECIPE, contract or DEFAULT_CONTRACT, context, plugins)


def _plan(
    name: str,
    entry: Entry | None,
    model: Model,
    directory: Path | None,
    recipe_name: str,
    contract_name: str,
    context: int,
    plugins: Plugins,
) -> Plan:
    limit = int(model.facts["max_context_length"])
    if not MINIMUM_CONTEXT <= context <= limit:
        raise BadInput(f"A context of {context} is not between {MINIMUM_CONTEXT} and {limit}, the model's own limit.")
    contract = find_contract(contract_name)
    recipe = find_recipe(recipe_name).with_head(plugins.head_quantization(model.overlay, entry, model.config))
    table = plugins.weight_map(model.overlay, entry, model.config)
    parameters = _parameters(model, contract, plugins)
    checkpoint = Checkpoint.open(directory) if directory is not None and has_weights(directory) else None
    with plugins.attribute_errors(model.plugin, f"overlay {model.overlay.name!r}", except_input=True):
        if checkpoint is None:
            weights = plan_without_checkpoint(table, parameters, recipe)
        else:
            weights = plan_weights(table, parameters, checkpoint.tensors, recipe)
    _check_facts(model, weights)
    tokenizer = (tokenizer_bytes(directory) or None) if directory is not None else None
    read = _BYTES_PER_VALUE * weights.parameters if checkpoint is None else bytes_read(weights, checkpoint)
    written = asset_bytes(weights, model.facts) + (tokenizer or 0)
    workspace = Workspace.of(DEFAULT_OUTPUT, _SCRATCH, None, keep=False)
    return Plan(
        name=name,
        entry=entry,
        model=model,
        contract=contract,
        recipe=recipe,
        weights=weights,
        spec=signature(model, entry, contract, context, plugins),
        context=context,
        tokenizer=tokenizer,
        build=estimate_build(read, weights, written, workspace),
    )


def _parameters(model: Model, contract: Contract, plugins: Plugins) -> Mapping[str, ParameterInfo]:
    """The decoder's parameters: as the overlay tells them, or else of a decoder without weights, which takes torch."""
    with plugins.attribute_errors(model.plugin, f"overlay {model.overlay.name!r}"):
        if isinstance(model.overlay, HasParameterTable):
            return model.overlay.parameters(model.config, contract)
    from coreai_zoo.lowering.module import build_module, parameters_of

    with plugins.attribute_errors(model.plugin, f"overlay {model.overlay.name!r}"):
        return parameters_of(build_module(lambda: model.overlay.decoder(model.config, contract), ()))


def _check_facts(model: Model, weights: WeightPlan) -> None:
    has_experts = any(tensor.role == "moe.expert" for tensor in weights.tensors)
    missing = {"experts", "experts_per_token"} - set(model.facts)
    if has_experts and missing:
        raise PluginError(
            f"overlay {model.overlay.name!r} of plugin {model.plugin!r} has experts but tells no fact "
            f"{' and no '.join(sorted(missing))}: how many of them a token reads is not known."
        )
