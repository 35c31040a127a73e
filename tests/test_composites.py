"""Composites of an overlay's own: one graph for all layers that call it, and what a composite may not be.

The toy of tests/toy_plugin.py gets a norm that leaks: a composite with a number of its own behind it.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from coreai_torch import get_decomp_table
from torch import Tensor, nn

from coreai_zoo.backends.coreai.composites import (
    composites_kept,
    require_known_operations,
    use_toolchain_composites,
)
from coreai_zoo.composites import Composite, RMSNorm
from coreai_zoo.errors import PluginError
from coreai_zoo.lowering import torch_export
from coreai_zoo.overlay import LayerRewrite
from coreai_zoo.recipes import QuantizationSpec
from documents import read
from test_coreai_backend import Compiled, compiled, recipe_of, toy


class Leaky(Composite):
    """What is below zero, times a slope."""

    name = "toy_leaky"

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(x > 0, x, self.slope * x), x.amax(-1, keepdim=True)


class LeakyNorm(RMSNorm):
    """A norm, what is below zero made smaller, all divided by a number as large as the largest."""

    def __init__(self, norm: RMSNorm, slope: float) -> None:
        super().__init__(norm.weight.shape[0], 1e-5)
        self.weight, self.leaky = norm.weight, Leaky(slope)

    def forward(self, x: Tensor) -> Tensor:
        leaked, largest = self.leaky(super().forward(x))
        result: Tensor = leaked / (1 + largest.abs())
        return result


def compiled_with(norm: Callable[[RMSNorm, Any], nn.Module], numbers: Sequence[float], folder: Path) -> Compiled:
    """The toy with as many layers as numbers, the norm before each MLP made from the usual one and a number."""
    model, given = toy(layers=len(numbers)), itertools.cycle(numbers)

    def replaced(usual: nn.Module) -> nn.Module:
        assert isinstance(usual, RMSNorm)
        return norm(usual, next(given))

    rewrite = LayerRewrite("other-norm", "layers.*.mlp_norm", "to have a composite", replaced, keeps_parameters=True)
    model = evolve(model, rewrites=(*model.rewrites, rewrite))
    return compiled(model, recipe_of(QuantizationSpec("int8", "symmetric", 32)), folder)


def require_as_in_torch(asset: Compiled, deviations: float) -> None:
    """On the runtime it gives the logits that its decoder gives in PyTorch, within so many standard deviations."""
    module, _ = asset.model.bound(asset.store, values=True)
    expected, found = asset.model.stepped_in_torch(module), asset.model.stepped(asset.path).astype(np.float32)
    np.testing.assert_allclose(found, expected, atol=deviations * expected.std())


def called(program: str) -> list[str]:
    """The graphs of `toy_leaky` that the layers of a program call, one after the other, each as what it declares."""
    declared = dict(
        re.findall(
            r"coreai\.graph private noinline @\"?(toy_leaky_\d+)\"?.*?op_attrs = \{([^}]*)\}", program, re.DOTALL
        )
    )
    return [declared[name] for name in re.findall(r"coreai\.invoke @\"?(toy_leaky_\d+)", program)]


@pytest.mark.parametrize("slopes", [(0.5, 0.5, 0.5, 0.5, 0.5, 0.5), (0.25, -2.0, 0.25)], ids=["alike", "unlike"])
def test_a_composite_is_one_graph_for_all_layers_that_are_alike(slopes: tuple[float, ...], tmp_path: Path) -> None:
    asset = compiled_with(LeakyNorm, slopes, tmp_path / "asset")
    program = asset.program
    assert program.count('composite_declaration<"toy_leaky"') == len(set(slopes))
    assert called(program) == [f"slope = {slope:.6e} : f32, version = 1 : si64" for slope in slopes]
    require_as_in_torch(asset, 0.01)


class Doubled(Composite):
    name = "toy_doubled"

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Halved(Doubled):
    name = "toy_halved"

    def forward(self, x: Tensor) -> Tensor:
        return -0.5 * x


class Largest(Composite):
    """Gives another shape than it is given."""

    name = "toy_largest"

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(-1, keepdim=True)


class Mixed(Composite):
    """Two inputs that may be missing."""

    name = "toy_mixed"

    def forward(self, x: Tensor, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        x = x if up is None else x + up
        return x if down is None else x - 0.5 * down


class Placed(Composite):
    """A number that counts up from layer to layer."""

    name = "toy_placed"

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - 0.2 * self.place)


class Faint(Composite):
    """A number that is the class's, and one in a slot."""

    name = "toy_faint"
    gain = 0.5
    __slots__ = ("own",)

    def __init__(self, own: float) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gain * self.own)


class MixingNorm(RMSNorm):
    def __init__(self, norm: RMSNorm, place: int) -> None:
        super().__init__(norm.weight.shape[0], 1e-5)
        self.weight, self.doubled, self.halved, self.mixed = norm.weight, Doubled(), Halved(), Mixed()
        self.placed, self.faint, self.fainter, self.largest = Placed(place), Faint(1.0), Faint(-0.25), Largest()

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        x = self.doubled(x) + self.halved(x.relu())
        x = self.mixed(self.mixed(x, x.relu()), None, x.abs())
        result: Tensor = (self.faint(self.placed(x)) + self.fainter(x)) / (1 + self.largest(x).abs())
        return result


