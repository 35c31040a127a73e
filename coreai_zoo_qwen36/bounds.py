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
        ("fp16", "runtime", "routed"): (5.68e-03, 4.44e-02, 1.60e-01, 4.24e-04, 6.94e-05, 5.06e-03, 0, 4.45),
        ("int8", "torch", "dense"): (7.77e-03, 3.63e-02, 0, 5.39e-04, 1.66e-04, 2.09e-03, 9.64e-03, 9.11),
        ("int8", "torch", "routed"): (1.10e-02, 1.07e-01, 5.22e-01, 2.81e-03, 5.55e-04, 3.80e-02, 2.01e-02, 11.3),
        ("int8", "runtime", "dense"): (8.04e-03, 4.17e-02, 0, 6.74e-04, 2.12e-04, 5.01e-03, 0, 9.89),
        ("int8", "runtime", "routed"): (1.17e-02, 1.07e-01, 5.22e-01, 2.81e-03, 7.53e-04, 5.70e-02, 0, 12.1),
        # In PyTorch the hidden states of two prompts only; the rest as on the runtime.
        # Of a body in int6 and a head in int8.
        ("int6", "torch", "dense"): (2.23e-02, 1.09e-01, 0, 5.44e-03, 2.31e-03, 3.05e-02, 3.75e-02, 30.2),
        ("int6", "torch", "routed"): (3.81e-02, 1.63e-01, 4.22e-01, 5.96e-03, 4.25e-03, 6.56e-02, 5.42e-02, 39.4),
        ("int6", "runtime", "dense"): (2.37e-02, 1.11e-01, 0, 5.81e-03, 2.46e-03, 3.05e-02, 0, 30.2),
        ("int6", "runtime", "routed"): (3.81e-02, 1.63e-01, 4.22e-01, 5.96e-03, 4.49e-03, 6.56e-02, 0, 39.4),
        ("int4", "torch", "dense"): (1.06e-01, 5.88e-01, 0, 1.40e-01, 1.39e-02, 1.18e-01, 1.26e-01, 125),
        ("int4", "torch", "routed"): (9.61e-02, 7.15e-01, 7.15e-01, 1.70e-01, 1.32e-02, 1.20e-01, 2.70e-01, 115),
        ("int4", "runtime", "dense"): (1.06e-01, 5.88e-01, 0, 1.40e-01, 1.39e-02, 1.18e-01, 0, 125),
        # At its router gap no position of the sample is firm: the near-ties' values for all.
        ("int4", "runtime", "routed"): (9.61e-02, 7.15e-01, 7.15e-01, 1.70e-01, 1.32e-02, 1.20e-01, 0, 115),
        # Computed in bfloat16, by the contract `dynamic-bf16`. The last column is the largest margin of a flip.
        ("bf16", "torch", "dense"): (7.22e-03, 3.35e-02, 0, 4.16e-04, 1.90e-04, 5.92e-03, 9.79e-03, 1.00, 0),
        ("bf16", "torch", "routed"): (1.38e-02, 1.22e-01, 4.38e-01, 3.21e-03, 8.66e-04, 4.47e-02, 2.10e-02, 1.00, 0.28),
        ("bf16", "runtime", "dense"): (2.51e-02, 7.90e-02, 0, 3.06e-03, 3.74e-03, 4.47e-02, 0, 4.36, 0.36),
        ("bf16", "runtime", "routed"): (2.55e-02, 1.22e-01, 4.38e-01, 3.21e-03, 3.87e-03, 4.47e-02, 0, 2.97, 0.74),
        ("int8-bf16", "torch", "dense"): (1.15e-02, 4.52e-02, 0, 9.64e-04, 3.85e-04, 1.31e-02, 1.41e-02, 1.59, 0),
        ("int8-bf16", "torch", "routed"): (1.90e-02, 2.07e-01, 0.512, 8.60e-03, 1.21e-03, 2.02e-02, 0.0292, 1.51, 0.65),
        ("int8-bf16", "runtime", "dense"): (2.75e-02, 1.11e-01, 0, 4.07e-03, 3.97e-03, 8.89e-02, 0, 4.50, 0.94),
        ("int8-bf16", "runtime", "routed"): (3.37e-02, 2.07e-01, 6.54e-01, 8.60e-03, 6.00e-03, 2.02e-02, 0, 3.56, 0.65),
        ("int6-bf16", "torch", "dense"): (1.72e-02, 5.77e-02, 0, 1.21e-03, 1.04e-03, 1.02e-02, 2.52e-02, 2.75, 0),
        ("int6-bf16", "torch", "routed"): (2.45e-02, 1.06e-01, 0.530, 4.03e-03, 2.05e-03, 2.57e-02, 0.0388, 2.15, 0.65),
        ("int6-bf16", "runtime", "dense"): (2.89e-02, 9.38e-02, 0, 3.92e-03, 4.97e-03, 2.47e-02, 0, 4.83, 0.94),
        ("int6-bf16", "runtime", "routed"): (3.25e-02, 1.06e-01, 5.30e-01, 4.03e-03, 4.77e-03, 2.57e-02, 0, 3.36, 0.65),
        # The margins of int8: what coarse integers flip beyond them fails.
        ("int4-bf16", "torch", "dense"): (1.14e-01, 6.12e-01, 0, 1.42e-01, 4.12e-02, 4.62e-01, 1.69e-01, 15.7, 0),
        ("int4-bf16", "torch", "routed"): (1.25e-01, 6.36e-01, 0.636, 1.42e-01, 5.38e-02, 5.28e-01, 0.203, 15.7, 0.65),
        ("int4-bf16", "runtime", "dense"): (1.18e-01, 6.12e-01, 0, 1.56e-01, 4.30e-02, 4.62e-01, 0, 16.4, 0.94),
        ("int4-bf16", "runtime", "routed"): (1.25e-01, 6.36e-01, 6.36e-01, 1.56e-01, 5.38e-02, 5.28e-01, 0, 16.4, 0.65),
    }
)

