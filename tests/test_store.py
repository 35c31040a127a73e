"""The weight store: right bits, bounded memory, resumption after any interruption, reuse of what is unchanged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import save_file

import forked
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.errors import BadInput
from coreai_zoo.overlay import Part, Transform, WeightMap, WeightRule
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import QuantizationSpec, Recipe
from coreai_zoo.weights import store as store_module
from coreai_zoo.weights.formats import has_zero_points, pack_int4
from coreai_zoo.weights.plan import ParameterInfo, PlannedTensor, WeightPlan, plan_weights
from coreai_zoo.weights.quantizer import CHUNK_ELEMENTS, QUANTIZER_VERSION, quantize_rows
from coreai_zoo.weights.store import JOURNAL, FillReport, Place, WeightStore
from coreai_zoo_overlays.qwen3_5.table import ROLES
from disks import small_disks

INT8 = RECIPES["int8hu"]
# Files of the same sizes as int8hu's, with other bits in them.
ABSMAX = Recipe.by_role("absmax", "", {**INT8.specs, "mlp": INT8.specs["head"], "moe.expert": INT8.specs["head"]})
RULES = (
    WeightRule("norm", "norm", "norm", Transform("1 + weight", lambda weight: weight + 1)),
    WeightRule("decay", "decay", "scalar", Transform("-exp", lambda weight: -weight.exp())),
    WeightRule("l.{n}.w", "l.{n}.w", "mlp"),
    WeightRule("conv", "conv", "gdn.conv", source_shape=lambda shape: (shape[0], 1, shape[1])),
    WeightRule("e.{i}.a", "experts", "moe.expert", part=Part("i", 0, 2)),
    WeightRule("e.{i}.b", "experts", "moe.expert", part=Part("i", 1, 2)),
)
PARAMETERS = {
    "norm": ParameterInfo((64,), "float16"),
    "decay": ParameterInfo((6,), "float32"),
    "l.0.w": ParameterInfo((10, 96), "float16"),
    "l.1.w": ParameterInfo((10, 96), "float16"),
    "conv": ParameterInfo((8, 4), "float16"),
    "experts": ParameterInfo((3, 4, 32), "float16"),
}


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {"norm": (64,), "decay": (6,), "l.0.w": (10, 96), "l.1.w": (10, 96), "conv": (8, 1, 4)}
    shapes |= {f"e.{i}.{p}": (2, 32) for i in range(3) for p in "ab"}
    return {key: (torch.randn(shape) * 0.1).bfloat16() for key, shape in shapes.items()}


def write(directory: Path, tensors: dict[str, torch.Tensor] | None = None) -> Checkpoint:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    save_file(tensors or values(), directory / "model.safetensors")
    return Checkpoint.open(directory)


def plan(checkpoint: Checkpoint, recipe: Recipe = INT8, rules: tuple[WeightRule, ...] = RULES) -> WeightPlan:
    return plan_weights(WeightMap(rules, roles=ROLES), PARAMETERS, checkpoint.tensors, recipe)


def one(checkpoint: Checkpoint, shape: tuple[int, ...], spec: QuantizationSpec | None, dtype: str) -> WeightPlan:
    """A plan for the one tensor `w`."""
    roles = {**RECIPES["fp16"].specs, "mlp": spec}
    parameters = {"w": ParameterInfo(shape, dtype)}
    rules = WeightMap((WeightRule("w", "w", "mlp"),))
    return plan_weights(rules, parameters, checkpoint.tensors, Recipe.by_role("test", "", roles))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != JOURNAL}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return write(tmp_path / "checkpoint")


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path / "store")


# ---------------------------------------------------------------------------------------------------------------------
# What is stored
# ---------------------------------------------------------------------------------------------------------------------


def test_every_kind_of_tensor_comes_back_as_planned(checkpoint: Checkpoint, store: WeightStore) -> None:
    assert store.fill(plan(checkpoint), checkpoint) == FillReport(6, 0, plan(checkpoint).stored_bytes)
    source = values()
    assert torch.equal(torch.from_numpy(store["norm"].array("data")), (source["norm"].float() + 1).half())
    decay = store["decay"].array("data")
    assert str(decay.dtype) == "float32" and torch.equal(torch.from_numpy(decay), -source["decay"].float().exp())
    assert torch.equal(torch.from_numpy(store["conv"].array("data")), source["conv"].half().view(8, 4))
    experts = torch.stack([torch.cat([source[f"e.{i}.a"], source[f"e.{i}.b"]]) for i in range(3)])
    for name, whole in (("l.1.w", source["l.1.w"]), ("experts", experts)):
        stored = store[name]
        spec = stored.format.quantization
        assert spec is not None and stored.format.shape == tuple(whole.shape)
        expected = quantize_rows(whole.half().view(-1, whole.shape[-1]), spec)
        assert torch.equal(torch.from_numpy(stored.array("data")), expected.codes.view(whole.shape))
        assert torch.equal(torch.from_numpy(stored.array("scales")), expected.scales.view(*whole.shape[:-1], -1))
        assert "zero_points" not in stored.format.arrays


@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 96), (96,)])
@pytest.mark.parametrize("block", [32, None])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("integer", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_integers_scales_and_zero_points_are_the_quantizers(
    tmp_path: Path, dtype: str, integer: Any, scheme: Any, block: int | None, shape: tuple[int, ...]
) -> None:
    spec = QuantizationSpec(integer, scheme, block)
    tensor = torch.randn(shape)
    checkpoint, store = write(tmp_path / "c", {"w": tensor}), WeightStore(tmp_path / "s")
    planned = one(checkpoint, shape, spec, dtype)
    assert store.fill(planned, checkpoint).bytes_written == planned.stored_bytes
    expected = quantize_rows(tensor.to(getattr(torch, dtype)).view(-1, 96), spec)
    stored = store["w"]
    codes = expected.codes.view(shape) if spec.bits == 8 else pack_int4(expected.codes)
    assert torch.equal(torch.from_numpy(stored.array("data")), codes)
    assert torch.equal(torch.from_numpy(stored.array("scales")), expected.scales.view(*shape[:-1], -1))
    zero_points = stored.array("zero_points") if "zero_points" in stored.format.arrays else None
    assert (zero_points is not None) == has_zero_points(spec)
    if zero_points is not None and expected.zero_points is not None:
        flat = expected.zero_points.flatten()
        if spec.bits == 4:
            flat = pack_int4(torch.cat((flat, torch.zeros(flat.numel() % 2, dtype=flat.dtype))))
        assert torch.equal(torch.from_numpy(zero_points).flatten(), flat)


@pytest.mark.parametrize("height", [1, 3, 7, 12])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_stack_that_is_read_transposed_is_stored_so_however_its_rows_come(
    tmp_path: Path, height: int, parts: int
) -> None:
    columns = CHUNK_ELEMENTS // 5 // 32 * 32  # five rows are a chunk: some matrices are in several, some chunks in two
    stack = torch.randn(3, height * parts, columns).bfloat16()
    if parts == 1:
        found, rules = {"w": stack}, (WeightRule("w", "w", "mlp", read_transposed=True),)
    else:
        halves = [Part("i", piece, 2) for piece in (0, 1)]
        rules = tuple(WeightRule(f"{{i}}.{p.piece}", "w", "mlp", part=p, read_transposed=True) for p in halves)
        found = {f"{i}.{p.piece}": stack[i].chunk(2)[p.piece].contiguous() for i in range(3) for p in halves}
    checkpoint, store = write(tmp_path / "c", found), WeightStore(tmp_path / "s")
    table, infos = WeightMap(rules), {"w": ParameterInfo(tuple(stack.shape), "float16")}
    store.fill(plan_weights(table, infos, checkpoint.tensors, RECIPES["fp16"]), checkpoint)
    assert torch.equal(torch.from_numpy(store["w"].array("data")), stack.half().transpose(1, 2))
    assert store["w"].format.transposed
    # Integers lie in the order of the weight: they are turned to values before they are read.
    store.fill(plan_weights(table, infos, checkpoint.tensors, RECIPES["int8lin"]), checkpoint)
    assert store["w"].array("data").shape == stack.shape and not store["w"].format.transposed


@pytest.mark.parametrize("spec", [None, QuantizationSpec("uint4", "asymmetric", None)])
def test_a_tensor_of_many_chunks_is_the_same_as_in_one(tmp_path: Path, spec: QuantizationSpec | None) -> None:
    # 3 chunks with an odd number of rows each, so that packed zero points end within a byte.
    columns = CHUNK_ELEMENTS // 5 // 2 * 2
    tensor = torch.randn(13, columns).bfloat16()
    checkpoint, store = write(tmp_path / "c", {"w": tensor}), WeightStore(tmp_path / "s")
    calls: list[int] = []
    store.fill(one(checkpoint, (13, columns), spec, "float16"), checkpoint, lambda _, count: calls.append(count))
    assert calls == [5 * columns, 5 * columns, 3 * columns]
    if spec is None:
        assert torch.equal(torch.from_numpy(store["w"].array("data")), tensor.half())
        return
    expected = quantize_rows(tensor.half(), spec)
    assert torch.equal(torch.from_numpy(store["w"].array("data")), pack_int4(expected.codes))
    assert expected.zero_points is not None
    flat = torch.cat((expected.zero_points.flatten(), torch.zeros(1, dtype=torch.uint8)))
    assert torch.equal(torch.from_numpy(store["w"].array("zero_points")), pack_int4(flat))


def test_memory_maps_can_be_given_to_torch_without_a_warning_or_a_write(
    checkpoint: Checkpoint, store: WeightStore
) -> None:
    store.fill(plan(checkpoint), checkpoint)
    before = contents(store.directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in PARAMETERS:
            torch.from_numpy(store[name].array("data")).zero_()
    assert contents(store.directory) == before


def test_the_journal_tells_every_file_and_its_size(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint), checkpoint)
    arrays = {array.place.path.name: array for name in PARAMETERS for array in store[name].arrays.values()}
    assert {name: array.bytes for name, array in arrays.items()} == {
        name: len(content) for name, content in contents(store.directory).items()
    }


def test_two_stores_hold_the_same_bytes(checkpoint: Checkpoint, store: WeightStore, tmp_path: Path) -> None:
    other = WeightStore(tmp_path / "other")
    for each in (store, other):
        each.fill(plan(checkpoint), checkpoint)
    assert contents(store.directory) == contents(other.directory)


def test_a_tensor_that_is_not_there_is_a_key_error(store: WeightStore) -> None:
    assert "w" not in store
    with pytest.raises(KeyError):
        store["w"]


# ---------------------------------------------------------------------------------------------------------------------
# Reuse
# ---------------------------------------------------------------------------------------------------------------------


def computed(store: WeightStore, planned: WeightPlan, checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors whose files a fill wrote; its report must agree."""
    for path in store.directory.glob("*.data"):
        os.utime(path, ns=(0, 0))
    report = WeightStore(store.directory).fill(planned, checkpoint)
    names = [tensor.name for tensor in planned.tensors if (store.directory / f"{tensor.name}.data").stat().st_mtime_ns]
    assert (report.computed, report.reused) == (len(names), len(planned.tensors) - len(names))
    return names


