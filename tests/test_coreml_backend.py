"""The Core ML backend: the same overlay and the same weights as an ML Program, judged where there is no Mac.

Oracle and margin rule are the gate's; what runs the package is the reference interpreter, on the saved file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from torch import nn

import forked
from assets import save, write_specification
from attack import ENTRIES
from checkpoints import read_weights, tiny_checkpoint, write_weights
from command import zoo
from coreai_zoo.backend import Constant, Traced, drain
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.backends.coreml.backend import _REQUIRED, CoreMLBackend
from coreai_zoo.backends.coreml.package import Package, WeightFile
from coreai_zoo.backends.coreml.reference import _OPERATIONS, Interpreter, memory
from coreai_zoo.build import pipeline
from coreai_zoo.build.design import Design, design
from coreai_zoo.build.record import roles_record
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.verify import verify
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.contracts import FIXED_S1
from coreai_zoo.errors import BadInput, CheckFailed, EnvironmentLacks, PluginError
from coreai_zoo.gate import Activations
from coreai_zoo.gates import rule
from coreai_zoo.gates.bounds import check_bounds
from coreai_zoo.gates.oracle import Oracle
from coreai_zoo.gates.prompts import named_prompts
from coreai_zoo.gates.run import judges_asset
from coreai_zoo.lowering import module as lowering_module
from coreai_zoo.names import names_beside
from coreai_zoo.plugins import default_plugins
from coreai_zoo.signature import Axis, KVCache, StateSpec, TraceSpec
from coreai_zoo.weights.formats import pack_int4
from coreai_zoo.weights.store import WeightStore
from coreai_zoo_qwen36.bounds import BOUNDS as SAMPLES
from decoders import bind, rewrites_of, tensors_of
from shared import Arrays, Shared
from suite import NIGHTLY

POSITIONS, LONG, CONTEXT = 64, 512 if NIGHTLY else 384, 512
# By day half of the dense sample, with each kind of layer. The mixture stays whole: in half of it a router is so near a
# tie that another order of sums takes another expert.
LAYERS = {"dense": None if NIGHTLY else 4, "moe": None}
FLOAT16, FLOAT32 = 10, 11  # of the format's DataType
BACKEND = CoreMLBackend()
KINDS = ("dense", "moe")
MIXED = """
description = "What no built-in recipe has: zero points, and integers of 4 bits with and without them."
[[rule]]
role = "mlp"
dtype = "uint4"
why = "Zero points of 4 bits."
[[rule]]
role = "embedding"
dtype = "uint8"
why = "Zero points of 8 bits."
[[rule]]
role = "head"
dtype = "int4"
scheme = "asymmetric"
why = "Signed zero points."
[[rule]]
role = "body"
dtype = "int4"
why = "No zero points."
[[rule]]
dtype = "fp16"
why = "The rest."
"""
STORED = (*KINDS, "mixed")


@frozen
class Built:
    """A sample as a Core ML bundle, and what it was built of."""

    bundle: Bundle
    resolved: Design
    store: WeightStore

    @property
    def package(self) -> Path:
        return self.bundle.asset

    @property
    def model_file(self) -> Path:
        return self.package / "Data/com.apple.CoreML/model.mlmodel"

    def tokens(self, prompt: str = "code", positions: int = POSITIONS) -> list[int]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.bundle.tokenizer / "tokenizer.json"))
        tokens = tokenizer.encode(named_prompts([prompt])[0].text).ids[:positions]
        return [token % self.resolved.model.config.vocab_size for token in tokens]

    def logits(self, package: Path | None = None, tokens: list[int] | None = None) -> np.ndarray[Any, Any]:
        """Of the reference interpreter, float16 [P, V]."""
        tokens = tokens or self.tokens()
        with BACKEND.stepper(package or self.package, self.bundle.functions, len(tokens)) as stepper:
            return np.stack(list(drain(stepper, tokens)))


def request_of(kind: str, output: Path, **options: Any) -> BuildRequest:
    if kind == "mixed":
        kind, options = "dense", {"checkpoint": output / "checkpoint", "recipe": str(output / "mixed.toml")}
    of = {"sample": True, "layers": LAYERS[kind]} if "checkpoint" not in options else {"custom": True}
    usual = {"backend": "coreml", "max_context": CONTEXT, "keep_weights": True}
    return BuildRequest(ENTRIES[kind], output=output, **of, **usual, **options)


def build(kind: str, output: Path, **options: Any) -> Built:
    request, plugins = request_of(kind, output, **options), default_plugins()
    result = pipeline.build(request, plugins)
    return opened(result.path, design(request, plugins))


def opened(bundle: Path, resolved: Design) -> Built:
    store = next(bundle.parent.rglob("journal.jsonl"))
    return Built(Bundle.open(bundle), resolved, WeightStore(store.parent))


class Samples(dict[str, Built]):
    """The samples of both kinds, and a tiny model by `MIXED`, each built when the first test of any worker asks."""

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self._shared = shared

    def __missing__(self, kind: str) -> Built:
        def fill(folder: Path) -> None:
            if kind == "mixed":
                tiny_checkpoint(folder / "checkpoint")
                (folder / "mixed.toml").write_text(MIXED)
            build(kind, folder)

        output = self._shared.folder(f"coreml-{kind}", fill)
        (record,) = output.glob("*/build.json")
        self[kind] = opened(record.parent, design(request_of(kind, output), default_plugins()))
        return self[kind]


@pytest.fixture(scope="module")
def built(shared: Shared) -> Samples:
    return Samples(shared)


@pytest.fixture(scope="module")
def tiny(shared: Shared) -> Built:
    """A bundle of two layers, for what is the same with more."""

    def fill(folder: Path) -> None:
        build("dense", folder, checkpoint=tiny_checkpoint(folder / "checkpoint"))

    output = shared.folder("coreml-tiny", fill)
    (record,) = output.glob("*/build.json")
    request = request_of("dense", output, checkpoint=output / "checkpoint")
    return opened(record.parent, design(request, default_plugins()))


@pytest.fixture(scope="module")
def traced(tiny: Built) -> tuple[Traced, dict[str, Constant]]:
    """The tiny decoder, traced and not yet written, and its constants."""
    resolved = design(tiny.resolved.request, default_plugins())
    formats = {tensor.name: tensor.format for tensor in resolved.weights.tensors}
    lowering_module.allocate(resolved.modules["main"], formats)
    constants = lowering_module.constants(tensors_of(tiny.store, resolved.weights.tensors))
    return BACKEND.trace(resolved.modules, resolved.signatures), dict(constants)


@pytest.fixture(scope="module")
def stepped(shared: Shared, built: Samples) -> Callable[[str], Arrays]:
    """What a sample's package gives for the first positions of the prompt: `logits` [P, V], and its states by name."""

    def step(kind: str) -> Arrays:
        model = built[kind]
        with BACKEND.stepper(model.package, model.bundle.functions, POSITIONS) as stepper:
            logits = np.stack(list(drain(stepper, model.tokens())))
            return {
                "logits": logits,
                **{state.name: stepper.state(state.name) for state in model.bundle.signature.states},
            }

    return lambda kind: shared.arrays(f"coreml-{kind}-stepped", lambda: step(kind))


