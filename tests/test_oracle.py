"""The streamed oracle against transformers' ordinary whole-model forward, and its cache."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from checkpoints import read_weights, tiny_checkpoint, write_weights
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.folder import read_config
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.errors import BadInput
from coreai_zoo.gate import Activations, ReferenceModel
from coreai_zoo.gates import oracle
from coreai_zoo.gates.oracle import Oracle, default_cache
from coreai_zoo.plugins import default_plugins
from decoders import OVERLAY
from reference import whole_model

TOKENS = [5, 80, 80, 17, 250, 3, 3, 99, 41, 7, 120, 121]

LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "dense, flat keys, in shards": {"kind": "dense", "wrapped": False, "text_prefix": "model.", "shards": 3},
    "dense, tied": {"kind": "dense", "tie_word_embeddings": True},
    "moe": {"kind": "moe"},
    "moe, experts one by one": {"kind": "moe", "packed_experts": False, "dtype": "float32"},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("dense") / "checkpoint", "dense", num_hidden_layers=4)


def oracle_of(directory: Path, **options: Any) -> Oracle:
    return Oracle(Checkpoint.open(directory), read_config(directory), **options)


def assert_equal(streamed: Activations, whole: Activations) -> None:
    spread = float(whole.logits.max() - whole.logits.min())
    assert spread > 1e-3, "the reference computes nothing"
    assert np.abs(streamed.logits - whole.logits).max() <= 1e-5 * spread
    assert streamed.hidden is not None and whole.hidden is not None
    assert len(streamed.hidden) == len(whole.hidden)
    for ours, theirs in zip(streamed.hidden[:-1], whole.hidden[:-1], strict=True):  # theirs norms the last one
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (streamed.router_logits is None) == (whole.router_logits is None)
    for ours, theirs in zip(streamed.router_logits or (), whole.router_logits or (), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_by_layer_gives_what_the_whole_model_gives(layout: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, num_hidden_layers=4, **LAYOUTS[layout])
    assert_equal(oracle_of(directory).run(TOKENS), whole_model(directory, TOKENS, read_config(directory)))


@pytest.mark.parametrize("stored", ["head", "both different"])
def test_a_tied_head_is_read_as_transformers_reads_it(stored: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, dtype="float32", tie_word_embeddings=True)
    weights = read_weights(directory)
    embedding = next(key for key in weights if key.endswith("embed_tokens.weight"))
    weights["lm_head.weight"] = -weights[embedding]
    if stored == "head":
        del weights[embedding]
    write_weights(directory, weights)
    assert_equal(oracle_of(directory).run(TOKENS), whole_model(directory, TOKENS, read_config(directory)))


def test_a_head_in_chunks_is_the_whole_head(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = oracle_of(dense).run(TOKENS)
    monkeypatch.setattr("coreai_zoo.gates.huggingface.HEAD_CHUNK_ELEMENTS", 32 * 7)
    np.testing.assert_allclose(oracle_of(dense).run(TOKENS).logits, whole.logits, rtol=1e-6, atol=1e-6)


def test_a_slice_is_the_model_of_its_first_layers(dense: Path) -> None:
    config = OVERLAY.with_layers(read_config(dense), 2)
    sliced = Oracle(Checkpoint.open(dense), config).run(TOKENS)
    assert_equal(sliced, whole_model(dense, TOKENS, config))
    whole = oracle_of(dense).run(TOKENS)
    assert sliced.hidden is not None and whole.hidden is not None
    assert len(sliced.hidden) == 3
    assert np.array_equal(sliced.hidden[2], whole.hidden[2])


def test_bfloat16_is_computed_in_bfloat16(dense: Path) -> None:
    exact, half = (oracle_of(dense, dtype=dtype).run(TOKENS).logits for dtype in ("float32", "bfloat16"))
    assert np.array_equal(half, torch.from_numpy(half).bfloat16().float().numpy())
    error = np.abs(half - exact).max()
    assert 0 < error <= 0.05 * (exact.max() - exact.min())


def test_no_layer_is_left_in_memory(dense: Path) -> None:
    from coreai_zoo.gates.huggingface import StreamedCausalLM

    model = StreamedCausalLM(Checkpoint.open(dense), read_config(dense), torch.float32)
    devices: list[set[str]] = []

    def look() -> None:
        devices.append({parameter.device.type for parameter in model.model.model.layers.parameters()})

    model.run(TOKENS, look)
    assert devices == [{"meta"}] * 4


def test_a_parameter_that_nothing_fills_is_an_error_before_anything_is_computed(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    weights = read_weights(directory)
    key = next(key for key in weights if key.endswith("layers.1.self_attn.o_proj.weight"))
    write_weights(directory, {name: tensor for name, tensor in weights.items() if name != key})
    with pytest.raises(BadInput, match=r"layers\.1\.self_attn\.o_proj\.weight"):
        oracle_of(directory, on_layer=lambda: pytest.fail("a layer ran")).run(TOKENS)
    write_weights(directory, weights | {key: weights[key][:, :16].clone()})
    with pytest.raises(BadInput, match=r"o_proj\.weight is \[32, 16\] in the checkpoint, not \[32, 64\]"):
        oracle_of(directory).run(TOKENS)


# ---------------------------------------------------------------------------------------------------------------------
# Architectures that transformers does not know
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def acme() -> tuple[Any, Any]:
    """A config and a model class of somebody else: Llama whose layers multiply their output by `gain`."""
    with quiet_transformers():
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class AcmeConfig(LlamaConfig):  # type: ignore[misc]
        model_type = "acme_gain"
        gain: float = 1.0

    class AcmeLayer(LlamaDecoderLayer):  # type: ignore[misc]
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            self.gain = config.gain

        def forward(self, *arguments: Any, **options: Any) -> Any:
            return super().forward(*arguments, **options) * self.gain

    class AcmeForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
        config_class = AcmeConfig
        _no_split_modules = ("AcmeLayer",)

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers = torch.nn.ModuleList(AcmeLayer(config, i) for i in range(config.num_hidden_layers))
            self.post_init()

    return AcmeConfig, AcmeForCausalLM


def make_acme(hf_config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    config, model = acme()
    return model._from_config(config(**hf_config), dtype=dtype)


ACME = ReferenceModel("acme-models 2.1", make_acme)


@pytest.fixture(scope="module")
def gained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of that architecture, written by transformers."""
    directory = tmp_path_factory.mktemp("gained") / "checkpoint"
    config, model = acme()
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    with quiet_transformers():
        model(config(gain=1.3, **sizes, **heads)).save_pretrained(directory)
    return directory