def test_a_second_fill_computes_nothing_and_reports_all_progress(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint), checkpoint)
    assert computed(store, plan(checkpoint), checkpoint) == []
    seen: dict[str, int] = {}

    def progress(tensor: PlannedTensor, count: int) -> None:
        seen[tensor.name] = seen.get(tensor.name, 0) + count

    assert WeightStore(store.directory).fill(plan(checkpoint), checkpoint, progress).bytes_written == 0
    assert seen == {tensor.name: tensor.parameters for tensor in plan(checkpoint).tensors}


def test_another_recipe_computes_again_what_it_stores_differently(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint), checkpoint)
    assert computed(store, plan(checkpoint, RECIPES["fp16"]), checkpoint) == ["l.0.w", "l.1.w", "experts"]
    assert not (store.directory / "l.0.w.scales").exists()
    assert computed(store, plan(checkpoint), checkpoint) == ["l.0.w", "l.1.w", "experts"]


def test_to_read_a_stack_transposed_computes_exactly_that_tensor(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint, RECIPES["fp16"]), checkpoint)
    rules = tuple(evolve(rule, read_transposed=rule.target == "experts") for rule in RULES)
    assert store.fill(plan(checkpoint, RECIPES["fp16"], rules), checkpoint).computed == 1
    assert store["experts"].array("data").shape == (3, 32, 4)