def test_composites_that_differ_in_anything_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In class, which inputs there are, a number that counts up, a slot, and what the process has seen before."""
    for layers, gain in ((9, 0.5), (2, -1.5)):
        monkeypatch.setattr(Faint, "gain", gain)
        asset = compiled_with(MixingNorm, range(layers), tmp_path / str(layers))
        declared = Counter(re.findall(r'composite_declaration<"(toy_\w+)"', asset.program))
        once = {"toy_doubled": 1, "toy_halved": 1, "toy_largest": 1}
        assert declared == once | {"toy_mixed": 2, "toy_placed": layers, "toy_faint": 2}
        require_as_in_torch(asset, 0.02)


def test_a_composite_can_be_traced_again() -> None:
    module = nn.ModuleDict({"leaky": Leaky(1.0)})
    for _ in range(2):
        with composites_kept(module, use_toolchain_composites(module)):
            assert "forward" in vars(module["leaky"])
        assert vars(module["leaky"]).keys() == vars(Leaky(1.0)).keys()


# ---------------------------------------------------------------------------------------------------------------------
# What a composite may not be
# ---------------------------------------------------------------------------------------------------------------------


class Nameless(Composite):
    pass


class Spaced(Leaky):
    name = "toy leaky"


class AnotherOfThatName(Leaky):
    pass


class Norm(Leaky):
    name = "rms_norm"


class Accented(Leaky):
    name = "é"


class KeywordOnly(Leaky):
    def forward(self, x: Tensor, *, other: Tensor) -> Tensor:  # type: ignore[override]
        return x + other


class TakesNumber(Leaky):
    def forward(self, x: Tensor, slope: float = 2.0) -> Tensor:  # type: ignore[override]
        return x * slope


class NotAnnotated(Leaky):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return x


class Unknown(Leaky):
    def forward(self, x: Nowhere) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
        return x


class Versioned(Leaky):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.version = 2


class Large(Leaky):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.size = 2**70


class Weighted(Leaky):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.gain = nn.Parameter(torch.ones(1))


class Buffered(Leaky):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.register_buffer("mask", torch.ones(1), persistent=False)


class Nested(Leaky):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.inner = nn.Identity()


class Listed(Leaky):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.slopes = [1.0, 2.0]


REFUSED = {
    "without a name": (Nameless, "0 is a composite, and its `name` is None."),
    "a name with a space": (lambda: Spaced(1.0), "0 is a composite, and its `name` is 'toy leaky'."),
    "a name that is not ASCII": (lambda: Accented(1.0), "0 is a composite, and its `name` is 'é'."),
    "a keyword": (lambda: KeywordOnly(1.0), "0 is a composite, and its forward takes other: 'Tensor'."),
    "a number": (lambda: TakesNumber(1.0), "0 is a composite, and its forward takes slope: 'float' = 2.0."),
    "something unsaid": (lambda: NotAnnotated(1.0), "0 is a composite, and its forward takes x."),
    "an annotation of nothing": (
        lambda: Unknown(1.0),
        "0 is a composite, and the annotations of its forward cannot be read: name 'Nowhere' is not defined.",
    ),
    "an attribute of the toolchain's": (Versioned, "0 is a composite, and its attribute version is one that"),
    "a large number": (Large, "0 is a composite, and its attribute size has more than 64 bits."),
    "a name of the toolchain's": (lambda: Norm(1.0), "0 is a composite called rms_norm, and so is another one."),
    "a parameter": (Weighted, "0 is a composite and holds gain."),
    "a buffer": (Buffered, "0 is a composite and holds mask."),
    "another module": (Nested, "0 is a composite and holds inner."),
    "a list": (Listed, "0 is a composite, and its attribute slopes is of type list."),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_kept_whole_is_refused_in_words(kind: str) -> None:
    make, said = REFUSED[kind]
    with pytest.raises(PluginError) as refused:
        use_toolchain_composites(nn.ModuleList([make()]))
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("a name with a space", "Say `name` in its class: letters, digits and underscores."),
        ("something unsaid", "Annotate it: `x: Tensor`."),
        ("a list", "Attributes are numbers, truth values or text; a tensor is an input of its forward."),
    ],
)
def test_a_refusal_says_what_to_write_instead(kind: str, hint: str) -> None:
    with pytest.raises(PluginError) as refused:
        use_toolchain_composites(nn.ModuleList([REFUSED[kind][0]()]))
    assert refused.value.hint == hint


def test_the_composite_of_the_documentation_is_one_and_is_lowered() -> None:
    (code,) = re.findall(r"```python\n(.*?ClampedSwiGLU.*?)```", read("overlay.md"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    module = nn.ModuleList([names["ClampedSwiGLU"](7.0)])
    (spec,) = use_toolchain_composites(module)
    assert (spec.composite_op_name, spec.composite_attrs) == ("acme_clamped_swiglu", ["limit"])
    program = torch_export.export(module[0], (torch.ones(2), torch.ones(2)), ({}, {}), get_decomp_table())
    require_known_operations(program, {})


def test_two_composites_of_one_name_are_refused() -> None:
    module = nn.ModuleDict({"one": Leaky(1.0), "other": AnotherOfThatName(1.0)})
    with pytest.raises(PluginError, match=r"^other is a composite called toy_leaky, and so is another one\.$"):
        use_toolchain_composites(module)
    assert use_toolchain_composites(nn.ModuleList([Leaky(1.0), Leaky(2.0)]))[0].composite_attrs == ["slope"]