# ---------------------------------------------------------------------------------------------------------------------
# What it computes
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Judged:
    """The gate's rule and bounds on what a package computed."""

    verdict: rule.Verdict
    broken: list[str]

    @property
    def passed(self) -> bool:
        return self.verdict.passed and not self.broken


@functools.cache
def oracle(directory: Path, config: str, tokens: tuple[int, ...]) -> Activations:
    return Oracle(Checkpoint.open(directory), json.loads(config)).run(list(tokens))


def judge(resolved: Design, tokens: list[int], logits: np.ndarray[Any, Any]) -> Judged:
    """Against transformers in fp32, by the bounds of PyTorch's arithmetic, which the interpreter's is."""
    experts = resolved.facts.get("experts_per_token")
    reference = oracle(resolved.checkpoint.directory, json.dumps(resolved.model.hf_config), tuple(tokens))
    with np.errstate(all="ignore"):
        verdict = rule.compare(tokens, reference, Activations(logits), experts)
    roles = roles_record(resolved)
    kind = "dense" if experts is None else "routed"
    bounds = SAMPLES.of_recipe(roles, resolved.facts["layers"], "torch", kind)
    return Judged(verdict, [check.name for check in check_bounds(verdict, bounds) if not check.passed])


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_keeps_the_margin_rule_and_the_bounds_against_transformers(
    kind: str, built: Samples, stepped: Callable[[str], Arrays]
) -> None:
    model = built[kind]
    judged = judge(model.resolved, model.tokens(), stepped(kind)["logits"])
    assert judged.verdict.confident_positions > POSITIONS // 2  # the rule has something to say
    assert judged.passed, judged.broken


@pytest.mark.parametrize("kind", KINDS)
def test_states_after_64_positions_are_those_of_transformers(
    kind: str, built: Samples, stepped: Callable[[str], Arrays]
) -> None:
    ours = {name: array.astype(np.float32) for name, array in stepped(kind).items() if name != "logits"}
    model = built[kind]
    theirs = states_of_transformers(model.resolved, model.tokens(), CONTEXT)
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        spread = expected.max() - expected.min()
        assert np.abs(ours[name] - expected).max() < 0.06 * spread, name  # int8 weights are among what differs
        assert np.corrcoef(ours[name].ravel(), expected.ravel())[0, 1] > 0.999, name


def states_of_transformers(resolved: Design, tokens: list[int], context: int) -> dict[str, np.ndarray[Any, Any]]:
    """transformers' own cache after `tokens`, in the shapes of the contract."""
    with quiet_transformers(), torch.no_grad():
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {name: value for name, value in resolved.model.hf_config.items() if name != "model_type"}
        config = AutoConfig.for_model(resolved.model.hf_config["model_type"], **fields)
        directory = resolved.checkpoint.directory
        model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32)
        layers = model(torch.tensor([tokens]), use_cache=True).past_key_values.layers
    full = [layer for layer in layers if hasattr(layer, "keys")]
    linear = [layer for layer in layers if not hasattr(layer, "keys")]
    room = (0, 0, 0, context - len(tokens))

    def padded(part: Callable[[Any], torch.Tensor]) -> np.ndarray[Any, Any]:
        return torch.stack([nn.functional.pad(part(layer), room) for layer in full]).numpy()

    return {
        "keyCache": padded(lambda layer: layer.keys),
        "valueCache": padded(lambda layer: layer.values),
        # transformers keeps one input more than the next step needs.
        "convState": torch.stack([only(layer.conv_states)[..., 1:] for layer in linear]).numpy(),
        "recState": torch.stack([only(layer.recurrent_states) for layer in linear]).numpy(),
    }


