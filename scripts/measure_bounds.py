"""What the untouched samples show at most, from the transcripts of their gates: the rows of
`coreai_zoo_qwen36/bounds.py`; of a family of your own, those of its plugin.

    for recipe in fp16 int8lin int8hu int8mse uint8.toml whole-range.toml mix68 int4lin; do
        zoo build qwen3.6-27b --sample --recipe $recipe -o out/$recipe       # and qwen3.6-35b-a3b
        for candidate in coreai torch; do
            zoo gate out/$recipe/* --candidate $candidate --allow-weak-prompt -o out/$recipe-$candidate
        done
    done
    python scripts/measure_bounds.py out/*-*/transcript.json

uint8.toml is int8hu with the body in uint8, whole-range.toml with the mlp of layers 2 to -3 in the scheme symmetric.
For the rows of bfloat16 the same with --contract dynamic-bf16; the last column is of these alone.

    python scripts/measure_bounds.py --stress        # the rows of `_STRESS`, some minutes

Prints one row for each class of recipes, arithmetic and kind of model, in the order of `Measured`. Paste them into
`_ROWS`, then the table of `BOUNDS.table()` into docs/gate.md. On the samples that takes some half an hour.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict

from coreai_zoo.bounds import CONFIDENT_MARGIN, GENERAL
from coreai_zoo.build.record import roles_record
from coreai_zoo.catalogue import find_entry
from coreai_zoo.gates.rule import Verdict
from coreai_zoo.gates.stress import StressTest, stress_samples, write_checkpoint
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipes import PLAIN

COLUMNS = ("median", "largest", "near-tie", "1 - cos", "med. KL", "KL", "hidden", "/ control", "flip")


def measures(prompt: Mapping[str, Any]) -> list[float]:
    """The columns for one prompt of a transcript."""
    positions = prompt["positions"]
    firm = [position for position in positions if not position["near_tie"]]
    near = [position for position in positions if position["near_tie"]]
    errors = [position["relative_error"] for position in positions]
    control = [position["control"]["relative_error"] for position in positions if position["control"]]
    return [
        float(np.median(errors)),
        max((position["relative_error"] for position in firm), default=0.0),
        max((position["relative_error"] for position in near), default=0.0),
        max((1 - position["cosine"] for position in firm), default=0.0),
        float(np.median([position["kl_divergence"] for position in positions])),
        max((position["kl_divergence"] for position in firm), default=0.0),
        max(prompt["hidden_error"] or [0.0]),
        float(np.median(errors) / np.median(control)) if control else 0.0,
        max((position["margin"] for position in positions if _flips(position)), default=0.0),
    ]


def _flips(position: Mapping[str, Any]) -> bool:
    return bool(position["oracle"] != position["candidate"] and position["margin"] >= CONFIDENT_MARGIN)


def rows(transcripts: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[float]]:
    """The largest over all prompts that were judged, by class of recipes, arithmetic and kind of model.

    What the decoder shows in PyTorch, its asset may show on the runtime too, whose sums are coarser: fewer prompts run
    there, and it is chance on which of them a router swaps experts.
    """
    found: dict[tuple[str, str, str], list[list[float]]] = defaultdict(list)
    for transcript in transcripts:
        for prompt in transcript["prompts"]:
            if prompt["judged"]:
                bounds = prompt["bounds"]
                kind = "dense" if bounds["router_gap"] is None else "routed"
                found[bounds["name"], bounds["arithmetic"], kind].append(measures(prompt))
    most = {key: np.max(values, axis=0) for key, values in sorted(found.items())}
    for (recipe, arithmetic, kind), row in most.items():
        in_torch = most.get((recipe, "torch", kind))
        if arithmetic == "runtime" and in_torch is not None:
            shown = [name != "hidden" for name in COLUMNS]  # by PyTorch alone
            row[shown] = np.maximum(row, in_torch)[shown]
    return {key: row.tolist() for key, row in most.items()}


def stress_rows() -> Iterator[str]:
    """A row for each stress sample of each shipped sample, the largest over prompts that begin at other places."""
    plugins = default_plugins()
    for name in ("qwen3.6-27b", "qwen3.6-35b-a3b"):
        entry = find_entry(name, plugins)[0]
        for stress in stress_samples(entry, plugins):
            with tempfile.TemporaryDirectory() as work:
                folder = write_checkpoint(entry.sample_directory(), stress, Path(work) / "checkpoint")
                found: dict[tuple[str, str, str], list[list[float]]] = defaultdict(list)
                for place in range(1 if stress.at_once else 4):
                    test = StressTest.open(folder, stress, entry, plugins, skip=place * stress.positions)
                    control = test.compare(test.found(test.designed.with_recipe(PLAIN)))
                    for recipe in dict.fromkeys((PLAIN, stress.recipe)):
                        designed = test.designed.with_recipe(recipe)
                        verdict = control if recipe == PLAIN else test.compare(test.found(designed))
                        precision = designed.contract.compute_dtype
                        bounds = GENERAL.of_recipe(roles_record(designed), test.layers, "torch", test.kind, precision)
                        gap = plugins.gate_bounds(designed.model.overlay).router_gaps[bounds.name]
                        row = _measures_of(verdict, control, gap if test.kind == "routed" else None)
                        found[stress.name, bounds.name, test.kind].append(row)
            for key, values in found.items():
                worst = np.max(values, axis=0).tolist()
                yield f"({', '.join(map(json.dumps, key))}): ({', '.join(f'{value:.2e}' for value in worst)}),"


def _measures_of(verdict: Verdict, control: Verdict, gap: float | None) -> list[float]:
    """The columns for a verdict; near-ties are those of a router gap."""
    return measures(
        {
            "hidden_error": verdict.hidden_error,
            "positions": [
                {
                    **asdict(position),
                    "near_tie": gap is not None and position.near_tie(gap),
                    "control": {"relative_error": other.relative_error},
                }
                for position, other in zip(verdict.positions, control.positions, strict=True)
            ],
        }
    )


def main(paths: list[str]) -> None:
    """Print the rows."""
    if paths == ["--stress"]:
        for stress_row in stress_rows():
            print(stress_row, flush=True)
        return
    if not paths or "-h" in paths or "--help" in paths:
        sys.exit(__doc__)
    print("#", "  ".join(COLUMNS))
    for key, values in rows(json.loads(Path(path).read_text()) for path in paths).items():
        print(f"({', '.join(map(json.dumps, key))}): ({', '.join(f'{value:.2e}' for value in values)}),")


if __name__ == "__main__":
    main(sys.argv[1:])
