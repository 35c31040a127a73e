"""Take a few mutants all the way: lower them to a real bundle and gate both candidates.

    PYTHONPATH=tests python scripts/lower_mutants.py

tests/test_mutants.py runs every mutant in PyTorch, which takes half a second each; lowering one takes most of a minute.
This shows for a few of them, and for the untouched sample, that the runtime and the torch candidate on the bundle's own
weights come to the same verdict. It prints a row for each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from attrs import evolve

from attack import UNTOUCHED, Outcome, Target
from coreai_zoo.backend import Backend
from coreai_zoo.bounds import Arithmetic
from coreai_zoo.build.design import design
from coreai_zoo.build.pipeline import build
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.gate import Model
from coreai_zoo.gates.bounds import check_bounds
from coreai_zoo.gates.candidate import AssetCandidate
from coreai_zoo.gates.layered import TorchCandidate
from coreai_zoo.gates.weights import AssetWeights
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipes import RECIPES
from coreai_zoo_qwen36.bounds import BOUNDS as SAMPLES
from mutants import MUTANTS, Mutant, applied

ENTRY = "qwen3.6-27b"
NAMES = ("attention-gate-left-out", "gva-tiled", "decay-sign", "conv-state-after-activation")
# Declared as the recipe that ships, lowered as another.
COARSER = evolve(MUTANTS["int4-as-int8"], recipe=RECIPES["int4lin"])
POSITIONS = 16


def gate(mutant: Mutant, target: Target, folder: Path) -> dict[str, Outcome]:
    """Build the sample with the mutant in force and judge both candidates, by the bounds of what it claims to be."""
    plugins = default_plugins()
    request = BuildRequest(ENTRY, sample=True, recipe=mutant.recipe.name, output=folder)
    with applied(mutant):
        bundle = Bundle.open(build(request, plugins).path)
        resolved = design(request, plugins)
        backend: Backend = resolved.backend
        weights = AssetWeights.open(bundle.asset, backend, "main", resolved.modules["main"], resolved.weights)
        candidates: dict[Arithmetic, Model] = {
            "runtime": AssetCandidate(bundle, backend),
            "torch": TorchCandidate(resolved.modules["main"], resolved.weights, resolved.signatures["main"], weights),
        }
        found = {}
        for arithmetic, candidate in candidates.items():
            verdict = target.compare(candidate.run(target.tokens))
            roles = dict(RECIPES["int8hu"].specs if mutant.declared else mutant.recipe.specs)
            stored = {role: None if spec is None else {"dtype": spec.dtype} for role, spec in roles.items()}
            bounds = SAMPLES.of_recipe(stored, len(target.config.layer_types), arithmetic, target.bounds_kind)
            found[arithmetic] = Outcome(verdict, check_bounds(verdict, bounds))
    return found


def main() -> None:
    """Lower, judge, print; exit with an error when a verdict is wrong."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    wrong = []
    print("| bundle | coreai | torch |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        target = Target("dense", Path(scratch) / "stores", positions=POSITIONS)
        for mutant in (UNTOUCHED, *(MUTANTS[name] for name in NAMES), COARSER):
            outcomes = gate(mutant, target, Path(scratch) / mutant.name)
            cells = []
            for outcome in outcomes.values():
                caught = outcome.caught_by
                cells.append("passes" if caught is None else f"{caught}: {outcome.evidence}")
                if (caught is None) != (mutant is UNTOUCHED):
                    wrong.append(mutant.name)
            print(f"| `{mutant.name}` | {' | '.join(cells)} |", flush=True)
    if wrong:
        sys.exit(f"wrong verdicts: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
