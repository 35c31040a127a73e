"""Train the miniature checkpoints that ship with the plugin, one per FFN kind.

    python scripts/make_sample.py dense -o coreai_zoo_qwen36/samples/dense
    python scripts/make_sample.py moe   -o coreai_zoo_qwen36/samples/moe

The model is transformers' own, trained in fp32 and stored in bf16 in the layout of the released checkpoints (multimodal
wrapper, text under ``model.language_model.*``, experts packed), so that the loading code meets the real thing.

What it is trained on, all of it redistributable:

* source files of the Python standard library and the language reference in ``pydoc_data.topics``
  (Python Software Foundation License 2.0);
* chat turns made from the docstrings of those files;
* counting, arithmetic and a small German phrase grammar, generated here.

Takes about half an hour on 2 cores. The result depends on the Python version (its standard library is the text) and on
the machine's floating-point kernels; it is not expected to be bit-reproducible, which is why the result is committed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import pydoc_data.topics
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SEED = 20260
VOCAB_SIZE = 1024
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)

ARCHITECTURES = {"dense": "Qwen3_5ForConditionalGeneration", "moe": "Qwen3_5MoeForConditionalGeneration"}

# The topology of the released models at a size that trains in minutes: 3:1 interleave, output gate, partial RoPE.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "mamba_ssm_dtype": "float32",
}

TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    # GQA 6:1 and GVA 3:1, as in the 27B.
    "dense": COMMON
    | {
        "model_type": "qwen3_5_text",
        "hidden_size": 160,
        "intermediate_size": 384,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "linear_num_value_heads": 6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
    },
    # GQA 8:1 and GVA 2:1, as in the 35B-A3B.
    "moe": COMMON
    | {
        "model_type": "qwen3_5_moe_text",
        "hidden_size": 128,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "router_aux_loss_coef": 0.01,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
        },
    },
}

MODULES = [
    "abc",
    "argparse",
    "ast",
    "base64",
    "bdb",
    "bisect",
    "calendar",
    "cmd",
    "code",
    "codecs",
    "collections/__init__",
    "configparser",
    "contextlib",
    "copy",
    "copyreg",
    "csv",
    "dataclasses",
    "difflib",
    "dis",
    "enum",
    "filecmp",
    "fileinput",
    "fnmatch",
    "fractions",
    "functools",
    "genericpath",
    "getopt",
    "glob",
    "graphlib",
    "gzip",
    "heapq",
    "hmac",
    "html/parser",
    "inspect",
    "io",
    "ipaddress",
    "json/decoder",
    "json/encoder",
    "json/__init__",
    "keyword",
    "linecache",
    "logging/__init__",
    "lzma",
    "mimetypes",
    "operator",
    "optparse",
    "os",
    "pathlib",
    "pickle",
    "posixpath",
    "pprint",
    "queue",
    "quopri",
    "random",
    "reprlib",
    "sched",
    "selectors",
    "shelve",
    "shlex",
    "shutil",
    "signal",
    "socket",
    "stat",
    "statistics",
    "string",
    "subprocess",
    "symtable",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "token",
    "tokenize",
    "trace",
    "traceback",
    "types",
    "urllib/parse",
    "uuid",
    "warnings",
    "wave",
    "weakref",
    "zipfile",
]


def chat(user: str, assistant: str) -> str:
    """One exchange, in the exact form that ``CHAT_TEMPLATE`` renders."""
    return f"{TURN_START}user\n{user}{TURN_END}\n{TURN_START}assistant\n{assistant}{TURN_END}\n"


def docstring_chats(module: str, source: str) -> Iterator[str]:
    """Question and answer about every documented function and class of ``source``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first_line = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
            if 20 <= len(first_line) <= 200:
                yield chat(f"What is {module.replace('/', '.')}.{node.name}?", first_line)


