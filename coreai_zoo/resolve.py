"""From what the user asked for to everything that a build does, decided on metadata: no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from coreai_zoo import bundle as bundles
from coreai_zoo.backends import Backend
from coreai_zoo.checkpoint import Checkpoint, read_config
from coreai_zoo.contracts import MINIMUM_CONTEXT, Contract, find_contract
from coreai_zoo.entry import Entry, find_entry
from coreai_zoo.errors import BadInput, EnvironmentLacks, PluginError, listing
from coreai_zoo.overlay import (
    HeadQuantization,
    KVCache,
    LayerRewrite,
    Overlay,
    ParameterInfo,
    TellsParameters,
    TraceSpec,
)
from coreai_zoo.plugins import Plugins
from coreai_zoo.quantize import Recipe, find_recipe
from coreai_zoo.weights import WeightPlan, plan_weights
from coreai_zoo.workspace import check_output_folder

if TYPE_CHECKING:
    from torch import nn

DEFAULT_OUTPUT = Path("exports")
DEFAULT_BACKEND = "coreai"


@frozen
class BuildRequest:
    """What the user asked for; see `zoo build --help`."""

    entry: str
    checkpoint: Path | None = None
    sample: bool = False
    recipe: str | None = None
    contract: str | None = None
    backend: str = DEFAULT_BACKEND
    output: Path = DEFAULT_OUTPUT
    max_context: int | None = None
    layers: int | None = None
    work_dir: Path | None = None
    keep_weights: bool = False
    force: bool = False
    custom: bool = False
    allow_unverified: bool = False


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
    source_date_epoch = bundles.source_date_epoch()
    check_output_folder(request.output)
    directory, revision = locate_checkpoint(entry, request.checkpoint, sample=request.sample)
    model = read_model(read_config(directory), plugins, request.layers)
    _check_model_type(entry, model, directory)
    differences = _differences(request, entry, model, directory)
    max_context = _max_context(request, entry, contract, model.facts)
    checkpoint = Checkpoint.open(directory)
    bundles.check_tokenizer(directory, model.facts["vocab_size"])
    head = plugins.head_quantization(model.overlay, entry, model.config)
    recipe = recipe.with_head(head)
    module, rewrites, weights = _plan(model, entry, contract, checkpoint, recipe, plugins)
    spec = signature(model, entry, contract, max_context, plugins)
    backend.require(spec, weights)
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
        source_date_epoch=source_date_epoch,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a config.json says
# ---------------------------------------------------------------------------------------------------------------------


def config_of_entry(entry: Entry, plugins: Plugins, hint: str = "") -> Mapping[str, Any]:
    """The `config.json` of the model whose facts an entry states.

    Args:
        entry: which.
        plugins: what claims it.
        hint: what to do when it states too little.

    Raises:
        BadInput: when no overlay claims it, or it states too little.
        PluginError: when the overlay fails.
    """
    overlay, plugin = plugins.claim_overlay(entry.model_type[0], {"model_type": entry.model_type[0]})
    try:
        with plugins.blame(plugin, f"overlay {overlay.name!r}", except_input=True):
            return overlay.config_of_facts(entry.facts.stated)
    except BadInput as error:
        raise BadInput(f"Entry {entry.name} states too little to plan from. {error.message}", hint) from error


@frozen
class Model:
    """What the overlay makes of a `config.json`.

    Attributes:
        plugin: name of the plugin that brought the overlay.
        facts: of the layers that were asked for.
        whole_facts: of all layers.
    """

    hf_config: Mapping[str, Any]
    overlay: Overlay
    plugin: str
    config: Any
    facts: Mapping[str, Any]
    whole_facts: Mapping[str, Any]
    kv_cache: KVCache

    @property
    def model_type(self) -> str:
        """The architecture, as `config.json` calls it."""
        return str(self.hf_config.get("model_type"))


def read_model(hf_config: Mapping[str, Any], plugins: Plugins, layers: int | None = None) -> Model:
    """Read a config with the overlay that claims it, cut to the first `layers` layers if there is a number.

    Raises:
        BadInput: when no plugin claims the architecture, the overlay cannot use the config, or a slice is not a model.
        PluginError: when several claim it.
    """
    overlay, plugin = plugins.claim_overlay(str(hf_config.get("model_type")), hf_config)
    with plugins.blame(plugin, f"overlay {overlay.name!r}", except_input=True):
        whole_facts = overlay.facts(overlay.read_config(hf_config))
        if layers is not None:
            hf_config = overlay.with_layers(hf_config, layers)
        config = overlay.read_config(hf_config)
        facts, kv_cache = overlay.facts(config), overlay.kv_cache(config)
    return Model(hf_config, overlay, plugin, config, facts, whole_facts, kv_cache)


def signature(model: Model, entry: Entry | None, contract: Contract, max_context: int, plugins: Plugins) -> TraceSpec:
    """The function that a bundle of this model has."""
    states = plugins.extra_states(model.overlay, entry, model.config, contract)
    return contract.trace_spec(model.kv_cache, states, model.facts["vocab_size"], max_context)


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


def contradictions(entry: Entry, facts: Mapping[str, Any]) -> list[str]:
    """Facts that an entry states and the config that they describe does not have, one phrase each.

    Args:
        entry: which.
        facts: what the overlay makes of that config, see `config_of_entry`.
    """
    return [
        f"{entry.name}: {name} is {stated}, and the other facts make it {facts[name]}"
        for name, stated in entry.facts.stated.items()
        if name in facts and facts[name] != stated
    ]


def compare_facts(entry: Entry, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What the entry states and the checkpoint is not, one phrase each."""
    return tuple(
        f"{name} is {facts[name]}, the entry says {stated}"
        for name, stated in entry.facts.stated.items()
        if name in facts and facts[name] != stated
    )


