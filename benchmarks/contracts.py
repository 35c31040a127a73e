"""What a second function costs: whole builds of an entry at true size, one for each contract, in turn.

    python benchmarks/contracts.py qwen3.6-27b                     # all layers: 30 GB of disk, 3 minutes a build
    python benchmarks/contracts.py qwen3.6-27b --layers 8 --runs 3
    python benchmarks/contracts.py qwen3.6-27b --contract static-s1 --contract chunked --limit-gib 2

Prints medians as a table; in brackets, as a multiple of the first contract's. The checkpoint is sparse: its zeros are
read, quantized, hashed and written like any values, and take no disk. measure.py says what is measured.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import BUILD_FLAGS, HERE, checked, medians
from measure import measure

CONTRACTS = ("static-s1", "chunked", "dynamic")
MEASURES: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "CPU seconds": lambda result: result["cpu_seconds"],
    "wall seconds": lambda result: result["seconds"],
    "of them tracing and lowering": lambda result: sum(
        result["stages"][name]["seconds"] for name in ("trace", "lower")
    ),
    "peak anonymous memory, GB": lambda result: result["peak_anonymous_bytes"] / 1e9,
    "bundle, GB": lambda result: result["output"]["bytes"] / 1e9,
}


def build(entry: str, checkpoint: Path, output: Path, contract: str, limit_gib: float | None) -> dict[str, Any]:
    """One build, measured; its bundle is removed."""
    zoo = str(Path(sys.executable).with_name("zoo"))
    command = [zoo, "build", entry, "--checkpoint", str(checkpoint), "--contract", contract, "-o", str(output)]
    result = checked(measure([*command, *BUILD_FLAGS], limit_gib))
    shutil.rmtree(output)
    return result


def main() -> None:
    """Parse the command line, build, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry")
    parser.add_argument("--contract", action="append", help=f"may be repeated [{', '.join(CONTRACTS)}]")
    parser.add_argument("--layers", type=int, help="only the first N layers [all]")
    parser.add_argument("--vocab", type=int, help="another vocabulary [the entry's]")
    parser.add_argument("--runs", type=int, default=1, help="builds by each contract, in turn [1]")
    parser.add_argument("--limit-gib", type=float, help="the memory that a build may use, page cache included")
    parser.add_argument("--work", type=Path, help="where to put the bundle [a temporary folder]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        checkpoint, output = Path(folder) / "checkpoint", Path(folder) / "out"
        given = {"--layers": arguments.layers, "--vocab": arguments.vocab}
        shape = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        script = [sys.executable, str(HERE / "synthetic_checkpoint.py"), arguments.entry]
        subprocess.run([*script, *shape, "--fill", "sparse", "-o", str(checkpoint)], check=True)
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.contract or CONTRACTS}
        for run in range(arguments.runs):
            for contract, results in measured.items():
                results.append(build(arguments.entry, checkpoint, output, contract, arguments.limit_gib))
                print(f"run {run + 1}, {contract}: {results[-1]['cpu_seconds']} CPU s", file=sys.stderr, flush=True)
    print(medians(measured, MEASURES))


if __name__ == "__main__":
    main()
