"""How far from transformers in fp32 is each form that reads prompts? The tables of docs/contracts.md.

    python scripts/measure_prefill.py

Both samples with plain weights in PyTorch, float16 between operations and between calls as in a bundle, over windows of
the built-in corpus. Some minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from attrs import evolve

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

WINDOWS = 4
FORMS: dict[str, Contract] = {
    "single steps": STATIC_S1,
    "16 steps in a row": evolve(CHUNKED, prefill=Prefill(most_tokens=16, chunk=1)),
    **{
        f"chunks of {chunk}": evolve(CHUNKED, prefill=Prefill(most_tokens=256, chunk=chunk))
        for chunk in (16, 32, 64, 128)
    },
}


def run(designed: Design, contract: Contract, prompts: list[list[int]]) -> list[Activations]:
    """Logits of every position by the function of `contract` that reads prompts."""
    other = designed.with_contract(contract)
    name = PREFILL if contract.prefill else other.decode
    weights = CheckpointWeights("plain weights", other.checkpoint, other.weights)
    return TorchCandidate(other.modules[name], other.weights, other.signatures[name], weights).run_many(prompts)


def rows(entry: str) -> Iterator[str]:
    """A row of the table for each form."""
    request = BuildRequest(entry, sample=True, recipe=PLAIN, output=Path())
    designed = design(request, default_plugins())
    assert designed.source.directory is not None
    tokens = encode(load_tokenizer(designed.source.directory), BUILTIN_TEXT.read_text(encoding="utf-8"))
    prompts = [tokens[at * WINDOW : (at + 1) * WINDOW] for at in range(WINDOWS)]
    oracle = Oracle.of(designed, designed.checkpoint)
    expected = [oracle.run(prompt).logits for prompt in prompts]
    for form, contract in FORMS.items():
        found = run(designed, contract, prompts)
        verdicts = [judge(*each) for each in zip(prompts, expected, (each.logits for each in found), strict=True)]
        positions = [position for verdict in verdicts for position in verdict.positions]
        error = np.median([position.relative_error for position in positions])
        cosine = min(position.cosine for position in positions)
        divergence = np.mean([position.kl_divergence for position in positions])
        flips = sum(len(verdict.confident_flips) for verdict in verdicts)
        yield f"| {form} | {error:.2e} | {cosine:.6f} | {divergence:.1e} | {flips} of {len(positions):,} |"


if __name__ == "__main__":
    for name in ("qwen3.6-27b", "qwen3.6-35b-a3b"):
        print(f"\n{name}, sample\n")
        print("| form | median relative error | lowest cosine | mean KL | confident flips |\n|---|---|---|---|---|")
        for row in rows(name):
            print(row, flush=True)
