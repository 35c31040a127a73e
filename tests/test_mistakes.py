"""A mistake in an overlay is one paragraph: the layer, the line of the overlay, and what torch said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import Tensor, nn

import toy_plugin
from command import zoo
from coreai_zoo import hookimpl
from coreai_zoo.backends import builtin
from coreai_zoo.composites import Composite
from coreai_zoo.errors import PluginError
from coreai_zoo.lowering import mistakes
from coreai_zoo.overlay import LayerRewrite, Overlay
from coreai_zoo.plugins import Plugins
from coreai_zoo.signature import StateSpec
from test_toy_plugin import CONFIG, ENTRY, checkpoint_tensors, write_tokenizer

HERE = Path(__file__)


# ---------------------------------------------------------------------------------------------------------------------
# Overlays with one mistake each, in a line that is marked
# ---------------------------------------------------------------------------------------------------------------------


class WrongShape(toy_plugin.Attention):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        x = x @ self.k.weight  # mistake: wrong shape
        return super().forward(x, keys, values, length)


class Branch(toy_plugin.Attention):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        if x.sum() > 0:  # mistake: branch
            x = -x
        return super().forward(x, keys, values, length)


class MissingAttribute(toy_plugin.Attention):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        x = x * self.gain  # mistake: missing attribute
        return super().forward(x, keys, values, length)


class NotLowered(toy_plugin.Attention):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        x = torch.special.bessel_j0(x.float()).to(x.dtype)  # mistake: not lowered
        return super().forward(x, keys, values, length)


class Leaves(toy_plugin.Attention):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        raise SystemExit("enough")  # mistake: leaves


class Picks(toy_plugin.Attention):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        x = x[x.abs() > 0].reshape(x.shape)  # mistake: data-dependent index
        return super().forward(x, keys, values, length)


class Folds(toy_plugin.Attention):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        weight = self.k.weight.float().sigmoid().to(x.dtype)  # mistake: folds
        x = x + self.k(x).mean()  # which is no mistake
        projected = self.q(x), nn.functional.linear(x, weight), self.v(x)
        query, key, value = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projected)
        keys[:, :, length - x.shape[1] : length] = key
        values[:, :, length - x.shape[1] : length] = value
        out: Tensor = self.o(self.sdpa(query, keys[:, :, :length], values[:, :, :length]).transpose(1, 2).flatten(2))
        return out


class Forgets(toy_plugin.Attention):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        keys[:, :, length - x.shape[1] : length] = self.k(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        values[:, :, length - x.shape[1] : length] = self.v(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return x


class GivesNone(toy_plugin.ToyDecoder):
    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> Any:  # mistake: gives none
        super().forward(a, b, c, d, e)


class GivesTwo(toy_plugin.ToyDecoder):
    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> Any:  # mistake: gives two
        logits = super().forward(a, b, c, d, e)
        return logits, logits * 2


class Gathers(toy_plugin.ToyDecoder):
    def forward(self, *tensors: Tensor) -> Tensor:  # mistake: gathers
        return super().forward(*tensors)


class Exotic(toy_plugin.Attention):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        return super().forward(nn.functional.elu(x), keys, values, length)


class HalvedWrongly(Composite):
    name = "toy_halved"

    def forward(self, x: Tensor) -> Tensor:
        return x + x[..., ::2]  # mistake: wrong shape in a composite


class Bessel(Composite):
    name = "toy_bessel"

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x.float()).to(x.dtype)  # mistake: not lowered in a composite


class Writes(Composite):
    name = "toy_writes"

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class GivesNothing(Writes):
    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        return None


def behind(composite: type[Composite]) -> type[toy_plugin.Attention]:
    """Attention to what a composite makes of its input; the composite is called as its operation is."""
    own = composite.name.removeprefix("toy_")

    class Behind(toy_plugin.Attention):
        def __init__(self, config: toy_plugin.ToyConfig) -> None:
            super().__init__(config)
            self.add_module(own, composite())

        def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
            return super().forward(self.get_submodule(own)(x), keys, values, length)

    return Behind


class Unmade(toy_plugin.Attention):
    def __init__(self, config: toy_plugin.ToyConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_width, 1)  # type: ignore[attr-defined]  # mistake: not made


class TooFewStates(toy_plugin.ToyDecoder):
    def forward(self, input_ids: Tensor, position_ids: Tensor, keys: Tensor) -> Tensor:  # mistake: states
        return super().forward(input_ids, position_ids, keys, keys, keys)


class Mistaken(toy_plugin.ToyOverlay):
    """The toy with another attention, or another decoder."""

    def __init__(self, mistake: type[nn.Module]) -> None:
        self.mistake = mistake

    def decoder(self, config: toy_plugin.ToyConfig, contract: Any) -> nn.Module:
        """The decoder, with the mistake in every layer."""
        attends = issubclass(self.mistake, toy_plugin.Attention)
        decoder = toy_plugin.ToyDecoder(config) if attends else self.mistake(config)
        for layer in decoder.layers if attends else ():
            layer.attention = self.mistake(config)
        return decoder.to(getattr(torch, contract.compute_dtype))


class MistakenPlugin(toy_plugin.ToyPlugin):
    """The toy's plugin, with a mistaken overlay or rewrite. Core ML wants every state in half precision."""

    def __init__(self, entry: Path, overlay: Overlay, rewrites: tuple[LayerRewrite, ...] = ()) -> None:
        super().__init__(entry)
        self.overlay, self.rewrites = overlay, rewrites

    @hookimpl
    def zoo_claim_overlay(self, model_type: str) -> Overlay | None:
        return self.overlay if model_type == toy_plugin.MODEL_TYPE else None

    @hookimpl
    def zoo_layer_rewrites(self, overlay: Overlay) -> tuple[LayerRewrite, ...]:
        return self.rewrites

    @hookimpl
    def zoo_extra_states(self, overlay: Overlay, config: Any) -> tuple[StateSpec, ...]:
        return (StateSpec(name="meanState", shape=(config.layers, 1, config.hidden_size), dtype="float16"),)


