"""Mistakes in how weights are quantized that are made on purpose, in the code that does it.

Weights are stored by the code with the mistake, and then looked at by the code without: each mistake has to be found in
what was stored. Those of the quantizer alone are also found by tests/test_quantize.py, against coreai-opt itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
from attrs import frozen

from coreai_zoo import recipes
from coreai_zoo.recipes import QuantizationSpec, Recipe, Rule
from coreai_zoo.weights import convert, quantizer, store
from coreai_zoo.weights.store import WeightStore

PLAIN = Rule(None, "The rest.")


def by(*rules: Rule) -> Recipe:
    """A recipe of rules, and of nothing else quantized."""
    return Recipe("mutant", "For a mutant.", (*rules, PLAIN))


def body(spec: QuantizationSpec) -> Recipe:
    return by(Rule(spec, "For a mutant.", ("body", "head")))


INT8 = QuantizationSpec("int8", "symmetric_with_clipping", 32)
WHOLE_RANGE = QuantizationSpec("int8", "symmetric", 32)
UINT4 = QuantizationSpec("uint4", "asymmetric", 32)
MSE = QuantizationSpec("int8", "symmetric_with_clipping", 32, "mse")
INT4 = QuantizationSpec("int4", "symmetric_with_clipping", 32)

INT6 = QuantizationSpec("int6", "symmetric_with_clipping", 32)

LAYERS = by(Rule(INT4, "why", ("mlp",), layers=(2, 3)), Rule(INT8, "why", ("mlp",)))
OVERLAPPING = by(Rule(INT4, "why", ("body",), layers=(2, 3)), Rule(INT8, "why", ("mlp",)))


@frozen
class QuantizerMutant:
    """A mistake in how weights are stored.

    Attributes:
        name: short.
        mistake: it, in words.
        recipe: by which the weights are stored.
        make: puts the mistake in force.
        whole: whether other weights are in other formats, so that a whole bundle is looked at.
    """

    name: str
    mistake: str
    recipe: Recipe
    make: Callable[[pytest.MonkeyPatch], None]
    whole: bool = False


def edited(module: ModuleType, old: str, new: str) -> Mapping[str, Any]:
    """What a module defines when `old`, which is in it once, is `new`."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {module.__name__}"
    namespace = dict(vars(module))
    exec(compile(source.replace(old, new), f"<{module.__name__}>", "exec"), namespace)
    return namespace


