"""Which files are the weights, what an index says of them, and what of that matters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import write_json
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.folder import INDEX, SINGLE
from coreai_zoo.checkpoint.hub import HubSource, Repository
from coreai_zoo.errors import BadInput
from coreai_zoo.progress import Reporter
from hub import Hub

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MODEL = {"a": torch.arange(8.0).view(2, 4), "b": torch.ones(3)}
EXTRA = {"extra.a": torch.ones(2), "extra.b": torch.zeros(2)}


def write(folder: Path, index: dict[str, str] | None = None, /, **files: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of `files`, by their names without `.safetensors`, with an index of what is given."""
    write_json(folder / "config.json", {})
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    if index is not None:
        write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": index})
    return folder


def opened(folder: Path) -> tuple[Checkpoint, str]:
    """The checkpoint, and all its notes; `extra.*` is left out of a bundle."""
    checkpoint = Checkpoint.open(folder)
    return checkpoint, "; ".join((*checkpoint.notes, *checkpoint.check_index(lambda key: key.startswith("extra."))))


def refusal(folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        opened(folder)
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Which files
# ---------------------------------------------------------------------------------------------------------------------


def test_an_index_of_a_single_file_and_of_another_reads_both(tmp_path: Path) -> None:
    index = {**dict.fromkeys(MODEL, SINGLE), **dict.fromkeys(EXTRA, "extra.safetensors")}
    checkpoint, notes = opened(write(tmp_path, index, model=MODEL, extra=EXTRA))
    assert list(checkpoint.tensors) == ["a", "b", "extra.a", "extra.b"]
    assert notes == ""


def test_a_single_file_goes_before_an_index_of_other_files_as_in_transformers(tmp_path: Path) -> None:
    shards = {ONE.removesuffix(".safetensors"): {"a": MODEL["a"]}, TWO.removesuffix(".safetensors"): {"b": MODEL["b"]}}
    checkpoint, notes = opened(write(tmp_path, {"a": ONE, "b": TWO}, model={"a": MODEL["a"] + 1}, **shards))
    assert checkpoint.read_rows("a", 0, 1).tolist() == [[1, 2, 3, 4]]
    assert list(checkpoint.tensors) == ["a"]
    assert f"{SINGLE} is read, as transformers does, and {INDEX} is not" in notes
    assert f"not read: {ONE}, {TWO}" in notes


@pytest.mark.parametrize(("named", "fetched"), [(ONE, [SINGLE]), (SINGLE, [SINGLE])])
def test_of_a_repository_the_same_files_are_fetched(hub: Hub, named: str, fetched: list[str]) -> None:
    index = json.dumps({"weight_map": {"a": named}}).encode()
    files = {"config.json": b"{}", INDEX: index, SINGLE: b"x" * 64, ONE: b"y" * 64}
    hub.add("toys/Both", files)
    source = HubSource.open(Repository("toys/Both"), Reporter(silent=True))
    assert [file.name for file in source.weights] == fetched


@pytest.mark.parametrize("beside", ["model-mtp", "model.fp16", "consolidated"])
def test_a_file_that_nothing_names_is_not_read_and_that_is_noted(tmp_path: Path, beside: str) -> None:
    checkpoint, notes = opened(write(tmp_path, model=MODEL, **{beside: {"a": torch.zeros(2, 4), "z": torch.ones(1)}}))
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.read_rows("b", 0, 1).tolist() == [[1, 1, 1]]
    assert f"not read: {beside}.safetensors; {SINGLE} is the whole model" in notes


@pytest.mark.parametrize("names", [[ONE, TWO], ["model.fp16.safetensors"], ["consolidated.safetensors"]])
def test_files_of_other_names_without_an_index_are_refused_and_named(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, **{name.removesuffix(".safetensors"): MODEL for name in names})
    text = refusal(tmp_path)
    assert f"has {', '.join(names)} but neither {SINGLE} nor {INDEX}" in text
    assert ("or rename" in text) == (len(names) == 1)


def test_an_index_may_name_files_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    write(tmp_path, dict.fromkeys(MODEL, "weights/one.safetensors"))
    save_file(MODEL, tmp_path / "weights" / "one.safetensors")
    checkpoint, notes = opened(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b"] and notes == ""
    assert list(checkpoint.identity()["files"]) == ["weights/one.safetensors"]


@pytest.mark.skipif(os.path.normcase("A") != "A", reason="this file system does not tell case apart")
def test_a_file_whose_name_differs_in_case_is_named(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, {"a": "one.safetensors", "b": "Two.safetensors"}, one={"a": MODEL["a"]}, two=MODEL))
    assert "lacks 1 of the 2 files" in text
    assert "two.safetensors is not Two.safetensors. Rename them." in text


# ---------------------------------------------------------------------------------------------------------------------
# What index and files disagree about
# ---------------------------------------------------------------------------------------------------------------------


def test_an_index_of_tensors_that_are_left_out_and_nowhere_is_noted(tmp_path: Path) -> None:
    _, notes = opened(write(tmp_path, {"a": ONE, "b": ONE, "extra.a": ONE}, **{ONE[:-12]: MODEL}))
    assert f"{INDEX} names 1 tensor that the files lack, all of a part that is left out: extra.a" in notes


def test_a_file_of_nothing_but_what_is_left_out_may_be_missing(tmp_path: Path) -> None:
    _, notes = opened(write(tmp_path, {"a": ONE, "b": ONE, "extra.a": TWO}, **{ONE[:-12]: MODEL}))
    assert "names 1 tensor that the files lack" in notes


def test_tensors_that_are_left_out_and_that_no_index_names_are_noted(tmp_path: Path) -> None:
    _, notes = opened(write(tmp_path, {"a": ONE, "b": ONE}, **{ONE[:-12]: MODEL | EXTRA}))
    assert f"{INDEX} lacks 2 tensors that the files have, all of a part that is left out: extra.a, extra.b" in notes


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"a": ONE, "b": ONE, "c": ONE, "extra.a": ONE}, f"the shards disagree: c (not in {ONE})."),
        ({"a": ONE, "extra.a": ONE}, f"the shards disagree: b (in {ONE} only)."),
        ({"a": ONE, "b": ONE, "c": TWO, "extra.a": TWO}, f"lacks 1 of the 2 files that {INDEX} names: {TWO}."),
    ],
    ids=["listed and absent", "there and not listed", "its file is missing"],
)
def test_a_tensor_that_matters_is_still_an_error(tmp_path: Path, index: dict[str, str], words: str) -> None:
    text = refusal(write(tmp_path, index, **{ONE[:-12]: MODEL}))
    assert words in text
    assert "extra" not in text


