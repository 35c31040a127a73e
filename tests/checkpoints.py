"""Tiny checkpoints of the `qwen3_5` architectures, made by transformers' own modules and saved as the released are.

The weights are random. What varies between checkpoints in the wild can be chosen: wrapped or flat, how keys are
spelled, experts packed or one by one, a tied head, keys that a text-only model leaves out, shards.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END)
VOCAB_SIZE = 288  # 256 bytes, the special tokens, and some rows that no token has, as in the released models

_WRITE_THE_STREAM = ("embed_tokens.weight", "o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# Every width is a multiple of 32, so that every recipe fits. GVA 2:1 and GQA 2:1.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large for so narrow a model, so that logits differ by more than rounding
    "tie_word_embeddings": False,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_ssm_dtype": "float32",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    },
}

TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "dense": COMMON | {"model_type": "qwen3_5_text", "intermediate_size": 64},
    "moe": COMMON
    | {
        "model_type": "qwen3_5_moe_text",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "router_aux_loss_coef": 0.0,
    },
}

ARCHITECTURES = {"dense": "Qwen3_5ForConditionalGeneration", "moe": "Qwen3_5MoeForConditionalGeneration"}


def tiny_checkpoint(
    directory: Path,
    kind: Literal["dense", "moe"] = "dense",
    *,
    wrapped: bool = True,
    text_prefix: str = "model.language_model.",
    packed_experts: bool = True,
    extra_keys: bool = True,
    shards: int = 1,
    dtype: str = "bfloat16",
    head_scale: float = 1.0,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Make a checkpoint in `directory` (created if it is not there) and return it.

    Args:
        directory: where.
        kind: of the feed-forward.
        wrapped: whether `config.json` is the multimodal wrapper around the text config, or the text config itself.
        text_prefix: what the text model's keys begin with: `model.language_model.` as released, or `model.`.
        packed_experts: one tensor of all experts, as released, or one tensor for each.
        extra_keys: add keys of a vision tower and of a multi-token-prediction head, as released.
        shards: how many safetensors files; more than one come with an index.
        dtype: that the weights are stored in.
        head_scale: factor on the head, and so on every logit: 20 makes most top-2 margins confident.
        seed: of the random weights.
        config_overrides: fields of the text config. A depth without `layer_types` gets alternating layers that end
            with full attention.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = text_config(kind, dtype=dtype, **config_overrides)
    tensors = _random_tensors(text, dtype, head_scale, seed)
    if not packed_experts:
        tensors = unpacked(tensors)
    tensors = {_renamed(key, text_prefix): tensor for key, tensor in tensors.items()}
    if extra_keys:
        tensors |= _extra_tensors(text["hidden_size"], dtype)
    write_weights(directory, tensors, shards)
    config = text | {"architectures": [ARCHITECTURES[kind].replace("ConditionalGeneration", "CausalLM")]}
    if wrapped:
        config = {
            "architectures": [ARCHITECTURES[kind]],
            "model_type": text["model_type"].removesuffix("_text"),
            "text_config": text,
            "tie_word_embeddings": text["tie_word_embeddings"],
            "dtype": dtype,
        }
    write_json(directory / "config.json", config)
    for name, content in _tokenizer_files().items():
        (directory / name).write_bytes(content)
    return directory


def text_config(kind: str, **overrides: Any) -> dict[str, Any]:
    """The text config of a kind, with fields replaced."""
    text = TEXT_CONFIGS[kind] | overrides
    layers = text["num_hidden_layers"]
    if "layer_types" not in overrides and layers != COMMON["num_hidden_layers"]:
        text["layer_types"] = ["full_attention" if (layers - i) % 2 else "linear_attention" for i in range(layers)]
    return text


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(directory: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """Write `model.safetensors`, or shards of equal numbers of tensors with their index."""
    from safetensors.torch import save_file

    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return
    keys = sorted(tensors)
    files: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in keys[shard::shards]}
        save_file(part, directory / name, metadata={"format": "pt"})
        files |= dict.fromkeys(part, name)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": {key: files[key] for key in keys}}
    write_json(directory / "model.safetensors.index.json", index)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file in `directory`."""
    from safetensors.torch import load_file

    return {key: tensor for file in sorted(directory.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed experts one by one: `experts.gate_up_proj` [E, 2I, D] to `experts.{e}.gate_proj.weight` [I, D] etc."""
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        head, _, name = key.rpartition(".")
        if name == "gate_up_proj":
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                result[f"{head}.{expert}.gate_proj.weight"] = gate.clone()
                result[f"{head}.{expert}.up_proj.weight"] = up.clone()
        elif head.endswith(".experts") and name == "down_proj":
            result |= {f"{head}.{expert}.down_proj.weight": down.clone() for expert, down in enumerate(tensor)}
        else:
            result[key] = tensor
    return result


def _renamed(key: str, text_prefix: str) -> str:
    return text_prefix + key.removeprefix("model.") if key.startswith("model.") else key


def _random_tensors(text: Mapping[str, Any], dtype: str, head_scale: float, seed: int) -> dict[str, Tensor]:
    """State of transformers' own model of `text`, randomly initialised, gains and decays included."""
    import torch

    from coreai_zoo.checkpoint.tokenizer import quiet_transformers

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(seed)
        config = AutoConfig.for_model(**text)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
        for key, tensor in state.items():
            if key.endswith(("norm.weight", "layernorm.weight", "dt_bias")):
                # transformers initialises them to a constant, with which a lost or swapped gain would not be seen.
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    if text["tie_word_embeddings"]:
        del state["lm_head.weight"]
    head = "model.embed_tokens.weight" if text["tie_word_embeddings"] else "lm_head.weight"
    state[head] *= head_scale
    return {key: tensor.to(getattr(torch, dtype)).contiguous() for key, tensor in state.items()}


def _extra_tensors(hidden_size: int, dtype: str) -> dict[str, Tensor]:
    import torch

    shapes = {
        "model.visual.patch_embed.proj.weight": (8, 3, 2, 4, 4),
        "model.visual.blocks.0.attn.qkv.bias": (24,),
        "mtp.fc.weight": (hidden_size, 2 * hidden_size),
        "mtp.layers.0.input_layernorm.weight": (hidden_size,),
    }
    return {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, shape in shapes.items()}


@functools.cache
def _tokenizer_files() -> Mapping[str, bytes]:
    """A byte-level tokenizer without merges: one token per byte, so that any text has as many tokens as bytes."""
    import tempfile

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from coreai_zoo.checkpoint.tokenizer import quiet_transformers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    with quiet_transformers(), tempfile.TemporaryDirectory() as directory:
        from transformers import PreTrainedTokenizerFast

        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=TURN_END,
            pad_token=END_OF_TEXT,
            chat_template=CHAT_TEMPLATE,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(directory)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def enlarge_stream(weights: dict[str, Tensor], factor: float) -> None:
    """Multiply the residual stream, which no norm sees: a power of two changes nothing else about the model."""
    for key in weights:
        if key.endswith(_WRITE_THE_STREAM):
            weights[key] *= factor
