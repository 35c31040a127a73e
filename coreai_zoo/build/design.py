"""From what the user asked for to everything that a build does, decided on metadata: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from coreai_zoo.backend import Backend
from coreai_zoo.build.model import Model, compare_facts, read_model, signature
from coreai_zoo.build.request import DEFAULT_BACKEND, BuildRequest
from coreai_zoo.build.workspace import check_output_folder
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.files import Checkpoint, read_config
from coreai_zoo.checkpoint.hub import locate_checkpoint
from coreai_zoo.checkpoint.tokenizer import check_tokenizer
from coreai_zoo.contracts import MINIMUM_CONTEXT, Contract, find_contract
from coreai_zoo.dates import source_date_epoch
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, PluginError, listing
from coreai_zoo.overlay import HasParameterTable, LayerRewrite, Overlay, ParameterInfo
from coreai_zoo.plugins import Plugins
from coreai_zoo.recipes import HeadQuantization, Recipe, find_recipe
from coreai_zoo.signature import TraceSpec
from coreai_zoo.weights.plan import WeightPlan, plan_weights

if TYPE_CHECKING:
    from torch import nn


@frozen
class Resolved:
    """Everything that is decided before a weight is read.

    Attributes:
        name: of the bundle.
        request: what was asked for.
        differences: facts of the entry that this checkpoint does not have (another size of the same architecture).
        revision: commit of the checkpoint on the hub, where that is known.
        overlay_plugin: name of the plugin that brought the overlay.
        source_date_epoch: the date that the bundle carries, in seconds since 1970.
    """

    name: str
    request: BuildRequest
    entry: Entry
    checkpoint: Checkpoint
    revision: str | None
    hf_config: Mapping[str, Any]
    overlay: Overlay
    overlay_plugin: str
    config: Any
    facts: Mapping[str, Any]
    whole_layers: int
    differences: tuple[str, ...]
    contract: Contract
    backend: Backend
    recipe: Recipe
    head: HeadQuantization | None
    rewrites: tuple[tuple[str, LayerRewrite], ...]
    signature: TraceSpec
    module: nn.Module = field(eq=False)
    weights: WeightPlan
    max_context: int
    source_date_epoch: int

    @property
    def sample(self) -> bool:
        """Whether this is the entry's miniature."""
        return self.request.sample

    @property
    def relies_on_unverified(self) -> bool:
        """Whether the bundle passes for the entry's model, and the entry was never compared with that."""
        return self.entry.status == "unverified" and not self.sample and not self.differences

    @property
    def hf_id(self) -> str | None:
        """The entry's repository on the hub, if this checkpoint can be what is there."""
        return None if self.sample or self.differences else self.entry.hf_id

    @property
    def asset(self) -> str:
        """Name of the asset in the bundle."""
        return f"{self.name}{self.backend.asset_suffix}"