def only(by_index: dict[int, torch.Tensor]) -> torch.Tensor:
    (state,) = by_index.values()
    return state


@pytest.mark.parametrize("kind", STORED)
def test_the_interpreter_agrees_with_the_overlay_in_pytorch_within_half_precision(
    kind: str, built: Samples, stepped: Callable[[str], Arrays]
) -> None:
    model = built[kind]
    module = lowering_module.build_module(
        lambda: model.resolved.model.overlay.decoder(model.resolved.model.config, FIXED_S1),
        list(model.resolved.functions["main"].rewrites),
    )
    bind(module, tensors_of(model.store, model.resolved.weights.tensors))
    states = [torch.zeros(state.shape, dtype=torch.float16) for state in model.bundle.signature.states]
    rows = []
    with torch.no_grad():
        for position, token in enumerate(model.tokens()):
            ids, at = (torch.tensor([[number]], dtype=torch.int32) for number in (token, position))
            rows.append(module(ids, at, *states)[0, -1].float().numpy())
    expected, found = np.stack(rows), stepped(kind)["logits"].astype(np.float32)
    assert np.abs(found - expected).max() < 0.01 * (expected.max() - expected.min())


# ---------------------------------------------------------------------------------------------------------------------
# What it must not pass
# ---------------------------------------------------------------------------------------------------------------------


def copied(model: Built, folder: Path, change: Callable[[Any], None]) -> Path:
    """The package with its program changed."""
    from coreai_zoo.backends.coreml.package import Package

    package = folder / model.package.name
    shutil.copytree(model.package, package)
    opened = Package.open(package)
    change(opened)
    write_specification(package, opened.model)
    return package


@pytest.mark.parametrize("state", ["keyCache", "valueCache", "convState", "recState"])
def test_a_package_that_loses_one_state_write_fails(state: str, built: Samples, tmp_path: Path) -> None:
    def lose(package: Any) -> None:
        (write,) = [
            o
            for o in package.block.operations
            if o.type == "write_state" and o.inputs["input"].arguments[0].name == state
        ]
        package.block.operations.remove(write)

    model = built["dense"]
    tokens = model.tokens(positions=24)  # a state that is lost is lost at once
    logits = model.logits(copied(model, tmp_path, lose), tokens)
    assert not judge(model.resolved, tokens, logits).passed


@pytest.mark.slow
def test_a_package_whose_rope_frequencies_are_quantized_fails(built: Samples, tmp_path: Path) -> None:
    """int8 leaves only the three highest frequencies; with 64 positions that is within the bounds of int8 weights."""

    def quantize(package: Any) -> None:
        (name,) = [made for made, state in package.names.items() if state.endswith("inverse_frequency")]
        (table,) = [o for o in package.block.operations if o.outputs and o.outputs[0].name == name]
        values = package.stored(table.attributes["val"]).array
        scale = np.abs(values).max() / 127
        tensor = table.attributes["val"].immediateValue.tensor
        tensor.floats.values[:] = (np.round(values / scale) * scale).tolist()

    model = built["dense"]
    tokens = model.tokens("long", LONG)
    logits = model.logits(copied(model, tmp_path, quantize), tokens)
    judged = judge(model.resolved, tokens, logits)
    assert not judged.verdict.passed and judged.broken


def test_plain_half_precision_fails_on_an_outlier_channel_and_the_declared_precision_does_not(tmp_path: Path) -> None:
    checkpoint = with_outlier(tiny_checkpoint(tmp_path / "checkpoint", head_scale=20.0))
    model = build("dense", tmp_path / "out", checkpoint=checkpoint, recipe="fp16")

    def halve(package: Any) -> None:
        for operation in package.block.operations:
            for output in operation.outputs if operation.type != "const" else ():
                if output.type.tensorType.dataType == FLOAT32:
                    output.type.tensorType.dataType = FLOAT16

    half = model.logits(copied(model, tmp_path, halve))
    assert np.isfinite(half).all()  # nothing warns
    assert not judge(model.resolved, model.tokens(), half).passed
    assert judge(model.resolved, model.tokens(), model.logits()).passed