# ---------------------------------------------------------------------------------------------------------------------
# One tensor in two files
# ---------------------------------------------------------------------------------------------------------------------


def twice(folder: Path, change: Callable[[torch.Tensor], torch.Tensor], key: str = "a") -> Path:
    files = {ONE[:-12]: MODEL | {key: torch.ones(5, 7)}, TWO[:-12]: {key: change(torch.ones(5, 7)), "c": torch.ones(1)}}
    return write(folder, {**dict.fromkeys([*MODEL, key], ONE), "c": TWO}, **files)


def test_a_tensor_with_the_same_bytes_in_two_files_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coreai_zoo.checkpoint.index._CHUNK", 16)
    checkpoint, notes = opened(twice(tmp_path, lambda tensor: tensor))
    assert f"1 tensor is in more than one file, with the same values ({ONE}, {TWO}): a" in notes
    assert checkpoint.read_rows("a", 0, 5).sum() == 35


def last_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor[-1, -1] += 2**-20
    return tensor


@pytest.mark.parametrize("change", [last_bit, torch.t, torch.Tensor.double], ids=["one value", "shape", "dtype"])
def test_a_tensor_that_differs_in_two_files_is_refused_with_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    monkeypatch.setattr("coreai_zoo.checkpoint.index._CHUNK", 16)
    text = refusal(twice(tmp_path, lambda tensor: change(tensor).contiguous()))
    assert f"holds a twice, with different values: in {ONE} and in {TWO}." in text


def test_what_is_left_out_may_differ_in_two_files(tmp_path: Path) -> None:
    checkpoint, notes = opened(twice(tmp_path, last_bit, key="extra.a"))
    assert "extra.a" in checkpoint.tensors and "different values" not in notes


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not there, although they are
# ---------------------------------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.mark.parametrize("name", [ONE, TWO])
def test_an_empty_file_is_named_and_to_be_fetched_again(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"a": ONE, "b": TWO}, **{ONE[:-12]: {"a": MODEL["a"]}, TWO[:-12]: {"b": MODEL["b"]}})
    (tmp_path / name).write_bytes(b"")
    assert refusal(tmp_path) == f"{tmp_path / name} is empty. Download it again."


@pytest.mark.parametrize("name", [ONE, "config.json", INDEX])
def test_a_git_lfs_pointer_is_said_to_be_one(tmp_path: Path, name: str) -> None:
    write(tmp_path, dict.fromkeys(MODEL, ONE), **{ONE[:-12]: MODEL})
    (tmp_path / name).write_text(POINTER)
    text = refusal(tmp_path)
    assert text.startswith(f"{tmp_path / name} is a Git-LFS pointer")
    assert f"`git lfs pull` in {tmp_path}" in text


# ---------------------------------------------------------------------------------------------------------------------
# Names of files
# ---------------------------------------------------------------------------------------------------------------------


def test_a_name_may_begin_in_the_folder_itself(tmp_path: Path) -> None:
    files = {ONE.removesuffix(".safetensors"): {"a": MODEL["a"]}, TWO.removesuffix(".safetensors"): {"b": MODEL["b"]}}
    checkpoint, notes = opened(write(tmp_path, {"a": f"./{ONE}", "b": TWO}, **files))
    assert (list(checkpoint.tensors), notes) == (["a", "b"], "")


@pytest.mark.parametrize("name", ["loop.safetensors", "x" * 300 + ".safetensors", "folder.safetensors", "/ABSOLUTE"])
def test_a_name_that_leads_to_no_file_is_refused_in_words(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    name = name.replace("/ABSOLUTE", str(tmp_path / ONE))
    text = refusal(write(tmp_path, {"a": name, "b": ONE}, **{ONE.removesuffix(".safetensors"): MODEL}))
    assert any(words in text for words in ("lead in a circle", "File name too long", "is a folder", "from the root"))
