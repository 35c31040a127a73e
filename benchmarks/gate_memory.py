"""Time and memory of the oracle and of the candidate `torch`, each in a process of its own.

    python benchmarks/synthetic_checkpoint.py qwen3.6-27b --layers 4 --vocab 8192 --fill random -o /tmp/27b-4
    zoo build qwen3.6-27b --checkpoint /tmp/27b-4 -o /tmp/out
    python benchmarks/gate_memory.py /tmp/out/BUNDLE /tmp/27b-4 --positions 16

Prints a JSON line per part, as measure.py does, with the largest layer in float32 to compare the oracle's memory with.
Nothing is kept in the oracle's cache. `--only PART` runs one part in this process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from measure import measure

from coreai_zoo.build.design import Design, design
from coreai_zoo.build.rebuild import recorded_request
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.gate import Model
from coreai_zoo.plugins import default_plugins

PARTS = ("oracle", "control", "torch")


def resolved_of(bundle: Bundle, checkpoint: Path) -> Design:
    """What a build of `bundle` decided."""
    with tempfile.TemporaryDirectory() as folder:
        request, _ = recorded_request(bundle, checkpoint, Path(folder))
        return design(request, default_plugins())


def model_of(part: str, bundle: Bundle, resolved: Design) -> Model:
    """The oracle, the candidate on the bundle's weights, or the same decoder on the checkpoint's, unquantized."""
    if part == "oracle":
        from coreai_zoo.gates.oracle import Oracle

        return Oracle(resolved.checkpoint, resolved.model.hf_config)
    from attrs import evolve

    from coreai_zoo.gates.layered import TorchCandidate
    from coreai_zoo.gates.weights import AssetWeights, CheckpointWeights, WeightSource

    plan, weights = resolved.weights, None
    if part == "control":
        plan = evolve(plan, tensors=tuple(evolve(tensor, quantization=None) for tensor in plan.tensors))
        weights = CheckpointWeights("the checkpoint in fp16", resolved.checkpoint, plan)
    source: WeightSource = weights or AssetWeights.open(
        bundle.asset, resolved.backend, bundle.decode, resolved.modules["main"], plan
    )
    return TorchCandidate(resolved.modules["main"], plan, resolved.signatures["main"], source)


def run(part: str, directory: Path, checkpoint: Path, positions: int) -> dict[str, Any]:
    """Run one part; what it was, how long the run itself took, and a digest of what came out."""
    bundle = Bundle.open(directory)
    resolved = resolved_of(bundle, checkpoint)
    layers: Counter[str] = Counter()
    for tensor in resolved.weights.tensors:
        path = next((path for path in resolved.modules["main"].layer_paths if tensor.name.startswith(f"{path}.")), "")
        layers[path] += 4 * tensor.parameters if path else 0
    vocabulary = resolved.facts["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocabulary, positions).tolist()
    started = time.monotonic()
    logits = model_of(part, bundle, resolved).run(tokens).logits
    return {
        "part": part,
        "layers": resolved.facts["layers"],
        "positions": positions,
        "run_seconds": round(time.monotonic() - started, 2),
        "largest_layer_fp32_bytes": max(layers.values()),
        "finite": bool(np.isfinite(logits).all()),
        "argmax": logits.argmax(-1).tolist(),
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--positions", type=int, default=16)
    parser.add_argument("--part", choices=PARTS, action="append", help="which to measure; default: oracle and torch")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(run(arguments.only, arguments.bundle, arguments.checkpoint, arguments.positions)))
        return
    for part in arguments.part or ("oracle", "torch"):
        command = [sys.executable, __file__, str(arguments.bundle), str(arguments.checkpoint), "--only", part]
        print(json.dumps(measure([*command, "--positions", str(arguments.positions)])), flush=True)


if __name__ == "__main__":
    main()
