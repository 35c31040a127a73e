"""transformers the ordinary way: the whole model, loaded by `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.gate import Activations


def whole_model(directory: Path, tokens: Sequence[int], hf_config: Mapping[str, Any]) -> Activations:
    """Teacher-forced logits, hidden states (the last one normed, as transformers has it) and router logits in fp32."""
    import torch

    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {key: value for key, value in hf_config.items() if key != "model_type"}
        config = AutoConfig.for_model(str(hf_config["model_type"]), **fields)
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        assert not report["missing_keys"]
        routed = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
        options = {"output_router_logits": True} if routed else {}
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            outputs = model.eval()(input_ids=ids, use_cache=False, output_hidden_states=True, **options)
    routers = [layer.reshape(len(tokens), -1).numpy() for layer in outputs.router_logits] if routed else None
    return Activations(outputs.logits[0].numpy(), [state[0].numpy() for state in outputs.hidden_states], routers)
