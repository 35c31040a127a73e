"""The design of a bundle: everything that follows from an entry, a config, a contract and a recipe.

`Design` is what there is to know, and `design` decides it step by step; the steps follow in their order. All of it is
decided on metadata: names, shapes and dtypes. No weight is read. Builds, plans, diffs and gates take their model from
here, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from coreai_zoo.backend import Backend, Traced
from coreai_zoo.build.model import Model, compare_facts, contradictions, read_model, require_known_facts
from coreai_zoo.build.request import (
    DEFAULT_BACKEND,
    DEFAULT_CONTEXT,
    DEFAULT_CONTRACT,
    DEFAULT_RECIPE,
    BuildRequest,
)
from coreai_zoo.build.source import Source, Subject, find_source, other_model, subject_of
from coreai_zoo.build.target import aimed
from coreai_zoo.bundle.metadata import language_block
from coreai_zoo.catalogue import find_backend, find_contract, find_recipe
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.generation_config import stated_sampling
from coreai_zoo.checkpoint.tokenizer import check_tokenizer
from coreai_zoo.contracts import MINIMUM_CONTEXT, Contract
from coreai_zoo.dates import source_date_epoch
from coreai_zoo.engine import Interface, sentence
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, PluginError, listing, zoo_command
from coreai_zoo.lowering.graph import layer_list, layer_names
from coreai_zoo.names import slug
from coreai_zoo.overlay import HasParameterTable, LayerRewrite, ParameterInfo, WeightMap
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.recipes import HeadQuantization, Recipe
from coreai_zoo.signature import StateSpec, TraceSpec
from coreai_zoo.weights.names import Names
from coreai_zoo.weights.plan import WeightPlan, plan_weights, plan_without_checkpoint

if TYPE_CHECKING:
    from torch import nn


@frozen
class FunctionDesign:
    """One function of a bundle.

    Attributes:
        signature: its inputs, states and outputs.
        rewrites: the rewrites that put its layers into another form, each with the plugin that brought it.
    """

    signature: TraceSpec
    rewrites: tuple[tuple[str, LayerRewrite], ...]


@frozen
class Design:
    """Everything that is decided before a weight is read.

    Attributes:
        name: name of the bundle.
        request: what was asked for, with the contract and the backend of its target.
        label: what the model is called: the entry's name, or that of the repository or folder.
        entry: the entry; None for a checkpoint that is taken as what its config says.
        model: what the overlay makes of the config, cut to the layers that were asked for.
        source: where the checkpoint is, and where it comes from.
        opened: the checkpoint; None where there are no weights, or they are still to be fetched.
        differences: what of the entry does not hold for this checkpoint, a phrase each: another size of the same
            architecture, or another model of the same size.
        contract: the engine contract that the functions meet.
        backend: the backend that writes the asset.
        recipe: how each weight is stored, with the overlay's head policy in place.
        head: that policy; None where the recipe does not leave the head to the overlay.
        functions: the bundle's functions by name; the first one decodes.
        decoders: the functions' modules.
        weights: where every parameter comes from and how it is stored.
        notes: what is odd about the checkpoint and was dealt with, one phrase each.
        max_context: positions that the bundle allows.
        source_date_epoch: the date that the bundle carries, in seconds since 1970.
    """

    name: str
    request: BuildRequest
    label: str
    entry: Entry | None
    model: Model
    source: Source
    opened: Checkpoint | None
    differences: tuple[str, ...]
    contract: Contract
    backend: Backend
    recipe: Recipe
    head: HeadQuantization | None
    functions: Mapping[str, FunctionDesign]
    decoders: Decoders
    weights: WeightPlan
    notes: tuple[str, ...]
    max_context: int
    source_date_epoch: int

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, which a build always has, and a dry request where there are weights."""
        assert self.opened is not None
        return self.opened

    @property
    def facts(self) -> Mapping[str, Any]:
        """The overlay's facts of the layers that are built."""
        return self.model.facts

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The decoder of each function by name, on the meta device until its weights are allocated."""
        return self.decoders.modules

    @cached_property
    def layer_kinds(self) -> Sequence[Hashable]:
        """What tells the kind of each layer: names of parameters, and all that its module in each function holds."""
        from coreai_zoo.lowering.repetition import layer_kinds

        parameters = [tensor.name for tensor in self.weights.tensors]
        names, path = layer_names(parameters), layer_list(parameters)
        told = [layer_kinds(module, path) for module in self.modules.values()]
        held = [kinds for kinds in told if len(kinds) == len(names)]
        return list(zip(names, *held, strict=True))

    @property
    def signatures(self) -> Mapping[str, TraceSpec]:
        """The signature of each function by name."""
        return {name: function.signature for name, function in self.functions.items()}

    @property
    def decode(self) -> str:
        """Name of the function that decodes."""
        return next(iter(self.functions))

    @property
    def recipe_installed(self) -> bool:
        """Whether a plugin brings the recipe, as it is; else it is of a file."""
        return evolve(self.recipe, head=None) == self.decoders.plugins.recipes().get(self.recipe.name)

    def is_stored_by(self, recipe: str) -> bool:
        """Whether the weights are stored by the installed recipe of this name, and not by a file that is called so."""
        known = self.decoders.plugins.recipes().get(recipe)
        return known is not None and evolve(known, head=self.recipe.head).published_name == self.recipe.published_name

    @property
    def sample(self) -> bool:
        """Whether this is the entry's sample, a miniature."""
        return self.request.sample

    @property
    def title(self) -> str:
        """The model's name as its makers write it; without an entry, that of the repository or folder."""
        return self.label if self.entry is None else self.entry.title

    @property
    def compared(self) -> bool | None:
        """Whether the entry's facts agree with the checkpoint that was published at its revision.

        None where the bundle does not pass for the entry's model: without entry, for a sample, for another model.
        """
        if self.entry is None or self.sample or self.differences:
            return None
        origin = self.source.origin
        return origin.proven and origin.is_of(self.entry.hf_id) and self.entry.hf_revision in (None, origin.revision)

    @property
    def standing(self) -> str | None:
        """Whether the entry's facts are those of the published checkpoint, as a sentence; see `compared`."""
        if self.compared is None:
            return None
        assert self.entry is not None
        if self.compared:
            origin = self.source.origin
            return f"The facts of entry {self.entry.name} agree with {origin.hf_id} at {origin.revision}."
        return f"The facts of entry {self.entry.name} were not compared with the published checkpoint."

    @property
    def asset(self) -> str:
        """Name of the asset in the bundle."""
        return f"{self.name}{self.backend.asset_suffix}"

    def trace(self) -> Traced:
        """The functions' decoders, traced, their weights with nothing in them.

        Raises:
            PluginError: when a decoder cannot be traced, or does not meet its contract.
        """
        from coreai_zoo.lowering.module import allocate

        formats = {tensor.name: tensor.format for tensor in self.weights.tensors}
        if not self.backend.traces_quantized:
            formats = {name: evolve(format_, quantization=None) for name, format_ in formats.items()}
        for module in self.modules.values():
            allocate(module, formats)
        plain = (tensor for tensor in self.weights.tensors if tensor.quantization is None)
        transposed = {tensor.name: tensor.read_transposed for tensor in plain}
        return self.backend.trace(self.modules, self.signatures, transposed)

    def with_recipe(self, name: str | Recipe) -> Design:
        """The same design with its weights stored by another recipe.

        Raises:
            BadInput: when there is no such recipe, or it does not fit the weights.
        """
        plugins = self.decoders.plugins
        recipe, head = _with_head(find_recipe(name, plugins), self.model, self.entry, plugins)
        weights, _ = _weights(self.decoders, self.entry, self.source, self.opened, recipe)
        return evolve(self, recipe=recipe, head=head, weights=weights)

    def with_any_query_length(self) -> Design:
        """The same design with functions that take any number of tokens in one call, in the form for that."""
        return self.with_contract(evolve(self.contract, query_length=None, prefill=None))

    def with_contract(self, contract: Contract) -> Design:
        """The same design with the functions of another contract.

        Raises:
            PluginError: when its engine would not run them.
        """
        plugins = self.decoders.plugins
        functions = _functions(self.model, self.entry, contract, self.max_context, plugins)
        decoders = Decoders(self.model, contract, functions, plugins)
        return evolve(self, contract=contract, functions=functions, decoders=decoders)


