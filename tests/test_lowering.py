"""A graph that was continued from the first layers is the graph that tracing every layer gives."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from assets import save
from checkpoints import tiny_checkpoint
from coreai_zoo.backend import Constant, drain
from coreai_zoo.backends.coreai import backend as coreai_backend
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.contracts import CHUNKED, DYNAMIC, STATIC_S1, Contract, Prefill
from coreai_zoo.lowering.extension import extend
from coreai_zoo.lowering.graph import layer_list
from coreai_zoo.lowering.module import build_module, parameters_of
from coreai_zoo.lowering.repetition import (
    NotRepeated,
    Repetition,
    alike,
    find_repetition,
    layer_kinds,
    short_signature,
    shortened,
)
from coreai_zoo.lowering.trace import check_traced, trace
from coreai_zoo.overlay import LayerRewrite
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.signature import InputSpec, StateSpec, TensorSpec, TraceSpec
from coreai_zoo.weights.plan import plan_weights
from coreai_zoo.weights.store import WeightStore
from coreai_zoo_overlays import qwen3_5
from decoders import OVERLAY, rewrites_of, signature
from suite import NIGHTLY
from test_coreai_backend import INT8, Model, bound, filled, recipe_of, toy

TOKENS = [5, 17, 3, 3, 60, 41]
KINDS = {"F": "full_attention", "L": "linear_attention"}
BOTH = (CoreAIBackend(), CoreAIBackend(every_layer=True))


# ---------------------------------------------------------------------------------------------------------------------
# The shipped overlay, with layers in any order
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Checkpointed:
    """A tiny checkpoint whose weights are in a store."""

    config: Any
    store: WeightStore
    rewrites: tuple[LayerRewrite, ...]

    @property
    def spec(self) -> TraceSpec:
        return signature(self.config)

    def module(self) -> nn.Module:
        rewrites = [("test", rewrite) for rewrite in self.rewrites]
        return build_module(lambda: OVERLAY.decoder(self.config, STATIC_S1), rewrites)

    def bound(self, store: WeightStore, *, values: bool) -> tuple[nn.Module, dict[str, Constant]]:
        module = self.module()
        return module, bound(module, store, values=values)


def checkpointed(directory: Path, kind: Any, layers: str, *rewrites: LayerRewrite) -> Checkpointed:
    """A decoder with layers such as `FLLF`; `rewrites` come on top of the overlay's own."""
    types = [KINDS[letter] for letter in layers]
    everyone = {"num_experts_per_tok": 4} if kind == "moe" else {}  # no expert is left out because of rounding
    tiny_checkpoint(directory, kind, num_hidden_layers=len(layers), layer_types=types, **everyone)
    checkpoint = Checkpoint.open(directory)
    config = OVERLAY.read_config(checkpoint.config)
    store = WeightStore(directory / "store")
    made = Checkpointed(config, store, (*rewrites_of(STATIC_S1), *rewrites))
    parameters = parameters_of(made.module())
    store.fill(plan_weights(qwen3_5.weight_map(config), parameters, checkpoint.tensors, RECIPES["int8hu"]), checkpoint)
    return made


def compiled_both_ways(
    model: Checkpointed | Model, store: WeightStore, directory: Path, caplog: pytest.LogCaptureFixture
) -> tuple[Path, Path]:
    """The asset that is continued from a few layers, and the one of which every layer is traced."""
    assets = (directory / "continued.aimodel", directory / "whole.aimodel")
    with caplog.at_level(logging.WARNING):
        for backend, asset in zip(BOTH, assets, strict=True):
            module, constants = model.bound(store, values=False)
            save(backend.trace({"main": module}, {"main": model.spec}), constants, asset)
    assert caplog.messages == []  # nothing had to be traced after all
    return assets


def assert_same_program(continued: Path, whole: Path) -> None:
    """Byte by byte, hence in every operation, constant, name and order."""
    one, other = ((asset / "main.mlirb").read_bytes() for asset in (continued, whole))
    assert len(one) == len(other)
    assert one == other


def stepped(asset: Path, spec: TraceSpec) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """Logits of `TOKENS`, and the states after them."""
    with BOTH[0].stepper(asset, {"main": spec}, capacity=len(TOKENS)) as stepper:
        logits = np.stack(list(drain(stepper, TOKENS)))
        return logits, {state.name: stepper.state(state.name) for state in spec.states}


