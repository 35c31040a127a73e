"""The contract that computes in bfloat16: what it declares, what its decoder computes, and what it is there for.

Bundles of it are played in tests/test_contracts.py, and the mutants of the gate are run in it in
tests/test_mutants.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from attack import ENTRIES
from checkpoints import enlarge_stream, text_config
from coreai_zoo.bounds import BFLOAT16_MARGIN, CONFIDENT_MARGIN, Measured, MeasuredBounds
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.contracts import CONTRACTS, DYNAMIC, DYNAMIC_BF16, STATIC_S1
from coreai_zoo.gate import Activations
from coreai_zoo.gates.headroom import headroom
from coreai_zoo.gates.oracle import Oracle
from coreai_zoo.gates.rule import Verdict, compare
from coreai_zoo.gates.stress import prompt_of, write_checkpoint
from coreai_zoo.plugins import default_plugins
from decoders import OVERLAY, feed, fresh_states, load_decoder, signature
from mutants import BOTH
from test_stress import sample_of


def sample(kind: str) -> Path:
    return find_entry(ENTRIES[kind], default_plugins())[0].sample_directory()


def verdict(folder: Path, tokens: list[int], logits: torch.Tensor) -> Verdict:
    """Against transformers in float32."""
    checkpoint = Checkpoint.open(folder)
    oracle = Oracle(checkpoint, checkpoint.config).run(tokens)
    return compare(tokens, oracle, Activations(logits.float().numpy()), sure_from=BFLOAT16_MARGIN)


def median_error(found: Verdict) -> float:
    return float(np.median([position.relative_error for position in found.positions]))


@pytest.mark.parametrize("kind", BOTH)
def test_everything_is_bfloat16_but_what_an_engine_reads_and_what_is_float32_by_nature(kind: Any) -> None:
    config = OVERLAY.read_config(text_config(kind))
    spec = signature(config, DYNAMIC_BF16)
    assert {state.dtype for state in spec.states} == {"bfloat16"}
    assert [output.dtype for output in spec.outputs] == ["float16"]
    halves, wide = (OVERLAY.parameters(config, contract) for contract in (DYNAMIC, DYNAMIC_BF16))
    assert halves.keys() == wide.keys()
    assert {(halves[name].dtype, wide[name].dtype) for name in wide} == {
        ("float16", "bfloat16"),
        ("float32", "float32"),
    }
    shared = ("name", "summary", "compute_dtype")
    assert evolve(DYNAMIC_BF16, **{name: getattr(DYNAMIC, name) for name in shared}) == DYNAMIC
    assert CONTRACTS[DYNAMIC_BF16.name] is DYNAMIC_BF16


@pytest.mark.parametrize("kind", BOTH)
def test_the_decoder_is_as_near_to_transformers_as_transformers_is_in_bfloat16(kind: str, tmp_path: Path) -> None:
    folder = sample(kind)
    tokens = list(prompt_of(folder, 48))
    checkpoint = Checkpoint.open(folder)
    theirs = Oracle(checkpoint, checkpoint.config, dtype="bfloat16").run(tokens).logits
    for pieces in ((), (5, 6, 40)):  # single steps, and a call of any length
        contract = evolve(STATIC_S1 if not pieces else DYNAMIC_BF16, compute_dtype="bfloat16")
        module, spec = load_decoder(
            folder, tmp_path / "store", dtype=None, contract=contract, rewritten=not pieces, recipe="fp16"
        )
        logits = feed(module, tokens, fresh_states(spec), *pieces)
        assert logits.dtype == torch.float16
        ours = verdict(folder, tokens, logits)
        reference = verdict(folder, tokens, torch.from_numpy(theirs))
        assert ours.passed and reference.passed
        assert 0.002 < median_error(ours) < 1.5 * median_error(reference), "bfloat16 shows, and no more than theirs"


@pytest.mark.parametrize("kind", BOTH)
def test_what_overflows_half_precision_is_computed(kind: str, tmp_path: Path) -> None:
    large = sample_of(kind, "large-activations")

    def larger(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        large.change(weights, config)
        enlarge_stream(weights, 64.0)

    folder = write_checkpoint(sample(kind), evolve(large, change=larger), tmp_path / "larger")
    tokens = list(prompt_of(folder, 16))
    logits = {}
    for dtype in ("float16", "bfloat16"):
        contract = evolve(STATIC_S1, compute_dtype=dtype)
        module, spec = load_decoder(folder, tmp_path / dtype, dtype=None, contract=contract)
        logits[dtype] = feed(module, tokens, fresh_states(spec))
    assert not torch.isfinite(logits["float16"]).all()
    found = verdict(folder, tokens, logits["bfloat16"])
    assert found.passed and median_error(found) < 0.05


def test_headroom_is_told_of_half_precision_alone() -> None:
    peaks: list[dict[str, float] | None] = [{"a stream": 60_000.0}]
    assert headroom(peaks)[0].little
    assert headroom(peaks, "bfloat16") == () == headroom(peaks, "float32")
    assert math.isinf(torch.tensor(70_000.0).half().item()) and torch.tensor(70_000.0).bfloat16().isfinite()


def test_a_flip_needs_a_larger_margin_to_be_an_error() -> None:
    # Eight times the margin, for half precision has eight times the steps between two powers of two.
    steps = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float16).eps
    assert steps == 8 and steps * CONFIDENT_MARGIN == BFLOAT16_MARGIN
    row = Measured(0.001, 0.002, 0, 1e-5, 1e-6, 1e-5, 0.001, 1.0, flip_margin=0.6)
    rows = {("int8-bf16", "torch", "dense"): row, ("bf16", "torch", "dense"): evolve(row, flip_margin=0.2)}
    measured = MeasuredBounds("a model", 4, rows, {})
    assert [measured.of_class(name, "torch").margin for name in ("int8-bf16", "bf16", "fp16")] == [1.2, 0.8, 0.1]
    with pytest.raises(ValueError, match=r"int8 compute in half precision, whose margin is 0\.1"):
        MeasuredBounds("a model", 4, {("int8", "torch", "dense"): row}, {})


def test_logits_are_what_the_engine_reads_and_without_one_what_is_computed_in() -> None:
    for engine, dtype in ((STATIC_S1.engine, "float16"), (None, "bfloat16")):
        contract = evolve(STATIC_S1, compute_dtype="bfloat16", engine=engine)
        assert contract.logits_dtype == dtype
