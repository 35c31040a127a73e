"""The host builds, verifies and runs an architecture that it has never heard of, brought by a plugin of a few lines."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn

import toy_plugin
from coreai_zoo import hookimpl
from coreai_zoo.backend import Check, drain
from coreai_zoo.backends import builtin
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.backends.coreml.backend import CoreMLBackend
from coreai_zoo.build.pipeline import BuildResult, build
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.generate import Limits, generate
from coreai_zoo.bundle.verify import verify
from coreai_zoo.contracts import STATIC_S1
from coreai_zoo.errors import BadInput, PluginError
from coreai_zoo.lowering.module import build_module
from coreai_zoo.lowering.trace import check_traced, trace
from coreai_zoo.overlay import COMMON_ROLES, LayerRewrite
from coreai_zoo.plugins import Plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import Recipe
from coreai_zoo.signature import StateSpec, TensorSpec, TraceSpec
from coreai_zoo.weights.quantizer import dequantize_rows, quantize_rows
from recipe_roles import spec_of_role

CONFIG = {
    "model_type": toy_plugin.MODEL_TYPE,
    "vocab_size": 264,
    "hidden_size": 64,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_context_length": 48,
}

# No sample: the entry points to nothing but what the test writes.
ENTRY = """\
name = "toy-mean"
title = "Toy Mean"
summary = "A toy that remembers an average."
model_type = ["toy_mean"]
hf_id = "toys/toy-mean"

[facts]
ffn = "dense"
layers = 2
hidden_size = 64
vocab_size = 264
intermediate_size = 96