def design(
    request: BuildRequest,
    plugins: Plugins,
    entry: Entry | None = None,
    source: Source | None = None,
    report: Reporter | None = None,
) -> Design:
    """The design of what a request asks for. Of a repository on the hub, what is small is fetched for it.

    Args:
        request: what was asked for.
        plugins: the plugins that bring entries, overlays, contracts, recipes and backends.
        entry: the entry itself; None to look it up by the name in the request.
        source: where its checkpoint is; None to find it.
        report: is told what the hub says meanwhile.

    Raises:
        ZooError: for every input that nothing can be built from.
    """
    subject = subject_of(request, plugins, entry)
    entry = subject.entry
    request = aimed(request, entry, plugins)
    backend = find_backend(request.backend or DEFAULT_BACKEND, plugins)
    contract = _contract(request, entry, backend, plugins)
    usual = entry.recipe if entry else DEFAULT_RECIPE
    recipe = find_recipe(usual if request.recipe is None else request.recipe, plugins)
    if not request.dry:
        _ = backend.versions  # refuses another version of the toolchain
    date = 0 if request.dry else source_date_epoch()

    source = source or find_source(subject, request, plugins, report or Reporter())
    model = read_model(source.hf_config, plugins, request.layers, of_entry=entry is not None)
    differences = _differences(request, entry, model, source, plugins)
    max_context = _max_context(request, entry, contract, model.facts)
    checkpoint = source.open(need_weights=not request.dry)
    if not request.dry:
        assert source.directory is not None
        with source.naming_the_repository():
            check_tokenizer(source.directory, model.facts["vocab_size"], plugins.tokenizer_classes())

    recipe, head = _with_head(recipe, model, entry, plugins)
    functions = _functions(model, entry, contract, max_context, plugins)
    decoders = Decoders(model, contract, functions, plugins)
    if not request.dry:
        _ = decoders.modules  # a mistake in the decoder itself is told before anything about its weights
    weights, notes = _weights(decoders, entry, source, checkpoint, recipe)
    label = _label(request, subject, source)
    made = Design(
        name=_bundle_name(request, label, recipe, contract, backend, differences),
        request=request,
        label=label,
        entry=entry,
        model=model,
        source=source,
        opened=checkpoint,
        differences=differences,
        contract=contract,
        backend=backend,
        recipe=recipe,
        head=head,
        functions=functions,
        decoders=decoders,
        weights=weights,
        notes=(*notes, *stated_sampling(source.directory).faults),
        max_context=max_context,
        source_date_epoch=date,
    )
    if not request.dry:
        backend.require(made.signatures, weights.quantizations)
    return made


