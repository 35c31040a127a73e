"""What the untouched samples show at most: the bounds of the family, for `zoo gate`.

scripts/measure_bounds.py says how to measure them again, and prints the rows; docs/gate.md says what was measured and
what stands in.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from coreai_zoo.bounds import Arithmetic, Kind, Measured, MeasuredBounds

# Columns as in `Measured`. Only what runs in PyTorch shows layers.
_ROWS: Mapping[tuple[str, Arithmetic, Kind], tuple[float, ...]] = MappingProxyType(
    {
        #                             median    largest   near-tie  1 - cos   med. KL   KL        hidden    / control
        ("fp16", "torch", "dense"): (8.53e-04, 5.11e-03, 0, 7.80e-06, 3.16e-06, 3.71e-05, 1.26e-03, 1.00),
        # Medians and hidden states are those of the form for a fixed context on `spanish`, which swaps one expert more.
        ("fp16", "torch", "routed"): (3.71e-03, 4.44e-02, 1.53e-01, 3.52e-04, 3.62e-05, 5.06e-03, 5.44e-03, 1.00),
        ("fp16", "runtime", "dense"): (3.76e-03, 1.14e-02, 0, 4.47e-05, 6.94e-05, 4.58e-04, 0, 4.64),
        ("fp16", "runtime", "routed"): (5.68e-03, 2.92e-02, 1.60e-01, 4.24e-04, 6.94e-05, 1.15e-03, 0, 4.45),
        ("int8", "torch", "dense"): (7.77e-03, 3.63e-02, 0, 5.39e-04, 1.66e-04, 2.09e-03, 9.64e-03, 9.11),
        ("int8", "torch", "routed"): (9.96e-03, 8.39e-02, 3.03e-01, 1.36e-03, 2.83e-04, 3.80e-02, 1.14e-02, 10.7),
        ("int8", "runtime", "dense"): (8.04e-03, 4.17e-02, 0, 6.74e-04, 2.12e-04, 5.01e-03, 0, 9.89),
        ("int8", "runtime", "routed"): (1.08e-02, 3.58e-02, 3.01e-01, 3.58e-04, 5.24e-04, 1.89e-03, 0, 11.2),
        # In PyTorch the hidden states of two prompts only; the rest as on the runtime.
        ("int4", "torch", "dense"): (1.06e-01, 5.88e-01, 0, 1.40e-01, 1.39e-02, 1.18e-01, 1.26e-01, 125),
        ("int4", "torch", "routed"): (9.61e-02, 7.15e-01, 7.15e-01, 1.70e-01, 1.32e-02, 1.20e-01, 2.70e-01, 115),
        ("int4", "runtime", "dense"): (1.06e-01, 5.88e-01, 0, 1.40e-01, 1.38e-02, 1.18e-01, 0, 125),
        # At its router gap no position of the sample is firm: the near-ties' values for all.
        ("int4", "runtime", "routed"): (9.61e-02, 7.15e-01, 7.15e-01, 1.70e-01, 1.32e-02, 1.20e-01, 0, 115),
    }
)

BOUNDS = MeasuredBounds(
    measured_on="both samples and the built-in recipes, on a 2-core x86-64 Linux machine",
    layers=8,
    rows=MappingProxyType({key: Measured(*row) for key, row in _ROWS.items()}),
    router_gaps=MappingProxyType({"fp16": 0.005, "int8": 0.02, "int4": 0.1}),
)
"""The largest over all built-in prompts that were run on each sample, with the gaps of its router."""
