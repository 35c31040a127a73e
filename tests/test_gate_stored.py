"""A gate compares every stored value with what the recipe makes of the checkpoint: one wrong value is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import frozen

from command import zoo
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.gates.stored import compare_weights
from coreai_zoo.progress import Reporter
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan
from product_mutants import BODY, HEAD, _stored
from suite import NIGHTLY

ENTRY, ROUTED = "qwen3.6-27b", "qwen3.6-35b-a3b"


def one_more(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The first integer that can be is one larger."""
    changed = values.copy()
    changed[int(np.flatnonzero(values < 100)[0])] += 1
    return changed


def first_scale_doubled(scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([scales[:1] * 2, scales[1:]])


def stored(bundle: Path, out: Path) -> tuple[int, dict[str, Any]]:
    asked = ("--prompts", "digits", "--positions", "2", "--allow-weak-prompt", "--candidate", "torch", "--no-control")
    result = zoo("gate", bundle, *asked, "-o", out, "--json")
    (found,) = json.loads(result.stdout)["gates"]
    assert found["gate"] == "weights"
    return result.exit_code, found


@pytest.mark.parametrize(
    ("constant", "dtype", "change", "told"),
    [
        (f"{HEAD}.original", "int8", one_more, "lm_head.weight has 1 of 163,840 other values"),
        (f"{BODY}.0.scales", "float16", first_scale_doubled, "mlp.up_proj.weight has 32 of 61,440 other values"),
        ("model.embed_tokens.weight", "float16", lambda table: np.roll(table, 160), "embed_tokens.weight has "),
    ],
    ids=["one integer", "one scale", "rows one late"],
)
def test_a_wrong_value_fails_the_gate_by_the_name_of_its_tensor(
    constant: str,
    dtype: str,
    change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
    told: str,
    built: Callable[[str, str], Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = built(ENTRY, "int8hu").directory
    copy = tmp_path / original.name
    shutil.copytree(original, copy)
    _stored(constant, dtype, change)(copy, monkeypatch)
    code, found = stored(copy, tmp_path / "out")
    assert code == 1
    assert not found["passed"]
    assert told in found["summary"]


@frozen
class Rows:
    """A parameter of ten rows, of which one may be another."""

    name: str = "rows"
    wrong: int | None = None

    def read_rows(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(torch.arange(start, stop, dtype=torch.float32)[:, None].expand(-1, 8))
        if self.wrong is not None and start <= self.wrong < stop:
            out[self.wrong - start, -1] += 1


@pytest.mark.parametrize("row", [0, 3, 4, 9])
def test_of_a_matrix_that_is_read_in_pieces_every_row_is_compared(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coreai_zoo.gates.stored.chunk_rows", lambda _columns: 4)
    plan = WeightPlan((PlannedTensor("w", "mlp", (10, 8), "float16", None, None, ()),), ())

    found = [compare_weights(plan, Rows(wrong=wrong), Rows(), Reporter(silent=True)).summary for wrong in (None, row)]

    assert found == [
        "all 80 are what the recipe makes of the checkpoint",
        "not what the recipe makes of the checkpoint: w has 1 of 80 other values",
    ]


# Every quantizing recipe; by night each on both samples.
BY_DAY = [
    (ENTRY, "int8hu"),
    (ROUTED, "int4lin"),
    (ENTRY, "int8mse"),
    (ENTRY, "int4hu8"),
    (ROUTED, "mix68"),
]
BY_NIGHT = [(entry, recipe) for entry in (ENTRY, ROUTED) for _, recipe in BY_DAY]


@pytest.mark.parametrize(("entry", "recipe"), BY_NIGHT if NIGHTLY else BY_DAY)
def test_what_was_built_has_no_other_value(
    entry: str, recipe: str, built: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    code, found = stored(built(entry, recipe).directory, tmp_path)
    assert found["passed"], found["summary"]
    assert found["summary"].startswith("all 2,9" if entry == ENTRY else "all 2,")
    assert code == 0 or recipe.startswith("int4")
    # And by its name, on the real runtime.
    result = zoo("verify", built(entry, recipe).directory, "--json")
    assert result.exit_code == 0, result.output