def fetched(designed: Design, plugins: Plugins, report: Reporter) -> Design:
    """The same design when its weights have been fetched: now it knows their shapes as well.

    Raises:
        EnvironmentLacks: when they cannot be fetched.
        BadInput: when they do not fit the model.
    """
    designed.source.fetch(report)
    return design(designed.request, plugins, source=designed.source)


# ---------------------------------------------------------------------------------------------------------------------
# Before anything is read
# ---------------------------------------------------------------------------------------------------------------------


def _contract(request: BuildRequest, entry: Entry | None, backend: Backend, plugins: Plugins) -> Contract:
    """The contract that was asked for, or the entry's; where the backend does not write for that, its own first one."""
    contract = find_contract(request.contract or (entry.contract if entry else DEFAULT_CONTRACT), plugins)
    if backend.name in contract.backends:
        return contract
    own = [other for other in plugins.contracts().values() if backend.name in other.backends]
    if request.contract or not own:
        others = " or ".join(f"--backend {name}" for name in contract.backends if name in plugins.backends())
        contracts = listing([other.name for other in own]) or "none that is installed"
        raise BadInput(
            f"The backend {backend.name} does not write for the contract {contract.name}.",
            f"{f'Pass {others}: that does. ' if others else ''}{backend.name} writes for {contracts}.",
        )
    return own[0]


