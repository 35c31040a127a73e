"""The candidate that is the bundle itself: its asset on the runtime of this machine."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from attrs import frozen

from coreai_zoo.backend import Backend, drain
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.errors import ZooError
from coreai_zoo.gate import Activations
from coreai_zoo.processes import processes

_log = logging.getLogger(__name__)

_WORTH_PROCESSES = 100
"""Positions from which on more processes are started than this one: each takes as long to start as some positions."""

_COUNTED_SECONDS = 0.2  # between two looks at how far they are


@frozen
class AssetCandidate:
    """A bundle's own asset on its runtime, token by token, states carried.

    Attributes:
        on_step: called after each token.
        keep_in: folder for the tokens and logits of each run, to compare a device with; None to keep nothing.
        jobs: how many prompts may run at a time, each in a process of its own, where a runtime takes one core for one
            prompt.
    """

    bundle: Bundle
    backend: Backend
    on_step: Callable[[], None] = lambda: None
    keep_in: Path | None = None
    jobs: int = 1

    @property
    def name(self) -> str:
        """The asset and its runtime, for the report."""
        return f"{self.bundle.asset.name} on the {self.backend.runtime} runtime"

    def run(self, tokens: Sequence[int]) -> Activations:
        """Teacher-forced logits in float16."""
        rows = []
        with self.backend.stepper(self.bundle.asset, self.bundle.functions, capacity=len(tokens)) as stepper:
            for row in drain(stepper, tokens):
                rows.append(row)
                self.on_step()
        logits = np.stack(rows)
        if self.keep_in is not None:
            self.keep_in.mkdir(parents=True, exist_ok=True)
            fed = np.array(tokens, np.int32)
            name = hashlib.sha256(fed.tobytes()).hexdigest()[:8]
            np.savez(self.keep_in / f"logits-{name}.npz", tokens=fed, logits=logits)
        return Activations(logits)

    def run_many(self, prompts: Sequence[Sequence[int]]) -> list[Activations]:
        """What `run` gives for each prompt."""
        jobs = min(self.jobs, len(prompts))
        if jobs > 1 and sum(map(len, prompts)) >= _WORTH_PROCESSES:
            try:
                return self._run_in_processes(prompts, jobs)
            except ZooError:
                raise
            except Exception as error:  # noqa: BLE001  # a process was killed, none could be made, or a backend is no data
                _log.info("All prompts run in one process: %r", error)
        return [self.run(tokens) for tokens in prompts]

    def _run_in_processes(self, prompts: Sequence[Sequence[int]], jobs: int) -> list[Activations]:
        steps = multiprocessing.get_context("spawn").RawArray("Q", len(prompts))
        modules = [__name__, type(self.backend).__module__]
        job = partial(_run, self.bundle.directory, self.backend, self.keep_in)
        with processes(jobs, modules, partial(_Steps.share, steps)) as pool:
            futures = [pool.submit(job, list(tokens), place) for place, tokens in enumerate(prompts)]
            told, waiting = 0, set(futures)
            while waiting:
                finished, waiting = wait(waiting, _COUNTED_SECONDS, FIRST_COMPLETED)
                for future in finished:
                    future.result()  # where one fails, nobody waits for the others
                new = sum(steps) - told
                for _ in range(new):
                    self.on_step()
                told += new
            return [future.result() for future in futures]


# ---------------------------------------------------------------------------------------------------------------------
# In another process
# ---------------------------------------------------------------------------------------------------------------------


class _Steps:
    """How many tokens of each prompt are done, in memory that processes share."""

    shared: ClassVar[MutableSequence[int]]

    @classmethod
    def share(cls, steps: MutableSequence[int]) -> None:
        cls.shared = steps


def _run(directory: Path, backend: Backend, keep_in: Path | None, tokens: list[int], place: int) -> Activations:
    """`AssetCandidate.run` on the prompt at a place."""

    def count() -> None:
        _Steps.shared[place] += 1

    return AssetCandidate(Bundle.open(directory), backend, count, keep_in).run(tokens)