def test_another_transform_computes_its_tensor_again(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint), checkpoint)
    rules = (WeightRule("norm", "norm", "norm"), *RULES[1:])
    assert computed(store, plan(checkpoint, rules=rules), checkpoint) == ["norm"]


def test_changed_values_are_noticed_although_header_and_size_are_the_same(
    checkpoint: Checkpoint, store: WeightStore
) -> None:
    store.fill(plan(checkpoint), checkpoint)
    changed = values()
    changed["l.1.w"][9, 95] += 1
    changed["e.2.b"][1, 31] += 1
    other = write(checkpoint.directory, changed)
    assert other.identity() == checkpoint.identity()
    assert computed(store, plan(other), other) == ["l.1.w", "experts"]
    assert computed(store, plan(other), other) == []


TARGETS = {key: "experts" if key.startswith("e.") else key for key in values()}


@pytest.mark.parametrize("key", TARGETS)
def test_one_changed_value_computes_exactly_the_tensor_that_it_fills(
    checkpoint: Checkpoint, store: WeightStore, key: str
) -> None:
    store.fill(plan(checkpoint), checkpoint)
    changed = values()
    changed[key].view(-1)[-1] += 1
    other = write(checkpoint.directory, changed)
    assert computed(store, plan(other), other) == [TARGETS[key]]


def test_another_spec_for_one_role_computes_exactly_that_role(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint), checkpoint)
    other = Recipe.by_role("other", "", {**INT8.specs, "moe.expert": INT8.specs["head"]})
    assert computed(store, plan(checkpoint, other), checkpoint) == ["experts"]
    kept = Recipe.by_role("kept", "", {**other.specs, "mlp": None})
    assert computed(store, plan(checkpoint, kept), checkpoint) == ["l.0.w", "l.1.w"]


def test_a_transform_of_another_name_computes_exactly_its_tensor(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint), checkpoint)
    renamed = Transform("-exp, revised", lambda weight: -weight.exp())
    rules = (RULES[0], WeightRule("decay", "decay", "scalar", renamed), *RULES[2:])
    assert computed(store, plan(checkpoint, rules=rules), checkpoint) == ["decay"]


def retold(name: str, apply: Callable[[torch.Tensor], torch.Tensor]) -> tuple[WeightRule, ...]:
    """The rules with other code under the name of a transform."""
    return tuple(
        evolve(rule, transform=Transform(name, apply)) if rule.transform and rule.transform.name == name else rule
        for rule in RULES
    )


