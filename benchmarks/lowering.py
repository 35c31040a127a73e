"""Time and memory of tracing and lowering an entry at its true width, without its weights.

    python benchmarks/lowering.py qwen3.6-27b [--contract chunked] [--every-layer]

Lowered is what a build lays out: with room for every weight, none being there.
Prints a JSON line: seconds of wall time, and of CPU time for both. `--every-layer` traces all layers instead of the
first few, to compare with. measure.py tells the memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from attrs import evolve
from synthetic_checkpoint import write_checkpoint

from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.build.design import design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.catalogue import find_entry
from coreai_zoo.lowering.module import allocate, planned_constants
from coreai_zoo.plugins import default_plugins


def main() -> None:
    """Parse the command line, lower, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry")
    parser.add_argument("--contract")
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument("--every-layer", action="store_true")
    arguments = parser.parse_args()
    plugins = default_plugins()
    entry, _ = find_entry(arguments.entry, plugins)
    overlay, _ = plugins.claim_overlay(entry.model_type[0], {})
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        config = overlay.config_of_facts(entry.facts.stated)
        write_checkpoint(config, entry.sample_directory(), "sparse", checkpoint, plugins)
        asked = {"contract": arguments.contract, "layers": arguments.layers}
        resolved = design(BuildRequest(entry.name, checkpoint, custom=True, **asked), plugins)
    for module in resolved.modules.values():
        allocate(module, {each.name: evolve(each.format, quantization=None) for each in resolved.weights.tensors})
    backend = CoreAIBackend(every_layer=arguments.every_layer)
    started, cpu = time.monotonic(), time.process_time()
    traced = backend.trace(resolved.modules, resolved.signatures)
    done = time.monotonic()
    traced.lay_out(planned_constants(resolved.weights), lambda _: {})
    lowered = time.monotonic()
    answer = {"trace": done - started, "lower": lowered - done, "both": lowered - started}
    answer["cpu"] = time.process_time() - cpu
    print(json.dumps({"layers": resolved.facts["layers"], **{name: round(value, 1) for name, value in answer.items()}}))


if __name__ == "__main__":
    main()
