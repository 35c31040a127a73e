"""The Core AI backend against the toolchain's own public path, and what its assets must and must not hold."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from safetensors.torch import save_file
from torch import Tensor, nn

import forked
import toy_plugin
from assets import save
from coreai_zoo import composites, interruption
from coreai_zoo.backend import Constant, drain
from coreai_zoo.backends.coreai.backend import _REQUIRED, CoreAIBackend, CoreAITraced, _lowered, _without_weights
from coreai_zoo.backends.coreai.bytecode import Bytecode
from coreai_zoo.backends.coreai.holes import Holes
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.contracts import STATIC_S1
from coreai_zoo.errors import CheckFailed, EnvironmentLacks, PluginError
from coreai_zoo.lowering import module as lowering
from coreai_zoo.lowering.trace import dynamic_shapes, example_inputs
from coreai_zoo.overlay import LayerRewrite, ParameterInfo, WeightMap, WeightRule
from coreai_zoo.program import Program
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import QuantizationSpec, Recipe
from coreai_zoo.signature import InputSpec, KVCache, TensorSpec, TraceSpec
from coreai_zoo.weights.formats import Format, has_zero_points
from coreai_zoo.weights.plan import plan_weights
from coreai_zoo.weights.store import Place, StoredArray, StoredTensor, WeightStore
from coreai_zoo_overlays.qwen3_5.table import ROLES
from decoders import bind, rewrites_of
from suite import NIGHTLY

TESTS = Path(__file__).parent
TOKENS = [5, 17, 3, 3, 60, 41]
BACKEND = CoreAIBackend()

INT8 = QuantizationSpec("int8", "symmetric_with_clipping", 32)


def recipe_of(spec: QuantizationSpec, **others: QuantizationSpec) -> Recipe:
    """`spec` for every matrix that is multiplied, the head included."""
    plain = RECIPES["fp16"]
    return Recipe.by_role("test", "", {**plain.specs, **dict.fromkeys(("body", "head"), spec), **others})


# ---------------------------------------------------------------------------------------------------------------------
# Decoders with random weights in a real store
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Model:
    """A decoder, its signature and its rewrites."""

    overlay: Any
    config: Any
    rewrites: tuple[LayerRewrite, ...]
    spec: TraceSpec

    def module(self) -> nn.Module:
        """The decoder on the meta device, rewritten."""
        rewrites = [("test", rewrite) for rewrite in self.rewrites]
        return lowering.build_module(lambda: self.overlay.decoder(self.config, STATIC_S1), rewrites)

    def bound(self, store: WeightStore, *, values: bool) -> tuple[nn.Module, Mapping[str, Constant]]:
        """The decoder with stored weights, and its constants."""
        module = self.module()
        return module, bound(module, store, values=values)

    def stepped_in_torch(self, module: nn.Module) -> np.ndarray[Any, Any]:
        """Logits of `TOKENS`, token after token, states carried."""
        states = [
            torch.zeros([len(TOKENS) if isinstance(size, str) else size for size in state.shape], dtype=_dtype(state))
            for state in self.spec.states
        ]
        with torch.no_grad():
            logits = [
                module(torch.tensor([[token]]), torch.arange(position + 1)[None], *states)[0, -1].clone()
                for position, token in enumerate(TOKENS)
            ]
        return torch.stack(logits).float().numpy()

    def stepped(self, asset: Path) -> np.ndarray[Any, Any]:
        """Logits of `TOKENS` from a saved asset, as float16."""
        with BACKEND.stepper(asset, {"main": self.spec}, capacity=len(TOKENS)) as stepper:
            return np.stack(list(drain(stepper, TOKENS)))


def bound(module: nn.Module, store: WeightStore, *, values: bool) -> dict[str, Constant]:
    """Bind a module, or allocate it to be traced; its constants."""
    parameters = {name: store[name] for name, _ in module.named_parameters()}
    if values:
        bind(module, parameters)
    else:
        formats = {name: evolve(stored.format, quantization=None) for name, stored in parameters.items()}
        lowering.allocate(module, formats)
    return lowering.constants(parameters)


def _dtype(spec: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def toy(**changes: int) -> Model:
    """The toy of `toy_plugin`, one layer unless told otherwise."""
    sizes = {"vocab_size": 72, "hidden_size": 64, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 16}
    overlay = toy_plugin.ToyOverlay()
    config = overlay.read_config({**sizes, "intermediate_size": 96, "max_context_length": 32, **changes})
    plugin = toy_plugin.ToyPlugin(Path())
    states = list(plugin.zoo_extra_states(overlay, config))
    spec = STATIC_S1.functions(overlay.kv_cache(config), states, config.vocab_size, 32)["main"]
    return Model(overlay, config, tuple(plugin.zoo_layer_rewrites(overlay, spec)), spec)


_LINEAR_LAYERS = {"dense": 2, "moe": 1}


def hybrid(kind: str) -> Model:
    """A small decoder of the shipped overlay: two linear layers (`dense`) or one (`moe`), and one of full attention."""
    from coreai_zoo_overlays import qwen3_5

    kinds = ["linear_attention"] * _LINEAR_LAYERS[kind] + ["full_attention"]
    fields = {
        "model_type": "qwen3_5_text" if kind == "dense" else "qwen3_5_moe_text",
        "vocab_size": 72,
        "hidden_size": 64,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    overlay = qwen3_5.Qwen35Overlay()
    config = overlay.read_config(fields)
    states = qwen3_5.extra_states(config, STATIC_S1)
    spec = STATIC_S1.functions(overlay.kv_cache(config), states, config.vocab_size, 32)["main"]
    return Model(overlay, config, rewrites_of(STATIC_S1), spec)


_ROLES = {
    r"embed(_tokens)?\.": "embedding",
    r"(lm_)?head\.": "head",
    r"conv1d\.": "gdn.conv",
    r"norm\.": "norm",
    r"\.(A|dt_bias)$": "scalar",
    r"mlp\.gate\.": "moe.router",
    r"shared_expert_gate\.": "moe.shared_gate",
    r"mlp\.experts\.": "moe.expert",
    r"(attention|self_attn)\.": "attention",
    r"linear_attn\.in_proj": "gdn.in",
    r"linear_attn\.out_proj": "gdn.out",
    r"": "mlp",
}


def _role(name: str) -> str:
    return next(role for pattern, role in _ROLES.items() if re.search(pattern, name))


def _random(name: str, info: ParameterInfo, generator: torch.Generator) -> Tensor:
    values = torch.randn(info.shape, generator=generator)
    if "norm" in name:
        return 1 + values / 8
    if name.endswith(".A"):
        return -values.exp()
    return values if "embed" in name or len(info.shape) == 1 else values / math.sqrt(info.shape[-1])


def filled(model: Model, recipe: Recipe, directory: Path) -> WeightStore:
    """A store of seeded random weights, made by the host's own planner and quantizer from a checkpoint."""
    infos = lowering.parameters_of(model.module())
    generator = torch.Generator().manual_seed(3)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}", encoding="utf-8")
    tensors = {name: _random(name, info, generator).to(getattr(torch, info.dtype)) for name, info in infos.items()}
    save_file(tensors, directory / "model.safetensors")
    checkpoint = Checkpoint.open(directory)
    table = WeightMap(tuple(WeightRule(name, name, _role(name)) for name in infos), roles=ROLES)
    store = WeightStore(directory / "store")
    store.fill(plan_weights(table, infos, checkpoint.tensors, recipe), checkpoint)
    return store