@pytest.mark.parametrize(
    "apply",
    [
        lambda weight: -(1.001 * weight).exp(),
        lambda weight: -weight.clamp(max=50).exp(),
        lambda weight: -weight.exp() * (weight != 0),
        lambda weight: torch.cat([-weight[:, :-1].exp(), weight[:, -1:]], dim=1),
    ],
)
def test_a_transform_that_computes_something_else_under_its_name_computes_exactly_its_tensor(
    checkpoint: Checkpoint, store: WeightStore, apply: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    store.fill(plan(checkpoint), checkpoint)
    changed = plan(checkpoint, rules=retold("-exp", apply))
    assert computed(store, changed, checkpoint) == ["decay"]
    expected = apply(values()["decay"].float()[None])[0]
    assert torch.equal(torch.from_numpy(WeightStore(store.directory)["decay"].array("data")), expected)
    assert computed(store, changed, checkpoint) == []


@pytest.mark.parametrize("apply", [lambda weight: weight.exp_().neg_(), lambda weight: weight.exp() * -1.0])
def test_a_transform_that_is_only_written_differently_computes_nothing_again(
    checkpoint: Checkpoint, store: WeightStore, apply: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    store.fill(plan(checkpoint), checkpoint)
    assert computed(store, plan(checkpoint, rules=retold("-exp", apply)), checkpoint) == []


def test_an_interrupted_fill_that_goes_on_with_other_code_keeps_no_value_of_the_old(
    checkpoint: Checkpoint, store: WeightStore, tmp_path: Path
) -> None:
    def interrupt(tensor: PlannedTensor, _count: int) -> None:
        if tensor.name == "l.0.w":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.fill(plan(checkpoint), checkpoint, interrupt)
    assert "norm" in store and "decay" in store
    changed = plan(checkpoint, rules=retold("1 + weight", lambda weight: weight + 2))
    assert "norm" in computed(store, changed, checkpoint)
    anew = WeightStore(tmp_path / "anew")
    anew.fill(changed, checkpoint)
    assert contents(store.directory) == contents(anew.directory)


def test_another_role_with_the_same_spec_computes_nothing(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint), checkpoint)
    rules = tuple(WeightRule("l.{n}.w", "l.{n}.w", "attention") if rule.role == "mlp" else rule for rule in RULES)
    assert computed(store, plan(checkpoint, rules=rules), checkpoint) == []


FILL_SAMPLE = """
import sys
from pathlib import Path
from coreai_zoo.build.design import design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.plugins import Plugins
from coreai_zoo.weights.store import WeightStore
resolved = design(BuildRequest("qwen3.6-27b", sample=True), Plugins.discover())
report = WeightStore(Path(sys.argv[1])).fill(resolved.weights, resolved.checkpoint)
print(sys.modules[type(resolved.modules["main"]).__module__].__file__, report.computed, report.reused)
"""


def test_an_edit_of_an_overlays_code_computes_nothing(tmp_path: Path) -> None:
    """The overlay is copied, then edited in the copy, and each time a process of its own fills the same store."""
    overlays = Path(__file__).parents[1] / "overlays"
    shutil.copytree(overlays, tmp_path / "overlays")

    def fill() -> tuple[str, int, int]:
        path = os.pathsep.join([str(tmp_path / "overlays"), *sys.path])
        command = [sys.executable, "-c", FILL_SAMPLE, str(tmp_path / "store")]
        result = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path
        )
        file, computed, reused = result.stdout.split()
        return file, int(computed), int(reused)

    file, everything, reused = fill()
    assert Path(file).is_relative_to(tmp_path) and everything > 20 and reused == 0
    for source in (tmp_path / "overlays").rglob("*.py"):
        source.write_text(source.read_text() + "\n\nEDITED = True\n")
    assert fill() == (file, 0, everything)


def test_a_checkpoint_that_was_moved_or_touched_is_recognised_by_its_values(
    checkpoint: Checkpoint, store: WeightStore, tmp_path: Path
) -> None:
    store.fill(plan(checkpoint), checkpoint)
    shutil.copytree(checkpoint.directory, tmp_path / "moved")
    moved = Checkpoint.open(tmp_path / "moved")
    assert computed(store, plan(moved), moved) == []


def test_another_version_of_the_quantizer_computes_again_what_is_quantized(
    checkpoint: Checkpoint, store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fill(plan(checkpoint), checkpoint)
    monkeypatch.setattr(store_module, "QUANTIZER_VERSION", QUANTIZER_VERSION + 1)
    assert computed(store, plan(checkpoint), checkpoint) == ["l.0.w", "l.1.w", "experts"]


@pytest.mark.parametrize("file", ["l.0.w.data", "l.0.w.scales"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 5)])
def test_a_missing_or_short_file_is_computed_again(
    checkpoint: Checkpoint, store: WeightStore, file: str, damage: Callable[[Path], None]
) -> None:
    store.fill(plan(checkpoint), checkpoint)
    before = contents(store.directory)
    damage(store.directory / file)
    assert computed(store, plan(checkpoint), checkpoint) == ["l.0.w"]
    assert contents(store.directory) == before


def test_a_forgotten_tensor_is_computed_again(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint), checkpoint)
    store.journal.forget("experts")
    assert "experts" not in WeightStore(store.directory)
    assert computed(store, plan(checkpoint), checkpoint) == ["experts"]


# ---------------------------------------------------------------------------------------------------------------------
# What the plan does not name
# ---------------------------------------------------------------------------------------------------------------------


def without_layers(checkpoint: Checkpoint) -> WeightPlan:
    whole = plan(checkpoint)
    return WeightPlan(tuple(tensor for tensor in whole.tensors if not tensor.name.startswith("l.")), whole.dropped)


def test_tensors_that_the_plan_does_not_name_are_removed(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint), checkpoint)
    before = contents(store.directory)
    (store.directory / "notes.txt").write_text("")
    (store.directory / "never.journalled.data").write_text("left by a crash before its line was written")
    report = WeightStore(store.directory).fill(without_layers(checkpoint), checkpoint)
    assert report == FillReport(0, 4, 0, removed=("l.0.w", "l.1.w"))
    left = contents(store.directory)
    assert left.pop("notes.txt") == b""
    assert left == {name: content for name, content in before.items() if not name.startswith("l.")}
    assert "l.0.w" not in WeightStore(store.directory)
    assert computed(store, plan(checkpoint), checkpoint) == ["l.0.w", "l.1.w"]


