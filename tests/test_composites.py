"""Composites of an overlay's own: one graph for all layers that call it, and what a composite may not be.

The toy of tests/toy_plugin.py gets a norm that leaks: a composite with a number of its own behind it.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from torch import Tensor, nn

from coreai_zoo.backends.coreai.composites import use_toolchain_composites
from coreai_zoo.composites import Composite, RMSNorm
from coreai_zoo.errors import PluginError
from coreai_zoo.overlay import LayerRewrite
from coreai_zoo.recipes import QuantizationSpec
from test_coreai_backend import compiled, recipe_of, toy


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


def leaking(*slopes: float) -> Any:
    """The toy with as many layers, each of which leaks so much."""
    model, given = toy(layers=len(slopes)), itertools.cycle(slopes)

    def leak(norm: nn.Module) -> nn.Module:
        assert isinstance(norm, RMSNorm)
        return LeakyNorm(norm, next(given))

    rewrite = LayerRewrite("leaky", "layers.*.mlp_norm", "to have a composite", leak, keeps_parameters=True)
    return evolve(model, rewrites=(*model.rewrites, rewrite))


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
    asset = compiled(leaking(*slopes), recipe_of(QuantizationSpec("int8", "symmetric", 32)), tmp_path / "asset")
    program = asset.program
    assert program.count('composite_declaration<"toy_leaky"') == len(set(slopes))
    assert called(program) == [f"slope = {slope:.6e} : f32, version = 1 : si64" for slope in slopes]

    module, _ = asset.model.bound(asset.store, values=True)
    expected = asset.model.stepped_in_torch(module)
    np.testing.assert_allclose(asset.model.stepped(asset.path).astype(np.float32), expected, atol=0.01 * expected.std())


# ---------------------------------------------------------------------------------------------------------------------
# What a composite may not be
# ---------------------------------------------------------------------------------------------------------------------


class Nameless(Composite):
    pass


class Spaced(Leaky):
    name = "toy leaky"


class AnotherOfThatName(Composite):
    name = "toy_leaky"


class Norm(Composite):
    name = "rms_norm"


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
    "a name of the toolchain's": (Norm, "0 is a composite called rms_norm, and so is another one."),
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


def test_two_composites_of_one_name_are_refused() -> None:
    module = nn.ModuleDict({"one": Leaky(1.0), "other": AnotherOfThatName()})
    with pytest.raises(PluginError, match=r"^other is a composite called toy_leaky, and so is another one\.$"):
        use_toolchain_composites(module)
    assert use_toolchain_composites(nn.ModuleList([Leaky(1.0), Leaky(2.0)]))[0].composite_attrs == ["slope"]
