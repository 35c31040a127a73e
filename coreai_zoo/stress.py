"""Stress samples: a shipped sample whose weights are changed so that a mistake in one step of its arithmetic shows.

A trained miniature is kind: its activations are far above every eps, its decays forget a wrong digit within some
tokens, its scores are small. What rounds wrongly there stays below what half precision rounds anyway. A stress sample
is another model, made of the same weights, in which one such step carries the result. transformers runs it as it runs
the sample, so its answer remains the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from attrs.validators import ge, instance_of, is_callable, matches_re, min_len

from coreai_zoo.bounds import MeasuredBounds
from coreai_zoo.recipes import PLAIN

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[["dict[str, Tensor]", dict[str, Any]], None]
"""Changes a checkpoint in place: its tensors in float32 by key, and the content of its `config.json`."""


@frozen
class StressSample:
    """A change of a sample, and the errors that a faithful decoder makes on the result.

    Attributes:
        name: in kebab case.
        reason: what only shows here, for whoever reads a report.
        change: makes it of the sample's checkpoint. The same every time: a random choice is seeded.
        bounds: what the untouched decoder was measured to do on it, in PyTorch. A row for `fp16`, and one for the class
            of the recipe where that is another.
        recipe: how its weights are stored. Nothing is quantized as a rule, for integers round more than half precision.
        positions: how many tokens are run.
        first: the first position that is judged.
        at_once: whether the decoder takes all tokens in one call, in the form that a contract without a fixed query
            length has: where they are so many that single steps would take minutes.
    """

    name: str = field(validator=matches_re(r"[a-z0-9]+(-[a-z0-9]+)*"))
    reason: str = field(validator=min_len(1))
    change: Change = field(validator=is_callable())
    bounds: MeasuredBounds = field(validator=instance_of(MeasuredBounds))
    recipe: str = PLAIN
    positions: int = field(default=32, validator=ge(1))
    first: int = field(default=0, validator=ge(0))
    at_once: bool = False

    def __attrs_post_init__(self) -> None:
        if not any(name == PLAIN for name, _arithmetic, _kind in self.bounds.rows):
            raise ValueError(f"the bounds have no row for {PLAIN}, which every stress sample is held to")
        if self.first >= self.positions:
            raise ValueError(f"of {self.positions} positions none is left from position {self.first} on")
