"""Checkpoints that are no originals (quantized, adapters, converted for MLX), and those that only look so."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import read_weights, tiny_checkpoint, write_json, write_weights
from command import zoo
from coreai_zoo.build.design import Design, design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.build.source import Source
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.hub import HubSource, Repository
from coreai_zoo.errors import BadInput
from coreai_zoo.gate import ReferenceModel
from coreai_zoo.gates.oracle import Oracle
from coreai_zoo.plugins import default_plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.weights.means import unusual_means
from hub import Hub

DENSE = "qwen3.6-27b"
UP = "model.language_model.layers.0.mlp.up_proj"
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "checkpoint")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        *parts, name = path.split("__")
        section = config[parts[0]] if parts else config
        section[name] = value
    write_json(folder / "config.json", config)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], metadata: str = "pt") -> None:
    tensors = read_weights(folder)
    change(tensors)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", {"format": metadata}
    )


def designed(folder: Path) -> Design:
    return design(BuildRequest(checkpoint=folder, dry=True), default_plugins())


def refusal(folder: Path, entry: str | None = None) -> str:
    with pytest.raises(BadInput) as caught:
        design(BuildRequest(entry, checkpoint=folder, dry=True, custom=entry is not None), default_plugins())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Quantized already
# ---------------------------------------------------------------------------------------------------------------------


def ints(*names: str, dtype: torch.dtype = torch.int32) -> Tensors:
    return {f"{UP}.{name}": torch.ones(4, 4, dtype=dtype) for name in names}


# What quant_method says, the tensors in the place of a weight, and the name that the refusal has.
QUANTIZED: dict[str, tuple[str | None, Tensors, str]] = {
    "GPTQ": ("gptq", ints("qweight", "qzeros", "g_idx"), "(GPTQ)"),
    "AWQ": ("awq", ints("qweight", "qzeros"), "(AWQ)"),
    "AutoRound": ("auto-round", ints("qweight", "qzeros"), "(GPTQ)"),
    "bitsandbytes, 4 bits": (
        "bitsandbytes",
        ints("weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", dtype=torch.uint8),
        "(bitsandbytes)",
    ),
    "bitsandbytes, 8 bits": ("bitsandbytes", ints("weight", dtype=torch.int8) | ints("SCB"), "(bitsandbytes)"),
    "compressed-tensors": ("compressed-tensors", ints("weight_packed", "weight_shape"), "(compressed-tensors)"),
    "torchao": ("torchao", ints("_weight_qdata", dtype=torch.int8), "(torchao)"),
    "FP8 whose scales are lost": ("fp8", ints("weight", dtype=torch.float8_e4m3fn), "(FP8)"),
    "scales whose FP8 is lost": ("fp8", ints("weight_scale_inv", dtype=torch.float32), "(FP8 with block scales)"),
    "ModelOpt": ("modelopt", ints("weight", dtype=torch.uint8) | ints("weight_scale_2"), "(ModelOpt)"),
    "HQQ": ("hqq", ints("W_q", dtype=torch.uint8), "(HQQ)"),
    "quanto": ("quanto", ints("weight._data", "weight._scale", dtype=torch.int8), "(quanto)"),
    "EXL3, of which the table knows nothing": (
        "exl3",
        ints("trellis", dtype=torch.int16),
        "(exl3)",
    ),
    "GPTQ, unsaid": (None, ints("qweight", "g_idx"), "(GPTQ)"),
    "bare FP8, unsaid": (None, ints("weight", dtype=torch.float8_e5m2), "(FP8)"),
    "integers, unsaid": (None, ints("weight", dtype=torch.int8), "(integers)"),
    "MLX, unsaid": (None, ints("weight", dtype=torch.uint32) | ints("scales", dtype=torch.bfloat16), "(MLX)"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_that_are_quantized_already_are_refused_by_name_with_the_original(checkpoint: Path, name: str) -> None:
    method, tensors, words = QUANTIZED[name]
    if method is not None:
        change_config(checkpoint, quantization_config={"quant_method": method, "bits": 4, "group_size": 128})

    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights[f"{UP}.weight"]
        weights.update(tensors)

    change_weights(checkpoint, change)
    text = refusal(checkpoint, DENSE)
    assert f"{checkpoint} holds weights that are quantized already {words}: {UP}." in text
    assert text.endswith("Use the original in its place: Qwen/Qwen3.6-27B.")
    assert (f"quantization_config ({method})" in text) == (method is not None)


@pytest.mark.parametrize(
    ("front_matter", "entry", "words"),
    [
        ("base_model: maker/Original-27B\n", DENSE, "Use the original in its place: maker/Original-27B."),
        ("base_model: maker/Original-27B\n", None, "Use the original in its place: maker/Original-27B."),
        ("", DENSE, "Use the original in its place: Qwen/Qwen3.6-27B."),
        ("", None, "Use the original Hugging Face checkpoint, in bf16 as a rule."),
    ],
)
def test_the_repository_to_use_is_that_of_the_card_or_of_the_entry(
    checkpoint: Path, front_matter: str, entry: str | None, words: str
) -> None:
    (checkpoint / "README.md").write_text(f"---\nlicense: apache-2.0\n{front_matter}---\n")
    change_weights(checkpoint, lambda tensors: tensors.update({f"{UP}.weight": torch.ones(2, 2, dtype=torch.int8)}))
    assert refusal(checkpoint, entry).endswith(words)


def test_an_index_alone_shows_it_before_weights_are_fetched(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    names = {f"{UP}.{name}": "model-1.safetensors" for name in ("qweight", "qzeros")}
    write_json(checkpoint / "model.safetensors.index.json", {"weight_map": names})
    assert f"quantized already (AWQ): {UP}.qweight, {UP}.qzeros." in refusal(checkpoint, DENSE)


@pytest.mark.parametrize("where", ["quantization_config", "text_config__quantization_config", "compression_config"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_config_alone_that_says_quantized_is_a_note(tmp_path: Path, where: str, dtype: str) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", dtype=dtype)
    expected = Oracle(Checkpoint.open(plain), designed(plain).model.hf_config).run([5, 80, 17, 3])
    left = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    change_config(plain, **{where: left})
    made = designed(plain)
    name = where.replace("__", ".")
    assert f"config.json has {name} (fp8), but the tensors are not quantized ({dtype}): it is ignored" in made.notes
    again = Oracle(made.checkpoint, made.model.hf_config).run([5, 80, 17, 3])
    assert (again.logits == expected.logits).all(), "and the oracle does not quantize either"


def test_no_reference_is_told_of_a_quantization_that_is_left_over(checkpoint: Path) -> None:
    # What transformers' own class makes of it depends on its version; that of a plugin may load a quantizer.
    seen: list[Mapping[str, Any]] = []

    def make(hf_config: Mapping[str, Any], _dtype: torch.dtype) -> Any:
        seen.append(hf_config)
        raise LookupError("that will do")

    for where in ("quantization_config", "text_config__quantization_config"):
        change_config(checkpoint, **{where: {"quant_method": "fp8"}})
    made = designed(checkpoint)
    with pytest.raises(BadInput, match="that will do"):
        Oracle(made.checkpoint, made.model.hf_config, reference=ReferenceModel("acme", make)).run([5, 80])
    assert "text_config" in seen[0] and "quantization_config" not in json.dumps(seen[0])


# ---------------------------------------------------------------------------------------------------------------------
# Converted for MLX
# ---------------------------------------------------------------------------------------------------------------------


def exchange(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.endswith("conv1d.weight")]:
        tensors[key] = tensors[key].transpose(1, 2)


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.endswith("norm.weight") and ".linear_attn." not in key]:
        tensors[key] = tensors[key] + 1


def test_convolutions_in_the_order_of_mlx_are_refused_as_such(checkpoint: Path) -> None:
    change_weights(checkpoint, exchange)
    text = refusal(checkpoint, DENSE)
    assert "converted for MLX, which stores convolutions with their last axes exchanged" in text
    assert text.endswith("Use the original in its place: Qwen/Qwen3.6-27B.")


def test_a_header_of_mlx_is_refused_as_such(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda _tensors: None, metadata="mlx")
    text = refusal(checkpoint, DENSE)
    assert "model.safetensors was converted for MLX" in text
    assert text.endswith("Use the original in its place: Qwen/Qwen3.6-27B.")


def test_a_config_of_mlx_is_refused_as_such(checkpoint: Path) -> None:
    change_config(checkpoint, quantization={"group_size": 64, "bits": 4})
    text = refusal(checkpoint, DENSE)
    assert "converted for MLX" in text and "its config.json has quantization with group_size and bits" in text


def test_gains_that_look_shifted_are_a_note_and_nothing_more(checkpoint: Path) -> None:
    assert unusual_means(designed(checkpoint).checkpoint, designed(checkpoint).weights) == ()
    change_weights(checkpoint, add_one)
    made = designed(checkpoint)
    (note,) = unusual_means(made.checkpoint, made.weights)
    assert note.startswith("the 7 vectors that become 1 + weight have a mean of about 1.0")
    assert "usually between -0.7 and 0.7" in note


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


def add_adapter(folder: Path, weights: str = "adapter_model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "maker/Base-27B"})
    save_file({"base_model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 4)}, folder / weights)
    return folder


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("beside", [[], ["config.json"], ["config.json", "training_args.bin", "optimizer.pt"]])
def test_an_adapter_alone_is_to_be_merged_first(tmp_path: Path, weights: str, beside: list[str]) -> None:
    folder = add_adapter(tmp_path / "adapter", weights)
    for name in beside:
        (folder / name).write_text('{"model_type": "qwen3_5"}')
    for entry in (None, DENSE):
        text = refusal(folder, entry)
        assert f"{folder} holds an adapter of maker/Base-27B (adapter_config.json, {weights}) and no model." in text
        for line in ("from peft import", f"from_pretrained('{folder}').merge_and_unload()", "model.save_pretrained("):
            assert line in text


def test_an_adapter_beside_a_model_is_noted_as_not_applied(checkpoint: Path) -> None:
    add_adapter(checkpoint)
    (note,) = designed(checkpoint).notes
    assert note.startswith("an adapter is there (adapter_config.json, adapter_model.safetensors) and is not applied")


@pytest.mark.parametrize(
    "keys",
    [
        [f"base_model.model.{UP}.base_layer.weight", f"base_model.model.{UP}.lora_A.default.weight"],
        [f"{UP}.base_layer.weight", f"{UP}.lora_B.weight"],
        [f"{UP}.weight", f"{UP}.lora_magnitude_vector.default.weight"],
        ["base_model.model.lm_head.modules_to_save.default.weight", "base_model.model.lm_head.original_module.weight"],
    ],
)
def test_a_model_with_an_adapter_that_is_not_merged_is_refused(checkpoint: Path, keys: list[str]) -> None:
    write_weights(checkpoint, {key: torch.ones(4, 4) for key in keys})
    text = refusal(checkpoint, DENSE)
    assert "an adapter that is not merged into it" in text and keys[1] in text
    assert "merge_and_unload()" in text


def test_a_repository_with_an_adapter_alone_says_so_before_anything_else(hub: Hub) -> None:
    config = json.dumps({"base_model_name_or_path": "maker/Base-27B"}).encode()
    hub.add("toys/Adapter", {"adapter_config.json": config, "adapter_model.safetensors": b"x" * 64, "README.md": b""})
    with pytest.raises(BadInput, match=r"^toys/Adapter holds an adapter of maker/Base-27B .* and no model\. Merge it"):
        HubSource.open(Repository("toys/Adapter"), Reporter(silent=True)).fetch_small(("config.json",))


def test_an_adapter_beside_the_model_of_a_repository_is_noted(hub: Hub) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"x" * 64, "adapter_config.json": b"{}"}
    hub.add("toys/Both", files)
    source = HubSource.open(Repository("toys/Both"), Reporter(silent=True))
    assert "an adapter is there (adapter_config.json)" in Source({}, source.fetch_small(), hub=source).notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# Where a note is to be found
# ---------------------------------------------------------------------------------------------------------------------


def test_a_note_is_told_recorded_and_in_card_plan_and_show(checkpoint: Path, tmp_path: Path) -> None:
    change_weights(checkpoint, add_one)
    change_config(checkpoint, quantization_config={"quant_method": "fp8"})
    said, shifted = (
        "config.json has quantization_config (fp8)",
        "vectors that become 1 + weight have a mean of about 1.0",
    )

    result = zoo("build", checkpoint, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    (bundle,) = (tmp_path / "out").iterdir()
    notes = json.loads((bundle / "build.json").read_text())["notes"]
    assert len(notes) == 2
    for words, note in zip((said, shifted), notes, strict=True):
        assert words in note
        assert f"note: {note}" in result.stderr
    card = (bundle / "README.md").read_text()
    assert "Note: config.json has quantization\\_config" in card or "Note: config.json has quantization_config" in card
    for command in ("plan", "show"):
        assert any(said in note for note in json.loads(zoo(command, checkpoint, "--json").stdout)["notes"])
        assert "config.json has quantization_config" in " ".join(zoo(command, checkpoint).stdout.split())
    assert zoo("verify", bundle).exit_code == 0
    assert "up to date" in zoo("build", checkpoint, "-o", tmp_path / "out").stdout