@frozen
class Compiled:
    """A saved asset and what it was made from."""

    model: Model
    store: WeightStore
    constants: Mapping[str, Constant]
    path: Path

    @property
    def program(self) -> str:
        """The saved program as text."""
        from coreai.authoring import AIModelAsset

        return str(AIModelAsset.load(str(self.path)).program._module)


def compiled(model: Model, recipe: Recipe, directory: Path) -> Compiled:
    """Compile a decoder with random weights to `directory`/m.aimodel."""
    store = filled(model, recipe, directory / "weights")
    module, constants = model.bound(store, values=False)
    save(BACKEND.trace({"main": module}, {"main": model.spec}), constants, directory / "m.aimodel")
    return Compiled(model, store, constants, directory / "m.aimodel")


@pytest.fixture(scope="module")
def toy_asset(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled(toy(intermediate_size=512), recipe_of(INT8), tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    return {kind: compiled(hybrid(kind), recipe_of(INT8), tmp_path_factory.mktemp(kind)) for kind in ("dense", "moe")}


@pytest.fixture(scope="module")
def hybrid_programs(hybrids: Mapping[str, Compiled]) -> dict[str, str]:
    return {kind: asset.program for kind, asset in hybrids.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The public path of the toolchain
# ---------------------------------------------------------------------------------------------------------------------


def publicly_compiled(model: Model, store: WeightStore, directory: Path) -> Path:
    """The same decoder through coreai-opt's eager quantizer and coreai-torch's documented converter."""
    from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
    from coreai_opt.quantization import QuantizationSpec as AppleSpec
    from coreai_opt.quantization.spec import PerBlockGranularity
    from coreai_torch import ExternalizeSpec, TorchConverter, get_decomp_table
    from coreai_torch.composite_ops import SDPA, RMSNormImpl

    module = model.module().to_empty(device="cpu")
    original = Checkpoint.open(store.directory.parent)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            rows = original.tensors[name].rows
            parameter.copy_(original.read_rows(name, 0, rows).reshape(parameter.shape))
            parameter.requires_grad = False
    for child in list(module.modules()):
        if isinstance(child, composites.RMSNorm):
            child.impl = RMSNormImpl(eps=1e-5)
        elif isinstance(child, composites.SDPA):
            child.impl = SDPA(scale=child.impl.scale, is_causal=True)

    spec = AppleSpec(
        dtype=torch.int8, qscheme="symmetric_with_clipping", granularity=PerBlockGranularity(axis=1, block_size=32)
    )
    linear = ModuleQuantizerConfig(op_state_spec={"weight": spec}, op_input_spec=None, op_output_spec=None)
    config = QuantizerConfig(
        global_config=None,
        module_type_configs={"torch.nn.modules.linear.Linear": linear},
        execution_mode="eager",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantizer = Quantizer(module, config)
        quantizer.prepare(example_inputs(model.spec))
        quantized: Any = quantizer.finalize()

    def traced(decoder: nn.Module) -> torch.export.ExportedProgram:
        example, shapes = example_inputs(model.spec), dynamic_shapes(model.spec)
        program = torch.export.export(decoder, example, dynamic_shapes=shapes, strict=False)
        return program.run_decompositions(get_decomp_table())

    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converter = TorchConverter().add_pytorch_module(
            quantized,
            export_fn=traced,
            externalize_modules=[
                ExternalizeSpec(RMSNormImpl, composite_op_name="rms_norm", composite_attrs=["axes", "eps"]),
                ExternalizeSpec(
                    SDPA,
                    composite_op_name="scaled_dot_product_attention",
                    composite_attrs=["scale", "is_causal", "window_size"],
                ),
            ],
            input_names=[tensor.name for tensor in model.spec.inputs],
            state_names=[state.name for state in model.spec.states],
            output_names=[tensor.name for tensor in model.spec.outputs],
        )
        path = directory / "public.aimodel"
        converter.to_coreai().save_asset(path)
    return path


@pytest.fixture(scope="module")
def public_asset(toy_asset: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publicly_compiled(toy_asset.model, toy_asset.store, tmp_path_factory.mktemp("public"))


def operations(program: str) -> str:
    """The program without the bytes of its constants."""
    return program.partition("{-#")[0]


def constants_of(program: str) -> Counter[tuple[str, str]]:
    """How often each (kind, type) of constant occurs; kinds are `resource`, `values` in place, and `splat`."""
    found: Counter[tuple[str, str]] = Counter()
    for value, type_ in re.findall(r"coreai\.constant (.*) : tensor<([^>]+)>", operations(program)):
        kind = "resource" if value.startswith("dense_resource") else "values" if re.search(r'[\["]', value) else "splat"
        found[kind, type_] += 1
    return found


def constant_bytes(type_: str) -> int:
    """Size of a constant of a type such as `64x2xf16`."""
    *shape, element = type_.split("x")
    return math.prod(map(int, shape)) * int(re.sub(r"\D", "", element)) // 8


def test_the_saved_asset_has_the_same_kinds_of_constants_as_the_public_path(
    toy_asset: Compiled, public_asset: Path
) -> None:
    ours, theirs = (constants_of(asset.program) for asset in (toy_asset, evolve(toy_asset, path=public_asset)))

    def types(constants: Counter[tuple[str, str]]) -> Counter[str]:
        return Counter(type_ for (_, type_), count in constants.items() for _ in range(count))

    assert types(ours) == types(theirs)
    # The public path writes what is small into the operations; we hand over every weight by name, whatever its size.
    small = {key for key in ours | theirs if key[0] != "splat" and constant_bytes(key[1]) < 1024}
    assert {key: count for key, count in ours.items() if key not in small} == {
        key: count for key, count in theirs.items() if key not in small
    }
    resources = Counter({type_: count for (kind, type_), count in ours.items() if kind == "resource"})
    assert sum(count for type_, count in resources.items() if type_.endswith("xsi8")) == 6 + 1  # linears, and head
    assert sum(count for type_, count in resources.items() if type_.endswith("xf16")) == (6 + 1) + (1 + 3 + 1)
    assert resources["512x2xf16"] == theirs["resource", "512x2xf16"] == 1  # scales, where they are not small
    assert resources["72x64xf16"] == theirs["resource", "72x64xf16"] == 1  # a weight that is not quantized
    assert ours["splat", "512x2xsi8"] == 1  # zero points of zero, shared


def test_the_saved_asset_gives_the_very_logits_of_the_public_path(toy_asset: Compiled, public_asset: Path) -> None:
    ours, theirs = toy_asset.model.stepped(toy_asset.path), toy_asset.model.stepped(public_asset)
    assert np.array_equal(ours, theirs), f"differ by up to {np.abs(ours.astype(np.float32) - theirs).max()}"
    assert len({row.tobytes() for row in ours}) == len(TOKENS)  # not all the same, as of a decoder that sees nothing
    # And they are the decoder's: float16 on another machine's order of summation.
    module, _ = toy_asset.model.bound(toy_asset.store, values=True)
    assert np.abs(ours.astype(np.float32) - toy_asset.model.stepped_in_torch(module)).max() < 2e-2


def test_the_metadata_of_the_asset_has_the_fields_of_the_public_path(toy_asset: Compiled, public_asset: Path) -> None:
    ours, theirs = (json.loads((path / "metadata.json").read_text()) for path in (toy_asset.path, public_asset))
    assert set(ours) == set(theirs)
    changing = {key for key in ours if "date" in key.lower()}
    assert {key: ours[key] for key in set(ours) - changing} == {key: theirs[key] for key in set(ours) - changing}
    assert sorted(path.name for path in toy_asset.path.iterdir()) == sorted(
        path.name for path in public_asset.iterdir()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

BIG = 1 << 14
BIG_BYTES = BIG * BIG  # 256 MiB: int8 codes of one matrix, and a float16 matrix of half as many rows


class BigDecoder(nn.Module):
    """Two matrices that would be noticed in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(BIG, BIG // 2, bias=False, dtype=torch.float16)
        self.quantized = nn.Linear(BIG, BIG, bias=False, dtype=torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.quantized(x))


def sparse(path: Path, size: int) -> StoredArray:
    """A file of zeros that takes no space on disk, but for its name: the toolchain stores equal constants once."""
    with path.open("wb") as file:
        file.write(path.name.encode())
        file.truncate(size)
    return StoredArray(Place(path), size)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]  # Linux always has it


@contextlib.contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """By how much anonymous memory grew at most since the block was entered; filled in when it is left."""
    peak, done, before = [0], threading.Event(), anonymous_bytes()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def compile_big(directory: Path) -> None:
    """In a process of its own: lower `BigDecoder`, print by how much anonymous memory grew."""
    with torch.device("meta"):
        module = BigDecoder().eval()
    half = sparse(directory / "half", BIG_BYTES)
    codes, scales = sparse(directory / "codes", BIG_BYTES), sparse(directory / "scales", BIG_BYTES // 32 * 2)
    store: Any = {
        "plain.weight": StoredTensor("plain.weight", Format((BIG // 2, BIG), "float16"), "", {"data": half}),
        "quantized.weight": StoredTensor(
            "quantized.weight", Format((BIG, BIG), "float16", INT8), "", {"data": codes, "scales": scales}
        ),
    }
    spec = TraceSpec(
        inputs=(InputSpec("x", (1, 1, BIG), "float16", holds="tokens"),),
        states=(),
        outputs=(TensorSpec("y", (1, 1, BIG // 2), "float16"),),
        axes={},
    )
    # Everything that is imported or set up once is not what is measured here.
    warm = toy()
    module_of_warm, constants = warm.bound(filled(warm, recipe_of(INT8), directory / "warm"), values=False)
    save(BACKEND.trace({"main": module_of_warm}, {"main": warm.spec}), constants, directory / "warm.aimodel")
    with anonymous_peak() as peak:
        constants = bound(module, store, values=False)
        save(BACKEND.trace({"main": module}, {"main": spec}), constants, directory / "big.aimodel")
    size = (directory / "big.aimodel" / "main.mlirb").stat().st_size
    with anonymous_peak() as seen:
        kept = bytes(BIG_BYTES // 2)  # the watcher must be able to see what it is there to see
        np.frombuffer(kept, np.uint8)[:: os.sysconf("SC_PAGE_SIZE")].max()
        touched = np.ones(BIG_BYTES // 2, np.uint8)
        time.sleep(0.05)
    assert touched.nbytes + len(kept) == BIG_BYTES
    print(json.dumps({"grown": peak[0], "bytecode": size, "seen": seen[0]}))  # the answer to the parent


def run_here(call: str, *, directory: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `call` on this very module in another process whose working directory is `directory`."""
    # What this process imports may be named by its own path, as in a working tree beside the installed one.
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path; import test_coreai_backend as here; here.{call}"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_forked(call: str, *, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same where the start does not matter; to its end."""
    code = f"from pathlib import Path; import test_coreai_backend as here; here.{call}"
    return forked.run(code, cwd=directory, call="forked:execute", env={**os.environ, **environment}, timeout=600)


def answer(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_lowering_makes_no_copy_of_a_weight_in_anonymous_memory(tmp_path: Path) -> None:
    done = run_forked("compile_big(Path())", directory=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["bytecode"] > 2 * BIG_BYTES  # both matrices are in the asset
    assert measured["seen"] > BIG_BYTES // 3  # and a copy would have been noticed
    assert measured["grown"] < BIG_BYTES // 3


# ---------------------------------------------------------------------------------------------------------------------
# The same bytes every time, and no trace of the machine
# ---------------------------------------------------------------------------------------------------------------------


def compile_again(weights: Path, destination: Path) -> None:
    """In a process of its own: compile the mixture-of-experts decoder from a store that is there already."""
    model = hybrid("moe")
    module, constants = model.bound(WeightStore(weights), values=False)
    save(BACKEND.trace({"main": module}, {"main": model.spec}), constants, destination)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.skipif(not NIGHTLY, reason="test_reproducible.py compares whole bundles; make nightly runs it")
def test_a_process_with_another_hash_seed_and_working_directory_writes_the_same_bytes(
    hybrids: Mapping[str, Compiled], tmp_path: Path
) -> None:
    call = f"compile_again(Path({str(hybrids['moe'].store.directory)!r}), Path('again.aimodel'))"
    for seed in ("4242", "1"):
        (tmp_path / seed).mkdir()
        answer(run_here(call, directory=tmp_path / seed, PYTHONHASHSEED=seed))
        found = contents(tmp_path / seed / "again.aimodel")
        assert set(found) == {"main.mlirb", "main.hash", "metadata.json"}
        assert found == contents(hybrids["moe"].path)  # of this process, with another history


def test_every_resource_is_named_after_the_state_that_it_holds(
    hybrids: Mapping[str, Compiled], hybrid_programs: Mapping[str, str]
) -> None:
    for kind, asset in hybrids.items():
        names = set(re.findall(r"dense_resource<([^>]+)>", operations(hybrid_programs[kind])))
        buffers = set(dict(asset.model.module().named_buffers()))
        assert buffers == {"model.rotary_emb.inverse_frequency"}
        state = set(asset.constants) | buffers
        assert names == state
        assert any("shared_expert_gate" in name for name in names) == (kind == "moe")  # a row, read as a column


def test_constants_are_read_back_as_views_of_the_very_bytes_of_the_store(hybrids: Mapping[str, Compiled]) -> None:
    for asset in hybrids.values():
        stored = BACKEND.constants(asset.path)
        for name, constant in asset.constants.items():
            assert stored[name] == constant.data.tobytes(), name


def test_the_signature_read_without_the_weights_is_what_the_toolchain_says_of_the_whole_asset(
    hybrids: Mapping[str, Compiled],
) -> None:
    from coreai.authoring import AIModelAsset

    asset = hybrids["moe"].path
    whole = AIModelAsset.load(str(asset)).summary(include_statistics=True)
    with _without_weights(asset) as loaded:
        bare = loaded.summary(include_statistics=True)
    bytecode = asset / "main.mlirb"
    assert len(Bytecode.open(bytecode).without_blobs()) < bytecode.stat().st_size / 2
    for of in ("function_inputs", "function_states", "function_outputs"):
        assert getattr(whole, of)("main") == getattr(bare, of)("main")
    assert whole.operation_distribution == bare.operation_distribution
    assert whole.storage_types == bare.storage_types


def test_every_resource_holds_the_bytes_of_the_store(
    hybrids: Mapping[str, Compiled], hybrid_programs: Mapping[str, str]
) -> None:
    asset, program = hybrids["dense"], hybrid_programs["dense"]
    held = dict(re.findall(r'([\w.]+): "0x([0-9A-F]+)"', program.partition("{-#")[2]))
    assert set(asset.constants) <= set(held)
    for name, constant in asset.constants.items():
        alignment, data = held[name][:8], bytes.fromhex(held[name][8:])  # the first four bytes are the alignment
        assert int.from_bytes(bytes.fromhex(alignment), "little") <= 16
        assert data == constant.data.tobytes(), name


def test_an_asset_is_laid_out_as_the_compiler_writes_it(hybrids: Mapping[str, Compiled], tmp_path: Path) -> None:
    """That is given every weight, and has a writer of its own."""
    for kind, asset in hybrids.items():
        module, constants = asset.model.bound(asset.store, values=False)
        traced = BACKEND.trace({"main": module}, {"main": asset.model.spec})
        with interruption.deferred():
            _lowered(traced._whole(constants), lambda each: each)._save_bytecode(str(tmp_path / kind))
        assert (tmp_path / kind).read_bytes() == (asset.path / "main.mlirb").read_bytes()

        layout = traced.lay_out({name: evolve(each, data=None) for name, each in constants.items()}, lambda _: {})
        assert layout.size == (asset.path / "main.mlirb").stat().st_size
        assert {name: layout.sizes[name] for name in layout.room} == {
            name: each.data.nbytes for name, each in constants.items()
        }
        assert sum(map(len, filter(lambda piece: isinstance(piece, bytes), layout.pieces))) < layout.size / 2


def test_a_layout_is_known_by_what_it_says_of_places(hybrids: Mapping[str, Compiled]) -> None:
    found = set()
    for asset in hybrids.values():
        module, constants = asset.model.bound(asset.store, values=False)
        traced = BACKEND.trace({"main": module}, {"main": asset.model.spec})
        layouts = [traced.lay_out(constants, lambda _: {}) for _ in range(2)]
        assert layouts[0] == layouts[1] and layouts[0].sha256 == layouts[1].sha256
        found |= {layouts[0].sha256, evolve(layouts[0], checksum=None).sha256}
        first, *others = layouts[0].pieces
        assert isinstance(first, bytes)
        found.add(evolve(layouts[0], pieces=(first + b"x", *others)).sha256)
        found.add(evolve(layouts[0], others={**layouts[0].others, "more": b""}).sha256)
    assert len(found) == 8


def test_a_hole_that_the_compiler_has_computed_with_is_refused(toy_asset: Compiled) -> None:
    made = Holes.of({"w": Constant(None, (4,), "uint8")})
    with pytest.raises(PluginError, match=r"computed with weights that it cannot have the values of: w\."):
        made.laid_out(Bytecode.open(toy_asset.path / "main.mlirb"))


def test_no_path_of_this_machine_is_in_an_asset(hybrids: Mapping[str, Compiled]) -> None:
    for asset in hybrids.values():
        bytecode = asset.path.joinpath("main.mlirb").read_bytes()
        traces = [str(Path.home()), str(TESTS.parent), str(asset.path.parent), sys.prefix, "site-packages", ".py"]
        assert [trace for trace in traces if trace.encode() in bytecode] == []
        assert b"resource_" not in bytecode  # what the toolchain names by a hash that is seeded per process


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def main_graph(program: str) -> str:
    """The operations of the function `main`."""
    found = re.search(r"coreai\.graph @main\(.*", operations(program), re.DOTALL)
    assert found is not None
    return found[0]


def state_arguments(main: str) -> dict[str, str]:
    """State name to argument of `main`."""
    arguments = main.splitlines()[0].partition(" -> ")[0].split(", %arg")
    named = (re.search(r'(\d+): .*coreai\.name = "(\w+)"', argument) for argument in arguments)
    return {found[2]: f"%arg{found[1]}" for found in named if found}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_each_state_is_written_once_per_step(kind: str, hybrid_programs: Mapping[str, str]) -> None:
    main = main_graph(hybrid_programs[kind])
    arguments = state_arguments(main)
    writes = Counter(re.findall(r"coreai\.write_handle (%\w+),", main))
    states = ("keyCache", "valueCache", "convState", "recState")
    assert {state: writes[arguments[state]] for state in states} == dict.fromkeys(states, 1)
    assert sum(writes.values()) == len(states)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_static_program_has_no_loop_and_no_branch(kind: str, hybrid_programs: Mapping[str, str]) -> None:
    names = set(re.findall(r"(?<![\w.#!])([a-z_]+(?:\.[a-z_]+)+)", operations(hybrid_programs[kind])))
    assert "coreai.write_handle" in names
    assert {name for name in names if re.search(r"while|loop|\bfor\b|\.if|cond|scf", name)} == set()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_composites_survive_lowering_under_their_names(kind: str, hybrid_programs: Mapping[str, str]) -> None:
    program = operations(hybrid_programs[kind])
    declared = set(re.findall(r'composite_declaration<"(\w+)"', program))
    expected = {"rms_norm", "scaled_dot_product_attention"}
    assert declared == (expected | {"gather_mm"} if kind == "moe" else expected)
    # Two norms per layer and the last norm; one gated norm per linear layer; q and k norms of the other; two products.
    calls = Counter(re.sub(r"_\d+$", "", name) for name in re.findall(r"coreai\.invoke @(\w+)", program))
    linear = _LINEAR_LAYERS[kind]
    counted = {"rms_norm": 2 * (linear + 1) + 1 + linear + 2, "scaled_dot_product_attention": 1}
    assert calls == (counted | {"gather_mm": 2 * (linear + 1)} if kind == "moe" else counted)


def test_a_dense_program_holds_nothing_of_a_router(hybrid_programs: Mapping[str, str]) -> None:
    dense, moe = (main_graph(hybrid_programs[kind]) for kind in ("dense", "moe"))
    for trace in ("gather_mm", r"coreai\.(arg)?sort", r"coreai\.softmax", "expert", r"mlp\.gate\."):
        assert re.search(trace, moe), f"{trace} should be what a router leaves"
        assert not re.search(trace, dense), trace


# ---------------------------------------------------------------------------------------------------------------------
# Composites
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "eps"), [((1, 1, 64), 1e-6), ((1, 3, 4, 16), 1e-5), ((2, 5), 0.1)])
def test_our_rms_norm_is_the_toolchains(shape: tuple[int, ...], eps: float) -> None:
    from coreai_torch.composite_ops import RMSNormImpl

    generator = torch.Generator().manual_seed(0)
    x, gain = torch.randn(shape, generator=generator), torch.randn(shape[-1], generator=generator)
    ours, theirs = composites.RMSNormImpl(eps)(x, gain), RMSNormImpl(eps=eps)(x, gain)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    half = composites.RMSNormImpl(eps)(x.half(), gain.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, RMSNormImpl(eps=eps)(x.half(), gain.half()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "new", "length"), [(4, 4, 1, 1), (6, 1, 1, 9), (4, 2, 5, 9), (8, 2, 7, 7)]
)
def test_our_attention_is_the_toolchains(heads: int, kv_heads: int, new: int, length: int) -> None:
    from coreai_torch.composite_ops import SDPA

    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, heads, new, 16, generator=generator)
    key, value = torch.randn(2, 1, kv_heads, length, 16, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = SDPA(scale=0.3, is_causal=True)(query, key, value)
    torch.testing.assert_close(composites.SDPAImpl(0.3)(query, key, value), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 3])
def test_our_gathered_product_is_the_toolchains(top_k: int) -> None:
    from coreai_torch.composite_ops import GatherMM

    generator = torch.Generator().manual_seed(2)
    experts = torch.randn(5, 16, 8, generator=generator)
    chosen = torch.randint(5, (1, 2, top_k), generator=generator, dtype=torch.int32)
    for lhs in (torch.randn(1, 2, 1, 1, 16, generator=generator), torch.randn(1, 2, top_k, 1, 16, generator=generator)):
        ours = composites.GatherMMImpl()(lhs, experts, rhs_indices=chosen)
        assert ours.shape == (1, 2, top_k, 1, 8)
        torch.testing.assert_close(ours, GatherMM()(lhs, experts, rhs_indices=chosen), rtol=1e-6, atol=1e-6)


def test_a_composite_and_its_replacement_take_the_same_arguments() -> None:
    from coreai_torch import composite_ops

    pairs = (
        (composites.RMSNormImpl, composite_ops.RMSNormImpl),
        (composites.SDPAImpl, composite_ops.SDPA),
        (composites.GatherMMImpl, composite_ops.GatherMM),
    )
    for ours, theirs in pairs:
        names = list(inspect.signature(ours.forward).parameters)
        assert list(inspect.signature(theirs.forward).parameters)[: len(names)] == names
    with pytest.raises(NotImplementedError, match="only the right-hand side"):
        composites.GatherMMImpl()(torch.ones(1, 1, 2), torch.ones(1, 2, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to store a weight
# ---------------------------------------------------------------------------------------------------------------------

Plain: TypeAlias = tuple[WeightStore, CoreAITraced, Mapping[str, Constant]]
STORAGE = {
    "int4": QuantizationSpec("int4", "symmetric_with_clipping", 32),
    "uint4 with zero points": QuantizationSpec("uint4", "asymmetric", 32),
    "int8 with zero points": QuantizationSpec("int8", "asymmetric", 32),
}


@pytest.fixture(scope="module")
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[QuantizationSpec, Compiled]:
    spec = STORAGE[request.param]
    # 73 rows of one block each: an odd number of zero points, which at 4 bits end in the middle of a byte.
    recipe = recipe_of(spec, head=evolve(spec, block_size=64))
    return spec, compiled(toy(vocab_size=73), recipe, tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """The weights of `stored` unquantized, the trace of their decoder, and its constants."""
    model = toy(vocab_size=73)
    store = filled(model, RECIPES["fp16"], tmp_path_factory.mktemp("plain") / "weights")
    module, constants = model.bound(store, values=False)
    return store, BACKEND.trace({"main": module}, {"main": model.spec}), constants


@pytest.mark.parametrize("stored", STORAGE, indirect=True)
def test_weights_lower_and_step_however_they_are_stored(
    stored: tuple[QuantizationSpec, Compiled], plain: Plain
) -> None:
    (spec, asset), head = stored, "head.parametrizations.weight."
    assert asset.constants[head + "original"].dtype == spec.dtype
    assert (head + "0.zero_points" in asset.constants) == has_zero_points(spec)
    assert asset.constants[head + "original"].data.nbytes == 73 * 64 * spec.bits // 8

    module, _ = asset.model.bound(asset.store, values=True)
    expected = asset.model.stepped_in_torch(module)
    found = asset.model.stepped(asset.path).astype(np.float32)
    assert np.abs(found - expected).max() < 2e-2

    # The same weights unquantized are further away than that: it is the integers that were run.
    unquantized = asset.model.stepped_in_torch(asset.model.bound(plain[0], values=True)[0])
    assert np.abs(found - expected).mean() < np.abs(unquantized - expected).mean() / 4

    suffix = {"int4": "xsi4", "uint4": "xui4", "int8": "xsi8"}[spec.dtype]
    resources = {type_: count for (kind, type_), count in constants_of(asset.program).items() if kind == "resource"}
    integers = sum(count for type_, count in resources.items() if type_.endswith(suffix))
    assert integers == 7 * (2 if has_zero_points(spec) else 1)  # codes, and zero points where there are any


@pytest.mark.parametrize("stored", ["uint4 with zero points"], indirect=True)
def test_an_asset_holds_nothing_of_the_memory_that_was_traced(
    stored: tuple[QuantizationSpec, Compiled], tmp_path: Path
) -> None:
    _, asset = stored
    module, constants = asset.model.bound(asset.store, values=False)
    for parameter in module.parameters():
        parameter.fill_(1)
    save(BACKEND.trace({"main": module}, {"main": asset.model.spec}), constants, tmp_path / "again.aimodel")
    assert contents(tmp_path / "again.aimodel") == contents(asset.path)


@pytest.mark.parametrize("stored", STORAGE, indirect=True)
def test_one_trace_is_lowered_with_the_weights_of_any_recipe(
    stored: tuple[QuantizationSpec, Compiled], plain: Plain
) -> None:
    def described(program: Program) -> tuple[list[str], object, list[object]]:
        """All but the order of the constants."""
        operations = [str(operation) for operation in program.functions["main"].operations if not operation.is_constant]
        return operations, program.stored, [function.operations for function in program.composites.values()]

    (_, asset), (_, traced, constants) = stored, plain
    unquantized, quantized = traced.lowered(constants), traced.lowered(asset.constants)
    assert described(quantized) == described(BACKEND.program(asset.path))
    assert described(quantized) != described(unquantized)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is said
# ---------------------------------------------------------------------------------------------------------------------


def test_another_version_of_the_toolchain_is_refused(
    monkeypatch: pytest.MonkeyPatch, toy_asset: Compiled, tmp_path: Path
) -> None:
    genuine = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9.9" if name == "coreai-torch" else genuine(name))
    module, constants = toy_asset.model.bound(toy_asset.store, values=False)
    told = r"coreai-torch is 9.9.9.*written against 0.4.3.*pip install coreai-torch==0.4.3"
    with pytest.raises(EnvironmentLacks, match=told) as caught:
        save(BACKEND.trace({"main": module}, {"main": toy_asset.model.spec}), constants, tmp_path / "no.aimodel")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "no.aimodel").exists()
    with pytest.raises(EnvironmentLacks, match=told):
        BACKEND.signatures(toy_asset.path)
    with (
        pytest.raises(EnvironmentLacks, match=told),
        BACKEND.stepper(toy_asset.path, {"main": toy_asset.model.spec}, 4),
    ):
        pass


def test_a_missing_toolchain_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(EnvironmentLacks, match=r"coreai-core is not installed.*pip install coreai-core==1.0.0b3"):
        _ = BACKEND.versions


def test_the_required_versions_are_those_of_the_package(root: Path) -> None:
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, version in _REQUIRED.items():
        assert f"{name}=={version}" in project["dependencies"]
    assert dict(BACKEND.versions) == dict(_REQUIRED)


def load_damaged(directory: Path) -> None:
    """In a process of its own, which the toolchain might end: read and run every asset, and print what is said."""
    spec = STATIC_S1.functions(KVCache(layers=1, heads=1, head_dim=1), (), vocab_size=8, max_context=8)["main"]
    for asset in sorted(directory.iterdir()):
        for use in (BACKEND.signatures, lambda path: BACKEND.stepper(path, {"main": spec}, capacity=2).__enter__()):
            try:
                use(asset)
            except CheckFailed as error:
                print(f"{asset.stem}: {error}")  # the answer to the parent


def test_the_hash_taken_while_the_asset_is_written_is_that_of_the_file(tmp_path: Path) -> None:
    asset = compiled(toy(intermediate_size=16384), recipe_of(INT8), tmp_path).path
    bytecode = asset.joinpath("main.mlirb").read_bytes()
    assert len(bytecode) > 2**20  # or its hash is not kept
    assert asset.joinpath("main.hash").read_bytes() == hashlib.sha256(bytecode).digest()


def lay_out_on_a_small_disk(store: Path, room: int) -> None:
    """In a process of its own, which the toolchain ends."""
    import resource

    model = toy(intermediate_size=512)
    module, constants = model.bound(WeightStore(store), values=False)
    traced = BACKEND.trace({"main": module}, {"main": model.spec})
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    traced.lay_out(constants, lambda _: constants)  # its writer is given every weight


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_disk_that_fills_while_the_toolchain_writes_is_said(
    toy_asset: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    room = (toy_asset.path / "main.mlirb").stat().st_size * 9 // 10
    call = f"lay_out_on_a_small_disk(Path({str(toy_asset.store.directory)!r}), {room})"
    process = run_forked(call, directory=tmp_path)
    errors = process.stderr
    assert process.returncode == EnvironmentLacks.exit_code
    said = errors.splitlines()[-1]
    assert said.startswith(f"error: There is no space left to write {tmp_path}/") and "TMPDIR" in said
    assert "LLVM" not in errors
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "use", ["signatures(asset)", "constants(asset)", "state(asset, 'main', state)", "program(asset)"]
)
def test_whatever_is_done_first_with_an_asset_prints_nothing(toy_asset: Compiled, use: str) -> None:
    state = {name: (constant.shape, constant.dtype) for name, constant in toy_asset.constants.items()}
    program = f"""
from pathlib import Path
from coreai_zoo.backends.coreai.backend import CoreAIBackend
asset, state = Path({str(toy_asset.path)!r}), {state!r}
CoreAIBackend().{use}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_damaged_asset_is_an_error_and_not_the_end_of_the_process(toy_asset: Compiled, tmp_path: Path) -> None:
    bytecode = toy_asset.path.joinpath("main.mlirb").read_bytes()
    damages = {
        "empty": b"",
        "flipped": bytecode[:-300] + bytes([bytecode[-300] ^ 255]) + bytecode[-299:],
        "garbage": b"not bytecode",
        "truncated": bytecode[: len(bytecode) // 2],
    }
    for name, content in damages.items():
        shutil.copytree(toy_asset.path, tmp_path / "assets" / f"{name}.aimodel")
        (tmp_path / "assets" / f"{name}.aimodel" / "main.mlirb").write_bytes(content)
    shutil.copytree(toy_asset.path, tmp_path / "assets" / "absent.aimodel")
    (tmp_path / "assets" / "absent.aimodel" / "main.mlirb").unlink()
    process = run_forked("load_damaged(Path('assets'))", directory=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    said = process.stdout.splitlines()
    assert [line.partition(":")[0] for line in said] == [name for name in ("absent", *sorted(damages)) for _ in "12"]
    for read, run in zip(said[::2], said[1::2], strict=True):
        assert "cannot be read" in read
        assert "cannot be loaded on the Core AI runtime" in run
        assert "Build the bundle again." in read
        assert "Build the bundle again." in run


def test_a_full_context_is_said_and_a_reset_empties_it(toy_asset: Compiled) -> None:
    with BACKEND.stepper(toy_asset.path, {"main": toy_asset.model.spec}, capacity=2) as stepper:
        first = stepper.step(1)
        stepper.step(2)
        with pytest.raises(CheckFailed, match="context of 2 positions is full"):
            stepper.step(3)
        stepper.reset()
        assert np.array_equal(stepper.step(1), first)


# ---------------------------------------------------------------------------------------------------------------------
# The toolchain's private functions
# ---------------------------------------------------------------------------------------------------------------------

PRIVATE: dict[str, Sequence[str] | None] = {
    "coreai.authoring.asset:_COREAI_PRODUCER": None,
    "coreai.authoring:AIProgram._save_bytecode": ["self", "path", "minimum_os"],
    "coreai.runtime:_AIModelAsset._create": None,
    "coreai.runtime:_AIModelAsset._program_bytecode_path": None,
    "coreai.runtime:_AIModelAsset._program_hash_path": None,
    "coreai.runtime:_AIModelAsset.update_metadata": None,
    "coreai._compiler.ir:DenseResourceElementsAttr.get_from_buffer": None,
    "coreai._compiler.ir:DenseElementsAttr.get_splat": None,
    "coreai._compiler.dialects:coreai.blockwise_shift_scale": None,
    "coreai._compiler.dialects:coreai.ConstantOp": None,
    "coreai_torch._validate:validate_exported_program": ["ep", "user_lowerings"],
    "coreai_torch.converter:_StagedEntry": [
        "exported_program",
        "input_names",
        "output_names",
        "state_names",
        "entrypoint_name",
        "module",
        "export_fn",
        "externalize_modules",
        "_externalized_exported_programs",
    ],
    "coreai_torch:TorchConverter._handle_placeholder_op": ["self", "node"],
    "coreai_torch:TorchConverter._constant_from_tensor": ["self", "tensor"],
    "coreai_torch.externalize:_ExternalizedExportedProgram": [
        "name",
        "op_name",
        "exported_program",
        "composite_op_name",
        "composite_decl_attrs",
        "composite_input_names",
        "composite_output_names",
        "source_nodes",
    ],
    "coreai_torch.externalize:_PreparedModule": [
        "name",
        "op_name",
        "module_path",
        "module",
        "fake_inputs",
        "dynamic_shapes",
        "composite_op_name",
        "composite_decl_attrs",
        "composite_input_names",
        "composite_output_names",
        "source_nodes",
        "_program_registry",
    ],
    "coreai_torch.externalize:_PreparedModules": ["model", "exported_program"],
    "coreai_torch.externalize:_finalize_module_export": ["prep", "exported_program"],
    "coreai_torch.externalize:_find_marked_submodules": ["model"],
    "coreai_torch.externalize:_EXTERNALIZE_NAMESPACE": None,
    "coreai_torch.externalize:_patch_model_for_externalization": ["model", "targets"],
    "coreai_torch.externalize:_restore_externalized": None,
    "coreai_torch.externalize:_derive_composite_io_names": ["ep"],
}


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_function_of_the_toolchain_is_where_the_backend_expects_it(name: str) -> None:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        assert hasattr(found, part), f"{name} moved: coreai_zoo/backends/ has to follow"
        found = getattr(found, part)
    parameters = PRIVATE[name]
    if parameters is not None:
        assert list(inspect.signature(found).parameters) == list(parameters)


def test_the_list_of_private_functions_is_complete(root: Path) -> None:
    """Whatever the backend imports from the toolchain under a private name is in the list above."""
    import ast

    listed = {name.replace(":", ".") for name in PRIVATE}
    imported = set()
    for path in (root / "coreai_zoo" / "backends" / "coreai").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").startswith("coreai")
                and "zoo" not in node.module
            ):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name.startswith("_")}
    assert imported
    assert {name for name in imported if not any(entry.startswith(name) for entry in listed)} == set()
