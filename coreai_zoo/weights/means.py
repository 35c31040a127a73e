"""Stored values that look as if a transform had been made already: a note, since values alone decide nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator

from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.overlay import Transform
from coreai_zoo.weights.plan import WeightPlan


def unusual_means(checkpoint: Checkpoint, plan: WeightPlan) -> tuple[str, ...]:
    """A note for each transform whose tensors have another mean than they usually have, most of them.

    Vectors are read and nothing larger: of a model with 64 layers these are a few megabytes.
    """
    notes = notes_on_means(plan, lambda key: mean_of(checkpoint, key))
    checkpoint.release()
    return notes


def notes_on_means(plan: WeightPlan, mean: Callable[[str], float]) -> tuple[str, ...]:
    """The notes of `unusual_means`, of means that are known.

    Args:
        plan: the plan.
        mean: of a tensor of the checkpoint, by its key: one of `judged_by_mean`.
    """
    means: dict[Transform, list[float]] = {}
    for transform, key in judged_by_mean(plan):
        means.setdefault(transform, []).append(mean(key))
    notes = (_note(transform, [mean for mean in found if math.isfinite(mean)]) for transform, found in means.items())
    return tuple(note for note in notes if note is not None)


def judged_by_mean(plan: WeightPlan) -> Iterator[tuple[Transform, str]]:
    """The transforms that usually meet a certain mean, each with the key of every vector that it is made of."""
    for tensor in plan.tensors:
        if tensor.transform is not None and tensor.transform.usual_mean is not None and len(tensor.shape) == 1:
            yield from ((tensor.transform, source.key) for source in tensor.sources)


def mean_of(checkpoint: Checkpoint, key: str) -> float:
    """The mean of a vector of the checkpoint."""
    return checkpoint.read_rows(key, 0, 1).double().mean().item()


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
