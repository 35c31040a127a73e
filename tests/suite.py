"""Which tests run when: the files of the quick loop, all others, and the sizes that only a night has time for."""

from __future__ import annotations

import os

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
        "docs",
        "engine",
        "entry",
        "fingerprint",
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
        "bad_input",
        "benchmarks",
        "candidates",
        "cases",
        "check",
        "code",
        "config",
        "contracts",
        "coreai_backend",
        "coreml_backend",
        "diff",
        "figures",
        "first_command",
        "fp8",
        "gate",
        "golden_metadata",
        "gate_command",
        "gate_running_text",
        "gate_slice",
        "gate_stored",
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
        "parity",
        "precision_goldens",
        "prefill",
        "preflight",
        "product_mutants",
        "publish",
        "read_only",
        "reproducible",
        "resume",
        "same_tokenizer",
        "run",
        "samples",
        "sizes",
        "store",
        "stored",
        "stored_once",
        "stress",
        "third_party_plugin",
        "tokenizer",
        "toy_plugin",
        "toy_vocabulary",
        "tutorial",
        "two_functions",
        "verify",
        "walk",
        "wiring",
    }
)

# These are about tracing: each of their decoders is traced, though one that is the same was traced before.
TRACED_ANEW = frozenset({"coreai_backend", "interruption", "lowering", "mistakes", "walk"})

NIGHTLY = os.environ.get("ZOO_NIGHTLY", "") not in {"", "0"}
"""Whether the long runs have their full size (`make nightly`)."""