class Halved(nn.Module):
    """A feed-forward of half the weight, with the parameters where they were."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x)) * 0.5  # type: ignore[operator]
        return halved


def halved(pattern: str) -> LayerRewrite:
    return LayerRewrite(name="halved", pattern=pattern, reason="to tell one layer from the others", apply=Halved)


@pytest.mark.slow
@pytest.mark.skipif(not NIGHTLY, reason="traces every layer of two functions; make nightly runs it")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_both_functions_are_continued_where_one_reads_prompts(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contract = evolve(CHUNKED, prefill=Prefill(most_tokens=16, chunk=8))
    model = checkpointed(tmp_path / "checkpoint", kind, "FLLFLFLF")
    extra = qwen3_5.extra_states(model.config, contract)
    specs = contract.functions(OVERLAY.kv_cache(model.config), extra, model.config.vocab_size, 64)
    assets = (tmp_path / "continued.aimodel", tmp_path / "whole.aimodel")
    with caplog.at_level(logging.WARNING):
        for backend, asset in zip(BOTH, assets, strict=True):
            modules, constants = {}, {}
            for name in specs:
                rewrites = [("test", rewrite) for rewrite in rewrites_of(contract, name)]
                modules[name] = build_module(lambda: OVERLAY.decoder(model.config, contract), rewrites)
                constants |= bound(modules[name], model.store, values=False)
            save(backend.trace(modules, specs), constants, asset)
    assert caplog.messages == []
    assert_same_program(*assets)


# Both kinds of layers are copied, with a mixture of experts, which is more than a dense feed-forward. By night also a
# decoder in which no layer is odd, and a dense one.
CONTINUED = [("moe", "FLLLFLFLFLF", "model.layers.2.mlp.shared_expert", 7)]
if NIGHTLY:
    CONTINUED += [("moe", "FLLFLFLF", None, 6), ("dense", "FLLFLLFLLFLL", "model.layers.2.mlp", 8)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layers", "changed", "depth"), CONTINUED)
def test_a_continued_program_is_the_whole_one_and_a_layer_that_a_rewrite_changed_is_not_like_the_others(
    kind: str, layers: str, changed: str | None, depth: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrites = () if changed is None else (halved(changed),)
    model = checkpointed(tmp_path / "checkpoint", kind, layers, *rewrites)
    repetition = find_repetition(model.module())
    assert repetition is not None
    assert repetition.depth == depth
    assert repetition.path == "model.layers"
    odd = 2 if changed else None
    assert repetition.kinds == tuple(2 if place == odd else "FL".index(letter) for place, letter in enumerate(layers))
    assert {repetition.kinds[layer] for layer in repetition.copied} == {0, 1}
    continued, whole = compiled_both_ways(model, model.store, tmp_path, caplog)
    assert_same_program(continued, whole)
    if changed is None:
        return
    logits, states = stepped(continued, model.spec)
    for name, state in states.items():
        assert np.abs(state.astype(np.float32)).reshape(len(state), -1).max(-1).min() > 0, f"a slot of {name} is empty"
    # And they are the decoder's, with the rewrite: what differs is rounding, in another order of summation.
    expected = in_torch(model)
    plain = in_torch(Checkpointed(model.config, model.store, rewrites_of(STATIC_S1)))
    assert np.abs(logits.astype(np.float32) - expected).mean() < np.abs(plain - expected).mean() / 10


def in_torch(model: Checkpointed) -> np.ndarray[Any, Any]:
    module, _ = model.bound(model.store, values=True)
    return Model.stepped_in_torch(model, module)  # type: ignore[arg-type]  # all that it needs is `spec`


@pytest.mark.parametrize(("changed", "depth"), [(None, 6), (5, None), (6, None), (7, None)])
def test_a_late_layer_that_differs_has_all_traced(changed: int | None, depth: int | None, tmp_path: Path) -> None:
    rewrites = () if changed is None else (halved(f"model.layers.{changed}.mlp"),)
    repetition = find_repetition(checkpointed(tmp_path / "checkpoint", "dense", "FLLFLFLF", *rewrites).module())
    assert (repetition and repetition.depth) == depth


@pytest.mark.slow
def test_a_decoder_whose_forward_hands_out_the_slots_is_continued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The toy's layers do not know their place: its decoder selects the slots, between the layers."""
    model = toy(layers=4)
    repetition = find_repetition(model.module())
    assert repetition is not None
    assert (repetition.kinds, repetition.depth) == ((0,) * 4, 3)
    store = filled(model, recipe_of(INT8), tmp_path / "weights")
    assert_same_program(*compiled_both_ways(model, store, tmp_path, caplog))


