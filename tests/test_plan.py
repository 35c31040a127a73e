"""`zoo plan`: what is added up from a config is what a build makes, and it is added up in a moment."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import nn

import toy_plugin
from checkpoints import text_config, tiny_checkpoint, write_json
from command import zoo
from coreai_zoo import hookimpl
from coreai_zoo.backends import builtin
from coreai_zoo.build.chips import CHIPS, EFFICIENCY, GIB, Chip, gpu_bytes, tokens_per_second
from coreai_zoo.build.design import design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.catalogue import find_entry, load_entries
from coreai_zoo.contracts import STATIC_S1
from coreai_zoo.errors import BadInput, PluginError
from coreai_zoo.lowering.module import build_module, parameters_of
from coreai_zoo.overlay import LayerRewrite, WeightMap
from coreai_zoo.planning.plan import Plan
from coreai_zoo.planning.plan import plan as make_plan
from coreai_zoo.plugins import Plugins, default_plugins
from coreai_zoo.recipes import HeadQuantization, QuantizationSpec
from coreai_zoo_overlays import qwen3_5
from coreai_zoo_overlays.qwen3_5 import Qwen35Overlay
from coreai_zoo_qwen36 import plugin as qwen36_plugin
from decoders import OVERLAY
from toy_plugin import ToyOverlay, ToyPlugin
from toys import host, write_entry

DENSE, MOE = "qwen3.6-27b", "qwen3.6-35b-a3b"
PUBLISHED_27B_INT8HU = 29_774_040_281


def planned(plugins: Plugins | None = None, **asked: Any) -> Plan:
    return make_plan(BuildRequest(dry=True, **asked), plugins or default_plugins())


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    """Of every entry of the family, with its own recipe."""
    return {name: planned(model=name) for name in load_entries(default_plugins())}


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder that has nothing but a `config.json`."""

    def make(config: Mapping[str, Any]) -> Path:
        write_json(tmp_path / "config.json", config)
        return tmp_path

    return make


# ---------------------------------------------------------------------------------------------------------------------
# What the overlay tells is what it builds
# ---------------------------------------------------------------------------------------------------------------------