def line_of(mistake: str) -> str:
    """`file:line, text` of the line that is marked so."""
    lines = HERE.read_text(encoding="utf-8").splitlines()
    (number,) = [at for at, line in enumerate(lines, 1) if line.endswith(f"  # mistake: {mistake}")]
    return f"{HERE}:{number}, `{lines[number - 1].strip()}`"


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def build(
    folder: Path,
    layers: int,
    backend: str,
    overlay: Overlay,
    rewrites: tuple[LayerRewrite, ...] = (),
    before: tuple[str, ...] = (),
) -> Result:
    """`zoo build` of the toy with that overlay."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({**CONFIG, "layers": layers}), encoding="utf-8")
    tensors = checkpoint_tensors()
    for index in range(CONFIG["layers"], layers):
        tensors |= {
            name.replace("block.0.", f"block.{index}."): tensor
            for name, tensor in tensors.items()
            if name.startswith("block.0.")
        }
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, checkpoint / "model.safetensors")
    write_tokenizer(checkpoint)
    entry = folder / "toy.toml"
    entry.write_text(ENTRY.replace("layers = 2", f"layers = {layers}"), encoding="utf-8")
    plugins = Plugins()
    plugins.register(builtin, "coreai")
    plugins.register(MistakenPlugin(entry, overlay, rewrites), "toys")
    options = ("--checkpoint", checkpoint, "-o", folder / "exports", "--recipe", "fp16", "--json")
    return zoo(*before, "build", "toy-mean", *options, "--backend", backend, plugins=plugins)


def paragraph(result: Result, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that the command said; nothing else was printed, by whomever."""
    assert result.exit_code == PluginError.exit_code
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert capfd.readouterr() == ("", "")
    assert len(line) < 4 * 120 + len(str(HERE))
    return line