def test_tensors_that_are_not_wanted_yet_stay_as_they_are(checkpoint: Checkpoint, store: WeightStore) -> None:
    whole = plan(checkpoint)
    store.fill(whole, checkpoint)
    report = WeightStore(store.directory).fill(whole, checkpoint, arriving=[without_layers(checkpoint).stored])
    assert report == FillReport(0, 4, 0)
    assert computed(store, whole, checkpoint) == []


def test_the_journal_does_not_grow_for_ever(checkpoint: Checkpoint, store: WeightStore) -> None:
    lengths = []
    for turn in range(30):
        assert store.fill(plan(checkpoint, (INT8, ABSMAX)[turn % 2]), checkpoint).reused == (3 if turn else 0)
        lengths.append(len((store.directory / JOURNAL).read_bytes().splitlines()))
    assert max(lengths) <= 100 + 2 * 6 + 6 and lengths != sorted(lengths)
    assert computed(store, plan(checkpoint, ABSMAX), checkpoint) == []


# ---------------------------------------------------------------------------------------------------------------------
# Interruption
# ---------------------------------------------------------------------------------------------------------------------


def test_any_torn_journal_costs_only_the_tensors_whose_lines_are_lost(
    checkpoint: Checkpoint, store: WeightStore
) -> None:
    store.fill(plan(checkpoint), checkpoint)
    whole = (store.directory / JOURNAL).read_bytes()
    ends = [index for index, byte in enumerate(whole, 1) if byte == 10]
    for length in (0, 1, *(end + offset for end in ends for offset in (-30, -1, 0, 1) if end + offset <= len(whole))):
        (store.directory / JOURNAL).write_bytes(whole[:length])
        kept = sum(end <= length for end in ends)
        assert WeightStore(store.directory).fill(plan(checkpoint), checkpoint).reused == kept
        assert WeightStore(store.directory).fill(plan(checkpoint), checkpoint).computed == 0


def test_any_flipped_byte_in_the_journal_costs_at_most_two_tensors(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint), checkpoint)
    whole = (store.directory / JOURNAL).read_bytes()
    before = contents(store.directory)
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        raw = bytearray(whole)
        raw[position] ^= 4
        (store.directory / JOURNAL).write_bytes(raw)
        assert WeightStore(store.directory).fill(plan(checkpoint), checkpoint).computed in (1, 2)
        assert contents(store.directory) == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to know what is synced")