BOUNDS = MeasuredBounds(
    measured_on="both samples, the built-in recipes and two more of int8, on a 2-core x86-64 Linux machine",
    layers=8,
    rows=MappingProxyType({key: Measured(*row) for key, row in _ROWS.items()}),
    router_gaps=MappingProxyType(
        {"fp16": 0.005, "int8": 0.02, "int6": 0.05, "int4": 0.1}
        | {"bf16": 0.04, "int8-bf16": 0.05, "int6-bf16": 0.06, "int4-bf16": 0.1}
    ),
)
"""The largest over all built-in prompts that were run on each sample, with the gaps of its router."""


# On the stress samples: what half precision does to the untouched decoder, in PyTorch, by name and kind. Of
# `fat-tailed-head`, whose recipe is int8hu, the second row is of that.
_STRESS: Mapping[str, Mapping[tuple[str, Kind], tuple[float, ...]]] = MappingProxyType(
    {
        # columns as above
        "small-activations": {
            ("fp16", "dense"): (1.42e-03, 4.46e-03, 0, 7.12e-06, 2.35e-06, 1.46e-05, 1.53e-03, 1.00),
            ("fp16", "routed"): (2.43e-03, 1.55e-02, 2.33e-02, 6.87e-05, 7.34e-07, 8.76e-05, 1.77e-03, 1.00),
        },
        "slow-decay": {
            ("fp16", "dense"): (3.33e-03, 1.26e-02, 0, 7.63e-05, 5.33e-05, 4.33e-04, 5.61e-03, 1.00),
            ("fp16", "routed"): (1.50e-02, 1.83e-01, 9.91e-02, 4.55e-03, 9.23e-04, 3.33e-02, 2.20e-02, 1.00),
        },
        "large-activations": {
            ("fp16", "dense"): (8.94e-04, 2.00e-03, 0, 1.39e-06, 2.57e-06, 1.37e-05, 1.28e-03, 1.00),
            ("fp16", "routed"): (1.26e-03, 8.62e-03, 6.85e-04, 6.40e-06, 6.47e-06, 7.55e-05, 1.86e-03, 1.00),
        },
        "offset-scores": {
            ("fp16", "dense"): (1.08e-03, 3.74e-03, 0, 5.50e-06, 3.70e-09, 2.27e-08, 4.14e-05, 1.00),
            ("fp16", "routed"): (1.05e-03, 4.21e-03, 4.90e-04, 8.27e-06, 2.73e-09, 1.47e-08, 3.70e-05, 1.00),
        },
        "fat-tailed-head": {
            ("fp16", "dense"): (8.50e-04, 1.41e-03, 0, 8.01e-07, 3.69e-06, 5.14e-05, 9.36e-04, 1.00),
            ("int8", "dense"): (1.12e-02, 1.47e-02, 0, 8.58e-05, 3.88e-04, 4.85e-03, 6.54e-03, 13.1),
            ("fp16", "routed"): (1.07e-03, 1.86e-03, 5.50e-02, 1.24e-06, 8.44e-06, 9.24e-05, 1.11e-03, 1.00),
            ("int8", "routed"): (1.41e-02, 2.59e-02, 6.12e-02, 2.61e-04, 1.96e-03, 1.08e-02, 1.01e-02, 14.8),
        },
        "long-context": {
            ("fp16", "dense"): (1.82e-03, 1.53e-02, 0, 1.10e-04, 5.02e-06, 1.75e-04, 1.58e-03, 1.00),
        },
    }
)


def stress_bounds(name: str, layers: int) -> MeasuredBounds:
    """The bounds of the stress sample `name`, which has that many layers."""
    return MeasuredBounds(
        measured_on=f"the stress sample {name}, on a 2-core x86-64 Linux machine",
        layers=layers,
        rows={(recipe, "torch", kind): Measured(*row) for (recipe, kind), row in _STRESS[name].items()},
        router_gaps=BOUNDS.router_gaps,
    )