[bundle]
max_context = 32
"""

TOKENS = [72, 105, 44, 32, 116, 111, 121, 33]


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint, and a build of it
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_tensors() -> dict[str, Tensor]:
    """Random weights under the checkpoint's own names."""
    generator = torch.Generator().manual_seed(11)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def gain() -> Tensor:
        return 3 * torch.randn(CONFIG["hidden_size"], generator=generator)  # decibel

    hidden, wide = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    kv_width = CONFIG["kv_heads"] * CONFIG["head_dim"]
    tensors = {
        "tok.table": torch.randn(CONFIG["vocab_size"], hidden, generator=generator),
        "unembed": matrix(CONFIG["vocab_size"], hidden),
        "gain": gain(),
        "optimizer.step.0": torch.ones(3),
    }
    for index in range(CONFIG["layers"]):
        block = f"block.{index}."
        tensors |= {block + name: gain() for name in ("gain_m", "gain_a", "gain_f")}
        tensors |= {block + "wq": matrix(hidden, hidden), block + "wo": matrix(hidden, hidden)}
        tensors |= {block + name: matrix(kv_width, hidden) for name in ("wk", "wv")}
        tensors |= {block + "up": matrix(wide, hidden), block + "down": matrix(hidden, wide)}
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def write_tokenizer(directory: Path) -> None:
    """One token per byte, and one that ends a turn."""
    # Byte 0 to 255 in the order of their ids, each as the character that the byte-level alphabet gives it.
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = {}
    for byte in range(128):
        ((character, _),) = alphabet.pre_tokenize_str(chr(byte))
        characters[character] = byte
    for character in sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(characters)):
        characters[character] = len(characters)
    tokenizer = Tokenizer(BPE(vocab=characters, merges=[]))
    tokenizer.pre_tokenizer = alphabet
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("toy-checkpoint")
    (directory / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(checkpoint_tensors(), directory / "model.safetensors")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Plugins:
    entry = tmp_path_factory.mktemp("toy-entry") / "toy.toml"
    entry.write_text(ENTRY, encoding="utf-8")
    host = Plugins()
    host.register(builtin, "coreai")
    host.register(toy_plugin.ToyPlugin(entry), "toys")
    return host


@frozen
class Built:
    """A build, and the recipe that it was made with."""

    result: BuildResult
    bundle: Bundle
    recipe: Recipe


@pytest.fixture(scope="module", params=["fp16", "int8hu"])
def built(
    request: pytest.FixtureRequest, checkpoint: Path, plugins: Plugins, tmp_path_factory: pytest.TempPathFactory
) -> Built:
    output = tmp_path_factory.mktemp("toy-bundles")
    # The entry says nothing of a recipe, so the host's default is what no recipe means.
    recipe = None if request.param == "int8hu" else request.param
    wanted = BuildRequest("toy-mean", checkpoint=checkpoint, recipe=recipe, output=output)
    result = build(wanted, plugins)
    head = toy_plugin.ToyPlugin(output).zoo_head_quantization(toy_plugin.ToyOverlay())
    return Built(result, Bundle.open(result.path), RECIPES[request.param].with_head(head))


# ---------------------------------------------------------------------------------------------------------------------
# The reference: the toy in float32, as it is written, on all tokens at once
# ---------------------------------------------------------------------------------------------------------------------


def stored_value(name: str, tensor: Tensor, recipe: Recipe) -> Tensor:
    """The value that a bundle holds for a checkpoint tensor, in float32."""
    role = {"tok.table": "embedding", "unembed": "head"}.get(name) or ("attention" if ".w" in name else "mlp")
    if "gain" in name:
        return (10 ** (tensor.float() / 20)).half().float()
    (spec,) = (spec_of_role(recipe, known) for known in COMMON_ROLES if known.name == role)
    plain = tensor.half()
    return plain.float() if spec is None else dequantize_rows(quantize_rows(plain, spec), spec)


def reference_decoder(recipe: Recipe) -> nn.Module:
    """The decoder as the plugin wrote it, without rewrites and without any toolchain, float32."""
    decoder = toy_plugin.ToyDecoder(toy_plugin.ToyOverlay().read_config(CONFIG)).eval()
    names = {"tok.table": "embed.weight", "unembed": "head.weight", "gain": "norm.weight"}
    inner = {"gain_m": "mean_norm", "gain_a": "attention_norm", "gain_f": "mlp_norm", "up": "up", "down": "down"}
    inner |= {f"w{letter}": f"attention.{letter}" for letter in "qkvo"}
    state = {}
    for name, tensor in checkpoint_tensors().items():
        if name.startswith("optimizer"):
            continue
        if name.startswith("block"):
            _, index, leaf = name.split(".")
            target = f"layers.{index}.{inner[leaf]}.weight"
        else:
            target = names[name]
        state[target] = stored_value(name, tensor, recipe)
    decoder.load_state_dict(state)
    return decoder


def reference(recipe: Recipe) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Logits [S, V] of `TOKENS`, and the running means [L, 1, D] after them."""
    layers, heads, width = CONFIG["layers"], CONFIG["kv_heads"], CONFIG["head_dim"]
    keys = torch.zeros(layers, 1, heads, len(TOKENS), width)
    mean = torch.zeros(layers, 1, CONFIG["hidden_size"])
    with torch.no_grad():
        logits = reference_decoder(recipe)(
            torch.tensor([TOKENS]), torch.arange(len(TOKENS))[None], keys, torch.zeros_like(keys), mean
        )
    return logits[0].numpy(), mean.numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Tests: the bundle
# ---------------------------------------------------------------------------------------------------------------------


def test_toy_plugin_uses_public_modules_only() -> None:
    """What the toy imports is what the documentation offers to plugin authors, and it reads no private name."""
    tree = ast.parse(Path(toy_plugin.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names = ("composites", "contracts", "errors", "overlay", "recipes", "signature")
    public = {"coreai_zoo", *(f"coreai_zoo.{name}" for name in names)}
    assert {name for name in modules if name.startswith("coreai")} == public
    assert {name.partition(".")[0] for name in modules - public} <= {
        "__future__", "collections", "dataclasses", "pathlib", "torch", "typing",
    }  # fmt: skip


def test_a_bundle_of_the_toy_says_what_the_plugin_said(built: Built) -> None:
    metadata, record = built.bundle.metadata, built.bundle.build
    assert built.result.path.name == f"toy_mean_decode_{built.recipe.published_name}" == metadata["name"]
    assert metadata["language"]["states"] == {"keyCache": "kv_cache", "valueCache": "kv_cache", "meanState": "fixed"}
    assert metadata["language"]["vocab_size"] == CONFIG["vocab_size"]
    assert metadata["language"]["max_context_length"] == 32
    assert "hf_model_id" not in metadata["source"], "nothing shows that it is the entry's checkpoint"
    assert (record["overlay"]["name"], record["overlay"]["plugin"]) == ("toy", "toys")
    assert [rewrite["name"] for rewrite in record["overlay"]["rewrites"]] == ["mean-step"]
    assert record["dropped"] == {"left over from training": 1}
    assert record["facts"]["heads"] == 4
    if built.recipe.name == "fp16":
        assert record["recipe"]["roles"]["head"] is None
        assert record["recipe"]["head_reason"] is None
    else:
        assert record["recipe"]["roles"]["head"] == {"dtype": "int8", "scheme": "symmetric", "block": 16}
        assert record["recipe"]["head_reason"] == "Toys have rough heads."
        assert record["recipe"]["roles"]["mlp"]["block"] == 32


def test_a_bundle_of_the_toy_holds_every_file_and_nothing_else(built: Built) -> None:
    asset = built.bundle.asset.name
    assert {
        path.relative_to(built.result.path).as_posix() for path in built.result.path.rglob("*") if path.is_file()
    } == {
        "README.md",
        "build.json",
        "metadata.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        f"{asset}/main.hash",
        f"{asset}/main.mlirb",
        f"{asset}/metadata.json",
    }
    # Nor beside it: the weight store and the half-made bundle are gone.
    assert [path.name for path in built.result.path.parent.iterdir()] == [built.result.path.name]


def test_a_bundle_of_the_toy_verifies(built: Built, plugins: Plugins) -> None:
    checks = verify(built.bundle, plugins.backends(), plugins.tokenizer_classes())
    names = {"files", "metadata", "tokenizer", "main.hash", "signature", "states", "engine", "weights", "step"}
    assert {check.name for check in checks} == names
    assert [check for check in checks if not check.passed] == []


def test_a_backend_says_whether_an_asset_is_intact(built: Built, plugins: Plugins) -> None:
    class Picky(CoreAIBackend):
        def check_integrity(self, asset: Path) -> Check:
            assert super().check_integrity(asset).passed
            return Check("picky", False, f"{asset.name} is not good enough")

    checks = verify(built.bundle, {"coreai": Picky()}, plugins.tokenizer_classes())
    assert [check for check in checks if not check.passed] == [
        Check("picky", False, f"{built.bundle.asset.name} is not good enough")
    ]
    assert "main.hash" not in {check.name for check in checks}
    assert CoreMLBackend().check_integrity(built.bundle.asset) is None
    gone = CoreAIBackend().check_integrity(built.bundle.directory)
    assert (gone.name, gone.passed) == ("main.hash", False)


def test_a_changed_byte_of_the_toy_bundle_does_not_verify(built: Built, plugins: Plugins) -> None:
    bytecode = built.bundle.asset / "main.mlirb"
    original = bytecode.read_bytes()
    changed = bytearray(original)
    changed[len(changed) // 2] ^= 1
    try:
        bytecode.write_bytes(bytes(changed))
        assert not plugins.backends()["coreai"].check_integrity(built.bundle.asset).passed  # type: ignore[union-attr]
        checks = {check.name: check for check in verify(built.bundle, plugins.backends(), plugins.tokenizer_classes())}
    finally:
        bytecode.write_bytes(original)
    assert not checks["files"].passed
    assert "main.mlirb was changed" in checks["files"].detail


def test_the_asset_of_the_toy_declares_the_states_of_the_plugin(built: Built) -> None:
    signature = CoreAIBackend().signatures(built.bundle.asset)["main"]
    assert list(signature.states) == ["keyCache", "valueCache", "meanState"]
    assert signature.states["meanState"] == ((2, 1, 64), "float32")
    assert signature.states["keyCache"] == ((2, 1, 2, -1, 16), "float16")
    assert signature.inputs == {"input_ids": ((1, 1), "int32"), "position_ids": ((1, -1), "int32")}
    assert signature.outputs == {"logits": ((1, 1, 264), "float16")}


def test_the_asset_of_the_toy_computes_what_the_toy_computes_in_float32(built: Built) -> None:
    expected, expected_mean = reference(built.recipe)
    with CoreAIBackend().stepper(built.bundle.asset, built.bundle.functions, capacity=len(TOKENS)) as stepper:
        found = np.stack(list(drain(stepper, TOKENS))).astype(np.float32)
        mean = stepper.state("meanState")
        again = np.stack(list(drain(stepper, TOKENS)))
    # float16 activations against float32: an error of a few 1e-3 where logits are of the order of one. A decoder that
    # forgot its states would be off by more than 0.1 from the second token on.
    assert np.abs(found - expected).max() < 1e-2
    cosines = (found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosines.min() > 0.9999
    assert np.abs(mean - expected_mean).max() < 5e-3
    assert np.array_equal(again.astype(np.float32), found)  # a reset starts anew


def test_every_state_of_the_toy_matters_for_its_logits() -> None:
    """Guards the test above: with a state left at zero, the reference itself moves by far more than the tolerance."""
    recipe = RECIPES["fp16"]
    expected, _ = reference(recipe)
    decoder = reference_decoder(recipe)
    layers, heads, width = CONFIG["layers"], CONFIG["kv_heads"], CONFIG["head_dim"]
    for forgotten in ("keys", "values", "mean"):
        states = {name: torch.zeros(layers, 1, heads, len(TOKENS), width) for name in ("keys", "values")}
        states["mean"] = torch.zeros(layers, 1, CONFIG["hidden_size"])
        with torch.no_grad():
            for position, token in enumerate(TOKENS):
                positions = torch.arange(position + 1)[None]
                logits = decoder(torch.tensor([[token]]), positions, *states.values())
                states[forgotten].zero_()
        assert np.abs(logits[0, 0].numpy() - expected[-1]).max() > 0.1, forgotten


def test_the_toy_generates_text_through_its_own_tokenizer(built: Built) -> None:
    pieces = list(generate(built.bundle, CoreAIBackend(), "Hi", Limits(4)))
    assert 0 < len(pieces) <= 4
    tokenizer = Tokenizer.from_file(str(built.bundle.tokenizer / "tokenizer.json"))
    assert tokenizer.encode("Hi, toy!").ids == TOKENS  # so that the parity test steps text


def test_a_checkpoint_that_no_plugin_claims_is_refused(checkpoint: Path, plugins: Plugins, tmp_path: Path) -> None:
    (tmp_path / "stranger").mkdir()
    for path in checkpoint.iterdir():
        (tmp_path / "stranger" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "stranger" / "config.json").write_text(json.dumps({**CONFIG, "model_type": "stranger"}))
    request = BuildRequest("toy-mean", checkpoint=tmp_path / "stranger", output=tmp_path / "out", custom=True)
    with pytest.raises(BadInput, match=r"'stranger' is claimed by no plugin.*Asked: toys"):
        build(request, plugins)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Tests: the host
# ---------------------------------------------------------------------------------------------------------------------


def spoken(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What a module says to the machine: identifiers and text, but no docstrings and no examples below a help text."""
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    prose |= {node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "epilog"}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if node not in prose:
                yield node.lineno, text
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                yield node.lineno, name
            case ast.ImportFrom(module=str(name)):
                yield node.lineno, name
            case ast.alias(name=name):
                yield node.lineno, name


def test_the_host_names_no_model(root: Path) -> None:
    sources = sorted((root / "coreai_zoo").rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources}
    overlays = [ast.parse(path.read_text(encoding="utf-8")) for path in (root / "overlays").rglob("*.py")]
    classes = {node.name for tree in overlays for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert {"GatedDeltaNet", "GatedDeltaRule", "CausalConv1d", "SparseMoE"} <= classes
    # Roles such as `gdn.in` are the vocabulary that recipes speak, described in words ("a gated delta net").
    model = re.compile(r"qwen|gated_?delta|deltanet|linear_attn|convState|recState", re.IGNORECASE)
    said = [(path, line, text) for path, tree in trees.items() for line, text in spoken(tree)]
    assert len(said) > 5000
    # What the runtime calls a tokenizer that other families have too, and what the toolchain calls an operation.
    theirs = {"Qwen2Tokenizer", "GatedDeltaUpdate", "GatedDeltaUpdateImpl", "gated_delta_update"}
    found = [
        f"{path.relative_to(root)}:{line}: {text}"
        for path, line, text in said
        if (model.search(text) or text in classes) and text not in theirs
    ]
    assert found == []


def rewritten(*rewrites: tuple[str, LayerRewrite]) -> nn.Module:
    config = toy_plugin.ToyOverlay().read_config(CONFIG)
    return build_module(lambda: toy_plugin.ToyOverlay().decoder(config, STATIC_S1), rewrites)


def mean_rewrite(name: str, pattern: str) -> LayerRewrite:
    return LayerRewrite(name, pattern, "a test", lambda _mean: toy_plugin.RunningMeanStep())


def test_a_rewrite_replaces_the_layers_that_match_and_no_other() -> None:
    module = rewritten(("toys", mean_rewrite("second-only", "layers.1.mean")))
    assert isinstance(module.layers[0].mean, toy_plugin.RunningMean)
    assert isinstance(module.layers[1].mean, toy_plugin.RunningMeanStep)


def test_two_rewrites_on_one_layer_are_an_error_that_names_both_plugins_and_the_layer(
    checkpoint: Path, plugins: Plugins, tmp_path: Path
) -> None:
    class Meddler:
        @hookimpl
        def zoo_layer_rewrites(self) -> list[LayerRewrite]:
            return [mean_rewrite("meddle", "layers.1.*")]

    crowd = Plugins()
    crowd.register(builtin, "coreai")
    crowd.register(toy_plugin.ToyPlugin(plugins.entries()[0][1]), "toys")
    crowd.register(Meddler(), "meddler")
    with pytest.raises(PluginError) as caught:
        build(BuildRequest("toy-mean", checkpoint, output=tmp_path / "out"), crowd)
    for named in ("plugin toys", "plugin meddler", "layers.1.mean", "'mean-step'", "'meddle'"):
        assert named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_rewrite_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(PluginError, match=r"'lost' of plugin toys matches no layer \(layers\.\*\.median\)"):
        rewritten(("toys", mean_rewrite("lost", "layers.*.median")))


# ---------------------------------------------------------------------------------------------------------------------
# Tests: the contract is checked on what was traced
# ---------------------------------------------------------------------------------------------------------------------


class SmallDecoder(nn.Module):
    """A decoder of one table whose faults can be chosen."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.table = nn.Parameter(torch.ones(8, 8, dtype=torch.float16), requires_grad=False)
        self.register_buffer("counter", torch.zeros(1))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, keys: Tensor, values: Tensor, mean_state: Tensor
    ) -> Tensor:
        x = self.table[input_ids]
        length = position_ids.shape[1]
        keys[0, :, :, length - 1 : length] = x[:, :, None, :1]
        if self.fault != "value cache":
            values[0, :, :, length - 1 : length] = x[:, :, None, :1]
        if self.fault == "mean read only":
            x = x + mean_state.sum().half()
        elif self.fault != "mean state":
            mean_state.copy_(x.float().sum(-1, keepdim=True))
        if self.fault == "input":
            position_ids.add_(1)
        if self.fault == "buffer":
            self.counter.add_(1)
        if self.fault == "shape":
            return x[..., :4]
        return x.float() if self.fault == "dtype" else x


def small_spec() -> TraceSpec:
    toy = toy_plugin.ToyOverlay()
    kv = toy.kv_cache(evolve_config(layers=1, kv_heads=1, head_dim=1))
    return STATIC_S1.functions(kv, [StateSpec(name="meanState", shape=(1, 1, 1), dtype="float32")], 8, 32)["main"]


def evolve_config(**changes: int) -> toy_plugin.ToyConfig:
    return toy_plugin.ToyOverlay().read_config({**CONFIG, **changes})


def test_a_decoder_that_keeps_the_contract_is_traced() -> None:
    program = trace(SmallDecoder(), small_spec(), {})
    assert set(program.graph_signature.user_inputs_to_mutate.values()) == {"keys", "values", "mean_state"}


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("mean state", "state meanState is never written"),
        ("mean read only", "state meanState is never written"),
        ("value cache", "state valueCache is never written"),
        ("input", "input position_ids is written"),
        ("buffer", "buffer counter is written"),
        ("shape", r"output logits is float16 \(1, 1, 4\) instead of float16 \(1, 1, 8\)\.$"),
        ("dtype", r"output logits is float32 \(1, 1, 8\) instead of float16 \(1, 1, 8\)\..*contract\.logits_dtype"),
    ],
)
def test_a_decoder_that_breaks_the_contract_is_refused(fault: str, complaint: str) -> None:
    with pytest.raises(PluginError, match=f"does not meet its contract: {complaint}"):
        trace(SmallDecoder(fault), small_spec(), {})


def test_every_breach_of_the_contract_is_reported_at_once() -> None:
    program = trace(SmallDecoder(), small_spec(), {})
    spec = small_spec()
    stricter = evolve(spec, outputs=(TensorSpec("logits", (1, 1, 9), "float32"),))
    with pytest.raises(PluginError, match=r"float32 \(1, 1, 9\)"):
        check_traced(program, stricter)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"name": "meanState", "shape": (1, "positions"), "kind": "fixed"}, "is a fixed and has dynamic axes"),
        ({"name": "keyCache", "shape": ("a", "b"), "kind": "kv_cache"}, "is a kv_cache and has dynamic axes"),
        ({"name": "", "shape": (1, 4)}, "Length of 'name'"),
        ({"name": "meanState", "shape": (0, 4)}, "a size is a positive integer"),
        ({"name": "meanState", "shape": (4,), "dtype": "float8"}, "dtype"),
    ],
)
def test_a_state_spec_validates_itself(fields: Mapping[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        StateSpec(**fields)