def test_an_entry_for_text_checkpoints_alone_is_planned_from_its_facts(tmp_path: Path, plans: dict[str, Plan]) -> None:
    path = tmp_path / "text-only.toml"
    text = Path("zoo_entries/qwen3.6-27b.toml").read_text(encoding="utf-8")
    path.write_text(text.replace('["qwen3_5", "qwen3_5_text"]', '["qwen3_5_text"]').replace(DENSE, "text-only"))
    assert planned(model=str(path)).roles == plans[DENSE].roles


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_parameters_that_the_overlay_tells_are_those_of_its_decoder(kind: str, tied: bool) -> None:
    # No two sizes are alike, so that none can stand for another.
    odd = {"hidden_size": 96, "vocab_size": 1000, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    gdn = {
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 9,
        "linear_key_head_dim": 8,
        "linear_conv_kernel_dim": 5,
    }
    ffn = {"intermediate_size": 160} if kind == "dense" else {"num_experts": 7, "moe_intermediate_size": 48}
    config = OVERLAY.read_config(text_config(kind, num_hidden_layers=3, tie_word_embeddings=tied, **odd, **gdn, **ffn))

    for contract in (STATIC_S1, evolve(STATIC_S1, compute_dtype="float32")):
        real = parameters_of(build_module(lambda: OVERLAY.decoder(config, contract), ()))  # noqa: B023
        assert list(OVERLAY.parameters(config, contract).items()) == list(real.items())


def test_a_build_refuses_an_overlay_whose_parameters_are_not_those_of_its_decoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = qwen3_5.Qwen35Overlay.parameters

    def untrue(self: qwen3_5.Qwen35Overlay, config: Any, contract: Any) -> dict[str, Any]:
        told = dict(true(self, config, contract))
        told["model.norm.weight"] = evolve(told["model.norm.weight"], dtype="float32")
        del told["lm_head.weight"]
        return {**told, "model.extra.weight": told["model.norm.weight"]}

    monkeypatch.setattr(qwen3_5.Qwen35Overlay, "parameters", untrue)
    with pytest.raises(
        PluginError, match=r"'qwen3_5' differs .* in model\.norm\.weight, lm_head\.weight, model\.extra\."
    ):
        design(BuildRequest(DENSE, sample=True), default_plugins())


def test_an_overlay_that_tells_nothing_is_planned_by_its_decoder(bare: Callable[..., Path]) -> None:
    sizes = {"vocab_size": 264, "hidden_size": 64, "layers": 2, "intermediate_size": 96}
    sizes |= {"heads": 4, "kv_heads": 2, "head_dim": 16, "max_context_length": 32}
    plugins = Plugins()
    plugins.register(builtin, "coreai")
    plugins.register(toy_plugin.ToyPlugin(Path("none.toml")), "toys")
    plan = make_plan(
        BuildRequest(checkpoint=bare({"model_type": toy_plugin.MODEL_TYPE, **sizes}), recipe="fp16", dry=True), plugins
    )
    config = toy_plugin.ToyOverlay().read_config(sizes)
    assert plan.design.weights.parameters == sum(
        parameter.numel() for parameter in toy_plugin.ToyDecoder(config).parameters()
    )
    assert plan.design.weights.stored_bytes == 2 * plan.design.weights.parameters


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_27b_is_predicted_within_half_a_percent_of_the_published_bytes(
    plans: Mapping[str, Plan], bare: Callable[..., Path]
) -> None:
    assert abs(plans[DENSE].asset / PUBLISHED_27B_INT8HU - 1) <= 0.005
    facts = find_entry(DENSE, default_plugins())[0].facts.stated
    assert planned(checkpoint=bare(OVERLAY.config_of_facts(facts))).asset == plans[DENSE].asset
    published = [known.asset_bytes for known in plans[DENSE].published if known.asset_bytes]
    assert published == [PUBLISHED_27B_INT8HU]


def test_every_entry_of_the_family_holds_the_parameters_that_it_states(plans: Mapping[str, Plan]) -> None:
    for name, plan in plans.items():
        facts = plan.design.model.facts
        clone = facts["vocab_size"] * facts["hidden_size"] if facts["tied_head"] else 0  # a tied head is cloned
        assert plan.design.weights.parameters == find_entry(name, default_plugins())[0].facts.parameters + clone, name


def test_a_plan_of_roles_adds_up(plans: Mapping[str, Plan]) -> None:
    for plan in plans.values():
        assert sum(role.bytes for role in plan.roles) == plan.design.weights.stored_bytes
        assert sum(role.parameters for role in plan.roles) == plan.design.weights.parameters
    bits = {role.role: role.bits for role in plans[DENSE].roles}
    assert (bits["mlp"], bits["head"], bits["embedding"], bits["scalar"]) == (8.5, 8.5, 16, 32)


def test_a_token_of_a_dense_model_reads_all_but_the_embedding_table(plans: Mapping[str, Plan]) -> None:
    plan = plans[DENSE]
    table, row = 248_320 * 5_120 * 2, 5_120 * 2
    assert plan.read == plan.dense_read == plan.design.weights.stored_bytes - table + row


def test_a_token_of_a_mixture_of_experts_reads_the_chosen_ones(plans: Mapping[str, Plan]) -> None:
    plan = plans[MOE]
    experts = next(role for role in plan.roles if role.role == "moe.expert")
    assert experts.read == experts.bytes * 8 // 256
    assert plan.dense_read - plan.read == experts.bytes - experts.read
    assert plan.dense_read / plan.read > 10


def test_an_overlay_with_experts_has_to_tell_how_many_are_read(
    monkeypatch: pytest.MonkeyPatch, bare: Callable[..., Path]
) -> None:
    facts = qwen3_5.Qwen35Overlay.facts
    monkeypatch.setattr(
        qwen3_5.Qwen35Overlay,
        "facts",
        lambda self, config: {name: fact for name, fact in facts(self, config).items() if name != "experts_per_token"},
    )
    with pytest.raises(PluginError, match="has experts but tells no fact experts_per_token"):
        planned(checkpoint=bare(text_config("moe")))


@pytest.mark.parametrize("context", [8, 1000, 32768])
def test_states_are_counted_at_the_context(context: int) -> None:
    plan = planned(model=DENSE, max_context=context)
    pair, conv, recurrent = 16 * 4 * 256 * 2, 48 * 10_240 * 3 * 2, 48 * 48 * 128 * 128 * 2
    assert dict(plan.states) == {
        "keyCache": pair * context,
        "valueCache": pair * context,
        "convState": conv,
        "recState": recurrent,
    }
    assert plan.growth == 2 * pair
    assert plan.resident == plan.asset + 2 * pair * context + conv + recurrent


def test_headers_that_are_there_are_read_and_have_to_fit(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", "moe", packed_experts=False)
    plan = planned(checkpoint=checkpoint)
    tensors = plan.design.weights.tensors
    assert {len(tensor.sources) for tensor in tensors if tensor.role == "moe.expert"} == {4, 8}  # of 4 experts
    assert {len(tensor.sources) for tensor in tensors if tensor.role != "moe.expert"} == {1}
    assert plan.tokenizer is not None and plan.bundle == plan.asset + plan.tokenizer
    assert plan.build.read == 2 * plan.design.weights.parameters
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = 64
    write_json(checkpoint / "config.json", config)
    with pytest.raises(BadInput, match=r"does not fit the model .*misshapen"):
        planned(checkpoint=checkpoint)


def test_without_headers_a_width_that_its_block_does_not_divide_is_refused(bare: Callable[..., Path]) -> None:
    config = text_config("dense", intermediate_size=40)
    with pytest.raises(BadInput, match=r"not divisible by the recipe's block: model\.layers\.0\.mlp\.down_proj"):
        planned(checkpoint=bare(config))
    assert planned(checkpoint=bare(config), recipe="fp16").roles


def test_an_entry_that_states_too_little_says_what_is_lacking(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    text = Path("zoo_entries/qwen3.5-2b.toml").read_text(encoding="utf-8")
    path.write_text(text.replace("hidden_size = 2048\n", ""), encoding="utf-8")
    with pytest.raises(BadInput, match=r"qwen3\.5-2b states too little .*hidden_size not known.*--checkpoint DIR"):
        planned(model=str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("kv_heads = 2", 'kv_heads = "two"'), "has a bad fact: kv_heads is 'two', not a positive integer"),
        (("kv_heads = 2", "kv_heads = 2.0"), "has a bad fact: kv_heads is 2.0, not a positive integer"),
        (("kv_heads = 2", "kv_heads = true"), "has a bad fact: kv_heads is True, not a positive integer"),
        (("tied_head = true", "tied_head = 1"), "has a bad fact: tied_head is 1, not true or false"),
        (("tied_head = true", 'tied_head = "yes"'), "has a bad fact: tied_head is 'yes', not true or false"),
        (("kv_heads = 2", "kv_heads = 3"), "states facts that no model has"),
        (("full_attention_layers = 6", "full_attention_layers = 600"), "states facts that no model has"),
        (("rotary_dim = 64", "rotary_dim = 6400"), "states facts that no model has"),
        (("linear_attention_layers = 18", 'linear_attention_layers = "x"'), "linear_attention_layers is x, and the"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "show"])
def test_a_bad_fact_is_told_as_the_entrys_mistake(
    tmp_path: Path, change: tuple[str, str], words: str, command: str
) -> None:
    path = tmp_path / "small.toml"
    text = Path("zoo_entries/qwen3.5-2b.toml").read_text(encoding="utf-8")
    assert change[0] in text
    path.write_text(text.replace(*change), encoding="utf-8")

    result = zoo(command, path)

    if command == "plan":
        assert result.exit_code == 2
        assert words in result.stderr
    assert "plugin" not in result.stderr


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (lambda facts: facts["hidden_size"] // facts["heads"], "unsupported operand"),
        (lambda facts: {2: 1, 4: 2}[facts["heads"]], "'two'"),
        (lambda facts: int(facts["heads"]), "invalid literal"),
        (lambda facts: facts["heads"].bit_length(), "has no attribute 'bit_length'"),
    ],
)
@pytest.mark.parametrize("method", ["config_of_facts", "read_config"])
def test_a_fact_that_an_overlay_chokes_on_is_named_with_its_entry(
    tmp_path: Path, compute: Callable[[Any], Any], words: str, method: str
) -> None:
    class Choking(ToyOverlay):
        pass

    setattr(Choking, method, lambda _self, facts: compute(facts) or {})
    entry = write_entry(tmp_path / "toy.toml")
    entry.write_text(re.sub(r"\nheads = .*", '\nheads = "two"', entry.read_text(encoding="utf-8")), encoding="utf-8")

    result = zoo("plan", "toy-mean", plugins=host(OverlayPlugin(entry, Choking())))

    assert result.exit_code == 2
    assert result.stderr.startswith("error: Entry toy-mean has a bad fact: ")
    assert words in result.stderr and "facts.heads is 'two'. Correct it in its file." in result.stderr
    assert "plugin" not in result.stderr


def test_an_overlay_that_fails_on_good_facts_is_blamed_itself(tmp_path: Path) -> None:
    class Broken(ToyOverlay):
        def config_of_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
            raise AttributeError("oops")

    plugin = OverlayPlugin(write_entry(tmp_path / "toy.toml"), Broken())

    told = zoo("plan", "toy-mean", plugins=host(plugin)).stderr
    assert told.startswith("error: plugin 'toys' failed in overlay 'toy': AttributeError: oops. It is raised at ")
    assert re.search(r"test_plan\.py:\d+, `raise AttributeError.*`\.\n$", told), (
        "with the line, and no word of leaving it out"
    )


class OverlayPlugin(ToyPlugin):
    """The toy's plugin with another overlay."""

    def __init__(self, entry: Path, overlay: ToyOverlay) -> None:
        super().__init__(entry)
        self.overlay = overlay

    @hookimpl
    def zoo_claim_overlay(self, model_type: str) -> ToyOverlay:
        return self.overlay


# ---------------------------------------------------------------------------------------------------------------------
# What `zoo show` says of the same
# ---------------------------------------------------------------------------------------------------------------------


def with_head_block(size: int) -> Plugins:
    """The family with another head policy."""

    class Policy:
        @hookimpl
        def zoo_head_quantization(self) -> HeadQuantization:
            return HeadQuantization(QuantizationSpec("int8", "symmetric", size), "as a test wants it")

    plugins = Plugins()
    plugins.register(builtin, "coreai")
    plugins.register(qwen36_plugin, "qwen36")
    plugins.register(Policy(), "policy")
    return plugins


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("name", [DENSE, MOE])
def test_show_and_plan_tell_the_same_of_every_role(name: str, size: int) -> None:
    plugins = with_head_block(size)

    shown = json.loads(zoo("show", name, "--json", plugins=plugins).stdout)["recipe_by_role"]

    made = planned(plugins, model=name)
    assert shown == {role.role: None if role.specs == (None,) else str(*role.specs) for role in made.roles}
    assert shown["head"] == f"int8 block {size} symmetric"


def test_show_claims_no_head_block_for_an_entry_that_states_too_little(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    text = Path("zoo_entries/qwen3.5-2b.toml").read_text(encoding="utf-8")
    path.write_text(text.replace("hidden_size = 2048\n", ""), encoding="utf-8")

    shown = json.loads(zoo("show", path, "--json", plugins=with_head_block(16)).stdout)["recipe_by_role"]

    assert shown["head"] == "int8, as the overlay decides when it sees a config"
    assert shown["body"] == "int8 block 32 symmetric_with_clipping"


# ---------------------------------------------------------------------------------------------------------------------
# Plugins of others: what a build would make of them, a plan says
# ---------------------------------------------------------------------------------------------------------------------


class WideNorm(nn.Module):
    """RMSNorm whose gain is float32: another parameter than that of the layer that it replaces."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(norm.weight, dtype=torch.float32))
        self.eps = norm.impl.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


class WithBias(WideNorm):
    """As `WideNorm`, with one parameter more, which no checkpoint fills."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        self.bias = nn.Parameter(torch.empty(8))


def with_others(**hooks: Callable[..., Any]) -> Plugins:
    """The installed plugins and one of somebody else."""
    plugins = Plugins.discover()
    other = types.ModuleType("other")
    for name, function in hooks.items():
        setattr(other, name, hookimpl(function))
    plugins.register(other, "other")
    return plugins


def rewriting(apply: Callable[[nn.Module], nn.Module], *, keeps_parameters: bool = False) -> Plugins:
    """With a rewrite of the last norm by somebody else."""
    rewrite = LayerRewrite("others-norm", "model.norm", "a test", apply, keeps_parameters=keeps_parameters)
    return with_others(zoo_layer_rewrites=lambda: [rewrite])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "sibling")


def test_a_rewrite_that_changes_parameters_is_planned_as_it_is_built(tiny: Path, tmp_path: Path) -> None:
    plugins = rewriting(WideNorm)
    planned = json.loads(zoo("plan", "--checkpoint", tiny, "--json", plugins=plugins).stdout)
    built = design(BuildRequest(DENSE, checkpoint=tiny, custom=True), plugins).weights

    plain = {
        tensor.name: tensor
        for tensor in design(BuildRequest(checkpoint=tiny, dry=True), Plugins.discover()).weights.tensors
    }
    changed = {tensor.name: tensor for tensor in built.tensors if tensor != plain[tensor.name]}
    assert {name: tensor.format.bytes - plain[name].format.bytes for name, tensor in changed.items()} == {
        "model.norm.weight": 2 * text_config("dense")["hidden_size"]
    }
    assert {role: row["bytes"] for role, row in planned["roles"].items()} == {
        role: sum(tensor.format.bytes for tensor in tensors) for role, tensors in built.by_role().items()
    }
    told = zoo("new", "tiny-wide", "--from", tiny, "-o", tmp_path, "--json", plugins=plugins)
    assert json.loads(told.stdout)["weights"]["fit"]


def test_a_rewrite_whose_parameter_nobody_fills_is_told_by_plan_new_and_build_alike(tiny: Path, tmp_path: Path) -> None:
    plugins = rewriting(WithBias)
    complaint = r"does not fit the model \(1 problem\)\. missing: model\.norm\.bias"
    planned = zoo("plan", "--checkpoint", tiny, plugins=plugins)
    assert planned.exit_code == 2 and re.search(complaint, planned.stderr)
    told = zoo("new", "tiny-biased", "--from", tiny, "-o", tmp_path, "--json", plugins=plugins)
    weights = json.loads(told.stdout)["weights"]
    assert not weights["fit"] and re.search(complaint, weights["detail"])
    with pytest.raises(BadInput, match=complaint):
        design(BuildRequest(DENSE, checkpoint=tiny, custom=True), plugins)


def test_a_rewrite_that_breaks_its_promise_to_keep_parameters_is_refused_by_a_build(tiny: Path) -> None:
    plugins = rewriting(WideNorm, keeps_parameters=True)
    with pytest.raises(PluginError, match=r"'others-norm' of plugin other changes the parameters of layer model\.norm"):
        design(BuildRequest(DENSE, checkpoint=tiny, custom=True), plugins)


def test_a_rewrite_that_makes_no_module_is_told_with_its_layer(tiny: Path) -> None:
    plugins = rewriting(lambda _: None)  # type: ignore[arg-type,return-value]
    told = r"'others-norm' of plugin other makes NoneType of layer model\.norm, and no module"
    with pytest.raises(PluginError, match=told):
        design(BuildRequest(DENSE, checkpoint=tiny, custom=True), plugins)
    planned = zoo("plan", "--checkpoint", tiny, plugins=plugins)
    assert planned.exit_code == 2 and re.search(told, planned.stderr)


@pytest.mark.parametrize(("method", "kind"), [("facts", "a mapping"), ("kv_cache", "a KVCache")])
def test_an_overlay_that_gives_something_else_is_told_with_its_plugin(
    method: str, kind: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen3_5.Qwen35Overlay, method, lambda *_: None)
    planned = zoo("plan", "--checkpoint", tiny)
    assert planned.exit_code == 2, planned.output
    assert re.search(rf"plugin 'qwen36' failed in overlay .*`{method}` gives NoneType, not {kind}", planned.stderr)


def failing(*_arguments: Any) -> Any:
    raise LookupError("of their own")


def map_of_theirs(**changes: Any) -> Callable[..., Any]:
    """A weight map that is ours but for its first rule."""

    def zoo_weight_map(config: Any) -> WeightMap:
        ours = qwen3_5.weight_map(config)
        return evolve(ours, rules=(evolve(ours.rules[0], **changes), *ours.rules[1:]))

    return zoo_weight_map


@pytest.mark.parametrize(
    ("plugins", "complaint"),
    [
        (lambda: with_others(zoo_layer_rewrites=failing), "failed in zoo_layer_rewrites: LookupError: of"),
        (lambda: rewriting(failing), "failed in rewrite 'others-norm' of layer model.norm: LookupError: of their own"),
        (lambda: with_others(zoo_weight_map=failing), "failed in zoo_weight_map: LookupError: of their own"),
        (
            lambda: with_others(zoo_weight_map=map_of_theirs(source_shape=failing)),
            "failed in the weight map: LookupError: of their own",
        ),
    ],
    ids=["the hook of rewrites", "a rewrite", "the hook of the weight map", "the weight map"],
)
def test_an_error_of_somebody_elses_plugin_names_it(
    plugins: Callable[[], Plugins], complaint: str, tiny: Path, tmp_path: Path
) -> None:
    host = plugins()
    for arguments in (("plan", "--checkpoint", tiny), ("new", "tiny-failed", "--from", tiny, "-o", tmp_path)):
        result = zoo(*arguments, plugins=host)
        assert result.exit_code == 2, result.output
        assert result.stderr.splitlines()[-1].startswith(f"error: plugin 'other' {complaint}"), arguments


# ---------------------------------------------------------------------------------------------------------------------
# Rates and machines
# ---------------------------------------------------------------------------------------------------------------------


def test_an_entry_whose_facts_contradict_each_other_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    text = Path("zoo_entries/qwen3.5-2b.toml").read_text(encoding="utf-8")
    assert "\nlayers = 24\n" in text
    path.write_text(text.replace("\nlayers = 24\n", "\nlayers = 30\n"), encoding="utf-8")
    with pytest.raises(BadInput, match="linear_attention_layers is 18, and the other facts make it 2"):
        planned(model=str(path))


@pytest.mark.parametrize(
    ("fact", "hint"), [("clamp = 7.0", "It knows "), ("gdn_key_head = 16", "Did you mean gdn_key_h")]
)
def test_a_fact_that_no_overlay_knows_is_refused(tmp_path: Path, fact: str, hint: str) -> None:
    """Nothing would be compared with it, and nothing built by it."""
    path = tmp_path / "mine.toml"
    text = Path("zoo_entries/qwen3.5-2b.toml").read_text(encoding="utf-8")
    path.write_text(text.replace("[facts]\n", f"[facts]\n{fact}\n"), encoding="utf-8")
    text = Path("zoo_entries/qwen3.6-27b.toml").read_text(encoding="utf-8")
    (tmp_path / "other.toml").write_text(text.replace("[facts]\n", f"[facts]\n{fact}\n"), encoding="utf-8")
    with pytest.raises(BadInput, match="which the overlay qwen3_5 does not know"):
        design(BuildRequest(str(tmp_path / "other.toml"), sample=True), default_plugins())
    with pytest.raises(
        BadInput, match=f"the fact {fact.split(maxsplit=1)[0]}, which the overlay qwen3_5 does not know"
    ) as caught:
        planned(model=str(path))
    assert hint in caught.value.hint


class Clamped(Qwen35Overlay):
    """A variant that a key in the config tells from what it refines."""

    refines = "qwen3_5"
    told = True

    def config_of_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        made = dict(super().config_of_facts(facts))
        return {**made, "clamp": 7.0} if self.told else made


@pytest.fixture
def of_a_variant(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An entry whose sample has that key."""
    sample = tmp_path / "acme_sample" / "tiny"
    shutil.copytree(root / "coreai_zoo_qwen36" / "samples" / "dense", sample)
    (sample.parent / "__init__.py").touch()
    config = json.loads((sample / "config.json").read_text())
    (sample / "config.json").write_text(json.dumps(config | {"clamp": 7.0}))
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = (root / "zoo_entries" / "qwen3.6-27b.toml").read_text(encoding="utf-8")
    entry = entry.replace('"coreai_zoo_qwen36"', '"acme_sample"').replace('"samples/dense"', '"tiny"')
    (tmp_path / "acme.toml").write_text(entry, encoding="utf-8")
    return str(tmp_path / "acme.toml")


def with_variant(overlay: Clamped, make_plugin: Callable[..., Any]) -> Plugins:
    plugins = Plugins.discover()
    claim = make_plugin(zoo_claim_overlay=lambda hf_config: overlay if "clamp" in hf_config else None)
    plugins.register(claim, "acme")
    return plugins


def test_an_entry_is_of_the_variant_that_its_sample_is_of(of_a_variant: str, make_plugin: Callable[..., Any]) -> None:
    plugins = with_variant(Clamped(name="clamped"), make_plugin)
    made = design(BuildRequest(of_a_variant, dry=True), plugins)
    assert (made.model.overlay.name, made.model.plugin, made.model.hf_config["clamp"]) == ("clamped", "acme", 7.0)
    assert design(BuildRequest(DENSE, dry=True), plugins).model.overlay.name == "qwen3_5"


def test_a_variant_that_makes_another_s_config_of_facts_is_refused(
    of_a_variant: str, make_plugin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be planned, compared and drawn as what it refines."""
    monkeypatch.setattr(Clamped, "told", False)
    with pytest.raises(PluginError, match=r"one of overlay 'clamped' of plugin acme by its sample.*one of 'qwen3_5'"):
        design(BuildRequest(of_a_variant, dry=True), with_variant(Clamped(name="clamped"), make_plugin))


def test_the_efficiency_is_what_the_published_measurement_reaches(plans: Mapping[str, Plan]) -> None:
    (published,) = (known for known in plans[DENSE].published if known.machine == "M4 Max")
    (chip,) = (chip for chip in CHIPS if chip.name == published.machine)
    assert published.decode / tokens_per_second(plans[DENSE].read, chip.bandwidth) == pytest.approx(
        EFFICIENCY, abs=0.005
    )


def test_published_measurements_name_machines_of_the_table(plans: Mapping[str, Plan]) -> None:
    machines = [measured.machine for plan in plans.values() for measured in plan.published]
    assert len(machines) == 4 and set(machines) <= {chip.name for chip in CHIPS}


def test_a_bundle_fits_the_smallest_memory_whose_gpu_share_holds_it() -> None:
    chip = Chip("toy", 100, (16, 48, 128))
    assert (gpu_bytes(24), gpu_bytes(32), gpu_bytes(48)) == (16 * GIB, 64 * GIB // 3, 36 * GIB)
    assert chip.smallest_memory(gpu_bytes(16)) == 16
    assert chip.smallest_memory(gpu_bytes(16) + 1) == 48
    assert chip.smallest_memory(96 * GIB) == 128
    assert chip.smallest_memory(96 * GIB + 1) is None


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_plan_of_the_27b_takes_less_than_a_second_of_a_processor() -> None:
    """Processor seconds of the whole command, the best of three: wall time would measure who else is busy."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", "from coreai_zoo.cli.app import main; main()", "plan", DENSE]
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 1


def test_the_text_has_the_roles_the_figures_and_the_published_measurement() -> None:
    output = zoo("plan", DENSE).output
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert rows["mlp"][1:3] == ["192", "17,112,760,320"]
    assert "published: 29,774,040,281 (-0.00" in output
    assert next(line for line in output.splitlines() if line.startswith("M4 Max  ")).split()[2:] == [
        "546", "48", "GB", "20.1", "15.8", "15.9",
    ]  # fmt: skip
    assert "every expert" not in output
    assert "at 79 % of the bandwidth: the published 15.9 tokens/s" in output
    assert "if every expert were read" in zoo("plan", MOE).output


def test_a_bandwidth_of_ones_own_takes_the_place_of_the_table() -> None:
    described = json.loads(zoo("plan", DENSE, "--bandwidth", "100", "--efficiency", "0.5", "--json").stdout)
    (machine,) = described["machines"]
    assert machine["tokens_per_second"] == pytest.approx(100e9 / described["decode"]["read_per_token"])
    assert machine["tokens_per_second_at_efficiency"] == pytest.approx(machine["tokens_per_second"] / 2)
    assert described["efficiency"]["source"] == "--efficiency"


def test_json_has_what_the_text_has(plans: Mapping[str, Plan]) -> None:
    described, plan = json.loads(zoo("plan", MOE, "--json").stdout), plans[MOE]
    assert described["asset_bytes"] == plan.asset
    assert described["decode"]["dense_read_per_token"] == plan.dense_read
    assert described["roles"]["moe.expert"]["stored_as"]["block_size"] == 32
    assert described["roles"]["moe.router"]["stored_as"] is None
    assert described["build"]["written"] >= plan.asset > plan.design.weights.stored_bytes
    assert [measured["decode"] for measured in described["published"]] == [30.9, 64.9]


def test_an_entry_is_compared_recipe_by_recipe() -> None:
    compared = json.loads(zoo("plan", DENSE, "--compare", "--json").stdout)
    assert [plan["recipe"] for plan in compared] == list(default_plugins().recipes())
    sizes = {plan["recipe"]: plan["asset_bytes"] for plan in compared}
    assert sizes["fp16"] > sizes["int8lin"] > sizes["int8hu"] > sizes["int4lin"] > sizes["int4hu8"]
    assert sizes["int8mse"] == sizes["int8hu"]
    assert not compared[0]["published"], "a measurement is of one recipe"
    text = zoo("plan", DENSE, "--compare").output
    assert re.search(" +".join(sizes), text)
    assert all(f"{size:,}" in text for size in sizes.values())


def test_recipes_of_two_files_that_are_called_alike_are_told_apart(tmp_path: Path) -> None:
    shown = zoo("show-recipe", "int8hu").stdout
    files = [tmp_path / folder / "mine.toml" for folder in ("one", "two")]
    for file, text in zip(files, (shown, shown.replace("block_size = 32", "block_size = 64")), strict=True):
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
    headings = zoo("plan", DENSE, "--compare", "--recipe", files[0], "--recipe", files[1]).stdout
    assert all(str(file) in headings for file in files)
    assert str(files[0]) not in zoo("plan", DENSE, "--compare", "--recipe", files[0], "--recipe", "fp16").stdout


def test_entries_and_checkpoints_are_compared_side_by_side(bare: Callable[..., Path]) -> None:
    result = zoo("plan", DENSE, MOE, "--checkpoint", bare(text_config("dense")), "--compare")
    assert result.exit_code == 0
    columns = next(line for line in result.output.splitlines() if DENSE in line).split()
    assert columns[:2] == [DENSE, MOE] and len(columns) == 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to plan"),
        ([DENSE, MOE], "Pass --compare"),
        ([DENSE, "--recipe", "fp16", "--recipe", "int8hu"], "Pass --compare"),
        ([DENSE, "--recipe", "int3"], "no recipe 'int3'"),
        ([DENSE, "--contract", "elastic"], "no contract 'elastic'"),
        (["qwen3.6-28b"], "no entry is called 'qwen3.6-28b'"),
        (["--checkpoint", "/nowhere"], "does not exist"),
        ([DENSE, "--context", "3"], "Invalid value for '--context'"),
        ([DENSE, "--context", "262145"], "262145 is not between 8 and 262144, the model's own limit"),
        ([DENSE, "--bandwidth", "0"], "Invalid value for '--bandwidth'"),
        ([DENSE, "--bandwidth", "100", "--tflops", "5"], "--tflops bounds how fast a prompt is read."),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], complaint: str) -> None:
    result = zoo("plan", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert complaint in result.stderr