# ---------------------------------------------------------------------------------------------------------------------
# The model, and the entry against it
# ---------------------------------------------------------------------------------------------------------------------


def _differences(
    request: BuildRequest, entry: Entry | None, model: Model, source: Source, plugins: Plugins
) -> tuple[str, ...]:
    """What shows that the checkpoint is another model than the entry's, which takes --custom or --sample."""
    if entry is None:
        return ()
    if source.directory is None:
        if problems := contradictions(entry, model.whole_facts):
            raise BadInput(f"The facts of an entry contradict each other: {'; '.join(problems)}.", "Correct the entry.")
        require_known_facts(entry, model)
        return ()
    if model.model_type not in entry.model_type:
        raise BadInput(
            f"{source.directory} is a {model.model_type} checkpoint, but entry {entry.name} is for "
            f"{' or '.join(entry.model_type)} ({entry.facts.ffn} feed-forward).",
            "Choose the entry that fits the checkpoint: `zoo list` shows the feed-forward kind of each.",
        )
    require_known_facts(entry, model)
    if request.sample:  # another size on purpose
        return ()
    differences = compare_facts(entry, model.whole_facts)  # of a slice, the whole is compared
    if other := other_model(source, entry, plugins):
        differences = (*differences, other)
    if differences and not request.custom:
        # What is on the hub may not be in the folder of the cache yet.
        given = source.directory if source.hub is None else f"{source.hub.id}@{source.hub.commit}"
        raise BadInput(
            f"{given} is not the model of entry {entry.name}: {'; '.join(differences)}.",
            f"`{zoo_command('build', given)}` builds it as what it is, and "
            f"`{zoo_command('new', 'NAME', '--from', given)}` writes an entry for it; with --custom it is "
            "built by this entry's defaults, and says that it is another model.",
        )
    if request.custom and not differences:
        raise BadInput(f"{source.directory} has the facts of entry {entry.name}: there is nothing --custom about it.")
    return differences


def _max_context(request: BuildRequest, entry: Entry | None, contract: Contract, facts: Mapping[str, Any]) -> int:
    """The positions that were asked for, or the least of what entry, model and contract suggest."""
    limit = int(facts["max_context_length"])
    if request.max_context is not None and not MINIMUM_CONTEXT <= request.max_context <= limit:
        raise BadInput(
            f"A context of {request.max_context} is not between {MINIMUM_CONTEXT} and {limit}, the model's own limit.",
            "Choose another with --max-context N.",
        )
    chosen = request.max_context or usual_context(entry, contract, facts)
    if chosen < MINIMUM_CONTEXT:
        usual = entry.bundle.max_context if entry else DEFAULT_CONTEXT
        raise BadInput(
            f"The bundle would allow {chosen} positions (the model {limit}, the entry {usual}); {MINIMUM_CONTEXT} is "
            "the least."
        )
    return chosen


def usual_context(entry: Entry | None, contract: Contract, facts: Mapping[str, Any]) -> int:
    """The positions of a bundle that nobody chose a number for."""
    limit = int(facts["max_context_length"])
    return min(entry.bundle.max_context if entry else DEFAULT_CONTEXT, limit, contract.default_context or limit)


# ---------------------------------------------------------------------------------------------------------------------
# Functions and their decoders
# ---------------------------------------------------------------------------------------------------------------------


def _functions(
    model: Model, entry: Entry | None, contract: Contract, max_context: int, plugins: Plugins
) -> dict[str, FunctionDesign]:
    brought = plugins.extra_states_of_plugins(model.overlay, entry, model.config, contract)
    states, vocab_size = [state for _, state in brought], int(model.facts["vocab_size"])
    try:
        signatures = contract.functions(model.kv_cache, states, vocab_size, max_context)
    except ValueError as error:
        raise PluginError(
            f"the contract {contract.name} has no function with these states: {error}. {_origins(brought)}".rstrip()
        ) from error
    _require_engine(contract, signatures, language_block(signatures, vocab_size, max_context), brought)
    return {
        name: FunctionDesign(
            signature, tuple(plugins.layer_rewrites(model.overlay, entry, model.config, contract, signature))
        )
        for name, signature in signatures.items()
    }