# ---------------------------------------------------------------------------------------------------------------------
# The decoder
# ---------------------------------------------------------------------------------------------------------------------


def _plan(
    model: Model, entry: Entry, contract: Contract, checkpoint: Checkpoint, recipe: Recipe, plugins: Plugins
) -> tuple[nn.Module, tuple[tuple[str, LayerRewrite], ...], WeightPlan]:
    """The decoder without weights, what rewrote its layers, and where each of its weights comes from."""
    from coreai_zoo import export

    def decoder() -> nn.Module:
        with plugins.blame(model.plugin, f"overlay {model.overlay.name!r}"):
            made = model.overlay.decoder(model.config, contract)
            if isinstance(model.overlay, TellsParameters):
                told = model.overlay.parameters(model.config, contract)
                _check_told(model.overlay.name, told, export.parameters_of(made))
            return made

    rewrites = tuple(plugins.layer_rewrites(model.overlay, entry, model.config, contract))
    module = export.build_module(decoder, rewrites)
    weight_map = plugins.weight_map(model.overlay, entry, model.config)
    return module, rewrites, plan_weights(weight_map, export.parameters_of(module), checkpoint.tensors, recipe)


def _check_told(overlay: str, told: Mapping[str, ParameterInfo], real: Mapping[str, ParameterInfo]) -> None:
    """Hold the parameters that an overlay tells against those of its decoder: what `zoo plan` adds up must be true."""
    names = [name for name in {**real, **told} if told.get(name) != real.get(name)]
    if names:
        raise PluginError(
            f"the parameters that overlay {overlay!r} tells are not those of its decoder: {listing(names)}.",
            "Correct its `parameters`, or take the method away.",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Finding things
# ---------------------------------------------------------------------------------------------------------------------


def locate_checkpoint(entry: Entry, directory: Path | None, *, sample: bool) -> tuple[Path, str | None]:
    """Where the checkpoint is, and its commit on the hub where that is known; of a sample, a copy may be given.

    Raises:
        EnvironmentLacks: when it would have to be fetched and cannot be.
    """
    if directory is not None:
        return directory, None
    if sample:
        return entry.sample_directory(), None
    return _fetch(entry)


def _fetch(entry: Entry) -> tuple[Path, str]:
    """Download the entry's revision, or the newest if the entry pins none; (directory, commit)."""
    if entry.hf_id is None:
        raise BadInput(f"Entry {entry.name} names no repository to fetch a checkpoint from.", "Pass --checkpoint DIR.")
    import huggingface_hub

    hf_id, revision = entry.hf_id, entry.hf_revision

    def download(local_only: bool) -> str:
        return huggingface_hub.snapshot_download(
            hf_id,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"],
            local_files_only=local_only,
        )

    directory = from_hub(
        hf_id,
        revision,
        download,
        "Pass --checkpoint DIR with a local copy, or --sample to build the miniature that ships with the entry.",
    )
    return directory, directory.name


def from_hub(hf_id: str, revision: str | None, download: Callable[[bool], str], hint: str) -> Path:
    """What `download` fetches from a repository on the hub, or finds on this machine.

    Args:
        hf_id: the repository.
        revision: its commit, or None for the newest.
        download: takes whether to look on this machine only; returns a path.
        hint: what to do when the files cannot be had.

    Raises:
        EnvironmentLacks: when they are not here and cannot be fetched.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    reason: Exception | None = None
    try:
        # One request. Downloads try again for half a minute, with a warning each time, before they give up.
        huggingface_hub.HfApi().model_info(hf_id, revision=revision)
    except Exception as error:  # noqa: BLE001  # the HTTP library beneath raises its own; offline, what is here will do
        reason = error
    try:
        return Path(download(reason is not None))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = str(reason or error).strip().splitlines()
        text = said[0][:200].removesuffix(".") if said else type(reason or error).__name__
        raise EnvironmentLacks(
            f"The checkpoint {hf_id} is not on this machine and cannot be fetched ({text}).", hint
        ) from error


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
