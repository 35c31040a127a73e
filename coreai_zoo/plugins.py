"""Discovery of plugins and the one place that calls their hooks.

pluggy picks one of several answers without a word and does not say whose function raised. So each implementation is
called by itself here: all answers are collected and checked, and whatever goes wrong names the plugin and the hook.

One broken plugin must not keep a user from the others. Where a hook only adds to a list (entries, recipes, backends,
commands, ...), what is wrong is reported once and left out; where a missing answer would change a bundle or a verdict
(rewrites, states, weights, ...), it is an error.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
import pluggy
from attrs import evolve, frozen

from coreai_zoo import hookspecs
from coreai_zoo.bounds import GENERAL, MeasuredBounds
from coreai_zoo.contracts import Contract
from coreai_zoo.errors import BadInput, PluginError, ZooError, listing
from coreai_zoo.gate import ReferenceModel
from coreai_zoo.overlay import LayerRewrite, Overlay, TokenizerClass, Variant, WeightMap
from coreai_zoo.recipes import HeadQuantization, Recipe
from coreai_zoo.signature import StateSpec, TraceSpec
from coreai_zoo.stress import StressSample
from coreai_zoo.tracebacks import raised_at

if TYPE_CHECKING:
    from coreai_zoo.backend import Backend
    from coreai_zoo.entry import Entry
    from coreai_zoo.gate import Gate

GROUP = "coreai_zoo"
"""Entry-point group in which a plugin advertises itself."""

DISTRIBUTION = "coreai-zoo"
"""Our own distribution, whose plugins are registered before all others."""

HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("zoo_"))
"""Every hook, in the order of hookspecs.py."""

LISTS = frozenset(
    {
        "zoo_entries",
        "zoo_recipes",
        "zoo_contracts",
        "zoo_register_commands",
        "zoo_tokenizer_classes",
        "zoo_backends",
    }
)
"""Hooks that only add to a list: a plugin that fails in one is left out of that list."""

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_T = TypeVar("_T")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_N = TypeVar("_N", bound=_Named)


@frozen
class PluginInfo:
    """A registered plugin: where it comes from, and which hooks it implements.

    Attributes:
        name: name of its entry point.
        module: what the entry point refers to.
        distribution: the installed package that advertises it, or None when it was registered by hand.
        version: that package's version.
        hooks: the hooks that it implements.
    """

    name: str
    module: str
    distribution: str | None
    version: str | None
    hooks: tuple[str, ...]


class Plugins:
    """The registered plugins. One method per hook asks them all and checks what they answer; an error names the plugin.

    Args:
        tolerant: report what is wrong with a plugin once, on stderr, and go on without what it would have added. Else
            it is raised.

    Attributes:
        without: names of installed plugins that were left out, which another process leaves out to have the same.
    """

    def __init__(self, *, tolerant: bool = False) -> None:
        self.without: tuple[str, ...] = ()
        self._manager = pluggy.PluginManager("coreai_zoo")
        self._manager.add_hookspecs(hookspecs)
        self._sources: dict[str, importlib.metadata.EntryPoint] = {}
        self._tolerant = tolerant
        self._problems: dict[str, ZooError] = {}
        self._disputed: dict[tuple[str, str], ZooError] = {}

    @classmethod
    def discover(cls, without: Collection[str] = ()) -> Plugins:
        """Register every plugin of the entry-point group, tolerant of those that are broken.

        Args:
            without: names of plugins to leave out; they are not even imported.

        Raises:
            BadInput: when there is no plugin of a name in `without`.
        """
        plugins = cls(tolerant=True)
        plugins.without = tuple(without)
        points = sorted(importlib.metadata.entry_points(group=GROUP), key=_precedence)
        names = [point.name for point in points]
        for name in without:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1) or names
                hint = f"Did you mean {listing(near)}?" if near else "No plugin is installed."
                raise BadInput(f"There is no plugin {name!r} to leave out.", hint)
        for point in points:
            if point.name in without:
                continue
            try:
                plugins._load(point, [other.name for other in points if other is not point])
            except PluginError as error:
                plugins.tolerate(error)
        return plugins

    def _load(self, point: importlib.metadata.EntryPoint, others: list[str]) -> None:
        owner = f"plugin {point.name!r} ({_source(point)})"
        if point.name in self._sources:
            raise PluginError(
                f"{owner} has the name of another plugin ({_source(self._sources[point.name])}).",
                "Uninstall one of them.",
            )
        try:
            with redirect_stdout(sys.stderr):  # stdout is for what a command gives
                module = point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            beside = f"Other plugins: {listing(others)}." if others else "There is no other plugin."
            raise PluginError(
                f"{owner} cannot be imported: {_brief(error)}. {beside}",
                f"{raised_at(error)} Fix or uninstall it, or leave it out with `zoo --without {point.name}`.".strip(),
            ) from error
        self.register(module, point.name)
        self._sources[point.name] = point

    def tolerate(self, error: ZooError, hook: str | None = None, name: str | None = None) -> None:
        """Report what is wrong with a plugin, once, where that is tolerated; else raise it.

        Args:
            error: what is wrong, naming the plugin.
            hook: the hook in which it is wrong, None outside of hooks. Only those of `LISTS` are tolerated.
            name: of something that two plugins bring in that hook; see `require_undisputed`.
        """
        if not self._tolerant or (hook is not None and hook not in LISTS):
            raise error
        if hook is not None and name is not None:
            self._disputed[hook, name] = error
        if str(error) not in self._problems:
            self._problems[str(error)] = error
            click.echo(f"warning: {error}", err=True)

    @property
    def problems(self) -> tuple[ZooError, ...]:
        """The errors that were tolerated so far."""
        return tuple(self._problems.values())

    def require_undisputed(self, hook: str, name: str) -> None:
        """Refuse a name that two plugins bring in `hook`: listing the first is tolerable, building from it is not.

        Raises:
            PluginError: naming both.
        """
        if (hook, name) in self._disputed:
            raise self._disputed[hook, name]

    def not_found(self, message: str, hint: str) -> BadInput:
        """The error about something that is not there, with what was left out behind its hint: that may be why."""
        left_out = f"Left out: {listing([str(error) for error in self.problems], 3, ' ')}" if self.problems else ""
        return BadInput(message, f"{hint} {left_out}".rstrip())

    def register(self, plugin: object, name: str) -> None:
        """Register a module or object as a plugin.

        Raises:
            PluginError: for an unknown hook, an undecorated one, wrong arguments, or a name that is taken.
        """
        if self._manager.has_plugin(name):
            raise PluginError(f"plugin {name!r} is registered already.")
        self._check_hooks(plugin, name)
        try:
            self._manager.register(plugin, name)
        except pluggy.PluginValidationError as error:
            if self._manager.has_plugin(name):  # pluggy 1.6 leaves it there
                self._manager.unregister(name=name)
            raise PluginError(f"plugin {name!r} is not valid: {_brief(error, kind=False)}.") from error

    def _check_hooks(self, plugin: object, name: str) -> None:
        """Check that each hook which a plugin implements exists and could be called by this host.

        Raises:
            PluginError: naming the plugin, the function and the nearest hook.
        """
        implemented = set()
        for function in dir(plugin):
            options = self._manager.parse_hookimpl_opts(plugin, function)
            if options is None:
                continue
            hook = options["specname"] or function
            implemented.add(hook)
            if hook not in HOOKS and not options["optionalhook"]:
                near = difflib.get_close_matches(hook, HOOKS, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"The hooks are {', '.join(HOOKS)}."
                raise PluginError(f"plugin {name!r} implements {hook}, which is no hook.", hint)
            if hook in HOOKS:
                given = [*inspect.signature(getattr(hookspecs, hook)).parameters]
                taken = inspect.signature(getattr(plugin, function)).parameters.values()
                needed = [each.name for each in taken if each.default is each.empty and each.kind not in _VARIABLE]
                if unknown := [argument for argument in needed if argument not in given]:
                    raise PluginError(
                        f"plugin {name!r}: {hook} takes {listing(unknown)}, which it is not given.",
                        f"It is given {listing(given)}." if given else "It is given nothing.",
                    )
            if options["wrapper"] or options["hookwrapper"]:
                raise PluginError(
                    f"plugin {name!r} wraps {hook}, but hooks of the zoo cannot be wrapped: the host could not say any "
                    "more whose answer it has."
                )
            if options["tryfirst"] or options["trylast"]:
                raise PluginError(
                    f"plugin {name!r} marks {hook} as tryfirst or trylast, which the zoo does not heed: plugins are "
                    "asked in the order of their registration, the zoo's own first."
                )
        for hook in HOOKS:
            if hook not in implemented and callable(getattr(plugin, hook, None)):
                raise PluginError(
                    f"plugin {name!r} has a function {hook} that is not decorated, so it would never be called.",
                    "Decorate it with coreai_zoo.hookimpl.",
                )

    def names(self) -> list[str]:
        """Names of the registered plugins, in the order of registration."""
        return [name for name, _plugin in self._manager.list_name_plugin()]

    def info(self) -> list[PluginInfo]:
        """Every registered plugin, in the order of registration."""
        infos = []
        for name, plugin in self._manager.list_name_plugin():
            point = self._sources.get(name)
            distribution = point.dist if point else None
            callers = {caller.name for caller in self._manager.get_hookcallers(plugin) or ()}
            infos.append(
                PluginInfo(
                    name=name,
                    module=point.value if point else getattr(plugin, "__name__", type(plugin).__name__),
                    distribution=distribution.name if distribution else None,
                    version=distribution.version if distribution else None,
                    hooks=tuple(hook for hook in HOOKS if hook in callers),
                )
            )
        return infos

    def packages(self) -> list[str]:
        """The top-level packages that the code of a build is in: the host, then the plugins."""
        modules = ("coreai_zoo", *(info.module for info in self.info()))
        return list(dict.fromkeys(re.split(r"[.:]", module)[0] for module in modules))

    @contextmanager
    def attribute_errors(self, plugin: str, what: str, *, except_input: bool = False) -> Iterator[None]:
        """Make every exception of the block name `plugin` and `what` it was doing, a hook for example.

        An error of the zoo keeps its type and exit code and gets a note; anything else becomes a PluginError.

        Args:
            plugin: its name.
            what: what it was doing.
            except_input: let BadInput pass as it is, where judging what the user gave is the plugin's task.
        """
        try:
            yield
        except ZooError as error:
            if except_input and isinstance(error, BadInput):
                raise
            error.add_note(f"(From plugin {plugin!r}, {what}.)")
            raise
        except (Exception, SystemExit) as error:
            hint = raised_at(error) + (f" Without the plugin: `zoo --without {plugin}`." if what in HOOKS else "")
            raise PluginError(f"plugin {plugin!r} failed in {what}: {_brief(error)}.", hint.strip()) from error

    # -----------------------------------------------------------------------------------------------------------------
    # Calling
    # -----------------------------------------------------------------------------------------------------------------

    def _implementations(self, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        """The implementations of `hook` with the names of their plugins, in the order of registration."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        by_plugin = {implementation.plugin_name: implementation for implementation in caller.get_hookimpls()}

        def bind(implementation: pluggy.HookImpl) -> Callable[..., Any]:
            return lambda **given: implementation.function(**{name: given[name] for name in implementation.argnames})

        return [(name, bind(by_plugin[name])) for name in self.names() if name in by_plugin]

    def _ask(self, hook: str, *, last_first: bool = False, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Each plugin's answer that is not None, in the order of registration or the other way round."""
        implementations = self._implementations(hook)
        for plugin, implementation in reversed(implementations) if last_first else implementations:
            with self.attribute_errors(plugin, hook):
                answer = implementation(**arguments)
            if answer is not None:
                yield plugin, answer

    def _collect(self, hook: str, check: Callable[[Any], _T], **arguments: Any) -> list[tuple[str, _T]]:
        """The items of every plugin's answer; `check` returns the item or raises TypeError saying what it should be."""
        items: list[tuple[str, _T]] = []
        for plugin, implementation in self._implementations(hook):
            try:
                with self.attribute_errors(plugin, hook):
                    answer = implementation(**arguments)
                    is_list = isinstance(answer, Iterable) and not isinstance(answer, str | bytes | Mapping)
                    found = list(answer) if is_list else answer  # a generator runs here
                if found is None:
                    continue
                if not is_list:
                    raise _wrong(plugin, hook, found, "a list")
                items += [(plugin, _checked(plugin, hook, item, check)) for item in found]
            except ZooError as error:
                self.tolerate(error, hook)
        return items

    def _collect_named(
        self, hook: str, what: str, check: Callable[[Any], _N], **arguments: Any
    ) -> Mapping[str, tuple[str, _N]]:
        """The items of every plugin's answer by name, each with its plugin; no two may have one name."""
        named: dict[str, tuple[str, _N]] = {}
        for plugin, item in self._collect(hook, check, **arguments):
            if item.name not in named:
                named[item.name] = (plugin, item)
                continue
            error = PluginError(
                f"the {what} {item.name!r} is there twice in {hook}: from plugin {named[item.name][0]!r} and from "
                f"plugin {plugin!r}.",
                "Rename one, or uninstall one of the plugins.",
            )
            self.tolerate(error, hook, item.name)
        return named

    def _first(self, hook: str, kind: type[_T], **arguments: Any) -> tuple[str, _T] | None:
        """The first answer, the last registered plugin asked first."""
        for plugin, answer in self._ask(hook, last_first=True, **arguments):
            if not isinstance(answer, kind):
                raise _wrong(plugin, hook, answer, f"a {kind.__name__} or None")
            return plugin, answer
        return None

    def _asked(self, hook: str) -> str:
        names = [plugin for plugin, _implementation in self._implementations(hook)]
        return f"Asked: {listing(names)}." if names else f"No plugin implements {hook}."

    # -----------------------------------------------------------------------------------------------------------------
    # One method per hook
    # -----------------------------------------------------------------------------------------------------------------

    def entries(self) -> list[tuple[str, Path]]:
        """Entry files, each with its plugin."""
        return self._collect("zoo_entries", _instances(Path))

    def recipes(self) -> Mapping[str, Recipe]:
        """Recipes by name.

        Raises:
            PluginError: when two have one name, naming the plugins.
        """
        return _without_plugins(self._collect_named("zoo_recipes", "recipe", _instances(Recipe)))

    def contracts(self) -> Mapping[str, Contract]:
        """Engine contracts by name; raises as `recipes` does."""
        return _without_plugins(self._collect_named("zoo_contracts", "contract", _instances(Contract)))

    def claim_overlay(
        self, model_type: str, hf_config: Mapping[str, Any], *, of_entry: bool = False
    ) -> tuple[Overlay, str]:
        """The overlay for an architecture and the plugin that claims it.

        An overlay that refines another claimant's wins over it.

        Args:
            model_type: the architecture.
            hf_config: the config.
            of_entry: whether it is of an entry's model. A plugin that fails to answer is reported and claims nothing
                then, where another does: it stands in no other plugin's way. Of a checkpoint alone it may be the one.

        Raises:
            BadInput: when nobody claims it.
            PluginError: when several do, naming them, or an overlay refines one that nobody claims it with.
        """
        hook = "zoo_claim_overlay"
        claims: list[tuple[str, Overlay]] = []
        failed: list[ZooError] = []
        for plugin, implementation in self._implementations(hook):
            try:
                with self.attribute_errors(plugin, hook):
                    answer = implementation(model_type=model_type, hf_config=hf_config)
                if answer is not None and not isinstance(answer, Overlay):
                    raise _wrong(plugin, hook, answer, f"an Overlay or None; it lacks {_lacking(answer, Overlay)}")
            except ZooError as error:
                if not (of_entry and self._tolerant):
                    raise
                failed.append(error)
                continue
            if answer is not None:
                claims.append((plugin, answer))
        if failed and not claims:
            raise failed[0]
        for each in failed:
            self.tolerate(each)
        if not claims:
            raise self.not_found(
                f"the architecture {model_type!r} is claimed by no plugin. {self._asked(hook)}",
                f"Install a plugin for it, or write one that implements {hook}.",
            )
        plugin, overlay = _winning_claim(model_type, claims)
        return overlay, plugin

    def layer_rewrites(
        self, overlay: Overlay, entry: Entry | None, config: Any, contract: Contract, function: TraceSpec
    ) -> list[tuple[str, LayerRewrite]]:
        """Rewrites, each with its plugin. Whether two meet on one layer is known only on the decoder itself."""
        arguments = {"overlay": overlay, "entry": entry, "config": config, "contract": contract, "function": function}
        return self._collect("zoo_layer_rewrites", _instances(LayerRewrite), **arguments)

    def extra_states(self, overlay: Overlay, entry: Entry | None, config: Any, contract: Contract) -> list[StateSpec]:
        """States after the KV pair, in the order of registration; raises as `extra_states_of_plugins` does."""
        return [state for _, state in self.extra_states_of_plugins(overlay, entry, config, contract)]

    def extra_states_of_plugins(
        self, overlay: Overlay, entry: Entry | None, config: Any, contract: Contract
    ) -> list[tuple[str, StateSpec]]:
        """States after the KV pair, in the order of registration, each with its plugin.

        Raises:
            PluginError: when a name is given twice, naming the plugins.
        """
        arguments = {"overlay": overlay, "entry": entry, "config": config, "contract": contract}
        return [*self._collect_named("zoo_extra_states", "state", _instances(StateSpec), **arguments).values()]

    def weight_map(self, overlay: Overlay, entry: Entry | None, config: Any) -> tuple[str, WeightMap]:
        """The weight map, with its plugin.

        Raises:
            PluginError: when no plugin has one.
        """
        hook = "zoo_weight_map"
        answer = self._first(hook, WeightMap, overlay=overlay, entry=entry, config=config)
        if answer is None:
            raise PluginError(
                f"there is no weight map for the overlay {overlay.name!r}. {self._asked(hook)}",
                f"The plugin that claims the overlay has to answer {hook}.",
            )
        return answer

    def head_quantization(self, overlay: Overlay, entry: Entry | None, config: Any) -> HeadQuantization | None:
        """The head policy, or None when no plugin has one."""
        answer = self._first("zoo_head_quantization", HeadQuantization, overlay=overlay, entry=entry, config=config)
        return answer[1] if answer else None

    def tokenizer_classes(self) -> Mapping[str, str]:
        """Classes of tokenizers that engines can use, each with the class that engines know it as.

        Raises:
            PluginError: when two plugins disagree, or a class is said to be known as one that engines do not know.
        """
        hook = "zoo_tokenizer_classes"
        classes: dict[str, str] = {}
        owners: dict[str, str] = {}
        answers = self._collect(hook, _instances(TokenizerClass))
        # Those that engines know by their own names first: the others are known as one of these.
        for plugin, answer in sorted(answers, key=lambda item: item[1].known_as is not None):
            known_as = answer.known_as or answer.name
            says = f"plugin {plugin!r} says in {hook} that engines know {answer.name} as {known_as}"
            if classes.get(answer.name, known_as) != known_as:
                owner = f"plugin {owners[answer.name]!r} says as {classes[answer.name]}"
                self.tolerate(PluginError(f"{says}; {owner}."), hook)
            elif answer.known_as is not None and classes.get(known_as) != known_as:
                self.tolerate(PluginError(f"{says}, which no plugin says that they know."), hook)
            else:
                classes[answer.name] = known_as
                owners.setdefault(answer.name, plugin)
        return classes

    def backends(self) -> Mapping[str, Backend]:
        """Backends by name; raises as `recipes` does."""
        return _without_plugins(self.backends_with_plugins())

    def backends_with_plugins(self) -> Mapping[str, tuple[str, Backend]]:
        """Backends by name, each with its plugin; raises as `recipes` does."""
        return self._collect_named("zoo_backends", "backend", _named("Backend"))

    def oracle(self, overlay: Overlay, hf_config: Mapping[str, Any]) -> ReferenceModel | None:
        """The maker of the reference model, or None for transformers' own class for the config."""
        hook = "zoo_oracle"
        answer = self._first(hook, ReferenceModel, overlay=overlay, hf_config=hf_config)
        if answer is None:
            return None
        plugin, reference = answer

        @functools.wraps(reference.make)
        def make(*arguments: Any) -> Any:
            with self.attribute_errors(plugin, hook):
                return reference.make(*arguments)

        return evolve(reference, make=make)

    def gate_bounds(self, overlay: Overlay) -> MeasuredBounds:
        """The bounds of the overlay's family; the general ones where no plugin has any."""
        answer = self._first("zoo_gate_bounds", MeasuredBounds, overlay=overlay)
        return answer[1] if answer else GENERAL

    def stress_samples(self, overlay: Overlay, config: Any) -> list[StressSample]:
        """What makes stress samples of the overlay's samples.

        Raises:
            PluginError: when two have one name, naming the plugins.
        """
        found = self._collect_named(
            "zoo_stress_samples", "stress sample", _instances(StressSample), overlay=overlay, config=config
        )
        return [sample for _, sample in found.values()]

    def gates(self, overlay: Overlay, entry: Entry | None) -> list[tuple[str, Gate]]:
        """Extra gates, each with its plugin.

        Raises:
            PluginError: when two have one name, naming the plugins.
        """
        gates = self._collect_named("zoo_gates", "gate", _named("Gate"), overlay=overlay, entry=entry)
        return [*gates.values()]

    def register_commands(self, cli: click.Group) -> None:
        """Let every plugin add its commands to `cli`.

        Raises:
            PluginError: when a plugin replaces or removes a command that was there; `cli` keeps what it had.
        """
        hook = "zoo_register_commands"
        for plugin, implementation in self._implementations(hook):
            before = dict(cli.commands)
            taken = set(cli.list_commands(click.Context(cli)))
            try:
                with self.attribute_errors(plugin, hook):
                    implementation(cli=cli)
                changed = {name for name, command in cli.commands.items() if command is not before.get(name)}
                clashes = sorted((changed & taken) | (before.keys() - cli.commands.keys()))
                if clashes:
                    message = f"plugin {plugin!r} replaces the command {listing(clashes)} in {hook}."
                    raise PluginError(message, "Rename it.")
            except ZooError as error:
                cli.commands.clear()
                cli.commands.update(before)
                self.tolerate(error, hook)


@functools.cache
def default_plugins() -> Plugins:
    """The installed plugins, discovered once per process."""
    return Plugins.discover()


# ---------------------------------------------------------------------------------------------------------------------
# Checks and wording
# ---------------------------------------------------------------------------------------------------------------------


def _brief(error: BaseException, *, kind: bool = True) -> str:
    """`error` on one line, with its type unless that says nothing."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}".rstrip(": ") if kind else text


def _precedence(point: importlib.metadata.EntryPoint) -> tuple[bool, str, str]:
    # Our own first, so that whoever is asked last registered first may answer in their place. After that by name: the
    # order decides the order of extra states, hence bytes, and must not depend on where pip put things.
    distribution = point.dist.name if point.dist else ""
    return distribution != DISTRIBUTION, distribution, point.name


def _source(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.value} of {point.dist.name} {point.dist.version}" if point.dist else point.value


def _wrong(plugin: str, hook: str, answer: object, expected: str, verb: str = "answered with") -> PluginError:
    shown = repr(answer)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return PluginError(f"plugin {plugin!r} {verb} {shown} in {hook}; the host expects {expected}.")


def _checked(plugin: str, hook: str, item: Any, check: Callable[[Any], _T]) -> _T:
    try:
        return check(item)
    except TypeError as error:
        raise _wrong(plugin, hook, item, f"only {error}", "answered with a list that holds") from None


def _without_plugins(named: Mapping[str, tuple[str, _T]]) -> Mapping[str, _T]:
    return {name: item for name, (_plugin, item) in named.items()}


def _instances(kind: type[_T]) -> Callable[[Any], _T]:
    def check(item: Any) -> _T:
        if not isinstance(item, kind):
            raise TypeError(f"{kind.__name__}s")
        return item

    return check


def _named(kind: str) -> Callable[[Any], Any]:
    # A name is all that the host needs here. Holding the item against the protocol would ask for each of its
    # properties, and so might load a toolchain.
    def check(item: Any) -> Any:
        if isinstance(item, type) or not isinstance(getattr(item, "name", None), str):
            raise TypeError(f"{kind}s, each with a name")
        return item

    return check


def _lacking(answer: object, protocol: type) -> str:
    members = sorted(getattr(protocol, "__protocol_attrs__", ()) or vars(protocol))
    return listing([member for member in members if not member.startswith("_") and not hasattr(answer, member)])


def _winning_claim(model_type: str, claims: list[tuple[str, Overlay]]) -> tuple[str, Overlay]:
    """The claim that no other one refines.

    Raises:
        PluginError: when several are left, or none, or an overlay refines one that is not among the claims.
    """
    hook, names = "zoo_claim_overlay", [overlay.name for _plugin, overlay in claims]
    refined = {name: _refined(plugin, overlay) for name, (plugin, overlay) in zip(names, claims, strict=True)}
    for plugin, overlay in claims:
        base = refined[overlay.name]
        if base is not None and base not in names:
            raise PluginError(
                f"plugin {plugin!r} claims the architecture {model_type!r} in {hook} with the overlay "
                f"{overlay.name!r}, which refines the overlay {base!r}, but no plugin claims it with that.",
                f"Install the plugin that brings {base!r}, or leave out {plugin!r}: `zoo --without {plugin}`.",
            )
    same = [claim for claim in claims if names.count(claim[1].name) > 1]
    winning = same or [claim for claim in claims if claim[1].name not in refined.values()]
    if len(winning) == 1:
        return winning[0]
    who = " and ".join(f"plugin {plugin!r} (overlay {overlay.name!r})" for plugin, overlay in winning or claims)
    raise PluginError(
        f"the architecture {model_type!r} is claimed more than once in {hook}: by {who}"
        f"{'' if winning else ', which refine each other'}.",
        "Uninstall all but one, or let one overlay say that it refines the other.",
    )


def _refined(plugin: str, overlay: Overlay) -> str | None:
    """Name of the overlay that this one refines, if any."""
    base = overlay.refines if isinstance(overlay, Variant) else None
    if base is not None and not isinstance(base, str):
        expected = "the name of the overlay that it refines"
        raise _wrong(plugin, "zoo_claim_overlay", base, expected, f"gave the overlay {overlay.name!r} `refines`")
    return base