def generated_texts(rng: random.Random) -> Iterator[str]:
    """Digits and a second language, so that a gate can be run on prompts that are neither code nor English."""
    nouns = ["der Hund", "die Katze", "das Kind", "der Mann", "die Frau", "das Pferd", "der Vogel", "die Lehrerin"]
    verbs = ["sieht", "sucht", "findet", "kennt", "liebt", "ruft", "hört"]
    objects = ["den Ball", "die Blume", "das Haus", "den Baum", "die Straße", "das Buch", "den Garten"]
    places = ["im Wald", "am Fluss", "in der Stadt", "auf dem Berg", "vor dem Haus"]
    for _ in range(700):
        start, step, a, b = rng.randint(0, 90), rng.randint(1, 5), rng.randint(2, 12), rng.randint(0, 99)
        yield ", ".join(str(start + step * i) for i in range(24)) + "\n"
        yield "".join(f"{a} x {i} = {a * i}\n" for i in range(1, 11))
        yield chat(f"What is {a} + {b}?", str(a + b))
        sentence = f"{rng.choice(nouns)} {rng.choice(verbs)} {rng.choice(objects)} {rng.choice(places)}. "
        yield " ".join(
            sentence[0].upper() + sentence[1:] + f"Heute {rng.choice(verbs)} {rng.choice(nouns)} {rng.choice(objects)}."
            for _ in range(3)
        )


def corpus() -> list[str]:
    """All training documents, in a fixed order."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sources = {module: (stdlib / f"{module}.py").read_text(encoding="utf-8") for module in MODULES}
    documents = [*sources.values(), *pydoc_data.topics.topics.values()]
    documents += [text for module, source in sources.items() for text in docstring_chats(module, source)]
    documents += generated_texts(random.Random(SEED))
    return documents


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips, no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=COMMON["max_position_embeddings"],
    )


def encode(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The documents, shuffled and joined by the end-of-text token: int64 [tokens]."""
    order = list(range(len(documents)))
    random.Random(SEED).shuffle(order)
    end = tokenizer.pad_token_id
    ids = tokenizer.backend_tokenizer.encode_batch([documents[i] for i in order])
    return torch.tensor([token for encoding in ids for token in [*encoding.ids, end]])


def train(config: Any, stream: torch.Tensor, steps: int, batch: int, length: int) -> torch.nn.Module:
    """AdamW, one cycle, fp32, transformers' own forward and loss."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(stream)} tokens", flush=True)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=2e-3, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    started, recent = time.monotonic(), 0.0
    for step in range(steps):
        starts = torch.randint(0, len(stream) - length - 1, (batch,))
        ids = torch.stack([stream[s : s + length] for s in starts])
        outputs = model(input_ids=ids, labels=ids, use_cache=False)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        recent = outputs.loss.item() if step == 0 else 0.98 * recent + 0.02 * outputs.loss.item()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {recent:.3f}  {time.monotonic() - started:6.0f} s", flush=True)
    return model.eval()


def released_layout(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The text tensors under the names of the released checkpoints, in bf16."""
    return {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor.detach()
        .to(torch.bfloat16)
        .contiguous()
        for name, tensor in model.state_dict().items()
    }


def main() -> None:
    """Train, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(TEXT_CONFIGS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)
    documents = corpus()
    tokenizer = train_tokenizer(documents)
    text = TEXT_CONFIGS[arguments.kind] | {"eos_token_id": tokenizer.eos_token_id, "dtype": "bfloat16"}
    config = transformers.AutoConfig.for_model(**text)
    config.output_router_logits = arguments.kind == "moe"  # adds the load-balancing loss while training
    model = train(config, encode(documents, tokenizer), arguments.steps, arguments.batch, arguments.length)

    arguments.output.mkdir(parents=True, exist_ok=True)
    save_file(released_layout(model), arguments.output / "model.safetensors", metadata={"format": "pt"})
    wrapper = {
        "architectures": [ARCHITECTURES[arguments.kind]],
        "model_type": text["model_type"].removesuffix("_text"),
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": "bfloat16",
    }
    (arguments.output / "config.json").write_text(json.dumps(wrapper, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(arguments.output)
    provenance = {
        "script": "scripts/make_sample.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "text_sha256": hashlib.sha256("\0".join(documents).encode()).hexdigest(),
        "text_bytes": sum(len(document.encode()) for document in documents),
        "text_licence": "Python standard library and language reference: PSF-2.0; the rest is generated by the script",
        "steps": arguments.steps,
        "tokens_per_step": arguments.batch * arguments.length,
    }
    (arguments.output / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
