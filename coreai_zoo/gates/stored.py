"""Are the weights of an asset those of its checkpoint, value for value?

Bounds are as wide as the coarsest integers of a recipe need, and a wrong value in a finer tensor may hide below them.
So each value that the asset computes with is compared with what the recipe makes of the checkpoint, all of them and
exactly: what is left for the bounds is what the decoder does with them.
"""

from __future__ import annotations

import torch

from coreai_zoo.errors import listing
from coreai_zoo.gate import GateResult
from coreai_zoo.gates.weights import WeightSource
from coreai_zoo.progress import Reporter
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan
from coreai_zoo.weights.quantizer import chunk_rows, workers

NAME = "weights"
"""Of the gate, in reports."""

_SHOWN = 4


def compare_weights(plan: WeightPlan, asset: WeightSource, checkpoint: WeightSource, report: Reporter) -> GateResult:
    """The verdict on every value of every parameter.

    Args:
        plan: the parameters.
        asset: their values out of the asset.
        checkpoint: the same made of the checkpoint.
        report: is told of the stage.
    """
    detail = f"{len(plan.tensors)} tensors, each value against the checkpoint"
    with report.stage(NAME, detail), report.steps("", len(plan.tensors)) as count:
        differing = []
        for tensor in plan.tensors:
            values = _differing(tensor, asset, checkpoint)
            if values:
                differing.append(f"{tensor.name} has {values:,} of {tensor.parameters:,} other values")
            count()
    if differing:
        summary = f"not what the recipe makes of the checkpoint: {listing(differing, _SHOWN, '; ')}"
        return GateResult(NAME, passed=False, summary=summary)
    values = sum(tensor.parameters for tensor in plan.tensors)
    return GateResult(NAME, passed=True, summary=f"all {values:,} are what the recipe makes of the checkpoint")


def _differing(tensor: PlannedTensor, asset: WeightSource, checkpoint: WeightSource) -> int:
    """How many values of a parameter differ; rows are read on all cores."""
    step, rows = chunk_rows(tensor.format.columns), tensor.format.rows

    def count(start: int) -> int:
        stop = min(start + step, rows)
        found, expected = (
            torch.empty(stop - start, tensor.format.columns, dtype=getattr(torch, tensor.dtype)) for _ in range(2)
        )
        asset.read_rows(tensor.name, start, stop, found)
        checkpoint.read_rows(tensor.name, start, stop, expected)
        return int((found != expected).sum())

    return sum(workers().map(count, range(0, rows, step)))
