"""A bundle measured over a corpus: perplexity, KL divergence, agreement, and the margin rule at every position.

The oracle's logits of all windows lie in a mapped file without a name: memory grows with neither positions nor
vocabulary, and nothing is left however the process ends. The candidate's are compared a few windows at a time and
dropped.

Shapes: W windows, P positions of one, V tokens in the vocabulary.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from coreai_zoo.bounds import CONFIDENT_MARGIN
from coreai_zoo.disk import NO_SPACE
from coreai_zoo.errors import EnvironmentLacks
from coreai_zoo.gate import BatchingModel
from coreai_zoo.gates.corpus import Corpus
from coreai_zoo.gates.divergence import Compared, Statistics, compare_logits, statistics
from coreai_zoo.gates.power import Power
from coreai_zoo.gates.prompts import Prompt, TokenizedPrompt
from coreai_zoo.gates.rule import flips_allowed
from coreai_zoo.gates.teacher_forced import Runner
from coreai_zoo.progress import Reporter

_LOGITS_AT_ONCE = 3 << 27  # of windows that a candidate runs side by side: 768 MiB in float16


@frozen
class Flip:
    """A confident flip.

    Attributes:
        window: the window, from 0.
        index: the position in it.
        token: the token that was fed.
        oracle: the oracle's argmax.
        candidate: the candidate's; -1 where its logits are not finite.
        margin: the oracle's, in logits.
    """

    window: int
    index: int
    token: int
    oracle: int
    candidate: int
    margin: float


@frozen
class CorpusResult:
    """A candidate over a corpus.

    Attributes:
        corpus: the windows.
        candidate: name of what ran.
        statistics: the figures of the positions that count.
        flips: confident flips at any position, worst margin first.
        power: what the positions of all windows can show.
        flips_allowed: how many flips say nothing against the candidate.
        sure_from: the oracle's margin from which a flip is an error.
    """

    corpus: Corpus
    candidate: str
    statistics: Statistics
    flips: tuple[Flip, ...]
    power: Power
    flips_allowed: int
    sure_from: float = CONFIDENT_MARGIN

    @property
    def passed(self) -> bool:
        """Whether the flips say nothing against the candidate."""
        return len(self.flips) <= self.flips_allowed

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it failed, one phrase; empty when it passed."""
        if self.passed:
            return ()
        worst = self.flips[0]
        plural = "s" * (len(self.flips) > 1)
        allowed = f", {self.flips_allowed} allowed" if self.flips_allowed else ""
        return (
            f"corpus {self.corpus.name}: {len(self.flips)} confident flip{plural} in {self.power.positions:,} "
            f"positions{allowed}, the worst in window {worst.window + 1} at position {worst.index} with an oracle "
            f"margin of {worst.margin:.2f}",
        )


def run_oracle_on(corpus: Corpus, oracle: Runner, vocabulary: int, folder: Path, report: Reporter) -> Any:
    """The oracle's logits of every window, float32 [W, P, V], mapped from a file in `folder` that has no name.

    Raises:
        EnvironmentLacks: when the disk has no room for them.
    """
    shape = (len(corpus.windows), corpus.window, vocabulary)
    logits = _mapped(shape, folder)
    prompts = _prompts(corpus)
    detail = f"{oracle.model.name}, {_size(corpus)}"
    with report.stage("windows", detail), report.steps("", sum(map(oracle.steps, prompts))) as oracle.ticker.count:
        for place, prompt in enumerate(prompts):
            logits[place] = oracle.model.run(prompt.tokens).logits
    return logits


def measure(
    corpus: Corpus,
    oracle_logits: Any,
    candidate: Runner,
    report: Reporter,
    *,
    routed: bool,
    sure_from: float = CONFIDENT_MARGIN,
) -> CorpusResult:
    """A candidate's figures and flips over a corpus.

    Args:
        corpus: the windows.
        oracle_logits: what `run_oracle_on` gave.
        candidate: what is measured.
        report: is told of the stage.
        routed: whether a router chooses experts, which sets how many flips are allowed.
        sure_from: the oracle's margin from which a flip is an error.

    Raises:
        CheckFailed: when the asset cannot be run.
    """
    windows = []
    prompts = _prompts(corpus)
    detail = f"{candidate.model.name}, {_size(corpus)}"
    with report.stage("corpus", detail), report.steps("", sum(map(candidate.steps, prompts))) as candidate.ticker.count:
        for place, logits in enumerate(_logits(candidate, prompts, oracle_logits.shape[-1])):
            following = [*corpus.windows[place][1:], 0]  # the last has none, and does not count
            windows.append(compare_logits(oracle_logits[place], logits, following))
    flips = [flip for place, compared in enumerate(windows) for flip in _flips(place, corpus, compared, sure_from)]
    confident = sum(int((compared.margin >= sure_from).sum()) for compared in windows)
    return CorpusResult(
        corpus,
        candidate.model.name,
        statistics(Compared.joined([compared[corpus.counted] for compared in windows])),
        tuple(sorted(flips, key=lambda flip: -flip.margin)),
        Power(confident, len(flips)),
        flips_allowed(confident, routed=routed),
        sure_from,
    )


def _logits(candidate: Runner, prompts: Sequence[TokenizedPrompt], vocabulary: int) -> Iterator[Any]:
    """A candidate's logits of each window, [P, V], of a few windows at a time."""
    model = candidate.model
    if not isinstance(model, BatchingModel):
        for prompt in prompts:
            yield model.run(prompt.tokens).logits
        return
    count = max(1, _LOGITS_AT_ONCE // (len(prompts[0].tokens) * vocabulary))
    for start in range(0, len(prompts), count):
        for activations in model.run_many([prompt.tokens for prompt in prompts[start : start + count]]):
            yield activations.logits


def _flips(place: int, corpus: Corpus, compared: Compared, sure_from: float) -> Iterator[Flip]:
    confident = (compared.oracle != compared.candidate) & (compared.margin >= sure_from)
    for index in np.flatnonzero(confident).tolist():
        chosen = (int(compared.oracle[index]), int(compared.candidate[index]))
        yield Flip(place, index, corpus.windows[place][index], *chosen, float(compared.margin[index]))


def _prompts(corpus: Corpus) -> list[TokenizedPrompt]:
    """The windows as what a `Runner` counts the steps of."""
    return [TokenizedPrompt(Prompt(corpus.name), tokens, ()) for tokens in corpus.windows]


def _size(corpus: Corpus) -> str:
    windows = len(corpus.windows)
    return f"{corpus.positions} positions in {windows} window{'s' * (windows > 1)} of the corpus {corpus.name}"


def _mapped(shape: tuple[int, int, int], folder: Path) -> Any:
    """Room for float32 values of a shape in a file without a name; the mapping alone keeps it."""
    size = int(np.prod(shape)) * np.dtype(np.float32).itemsize
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="zoo-corpus-") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk ends a process that writes to a mapping
            elif shutil.disk_usage(folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return np.memmap(file, np.float32, "r+", shape=shape)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise EnvironmentLacks(
            f"The oracle's logits over the corpus take {size / 2**30:.1f} GiB, and {folder} has no room for them.",
            "Make room there, ask for fewer --positions, or write the report to another disk with -o DIR.",
        ) from error