def test_a_line_is_written_when_its_bytes_are_on_disk(
    checkpoint: Checkpoint, store: WeightStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk: dict[str, int] = {}
    vouched: set[str] = set()
    genuine = os.fsync

    def fsync(descriptor: int) -> None:
        genuine(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name != JOURNAL:
            on_disk[path.name] = os.fstat(descriptor).st_size
            return
        for line in path.read_text().splitlines():
            for file in json.loads(line).get("files", {}).values():
                assert on_disk.get(file["path"]) == file["bytes"], file
                vouched.add(file["path"])

    monkeypatch.setattr(os, "fsync", fsync)
    store.fill(plan(checkpoint), checkpoint)
    assert vouched == set(contents(store.directory))


@pytest.mark.parametrize("line", [b"[]", b"null", b"{}", b'{"check":1}', b'["name"]', b"\xff"])
def test_a_line_that_no_zoo_wrote_is_as_good_as_absent(checkpoint: Checkpoint, store: WeightStore, line: bytes) -> None:
    store.fill(plan(checkpoint), checkpoint)
    whole = (store.directory / JOURNAL).read_bytes()
    (store.directory / JOURNAL).write_bytes(line + b"\n" + whole)
    assert WeightStore(store.directory).fill(plan(checkpoint), checkpoint).computed == 0


def test_an_interrupted_fill_leaves_nothing_half_written_and_goes_on(
    checkpoint: Checkpoint, store: WeightStore, tmp_path: Path
) -> None:
    for stop in range(8):
        directory = tmp_path / f"store {stop}"
        left = stop

        def interrupt(_tensor: PlannedTensor, _count: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            WeightStore(directory).fill(plan(checkpoint), checkpoint, interrupt)
        done = sum(1 for name in PARAMETERS if name in WeightStore(directory))
        assert {path.stem for path in directory.iterdir()} <= {*list(PARAMETERS)[:done], "journal"}
        assert done == min(stop, 5)  # `experts` comes in six pieces, the others in one
        assert WeightStore(directory).fill(plan(checkpoint), checkpoint).reused == done


KILLED_FILLS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_store import ABSMAX, INT8, plan
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.weights.store import WeightStore

def fill(store, left):
    # Audit events are raised before files are opened, renamed and removed: each is a place to be killed at.
    def count(event, arguments):
        nonlocal left
        if event in ("open", "os.rename", "os.remove") and store in str(arguments[0]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    checkpoint = Checkpoint.open(Path(sys.argv[2]))
    WeightStore(Path(store)).fill(plan(checkpoint, {"int8hu": INT8, "absmax": ABSMAX}[sys.argv[3]]), checkpoint)

for store in sys.argv[4:]:
    child = os.fork()  # torch is imported and has started no thread yet
    if not child:
        fill(store, int(store.rpartition("-")[2]))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # How many operations there are depends on how many tensors happen to be committed together.
    assert status in (-signal.SIGKILL, 0), (store, status)
"""


def kill_fills(checkpoint: Checkpoint, recipe: str, stores: list[Path]) -> None:
    """Fill each store in a process that kills itself after as many file operations as the store's name says."""
    arguments = (Path(__file__).parent, checkpoint.directory, recipe, *stores)
    done = forked.run(*arguments, KILLED_FILLS, call="forked:execute")
    assert done.returncode == 0, done.stderr


def test_a_killed_fill_goes_on_to_the_same_bytes_wherever_it_was_killed(
    checkpoint: Checkpoint, store: WeightStore, tmp_path: Path
) -> None:
    store.fill(plan(checkpoint), checkpoint)
    expected = contents(store.directory)
    stores = [tmp_path / f"killed-{after}" for after in range(50)]
    kill_fills(checkpoint, "int8hu", stores)
    reused = []
    for directory in stores:
        finished = sum(name in WeightStore(directory) for name in PARAMETERS)
        reused.append(WeightStore(directory).fill(plan(checkpoint), checkpoint).reused)
        assert reused[-1] == finished
        assert contents(directory) == expected
    assert reused[0] == 0 and len(set(reused)) > 2 and reused[-1] == 6


def test_a_killed_fill_with_another_recipe_is_never_taken_for_the_first(
    checkpoint: Checkpoint, store: WeightStore, tmp_path: Path
) -> None:
    store.fill(plan(checkpoint), checkpoint)
    expected = contents(store.directory)
    stores = [tmp_path / f"killed-{after}" for after in range(20)]
    for directory in stores:
        shutil.copytree(store.directory, directory)
    kill_fills(checkpoint, "absmax", stores)
    for directory in stores:
        WeightStore(directory).fill(plan(checkpoint), checkpoint)
        assert contents(directory) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------------------------

GAP = 7  # bytes between two arrays, which nobody may touch


def places_in(file: Path, planned: WeightPlan, first: int = 0) -> dict[str, Place]:
    """A place in one file for each array of a plan but those of `conv`, the last tensor first."""
    places, start = {}, first + GAP
    for tensor in reversed(planned.stored):
        for kind, name in tensor.format.state_names(tensor.name).items():
            if tensor.name != "conv":
                places[name] = Place(file, start)
                start += tensor.format.arrays[kind].bytes + GAP
    file.write_bytes(b"\xaa" * start)
    return places


def arrays_of(store: WeightStore) -> dict[str, bytes]:
    """The bytes of every array, wherever they are."""
    return {
        f"{name}.{kind}": store[name].array(kind).tobytes() for name in PARAMETERS for kind in store[name].format.arrays
    }


@pytest.fixture
def expected(checkpoint: Checkpoint, tmp_path: Path) -> dict[str, bytes]:
    """The bytes of every array in a store of its own."""
    usual = WeightStore(tmp_path / "usual")
    usual.fill(plan(checkpoint), checkpoint)
    assert arrays_of(usual) == contents(usual.directory)
    return arrays_of(usual)


def is_filled(file: Path, places: dict[str, Place], planned: WeightPlan, expected: dict[str, bytes]) -> bool:
    """Whether every array is in its place, and nothing anywhere else."""
    content = bytearray(b"\xaa" * file.stat().st_size)
    for tensor in planned.stored:
        for kind, name in tensor.format.state_names(tensor.name).items():
            if name in places:
                start, array = places[name].offset, expected[f"{tensor.name}.{kind}"]
                content[start : start + len(array)] = array
    return file.read_bytes() == content


def test_arrays_are_written_to_their_places_and_nowhere_else(
    checkpoint: Checkpoint, store: WeightStore, expected: dict[str, bytes], tmp_path: Path
) -> None:
    planned, told = plan(checkpoint), []
    places = places_in(tmp_path / "asset", planned)
    store.fill(planned, checkpoint, places=places, placed=told.extend)
    assert is_filled(tmp_path / "asset", places, planned, expected)
    assert arrays_of(store) == arrays_of(WeightStore(store.directory)) == expected
    assert set(contents(store.directory)) == {"conv.data"}, "what has no place is in a file of the store's own"
    assert sorted(told, key=str) == sorted((a for name in PARAMETERS for a in store[name].arrays.values()), key=str)

    told.clear()
    assert store.fill(planned, checkpoint, places=places, placed=told.extend).computed == 0
    assert len(told) == len(expected), "what is there is told as well"


def test_tensors_are_written_in_the_order_of_their_places(
    checkpoint: Checkpoint, store: WeightStore, tmp_path: Path
) -> None:
    order: list[str] = []
    planned = plan(checkpoint)
    store.fill(
        planned,
        checkpoint,
        lambda tensor, _: order.append(tensor.name),
        places=places_in(tmp_path / "asset", planned),
    )
    assert [*dict.fromkeys(order)] == ["conv", *(name for name in reversed(PARAMETERS) if name != "conv")]


def test_what_is_current_and_elsewhere_is_copied(
    checkpoint: Checkpoint, store: WeightStore, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """From a file of its own to an asset, from there to another, and back again."""
    planned = plan(checkpoint)
    store.fill(planned, checkpoint)
    for turn, first in enumerate((0, 13)):
        file = tmp_path / f"asset {turn}"
        places = places_in(file, planned, first)
        assert WeightStore(store.directory).fill(planned, checkpoint, places=places).computed == 0
        assert is_filled(file, places, planned, expected)
        assert set(contents(store.directory)) == {"conv.data"}, "what was copied is removed"
    (tmp_path / "asset 0").unlink()
    assert WeightStore(store.directory).fill(planned, checkpoint).computed == 0
    assert contents(store.directory) == expected


def test_an_asset_that_is_gone_or_cut_off_is_computed_again_as_far_as_it_has_to_be(
    checkpoint: Checkpoint, store: WeightStore, expected: dict[str, bytes], tmp_path: Path
) -> None:
    planned, file = plan(checkpoint), tmp_path / "asset"
    places = places_in(file, planned)
    store.fill(planned, checkpoint, places=places)
    os.truncate(file, file.stat().st_size - GAP - 1)  # the last array is the first tensor's
    places = {name: Place(tmp_path / "again", place.offset) for name, place in places.items()}
    (tmp_path / "again").write_bytes(b"\xaa" * (file.stat().st_size + GAP + 1))
    report = WeightStore(store.directory).fill(planned, checkpoint, places=places)
    assert (report.computed, report.reused, report.repaired) == (1, 5, (next(iter(PARAMETERS)),))
    assert is_filled(tmp_path / "again", places, planned, expected)
    (tmp_path / "again").unlink()
    assert WeightStore(store.directory).fill(planned, checkpoint).computed == 5


def test_what_was_moved_is_found_until_it_changes(
    checkpoint: Checkpoint, store: WeightStore, expected: dict[str, bytes], tmp_path: Path
) -> None:
    planned, folder = plan(checkpoint), tmp_path / "partial"
    folder.mkdir()
    store.fill(planned, checkpoint, places=places_in(folder / "asset", planned))
    (tmp_path / "kept").mkdir()
    store.hand_over(tmp_path / "kept", (folder, tmp_path / "bundle"))
    folder.rename(tmp_path / "bundle")
    store = WeightStore(tmp_path / "kept")
    assert arrays_of(store) == expected and set(contents(store.directory)) == {"conv.data"}
    begun = WeightStore(tmp_path / "begun")
    begun.directory.mkdir()
    store.hand_over(begun.directory)
    assert arrays_of(begun) == arrays_of(WeightStore(begun.directory)) == expected
    places = places_in(tmp_path / "next", planned)
    before = (store.directory / JOURNAL).read_bytes()
    assert WeightStore(store.directory).fill(planned, checkpoint, places=places).computed == 0

    # Another bundle took the place of that one: as long, and of other values.
    (store.directory / JOURNAL).write_bytes(before)
    content = (tmp_path / "bundle" / "asset").read_bytes()
    (tmp_path / "bundle" / "asset").write_bytes(bytes(len(content)))
    again = WeightStore(store.directory)
    assert again.fill(planned, checkpoint, places=places).computed == 5
    assert arrays_of(again) == expected


def test_a_line_vouches_for_no_bytes_that_are_being_written_anew(
    checkpoint: Checkpoint, store: WeightStore, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Another recipe writes to the very place; it is interrupted, and the first recipe is asked for again."""
    planned, other, file = plan(checkpoint), plan(checkpoint, ABSMAX), tmp_path / "asset"
    places = places_in(file, planned)
    store.fill(planned, checkpoint, places=places)

    def interrupt(tensor: PlannedTensor, _count: int) -> None:
        if tensor.name == "experts":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WeightStore(store.directory).fill(other, checkpoint, interrupt, places=places)
    assert "experts" not in WeightStore(store.directory)
    assert WeightStore(store.directory).fill(planned, checkpoint, places=places).computed >= 1
    assert is_filled(file, places, planned, expected)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be stored
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [None, QuantizationSpec("int8", "symmetric", 32)])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"holds nan in w at row 8, column 40\. Download it again"),
        (float("-inf"), r"holds -inf in w at row 8, column 40\. Download it again"),
        (70000.0, r"value 70144 of w at row 8, column 40 overflows float16, whose largest value is 65504"),
    ],
)
def test_a_value_that_is_not_finite_is_refused_by_place(
    tmp_path: Path, spec: QuantizationSpec | None, value: float, message: str
) -> None:
    tensor = torch.ones(11, 64, dtype=torch.bfloat16)
    tensor[8, 40] = value
    checkpoint, store = write(tmp_path / "c", {"w": tensor}), WeightStore(tmp_path / "s")
    with pytest.raises(BadInput, match=message):
        store.fill(one(checkpoint, (11, 64), spec, "float16"), checkpoint)
    assert "w" not in store and contents(store.directory) == {}


def test_a_row_is_counted_from_the_start_of_its_tensor_and_not_of_its_chunk(tmp_path: Path) -> None:
    tensor = torch.ones(7, CHUNK_ELEMENTS // 2, dtype=torch.float16)
    tensor[5, 3] = float("inf")
    checkpoint = write(tmp_path / "c", {"w": tensor})
    with pytest.raises(BadInput, match="row 5, column 3"):
        WeightStore(tmp_path / "s").fill(one(checkpoint, tuple(tensor.shape), None, "float16"), checkpoint)


def test_a_transform_that_leaves_the_finite_numbers_is_named(tmp_path: Path, store: WeightStore) -> None:
    changed = values() | {"decay": torch.tensor([0.0, 0, 0, 0, 0, 1000.0])}
    checkpoint = write(tmp_path / "checkpoint", changed)
    with pytest.raises(BadInput, match=r"transform '-exp' turns 1000\.0 of decay at row 0, column 5 into -inf"):
        store.fill(plan(checkpoint), checkpoint)


def test_a_range_that_overflows_is_refused(tmp_path: Path, store: WeightStore) -> None:
    checkpoint = write(tmp_path / "c", {"w": torch.tensor([[-60000.0, 60000.0] * 16])})
    with pytest.raises(BadInput, match="both signs in one block whose distance overflows float16"):
        store.fill(one(checkpoint, (1, 32), QuantizationSpec("int8", "asymmetric", 32), "float16"), checkpoint)


@pytest.mark.parametrize("name", ["../w", "a/w", ".w", "w" * 300])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, store: WeightStore, name: str) -> None:
    checkpoint = write(tmp_path / "c", {"w": torch.ones(2, 4)})
    weights = WeightMap((WeightRule("w", name, "mlp"),))
    planned = plan_weights(weights, {name: ParameterInfo((2, 4), "float16")}, checkpoint.tensors, RECIPES["fp16"])
    with pytest.raises(BadInput, match="cannot be a file name"):
        store.fill(planned, checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "store"]


def test_a_store_where_no_directory_can_be_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises((FileExistsError, NotADirectoryError), match=re.escape(str(place))):
            WeightStore(place).fill(plan(checkpoint), checkpoint)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_store_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(PermissionError):
        WeightStore(tmp_path / "locked").fill(plan(checkpoint), checkpoint)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    with small_disks(tmp_path / "disk") as make:
        yield make("64k")


def test_finished_tensors_are_kept_when_the_disk_is_full(small_disk: Path, tmp_path: Path) -> None:
    check_no_space(small_disk, tmp_path, limit="")


def test_finished_tensors_are_kept_at_a_limit_on_file_sizes(tmp_path: Path) -> None:
    check_no_space(tmp_path / "store", tmp_path, limit="resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000));")


NO_SPACE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_store import *
{limit}
checkpoint = Checkpoint.open(Path(sys.argv[1]))
try:
    planned = two(checkpoint)
    # The second one is begun when the first is on the disk.
    WeightStore(Path(sys.argv[2])).fill(planned, checkpoint, arriving=[[tensor] for tensor in planned.stored])
except Exception as error:
    print(type(error).__name__, error)
"""


def two(checkpoint: Checkpoint) -> WeightPlan:
    """A plan for a small tensor and a large one."""
    rules = WeightMap((WeightRule("{n}", "w.{n}", "mlp"),))
    parameters = {f"w.{n}": ParameterInfo(tuple(checkpoint.tensors[str(n)].shape), "float16") for n in (0, 1)}
    return plan_weights(rules, parameters, checkpoint.tensors, RECIPES["fp16"])


def check_no_space(directory: Path, tmp_path: Path, limit: str) -> None:
    checkpoint = write(tmp_path / "c", {"0": torch.ones(10, 100), "1": torch.ones(1000, 100)})
    code = NO_SPACE.format(limit=limit)
    command = [sys.executable, "-c", code, str(checkpoint.directory), str(directory), str(Path(__file__).parent)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.match(r"OSError \[Errno \d+\] (No space left on device|File too large)", said), said
    assert sorted(path.name for path in directory.iterdir()) == [JOURNAL, "w.0.data"]
    if not limit:
        return
    assert WeightStore(directory).fill(two(checkpoint), checkpoint).reused == 1


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

MEASURED_FILL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_store import *
checkpoint = Checkpoint.open(Path(sys.argv[1]))
spec = QuantizationSpec("int8", "symmetric", 32)
peak = 0
def measure(_tensor, _count):
    global peak
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    peak = max(peak, int(line.split()[1]))
planned = one(checkpoint, checkpoint.tensors["w"].shape, spec, "float16")
WeightStore(Path(sys.argv[2])).fill(planned, checkpoint, measure)
print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_anonymous_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    peaks = []
    for rows in (4096, 65536):  # 16 and 256 MiB in float16
        checkpoint = write(tmp_path / f"c{rows}", {"w": torch.ones(rows, 2048, dtype=torch.float16)})
        command = [sys.executable, "-c", MEASURED_FILL, str(checkpoint.directory), str(tmp_path / f"s{rows}")]
        output = subprocess.run([*command, str(Path(__file__).parent)], check=True, capture_output=True, text=True)
        peaks.append(int(output.stdout))
    assert peaks[1] < peaks[0] + 16 * 1024  # KiB


def test_every_journal_line_is_a_json_object_of_its_own(checkpoint: Checkpoint, store: WeightStore) -> None:
    store.fill(plan(checkpoint), checkpoint)
    lines = [json.loads(line) for line in (store.directory / JOURNAL).read_text().splitlines()]
    assert [line["name"] for line in lines] == list(PARAMETERS)