def _require_engine(
    contract: Contract,
    signatures: Mapping[str, TraceSpec],
    language: Mapping[str, Any],
    brought: Sequence[tuple[str, StateSpec]],
) -> None:
    """Refuse functions that the contract's engine would not run, or would run wrongly.

    Raises:
        PluginError: with every rule that is broken, and the plugins that brought the states which break one.
    """
    if contract.engine is None:
        return
    decoder = next(iter(signatures.values()))
    seen = Interface({name: spec.declared for name, spec in signatures.items()}, language, decoder.positions)
    broken = contract.engine.breaches(seen)
    if broken:
        states = {state for _, breach in broken for state in breach.states}
        raise PluginError(
            f"by the contract {contract.name} this bundle would break rules of {contract.engine.title}: "
            f"{'; '.join(sentence(rule, breach) for rule, breach in broken)}. "
            f"{_origins([(plugin, state) for plugin, state in brought if state.name in states])}".rstrip(),
            "docs/contracts.md has the rules; a contract for another engine says so by its `engine`.",
        )


def _origins(brought: Sequence[tuple[str, StateSpec]]) -> str:
    """A sentence that says which plugin brought which state; empty where none did."""
    names: dict[str, list[str]] = {}
    for plugin, state in brought:
        names.setdefault(plugin, []).append(state.name)
    told = [f"{' and '.join(states)} from plugin {plugin!r}" for plugin, states in names.items()]
    return f"Of zoo_extra_states: {listing(told)}." if told else ""


@frozen
class Decoders:
    """The decoder of each function, without weights. Decoders are laid out when first asked for, which takes torch."""

    model: Model
    contract: Contract
    functions: Mapping[str, FunctionDesign]
    plugins: Plugins

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """The decoder of each function by name: on the meta device, layers rewritten.

        Raises:
            PluginError: when the overlay or a rewrite fails, or the functions do not share their parameters.
        """
        from coreai_zoo.lowering.module import build_module, parameters_of

        modules = {name: build_module(self._decoder, function.rewrites) for name, function in self.functions.items()}
        first, *others = modules
        parameters = parameters_of(modules[first])
        for name in others:
            own = parameters_of(modules[name])
            differing = [parameter for parameter, info in own.items() if parameters.get(parameter) != info]
            if differing:
                raise PluginError(
                    f"overlay {self.model.overlay.name!r}: the function {name} has parameters that {first} does not "
                    f"have in this shape and dtype: {listing(differing)}.",
                    "Functions of a bundle share their weights.",
                )
        return modules

    @cached_property
    def parameters(self) -> Mapping[str, ParameterInfo]:
        """Every parameter by name, from the overlay's table, or else from the decoder itself, which takes torch."""
        overlay = self.model.overlay
        (first, *_) = self.functions.values()
        if isinstance(overlay, HasParameterTable) and all(rewrite.keeps_parameters for _, rewrite in first.rewrites):
            with self._attributed():
                return overlay.parameters(self.model.config, self.contract)
        from coreai_zoo.lowering.module import parameters_of

        return parameters_of(next(iter(self.modules.values())))

    def _decoder(self) -> nn.Module:
        from coreai_zoo.lowering.module import parameters_of

        overlay = self.model.overlay
        with self._attributed():
            made = overlay.decoder(self.model.config, self.contract)
            if isinstance(overlay, HasParameterTable):
                _check_table(overlay.name, overlay.parameters(self.model.config, self.contract), parameters_of(made))
            return made

    def _attributed(self) -> AbstractContextManager[None]:
        return self.plugins.attribute_errors(self.model.plugin, f"overlay {self.model.overlay.name!r}")