def with_outlier(directory: Path) -> Path:
    """A checkpoint, with one channel of its residual stream so large that its square overflows float16."""
    tensors = read_weights(directory)
    (key,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    tensors[key][:, 7] = 600.0
    write_weights(directory, tensors)
    return directory


# ---------------------------------------------------------------------------------------------------------------------
# What is in it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORED)
def test_every_weight_is_stored_once_with_the_very_bytes_of_the_store(kind: str, built: Samples) -> None:
    """The store's are those of the Core AI backend, see test_coreai_backend."""
    model = built[kind]
    constants = lowering_module.constants(tensors_of(model.store, model.resolved.weights.tensors))
    stored = BACKEND.constants(model.package)
    assert set(stored) == set(constants) | {"model.rotary_emb.inverse_frequency"}
    for name, constant in constants.items():
        assert stored[name] == constant.data.tobytes(), name
    quantized = {name for name in constants if name.endswith(".original")}
    assert len(quantized) == sum(tensor.quantization is not None for tensor in model.resolved.weights.tensors) > 0


@pytest.mark.parametrize("kind", STORED)
def test_coreml_tools_reads_the_same_out_of_it(kind: str, built: Samples, tmp_path: Path) -> None:
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    model = built[kind]
    package = shutil.copytree(model.package, tmp_path / model.package.name)  # coremltools writes the manifest again
    manifest = (package / "Manifest.json").read_bytes()
    spec = ct.models.MLModel(str(package), skip_model_load=True).get_spec()
    assert (package / "Manifest.json").read_bytes() == manifest
    assert [state.name for state in spec.description.state] == [state.name for state in model.bundle.signature.states]
    weights = model.package / "Data/com.apple.CoreML/weights"
    program = load(spec, specification_version=9, file_weights_dir=str(weights))
    names = json.loads(spec.description.metadata.userDefined["coreai_zoo.constants"])
    found = {
        name: stored_bytes(read)
        for operation in program.functions["main"].operations
        if operation.op_type == "constexpr_blockwise_shift_scale"
        for name, read in zip(
            names_beside(names[operation.outputs[0].name]),
            (operation.data, operation.scale, operation.offset),
            strict=False,
        )
        if read is not None
    }
    ours = BACKEND.constants(model.package)
    quantized = [tensor for tensor in model.resolved.weights.tensors if tensor.quantization is not None]
    assert len(found) == sum(len(tensor.format.arrays) for tensor in quantized) > 20
    for name, content in found.items():
        assert ours[name] == content, name


def stored_bytes(read: Any) -> bytes:
    """The bytes in which a constant of coremltools' program is stored, whose integers of 4 bits it holds in 8."""
    from coremltools.converters.mil.mil import types

    values = np.ascontiguousarray(read.val).ravel()
    return packed(values) if types.is_sub_byte(read.dtype) else values.tobytes()


def packed(values: np.ndarray[Any, Any]) -> bytes:
    """Integers of 4 bits, two to a byte."""
    return pack_int4(nn.functional.pad(torch.from_numpy(values), (0, len(values) % 2))).numpy().tobytes()


def test_signature_and_state_are_read_back(built: Samples) -> None:
    model = built["dense"]
    checks = verify(model.bundle, {"coreml": BACKEND}, default_plugins().tokenizer_classes())
    assert {"files", "signature", "step"} <= {check.name for check in checks}
    assert [check.name for check in checks if not check.passed] == []
    expected = lowering_module.state_of(model.resolved.weights)
    read = BACKEND.state(model.package, "main", expected)
    assert list(read) == list(expected)
    wrong = {name: ((*shape, 1), dtype) for name, (shape, dtype) in expected.items()}
    with pytest.raises(CheckFailed, match="other constants than the decoder"):
        BACKEND.state(model.package, "main", wrong)


@pytest.mark.parametrize("kind", STORED)
def test_its_program_as_data_names_every_stored_weight(kind: str, built: Samples) -> None:
    model = built[kind]
    program = BACKEND.program(model.package)
    constants = lowering_module.constants(tensors_of(model.store, model.resolved.weights.tensors))
    assert {name: stored for name, stored in program.stored.items() if name in constants} == {
        name: (constant.shape, constant.dtype) for name, constant in constants.items()
    }
    writes = [operation for operation in program.functions["main"].operations if operation.name == "write_state"]
    assert len(writes) == len(model.bundle.signature.states)


def contents(bundle: Path) -> dict[str, bytes]:
    """Every file of a bundle."""
    found = files_of(bundle)
    assert "build.json" in found
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found
    return found


def test_another_process_writes_the_same_bytes(tiny: Built, tmp_path: Path) -> None:
    zoo = Path(sys.executable).with_name("zoo")
    options = ["--checkpoint", tiny.resolved.checkpoint.directory, "--custom", "--backend", "coreml"]
    options += ["--max-context", str(CONTEXT), "-o", tmp_path / "again"]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [zoo, "build", ENTRIES["dense"], *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    # All of it is the zoo's own: nothing of coremltools reaches the terminal.
    assert not [line for line in done.stderr.splitlines() if "coremltools" in line or "Torch version" in line]
    assert contents(tmp_path / "again" / tiny.bundle.directory.name) == contents(tiny.bundle.directory)


def test_a_build_that_was_killed_while_it_wrote_the_package_resumes(tiny: Built, tmp_path: Path) -> None:
    checkpoint = str(tiny.resolved.checkpoint.directory)
    command = ["build", ENTRIES["dense"], "--checkpoint", checkpoint, "--custom", "--backend", "coreml"]
    command += ["--max-context", str(CONTEXT), "-o", str(tmp_path), "--json", "--progress", "json"]
    reader, writer = os.pipe()
    with os.fdopen(reader) as progress, forked.Process(*command, stderr=writer) as process:
        os.close(writer)
        for line in progress:
            if '"stage": "bundle", "state": "start"' in line:
                process.kill()
        assert process.wait() == -signal.SIGKILL
    model = tiny.bundle.directory
    assert not (tmp_path / model.name).exists()
    again = forked.run(*command)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["weights"] == {
        "computed": 0,
        "reused": len(tiny.resolved.weights.tensors),
    }
    assert contents(tmp_path / model.name) == contents(model)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name or "work" in path.name] == []


def test_the_second_build_of_a_process_has_the_bytes_of_the_first(
    tiny: Built, traced: tuple[Traced, dict[str, Constant]], tmp_path: Path
) -> None:
    decoder, constants = traced
    save(decoder, constants, tmp_path / "first.mlpackage")
    again = build("dense", tmp_path / "again", checkpoint=tiny.resolved.checkpoint.directory)
    assert files_of(tmp_path / "first.mlpackage") == files_of(again.package) == files_of(tiny.package)
    assert contents(again.bundle.directory) == contents(tiny.bundle.directory)


def compared(bundle: Path, functions: Mapping[str, TraceSpec], monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of the bundle's own script, where the reference interpreter is in the place of a Mac."""

    class Model:
        def __init__(self, package: str) -> None:
            self.package = Path(package)

        def make_state(self) -> contextlib.ExitStack:
            stack = contextlib.ExitStack()
            self.stepper = stack.enter_context(BACKEND.stepper(self.package, functions, 64))
            return stack

        def predict(self, given: Mapping[str, Arrays], state: contextlib.ExitStack) -> dict[str, Any]:
            assert list(given) == [tensor.name for tensor in functions["main"].inputs]
            return {functions["main"].outputs[0].name: self.stepper.step(int(given["input_ids"][0, 0]))[None, None]}

    monkeypatch.setattr("coremltools.models.MLModel", Model)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(bundle / "compare_on_mac.py"), run_name="__main__")
    return ended.value.code


def test_the_gate_runs_a_package_in_the_interpreter_and_leaves_its_logits(
    built: Samples,
    stepped: Callable[[str], Arrays],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(built["dense"].bundle.directory, bundle)
    command = ["gate", str(bundle), "--prompts", "code", "--positions", "16", "--no-control"]
    refused = zoo(*command, "--candidate", "coreai")
    assert refused.exit_code == 2 and "is a coreml bundle, which the candidate coreai cannot run" in refused.stderr
    judged = zoo(*command, "--candidate", "mil")
    assert judged.exit_code == 0, judged.output
    assert compared(bundle, built["dense"].bundle.functions, monkeypatch) == 0
    assert re.search(r": 16 positions, largest error 0.00% .*, 0 confident tokens differ", capsys.readouterr().out)
    (prompt,) = json.loads((bundle / "gate" / "transcript.json").read_text())["prompts"]
    assert prompt["candidate"].endswith(".mlpackage on the mil runtime")
    (stored,) = (bundle / "gate").glob("logits-*.npz")
    kept, tokens = np.load(stored), built["dense"].tokens()[:16]
    assert kept["tokens"].tolist() == prompt["tokens"] == tokens
    assert np.array_equal(kept["logits"], stepped("dense")["logits"][:16])
    assert zoo("verify", bundle).exit_code == 0


def test_card_and_record_say_what_was_not_done(built: Samples, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = built["dense"].bundle
    card = (bundle.directory / "README.md").read_text()
    assert "Not run on Apple hardware" in card and "reference interpreter" in card
    assert "coremltools 9.0 was tested with torch" in card
    assert bundle.build["remarks"] == list(BACKEND.version_warnings)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(bundle.directory / "compare_on_mac.py"), run_name="__main__")
    assert ended.value.code == 1
    assert capsys.readouterr().out == "There is nothing to compare with: run `zoo gate` on this bundle first.\n"


# ---------------------------------------------------------------------------------------------------------------------
# Decoders, recipes and packages that it refuses
# ---------------------------------------------------------------------------------------------------------------------


class Forgetful(nn.Module):
    """Writes one state of two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4, dtype=torch.float16)
        self.head = nn.Linear(4, 8, bias=False, dtype=torch.float16)

    def forward(
        self, ids: torch.Tensor, position: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        key[:, :, :, position[0]] = self.embed(ids).sum().reshape(1, 1, 1, 1, 1)
        return self.head(self.embed(ids)) + value.sum()


def forgetful_spec() -> TraceSpec:
    return FIXED_S1.functions(KVCache(layers=1, heads=1, head_dim=1), (), vocab_size=8, max_context=8)["main"]


def test_a_decoder_that_leaves_a_state_unwritten_is_refused() -> None:
    with pytest.raises(PluginError, match="state valueCache is never written"):
        BACKEND.trace({"main": Forgetful()}, {"main": forgetful_spec()})


def test_a_pass_that_merges_weights_is_noticed(tiny: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    lowering = importlib.import_module("coreai_zoo.backends.coreml.lowering")
    monkeypatch.setattr(lowering, "_SKIPPED_PASSES", set())
    resolved = design(tiny.resolved.request, default_plugins())
    formats = {tensor.name: tensor.format for tensor in resolved.weights.tensors}
    lowering_module.allocate(resolved.modules["main"], formats)
    with pytest.raises(PluginError, match="coremltools changed the decoder on its way: weight"):
        BACKEND.trace(resolved.modules, resolved.signatures)


def test_a_weight_that_is_folded_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Folded(Forgetful):
        def forward(
            self, ids: torch.Tensor, position: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            value[:, :, :, position[0]] = self.embed(ids).sum().reshape(1, 1, 1, 1, 1)
            doubled = self.embed.weight * 2  # a constant that coremltools computes
            return super().forward(ids, position, key, value) + doubled.sum()

    with pytest.raises(PluginError, match=r"computes with embed\.weight before there is a token"):
        BACKEND.trace({"main": Folded()}, {"main": forgetful_spec()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (2, 1, 2, 2**20, 1024)}, "4,294,967,296 elements, and 2,147,483,647 are the most"),
        ({"shape": (1, 1, 1, 1, 8, 1)}, "6 axes, and a state has 5 at most"),
        ({"dtype": "float32"}, "is float32, and a state is float16"),
    ],
)
def test_a_state_beyond_the_limits_of_core_ml_is_refused(change: dict[str, Any], words: str) -> None:
    spec = forgetful_spec()
    first = evolve(spec.states[0], **change)
    with pytest.raises(BadInput, match=words):
        BACKEND.require({"main": evolve(spec, states=(first, *spec.states[1:]))}, ())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "mix68"], "does not write int6"),
        (["--contract", "static-s1"], "does not write for the contract static-s1"),
    ],
)
def test_what_the_backend_cannot_write_leaves_the_output_alone(options: list[str], words: str, tmp_path: Path) -> None:
    done = zoo("build", ENTRIES["dense"], "--sample", "--backend", "coreml", "-o", tmp_path / "out", *options)
    assert done.exit_code == 2 and words in done.stderr
    assert not (tmp_path / "out").exists()


def edited(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["Manifest.json", "model.mlmodel", "weight.bin"])
def test_a_package_edited_by_hand_is_not_run(part: str, built: Samples, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(built["dense"].bundle.directory, bundle)
    (path,) = bundle.rglob(part)
    edited(path)
    for command, words in ((["verify", str(bundle)], "was changed"), (["run", str(bundle), "-p", "x"], "was changed")):
        done = zoo(*command)
        assert done.exit_code == 1 and words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "damage",
    [
        lambda package: (package / "Manifest.json").write_text("{}"),
        lambda package: (package / "Data/com.apple.CoreML/model.mlmodel").write_bytes(b"no protobuf"),
        lambda package: (package / "Data/com.apple.CoreML/model.mlmodel").unlink(),
        lambda package: os.truncate(package / "Data/com.apple.CoreML/weights/weight.bin", 1000),
    ],
)
def test_a_damaged_package_is_an_error_in_words(
    damage: Callable[[Path], object], built: Samples, tmp_path: Path
) -> None:
    package = tmp_path / "damaged.mlpackage"
    shutil.copytree(built["dense"].package, package)
    damage(package)
    with pytest.raises(CheckFailed, match="cannot be read"), contextlib.ExitStack() as stack:
        stack.enter_context(BACKEND.stepper(package, built["dense"].bundle.functions, 8))


X = np.array([[-2.5, -0.5, 0.0, 0.4], [1.0, 1.5, 2.0, 60.0]], np.float32)
OPERATIONS: dict[str, dict[str, Any]] = {
    **{
        name: {"x": X} for name in ("abs", "ceil", "erf", "exp2", "floor", "relu", "sign", "square", "tanh", "identity")
    },
    "sqrt": {"x": np.abs(X)},
    "log": {"x": np.abs(X) + 1},
    "clip": {"x": X, "alpha": np.float32(-1), "beta": np.float32(1.25)},
    "gelu": {"x": X},
    "gelu tanh": {"x": X, "mode": "TANH_APPROXIMATION"},
    "gelu sigmoid": {"x": X, "mode": "SIGMOID_APPROXIMATION"},
    **{name: {"x": X, "y": X.T.reshape(X.shape)} for name in ("minimum", "less", "less_equal", "equal", "not_equal")},
    **{name: {"x": X > 0, "y": X < 1} for name in ("logical_and", "logical_or")},
    "logical_not": {"x": X > 0},
    **{name: {"x": X, "axes": [-1], "keep_dims": True} for name in ("reduce_max", "reduce_min")},
    "layer_norm": {"x": X, "axes": [-1], "epsilon": np.float32(1e-3)},
    "layer_norm gain": {"x": X, "axes": [-1], "gamma": X[0] + 3, "beta": X[1], "epsilon": np.float32(1e-5)},
}


@pytest.mark.parametrize("called", OPERATIONS)
def test_an_operation_gives_what_coremltools_computes_of_constants(called: str) -> None:
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function

    name, given = called.partition(" ")[0], OPERATIONS[called]
    with Function({}):
        expected = getattr(Builder, name)(**given).val
    arguments = {key: each if isinstance(each, str) else torch.tensor(np.array(each)) for key, each in given.items()}
    found = _OPERATIONS[name](arguments)
    assert isinstance(found, torch.Tensor)
    assert np.allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-6)


def test_an_operation_that_is_not_known_is_an_error(built: Samples, tmp_path: Path) -> None:
    def rename(package: Any) -> None:
        next(operation for operation in package.block.operations if operation.type == "silu").type = "elu"

    package = copied(built["dense"], tmp_path, rename)
    with pytest.raises(CheckFailed, match="does not know its operations elu"), contextlib.ExitStack() as stack:
        stack.enter_context(BACKEND.stepper(package, built["dense"].bundle.functions, 8))


def test_a_result_of_another_shape_than_declared_is_an_error(built: Samples, tmp_path: Path) -> None:
    def widen(package: Any) -> None:
        silu = next(operation for operation in package.block.operations if operation.type == "silu")
        silu.outputs[0].type.tensorType.dimensions[-1].constant.size += 1

    package = copied(built["dense"], tmp_path, widen)
    with (
        pytest.raises(CheckFailed, match="declared is"),
        BACKEND.stepper(package, built["dense"].bundle.functions, 8) as stepper,
    ):
        stepper.step(5)


# ---------------------------------------------------------------------------------------------------------------------
# Bundles that the interpreter is not for
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "size", "native", "asset"),
    [
        ("auto", 1_000, False, True),
        ("auto", 27 * 10**9, False, False),
        ("auto", 27 * 10**9, True, True),
        ("mil", 27 * 10**9, False, True),
        ("torch", 1_000, True, False),
    ],
)
def test_a_gate_runs_the_asset_where_that_is_asked_for_or_ends_in_time(
    candidate: str, size: int, native: bool, asset: bool
) -> None:
    assert judges_asset(candidate, "mil", size, native=native) is asset


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_that_the_interpreter_takes_is_known_before_it_takes_it(kind: str, built: Samples) -> None:
    package = Package.open(built[kind].package)
    held = [value for value in Interpreter(package)._constants.values() if isinstance(value, torch.Tensor)]
    constants = sum(value.numel() * value.element_size() for value in held)

    assert memory(package) == constants + 4 * max(value.numel() * value.element_size() for value in held)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "-p", "def", "-n", "1"),
        ("gate", "--candidate", "mil", "--prompts", "code", "--positions", "8"),
        ("gate", "--prompts", "code", "--positions", "8"),
    ],
    ids=" ".join,
)
def test_a_bundle_that_takes_more_memory_than_there_is_is_refused_with_the_numbers(
    arguments: tuple[str, ...], built: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coreai_zoo.backends.coreml.backend.available_memory", lambda: 2**20)
    command, *options = arguments
    output = ("-o", tmp_path) if command == "gate" else ()

    result = zoo(command, built["dense"].bundle.directory, *options, *output)

    assert result.exit_code == 3
    assert "takes 0.0 GiB in the reference interpreter of ML Programs" in result.stderr
    assert "0.0 GiB are available" in result.stderr and "--candidate torch" in result.stderr
    assert "oracle" not in result.stderr, "it is said before anything runs"


def test_on_a_mac_the_gate_of_a_large_bundle_does_not_choose_the_interpreter(
    built: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coreai_zoo.gates.run._MAC", True)
    monkeypatch.setattr("coreai_zoo.gates.run._INTERPRETED_BYTES", 1_000)
    options = ("--prompts", "code", "--positions", "8", "--no-control", "--json", "-o", tmp_path)

    record = json.loads(zoo("gate", built["dense"].bundle.directory, *options).stdout)

    assert "PyTorch" in record["prompts"][0]["candidate"]


def test_more_positions_than_the_package_allows_are_refused(built: Samples) -> None:
    signature = built["dense"].bundle.signature
    with pytest.raises(BadInput, match=f"the package allows {CONTEXT}"), contextlib.ExitStack() as stack:
        stack.enter_context(BACKEND.stepper(built["dense"].package, {"main": signature}, CONTEXT + 1))


DTYPES = ("float16", "float32", "int8", "uint8", "int16", "uint16", "int4", "uint4", "int32", "uint32")


def test_the_weights_are_laid_out_as_coremltools_writes_them(tmp_path: Path) -> None:
    """With lengths that need every amount of padding, and some weights that are not there yet."""
    from coremltools.converters.mil.backend.mil.load import BlobWriter

    native, ours = BlobWriter(str(tmp_path / "weight.bin")), WeightFile()
    written: dict[str, bytes] = {}
    methods = {"float16": "write_fp16_data", "float32": "write_float_data"}
    for number, dtype in enumerate(DTYPES * 9):
        narrow = dtype in {"int4", "uint4"}
        values = np.arange(
            1 + 7 * number, dtype={"float16": "uint16", "int4": "int8", "uint4": "uint8"}.get(dtype, dtype)
        )
        values = values % 8 if narrow else values
        write = methods.get(dtype, f"write_{dtype}_data")
        place = getattr(native, write)(values)
        if number % 3 == 0 or narrow:
            assert ours.add_room(f"w{number}", Constant(None, values.shape, dtype)) == place
            written[f"w{number}"] = packed(values) if narrow else values.tobytes()
        else:
            assert getattr(ours, write)(values) == place
    del native  # which closes the file
    content = b"".join(written[piece] if isinstance(piece, str) else piece for piece in ours.pieces)
    assert content == (tmp_path / "weight.bin").read_bytes()
    assert ours.sizes == {name: len(values) for name, values in written.items()}


def test_a_weight_of_a_dtype_that_is_not_stored_is_refused() -> None:
    with pytest.raises(PluginError, match="A weight is bfloat16, which the Core ML backend does not store"):
        WeightFile().add_room("w", Constant(None, (3, 4), "bfloat16"))


def test_the_program_holds_what_is_too_small_for_the_file(
    tiny: Built, traced: tuple[Traced, dict[str, Constant]]
) -> None:
    decoder, constants = traced
    asked: list[str] = []

    def values(names: Collection[str]) -> dict[str, Constant]:
        asked.extend(names)
        return {name: constants[name] for name in names}

    layout = decoder.lay_out({name: evolve(each, data=None) for name, each in constants.items()}, values)
    small = {name for name, each in constants.items() if math.prod(each.shape) < 10}
    assert small and set(asked) == small and layout.room.keys() == constants.keys() - small
    read = BACKEND.constants(tiny.package)
    assert all(bytes(read[name]) == each.data.tobytes() for name, each in constants.items())


# ---------------------------------------------------------------------------------------------------------------------
# The toolchain
# ---------------------------------------------------------------------------------------------------------------------


def test_the_contract_names_the_systems_that_a_package_is_written_for() -> None:
    from coreai_zoo.backends.coreml.lowering import TARGET

    assert [type(TARGET)[f"{system.name}{system.version}"] for system in FIXED_S1.systems] == [TARGET, TARGET]


def test_another_version_of_the_toolchain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coreai_zoo.backends.coreml.backend._REQUIRED", {"coremltools": "8.0"})
    with pytest.raises(EnvironmentLacks, match=r"is 9\.0, and this version of the zoo is written against 8\.0"):
        _ = BACKEND.versions


def test_the_required_version_is_that_of_the_package(root: Path) -> None:
    dependencies = (root / "pyproject.toml").read_text()
    for name, version in _REQUIRED.items():
        assert f'"{name}=={version}"' in dependencies


@pytest.mark.parametrize(
    "name",
    [
        "coremltools._deps._TORCH_MAX_VERSION",
        "coremltools.converters.mil.backend.mil.helper.create_file_value_tensor",
        "coremltools.converters.mil.backend.mil.helper.create_tensor_value",
        "coremltools.converters.mil.backend.mil.helper.types_to_proto_primitive",
        "coremltools.converters.mil.backend.mil.load.CoreMLProtoExporter",
        "coremltools.converters.mil.backend.mil.load.MILProtoExporter.get_milproto_value",
        "coremltools.converters.mil.backend.mil.load.MILProtoExporter.get_blob_writer",
        "coremltools.converters.mil.backend.mil.load.BlobWriter",
        "coremltools.converters.mil.frontend.torch.torch_op_registry.register_torch_op",
        "coremltools.converters.mil.mil.passes.pass_pipeline.PassPipelineManager.apply_pipeline",
        "coremltools.converters.mil.mil.program.Program.validate",
    ],
)
def test_what_is_not_documented_of_the_toolchain_is_where_the_backend_expects_it(name: str) -> None:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found: Any = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
            return
    pytest.fail(f"{name} is gone")


def test_both_backends_come_with_the_host() -> None:
    backends = default_plugins().backends()
    assert {name: type(backend) for name, backend in backends.items()} == {
        "coreai": CoreAIBackend,
        "coreml": CoreMLBackend,
    }
    written = {name: contract.backends for name, contract in default_plugins().contracts().items()}
    assert written.pop("fixed-s1") == ("coreml",)
    assert set(written) == {"static-s1", "chunked", "chunked-unrolled", "dynamic", "dynamic-bf16"}
    assert set(written.values()) == {("coreai",)}


def test_a_state_that_grows_is_refused() -> None:
    growing = StateSpec(name="keyCache", shape=(1, 1, 1, "capacity", 1), kind="kv_cache")
    with pytest.raises(BadInput, match="state keyCache has a dynamic axis"):
        BACKEND.require({"main": evolve(forgetful_spec(), states=(growing,), axes={"capacity": Axis(1, 8, 8)})}, ())


def test_the_overlay_has_one_rewrite_more_for_it() -> None:
    names = [rewrite.name for rewrite in rewrites_of(FIXED_S1)]
    assert names == ["loop-free-step", "conv-as-shifts", "fixed-context-attention"]
    assert math.prod(FIXED_S1.functions(KVCache(1, 1, 1), (), 8, 8)["main"].inputs[1].shape) == 1  # type: ignore[arg-type]
