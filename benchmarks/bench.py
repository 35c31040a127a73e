"""The benchmarks that fit into minutes, as a table: quantizer, build against the whole-model way, warm rebuild.

    python benchmarks/bench.py                     # one run each, some three minutes
    python benchmarks/bench.py --runs 3            # medians of three, in turn; what README.md shows
    python benchmarks/bench.py --mlx ENV/bin/python  # with mlx-lm's conversion beside, from an environment of its own

Everything is measured side by side in one run, because machines differ and are noisy: read the ratios. Seconds are wall
time, memory is the peak of the anonymous memory of the process (RssAnon), see measure.py. The slice has four layers of
the 27B at true width, random weights, and a vocabulary of 8192.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import measure

from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.weights.quantizer import SCALE_FLOOR, quantize_rows

HERE = Path(__file__).parent
ENTRY = "qwen3.6-27b"
BUILD_FLAGS = ("--custom", "--json", "--progress", "json", "--force")


def rate(function: Callable[[], object], parameters: int, runs: int) -> float:
    """Median of parameters per second, in units of 1e9."""
    function()
    seconds = []
    for _ in range(max(3, runs)):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return parameters / statistics.median(seconds) / 1e9


def quantizer_rates(runs: int) -> dict[str, float]:
    """Our quantizer on all cores beside the same arithmetic as plain torch operations on the whole matrix."""
    weight = (torch.randn(17408, 5120) * 0.02).bfloat16()  # the down projection of the 27B, transposed
    spec = RECIPES["int8hu"].specs["body"]
    assert spec is not None

    def plain() -> torch.Tensor:
        blocks = weight.to(torch.float16).float().view(weight.shape[0], -1, 32)
        scales = (blocks.abs().amax(dim=-1).half() / 127).clamp(min=SCALE_FLOOR)
        codes = (blocks / scales.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        return codes.view(weight.shape)

    assert torch.equal(plain(), quantize_rows(weight, spec, torch.float16).codes)
    return {
        "ours": rate(lambda: quantize_rows(weight, spec, torch.float16), weight.numel(), runs),
        "plain torch": rate(plain, weight.numel(), runs),
    }


def build(checkpoint: Path, output: Path, *more: str) -> dict[str, Any]:
    """One build of the slice, measured."""
    zoo = str(Path(sys.executable).with_name("zoo"))
    command = [zoo, "build", ENTRY, "--checkpoint", str(checkpoint), "-o", str(output), *BUILD_FLAGS, *more]
    return checked(measure(command, folders=[output]))


def converted_by_mlx(python: Path, checkpoint: Path, output: Path) -> dict[str, Any]:
    """One conversion by mlx-lm to 8 bits in blocks of 32, measured."""
    shutil.rmtree(output, ignore_errors=True)
    options = ["--hf-path", str(checkpoint), "--mlx-path", str(output), "-q", "--q-bits", "8", "--q-group-size", "32"]
    return checked(measure([str(python), "-m", "mlx_lm", "convert", *options], folders=[output]))


def baseline(checkpoint: Path, output: Path) -> dict[str, Any]:
    """One conversion the whole-model way, measured."""
    shutil.rmtree(output, ignore_errors=True)
    script = str(HERE / "whole_model_baseline.py")
    command = [sys.executable, "-W", "ignore", script, str(checkpoint), "-o", str(output)]
    return checked(measure(command, folders=[output]))


def warm(checkpoint: Path) -> None:
    """Read the checkpoint, so that both ways find it in the system's cache: a build drops it from there."""
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def checked(result: dict[str, Any]) -> dict[str, Any]:
    """A measurement of a command that succeeded."""
    if result["exit_code"] != 0:
        raise SystemExit(f"a measured command failed with exit code {result['exit_code']}")
    return result


def since_reading(result: Mapping[str, Any]) -> float:
    """Seconds of laying out, reading and writing: from when the decoder is traced to the bundle on disk."""
    return sum(result["stages"][stage]["seconds"] for stage in ("weights", "lower", "bundle", "verify"))


def working(result: Mapping[str, Any]) -> float:
    """Seconds of all stages: everything but starting Python."""
    return sum(stage["seconds"] for stage in result["stages"].values())


