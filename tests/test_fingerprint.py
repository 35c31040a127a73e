"""Whether a weight store notices everything that a stored tensor depends on, each thing by itself.

A store outlives the process that filled it. Each change below gives other bytes. With the fingerprint as it is, the
tensor is computed again and is what an empty store would hold; with the ingredients that know of the change left out,
the old bytes are taken for the new. So every ingredient is needed, and these tests would see it go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path

import pytest
import torch
from attrs import evolve, frozen
from safetensors.torch import save_file

from coreai_zoo.build.design import design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.overlay import Transform
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.weights import convert, quantizer
from coreai_zoo.weights import store as store_module
from coreai_zoo.weights.convert import effect_digest, storage_digest
from coreai_zoo.weights.plan import PlannedTensor, Source, WeightPlan
from coreai_zoo.weights.quantizer import QuantizedRows
from coreai_zoo.weights.store import JOURNAL, WeightStore

INT8 = QuantizationSpec("int8", "symmetric_with_clipping", 32)
CODE_OF_VALUES = store_module.code_of_values  # which some changes replace
PLUS_ONE = Transform("1 + weight", lambda weight: weight + 1)


def write(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    """A checkpoint of two tensors; in another dtype the same bytes, which are other values."""
    directory.mkdir(exist_ok=True)
    torch.manual_seed(3)
    tensors = {key: torch.randn(8, 64).bfloat16().view(torch.int16).view(dtype) for key in ("a", "b")}
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint.open(directory)


@frozen
class Job:
    """One tensor to store, and the checkpoint that it comes from."""

    checkpoint: Checkpoint
    tensor: PlannedTensor

    def fill(self, store: WeightStore) -> int:
        """Fill a store by it; how many tensors were computed."""
        return store.fill(WeightPlan((self.tensor,), ()), self.checkpoint).computed


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    another_process()
    tensor = PlannedTensor("w", "mlp", (4, 64), "float16", INT8, PLUS_ONE, (Source("a", 0, 4),))
    yield Job(write(tmp_path / "checkpoint"), tensor)
    another_process()


def another_process() -> None:
    """What a process computes once, it computes anew where another one fills the store."""
    for remembered in (effect_digest, storage_digest, CODE_OF_VALUES):
        remembered.cache_clear()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != JOURNAL}


# ---------------------------------------------------------------------------------------------------------------------
# The changes
# ---------------------------------------------------------------------------------------------------------------------


def planned(**changes: object) -> Callable[[pytest.MonkeyPatch, Job], Job]:
    return lambda _patch, job: evolve(job, tensor=evolve(job.tensor, **changes))


def another_reading(patch: pytest.MonkeyPatch, job: Job) -> Job:
    return evolve(job, checkpoint=write(job.checkpoint.directory, torch.float16))


def one_step_up(rows: torch.Tensor, spec: QuantizationSpec, dtype: torch.dtype | None = None) -> QuantizedRows:
    """A quantizer whose mistake no fixed row shows: it needs more rows than there are."""
    made = quantizer.quantize_rows(rows, spec, dtype)
    return evolve(made, codes=made.codes.roll(1, 0)) if len(rows) > 1 else made


def known_only_by(where: object, name: str, value: object) -> Callable[[pytest.MonkeyPatch, Job], Job]:
    """Another quantizer that shows in nothing but a version or a digest."""

    def change(patch: pytest.MonkeyPatch, job: Job) -> Job:
        patch.setattr(convert, "quantize_rows", one_step_up)
        patch.setattr(where, name, value)
        return job

    return change


def finer_scales(patch: pytest.MonkeyPatch, job: Job) -> Job:
    """The quantizer's arithmetic, changed where its file is not: in what it calls."""
    before = quantizer._symmetric_scales
    patch.setattr(quantizer, "_symmetric_scales", lambda *given: before(*given) * 0.5)
    return job


def plus_two(_patch: pytest.MonkeyPatch, job: Job) -> Job:
    """Other code under the name of the transform: what a fault of a release was."""
    return evolve(job, tensor=evolve(job.tensor, transform=Transform(PLUS_ONE.name, lambda weight: weight + 2)))


Change = Callable[[pytest.MonkeyPatch, Job], Job]
CHANGES: Mapping[str, tuple[Change, frozenset[str]]] = {
    "code, by its source": (known_only_by(store_module, "code_of_values", lambda: "other"), frozenset({"code"})),
    "another torch": (known_only_by(store_module.distributions, "version", lambda _: "9.9"), frozenset({"torch"})),
    "a version of the quantizer": (known_only_by(store_module, "QUANTIZER_VERSION", 99), frozenset({"quantizer"})),
    "the quantizer's arithmetic": (finer_scales, frozenset({"storing"})),
    "the transform's code": (plus_two, frozenset({"transform"})),
    "no transform": (planned(transform=None), frozenset({"transform"})),
    "the dtype": (planned(dtype="bfloat16"), frozenset({"format", "storing"})),
    "the scheme": (
        planned(quantization=QuantizationSpec("int8", "symmetric", 32)),
        frozenset({"format", "storing"}),
    ),
    "the block": (
        planned(quantization=QuantizationSpec("int8", "symmetric_with_clipping", 16)),
        frozenset({"format", "storing"}),
    ),
    "the key": (planned(sources=(Source("b", 0, 4),)), frozenset({"keys"})),
    "the rows": (planned(shape=(8, 64), sources=(Source("a", 0, 8),)), frozenset({"rows", "format"})),
    "the dtype of the source": (another_reading, frozenset({"source dtypes"})),
}


