"""How fast a bundle reads and writes on this machine: it is loaded, fed and read from anew as often as asked for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from attrs import frozen

from coreai_zoo.backend import Backend, prefill_calls, read_prompt, reading_calls
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.sampling import Logits
from coreai_zoo.errors import BadInput
from coreai_zoo.machine import peak_memory
from coreai_zoo.progress import Reporter


@frozen
class Run:
    """One run, in seconds.

    Attributes:
        load: until the asset could be called.
        first_token: from then on, until the first token of the answer was chosen.
        decode: of the steps that the other tokens took.
        prompt_tokens: tokens of the prompt.
        steps: how many these steps were.
    """

    load: float
    first_token: float
    decode: float
    prompt_tokens: int
    steps: int

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / self.first_token

    @property
    def decode_rate(self) -> float:
        """Tokens of the answer per second, the first one left out: it comes with the prompt."""
        return self.steps / self.decode


@frozen
class Measured:
    """Runs of one bundle, of which every figure is a median.

    Attributes:
        runs: each of them, the first one first.
        prefill_calls: calls of `prefill` that read the prompt; 0 where every token is decoded.
        peak_memory: bytes of this process at its peak, what is mapped of the asset included; None where the system
            does not say.
    """

    runs: tuple[Run, ...]
    prefill_calls: int
    peak_memory: int | None

    def median(self, figure: Callable[[Run], float]) -> float:
        """The median of a figure."""
        return statistics.median(map(figure, self.runs))

    def spread(self, figure: Callable[[Run], float]) -> tuple[float, float]:
        """The least and the largest."""
        return min(map(figure, self.runs)), max(map(figure, self.runs))


def bench(
    bundle: Bundle, backend: Backend, prompt_tokens: int, answer_tokens: int, runs: int, report: Reporter
) -> Measured:
    """Measure a bundle on the runtime of this machine.

    Every run loads it anew, reads the same prompt as an engine does and decodes the most probable token again and
    again; where an answer would end does not matter. The tokens of the prompt are drawn, the same ones each time.

    Args:
        bundle: the bundle.
        backend: the backend that it was written by.
        prompt_tokens: length of the prompt.
        answer_tokens: tokens of the answer, two or more: the first one takes no step.
        runs: how many.
        report: is told how far it is.

    Raises:
        BadInput: when prompt and answer do not fit the context of the bundle.
    """
    if prompt_tokens + answer_tokens > bundle.max_context:
        raise BadInput(
            f"A prompt of {prompt_tokens:,} tokens and an answer of {answer_tokens:,} do not fit a context of "
            f"{bundle.max_context:,}.",
            "Choose a smaller -p or -g, or build the bundle with a larger --max-context.",
        )
    vocabulary = int(bundle.signature.outputs[0].shape[-1])
    prompt = np.random.default_rng(0).integers(vocabulary, size=prompt_tokens).tolist()
    by_prefill = len(prefill_calls(bundle.functions, prompt_tokens - 1))
    calls = len(reading_calls(bundle.functions, prompt_tokens)) + answer_tokens - 1
    with report.steps(f"measuring {runs} run{'' if runs == 1 else 's'}", runs * calls) as called:
        measured = tuple(_run(bundle, backend, prompt, answer_tokens, called) for _ in range(runs))
    return Measured(measured, by_prefill, peak_memory())


def _run(
    bundle: Bundle, backend: Backend, prompt: Sequence[int], answer_tokens: int, called: Callable[[], None]
) -> Run:
    capacity = len(prompt) + answer_tokens
    started = time.perf_counter()
    with backend.stepper(bundle.asset, bundle.functions, capacity) as stepper:
        loaded = time.perf_counter()
        token = _most_probable(read_prompt(stepper, bundle.functions, prompt, called))
        first = time.perf_counter()
        for _ in range(answer_tokens - 1):
            token = _most_probable(stepper.step(token))
            called()
        return Run(
            load=loaded - started,
            first_token=first - loaded,
            decode=time.perf_counter() - first,
            prompt_tokens=len(prompt),
            steps=answer_tokens - 1,
        )


def _most_probable(logits: Logits) -> int:
    return int(np.argmax(logits))
