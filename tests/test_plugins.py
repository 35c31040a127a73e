from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pluggy
import pytest

from coreai_zoo import contracts, hookimpl, hookspecs
from coreai_zoo.backends import builtin
from coreai_zoo.bounds import GENERAL, Measured, MeasuredBounds
from coreai_zoo.build.code import code_digest
from coreai_zoo.catalogue import find_backend, find_contract, find_recipe
from coreai_zoo.errors import BadInput, EnvironmentLacks, PluginError
from coreai_zoo.gate import ReferenceModel
from coreai_zoo.overlay import LayerRewrite, Overlay, Prefix, TokenizerClass, WeightMap
from coreai_zoo.plugins import HOOKS, LISTS, Plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import HeadQuantization, QuantizationSpec, Recipe
from coreai_zoo.signature import KVCache, StateSpec

MakePlugin = Callable[..., types.ModuleType]

RAISED = r" It is raised at .*\.py:\d+, `.*`\. Without the plugin: `zoo --without unlucky`\."
"""What stands behind what a plugin did wrong."""

CONTRACT = contracts.STATIC_S1
(FUNCTION,) = CONTRACT.functions(KVCache(1, 1, 1), (), 8, 64).values()


class ToyOverlay:
    """An overlay that is nothing but its shape."""

    def __init__(self, name: str = "toy", refines: object = None) -> None:
        self.name = name
        if refines is not None:
            self.refines = refines

    def read_config(self, hf_config: Mapping[str, Any]) -> Any:
        return dict(hf_config)

    def facts(self, config: Any) -> Mapping[str, Any]:
        return dict(config)

    def kv_cache(self, config: Any) -> KVCache:
        return KVCache(1, 1, 1)

    def decoder(self, config: Any, contract: contracts.Contract) -> Any:
        raise NotImplementedError

    def config_of_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        return dict(facts)

    def with_layers(self, hf_config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        return {**hf_config, "layers": layers}


class Thing:
    """A backend or gate, as far as plugins go: something with a name."""

    def __init__(self, name: str) -> None:
        self.name = name


TOY: Overlay = ToyOverlay()


def host(*, tolerant: bool = False, **plugins: object) -> Plugins:
    registered = Plugins(tolerant=tolerant)
    for name, plugin in plugins.items():
        registered.register(plugin, name)
    return registered


def head(reason: str) -> HeadQuantization:
    return HeadQuantization(QuantizationSpec("int8", "symmetric"), reason)


def rewrite(name: str) -> LayerRewrite:
    return LayerRewrite(name, "model.layers.*", "The contract needs it.", lambda module: module)


# ---------------------------------------------------------------------------------------------------------------------
# Hook specifications
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_since_when_it_is_there_and_what_it_takes(hook: str) -> None:
    specification = getattr(hookspecs, hook)
    documentation = inspect.getdoc(specification) or ""

    assert re.search(r"^\.\. versionadded:: \d+\.\d+$", documentation, re.MULTILINE)
    assert "Called" in documentation
    for argument in inspect.signature(specification).parameters:
        assert re.search(rf"^    {argument}: ", documentation, re.MULTILINE), f"{argument} is not described"


def test_every_hook_is_called_through_a_method_of_its_name() -> None:
    methods = {name for name, _method in inspect.getmembers(Plugins, inspect.isfunction)}

    assert {hook.removeprefix("zoo_") for hook in HOOKS} <= methods


# ---------------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_hook_names_the_plugin_and_the_nearest_hook(make_plugin: MakePlugin) -> None:
    plugins = Plugins()

    with pytest.raises(PluginError, match=r"'typo'.*zoo_layer_rewrite, .*Did you mean zoo_layer_rewrites\?"):
        plugins.register(make_plugin(zoo_layer_rewrite=lambda overlay: []), "typo")
    assert plugins.names() == []


def test_a_hook_of_a_newer_host_may_be_marked_optional() -> None:
    module = types.ModuleType("newer")
    module.zoo_of_the_future = hookimpl(lambda: None, optionalhook=True)  # type: ignore[attr-defined]

    assert host(newer=module).names() == ["newer"]


def test_an_unknown_argument_names_the_plugin_and_the_hook(make_plugin: MakePlugin) -> None:
    with pytest.raises(
        PluginError, match=r"'odd': zoo_weight_map takes colour, which .*given overlay, entry, config\."
    ):
        host(odd=make_plugin(zoo_weight_map=lambda colour, config: None))


def test_a_hook_may_take_whatever_it_is_given(make_plugin: MakePlugin) -> None:
    def zoo_entries(*_arguments: object, **_named: object) -> list[Path]:
        return []

    assert host(wide=make_plugin(zoo_entries=zoo_entries)).entries() == []


def test_a_hook_that_lacks_its_decorator_is_an_error_instead_of_never_called() -> None:
    module = types.ModuleType("plain")
    module.zoo_entries = list  # type: ignore[attr-defined]

    with pytest.raises(PluginError, match=r"'plain' has a function zoo_entries that is not decorated.*hookimpl"):
        host(plain=module)


@pytest.mark.parametrize("mark", ["tryfirst", "trylast"])
def test_a_mark_of_order_that_the_host_would_not_heed_is_refused(mark: str) -> None:
    def zoo_entries() -> list[Path]:
        return []

    module = types.ModuleType("pushy")
    module.zoo_entries = hookimpl(zoo_entries, **{mark: True})  # type: ignore[attr-defined,call-overload]

    with pytest.raises(PluginError, match=r"'pushy' marks zoo_entries as tryfirst or trylast"):
        host(pushy=module)


def test_a_wrapper_is_refused() -> None:
    def zoo_entries() -> Iterator[None]:
        return (yield)

    module = types.ModuleType("wrapping")
    module.zoo_entries = hookimpl(zoo_entries, wrapper=True)  # type: ignore[attr-defined]

    with pytest.raises(PluginError, match="'wrapping' wraps zoo_entries"):
        host(wrapping=module)


def test_a_name_is_taken_once(make_plugin: MakePlugin) -> None:
    plugins = host(one=make_plugin())

    with pytest.raises(PluginError, match="'one' is registered already"):
        plugins.register(make_plugin(), "one")
    assert plugins.names() == ["one"]


def test_a_plugin_may_be_an_object() -> None:
    class Plugin:
        @hookimpl
        def zoo_entries(self) -> list[Path]:
            return [Path("a.toml")]

    assert host(thing=Plugin()).entries() == [("thing", Path("a.toml"))]


def test_info_tells_which_hooks_a_plugin_implements(make_plugin: MakePlugin) -> None:
    (info,) = host(two=make_plugin(zoo_gates=lambda: (), zoo_entries=lambda: ())).info()

    assert (info.name, info.hooks, info.distribution) == ("two", ("zoo_entries", "zoo_gates"), None)


# ---------------------------------------------------------------------------------------------------------------------
# Discovery: real distributions on sys.path
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a distribution with one plugin where importlib.metadata and import find it, and hide the real ones."""
    here = [str(tmp_path), *(path for path in sys.path if "lib/python" in path and "site-packages" not in path)]
    monkeypatch.setattr(sys, "path", here)

    def put(name: str, source: str, plugin: str | None = None) -> None:
        module = f"zoo_test_{name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        information = tmp_path / f"{name}-1.5.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n", encoding="utf-8")
        entry_points = f"[coreai_zoo]\n{plugin or name} = {module}\n"
        (information / "entry_points.txt").write_text(entry_points, encoding="utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return put


GOOD = "from coreai_zoo import hookimpl\n@hookimpl\ndef zoo_entries():\n    return []\n"


def test_plugins_are_discovered_with_their_versions_in_an_order_that_pip_does_not_decide(
    install: Callable[..., None],
) -> None:
    for name in ("walnut", "almond", "cashew"):
        install(name, GOOD)

    found = [(info.name, info.distribution, info.version) for info in Plugins.discover().info()]

    assert found == [(name, name, "1.5") for name in ("almond", "cashew", "walnut")]


def test_plugins_of_the_zoo_come_first_so_that_any_other_may_answer_in_their_place(
    install: Callable[..., None],
) -> None:
    for name in ("walnut", "coreai-zoo", "almond"):
        install(name, GOOD, plugin=f"of-{name}")

    assert [info.distribution for info in Plugins.discover().info()] == ["coreai-zoo", "almond", "walnut"]


def test_a_plugin_that_cannot_be_imported_is_named_with_the_others_and_left_out(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install("good", GOOD)
    install("broken", "import a_module_that_is_not_there\n")

    plugins = Plugins.discover()

    (message,) = map(str, plugins.problems)
    assert "plugin 'broken' (zoo_test_broken of broken 1.5) cannot be imported: ModuleNotFoundError" in message
    assert "Other plugins: good." in message
    assert "zoo --without broken" in message
    assert capsys.readouterr().err == f"warning: {message}\n"
    assert plugins.names() == ["good"]


@pytest.mark.parametrize("last_words", ["raise ValueError('two\\nlines')", "raise SystemExit('two\\nlines')"])
def test_a_plugin_that_raises_anything_on_import_is_named(install: Callable[..., None], last_words: str) -> None:
    install("broken", f"{last_words}\n")

    (problem,) = Plugins.discover().problems

    assert isinstance(problem, PluginError)
    assert re.search(r"'broken'.*(ValueError|SystemExit): two lines.*There is no other plugin", str(problem))


def test_a_plugin_that_is_not_valid_is_left_out_of_what_is_discovered(install: Callable[..., None]) -> None:
    install("good", GOOD)
    install("typo", GOOD.replace("zoo_entries", "zoo_entrys"))

    plugins = Plugins.discover()

    (problem,) = map(str, plugins.problems)
    assert problem == "plugin 'typo' implements zoo_entrys, which is no hook. Did you mean zoo_entries?"
    assert plugins.names() == ["good"]


def test_one_plugin_name_from_two_packages_names_both_and_the_first_is_there(install: Callable[..., None]) -> None:
    install("first", GOOD, plugin="same")
    install("second", GOOD, plugin="same")

    plugins = Plugins.discover()

    (problem,) = map(str, plugins.problems)
    assert re.search(r"zoo_test_second of second 1\.5.*zoo_test_first of first 1\.5", problem)
    assert [info.distribution for info in plugins.info()] == ["first"]


def test_a_broken_plugin_does_not_take_the_name_of_one_that_works(install: Callable[..., None]) -> None:
    install("first", "import a_module_that_is_not_there\n", plugin="same")
    install("second", GOOD, plugin="same")

    plugins = Plugins.discover()

    assert [info.distribution for info in plugins.info()] == ["second"]
    assert len(plugins.problems) == 1


def test_a_plugin_that_is_left_out_is_not_even_imported(install: Callable[..., None]) -> None:
    install("good", GOOD)
    install("broken", "raise RuntimeError\n")

    plugins = Plugins.discover(without=["broken"])

    assert (plugins.names(), plugins.problems) == (["good"], ())
    with pytest.raises(BadInput, match=r"no plugin 'brokn' to leave out\. Did you mean broken\?"):
        Plugins.discover(without=["brokn"])


# ---------------------------------------------------------------------------------------------------------------------
# Blame
# ---------------------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Plugins], object]] = {
    "zoo_entries": lambda plugins: plugins.entries(),
    "zoo_recipes": lambda plugins: plugins.recipes(),
    "zoo_contracts": lambda plugins: plugins.contracts(),
    "zoo_register_commands": lambda plugins: plugins.register_commands(click.Group()),
    "zoo_claim_overlay": lambda plugins: plugins.claim_overlay("toy", {}),
    "zoo_layer_rewrites": lambda plugins: plugins.layer_rewrites(TOY, None, None, CONTRACT, FUNCTION),
    "zoo_extra_states": lambda plugins: plugins.extra_states(TOY, None, None, CONTRACT),
    "zoo_weight_map": lambda plugins: plugins.weight_map(TOY, None, None),
    "zoo_head_quantization": lambda plugins: plugins.head_quantization(TOY, None, None),
    "zoo_tokenizer_classes": lambda plugins: plugins.tokenizer_classes(),
    "zoo_backends": lambda plugins: plugins.backends(),
    "zoo_oracle": lambda plugins: plugins.oracle(TOY, {}),
    "zoo_gate_bounds": lambda plugins: plugins.gate_bounds(TOY),
    "zoo_stress_samples": lambda plugins: plugins.stress_samples(TOY, None),
    "zoo_gates": lambda plugins: plugins.gates(TOY, None),
}


def test_every_hook_is_among_those_tested_for_blame() -> None:
    assert set(CALLS) == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_whatever_a_hook_raises_names_the_plugin_and_the_hook(make_plugin: MakePlugin, hook: str) -> None:
    def fail() -> None:
        raise RuntimeError("out of\nluck")

    with pytest.raises(
        PluginError, match=rf"^plugin 'unlucky' failed in {hook}: RuntimeError: out of luck\.{RAISED}$"
    ) as caught:
        CALLS[hook](host(unlucky=make_plugin(**{hook: fail})))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("hook", HOOKS)
def test_an_error_of_the_zoo_keeps_its_type_and_exit_code(make_plugin: MakePlugin, hook: str) -> None:
    def fail() -> None:
        raise EnvironmentLacks("no GPU.")

    with pytest.raises(EnvironmentLacks) as caught:
        CALLS[hook](host(poor=make_plugin(**{hook: fail})))
    assert str(caught.value) == f"no GPU. (From plugin 'poor', {hook}.)"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "zoo_register_commands"])
@pytest.mark.parametrize("answer", [3, "text", [3]], ids=repr)
def test_an_answer_of_the_wrong_type_names_the_plugin_and_the_hook(
    make_plugin: MakePlugin, hook: str, answer: object
) -> None:
    with pytest.raises(PluginError, match=rf"^plugin 'odd' answered with .* in {hook}; the host expects "):
        CALLS[hook](host(odd=make_plugin(**{hook: lambda: answer})))


@pytest.mark.parametrize("hook", HOOKS)
def test_what_only_adds_to_a_list_is_reported_once_and_left_out_and_the_rest_raises(
    make_plugin: MakePlugin, hook: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("out of\nluck")

    plugins = host(tolerant=True, unlucky=make_plugin(**{hook: fail}), fine=make_plugin(**{hook: lambda: None}))

    if hook not in LISTS:
        with pytest.raises(PluginError, match=f"'unlucky' failed in {hook}"):
            CALLS[hook](plugins)
        return
    CALLS[hook](plugins)
    CALLS[hook](plugins)

    told = capsys.readouterr().err
    assert re.fullmatch(rf"warning: plugin 'unlucky' failed in {hook}: RuntimeError: out of luck\.{RAISED}\n", told)
    (problem,) = plugins.problems
    assert isinstance(problem, PluginError)


@pytest.mark.parametrize(
    "answers",
    [lambda hf_config: hf_config["layers_of_mine"], lambda: 3, lambda: sys.exit(3)],
    ids=["raises", "3", "exits"],
)
def test_a_plugin_that_cannot_say_whether_it_claims_stands_in_nobodys_way(
    make_plugin: MakePlugin, answers: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    plugins = host(tolerant=True, toy=claiming(make_plugin, TOY), odd=make_plugin(zoo_claim_overlay=answers))
    for _ in range(2):
        assert plugins.claim_overlay("toy", {}, of_entry=True) == (TOY, "toy")
    with pytest.raises(PluginError, match="plugin 'odd' "):  # it may be the one that the checkpoint is for
        plugins.claim_overlay("toy", {})
    with pytest.raises(PluginError, match="plugin 'odd' "):  # and not that nobody claims it
        host(tolerant=True, odd=make_plugin(zoo_claim_overlay=answers)).claim_overlay("toy", {}, of_entry=True)
    assert capsys.readouterr().err.count("warning: plugin 'odd' ") == len(plugins.problems) == 1


@pytest.mark.parametrize("hook", sorted(LISTS - {"zoo_register_commands"}))
@pytest.mark.parametrize("answer", [3, "text", [3]], ids=repr)
def test_an_answer_of_the_wrong_type_leaves_out_that_plugin_only(
    make_plugin: MakePlugin, hook: str, answer: object
) -> None:
    plugins = host(odd=make_plugin(**{hook: lambda: answer}), tolerant=True)
    plugins.register(builtin, "coreai")

    assert CALLS[hook](plugins) == CALLS[hook](host(coreai=builtin))
    assert str(plugins.problems[0]).startswith("plugin 'odd' answered with ")


def test_a_generator_that_fails_half_way_is_blamed_too(make_plugin: MakePlugin) -> None:
    def zoo_entries() -> Iterator[Path]:
        yield Path("a.toml")
        raise OSError("disk on fire")

    with pytest.raises(PluginError, match="'lazy' failed in zoo_entries: OSError: disk on fire"):
        host(lazy=make_plugin(zoo_entries=zoo_entries)).entries()


def test_blame_covers_what_a_plugin_does_outside_of_its_hooks() -> None:
    with (
        pytest.raises(PluginError, match=r"'toy' failed in Overlay\.decoder: KeyError"),
        Plugins().attribute_errors("toy", "Overlay.decoder"),
    ):
        raise KeyError("layers")


def test_an_interruption_is_nobodys_fault(make_plugin: MakePlugin) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host(slow=make_plugin(zoo_entries=interrupted)).entries()


# ---------------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------------


def claiming(make_plugin: MakePlugin, overlay: object, model_type: str = "toy") -> types.ModuleType:
    def zoo_claim_overlay(model_type: str) -> object:
        return overlay if model_type == wanted else None

    wanted = model_type
    return make_plugin(zoo_claim_overlay=zoo_claim_overlay)


def test_the_one_claim_is_taken_and_its_plugin_told(make_plugin: MakePlugin) -> None:
    plugins = host(toy=claiming(make_plugin, TOY), other=claiming(make_plugin, ToyOverlay("other"), "other"))

    assert plugins.claim_overlay("toy", {}) == (TOY, "toy")


def test_an_architecture_that_nobody_claims_says_who_was_asked_and_which_hook_to_write(make_plugin: MakePlugin) -> None:
    plugins = host(one=claiming(make_plugin, TOY), two=claiming(make_plugin, TOY), silent=make_plugin())

    with pytest.raises(BadInput, match=r"'mamba' is claimed by no plugin\. Asked: one, two\..*zoo_claim_overlay"):
        plugins.claim_overlay("mamba", {})


def test_an_architecture_that_nobody_claims_says_which_plugins_were_left_out(install: Callable[..., None]) -> None:
    install("broken", "import a_module_that_is_not_there\n")

    with pytest.raises(BadInput, match=r"'mamba' is claimed by no plugin\..*Left out: plugin 'broken' .*cannot be imp"):
        Plugins.discover().claim_overlay("mamba", {})


def test_two_claims_name_both_plugins(make_plugin: MakePlugin) -> None:
    plugins = host(one=claiming(make_plugin, TOY), two=claiming(make_plugin, ToyOverlay("twin")))

    with pytest.raises(PluginError, match=r"'toy'.*plugin 'one' \(overlay 'toy'\) and plugin 'two' \(overlay 'twin'\)"):
        plugins.claim_overlay("toy", {})


@pytest.mark.parametrize("order", [["base", "variant"], ["variant", "base"]])
def test_an_overlay_that_refines_another_claimant_wins_over_it(make_plugin: MakePlugin, order: list[str]) -> None:
    overlays = {"base": ToyOverlay("base"), "variant": ToyOverlay("variant", refines="base")}
    plugins = host(**{name: claiming(make_plugin, overlays[name]) for name in order})

    assert plugins.claim_overlay("toy", {}) == (overlays["variant"], "variant")


def test_a_chain_of_refinements_works(make_plugin: MakePlugin) -> None:
    last = ToyOverlay("third", refines="second")
    plugins = host(
        c=claiming(make_plugin, last),
        a=claiming(make_plugin, ToyOverlay("first")),
        b=claiming(make_plugin, ToyOverlay("second", refines="first")),
    )

    assert plugins.claim_overlay("toy", {}) == (last, "c")


def test_two_refinements_of_one_overlay_are_equal_claims(make_plugin: MakePlugin) -> None:
    plugins = host(
        base=claiming(make_plugin, TOY),
        one=claiming(make_plugin, ToyOverlay("left", refines="toy")),
        two=claiming(make_plugin, ToyOverlay("right", refines="toy")),
    )

    with pytest.raises(PluginError, match=r"by plugin 'one' \(overlay 'left'\) and plugin 'two' \(overlay 'right'\)\."):
        plugins.claim_overlay("toy", {})


def test_overlays_of_one_name_are_equal_claims_whoever_refines_them(make_plugin: MakePlugin) -> None:
    plugins = host(
        one=claiming(make_plugin, TOY),
        two=claiming(make_plugin, ToyOverlay("toy")),
        variant=claiming(make_plugin, ToyOverlay("variant", refines="toy")),
    )

    with pytest.raises(PluginError, match=r"by plugin 'one' \(overlay 'toy'\) and plugin 'two' \(overlay 'toy'\)\."):
        plugins.claim_overlay("toy", {})


def test_a_refinement_of_an_overlay_that_nobody_claims_says_so(make_plugin: MakePlugin) -> None:
    plugins = host(variant=claiming(make_plugin, ToyOverlay("variant", refines="toy")), other=make_plugin())

    with pytest.raises(
        PluginError, match=r"'variant' claims .*'toy' .*refines the overlay 'toy', but no plugin claims it with that\."
    ):
        plugins.claim_overlay("toy", {})


def test_overlays_that_refine_each_other_name_both(make_plugin: MakePlugin) -> None:
    plugins = host(
        one=claiming(make_plugin, ToyOverlay("left", refines="right")),
        two=claiming(make_plugin, ToyOverlay("right", refines="left")),
    )

    with pytest.raises(PluginError, match=r"'left'.* and plugin 'two' \(overlay 'right'\), which refine each other\."):
        plugins.claim_overlay("toy", {})


def test_what_an_overlay_refines_is_a_name(make_plugin: MakePlugin) -> None:
    with pytest.raises(PluginError, match=r"'odd' gave the overlay 'variant' `refines` 3 in zoo_claim_overlay; .*name"):
        host(odd=claiming(make_plugin, ToyOverlay("variant", refines=3))).claim_overlay("toy", {})


def test_an_overlay_that_lacks_a_method_is_told_which(make_plugin: MakePlugin) -> None:
    class Half:
        name = "half"

        def read_config(self, hf_config: object) -> None: ...

    with pytest.raises(PluginError, match=r"it lacks config_of_facts, decoder, facts, kv_cache, with_layers\."):
        host(half=claiming(make_plugin, Half())).claim_overlay("toy", {})


# ---------------------------------------------------------------------------------------------------------------------
# The other hooks
# ---------------------------------------------------------------------------------------------------------------------


def test_a_plugin_takes_only_the_arguments_that_it_needs(make_plugin: MakePlugin) -> None:
    def zoo_layer_rewrites(config: Any) -> list[LayerRewrite]:
        return [rewrite(config)]

    plugins = host(few=make_plugin(zoo_layer_rewrites=zoo_layer_rewrites))

    ((_plugin, found),) = plugins.layer_rewrites(TOY, None, "step", CONTRACT, FUNCTION)
    assert found.name == "step"


def test_rewrites_come_with_their_plugins(make_plugin: MakePlugin) -> None:
    plugins = host(
        one=make_plugin(zoo_layer_rewrites=lambda: [rewrite("a"), rewrite("b")]),
        none=make_plugin(zoo_layer_rewrites=lambda: None),
        two=make_plugin(zoo_layer_rewrites=lambda: (rewrite("c"),)),
    )

    found = [(plugin, item.name) for plugin, item in plugins.layer_rewrites(TOY, None, None, CONTRACT, FUNCTION)]
    assert found == [("one", "a"), ("one", "b"), ("two", "c")]


def states(*names: str) -> Callable[[], list[StateSpec]]:
    return lambda: [StateSpec(name=name, shape=(1, 2)) for name in names]


def test_states_keep_the_order_of_registration(make_plugin: MakePlugin) -> None:
    plugins = host(
        zebra=make_plugin(zoo_extra_states=states("convState", "recState")),
        ant=make_plugin(zoo_extra_states=states("ringState")),
    )

    names = [state.name for state in plugins.extra_states(TOY, None, None, CONTRACT)]
    assert names == ["convState", "recState", "ringState"]


def test_one_state_from_two_plugins_names_both(make_plugin: MakePlugin) -> None:
    plugins = host(
        one=make_plugin(zoo_extra_states=states("convState")), two=make_plugin(zoo_extra_states=states("convState"))
    )

    with pytest.raises(PluginError, match=r"'convState' is there twice in zoo_extra_states: .*'one'.*'two'"):
        plugins.extra_states(TOY, None, None, CONTRACT)


def test_the_last_registered_weight_map_wins(make_plugin: MakePlugin) -> None:
    ours, theirs = WeightMap(()), WeightMap((), prefixes=(Prefix("a", "b"),))
    plugins = host(
        ours=make_plugin(zoo_weight_map=lambda: ours),
        theirs=make_plugin(zoo_weight_map=lambda: theirs),
        silent=make_plugin(zoo_weight_map=lambda: None),
    )

    assert plugins.weight_map(TOY, None, None)[1] is theirs


def test_no_weight_map_names_the_overlay_and_the_hook(make_plugin: MakePlugin) -> None:
    plugins = host(silent=make_plugin(zoo_weight_map=lambda: None))

    with pytest.raises(PluginError, match=r"overlay 'toy'\. Asked: silent\..*zoo_weight_map"):
        plugins.weight_map(TOY, None, None)


def test_the_last_registered_head_policy_wins_and_none_is_an_answer(make_plugin: MakePlugin) -> None:
    ours, theirs = head("ours"), head("theirs")

    assert Plugins().head_quantization(TOY, None, None) is None
    plugins = host(
        ours=make_plugin(zoo_head_quantization=lambda: ours), theirs=make_plugin(zoo_head_quantization=lambda: theirs)
    )
    assert plugins.head_quantization(TOY, None, None) is theirs


def test_backends_are_known_by_name(make_plugin: MakePlugin) -> None:
    one: Any = Thing("coreai")
    two: Any = Thing("coreml")
    plugins = host(a=make_plugin(zoo_backends=lambda: [one]), b=make_plugin(zoo_backends=lambda: [two]))

    assert plugins.backends() == {"coreai": one, "coreml": two}


@pytest.mark.parametrize("hook", ["zoo_backends", "zoo_gates"])
def test_one_name_from_two_plugins_names_both(make_plugin: MakePlugin, hook: str) -> None:
    plugins = host(
        a=make_plugin(**{hook: lambda: [Thing("same")]}),
        b=make_plugin(**{hook: lambda: [Thing("same")]}),
    )

    with pytest.raises(PluginError, match=f"'same' is there twice in {hook}: from plugin 'a' and from plugin 'b'"):
        CALLS[hook](plugins)


def recipe(name: str) -> Recipe:
    return Recipe.by_role(name, "A recipe.", RECIPES["fp16"].specs)


def contract(name: str) -> contracts.Contract:
    return contracts.Contract(name, "A contract.", 1, ())


LISTED: dict[str, Callable[[str], Any]] = {"zoo_recipes": recipe, "zoo_contracts": contract, "zoo_backends": Thing}
FIND: dict[str, Callable[[str, Plugins], Any]] = {
    "zoo_recipes": find_recipe,
    "zoo_contracts": find_contract,
    "zoo_backends": find_backend,
}


@pytest.mark.parametrize("hook", LISTED)
def test_what_a_plugin_lists_is_found_by_name_beside_the_hosts_own(make_plugin: MakePlugin, hook: str) -> None:
    theirs, kind = LISTED[hook]("acme-one"), hook.removeprefix("zoo_").removesuffix("s")
    plugins = host(coreai=builtin, acme=make_plugin(**{hook: lambda: [theirs]}))

    assert FIND[hook]("acme-one", plugins) is theirs
    with pytest.raises(BadInput, match=rf"no {kind} 'acme-on'\. Did you mean acme-one\?$"):
        FIND[hook]("acme-on", plugins)
    with pytest.raises(BadInput, match=rf"no {kind} 'zzzzzzzz'\. There are .*, acme-one\.$"):
        FIND[hook]("zzzzzzzz", plugins)
    with pytest.raises(BadInput, match=r"There are none\.$"):
        FIND[hook]("acme-one", Plugins())


@pytest.mark.parametrize("hook", LISTED)
def test_a_name_that_two_plugins_bring_is_listed_once_and_refused_where_it_is_asked_for(
    make_plugin: MakePlugin, hook: str
) -> None:
    first, second, other = (LISTED[hook](name) for name in ("same", "same", "other"))
    hooks = {"a": [first], "b": [second, other]}
    plugins = host(tolerant=True, **{name: make_plugin(**{hook: lambda n=name: hooks[n]}) for name in hooks})

    for _ in range(2):
        with pytest.raises(PluginError, match=f"'same' is there twice in {hook}: from plugin 'a' and from plugin 'b'"):
            FIND[hook]("same", plugins)
    assert FIND[hook]("other", plugins) is other
    assert len(plugins.problems) == 1


@pytest.mark.parametrize("hook", LISTED)
def test_the_error_for_a_name_that_is_not_there_tells_what_was_left_out(make_plugin: MakePlugin, hook: str) -> None:
    def fail() -> None:
        raise RuntimeError("out of luck")

    plugins = host(coreai=builtin, unlucky=make_plugin(**{hook: fail}), tolerant=True)

    with pytest.raises(
        BadInput, match=rf"Left out: plugin 'unlucky' failed in {hook}: RuntimeError: out of luck\.{RAISED}$"
    ):
        FIND[hook]("acme-one", plugins)


def test_the_hosts_own_plugin_brings_the_built_in_recipes_and_contracts() -> None:
    plugins = host(coreai=builtin)

    assert plugins.recipes() == RECIPES
    assert plugins.contracts() == contracts.CONTRACTS


def classes(*answers: TokenizerClass) -> Callable[[], list[TokenizerClass]]:
    return lambda: list(answers)


def test_classes_of_tokenizers_are_collected_with_the_class_that_engines_know(make_plugin: MakePlugin) -> None:
    plugins = host(
        early=make_plugin(zoo_tokenizer_classes=classes(TokenizerClass("AcmeTokenizer", "PreTrainedTokenizer"))),
        coreai=builtin,
        again=make_plugin(
            zoo_tokenizer_classes=classes(TokenizerClass("AcmeTokenizer", "PreTrainedTokenizer"), TokenizerClass("Own"))
        ),
    )

    found = plugins.tokenizer_classes()

    assert (found["AcmeTokenizer"], found["Own"], found["Qwen2Tokenizer"]) == (
        "PreTrainedTokenizer",
        "Own",
        "Qwen2Tokenizer",
    )
    assert "Qwen3_5Tokenizer" not in found, "that is the business of the plugin that brings the family"


@pytest.mark.parametrize("other", [TokenizerClass("AcmeTokenizer"), TokenizerClass("AcmeTokenizer", "Qwen2Tokenizer")])
def test_two_plugins_that_disagree_on_a_class_of_tokenizers_are_named(
    make_plugin: MakePlugin, other: TokenizerClass
) -> None:
    plugins = host(
        coreai=builtin,
        one=make_plugin(zoo_tokenizer_classes=classes(TokenizerClass("AcmeTokenizer", "PreTrainedTokenizer"))),
        two=make_plugin(zoo_tokenizer_classes=classes(other)),
    )

    with pytest.raises(PluginError, match=r"AcmeTokenizer as ") as caught:
        plugins.tokenizer_classes()
    for part in ("plugin 'one'", "plugin 'two'", "zoo_tokenizer_classes", "PreTrainedTokenizer"):
        assert part in str(caught.value)


def test_a_class_of_tokenizers_cannot_be_known_as_one_that_engines_do_not_know(make_plugin: MakePlugin) -> None:
    plugins = host(
        coreai=builtin,
        one=make_plugin(zoo_tokenizer_classes=classes(TokenizerClass("AcmeTokenizer", "NobodysTokenizer"))),
    )

    with pytest.raises(
        PluginError, match=r"'one' says in zoo_tokenizer_classes .* as NobodysTokenizer, which no plugin"
    ):
        plugins.tokenizer_classes()


def test_the_last_registered_bounds_win_and_the_general_ones_are_the_last(make_plugin: MakePlugin) -> None:
    row = Measured(0.001, 0.002, 0, 1e-5, 1e-6, 1e-5, 0.001, 1.0)
    ours, theirs = (MeasuredBounds(who, 4, {("fp16", "torch", "dense"): row}, {}) for who in ("ours", "theirs"))

    assert Plugins().gate_bounds(TOY) is GENERAL
    plugins = host(
        ours=make_plugin(zoo_gate_bounds=lambda: ours),
        theirs=make_plugin(zoo_gate_bounds=lambda: theirs),
        silent=make_plugin(zoo_gate_bounds=lambda: None),
    )
    assert plugins.gate_bounds(TOY) is theirs


def make_reference(hf_config: Mapping[str, Any], dtype: Any) -> Any:
    raise LookupError(f"no {hf_config['model_type']} in {dtype}")


def test_the_last_registered_reference_wins_and_its_failures_name_the_plugin(make_plugin: MakePlugin) -> None:
    ours, theirs = (ReferenceModel(name, make_reference) for name in ("ours", "theirs"))

    assert Plugins().oracle(TOY, {}) is None
    plugins = host(
        ours=make_plugin(zoo_oracle=lambda: ours),
        theirs=make_plugin(zoo_oracle=lambda hf_config: theirs if hf_config["model_type"] == "toy" else None),
    )
    other, found = plugins.oracle(TOY, {"model_type": "other"}), plugins.oracle(TOY, {"model_type": "toy"})
    assert other is not None and found is not None
    assert (other.name, found.name) == ("ours", "theirs")
    with pytest.raises(PluginError, match="'theirs' failed in zoo_oracle: LookupError: no toy in float32"):
        found.make({"model_type": "toy"}, "float32")  # type: ignore[arg-type]
    assert code_digest(found.make) == code_digest(make_reference) != code_digest(Plugins)


def test_gates_come_with_their_plugins(make_plugin: MakePlugin) -> None:
    gate: Any = Thing("long_context")

    assert host(a=make_plugin(zoo_gates=lambda: [gate])).gates(TOY, None) == [("a", gate)]


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def adding(name: str) -> Callable[[click.Group], None]:
    def zoo_register_commands(cli: click.Group) -> None:
        cli.add_command(click.Command(name))

    return zoo_register_commands


def test_plugins_add_commands(make_plugin: MakePlugin) -> None:
    group = click.Group(commands=[click.Command("list")])

    host(a=make_plugin(zoo_register_commands=adding("bench"))).register_commands(group)

    assert sorted(group.commands) == ["bench", "list"]


def test_replacing_a_command_names_the_plugin_and_changes_nothing(make_plugin: MakePlugin) -> None:
    listing = click.Command("list")
    group = click.Group(commands=[listing])

    with pytest.raises(PluginError, match="'rude' replaces the command list in zoo_register_commands"):
        host(rude=make_plugin(zoo_register_commands=adding("list"))).register_commands(group)
    assert group.commands == {"list": listing}


def test_two_plugins_cannot_add_one_command(make_plugin: MakePlugin) -> None:
    plugins = host(
        first=make_plugin(zoo_register_commands=adding("bench")),
        second=make_plugin(zoo_register_commands=adding("bench")),
    )

    with pytest.raises(PluginError, match="'second' replaces the command bench"):
        plugins.register_commands(click.Group())


def test_a_plugin_that_breaks_commands_leaves_those_of_the_others(
    make_plugin: MakePlugin, capsys: pytest.CaptureFixture[str]
) -> None:
    def half_way(cli: click.Group) -> None:
        cli.add_command(click.Command("half"))
        raise RuntimeError("broken")

    group = click.Group(commands=[click.Command("list")])
    plugins = host(
        tolerant=True,
        rude=make_plugin(zoo_register_commands=adding("list")),
        broken=make_plugin(zoo_register_commands=half_way),
        good=make_plugin(zoo_register_commands=adding("bench")),
    )

    plugins.register_commands(group)

    assert sorted(group.commands) == ["bench", "list"]
    assert [line.partition(" in zoo_")[0] for line in capsys.readouterr().err.splitlines()] == [
        "warning: plugin 'rude' replaces the command list",
        "warning: plugin 'broken' failed",
    ]


def test_removing_a_command_is_replacing_it(make_plugin: MakePlugin) -> None:
    group = click.Group(commands=[click.Command("list")])

    def zoo_register_commands(cli: click.Group) -> None:
        cli.commands.pop("list")

    with pytest.raises(PluginError, match="'rude' replaces the command list"):
        host(rude=make_plugin(zoo_register_commands=zoo_register_commands)).register_commands(group)
    assert list(group.commands) == ["list"]


def test_the_marker_is_plugged_into_the_hosts_project() -> None:
    assert isinstance(hookimpl, pluggy.HookimplMarker)
    assert hookimpl.project_name == hookspecs.hookspec.project_name == "coreai_zoo"