@pytest.mark.parametrize(("change", "known_to"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_anything_that_makes_the_bytes_is_noticed_and_would_not_be_without_its_ingredients(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, known_to: frozenset[str]
) -> None:
    store, blind, anew = (WeightStore(tmp_path / name) for name in ("store", "blind", "anew"))
    complete = store_module.ingredients

    def incomplete(planned: PlannedTensor, checkpoint: Checkpoint) -> dict[str, object]:
        found = complete(planned, checkpoint)
        assert known_to <= set(found)
        return {name: value for name, value in found.items() if name not in known_to}

    assert job.fill(store) == 1
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "ingredients", incomplete)
        assert job.fill(blind) == 1
    old = contents(store.directory)

    changed = change(monkeypatch, job)
    another_process()

    assert changed.fill(store) == 1
    assert changed.fill(anew) == 1
    assert contents(store.directory) == contents(anew.directory) != old
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "ingredients", incomplete)
        assert changed.fill(blind) == 0, "it was noticed without the ingredients that are said to notice it"
    assert contents(blind.directory) == old, "what the store would have passed on"


def test_every_ingredient_has_a_change_that_only_it_or_a_second_one_notices(job: Job) -> None:
    noticed = set().union(*(known_to for _, known_to in CHANGES.values()))
    elsewhere = {"source shapes"}  # the next test
    assert noticed | elsewhere == set(store_module.ingredients(job.tensor, job.checkpoint))


def test_a_source_of_another_shape_is_noticed(job: Job, tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "store")
    assert job.fill(store) == 1
    stored = {key: job.checkpoint.read_rows(key, 0, 8).clone().view(2, 4, 64) for key in ("a", "b")}
    save_file(stored, job.checkpoint.directory / "model.safetensors")
    assert Job(Checkpoint.open(job.checkpoint.directory), job.tensor).fill(store) == 1


@pytest.mark.parametrize("edited", store_module._CODE)
def test_an_edit_of_any_module_that_makes_values_is_another_code(
    edited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    before = store_module.ingredients(job.tensor, job.checkpoint)["code"]
    module = import_module(edited)
    copy = tmp_path / "edited.py"
    copy.write_text(Path(str(module.__file__)).read_text(encoding="utf-8") + "# more\n", encoding="utf-8")
    monkeypatch.setattr(module.__spec__, "origin", str(copy))
    another_process()
    assert store_module.ingredients(job.tensor, job.checkpoint)["code"] != before


@pytest.mark.parametrize(
    "spec", [None, *(QuantizationSpec(d, s, 16) for d in ("int4", "uint8") for s in ("symmetric", "asymmetric"))]
)
def test_what_storing_makes_of_fixed_values_differs_with_everything_that_it_is_told(
    spec: QuantizationSpec | None,
) -> None:
    others = [None, INT8, *(QuantizationSpec("int8", "symmetric", size) for size in (16, 32))]
    digests = [
        storage_digest(64, dtype, each) for each in (spec, *others[spec is None :]) for dtype in ("float16", "bfloat16")
    ]
    assert len({*digests, storage_digest(32, "float16", spec)}) == len(digests) + 1


# ---------------------------------------------------------------------------------------------------------------------
# The fault that was
# ---------------------------------------------------------------------------------------------------------------------


def test_a_store_of_a_sample_does_not_keep_the_norms_of_another_transform(tmp_path: Path) -> None:
    """Fill, change what adds one to a gain, fill again: exactly those are computed, and none is the old one."""
    designed = design(BuildRequest("qwen3.6-27b", sample=True, dry=True), default_plugins())
    plan, checkpoint = designed.weights, designed.checkpoint
    gains = [tensor.name for tensor in plan.stored if tensor.transform and "1 +" in tensor.transform.name]
    changed = evolve(plan, tensors=tuple(_with_another_gain(tensor) for tensor in plan.tensors))
    store, anew = WeightStore(tmp_path / "store"), WeightStore(tmp_path / "anew")

    assert store.fill(plan, checkpoint).computed == len(plan.stored)
    old = contents(store.directory)
    again = store.fill(changed, checkpoint)

    assert (again.computed, again.reused) == (len(gains), len(plan.stored) - len(gains)) and len(gains) > 10
    anew.fill(changed, checkpoint)
    assert contents(store.directory) == contents(anew.directory)
    assert {name.removesuffix(".data") for name, data in contents(store.directory).items() if old[name] != data} == {
        *gains
    }


def _with_another_gain(tensor: PlannedTensor) -> PlannedTensor:
    if tensor.transform is None or "1 +" not in tensor.transform.name:
        return tensor
    return evolve(tensor, transform=evolve(tensor.transform, apply=lambda weight: weight + 2))