def test_a_decoder_of_one_layer_has_nothing_to_continue() -> None:
    assert find_repetition(toy().module()) is None
    assert find_repetition(nn.Linear(2, 2)) is None


# ---------------------------------------------------------------------------------------------------------------------
# What makes layers differ
# ---------------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Adds a matrix product and a slot of a state."""

    def __init__(self, index: int = 0, width: int = 4, **attributes: object) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4)
        self.index = index
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.linear(x) + slot
        return x, x * 2


class Stack(nn.Module):
    """Layers, and a state with a slot for each."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        slots = []
        for position, layer in enumerate(self.layers):
            x, slot = layer(x, state[position])
            slots.append(slot)
        state.copy_(torch.stack(slots))
        return self.last(x, slots)

    def last(self, x: Tensor, slots: list[Tensor]) -> Tensor:
        return x


def kinds_of(*layers: Layer) -> tuple[int, ...] | None:
    repetition = find_repetition(Stack(list(layers)))
    return repetition and repetition.kinds


def test_layers_that_differ_in_an_index_only_are_alike() -> None:
    assert kinds_of(*(Layer(index) for index in range(8))) == (0,) * 8
    assert kinds_of(*(Layer(index, eps=1e-6, name="a", sizes=[1, 2]) for index in range(8))) == (0,) * 8


@pytest.mark.parametrize(
    "attributes",
    [
        {"eps": (1e-5, 1e-6)},
        {"name": ("a", "b")},
        {"window": (128, 0)},
        {"flag": (True, False)},
        {"sizes": ([1, 2], [1, 3])},
        {"table": ({"a": 1}, {"a": 2})},
        {"config": (object(), object())},
        {"act": (torch.relu, torch.sigmoid)},
    ],
    ids=lambda attributes: next(iter(attributes)),
)
def test_layers_that_differ_in_anything_else_are_not(attributes: dict[str, tuple[object, object]]) -> None:
    layers = [Layer(i, **{name: values[i % 2] for name, values in attributes.items()}) for i in range(12)]
    assert kinds_of(*layers) == (0, 1) * 6


def test_layers_that_differ_in_the_shape_or_dtype_of_a_parameter_are_not_alike() -> None:
    assert kinds_of(*(Layer(i, width=4 + i % 2) for i in range(12))) == (0, 1) * 6
    layers = [Layer(i) for i in range(12)]
    for layer in layers[1::2]:
        layer.half()
    assert kinds_of(*layers) == (0, 1) * 6


def test_layers_that_hold_the_same_module_twice_at_other_places_are_not_alike() -> None:
    layers = [Layer(i, chain=chained("A", "B", "AB"[i % 2])) for i in range(12)]
    assert kinds_of(*layers) == (0, 1) * 6


def masked(mask: list[float]) -> Layer:
    layer = Layer()
    layer.register_buffer("mask", torch.tensor(mask), persistent=False)
    return layer


def two_matrices(*, tied: bool) -> nn.Module:
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if tied:
        pair[1].weight = pair[0].weight
    return pair


def two_masks(*, shared: bool) -> nn.Module:
    layer = masked([1.0, 0.0])
    layer.register_buffer("other", layer.get_buffer("mask") if shared else torch.tensor([1.0, 0.0]), persistent=False)
    return layer


class Slotted(nn.Module):
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale


def scaled(scale: float) -> type[nn.Module]:
    """A class that knows a number from where it was made."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * scale

    return Scaled


def chained(*names: str) -> nn.Module:
    """Modules one after the other, those of one name being one module."""
    made: dict[str, nn.Module] = {}
    return nn.Sequential(*(made.setdefault(name, nn.ReLU()) for name in names))


def test_decoders_that_differ_in_the_values_of_parameters_only_are_alike() -> None:
    for make in (lambda: Layer(3, eps=1e-6), lambda: masked([1.0, 0.0]), lambda: two_matrices(tied=True)):
        one, other = make(), make()
        assert alike(one, other)
        nn.init.ones_(other.get_parameter(next(name for name, _ in other.named_parameters())))
        assert alike(one, other)