def medians(
    measured: Mapping[str, Sequence[Mapping[str, Any]]], measures: Mapping[str, Callable[[Mapping[str, Any]], float]]
) -> str:
    """Medians of what was measured side by side; that of the first is 1 in the ratios.

    Args:
        measured: the measurements of each, by its name.
        measures: what to take of a measurement, by title.
    """
    rows = [["", *measured]]
    for title, of in measures.items():
        found = [statistics.median(map(of, results)) for results in measured.values()]
        rows.append([title, *(f"{value:.2f} ({value / found[0]:.2f})" for value in found)])
    return table(rows)


WHOLE_COMMANDS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "CPU seconds": lambda result: result["cpu_seconds"],
    "wall seconds": lambda result: result["seconds"],
    "peak anonymous memory, GB": lambda result: result["peak_anonymous_bytes"] / 1e9,
    "written, GB": lambda result: result["written_bytes"] / 1e9,
    "peak disk, GB": lambda result: result["peak_disk_bytes"] / 1e9,
}
"""What each converter took from its start to its end."""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def side_by_side(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    """Medians and ratios."""
    measures: list[tuple[str, list[float], list[float], str]] = [
        (
            "from laying out (ours) or reading to the bundle on disk, s",
            [since_reading(result) for result in ours],
            [result["output"]["seconds"] for result in theirs],
            ".1f",
        ),
        (
            "all stages (ours with resolving and tracing), s",
            [working(result) for result in ours],
            [result["output"]["seconds"] for result in theirs],
            ".1f",
        ),
        (
            "peak RSS, mapped files included, GB",
            [result["peak_rss_bytes"] / 1e9 for result in ours],
            [result["peak_rss_bytes"] / 1e9 for result in theirs],
            ".2f",
        ),
    ]
    rows = [["", "zoo build", "whole model", "ratio"]]
    for name, mine, other, form in measures:
        one, two = statistics.median(mine), statistics.median(other)
        rows.append([name, format(one, form), format(two, form), f"{two / one:.1f}"])
    return table(rows)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="runs of each, in turn [1]")
    parser.add_argument("--layers", type=int, default=4, help="of the slice [4]")
    parser.add_argument("--mlx", type=Path, help="a Python that has mlx-lm [left out]")
    parser.add_argument("--work", type=Path, help="where to put some 9 GB [a temporary folder]")
    arguments = parser.parse_args()
    rates = quantizer_rates(arguments.runs)
    print(f"{torch.get_num_threads()} threads, medians of {arguments.runs}\n", flush=True)
    print(table([["quantizer, int8 blocks of 32", "1e9 parameters/s"], *([n, f"{r:.2f}"] for n, r in rates.items())]))
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        script = str(HERE / "synthetic_checkpoint.py")
        shape = ["--layers", str(arguments.layers), "--vocab", "8192", "--fill", "random"]
        subprocess.run([sys.executable, script, ENTRY, *shape, "-o", str(work / "slice")], check=True)
        ours, theirs, mlx = [], [], []
        for run in range(arguments.runs):
            shutil.rmtree(work / "ours", ignore_errors=True)
            warm(work / "slice")
            ours.append(
                build(work / "slice", work / "ours", *(["--keep-weights"] if run == arguments.runs - 1 else []))
            )
            if arguments.mlx is not None:
                warm(work / "slice")
                mlx.append(converted_by_mlx(arguments.mlx, work / "slice", work / "mlx"))
            warm(work / "slice")
            theirs.append(baseline(work / "slice", work / "whole"))
        commands = {"zoo build": ours, **({"mlx-lm": mlx} if mlx else {}), "whole model": theirs}
        print(f"\n{medians(commands, WHOLE_COMMANDS)}", flush=True)
        shutil.rmtree(work / "whole")
        print(f"\n{side_by_side(ours, theirs)}\n", flush=True)
        rebuild = build(work / "slice", work / "ours", "--keep-weights")
        rows = [["stage", "first build, s", "warm rebuild, s", "peak anonymous memory of the first, GB"]]
        for stage, first in ours[-1]["stages"].items():
            again, peak = rebuild["stages"][stage]["seconds"], first["peak_anonymous_bytes"] or 0
            rows.append([stage, f"{first['seconds']:.1f}", f"{again:.1f}", f"{peak / 1e9:.2f}"])
        print(table(rows))
        print(f"\nwarm rebuild: {json.dumps(rebuild['output']['weights'])}")


if __name__ == "__main__":
    main()
