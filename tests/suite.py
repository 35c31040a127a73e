"""Which tests run when: the files of the quick loop, all others, and the sizes that only a night has time for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

# `make quick`: whether a change is sane, in a minute on two cores. Nothing here builds a bundle of a sample.
QUICK = frozenset(
    {
        "architecture",
        "bundle_names",
        "bytecode",
        "card",
        "checkpoint",
        "cli",
        "compare_builds",
        "completion",
        "digest",
        "disk",
        "docs",
        "engine",
        "entry",
        "fingerprint",
        "format_text",
        "gate_bounds",
        "gate_corpus",
        "gate_cost",
        "gate_power",
        "gate_prompts",
        "gate_report",
        "gate_rule",
        "imports",
        "indexes",
        "machine",
        "names",
        "overlay",
        "plan",
        "plan_contracts",
        "plugins",
        "quantize",
        "recipes",
        "sensitivity",
        "suite",
        "tables",
        "target",
        "weights",
    }
)

# `make test` runs these as well: they build, run and attack bundles, in this process and in others.
THOROUGH = frozenset(
    {
        "asset_candidate",
        "bad_input",
        "bfloat16",
        "bench",
        "benchmarks",
        "candidates",
        "cases",
        "catalogue",
        "chat",
        "check",
        "code",
        "composites",
        "config",
        "contracts",
        "coreai_backend",
        "coreml_backend",
        "diff",
        "executables",
        "figures",
        "first_command",
        "fp8",
        "gate",
        "golden_metadata",
        "guidance",
        "gate_command",
        "gate_running_text",
        "gate_slice",
        "gate_stored",
        "halves",
        "headroom",
        "hub",
        "interruption",
        "lock",
        "long_context",
        "lowered_mutants",
        "lowering",
        "mistakes",
        "mutants",
        "new",
        "oracle",
        "origin",
        "originals",
        "pages",
        "parity",
        "precision_goldens",
        "prefill",
        "preflight",
        "product_mutants",
        "publish",
        "quantizer_mutants",
        "read_only",
        "recipe_bundles",
        "reproducible",
        "resume",
        "same_tokenizer",
        "run",
        "samples",
        "sampling",
        "sensitivity_run",
        "sizes",
        "store",
        "stored",
        "stored_once",
        "stream",
        "stress",
        "third_party_plugin",
        "tokenizer",
        "toy_plugin",
        "toy_vocabulary",
        "torch_export",
        "transposed",
        "tutorial",
        "two_functions",
        "verify",
        "walk",
        "wiring",
        "workspace",
    }
)

# These are about tracing: each of their decoders is traced, though one that is the same was traced before.
TRACED_ANEW = frozenset({"candidates", "coreai_backend", "interruption", "lowering", "mistakes", "transposed", "walk"})

# Files with tests that take most of a minute, longest first. They begin, or one of them would be what all wait for.
LONG = ("contracts", "lowering", "coreml_backend", "tutorial", "check", "coreai_backend", "samples", "run")

NIGHTLY = os.environ.get("ZOO_NIGHTLY", "") not in {"", "0"}
"""Whether the long runs have their full size (`make nightly`)."""

# Entries that the tests of the catalogue are about: small, dense, of experts, and too large for most machines. By day
# it has these alone; every combination of every entry takes a while to plan.
CATALOGUED = ("qwen3.5-2b", "qwen3.5-397b-a17b", "qwen3.6-27b", "qwen3.6-35b-a3b")

_Test = TypeVar("_Test")


def long_ones_first(tests: Sequence[_Test], file_of: Callable[[_Test], str]) -> list[_Test]:
    """The tests in two halves, each of which begins with files of `LONG`: with two workers each gets one of them."""
    short = [test for test in tests if file_of(test) not in LONG]
    one, other = (
        [test for name in names for test in tests if file_of(test) == name] for names in (LONG[::2], LONG[1::2])
    )
    middle = max(0, len(tests) // 2 - len(one))
    return [*one, *short[:middle], *other, *short[middle:]]