TRACED = {
    WrongShape: ("wrong shape", "RuntimeError: "),
    Branch: ("branch", "GuardOnDataDependentSymNode: Could not guard on data-dependent expression "),
    MissingAttribute: ("missing attribute", "AttributeError: 'MissingAttribute' object has no attribute 'gain'."),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["coreai", "coreml"])
@pytest.mark.parametrize("mistake", TRACED, ids=lambda mistake: mistake.__name__)
def test_a_mistake_that_tracing_meets_is_one_paragraph(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], backend: str, mistake: type[nn.Module]
) -> None:
    marked, said = TRACED[mistake]
    # Core AI tries with the first layers where there are many: nothing may be said of that either.
    result = build(tmp_path, 6 if backend == "coreai" else 2, backend, Mistaken(mistake))
    line = paragraph(result, capfd)
    place = f"layer layers.0.attention fails at {line_of(marked)}"
    assert line.startswith(f"error: The decoder cannot be traced: {place}. {said}")
    assert not (tmp_path / "exports").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (
            "coreai",
            "ValueError: The exported program contains unsupported ATen ops: aten.special_bessel_j0.default. "
            "Write it with other operations.",
        ),
        ("coreml", "NotImplementedError: Unsupported fx node special_bessel_j0, kind special_bessel_j0."),
    ],
)
def test_an_operation_that_is_not_lowered_is_one_paragraph(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], backend: str, said: str
) -> None:
    line = paragraph(build(tmp_path, 2, backend, Mistaken(NotLowered)), capfd)
    place = f"layer layers.0.attention fails at {line_of('not lowered')}"
    assert line.startswith(f"error: The decoder cannot be lowered: {place}. {said}")
    assert not (tmp_path / "exports").exists()


