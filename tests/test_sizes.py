"""How large a bundle is: what its parameters and its recipe say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints import tiny_checkpoint
from coreai_zoo.build.pipeline import build
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.headers import TensorInfo
from coreai_zoo.contracts import STATIC_S1
from coreai_zoo.lowering.module import build_module, parameters_of
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.weights.plan import plan_weights
from coreai_zoo_overlays import qwen3_5
from decoders import OVERLAY

# Bytes of main.mlirb in the published Qwen3.6-27B bundle, int8hu_block32_sym.
PUBLISHED_27B_INT8HU = 29_774_040_281

WIDE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}


@pytest.mark.parametrize(
    ("entry", "kind", "ffn"),
    [
        ("qwen3.6-27b", "dense", {"intermediate_size": 1024}),
        ("qwen3.6-35b-a3b", "moe", {"num_experts": 8, "moe_intermediate_size": 128}),
    ],
)
def test_the_bytecode_is_within_two_percent_of_parameters_and_recipe(
    entry: str, kind: Any, ffn: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", kind, **WIDE, **ffn)
    request = BuildRequest(entry, checkpoint=checkpoint, output=tmp_path / "exports", custom=True)
    bundle = Bundle.open(build(request, default_plugins()).path)
    parameters = {role: counts["parameters"] for role, counts in bundle.build["weights"].items()}
    quantized = {role for role, spec in bundle.build["recipe"]["roles"].items() if spec is not None}
    assert {"head", "attention", "gdn.in", "gdn.out"} < quantized
    expected = sum(count * (1 + 2 / 32 if role in quantized else 2) for role, count in parameters.items())
    size = (bundle.asset / "main.mlirb").stat().st_size
    assert abs(size / expected - 1) <= 0.02


def test_the_true_size_plan_of_the_27b_is_within_a_thousandth_of_the_published_bundle() -> None:
    facts = find_entry("qwen3.6-27b", default_plugins())[0].facts.stated
    config = OVERLAY.read_config(OVERLAY.config_of_facts(facts))
    module = build_module(lambda: OVERLAY.decoder(config, STATIC_S1), [])
    parameters = parameters_of(module)
    plan = plan_weights(qwen3_5.weight_map(config), parameters, released_tensors(parameters), RECIPES["int8hu"])
    assert sum(tensor.parameters for tensor in plan.tensors) == facts["parameters"]
    assert abs(plan.stored_bytes / PUBLISHED_27B_INT8HU - 1) <= 0.001


def released_tensors(parameters: dict[str, Any]) -> dict[str, TensorInfo]:
    """The text tensors of a released checkpoint with these parameters: 851 of them in the 27B."""
    tensors = {}
    for name, info in parameters.items():
        key = name.replace("model.", "model.language_model.", 1).replace("linear_attn.A", "linear_attn.A_log")
        shape = (info.shape[0], 1, info.shape[1]) if "conv1d" in name else info.shape
        tensors[key] = TensorInfo(key=key, shape=shape, dtype="bfloat16", file=Path("model.safetensors"))
    assert len(tensors) == 851
    return tensors