def resolve(request: BuildRequest, plugins: Plugins) -> Resolved:
    """Decide everything, on metadata only.

    Raises:
        ZooError: for every input that cannot be built from.
    """
    entry, _ = find_entry(request.entry, plugins)
    backend = _find_backend(request.backend, plugins)
    contract = _contract(request, entry, backend)
    recipe = find_recipe(request.recipe or entry.recipe)
    _check_status(request, entry)
    _ = backend.versions  # another version of the toolchain is refused now, not after the weights
    date = source_date_epoch()
    check_output_folder(request.output)
    directory, revision = locate_checkpoint(entry, request.checkpoint, sample=request.sample)
    model = read_model(read_config(directory), plugins, request.layers)
    _check_model_type(entry, model, directory)
    differences = _differences(request, entry, model, directory)
    max_context = _max_context(request, entry, contract, model.facts)
    checkpoint = Checkpoint.open(directory)
    check_tokenizer(directory, model.facts["vocab_size"], plugins.tokenizer_classes())
    head = plugins.head_quantization(model.overlay, entry, model.config)
    recipe = recipe.with_head(head)
    module, rewrites, weights = _plan(model, entry, contract, checkpoint, recipe, plugins)
    spec = signature(model, entry, contract, max_context, plugins)
    backend.require(spec, weights.quantizations)
    return Resolved(
        name=_bundle_name(request, entry, recipe, contract, differences),
        request=request,
        entry=entry,
        checkpoint=checkpoint,
        revision=revision,
        hf_config=model.hf_config,
        overlay=model.overlay,
        overlay_plugin=model.plugin,
        config=model.config,
        facts=model.facts,
        whole_layers=model.whole_facts["layers"],
        differences=differences,
        contract=contract,
        backend=backend,
        recipe=recipe,
        head=head if recipe.roles["head"] is not None else None,
        rewrites=rewrites,
        signature=spec,
        module=module,
        weights=weights,
        max_context=max_context,
        source_date_epoch=date,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The entry against the checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def _check_status(request: BuildRequest, entry: Entry) -> None:
    """Refuse an unverified entry, before anything is fetched, where its facts and revision are relied on."""
    # A sample or a model of other sizes claims nothing of the published checkpoint.
    if entry.status == "verified" or request.allow_unverified or request.sample or request.custom:
        return
    raise BadInput(
        f"Entry {entry.name} is unverified: its facts were not compared with the published checkpoint yet.",
        "Pass --allow-unverified to build it all the same (the card will say so), or --sample for the miniature."
        if entry.sample
        else "Pass --allow-unverified to build it all the same; the card will say so.",
    )


def _check_model_type(entry: Entry, model: Model, directory: Path) -> None:
    if model.model_type not in entry.model_type:
        raise BadInput(
            f"{directory} is a {model.model_type} checkpoint, but entry {entry.name} is for "
            f"{' or '.join(entry.model_type)} ({entry.facts.ffn} feed-forward).",
            "Choose the entry that fits the checkpoint: `zoo list` shows the feed-forward kind of each.",
        )


def _differences(request: BuildRequest, entry: Entry, model: Model, directory: Path) -> tuple[str, ...]:
    """In which facts the checkpoint is another model than the entry's, where the user said that it is one."""
    if request.sample:  # another size on purpose
        return ()
    differences = compare_facts(entry, model.whole_facts)  # of a slice, the whole is compared
    if differences and not request.custom:
        count = f"{len(differences)} fact" + "s" * (len(differences) > 1)
        raise BadInput(
            f"{directory} contradicts entry {entry.name} in {count}: {'; '.join(differences)}.",
            "If it is another model of this architecture, write an entry for it with `zoo new NAME --from "
            f"{directory}`, or pass --custom to build it without one.",
        )
    if request.custom and not differences:
        raise BadInput(f"{directory} has the facts of entry {entry.name}: there is nothing --custom about it.")
    return differences


# ---------------------------------------------------------------------------------------------------------------------
# The decoder
# ---------------------------------------------------------------------------------------------------------------------


def _plan(
    model: Model, entry: Entry, contract: Contract, checkpoint: Checkpoint, recipe: Recipe, plugins: Plugins
) -> tuple[nn.Module, tuple[tuple[str, LayerRewrite], ...], WeightPlan]:
    """The decoder without weights, what rewrote its layers, and where each of its weights comes from."""
    from coreai_zoo.lowering.module import build_module, parameters_of

    def decoder() -> nn.Module:
        with plugins.attribute_errors(model.plugin, f"overlay {model.overlay.name!r}"):
            made = model.overlay.decoder(model.config, contract)
            if isinstance(model.overlay, HasParameterTable):
                told = model.overlay.parameters(model.config, contract)
                _check_told(model.overlay.name, told, parameters_of(made))
            return made

    rewrites = tuple(plugins.layer_rewrites(model.overlay, entry, model.config, contract))
    module = build_module(decoder, rewrites)
    weight_map = plugins.weight_map(model.overlay, entry, model.config)
    return module, rewrites, plan_weights(weight_map, parameters_of(module), checkpoint.tensors, recipe)


def _check_told(overlay: str, told: Mapping[str, ParameterInfo], real: Mapping[str, ParameterInfo]) -> None:
    """Hold the parameters that an overlay tells against those of its decoder: what `zoo plan` adds up must be true."""
    names = [name for name in {**real, **told} if told.get(name) != real.get(name)]
    if names:
        raise PluginError(
            f"the parameters that overlay {overlay!r} tells are not those of its decoder: {listing(names)}.",
            "Correct its `parameters`, or take the method away.",
        )


def _find_backend(name: str, plugins: Plugins) -> Backend:
    backends = plugins.backends()
    if name not in backends:
        raise BadInput(f"There is no backend {name!r}.", f"There is {listing(sorted(backends))}.")
    return backends[name]


def _contract(request: BuildRequest, entry: Entry, backend: Backend) -> Contract:
    """The contract that was asked for, or the entry's, or where the backend does not write for that one its own."""
    default = entry.contract if entry.contract in backend.contracts else backend.contracts[0]
    contract = find_contract(request.contract or default)
    if contract.name not in backend.contracts:
        raise BadInput(
            f"The backend {backend.name} does not write for the contract {contract.name}.",
            f"It writes for {listing(list(backend.contracts))}.",
        )
    return contract


def _max_context(request: BuildRequest, entry: Entry, contract: Contract, facts: Mapping[str, Any]) -> int:
    limit = int(facts["max_context_length"])
    if request.max_context is not None and not MINIMUM_CONTEXT <= request.max_context <= limit:
        raise BadInput(
            f"--max-context {request.max_context} is not between {MINIMUM_CONTEXT} and {limit}, the model's own limit."
        )
    chosen = request.max_context or min(entry.bundle.max_context, limit, contract.default_context or limit)
    if chosen < MINIMUM_CONTEXT:
        raise BadInput(
            f"The bundle would allow {chosen} positions (the model {limit}, the entry {entry.bundle.max_context}); "
            f"{MINIMUM_CONTEXT} is the least."
        )
    return chosen


def _bundle_name(
    request: BuildRequest, entry: Entry, recipe: Recipe, contract: Contract, differences: tuple[str, ...]
) -> str:
    parts = [entry.slug]
    if request.sample:
        parts.append("sample")
    if differences:
        parts.append("custom")
    if request.layers is not None:
        parts.append(f"{request.layers}layers")
    parts.append("decode" if contract.query_length == 1 else "dynamic")
    parts.append(recipe.published_name)
    if request.backend != DEFAULT_BACKEND:
        parts.append(request.backend)
    return "_".join(parts)