def test_a_reference_of_a_plugin_is_streamed_like_transformers_own(gained: Path) -> None:
    tokens = [token % 128 for token in TOKENS]
    with quiet_transformers(), torch.inference_mode():
        whole = acme()[1].from_pretrained(gained, dtype=torch.float32).eval()
        outputs = whole(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    theirs = Activations(outputs.logits[0].numpy(), [state[0].numpy() for state in outputs.hidden_states])

    assert_equal(oracle_of(gained, reference=ACME).run(tokens), theirs)
    with pytest.raises(BadInput, match=r"^transformers cannot make a model of this config: .*acme_gain"):
        oracle_of(gained).run(tokens)
    plain = {**read_config(gained), "gain": 1.0}
    without = Oracle(Checkpoint.open(gained), plain, reference=ACME).run(tokens)
    assert np.abs(without.logits - theirs.logits).max() > 1e-3, "the layers of this architecture are its own"


def test_a_reference_that_fails_is_named(gained: Path) -> None:
    def make(_hf_config: Mapping[str, Any], _dtype: torch.dtype) -> Any:
        raise LookupError("no such size")

    with pytest.raises(BadInput, match=r"^acme-models 2\.2 cannot make a model of this config: no such size\.$"):
        oracle_of(gained, reference=ReferenceModel("acme-models 2.2", make)).run(TOKENS)


def test_a_kept_result_belongs_to_its_reference_by_name_and_code(gained: Path, tmp_path: Path) -> None:
    tokens = [token % 128 for token in TOKENS]
    assert counted(gained, tmp_path, tokens, reference=ACME)[1] == 3
    assert counted(gained, tmp_path, tokens, reference=ReferenceModel(ACME.name, make_acme))[1] == 0
    assert counted(gained, tmp_path, tokens, reference=evolve(ACME, name="acme-models 2.2"))[1] == 3
    assert oracle_of(gained, reference=ACME).name == "acme-models 2.1 in float32"

    identities = [
        oracle_of(gained, reference=reference).identity(tokens)
        for reference in (None, ACME, ReferenceModel(ACME.name, whole_model))
    ]
    assert "reference" not in identities[0]
    assert identities[1]["reference"]["name"] == identities[2]["reference"]["name"]
    assert identities[1]["reference"]["code_sha256"] != identities[2]["reference"]["code_sha256"]


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def counted(directory: Path, cache: Path, tokens: list[int] = TOKENS, **options: Any) -> tuple[Activations, int]:
    """What the oracle gives, and how many layers it computed for that."""
    layers: list[None] = []
    result = oracle_of(directory, cache=cache, on_layer=lambda: layers.append(None), **options).run(tokens)
    return result, len(layers)


def test_a_result_is_kept_and_belongs_to_its_inputs_only(dense: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dense, tmp_path / "checkpoint"))
    first, computed = counted(directory, tmp_path / "cache")
    again, kept = counted(directory, tmp_path / "cache")
    assert (computed, kept) == (4, 0)
    assert np.array_equal(first.logits, again.logits)
    assert first.hidden is not None and again.hidden is not None
    assert [state.shape for state in again.hidden] == [(len(TOKENS), 32)] * 5  # the embeddings, and after each layer
    assert [np.array_equal(*pair) for pair in zip(first.hidden, again.hidden, strict=True)] == [True] * 5
    assert again.router_logits is None
    assert counted(directory, tmp_path / "cache", TOKENS[:-1])[1] == 4
    assert counted(directory, tmp_path / "cache", dtype="bfloat16")[1] == 4
    # A fine-tune: every name, shape and header is the same, the values are not.
    weights = read_weights(directory)
    write_weights(directory, {key: -tensor for key, tensor in weights.items()})
    assert Checkpoint.open(directory).identity() == Checkpoint.open(dense).identity()
    other, computed = counted(directory, tmp_path / "cache")
    assert computed == 4 and not np.array_equal(other.logits, first.logits)


