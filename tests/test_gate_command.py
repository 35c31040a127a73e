"""Mistakes of all kinds through the command itself, on a real asset: `zoo build` makes it, `zoo gate` judges it.

tests/test_mutants.py attacks the rule and the bounds with many mutants and no command. Here a few of each kind go the
whole way: overlay, weights, quantizer, lowering, tokenizer, and the gate's own parts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import frozen
from click.testing import Result

from command import zoo
from coreai_zoo.backends.coreai.backend import CoreAIStepper
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.gates import run as gate_run
from coreai_zoo.weights import quantizer
from coreai_zoo_qwen36.bounds import BOUNDS
from mutants import MUTANTS, applied
from precision_mutants import PRECISION
from suite import NIGHTLY

pytestmark = pytest.mark.slow

ENTRY = "qwen3.6-27b"
# Half of the layers, each kind among them, and as many positions as a built-in prompt has at least.
BUILD = ("--sample", "--layers", "4")
GATE = ("--prompts", "code", "--positions", "24", "--allow-weak-prompt")


@frozen
class Case:
    """A mistake that is made while a bundle is built, while it is judged, or both.

    Attributes:
        words: what is wrong.
        building: in force while it is built.
        judging: in force while it is judged: an overlay's mistake is there in both.
        told: what the gate says, or the build where it refuses already.
    """

    words: str
    building: Callable[[pytest.MonkeyPatch], contextlib.AbstractContextManager[Any]]
    judging: Callable[[pytest.MonkeyPatch], contextlib.AbstractContextManager[Any]]
    told: str


def nothing(_patch: pytest.MonkeyPatch) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def overlay(name: str) -> Callable[[pytest.MonkeyPatch], contextlib.AbstractContextManager[None]]:
    return lambda _patch: applied((MUTANTS | PRECISION)[name])


def replaced(
    owner: object, name: str, make: Callable[[Any], Any]
) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """Put what `make` gives of it in the place of an attribute."""

    @contextlib.contextmanager
    def patched(patch: pytest.MonkeyPatch) -> Iterator[None]:
        with patch.context() as own:
            own.setattr(owner, name, make(getattr(owner, name)))
            yield

    return patched


def doubled_scales(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *arguments: original(*arguments) * 2


def forgetful(original: Callable[..., Any]) -> Callable[..., Any]:
    """A runtime that clears the convolution's state before each step."""

    def call(self: CoreAIStepper, function: str, tokens: Sequence[int]) -> Any:
        self._states["convState"] = type(self._states["convState"])(np.zeros_like(self.state("convState")))
        return original(self, function, tokens)

    return call


CASES = {
    "theta of RoPE": Case("overlay", overlay("rope-theta"), overlay("rope-theta"), "control"),
    "beta without sigmoid": Case(
        "overlay", overlay("beta-without-sigmoid"), overlay("beta-without-sigmoid"), "confident flips"
    ),
    "only the asset is wrong": Case("overlay, mended since", overlay("conv-one-step-late"), nothing, "confident flips"),
    "only the gate's overlay is wrong": Case(
        "overlay, broken since", nothing, overlay("conv-one-step-late"), "control"
    ),
    "doubled scales": Case(
        "quantizer", replaced(quantizer, "_symmetric_scales", doubled_scales), nothing, "relative error"
    ),
    "a runtime that forgets": Case("runtime", nothing, replaced(CoreAIStepper, "call", forgetful), "confident flips"),
}


if NIGHTLY:  # more of the overlay, which the gate sees in the same two ways
    CASES |= {
        "attention gate left out": Case(
            "overlay", overlay("attention-gate-left-out"), overlay("attention-gate-left-out"), "control"
        ),
        "read before write": Case(
            "overlay", overlay("read-before-write"), overlay("read-before-write"), "confident flips"
        ),
        "norm after RoPE": Case("overlay", overlay("qk-norm-after-rope"), overlay("qk-norm-after-rope"), "control"),
    }


@pytest.mark.parametrize("name", CASES)
def test_the_command_fails_a_bundle_with(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    with case.building(monkeypatch):
        made = zoo("build", ENTRY, *BUILD, "-o", tmp_path, "--work-dir", tmp_path / "work", "--json")
    if made.exit_code:
        assert made.exit_code == 1
        assert case.told in made.output
        return
    with case.judging(monkeypatch):
        judged = zoo("gate", json.loads(made.stdout)["path"], *GATE, "--json")
    assert judged.exit_code == 1, f"{name}: {judged.output[-2000:]}"
    assert any(case.told in reason for reason in json.loads(judged.stdout)["verdict"]["reasons"]), judged.output[-2000:]


# ---------------------------------------------------------------------------------------------------------------------
# The gate's own parts
# ---------------------------------------------------------------------------------------------------------------------


def judge(bundle: Bundle, out: Path, *options: str) -> Result:
    asked = ("--prompts", "text", "--positions", "24", "--candidate", "torch", *options)
    return zoo("gate", bundle.directory, *asked, "-o", out, "--json")


def gated(bundle: Bundle, out: Path, *options: str) -> dict[str, Any]:
    result = judge(bundle, out, *options)
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def faults(record: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """What is wrong with a gate of an int8 bundle, seen from its transcript and that of the fp16 bundle."""
    found = []
    (prompt,), (other,) = record["prompts"], plain["prompts"]
    expected = BOUNDS.of_class("int8", "torch", "dense")
    names = [check["name"] for check in prompt["checks"]]
    if prompt["control"] is None or not any(name.startswith("control: ") for name in names):
        return ["no control"]
    errors = [position["control"]["relative_error"] for position in prompt["positions"]]
    theirs = [position["relative_error"] for position in other["positions"]]
    if not np.allclose(errors, theirs, rtol=0.5):
        found.append("the control is not the same decoder on plain weights")
    if any(
        prompt["bounds"][name] != getattr(expected, name) for name in ("median_error", "kl", "cosine", "hidden_error")
    ):
        found.append("other bounds than those of int8")
    if len([name for name in names if "hidden-state" in name]) != 2:
        found.append("layers are not looked at")
    return found


def test_the_gate_has_its_control_and_the_bounds_of_the_recipe_and_a_gate_without_is_told(
    built: Callable[[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, plain = built(ENTRY, "int8hu"), gated(built(ENTRY, "fp16"), tmp_path / "fp16")
    assert faults(gated(quantized, tmp_path / "whole"), plain) == []

    with monkeypatch.context() as patch:
        patch.setattr(gate_run, "PLAIN", "int8hu")
        result = judge(quantized, tmp_path / "quantized-control")
    assert result.exit_code == 1
    assert "control: median relative error" in result.output  # its own bounds are those of plain weights
    with monkeypatch.context() as patch:
        patch.setattr(type(BOUNDS), "of_recipe", lambda self, _roles, *rest: self.of_class("int4", rest[1], rest[2]))
        assert "other bounds than those of int8" in faults(gated(quantized, tmp_path / "loose"), plain)
    assert faults(gated(quantized, tmp_path / "none", "--no-control"), plain) == ["no control"]
