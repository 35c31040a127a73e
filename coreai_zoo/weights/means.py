"""Stored values that look as if a transform had been made already: a note, since values alone decide nothing."""

from __future__ import annotations

import math
import statistics

from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.overlay import Transform
from coreai_zoo.weights.plan import WeightPlan


def unusual_means(checkpoint: Checkpoint, plan: WeightPlan) -> tuple[str, ...]:
    """A note for each transform whose tensors have another mean than they usually have, most of them.

    Vectors are read and nothing larger: of a model with 64 layers these are a few megabytes.
    """
    means: dict[Transform, list[float]] = {}
    for tensor in plan.tensors:
        if tensor.transform is not None and tensor.transform.usual_mean is not None and len(tensor.shape) == 1:
            for source in tensor.sources:
                mean = checkpoint.read_rows(source.key, 0, 1).double().mean().item()
                means.setdefault(tensor.transform, []).append(mean)
    checkpoint.release()
    notes = (_note(transform, [mean for mean in found if math.isfinite(mean)]) for transform, found in means.items())
    return tuple(note for note in notes if note is not None)


def _note(transform: Transform, means: list[float]) -> str | None:
    assert transform.usual_mean is not None
    low, high = transform.usual_mean
    median = statistics.median(means) if means else low
    if low <= median <= high:
        return None
    return (
        f"the {len(means)} vectors that become {transform.name} have a mean of about {median:.2f}, which is usually "
        f"between {low:g} and {high:g}: the change may have been made already, as conversions for MLX do. They are "
        "read as they are"
    )