@pytest.mark.parametrize(
    "pair",
    [
        (Layer(3), Layer(4)),
        (Layer(3, eps=1e-6), Layer(3, eps=1e-5)),
        (Layer(width=4), Layer(width=5)),
        (Layer(), Layer().half()),
        (Layer(), nn.Linear(4, 4)),
        (masked([1.0, 0.0]), masked([1.0, 1.0])),
        (masked([1.0, 0.0]), Layer()),
        (masked([0.0, 1.0]), masked([-0.0, 1.0])),
        (masked([1.0, 0.0]).to("meta"), masked([1.0, 0.0]).to("meta")),
        (two_matrices(tied=True), two_matrices(tied=False)),
        (Layer(act=lambda x: x), Layer(act=lambda x: x)),
        (Layer(sizes=[1, 2]), Layer(sizes=(1, 2))),
        (Slotted(1.0), Slotted(2.0)),
        (scaled(2.0)(), scaled(3.0)()),
        (chained("A", "B", "A"), chained("A", "B", "B")),
        (two_masks(shared=True), two_masks(shared=False)),
    ],
    ids=[
        *(
            "index",
            "attribute",
            "shape",
            "dtype",
            "class",
            "mask",
            "no mask",
            "sign",
            "meta",
            "tied",
            "function",
            "type",
        ),
        *("slot", "closure", "shared child", "shared buffer"),
    ],
)
def test_decoders_that_differ_in_anything_else_are_not_alike(pair: tuple[nn.Module, nn.Module]) -> None:
    assert not alike(*pair)


def both_functions(contract: Contract, folder: Path) -> tuple[dict[str, nn.Module], Mapping[str, TraceSpec]]:
    """The decoders of a contract with two functions, of two layers each, and their signatures."""
    model = checkpointed(folder, "dense", "LF")
    extra = qwen3_5.extra_states(model.config, contract)
    specs = contract.functions(OVERLAY.kv_cache(model.config), extra, model.config.vocab_size, 512)
    modules = {}
    for name in specs:
        rewrites = [("test", rewrite) for rewrite in rewrites_of(contract, name)]
        modules[name] = build_module(lambda: OVERLAY.decoder(model.config, contract), rewrites)
        bound(modules[name], model.store, values=False)
    return modules, specs


def test_a_function_that_is_another_one_without_its_outputs_is_not_traced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, specs = both_functions(DYNAMIC, tmp_path / "checkpoint")
    traced: list[TraceSpec] = []
    tracing = coreai_backend._trace
    monkeypatch.setattr(
        coreai_backend, "_trace", lambda module, spec, **how: traced.append(spec) or tracing(module, spec, **how)
    )
    functions = CoreAIBackend().trace(modules, specs).functions
    assert traced == [specs["main"]]
    assert {name: function.spec for name, function in functions.items()} == specs
    programs = {name: function.whole_program()[0] for name, function in functions.items()}
    results = {name: len(program.graph_signature.user_outputs) for name, program in programs.items()}
    assert results == {"main": 1, "prefill": 0}


def test_a_function_of_its_own_is_traced(tmp_path: Path) -> None:
    modules, specs = both_functions(CHUNKED, tmp_path / "checkpoint")
    assert coreai_backend._without_outputs_of(modules, specs) == {}
    modules, specs = both_functions(DYNAMIC, tmp_path / "other")
    assert coreai_backend._without_outputs_of(modules, specs) == {"prefill": "main"}
    modules["prefill"].model.layers[1].self_attn.attend.scale *= 2
    assert coreai_backend._without_outputs_of(modules, specs) == {}


def test_as_many_layers_are_traced_as_show_every_kind_often_enough() -> None:
    def depth(pattern: str) -> int | None:
        layers = [Layer(pattern[:i].count(letter), name=letter) for i, letter in enumerate(pattern)]
        repetition = find_repetition(Stack(layers))
        return repetition and repetition.depth

    assert depth("L" * 64) == 3
    assert depth("LLLF" * 16) == 12
    assert depth("L" + "LLLF" * 16) == 13
    assert depth("LLLLLLLL" + "F" * 8) == 11  # F comes once more than is compared
    assert depth("LF") is None
    assert depth("L" * 20 + "F" * 2) is None  # what follows is not seen often enough


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be continued is not
# ---------------------------------------------------------------------------------------------------------------------


def stack_spec(slots: int) -> TraceSpec:
    return TraceSpec(
        inputs=(InputSpec("x", (2, 4), "float32", holds="tokens"),),
        states=(StateSpec(name="state", shape=(slots, 2, 4), dtype="float32"),),
        outputs=(TensorSpec("y", (2, 4), "float32"),),
        axes={},
    )


def continued(module: nn.Module, slots: int = 8) -> torch.export.ExportedProgram:
    spec = stack_spec(slots)
    repetition = find_repetition(module)
    assert repetition is not None
    short = short_signature(spec, repetition)
    with shortened(module, repetition):
        program = trace(module, short, {})
    return extend(program, module, repetition, short, spec)