@pytest.mark.parametrize("edited", oracle._CODE)
def test_a_kept_result_belongs_to_the_code_that_computed_it(
    edited: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = oracle_of(dense).identity(TOKENS)
    module = import_module(edited)
    copy = tmp_path / "edited.py"
    copy.write_text(Path(str(module.__file__)).read_text(encoding="utf-8") + "# more\n", encoding="utf-8")
    monkeypatch.setattr(module.__spec__, "origin", str(copy))
    assert oracle_of(dense).identity(TOKENS) != before


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "of something else"])
def test_a_damaged_result_is_computed_again(damage: str, dense: Path, tmp_path: Path) -> None:
    first, _ = counted(dense, tmp_path)
    (kept,) = tmp_path.iterdir()
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes({"cut": bytes(data[:-200]), "flipped": bytes(data), "empty": b""}.get(damage, b""))
    if damage == "of something else":
        kept.unlink()
        counted(dense, tmp_path, TOKENS[:3])
        (other,) = tmp_path.iterdir()
        other.rename(kept)
    again, computed = counted(dense, tmp_path)
    assert computed == 4 and np.array_equal(first.logits, again.logits)
    assert counted(dense, tmp_path)[1] == 0


def without(kept: Path, kind: str, count: int | None = None) -> None:
    """Take arrays of a kind out of a kept result, as a version that kept fewer would have written it."""
    with np.load(kept) as file:
        arrays = dict(file)
    place = ("hidden", "router").index(kind)
    there = int(arrays["counts"][place])
    arrays["counts"][place] = left = 0 if count is None else there - count
    for index in range(left, there):
        del arrays[f"{kind}_{index}"]
    np.savez(kept, **arrays)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [None, 1], ids=["all", "the last"])
def test_a_kept_result_without_hidden_states_is_computed_again_and_no_bound_is_dropped(
    count: int | None, dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = counted(dense, tmp_path)
    (kept,) = tmp_path.iterdir()
    without(kept, "hidden", count)
    assert not oracle_of(dense, cache=tmp_path).is_cached(TOKENS), "--cached-only must not judge by it"

    again, computed = counted(dense, tmp_path)

    assert computed == 4 and len(again.hidden or ()) == len(first.hidden or ()) == 5
    assert "hidden states, not one for the embedding and each layer" in caplog.text
    assert counted(dense, tmp_path)[1] == 0


def test_a_kept_result_of_a_routed_model_without_its_routers_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample = find_entry("qwen3.6-35b-a3b", default_plugins())[0].sample_directory()
    first, layers = counted(sample, tmp_path)
    (kept,) = tmp_path.iterdir()
    without(kept, "router")

    again, computed = counted(sample, tmp_path)

    assert computed == layers > 0 and "has routers" in caplog.text
    assert len(again.router_logits or ()) == len(first.router_logits or ()) > 0
    assert counted(sample, tmp_path)[1] == 0


def test_a_kept_result_of_fewer_positions_is_computed_again(dense: Path, tmp_path: Path) -> None:
    first, _ = counted(dense, tmp_path)
    (kept,) = tmp_path.iterdir()
    with np.load(kept) as file:
        arrays = dict(file)
    np.savez(kept, **{**arrays, "logits": arrays["logits"][:-1]})
    again, computed = counted(dense, tmp_path)
    assert computed == 4 and again.logits.shape == first.logits.shape


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    result, computed = counted(dense, tmp_path / "file")
    assert computed == 4 and result.logits.shape == (len(TOKENS), 288)
    assert "cannot be kept" in caplog.text


def test_nothing_half_written_is_left_behind(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        counted(dense, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_where_the_platform_keeps_such_things(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "coreai-zoo" / "oracle"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "coreai-zoo" / "oracle"
