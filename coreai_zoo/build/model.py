"""Models: a `config.json` as the overlay that claims it reads it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from attrs import frozen

from coreai_zoo.checkpoint.folder import read_config
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, PluginError, ZooError, listing, near_names
from coreai_zoo.overlay import Overlay
from coreai_zoo.plugins import Plugins
from coreai_zoo.signature import KVCache


class TooLittleStated(BadInput):
    """An entry does not state a fact that its overlay needs to make a config without a checkpoint."""


def config_of_entry(entry: Entry, plugins: Plugins, hint: str = "") -> Mapping[str, Any]:
    """The `config.json` of the model whose facts an entry states.

    Args:
        entry: the entry.
        plugins: the plugins, one of which brings its overlay.
        hint: what to do when it states too little, for the error.

    Raises:
        TooLittleStated: naming what it does not state.
        BadInput: when no overlay claims it, or its overlay cannot use a fact that it states, naming it.
        PluginError: when the overlay fails for no fact's fault, or makes a config that another one claims.
    """
    shown = _shown(entry)
    overlay, plugin = plugins.claim_overlay(shown["model_type"], shown, of_entry=True)
    facts = entry.facts.stated
    with plugins.attribute_errors(plugin, f"overlay {overlay.name!r}", except_input=True):
        try:
            hf_config = overlay.config_of_facts(facts)
        except BadInput as error:
            message = f"Entry {entry.name} states too little to plan from. {error.message}"
            raise TooLittleStated(message, hint) from error
        except Exception as error:
            raise _blamed_on_a_fact(entry, error) from error
        try:
            overlay.facts(overlay.read_config(hf_config))
        except BadInput as error:
            message = f"Entry {entry.name} states facts that no model has. {error.message}"
            raise BadInput(message, "Correct them in its file.") from error
        except Exception as error:
            raise _blamed_on_a_fact(entry, error) from error
    claimed, _ = plugins.claim_overlay(str(hf_config.get("model_type")), hf_config, of_entry=True)
    if claimed.name != overlay.name:
        raise PluginError(
            f"Entry {entry.name} is one of overlay {overlay.name!r} of plugin {plugin} by its sample, and the config "
            f"that this makes of the entry's facts is one of {claimed.name!r}.",
            f"Have `config_of_facts` of {overlay.name!r} give what its plugin claims a config by.",
        )
    return hf_config


def _shown(entry: Entry) -> Mapping[str, Any]:
    """What is known of a model's config before an overlay makes one: that of its sample, or its architecture alone.

    Overlays of one architecture may tell theirs by more than its name.
    """
    if entry.sample is not None:
        with suppress(ZooError):  # not installed: whoever needs it says so
            config = read_config(entry.sample_directory())
            if config.get("model_type") in entry.model_type:
                return config
    return {"model_type": entry.model_type[0]}


def _blamed_on_a_fact(entry: Entry, error: Exception) -> Exception:
    """The error to raise for one of an overlay on an entry's facts: the overlay's own, or one about the entry.

    A ValueError says what is wrong with a fact, and so does arithmetic with it. Another error may be the fault of a
    fact that is no whole number, where there is one.
    """
    odd = [f"facts.{name} is {value!r}" for name, value in entry.facts.more.items() if isinstance(value, str | float)]
    said = str(error) or type(error).__name__
    if not odd and not isinstance(error, ValueError | ArithmeticError):
        return error
    which = f"; {listing(odd)}" if odd else ""
    return BadInput(f"Entry {entry.name} has a bad fact: {said}{which}.", "Correct it in its file.")


@frozen
class Model:
    """A `config.json` with the overlay that claims it, and what that reads in it.

    Attributes:
        plugin: name of the plugin that brought the overlay.
        facts: the facts of the layers that were asked for.
        whole_facts: the facts of all layers.
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


def read_model(
    hf_config: Mapping[str, Any], plugins: Plugins, layers: int | None = None, *, of_entry: bool = False
) -> Model:
    """The model that a config describes, cut to its first `layers` layers where a number is given.

    For `of_entry` see `Plugins.claim_overlay`.

    Raises:
        BadInput: when no plugin claims the architecture, the overlay cannot use the config, or a slice is not a model.
        PluginError: when several claim it.
    """
    overlay, plugin = plugins.claim_overlay(str(hf_config.get("model_type")), hf_config, of_entry=of_entry)
    with plugins.attribute_errors(plugin, f"overlay {overlay.name!r}", except_input=True):
        whole_facts = overlay.facts(overlay.read_config(hf_config))
        if layers is not None:
            hf_config = overlay.with_layers(hf_config, layers)
        config = overlay.read_config(hf_config)
        facts, kv_cache = overlay.facts(config), overlay.kv_cache(config)
        if not isinstance(facts, Mapping):
            raise TypeError(f"`facts` gives {type(facts).__name__}, not a mapping")
        if not isinstance(kv_cache, KVCache):
            raise TypeError(f"`kv_cache` gives {type(kv_cache).__name__}, not a KVCache")
    return Model(hf_config, overlay, plugin, config, facts, whole_facts, kv_cache)


def require_known_facts(entry: Entry, model: Model) -> None:
    """Refuse an entry with a fact that its overlay does not know, which nothing would be compared with.

    Raises:
        BadInput: naming it.
    """
    known = model.whole_facts
    for name in entry.facts.more:
        if name not in known:
            raise BadInput(
                f"Entry {entry.name} states the fact {name}, which the overlay {model.overlay.name} does not know.",
                near_names(name, known) or f"It knows {listing(sorted(known), 40)}.",
            )


def contradictions(entry: Entry, facts: Mapping[str, Any]) -> list[str]:
    """The contradictions between an entry's facts, one phrase each.

    Args:
        entry: the entry.
        facts: what the overlay makes of the config that the entry describes, see `config_of_entry`.
    """
    return [
        f"{entry.name}: {name} is {stated}, and the other facts make it {facts[name]}"
        for name, stated in _contradicted(entry, facts)
    ]


def compare_facts(entry: Entry, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The differences between a checkpoint and what an entry states, one phrase each."""
    return tuple(f"{name} is {facts[name]}, the entry says {stated}" for name, stated in _contradicted(entry, facts))


def _contradicted(entry: Entry, facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The facts that an entry states otherwise, as it states them."""
    stated = entry.facts.stated
    return [(name, stated[name]) for name in stated if name in facts and not _same(facts[name], stated[name])]


def _same(one: object, other: object) -> bool:
    """Whether two facts are the same; to Python 1, 1.0 and true are."""
    return one == other and all(isinstance(one, kind) == isinstance(other, kind) for kind in (bool, float))