def _quantizer(old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    def make(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(convert, "quantize_rows", edited(quantizer, old, new)["quantize_rows"])

    return make


def _rule(old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    def make(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Rule, "matches", edited(recipes, old, new)["Rule"].matches)

    return make


def _recipe(old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    def make(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Recipe, "rule_for", edited(recipes, old, new)["Recipe"].rule_for)

    return make


def _packing(old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    def make(patch: pytest.MonkeyPatch) -> None:
        from coreai_zoo.weights import formats

        packing = edited(formats, old, new)
        patch.setattr(convert, "packed_codes", packing["packed_codes"])
        patch.setattr(store, "pack_int4", packing["pack_int4"])

    return make


def _other_table(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store, "TABLE", store.TABLE[::-1])


def _exchanged(patch: pytest.MonkeyPatch) -> None:
    """Two weights of one shape have each other's scales."""
    found = WeightStore.__getitem__
    pair = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")

    def exchanged(self: WeightStore, name: str) -> Any:
        stored = found(self, name)
        if name in pair:
            other = found(self, pair[1 - pair.index(name)])
            stored.arrays["scales"] = other.arrays["scales"]  # type: ignore[index]
        return stored

    patch.setattr(WeightStore, "__getitem__", exchanged)


QUANTIZER_MUTANTS: tuple[QuantizerMutant, ...] = (
    QuantizerMutant(
        "rounds-down",
        "integers are rounded down",
        body(INT8),
        _quantizer(".round_()\n    if offsets", ".floor_()\n    if offsets"),
    ),
    QuantizerMutant(
        "127-for-128",
        "the whole range is taken for one that ends at 127 on both sides",
        body(WHOLE_RANGE),
        _quantizer("(largest / (steps / 2))", "(largest / (steps // 2))"),
    ),
    QuantizerMutant(
        "128-for-127",
        "a range that leaves out its lowest integer uses it",
        body(INT8),
        _quantizer("    values.copy_(rows)\n", "    values.copy_(rows)\n    low -= spec.signed\n"),
    ),
    QuantizerMutant(
        "blocks-shifted",
        "each block has the scale of the block before",
        body(INT8),
        _quantizer(
            "dtype, high - low))\n        if spec.scales", "dtype, high - low).roll(1, -1))\n        if spec.scales"
        ),
    ),
    QuantizerMutant(
        "sign-of-minval",
        "the zero point has the other sign",
        body(UINT4),
        _quantizer("(low - (lowest / scale).round_())", "(low + (lowest / scale).round_())"),
    ),
    QuantizerMutant(
        "zero-point-added-twice",
        "the zero point is added to integers that hold it",
        body(UINT4),
        _quantizer(
            "in_blocks.add_(offsets.float().unsqueeze(-1))", "in_blocks.add_(offsets.float().unsqueeze(-1), alpha=2)"
        ),
    ),
    QuantizerMutant(
        "largest-without-sign",
        "the largest value is taken for the largest magnitude",
        body(INT8),
        _quantizer("torch.abs(values, out=magnitudes)", "magnitudes.copy_(values)"),
    ),
    QuantizerMutant(
        "worst-scale",
        "of the scales by mse the worst is taken",
        body(MSE),
        _quantizer("smaller = found < least", "smaller = found > least"),
    ),
    QuantizerMutant(
        "mse-is-absmax",
        "scales by mse are those by the largest magnitude",
        body(MSE),
        _quantizer('if spec.scales == "mse":', "if False:"),
    ),
    QuantizerMutant(
        "halves-exchanged",
        "of two 4-bit integers in a byte the first is in the high half",
        body(INT4),
        _packing(
            "(raw[..., 1::2] << 4).bitwise_or_(raw[..., ::2] & 15)",
            "(raw[..., ::2] << 4).bitwise_or_(raw[..., 1::2] & 15)",
        ),
    ),
    QuantizerMutant("table-order", "the table of 6-bit integers begins with its last", body(INT6), _other_table),
    QuantizerMutant(
        "indices-from-zero",
        "of 6-bit integers the index is the integer, and not its place in the table",
        body(INT6),
        _packing("pack_uint6(codes - TABLE[0])", "pack_uint6(codes & 63)"),
    ),
    QuantizerMutant(
        "fours-exchanged",
        "of four 6-bit indices in three bytes the first is in the highest bits",
        body(INT6),
        _packing("first, second, third, fourth = codes", "fourth, third, second, first = codes"),
    ),
    QuantizerMutant("scales-exchanged", "two weights have each other's scales", body(INT8), _exchanged),
    QuantizerMutant(
        "order-of-rules",
        "the second of two rules goes before the first",
        OVERLAPPING,
        _recipe(
            "for rule in self.rules if rule.matches", "for rule in self.rules[1::-1] + self.rules[2:] if rule.matches"
        ),
        whole=True,
    ),
    QuantizerMutant(
        "last-layer-left-out",
        "a range of layers ends before its last",
        LAYERS,
        _rule("first <= layer <= last", "first <= layer < last"),
        whole=True,
    ),
    QuantizerMutant(
        "layers-from-one",
        "layers are counted from 1",
        LAYERS,
        _rule("layer = layer_of(parameter)\n", "layer = (layer_of(parameter) or 0) + 1\n"),
        whole=True,
    ),
)


def table() -> str:
    """The mutants as docs/gate-mutants.md has them."""
    rows = [
        f"| `{mutant.name}` | {mutant.mistake} | {'verify: weights' if mutant.whole else 'gate: weights'} |"
        for mutant in QUANTIZER_MUTANTS
    ]
    return "\n".join(["| mutant | mistake | caught by |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