def _check_table(overlay: str, table: Mapping[str, ParameterInfo], real: Mapping[str, ParameterInfo]) -> None:
    """Refuse an overlay whose table of parameters is not that of its decoder: `zoo plan` adds up the table."""
    names = [name for name in {**real, **table} if table.get(name) != real.get(name)]
    if names:
        raise PluginError(
            f"the table of parameters of overlay {overlay!r} differs from its decoder in {listing(names)}.",
            "Correct its `parameters`, or take the method away.",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Recipe, weights, name
# ---------------------------------------------------------------------------------------------------------------------


def _with_head(
    recipe: Recipe, model: Model, entry: Entry | None, plugins: Plugins
) -> tuple[Recipe, HeadQuantization | None]:
    """The recipe with the overlay's head policy in place; and that policy, None where the recipe decides by itself."""
    policy = plugins.head_quantization(model.overlay, entry, model.config)
    return recipe.with_head(policy), policy if recipe.leaves_head_to_overlay else None


def _weights(
    decoders: Decoders, entry: Entry | None, source: Source, checkpoint: Checkpoint | None, recipe: Recipe
) -> tuple[WeightPlan, tuple[str, ...]]:
    """The plan of every parameter, and what is to be noted of the checkpoint.

    Where it is not known which tensors there are, parameters have no sources.
    """
    model, plugins = decoders.model, decoders.plugins
    plugin, table = plugins.weight_map(model.overlay, entry, model.config)
    parameters, layers = decoders.parameters, int(model.whole_facts["layers"])
    notes = [*source.notes, *(checkpoint.notes if checkpoint else ())]
    with plugins.attribute_errors(plugin, "the weight map", except_input=True), source.naming_the_original():
        tensors = source.tensors(checkpoint)
        if checkpoint is not None:
            notes += checkpoint.check_index(Names(table).is_left_out)
        if tensors is None:
            weights = plan_without_checkpoint(table, parameters, recipe, layers)
        else:
            with _telling(notes):
                weights = plan_weights(table, parameters, tensors, recipe, layers)
    _check_routed(model, table, weights)
    return weights, (*dict.fromkeys((*notes, *weights.notes)),)


@contextmanager
def _telling(notes: Sequence[str]) -> Iterator[None]:
    """Within the block, an error about the weights also says what was noted of their files: it may be the cause."""
    try:
        yield
    except BadInput as error:
        for note in notes:
            error.add_note(f"Note: {note}.")
        raise


def _check_routed(model: Model, table: WeightMap, weights: WeightPlan) -> None:
    """Refuse experts where no fact says how many of them a token reads."""
    routed = {role.name for role in table.roles if role.routed} & {tensor.role for tensor in weights.tensors}
    missing = sorted({"experts", "experts_per_token"} - set(model.facts))
    if routed and missing:
        raise PluginError(
            f"overlay {model.overlay.name!r} of plugin {model.plugin!r} has experts but tells no fact "
            f"{' and no '.join(missing)}: how many of them a token reads is not known."
        )


def _label(request: BuildRequest, subject: Subject, source: Source) -> str:
    """What the model is called: the entry's name, the repository's, or the folder's where no repository is known."""
    if subject.entry is not None:
        return subject.entry.name
    if request.label is not None:
        return request.label
    if source.origin.hf_id is not None:
        return source.origin.hf_id.rpartition("/")[2]
    assert source.directory is not None
    return source.directory.resolve().name


def _bundle_name(
    request: BuildRequest,
    label: str,
    recipe: Recipe,
    contract: Contract,
    backend: Backend,
    differences: tuple[str, ...],
) -> str:
    parts = [slug(label)]
    if request.sample:
        parts.append("sample")
    if differences:
        parts.append("custom")
    if request.layers is not None:
        parts.append(f"{request.layers}layers")
    usual = "decode" if contract.query_length == 1 else "dynamic"
    parts.append(slug(contract.name) if contract.prefill else usual)
    parts.append(recipe.published_name)
    if backend.name != DEFAULT_BACKEND:
        parts.append(backend.name)
    return "_".join(parts)
