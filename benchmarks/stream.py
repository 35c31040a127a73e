"""Peak of disk of a build from the hub, with `--stream` and without: a sparse checkpoint, served on this machine.

    python benchmarks/stream.py qwen3.6-27b --layers 8 --vocab 8192 --shard-gib 1
    python benchmarks/stream.py qwen3.6-27b --layers all --vocab 248320 --shard-gib 4 --streamed-only  # some 40 GB

The hub is that of the tests. What it serves is sparse, but what is fetched takes its full size on the disk. Counted are
the blocks of all files below the cache and the output. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import checked, table
from measure import measure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from hub import Content, Hub, is_large  # noqa: E402  # found by the line above

ID, COMMIT = "toys/Sparse", "5" * 40


def contents(folder: Path) -> dict[str, Content]:
    """The files of a checkpoint by name, its weights mapped."""
    return {path.name: mapped(path) if is_large(path.name) else path.read_bytes() for path in folder.iterdir()}


def mapped(path: Path) -> memoryview:
    """The content of a file, none of it in memory."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def build(hub: Hub, output: Path, *more: str) -> dict[str, Any]:
    """One build from the hub, measured, with the peak of the disk."""
    os.environ.update(hub.environment)
    command = [sys.executable, "-m", "coreai_zoo", "build", ID, "-o", str(output), "--json", "--progress", "json"]
    return checked(measure([*command, *more], folders=[hub.home, output]))


def row(name: str, result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    told = result["output"]["preflight"]
    sizes = (told["fetched"], told["fetched_at_once"], told["written"], result["peak_disk_bytes"])
    return [name, *(f"{count / 1e9:.2f}" for count in sizes), f"{result['seconds']:.0f}"]


def main() -> None:
    """Parse the command line, make a checkpoint, build it twice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", help="whose shapes")
    parser.add_argument("--layers", default="8", help="only the first N layers, or all [8]")
    parser.add_argument("--vocab", default="8192", help="another vocabulary size [8192]")
    parser.add_argument("--shard-gib", default="1", help="size of a file at most [1]")
    parser.add_argument("--streamed-only", action="store_true", help="leave out the build that keeps the checkpoint")
    parser.add_argument("--work", type=Path, help="where to put it all [a temporary folder]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work, made = Path(folder), Path(folder) / "checkpoint"
        shape = ["--vocab", arguments.vocab, "--shard-gib", arguments.shard_gib]
        shape += [] if arguments.layers == "all" else ["--layers", arguments.layers]
        script = [sys.executable, str(HERE / "synthetic_checkpoint.py"), arguments.entry, *shape]
        subprocess.run([*script, "--fill", "sparse", "-o", str(made)], check=True)
        served, records, rows = contents(made), [], []
        builds = {"zoo build --stream": ["--stream"], "zoo build": []}
        if arguments.streamed_only:
            del builds["zoo build"]
        for name, options in builds.items():
            with Hub(work / "huggingface") as hub:
                hub.add(ID, served, commit=COMMIT)
                result = build(hub, work / "out", *options)
            rows.append(row(name, result))
            records.append((Path(result["output"]["path"]) / "build.json").read_bytes())
            shutil.rmtree(work / "huggingface")
            shutil.rmtree(work / "out")
        assert len(set(records)) == 1, "both are the same bundle: the record has the hash of each file"
        files = len(json.loads((made / "model.safetensors.index.json").read_text())["weight_map"].values())
        print(f"{len(list(made.glob('*.safetensors')))} files, {files} tensors; GB\n")
        heads = ["", "fetched", "kept of it at a time", "bundle", "measured peak of disk", "seconds"]
        print(table([heads, *rows]))


if __name__ == "__main__":
    main()
