"""How near `prefill` then `main` is to single steps and to transformers, on the runtime, at a model's true width.

    python benchmarks/synthetic_checkpoint.py qwen3.6-27b --layers 4 --vocab 8192 --fill random -o /tmp/27b-4
    zoo build qwen3.6-27b --checkpoint /tmp/27b-4 --custom --contract chunked -o out
    python scripts/measure_width.py out/* /tmp/27b-4 --tokens 9
    python scripts/measure_width.py out/* /tmp/27b-4 --tokens 65 --no-single-steps

Reads that many random tokens with `prefill`, decodes two, and does the same token by token. A token of the 27B's four
layers takes the interpreter half a minute, so that without single steps 65 tokens are a quarter of an hour.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from coreai_zoo.backend import Stepper
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.verify import backend_of
from coreai_zoo.engine import PREFILL
from coreai_zoo.gates.rule import judge
from coreai_zoo.gates.run import oracle_of
from coreai_zoo.plugins import default_plugins

DECODED = 2
Found = tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=9, help="that `prefill` reads [9]")
    parser.add_argument("--no-single-steps", action="store_true")
    arguments = parser.parse_args()
    plugins = default_plugins()
    bundle = Bundle.open(arguments.bundle)
    vocabulary = int(bundle.signature.outputs[0].shape[-1])
    tokens = np.random.default_rng(1).integers(0, vocabulary, arguments.tokens + DECODED).tolist()

    def read_at_once(stepper: Stepper) -> list[np.ndarray[Any, Any]]:
        stepper.call(PREFILL, tokens[: arguments.tokens])
        return [stepper.step(token) for token in tokens[arguments.tokens :]]

    def step(stepper: Stepper) -> list[np.ndarray[Any, Any]]:
        return [stepper.step(token) for token in tokens][arguments.tokens :]

    with backend_of(bundle, plugins.backends()).stepper(bundle.asset, bundle.functions, len(tokens)) as stepper:
        found = {f"{PREFILL} of {arguments.tokens}, then {DECODED} steps": run(bundle, stepper, read_at_once)}
        if not arguments.no_single_steps:
            found["single steps"] = run(bundle, stepper, step)
    print(f"resident memory at the peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    oracle = oracle_of(bundle, plugins, arguments.checkpoint).run(tokens).logits[arguments.tokens :]
    for name, (logits, _states) in found.items():
        positions = judge(tokens[arguments.tokens :], oracle, logits).positions
        print(f"{name}: lowest cosine to transformers {min(each.cosine for each in positions):.6f}")
    compare_states(*(states for _logits, states in found.values()))


def run(bundle: Bundle, stepper: Stepper, calls: Callable[[Stepper], list[np.ndarray[Any, Any]]]) -> Found:
    """The logits of the decoded tokens, and the states behind them; caches hold NaN where nothing was written."""
    stepper.reset(float("nan"))
    started = time.monotonic()
    logits = np.stack(calls(stepper)).astype(np.float32)
    print(f"{calls.__name__}: {time.monotonic() - started:.0f} s", flush=True)
    return logits, {state.name: stepper.state(state.name).astype(np.float32) for state in bundle.signature.states}


def compare_states(one: dict[str, np.ndarray[Any, Any]], other: dict[str, np.ndarray[Any, Any]] | None = None) -> None:
    """Print how far the states of both ways are apart, of their norm."""
    for name, state in (other or {}).items():
        written = np.isfinite(state)
        assert (written == np.isfinite(one[name])).all(), f"{name} is written elsewhere"
        apart = np.linalg.norm((one[name] - state)[written]) / np.linalg.norm(state[written])
        print(f"{name}: {apart:.1e} apart")


if __name__ == "__main__":
    main()
