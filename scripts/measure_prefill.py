"""How far from transformers in fp32 is each form that reads prompts? The tables of docs/contracts.md.

    python scripts/measure_prefill.py

Both samples with plain weights in PyTorch, float16 between operations and between calls as in a bundle, over windows of
the built-in corpus. Some minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import define, evolve
from transformers import AutoModelForCausalLM, DynamicCache

from coreai_zoo.build.design import Design, design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.checkpoint.tokenizer import encode, load_tokenizer
from coreai_zoo.contracts import CHUNKED, STATIC_S1, Contract, Prefill
from coreai_zoo.engine import PREFILL
from coreai_zoo.gate import Activations
from coreai_zoo.gates.corpus import BUILTIN_TEXT, WINDOW
from coreai_zoo.gates.layered import TorchCandidate
from coreai_zoo.gates.oracle import Oracle
from coreai_zoo.gates.rule import judge
from coreai_zoo.gates.weights import CheckpointWeights
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipes import PLAIN
from coreai_zoo.signature import StateSpec

WINDOWS = 4
FORMS: dict[str, Contract] = {
    "single steps": STATIC_S1,
    "16 steps in a row": evolve(CHUNKED, prefill=Prefill(most_tokens=16, chunk=1)),
    **{
        f"chunks of {chunk}": evolve(CHUNKED, prefill=Prefill(most_tokens=256, chunk=chunk))
        for chunk in (16, 32, 64, 128)
    },
}


STATE = "recState"  # [layers, B, heads, Dk, Dv]


@define
class Remembering(TorchCandidate):
    """A candidate that keeps the recurrent states of its last prompts."""

    recurrent: Any = None

    def _state(self, spec: StateSpec, prompts: int, capacity: int) -> torch.Tensor:
        made = super()._state(spec, prompts, capacity)
        if spec.name == STATE:
            self.recurrent = made
        return made


def run(designed: Design, contract: Contract, prompts: list[list[int]]) -> list[tuple[Activations, torch.Tensor]]:
    """Logits of every position by the function of `contract` that reads prompts, and the recurrent states behind."""
    other = designed.with_contract(contract)
    name = PREFILL if contract.prefill else other.decode
    weights = CheckpointWeights("plain weights", other.checkpoint, other.weights)
    candidate = Remembering(other.modules[name], other.weights, other.signatures[name], weights)
    return [(candidate.run(prompt), candidate.recurrent.squeeze(1).float()) for prompt in prompts]


def states_of(directory: Path, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Transformers' recurrent states behind each prompt, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    found = []
    for prompt in prompts:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.tensor([prompt]), past_key_values=cache, use_cache=True)
        layers = [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]
        found.append(torch.cat(layers))
    return found


def rows(entry: str) -> Iterator[str]:
    """A row of the table for each form."""
    request = BuildRequest(entry, sample=True, recipe=PLAIN, output=Path())
    designed = design(request, default_plugins())
    assert designed.source.directory is not None
    tokens = encode(load_tokenizer(designed.source.directory), BUILTIN_TEXT.read_text(encoding="utf-8"))
    prompts = [tokens[at * WINDOW : (at + 1) * WINDOW] for at in range(WINDOWS)]
    oracle = Oracle.of(designed, designed.checkpoint)
    expected = [oracle.run(prompt).logits for prompt in prompts]
    states = states_of(designed.source.directory, prompts)
    for form, contract in FORMS.items():
        found = run(designed, contract, prompts)
        logits = (activations.logits for activations, _ in found)
        verdicts = [judge(*each) for each in zip(prompts, expected, logits, strict=True)]
        apart = [
            ((ours - theirs).norm() / theirs.norm()).item() for (_, ours), theirs in zip(found, states, strict=True)
        ]
        positions = [position for verdict in verdicts for position in verdict.positions]
        error = np.median([position.relative_error for position in positions])
        cosine = min(position.cosine for position in positions)
        divergence = np.mean([position.kl_divergence for position in positions])
        flips = sum(len(verdict.confident_flips) for verdict in verdicts)
        told = f"{error:.2e} | {cosine:.6f} | {divergence:.1e} | {np.median(apart):.1e}"
        yield f"| {form} | {told} | {flips} of {len(positions):,} |"


if __name__ == "__main__":
    for name in ("qwen3.6-27b", "qwen3.6-35b-a3b"):
        print(f"\n{name}, sample\n")
        print("| form | median relative error | lowest cosine | mean KL | error of the states | confident flips |")
        print("|---|---|---|---|---|---|")
        for row in rows(name):
            print(row, flush=True)
