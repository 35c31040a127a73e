"""How fast a chip could read a prompt with a bundle: bounds from a design and the chip's published rates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from attrs import frozen

from coreai_zoo.backend import reading_calls
from coreai_zoo.build.chips import GB, Chip
from coreai_zoo.build.figures import Figures
from coreai_zoo.engine import PREFILL
from coreai_zoo.overlay import HasOperationCount

_TERA = 10**12


@frozen
class Call:
    """One call of a function on the way through a prompt.

    Attributes:
        tokens: how many it takes.
        bytes: bytes of weights that it reads, each of them once.
        operations: floating-point operations: two for each weight and token, and what the overlay counts beside.
    """

    tokens: int
    bytes: int
    operations: int


@frozen
class Reading:
    """A prompt that is read on a chip, if nothing but its memory and its arithmetic takes time.

    Attributes:
        tokens: of the prompt.
        memory_seconds: for the weights of all calls, at the whole bandwidth.
        arithmetic_seconds: for the operations of all calls, at the whole rate; None where that is not known.
        seconds: of all calls one after the other, each as long as its slower one of the two: the earliest time of a
            first token. None where the arithmetic is not known, for the memory alone would make a chip look better
            than one of which both are known.
    """

    tokens: int
    memory_seconds: float
    arithmetic_seconds: float | None
    seconds: float | None

    @property
    def bandwidth_bound(self) -> float:
        """Tokens per second if only the memory took time."""
        return self.tokens / self.memory_seconds

    @property
    def compute_bound(self) -> float | None:
        """Tokens per second if only arithmetic took time; None where the chip's is not known."""
        return None if self.arithmetic_seconds is None else self.tokens / self.arithmetic_seconds

    @property
    def bound(self) -> float | None:
        """Tokens per second at the most; None where the arithmetic is not known."""
        return None if self.seconds is None else self.tokens / self.seconds


def prompt_calls(figures: Figures, tokens: int) -> tuple[Call, ...]:
    """The calls by which an engine reads a prompt of so many tokens: those of `prefill`, and what is decoded."""
    signatures = figures.design.signatures
    lengths = reading_calls(signatures, tokens)
    weights = {
        (function, length): (figures.read_by(length, head=head), figures.products(length, head=head))
        for function, length in dict.fromkeys(lengths)
        for head in (bool(signatures[function].outputs),)
    }
    ends = accumulate(length for _, length in lengths)
    return tuple(
        Call(call[1], weights[call][0], weights[call][1] + _operations(figures, *call, end))
        for call, end in zip(lengths, ends, strict=True)
    )


def counts_operations(figures: Figures) -> bool:
    """Whether more than the products with weights is counted."""
    return isinstance(figures.design.model.overlay, HasOperationCount)


def _operations(figures: Figures, function: str, tokens: int, positions: int) -> int:
    overlay = figures.design.model.overlay
    if not isinstance(overlay, HasOperationCount):
        return 0
    prefill = figures.design.contract.prefill if function == PREFILL else None
    return overlay.operations(figures.design.model.config, prefill, tokens, positions)


def read_on(chip: Chip, calls: Sequence[Call]) -> Reading:
    """A prompt, given by its calls, on a chip."""
    memory = [call.bytes / (chip.bandwidth * GB) for call in calls]
    arithmetic = None if chip.tflops is None else [call.operations / (chip.tflops * _TERA) for call in calls]
    return Reading(
        tokens=sum(call.tokens for call in calls),
        memory_seconds=sum(memory),
        arithmetic_seconds=None if arithmetic is None else sum(arithmetic),
        seconds=None if arithmetic is None else sum(map(max, memory, arithmetic)),
    )
