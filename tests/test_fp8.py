"""FP8 weights with block scales: read as transformers dequantizes them, a slice at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints import read_weights, tiny_checkpoint, write_json, write_weights
from command import zoo
from coreai_zoo.checkpoint.files import Checkpoint, read_config
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.errors import BadInput
from coreai_zoo.gates.huggingface import StreamedCausalLM
from decoders import feed, fresh_states, load_decoder
from reference import whole_model

KINDS = ("dense", "moe")
BLOCK = 128
TOKENS = list(range(60, 74))
WIDE = {  # every matrix that is quantized has both sides divisible by a block
    "hidden_size": 128,
    "head_dim": 128,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "moe": {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128},
    "dense": {"intermediate_size": 256},
}


def quantized(matrix: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A matrix [..., rows, columns] as FP8 and the scale of each block, absmax / 448, as the family's releases have."""
    blocks = matrix.float().unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., R, 128, C, 128]
    scales = (blocks.abs().amax((-3, -1)).clamp(min=1e-6) / 448).to(scale_dtype)  # [..., R, C]
    codes = (blocks / scales.float()[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(-4, -3).flatten(-2, -1).contiguous(), scales.contiguous()


def divides(key: str, matrix: Tensor) -> bool:
    sides = matrix.shape[-2:]
    return not any(word in key for word in ("embed", "lm_head", "visual", "conv")) and (
        len(sides) == 2 and sides[0] % BLOCK == 0 and sides[1] % BLOCK == 0
    )


def as_fp8(weights: Mapping[str, Tensor], scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for key, matrix in weights.items():
        if divides(key, matrix):
            made[key], made[f"{key}_scale_inv"] = quantized(matrix, scale_dtype)
        else:
            made[key] = matrix
    return made


def fp8_checkpoint(
    directory: Path,
    kind: Any = "dense",
    scale_dtype: torch.dtype = torch.float32,
    shards: int = 1,
    change: Callable[[dict[str, Tensor]], object] = lambda _weights: None,
) -> Path:
    """A checkpoint as the official FP8 repositories are: experts one by one, block scales, the config saying so."""
    sizes = {key: value for key, value in WIDE.items() if key not in KINDS} | WIDE[kind]  # type: ignore[operator]
    tiny_checkpoint(directory, kind, packed_experts=False, shards=shards, **sizes)
    weights = as_fp8(read_weights(directory), scale_dtype)
    assert sum(key.endswith("_scale_inv") for key in weights) >= 10
    change(weights)
    write_weights(directory, weights, shards)
    config = read_config(directory)
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(
            {key.removesuffix(".weight") for key in weights if f"{key}_scale_inv" not in weights}
        ),
    }
    write_json(directory / "config.json", config)
    return directory


def dequantized(directory: Path, destination: Path) -> Path:
    """The same checkpoint in float32, by transformers' own operation, which alone needs no accelerate."""
    with quiet_transformers():
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        operation = Fp8Dequantize(None)
    shutil.copytree(directory, destination, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = read_weights(directory)
    scales = {key: weights.pop(key) for key in list(weights) if key.endswith("_scale_inv")}
    for key, scale in scales.items():
        name = key.removesuffix("_scale_inv")
        weights[name] = operation._dequantize_one(weights[name], scale, torch.float32)
    write_weights(destination, weights)
    config = read_config(directory)
    del config["quantization_config"]
    write_json(destination / "config.json", config)
    return destination


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_decoder_and_oracle_compute_what_transformers_computes_with_the_dequantized_model(
    kind: str, scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    directory = fp8_checkpoint(tmp_path / "checkpoint", kind, scale_dtype, shards=3)
    plain = dequantized(directory, tmp_path / "plain")
    expected = whole_model(plain, TOKENS, read_config(plain)).logits
    checkpoint, values = Checkpoint.open(directory), read_weights(plain)
    assert list(checkpoint.tensors) == sorted(values)
    assert checkpoint.scales
    for key in checkpoint.scales:
        info = checkpoint.tensors[key]
        assert torch.equal(checkpoint.read_rows(key, 0, info.rows).reshape(info.shape), values[key]), key

    module, spec = load_decoder(directory, tmp_path / "store")
    assert np.abs(feed(module, TOKENS, fresh_states(spec)).numpy() - expected).max() <= 2e-4
    streamed = StreamedCausalLM(checkpoint, read_config(directory), torch.float32).run(TOKENS)
    assert np.abs(streamed.logits - expected).max() <= 2e-5


def test_rows_are_the_same_wherever_a_slice_begins(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(fp8_checkpoint(tmp_path))
    key = next(key for key in checkpoint.scales if checkpoint.tensors[key].rows > 2 * BLOCK)
    rows = checkpoint.tensors[key].rows
    whole = checkpoint.read_rows(key, 0, rows)
    assert whole.dtype == torch.float32 and checkpoint.tensors[key].dtype == "float32"
    for start, stop in ((0, 1), (1, 130), (127, 129), (128, 256), (200, rows), (rows - 1, rows), (5, 5)):
        assert torch.equal(checkpoint.read_rows(key, start, stop), whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_a_scale_may_be_a_power_of_two_in_a_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if key.endswith("_scale_inv")]:
            exponents = weights[key].float().log2().round()
            expected[key.removesuffix("_scale_inv")] = exponents.exp2()
            stored = exponents.exp2().to(dtype) if dtype != torch.uint8 else (exponents + 127).to(torch.uint8)
            weights[key] = stored

    expected: dict[str, Tensor] = {}
    checkpoint = Checkpoint.open(fp8_checkpoint(tmp_path, change=change))
    codes = read_weights(tmp_path)
    assert set(expected) & set(checkpoint.scales) == set(checkpoint.scales) != set()
    for key, factors in expected.items():
        if key in checkpoint.scales:
            grown = factors.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            rows = checkpoint.read_rows(key, 0, checkpoint.tensors[key].rows)
            assert torch.equal(rows, codes[key].float() * grown)


def test_packed_experts_and_one_scale_for_a_whole_matrix_are_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    packed = torch.randn(3, 2 * BLOCK, BLOCK, generator=generator)

    def change(weights: dict[str, Tensor]) -> None:
        weights["mtp.experts.gate_up_proj"], weights["mtp.experts.gate_up_proj_scale_inv"] = quantized(packed)
        weights["mtp.one.weight"] = (packed[0] / 448).to(torch.float8_e4m3fn)
        weights["mtp.one.weight_scale_inv"] = torch.tensor(2.0)
        weights["mtp.one.activation_scale"] = torch.tensor(3.0)

    checkpoint = Checkpoint.open(fp8_checkpoint(tmp_path, change=change))
    rows = checkpoint.read_rows("mtp.experts.gate_up_proj", 300, 700)
    expected = checkpoint.read_rows("mtp.experts.gate_up_proj", 0, 768)[300:700]
    assert torch.equal(rows, expected)
    assert (expected - packed.reshape(-1, BLOCK)[300:700]).abs().max() < 0.2
    assert torch.equal(
        checkpoint.read_rows("mtp.one.weight", 0, 9), (packed[0] / 448).to(torch.float8_e4m3fn)[:9].float() * 2
    )
    assert not any(key.endswith("_scale_inv") or "activation_scale" in key for key in checkpoint.tensors)


def test_a_build_says_what_the_weights_were(tmp_path: Path) -> None:
    directory = fp8_checkpoint(tmp_path / "checkpoint")
    made = zoo("build", "qwen3.6-27b", "--checkpoint", str(directory), "--custom", "-o", str(tmp_path / "out"))
    assert made.exit_code == 0, made.output
    assert "FP8 with a scale for each block of 128 x 128" in made.output
    (bundle,) = (path for path in (tmp_path / "out").iterdir() if not path.name.startswith("."))
    said = "FP8 with a scale for each block of 128 x 128, bfloat16"
    assert json.loads((bundle / "build.json").read_text())["source"]["precision"] == said
    assert said in (bundle / "README.md").read_text()


def test_names_alone_are_enough_for_a_plan(tmp_path: Path) -> None:
    directory = fp8_checkpoint(tmp_path, shards=2)
    for shard in directory.glob("*.safetensors"):
        shard.unlink()
    planned = zoo("plan", str(directory), "--json")
    assert planned.exit_code == 0, planned.stderr


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_scales_that_leave_a_doubt_are_refused(place: str, tmp_path: Path) -> None:
    def cut(weights: dict[str, Tensor]) -> None:
        key = next(key for key in weights if key.endswith("mlp.up_proj.weight_scale_inv"))
        weights[key] = torch.cat([weights[key], weights[key]])  # blocks of 64 rows, where the config says 128

    directory = fp8_checkpoint(tmp_path, change=cut)
    if place != "top":
        config = read_config(directory)
        config[place]["quantization_config"] = config.pop("quantization_config")
        write_json(directory / "config.json", config)
    with pytest.raises(BadInput, match=r"do not divide them into equal blocks: .*mlp\.up_proj\.weight_scale_inv"):
        Checkpoint.open(directory)


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    def lose(weights: dict[str, Tensor]) -> None:
        del weights[next(key for key in weights if key.endswith("mlp.up_proj.weight_scale_inv"))]

    with pytest.raises(BadInput, match=r"mlp\.up_proj\.weight \(float8_e4m3fn\)"):
        Checkpoint.open(fp8_checkpoint(tmp_path, change=lose))


def test_a_store_notices_that_the_scales_changed(tmp_path: Path) -> None:
    directory = fp8_checkpoint(tmp_path / "checkpoint")
    load_decoder(directory, tmp_path / "store")
    changed = read_weights(directory)
    key = next(key for key in changed if key.endswith("mlp.up_proj.weight_scale_inv"))
    changed[key] = changed[key] * 2
    write_weights(directory, changed)
    module, _ = load_decoder(directory, tmp_path / "store")
    fresh, _ = load_decoder(directory, tmp_path / "fresh")
    for (name, one), other in zip(module.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other), name