@pytest.mark.slow
def test_a_mistake_in_a_composite_is_one_paragraph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = paragraph(build(tmp_path, 6, "coreai", Mistaken(behind(HalvedWrongly))), capfd)
    place = f"layer layers.0.attention.halved fails at {line_of('wrong shape in a composite')}"
    assert line.startswith(f"error: The decoder cannot be traced: {place}. RuntimeError: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("composite", "said"),
    [
        (Writes, "error: layers.0.attention.writes is a composite and writes to a tensor that it is given."),
        (GivesNothing, "error: A composite of the decoder cannot be kept whole. RuntimeError: "),
    ],
    ids=["writes", "gives nothing"],
)
def test_what_a_composite_may_not_do_is_one_paragraph(
    composite: type[Composite], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert paragraph(build(tmp_path, 6, "coreai", Mistaken(behind(composite))), capfd).startswith(said)
    assert not (tmp_path / "exports").exists()


@pytest.mark.slow
def test_an_operation_of_a_composite_that_is_not_lowered_is_one_paragraph(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = paragraph(build(tmp_path, 6, "coreai", Mistaken(behind(Bessel))), capfd)
    place = f"layer layers.0.attention.bessel fails at {line_of('not lowered in a composite')}"
    assert line.startswith(f"error: The decoder cannot be lowered: {place}. ValueError: ")
    assert not (tmp_path / "exports").exists()
    assert "aten.special_bessel_j0.default" in line


@pytest.mark.parametrize("backend", ["coreai", "coreml"])
def test_a_decoder_that_takes_too_few_states_is_one_paragraph(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], backend: str
) -> None:
    line = paragraph(build(tmp_path, 2, backend, Mistaken(TooFewStates)), capfd)
    assert "input_ids, position_ids, keyCache, valueCache, meanState" in line
    assert line.endswith(f"its forward is defined at {line_of('states')}. TypeError: too many positional arguments.")


def test_a_decoder_that_cannot_be_made_is_one_paragraph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = paragraph(build(tmp_path, 2, "coreai", Mistaken(Unmade)), capfd)
    said = "AttributeError: 'ToyConfig' object has no attribute 'hidden_width'."
    assert line == f"error: plugin 'toys' failed in overlay 'toy': {said} It is raised at {line_of('not made')}."


def test_a_rewrite_that_fails_is_one_paragraph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def widened(layer: nn.Module) -> nn.Module:
        return nn.Linear(layer.width, 1)  # type: ignore[arg-type]  # mistake: rewrite

    rewrite = LayerRewrite("widen", "layers.*.attention", "to see what happens", widened)
    line = paragraph(build(tmp_path, 2, "coreai", toy_plugin.ToyOverlay(), (rewrite,)), capfd)
    said = "AttributeError: 'Attention' object has no attribute 'width'."
    place = f"rewrite 'widen' of layer layers.0.attention: {said} It is raised at {line_of('rewrite')}."
    assert line == f"error: plugin 'toys' failed in {place}"


def test_debug_keeps_the_whole_traceback(tmp_path: Path) -> None:
    result = build(tmp_path, 2, "coreml", Mistaken(MissingAttribute), before=("--debug",))
    assert isinstance(result.exception, PluginError)
    cause = result.exception.__cause__
    assert isinstance(cause, AttributeError)
    assert cause.__traceback__ is not None


# ---------------------------------------------------------------------------------------------------------------------
# What is not an overlay's
# ---------------------------------------------------------------------------------------------------------------------


def test_a_fault_in_which_no_overlay_has_a_part_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    module = nn.Linear(2, 2)

    def fails() -> None:
        with mistakes.explained("traced", module):
            print("said by torch", file=mistakes.sys.stderr)
            torch._check(False, lambda: "nobody's")

    fails.__code__ = fails.__code__.replace(co_filename=str(Path(mistakes.__file__)))  # as if the host did it
    with pytest.raises(RuntimeError, match="nobody's"):
        fails()
    assert capsys.readouterr().err == "said by torch\n"


def test_what_is_said_while_all_goes_well_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    with mistakes.explained("traced", nn.Linear(2, 2)):
        print("a warning", file=mistakes.sys.stderr)
    assert capsys.readouterr().err == "a warning\n"


@pytest.mark.parametrize("backend", ["coreai", "coreml"])
@pytest.mark.parametrize(
    ("mistake", "begins", "marked", "ends"),
    [
        (Leaves, "The decoder cannot be traced: layer layers.0.attention fails at ", "leaves", "SystemExit: enough."),
        (
            Folds,
            "The decoder computes with layers.0.attention.k.weight, layers.1.attention.k.weight before there is a "
            "token in layer layers.0.attention at ",
            "folds",
            "belongs in the weight map, as a Transform of the weight.",
        ),
        (
            Forgets,
            "The decoder never uses layers.0.attention.q.weight, layers.0.attention.o.weight, ",
            "",
            "weight map.",
        ),
        (
            GivesNone,
            "The decoder gives None, and its contract asks for ",
            "gives none",
            "written in place, and not given back.",
        ),
        (
            GivesTwo,
            "The decoder gives a tensor and a tensor, and its contract asks for ",
            "gives two",
            "and not given back.",
        ),
    ],
)
def test_a_mistake_that_shows_behind_tracing_is_one_paragraph(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    backend: str,
    mistake: type[nn.Module],
    begins: str,
    marked: str,
    ends: str,
) -> None:
    line = paragraph(build(tmp_path, 2, backend, Mistaken(mistake)), capfd)
    assert line.startswith(f"error: {begins}") and line.endswith(ends)
    assert not marked or line_of(marked) in line
    assert not (tmp_path / "exports").exists()


def test_what_the_reference_interpreter_cannot_run_is_refused_before_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = paragraph(build(tmp_path, 2, "coreml", Mistaken(Exotic)), capfd)
    assert line.startswith("error: The decoder becomes operations of Core ML that nothing on this machine runs, ")
    assert ": elu. Write it with other operations" in line and not (tmp_path / "exports").exists()


def test_an_index_that_depends_on_values_is_one_paragraph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = paragraph(build(tmp_path, 2, "coreai", Mistaken(Picks)), capfd)
    place = f"layer layers.0.attention fails at {line_of('data-dependent index')}"
    assert line.startswith(f"error: The decoder cannot be lowered: {place}. ")
