"""Discovery of plugins and the one place that calls their hooks.

pluggy picks one of several answers without a word and does not say whose function raised. So each implementation is
called by itself here: all answers are collected and checked, and whatever goes wrong names the plugin and the hook.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import pluggy
from attrs import frozen

from coreai_zoo import hookspecs
from coreai_zoo.errors import BadInput, PluginError, ZooError, listing
from coreai_zoo.overlay import LayerRewrite, Overlay, WeightMap
from coreai_zoo.recipes import HeadQuantization
from coreai_zoo.signature import StateSpec, TraceSpec

if TYPE_CHECKING:
    from coreai_zoo.backend import Backend
    from coreai_zoo.contracts import Contract
    from coreai_zoo.entry import Entry
    from coreai_zoo.gate import Gate

GROUP = "coreai_zoo"
"""Entry-point group in which a plugin advertises itself."""

DISTRIBUTION = "coreai-zoo"
"""Our own distribution, whose plugins are registered before all others."""

HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("zoo_"))
"""Every hook, in the order of hookspecs.py."""

_T = TypeVar("_T")


@frozen
class PluginInfo:
    """What is known of a registered plugin.

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
    """The registered plugins. One method per hook asks them all, checks what they say, and blames."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("coreai_zoo")
        self._manager.add_hookspecs(hookspecs)
        self._sources: dict[str, importlib.metadata.EntryPoint] = {}

    @classmethod
    def discover(cls) -> Plugins:
        """Register every plugin of the entry-point group.

        Raises:
            PluginError: for a plugin that cannot be imported or is not valid, naming it and the others.
        """
        plugins = cls()
        found = importlib.metadata.entry_points(group=GROUP)
        points = sorted(found, key=_precedence)
        for point in points:
            owner = f"plugin {point.name!r} ({_source(point)})"
            others = [other.name for other in points if other is not point]
            beside = f"Other plugins: {listing(others)}." if others else "There is no other plugin."
            if point.name in plugins._sources:
                raise PluginError(
                    f"{owner} has the name of another plugin ({_source(plugins._sources[point.name])}).",
                    "Uninstall one of them.",
                )
            try:
                module = point.load()
            except Exception as error:
                raise PluginError(
                    f"{owner} cannot be imported: {_brief(error)}. {beside}", "Fix or uninstall it."
                ) from error
            plugins._sources[point.name] = point
            plugins.register(module, point.name)
        return plugins

    def register(self, plugin: object, name: str) -> None:
        """Register a module or object as a plugin.

        Raises:
            PluginError: for an unknown hook, an undecorated one, wrong arguments, or a name that is taken.
        """
        if self._manager.has_plugin(name):
            raise PluginError(f"plugin {name!r} is registered already.")
        try:
            self._manager.register(plugin, name)
            self.check_pending(name)
        except pluggy.PluginValidationError as error:
            self._unregister(name)
            raise PluginError(f"plugin {name!r} is not valid: {_brief(error, kind=False)}.") from error
        except PluginError:
            self._unregister(name)
            raise

    def check_pending(self, name: str) -> None:
        """Check that each hook which plugin `name` implements exists and could be called by this host.

        Raises:
            PluginError: naming the plugin, the function and the nearest hook.
        """
        plugin = self._manager.get_plugin(name)
        implemented = set()
        for caller in self._manager.get_hookcallers(plugin) or ():
            implemented.add(caller.name)
            for implementation in caller.get_hookimpls():
                if implementation.plugin_name != name:
                    continue
                if not caller.has_spec() and not implementation.optionalhook:
                    near = difflib.get_close_matches(caller.name, HOOKS, n=1)
                    hint = f"Did you mean {near[0]}?" if near else f"The hooks are {', '.join(HOOKS)}."
                    raise PluginError(f"plugin {name!r} implements {caller.name}, which is no hook.", hint)
                if implementation.wrapper or implementation.hookwrapper:
                    raise PluginError(
                        f"plugin {name!r} wraps {caller.name}, but hooks of the zoo cannot be wrapped: the host could "
                        "not say any more whose answer it has."
                    )
                if implementation.tryfirst or implementation.trylast:
                    raise PluginError(
                        f"plugin {name!r} marks {caller.name} as tryfirst or trylast, which the zoo does not heed: "
                        "plugins are asked in the order of their registration, the zoo's own first."
                    )
        for hook in HOOKS:
            if hook not in implemented and callable(getattr(plugin, hook, None)):
                raise PluginError(
                    f"plugin {name!r} has a function {hook} that is not decorated, so it would never be called.",
                    "Decorate it with coreai_zoo.hookimpl.",
                )

    def _unregister(self, name: str) -> None:
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)

    def names(self) -> list[str]:
        """Names of the registered plugins, in the order of registration."""
        return [name for name, _plugin in self._manager.list_name_plugin()]

    def info(self) -> list[PluginInfo]:
        """What is known of each plugin, in the order of registration."""
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
        except Exception as error:
            raise PluginError(f"plugin {plugin!r} failed in {what}: {_brief(error)}.") from error

    # -----------------------------------------------------------------------------------------------------------------
    # Calling
    # -----------------------------------------------------------------------------------------------------------------

    def _implementations(self, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        """The implementations of `hook` with the names of their plugins, in the order of registration."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        by_plugin = {}
        for implementation in caller.get_hookimpls():
            by_plugin[implementation.plugin_name] = (implementation.function, tuple(implementation.argnames))

        def bind(function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
            return lambda **arguments: function(**{name: arguments[name] for name in names})

        return [(name, bind(*by_plugin[name])) for name in self.names() if name in by_plugin]

    def _ask(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Each plugin's answer that is not None, in the order of registration."""
        for plugin, implementation in self._implementations(hook):
            with self.attribute_errors(plugin, hook):
                answer = implementation(**arguments)
            if answer is not None:
                yield plugin, answer

    def _collect(self, hook: str, check: Callable[[Any], _T], **arguments: Any) -> list[tuple[str, _T]]:
        """The items of every plugin's answer; `check` returns the item or raises TypeError saying what it should be."""
        items = []
        for plugin, answer in self._ask(hook, **arguments):
            if isinstance(answer, str | bytes | Mapping) or not isinstance(answer, Iterable):
                raise _wrong(plugin, hook, answer, "a list")
            with self.attribute_errors(plugin, hook):  # a generator runs here
                found = list(answer)
            for item in found:
                try:
                    items.append((plugin, check(item)))
                except TypeError as error:
                    raise _wrong(plugin, hook, item, f"only {error}", "answered with a list that holds") from None
        return items

    def _first(self, hook: str, kind: type[_T], **arguments: Any) -> tuple[str, _T] | None:
        """The first answer, the last registered plugin asked first."""
        for plugin, implementation in reversed(self._implementations(hook)):
            with self.attribute_errors(plugin, hook):
                answer = implementation(**arguments)
            if answer is not None:
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

    def claim_overlay(self, model_type: str, hf_config: Mapping[str, Any]) -> tuple[Overlay, str]:
        """The overlay for an architecture and the plugin that claims it.

        Raises:
            BadInput: when nobody claims it.
            PluginError: when several do, naming them.
        """
        hook = "zoo_claim_overlay"
        claims: list[tuple[str, Overlay]] = []
        for plugin, answer in self._ask(hook, model_type=model_type, hf_config=hf_config):
            if not isinstance(answer, Overlay):
                raise _wrong(plugin, hook, answer, f"an Overlay or None; it lacks {_lacking(answer, Overlay)}")
            claims.append((plugin, answer))
        if not claims:
            raise BadInput(
                f"the architecture {model_type!r} is claimed by no plugin. {self._asked(hook)}",
                f"Install a plugin for it, or write one that implements {hook}.",
            )
        if len(claims) > 1:
            who = " and ".join(f"plugin {plugin!r} (overlay {overlay.name!r})" for plugin, overlay in claims)
            raise PluginError(
                f"the architecture {model_type!r} is claimed more than once in {hook}: by {who}.",
                "Uninstall all but one.",
            )
        plugin, overlay = claims[0]
        return overlay, plugin

    def layer_rewrites(
        self, overlay: Overlay, entry: Entry | None, config: Any, contract: Contract, function: TraceSpec
    ) -> list[tuple[str, LayerRewrite]]:
        """Rewrites, each with its plugin. Whether two meet on one layer is known only on the decoder itself."""
        arguments = {"overlay": overlay, "entry": entry, "config": config, "contract": contract, "function": function}
        return self._collect("zoo_layer_rewrites", _instances(LayerRewrite), **arguments)

    def extra_states(self, overlay: Overlay, entry: Entry | None, config: Any, contract: Contract) -> list[StateSpec]:
        """States after the KV pair, in the order of registration.

        Raises:
            PluginError: when a name is given twice, naming the plugins.
        """
        hook = "zoo_extra_states"
        arguments = {"overlay": overlay, "entry": entry, "config": config, "contract": contract}
        states = self._collect(hook, _instances(StateSpec), **arguments)
        _unique(hook, "state", [(plugin, state.name) for plugin, state in states])
        return [state for _plugin, state in states]

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

    def backends(self) -> Mapping[str, Backend]:
        """Backends by name.

        Raises:
            PluginError: when two have one name, naming the plugins.
        """
        return {backend.name: backend for _plugin, backend in self.backends_by_plugin()}

    def backends_by_plugin(self) -> list[tuple[str, Backend]]:
        """Backends, each with its plugin; raises as `backends` does."""
        backends: list[tuple[str, Backend]] = self._collect("zoo_backends", _named("Backend"))
        _unique("zoo_backends", "backend", [(plugin, backend.name) for plugin, backend in backends])
        return backends

    def gates(self, overlay: Overlay, entry: Entry | None) -> list[tuple[str, Gate]]:
        """Extra gates, each with its plugin.

        Raises:
            PluginError: when two have one name, naming the plugins.
        """
        gates = self._collect("zoo_gates", _named("Gate"), overlay=overlay, entry=entry)
        _unique("zoo_gates", "gate", [(plugin, gate.name) for plugin, gate in gates])
        return gates

    def register_commands(self, cli: click.Group) -> None:
        """Let every plugin add its commands to `cli`.

        Raises:
            PluginError: when a plugin replaces or removes a command that was there; `cli` keeps what it had.
        """
        hook = "zoo_register_commands"
        for plugin, implementation in self._implementations(hook):
            before = dict(cli.commands)
            taken = set(cli.list_commands(click.Context(cli)))
            with self.attribute_errors(plugin, hook):
                implementation(cli=cli)
            changed = {name for name, command in cli.commands.items() if command is not before.get(name)}
            clashes = sorted((changed & taken) | (before.keys() - cli.commands.keys()))
            if clashes:
                cli.commands.clear()
                cli.commands.update(before)
                raise PluginError(f"plugin {plugin!r} replaces the command {listing(clashes)} in {hook}.", "Rename it.")


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


def _instances(kind: type[_T]) -> Callable[[Any], _T]:
    def check(item: Any) -> _T:
        if not isinstance(item, kind):
            raise TypeError(f"{kind.__name__}s")
        return item

    return check


def _named(kind: str) -> Callable[[Any], Any]:
    # Importing the class to check against would load what `zoo list` must not load; a name is all the host needs here.
    def check(item: Any) -> Any:
        if isinstance(item, type) or not isinstance(getattr(item, "name", None), str):
            raise TypeError(f"{kind}s, each with a name")
        return item

    return check


def _lacking(answer: object, protocol: type) -> str:
    members = sorted(getattr(protocol, "__protocol_attrs__", ()) or vars(protocol))
    return listing([member for member in members if not member.startswith("_") and not hasattr(answer, member)])


def _unique(hook: str, what: str, named: Iterable[tuple[str, str]]) -> None:
    owners: dict[str, str] = {}
    for plugin, name in named:
        if name in owners:
            raise PluginError(
                f"the {what} {name!r} is there twice in {hook}: from plugin {owners[name]!r} and from plugin "
                f"{plugin!r}.",
                "Rename one, or uninstall one of the plugins.",
            )
        owners[name] = plugin
