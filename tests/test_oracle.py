"""The streamed oracle against transformers' ordinary whole-model forward, and its cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import read_weights, tiny_checkpoint, write_weights
from coreai_zoo.checkpoint.files import Checkpoint, read_config
from coreai_zoo.errors import BadInput
from coreai_zoo.gate import Activations
from coreai_zoo.gates.oracle import Oracle, default_cache
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
    assert all(map(np.array_equal, first.hidden or (), again.hidden or ()))
    assert again.router_logits is None
    assert counted(directory, tmp_path / "cache", TOKENS[:-1])[1] == 4
    assert counted(directory, tmp_path / "cache", dtype="bfloat16")[1] == 4
    # A fine-tune: every name, shape and header is the same, the values are not.
    weights = read_weights(directory)
    write_weights(directory, {key: -tensor for key, tensor in weights.items()})
    assert Checkpoint.open(directory).identity() == Checkpoint.open(dense).identity()
    other, computed = counted(directory, tmp_path / "cache")
    assert computed == 4 and not np.array_equal(other.logits, first.logits)


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
