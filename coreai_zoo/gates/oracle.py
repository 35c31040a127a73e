"""The oracle: Hugging Face's own implementation, in fp32, on the checkpoint itself."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coreai_zoo.errors import BadInput, EnvironmentLacks
from coreai_zoo.gates import Activations
from coreai_zoo.machine import available_memory


def run_huggingface(checkpoint: Path, tokens: Sequence[int], hf_config: Mapping[str, Any]) -> Activations:
    """Teacher-forced logits of the whole model, loaded in fp32; `hidden` is left out.

    Args:
        checkpoint: directory of the checkpoint.
        tokens: the prompt.
        hf_config: its config, or that of a slice of it.

    Raises:
        BadInput: when transformers cannot load the checkpoint, or finds a parameter that it does not fill.
        EnvironmentLacks: when the model in fp32 does not fit into memory.
    """
    import torch

    _require_memory(checkpoint)
    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {key: value for key, value in hf_config.items() if key != "model_type"}
        config = AutoConfig.for_model(str(hf_config["model_type"]), **fields)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise BadInput(f"transformers cannot load {checkpoint}: {error}.") from error
        if report["missing_keys"]:
            raise BadInput(f"transformers leaves {len(report['missing_keys'])} parameters of {checkpoint} unfilled.")
        text = model.config.get_text_config()
        routed = getattr(text, "num_experts_per_tok", None)
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            outputs = model.eval()(input_ids=ids, use_cache=False, **({"output_router_logits": True} if routed else {}))
    routers = [layer.float().reshape(len(tokens), -1).numpy() for layer in outputs.router_logits] if routed else None
    return Activations(outputs.logits[0].float().numpy(), router_logits=routers)


def _require_memory(checkpoint: Path) -> None:
    """Refuse a model that fp32 makes too large, before the machine swaps or kills: weights are stored in two bytes."""
    needed = 2 * sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    available = available_memory()
    if available is not None and needed > available:
        raise EnvironmentLacks(
            f"The oracle needs {needed / 2**30:.0f} GiB of memory for {checkpoint} in fp32, and "
            f"{available / 2**30:.0f} GiB are available.",
            "Gate a slice of the model: `zoo build ENTRY --checkpoint DIR --layers N`, then gate that.",
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Import and run transformers without its progress bars and its advice on kernels that are not installed."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    noisy = [logging.getLogger(name) for name in ("torchao", "transformers", "torch.utils._pytree")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.utils import logging as transformers_logging

            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
