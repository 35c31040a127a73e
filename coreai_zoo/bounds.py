"""Bounds on the measures of a gate, and the measurements that they are made of.

A bound is the largest value that untouched models of a family show on any built-in prompt, times a factor that is
stated here. There is a set for each class of recipes, by the coarsest integers that it stores, and for each arithmetic:
a runtime may sum in half precision, PyTorch does not. A plugin brings what it measured on its own models through
`zoo_gate_bounds`; where none did, the looser bounds of `GENERAL` hold. docs/gate.md has both tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from attrs import evolve, field, frozen
from attrs.validators import ge, min_len

from coreai_zoo.dtypes import bits_of
from coreai_zoo.errors import BadInput
from coreai_zoo.recipes import recorded_forms

MEDIAN_FACTOR = 1.5
"""On medians over positions, which vary little from prompt to prompt."""

EXTREME_FACTOR = 2.0
"""On largest values, which vary more."""

CONFIDENT_MARGIN = 0.1
"""Oracle top-2 margin, in logits, from which a flip is an error of what computes in half precision; the rule of the
published 27B results."""

BFLOAT16_MARGIN = 8 * CONFIDENT_MARGIN
"""The same of what computes in bfloat16, which has three bits less. Of the published 27B, one position with a margin of
0.5 is another token in bfloat16 than in half precision."""

Arithmetic = Literal["torch", "runtime"]
Kind = Literal["dense", "routed"]


def kind_of(experts_per_token: int | None) -> Kind:
    """Whether layers choose experts, by how many they choose; None without a router."""
    return "dense" if experts_per_token is None else "routed"


@frozen
class Bounds:
    """The largest errors that a candidate may show. They are relative, see `gates.rule.Position.relative_error`.

    Attributes:
        name: of the class of recipes.
        arithmetic: of what runs it.
        median_error: median relative error over positions.
        error: largest relative error, but for router near-ties.
        near_tie_error: the same at router near-ties, where an expert may have been swapped.
        cosine: lowest cosine, but for router near-ties.
        median_kl: median KL over positions, in nats.
        kl: largest KL, but for router near-ties.
        hidden_error: largest over layers of the median over positions, see `gates.rule.Verdict.hidden_error`.
        over_control: median relative error over that of the control.
        layers: depth of the model that they are for.
        measured_on: the models and the machine that they were measured on, in words.
        router_gap: oracle gap of a router, in router logits, below which errors may swap an expert; None without one.
        margin: the oracle's margin, in logits, from which a flip is an error.
    """

    name: str
    arithmetic: Arithmetic
    median_error: float
    error: float
    near_tie_error: float
    cosine: float
    median_kl: float
    kl: float
    hidden_error: float
    over_control: float
    layers: int
    measured_on: str
    router_gap: float | None = None
    margin: float = CONFIDENT_MARGIN

    def for_depth(self, layers: int) -> Bounds:
        """The bounds of a deeper model than the measured ones; a shallower one is held to theirs.

        Errors of layers add up like independent noise: they grow with the square root of the depth, KL and 1 - cosine
        with its squares.
        """
        growth = max(1.0, layers / self.layers)
        root = math.sqrt(growth)
        return evolve(
            self,
            median_error=self.median_error * root,
            error=self.error * root,
            cosine=1 - (1 - self.cosine) * growth,
            median_kl=self.median_kl * growth,
            kl=self.kl * growth,
            hidden_error=self.hidden_error * root,
            layers=layers,
        )


@frozen
class Measured:
    """The largest values over all prompts of untouched bundles of one class of recipes.

    Attributes:
        median_error: median relative error over positions.
        error: largest relative error, but for router near-ties.
        near_tie_error: the same at router near-ties; 0 without a router.
        cosine_distance: largest 1 - cosine, but for router near-ties.
        median_kl: median KL over positions, in nats.
        kl: largest KL, but for router near-ties.
        hidden_error: largest over layers of the median over positions; 0 where layers are not seen.
        over_control: median relative error over that of the control.
        flip_margin: in bfloat16, largest oracle margin at which another token is best; 0 in half precision, whose
            margin is fixed.
    """

    median_error: float = field(validator=ge(0))
    error: float = field(validator=ge(0))
    near_tie_error: float = field(validator=ge(0))
    cosine_distance: float = field(validator=ge(0))
    median_kl: float = field(validator=ge(0))
    kl: float = field(validator=ge(0))
    hidden_error: float = field(validator=ge(0))
    over_control: float = field(validator=ge(0))
    flip_margin: float = field(default=0.0, validator=ge(0))


@frozen
class MeasuredBounds:
    """The measurements of a family's models, and the bounds that follow from them.

    Attributes:
        measured_on: the models and the machine, in words, for the report.
        layers: depth of these models.
        rows: what they showed, by class of recipes (`fp16`, or `int8`, `int6` and `int4` by the coarsest integers; of
            what computes in bfloat16 `bf16`, `int8-bf16` and so on), arithmetic, and whether layers choose experts. A
            class that is not here has the bounds of `GENERAL`.
        router_gaps: by class of recipes, the gap between the last chosen and the first rejected expert, in router
            logits, below which errors of that size may swap the two. Needed for each class that has a `routed` row.
        slack: a further factor on errors (its square on KL and 1 - cosine), for models that were not measured.
    """

    measured_on: str = field(validator=min_len(1))
    layers: int = field(validator=ge(1))
    rows: Mapping[tuple[str, Arithmetic, Kind], Measured] = field()
    router_gaps: Mapping[str, float] = field()
    slack: float = field(default=1.0, validator=ge(1.0))

    @rows.validator
    def _half_precision_has_one_margin(self, _attribute: object, rows: Mapping[Any, Measured]) -> None:
        moved = sorted({name for (name, *_), row in rows.items() if row.flip_margin and not _in_bfloat16(name)})
        if moved:
            raise ValueError(f"{', '.join(moved)} compute in half precision, whose margin is {CONFIDENT_MARGIN}")

    @router_gaps.validator
    def _every_routed_class_has_a_gap(self, _attribute: object, gaps: Mapping[str, float]) -> None:
        lacking = sorted({name for name, _arithmetic, kind in self.rows if kind == "routed"} - set(gaps))
        if lacking:
            raise ValueError(f"no router gap for {', '.join(lacking)}, of which a routed model was measured")

    def of_class(self, name: str, arithmetic: Arithmetic, kind: Kind = "dense") -> Bounds:
        """The bounds of a class of recipes at the measured depth: what was measured times the factors.

        KL and 1 - cosine are squares of errors, and their factors squares.

        Raises:
            BadInput: when nobody ever measured such a class.
        """
        if (name, arithmetic, kind) not in self.rows:
            if self is GENERAL:
                raise BadInput(
                    f"There are no bounds for recipes of the class {name}.",
                    "A plugin can bring those that it measured: see zoo_gate_bounds in docs/hooks.md.",
                )
            return GENERAL.of_class(name, arithmetic, kind)
        row = self.rows[name, arithmetic, kind]
        median, extreme = MEDIAN_FACTOR * self.slack, EXTREME_FACTOR * self.slack
        return Bounds(
            name,
            arithmetic,
            median_error=row.median_error * median,
            error=row.error * extreme,
            near_tie_error=row.near_tie_error * extreme,
            cosine=1 - row.cosine_distance * extreme**2,
            median_kl=row.median_kl * median**2,
            kl=row.kl * extreme**2,
            hidden_error=row.hidden_error * median,
            over_control=row.over_control * median,
            layers=self.layers,
            measured_on=self.measured_on,
            router_gap=self.router_gaps[name] if kind == "routed" else None,
            margin=max(BFLOAT16_MARGIN if _in_bfloat16(name) else CONFIDENT_MARGIN, row.flip_margin * EXTREME_FACTOR),
        )

    def of_recipe(
        self,
        roles: Mapping[str, Any],
        layers: int,
        arithmetic: Arithmetic,
        kind: Kind = "dense",
        compute_dtype: str = "float16",
    ) -> Bounds:
        """The bounds of a bundle: of its coarsest integers and of what it computes in, for its depth.

        Args:
            roles: of `build.json`: how each role is stored, see `recorded_forms`.
            layers: depth of the model.
            arithmetic: of what runs it.
            kind: whether its layers choose experts.
            compute_dtype: of its contract.
        """
        forms = [form for stored in roles.values() for form in recorded_forms(stored) if form is not None]
        bits = {bits_of(str(form["dtype"])) for form in forms}
        return self.of_class(_class_of(min(bits, default=None), compute_dtype), arithmetic, kind).for_depth(layers)

    def table(self) -> str:
        """All bounds at the measured depth as a Markdown table; docs/gate.md holds it."""
        header = ("recipe", "runs in", "model", "median error", "largest", "at near-ties", "cosine", "median KL", "KL")
        lines = ["| " + " | ".join((*header, "hidden state", "over control", "margin")) + " |", "|" + " --- |" * 12]
        for name, arithmetic, kind in self.rows:
            bounds = self.of_class(name, arithmetic, kind)
            cells = [name, arithmetic, kind, f"{bounds.median_error:.2g}", f"{bounds.error:.2g}"]
            cells += [f"{bounds.near_tie_error:.2g}" if kind == "routed" else "-", f"{bounds.cosine:.6g}"]
            cells += [f"{bounds.median_kl:.1e}", f"{bounds.kl:.1e}"]
            cells += [f"{bounds.hidden_error:.2g}" if arithmetic == "torch" else "-", f"{bounds.over_control:.1f}"]
            cells += [f"{bounds.margin:.2g}"]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def _in_bfloat16(name: str) -> bool:
    return name.endswith("bf16")


def _class_of(bits: int | None, compute_dtype: str) -> str:
    """The class of recipes with integers of so many bits, None for none; half precision is not named in it."""
    if compute_dtype == "bfloat16":
        return "bf16" if bits is None else f"int{bits}-bf16"
    return "fp16" if bits is None else f"int{bits}"


# The larger of what a dense and a routed miniature showed, rounded up.
_GENERAL: Mapping[tuple[str, Arithmetic], Measured] = MappingProxyType(
    {
        #                            median   largest near-tie 1 - cos  med. KL  KL      hidden  / control
        ("fp16", "torch"): Measured(0.0038, 0.045, 0.16, 0.00036, 3.7e-05, 0.0051, 0.0055, 1.0),
        ("fp16", "runtime"): Measured(0.0057, 0.045, 0.16, 0.00043, 7.0e-05, 0.0051, 0, 4.7),
        ("int8", "torch"): Measured(0.011, 0.11, 0.53, 0.0029, 0.00056, 0.039, 0.021, 12),
        ("int8", "runtime"): Measured(0.012, 0.11, 0.53, 0.0029, 0.00076, 0.058, 0, 13),
        ("int6", "torch"): Measured(0.039, 0.17, 0.43, 0.006, 0.0043, 0.066, 0.055, 40),
        ("int6", "runtime"): Measured(0.039, 0.17, 0.43, 0.006, 0.0045, 0.066, 0, 40),
        ("int4", "torch"): Measured(0.11, 0.72, 0.72, 0.17, 0.014, 0.12, 0.27, 125),
        ("int4", "runtime"): Measured(0.11, 0.72, 0.72, 0.17, 0.014, 0.12, 0, 125),
        # In bfloat16; the last column is the largest margin of a flip.
        ("bf16", "torch"): Measured(0.014, 0.13, 0.44, 0.0033, 0.00087, 0.045, 0.021, 1.0, 0.28),
        ("bf16", "runtime"): Measured(0.026, 0.13, 0.44, 0.0033, 0.0039, 0.045, 0, 4.4, 0.74),
        ("int8-bf16", "torch"): Measured(0.019, 0.21, 0.52, 0.0087, 0.0013, 0.021, 0.03, 1.6, 0.65),
        ("int8-bf16", "runtime"): Measured(0.034, 0.21, 0.66, 0.0087, 0.006, 0.089, 0, 4.5, 0.94),
        ("int6-bf16", "torch"): Measured(0.025, 0.11, 0.53, 0.0041, 0.0021, 0.026, 0.039, 2.8, 0.65),
        ("int6-bf16", "runtime"): Measured(0.033, 0.11, 0.53, 0.0041, 0.005, 0.026, 0, 4.9, 0.94),
        ("int4-bf16", "torch"): Measured(0.13, 0.64, 0.64, 0.16, 0.054, 0.53, 0.21, 16, 0.65),
        ("int4-bf16", "runtime"): Measured(0.13, 0.64, 0.64, 0.16, 0.054, 0.53, 0, 17, 0.94),
    }
)

_BF16_GAPS = {"bf16": 0.04, "int8-bf16": 0.05, "int6-bf16": 0.06, "int4-bf16": 0.1}
_KINDS: tuple[Kind, ...] = ("dense", "routed")

GENERAL = MeasuredBounds(
    measured_on="trained miniatures of another family, on a 2-core x86-64 Linux machine, with twice the allowance",
    layers=8,
    rows=MappingProxyType({(*key, kind): row for key, row in _GENERAL.items() for kind in _KINDS}),
    router_gaps=MappingProxyType({"fp16": 0.005, "int8": 0.02, "int6": 0.05, "int4": 0.1, **_BF16_GAPS}),
    slack=2.0,
)
"""The bounds of a family that nobody measured: the looser of dense and routed models, times two."""
