"""Adapters of PEFT: changes to a model that are kept apart from it. A bundle is made of merged weights only."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from coreai_zoo.checkpoint.strict_json import read_object
from coreai_zoo.errors import BadInput, listing

ADAPTER_CONFIG = "adapter_config.json"
# PEFT's, what LLaVA's trainer saves beside them, and mlx-lm's.
ADAPTER_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "non_lora_trainables.safetensors",
    "adapters.safetensors",
)

# What PEFT puts into the names of a model that it holds together with its adapters.
_UNMERGED = re.compile(
    r"(.*\.)?(base_layer|lora_(A|B|embedding_A|embedding_B|magnitude_vector)|modules_to_save|original_module)(\..*)?"
)


def adapter_files(names: Collection[str]) -> list[str]:
    """Which of the files of a folder are an adapter's."""
    return [name for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS) if name in names]


def adapter_alone(where: str, files: Collection[str], config: Path) -> BadInput:
    """The error for an adapter without the model that it is for.

    Args:
        where: its folder or repository.
        files: its files.
        config: its `adapter_config.json`, which may be missing.
    """
    base = read_object(config).get("base_model_name_or_path") if config.is_file() else None
    of = f" of {base}" if isinstance(base, str) and base else ""
    return BadInput(
        f"{where} holds an adapter{of} ({listing(sorted(files))}) and no model.",
        "Merge it into its base first, in Python with peft: `from peft import AutoPeftModelForCausalLM`; "
        f"`model = AutoPeftModelForCausalLM.from_pretrained({where!r}).merge_and_unload()`; "
        "`model.save_pretrained('merged')`. Then copy the tokenizer's files to `merged`, and build that.",
    )


def adapter_note(files: Collection[str]) -> tuple[str, ...]:
    """What to note of an adapter beside a whole model."""
    return (f"an adapter is there ({listing(sorted(files))}) and is not applied: the model is built without it",)


def refuse_unmerged(where: str, keys: Iterable[str]) -> None:
    """Refuse a model that was saved together with adapters that are not merged into it.

    Raises:
        BadInput: naming some of the tensors.
    """
    if unmerged := [key for key in keys if _UNMERGED.fullmatch(key)]:
        raise BadInput(
            f"{where} holds a model with an adapter that is not merged into it: {listing(sorted(unmerged), 4)}.",
            "Merge it where it was trained, in Python with peft: `model = model.merge_and_unload()`; "
            "`model.save_pretrained('merged')`. Then build `merged`.",
        )