def test_a_continued_program_computes_what_the_module_does() -> None:
    module = Stack([Layer(index) for index in range(8)]).eval()
    program = continued(module)
    check_traced(program, stack_spec(8))
    x, state = torch.randn(2, 4), torch.randn(8, 2, 4)
    expected_state, found_state = state.clone(), state.clone()
    with torch.no_grad():
        expected = module(x, expected_state)
        found = program.module()(x, found_state)
    assert torch.equal(found, expected)
    assert torch.equal(found_state, expected_state)
    assert len(module.layers) == 8  # whole again


class SkipsOne(Stack):
    """Every layer also sees what the layer before the last one computed."""

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        before, slots = x, []
        for position, layer in enumerate(self.layers):
            following, slot = layer(x + before, state[position])
            before, x = x, following
            slots.append(slot)
        state.copy_(torch.stack(slots))
        return x


class Squares(Stack):
    """An integer that is no count."""

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        slots = []
        for position, layer in enumerate(self.layers):
            x, slot = layer(x + position * position, state[position])
            slots.append(slot)
        state.copy_(torch.stack(slots))
        return x


class Backwards(Stack):
    """The new slots in reverse."""

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        slots = []
        for position, layer in enumerate(self.layers):
            x, slot = layer(x, state[position])
            slots.append(slot)
        state.copy_(torch.stack(slots[::-1]))
        return x


class Taps(Stack):
    """The output also depends on a layer in the middle."""

    def last(self, x: Tensor, slots: list[Tensor]) -> Tensor:
        return x + slots[1]


class Scaled(Stack):
    """The output is divided by the number of layers."""

    def last(self, x: Tensor, slots: list[Tensor]) -> Tensor:
        return torch.stack(slots).sum(0)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (SkipsOne, "not handed on like others|read in places"),
        (Squares, "no count of the layers explains"),
        (Backwards, "not handed on like others"),
        (Taps, "not handed on like others"),
    ],
)
def test_what_cannot_be_continued_is_said(decoder: type[Stack], message: str) -> None:
    module = decoder([Layer(index) for index in range(8)])
    with pytest.raises(NotRepeated, match=message):
        continued(module)
    assert len(module.layers) == 8


def test_a_list_that_is_gathered_for_the_output_is_continued_too() -> None:
    module = Scaled([Layer(index) for index in range(8)]).eval()
    x, state = torch.randn(2, 4), torch.randn(8, 2, 4)
    with torch.no_grad():
        found, expected = continued(module).module()(x, state.clone()), module(x, state.clone())
    assert torch.equal(found, expected)


def test_a_state_whose_slots_belong_to_no_kinds_is_refused() -> None:
    repetition = Repetition("layers", (0,) * 8, tuple({"position": p} for p in range(8)), 3)
    with pytest.raises(NotRepeated, match="the 5 slots of state state"):
        short_signature(stack_spec(5), repetition)
    assert short_signature(stack_spec(8), repetition).states[0].shape == (3, 2, 4)


@pytest.mark.slow
def test_a_decoder_that_cannot_be_continued_is_traced_whole_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = SkipsOne([Layer(index) for index in range(8)]).eval()
    with caplog.at_level(logging.WARNING):
        save(BOTH[0].trace({"main": module}, {"main": stack_spec(8)}), {}, tmp_path / "skips.aimodel")
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Every layer is traced, because the first ones cannot be continued: ")
    assert BOTH[0].signatures(tmp_path / "skips.aimodel")["main"].states == {"state": ((8, 2, 4), "float32")}


class Holding(nn.Module):
    """A layer that holds something."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2)
        self.held = held


def test_kinds_of_layers_are_told_of_the_list_that_is_asked_for_and_not_by_identity() -> None:
    decoder = nn.Module()
    decoder.rotary = nn.ModuleList(nn.Identity() for _ in range(6))
    decoder.experts = nn.ModuleList(nn.Identity() for _ in range(8))
    decoder.layers = nn.ModuleList(Holding(0.5 if index == 4 else 0.25) for index in range(6))
    assert layer_kinds(decoder, "layers") == (0, 0, 0, 0, 1, 0)
    assert layer_kinds(decoder, "nowhere") == ()
    assert layer_list(name for name, _ in decoder.named_parameters()) == "layers"
    decoder.layers = nn.ModuleList(Holding(object()) for _ in range(6))
    assert len(set(layer_kinds(decoder, "layers"))) == 1
    del decoder.experts, decoder.rotary
    assert find_repetition(decoder) is None, "what cannot be compared is not copied"
