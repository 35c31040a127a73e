"""What a gate will cost, told before it starts: positions, layers, and for a large model an idea of the time.

The time is that of the multiplications alone, at the pace that products of matrices have on this CPU a moment before.
Reading and converting weights comes on top; kept results of the oracle, or a runtime that is faster than the CPU, take
from it. Each stage tells a better one when its first steps are done (`Reporter.steps`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from attrs import frozen

from coreai_zoo.progress import duration

_WORTH_TIMING = 10**12  # multiplications; fewer are done before anybody wonders
_SIDE = 2048  # of the matrices that are timed


@frozen
class Pace:
    """Multiplications per second on this machine.

    Attributes:
        together: of many rows at once in float32, as the oracle takes a prompt.
        step: of one row in float16, as the decoder takes a token.
    """

    together: float
    step: float


@frozen
class Cost:
    """What the prompts of a gate take, or the windows of its corpus.

    Attributes:
        what: is counted: `prompts` or `corpus`.
        positions: of all of them together.
        layers: of the model.
        active: weights that one position is multiplied with.
        steppers: how many models take the positions one by one: candidates and controls.
        readers: how many take them many at once, as the oracle does: functions that read prompts.
    """

    what: str
    positions: int
    layers: int
    active: int
    steppers: int
    readers: int = 0

    def seconds(self, pace: Pace) -> float:
        """The time for the multiplications of the oracle and of the models beside it."""
        return self.active * self.positions * ((1 + self.readers) / pace.together + self.steppers / pace.step)

    def note(self) -> str:
        """The cost as a line; with a time where it is worth one."""
        beside = self.steppers + self.readers
        models = f"the oracle and {beside} model{'s' * (beside > 1)} beside it"
        line = f"{self.what}: {self.positions:,} positions through {self.layers} layers, by {models}"
        work = self.active * self.positions * (1 + beside)
        if work < _WORTH_TIMING:
            return line
        some = duration(self.seconds(measured_pace()))
        return f"{line}: {work:.1e} multiplications, some {some} at this CPU's pace"


def active_parameters(build: Mapping[str, Any]) -> int:
    """The weights of a bundle that one position is multiplied with: of the routed experts only those that are chosen.

    Args:
        build: its build.json.
    """
    facts, roles = build.get("facts") or {}, build.get("roles") or {}
    experts = facts.get("experts")
    chosen = facts.get("experts_per_token", 0) / experts if experts else 1.0
    total = 0.0
    for name, counts in (build.get("weights") or {}).items():
        role = roles.get(name) or {}
        if role.get("kind") != "embedding":  # a row of it is looked up
            total += counts["parameters"] * (chosen if role.get("routed") else 1.0)
    return round(total)


def measured_pace() -> Pace:
    """The pace of products of matrices, the best of a few."""
    import torch

    def best(rows: int, dtype: torch.dtype) -> float:
        left, right = torch.ones(rows, _SIDE, dtype=dtype), torch.ones(_SIDE, _SIDE, dtype=dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            torch.nn.functional.linear(left, right)
            times.append(time.perf_counter() - started)
        return rows * _SIDE * _SIDE / max(min(times), 1e-9)

    return Pace(best(64, torch.float32), best(1, torch.float16))
