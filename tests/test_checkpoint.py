"""Reading checkpoints: exact rows of exact tensors, and one clear paragraph for each file that cannot be used."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.folder import INDEX, SINGLE, read_config
from coreai_zoo.checkpoint.headers import read_header
from coreai_zoo.errors import BadInput, EnvironmentLacks


def write_single(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors or {"w": torch.arange(12.0).view(3, 4)}, directory / SINGLE, metadata={"format": "pt"})
    return directory


def write_sharded(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}", encoding="utf-8")
    save_file({"a": torch.ones(2, 2), "b": torch.zeros(3)}, directory / "model-1.safetensors")
    save_file({"c": torch.full((2, 2), 7.0)}, directory / "model-2.safetensors")
    write_index(directory, a="model-1.safetensors", b="model-1.safetensors", c="model-2.safetensors")
    return directory


def write_index(directory: Path, **weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


# ---------------------------------------------------------------------------------------------------------------------
# What works
# ---------------------------------------------------------------------------------------------------------------------


def test_config_and_headers_are_read_without_torch(tmp_path: Path) -> None:
    write_single(tmp_path, model_type="toy")
    code = (
        "import sys; from pathlib import Path; from coreai_zoo.checkpoint.files import Checkpoint;"
        "c = Checkpoint.open(Path(sys.argv[1])); assert c.tensors['w'].shape == (3, 4); c.identity();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_one_file_and_shards_are_both_read(tmp_path: Path) -> None:
    single = Checkpoint.open(write_single(tmp_path / "one", model_type="toy"))
    assert single.config == {"model_type": "toy"} == read_config(tmp_path / "one")
    assert torch.equal(single.read_rows("w", 1, 3), torch.tensor([[4.0, 5, 6, 7], [8, 9, 10, 11]]))
    sharded = Checkpoint.open(write_sharded(tmp_path / "many"))
    assert list(sharded.tensors) == ["a", "b", "c"]
    assert [info.file.name[6] for info in sharded.tensors.values()] == ["1", "1", "2"]
    assert sharded.read_rows("b", 0, 1).shape == (1, 3)
    assert torch.equal(sharded.read_rows("c", 0, 2), torch.full((2, 2), 7.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_values_keep_their_stored_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.randn(4, 6) * 100).to(dtype)
    checkpoint = Checkpoint.open(write_single(tmp_path, {"w": tensor}))
    assert checkpoint.tensors["w"].dtype == str(dtype).removeprefix("torch.")
    rows = checkpoint.read_rows("w", 1, 4)
    assert rows.dtype == dtype and torch.equal(rows, tensor[1:4])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(1, 5), max_size=5), data=st.data())
def test_any_rows_of_any_shape_are_those_of_the_flattened_tensor(
    tmp_path: Path, shape: list[int], data: st.DataObject
) -> None:
    tensor = torch.randn(shape)
    flat = tensor.reshape(-1, shape[-1] if shape else 1)
    if len(shape) == 1:
        flat = tensor.reshape(1, -1)
    write_single(tmp_path, {"before": torch.ones(3), "w": tensor})
    checkpoint = Checkpoint.open(tmp_path)
    info = checkpoint.tensors["w"]
    assert (info.rows, info.columns) == tuple(flat.shape)
    start = data.draw(st.integers(0, info.rows))
    stop = data.draw(st.integers(start, info.rows))
    if start < stop:
        assert torch.equal(checkpoint.read_rows("w", start, stop), flat[start:stop])


def test_rows_outside_of_the_tensor_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_single(tmp_path))
    for start, stop in ((-1, 2), (0, 4), (3, 2)):
        with pytest.raises(IndexError, match="which has 3"):
            checkpoint.read_rows("w", start, stop)


def test_only_the_rows_that_are_asked_for_come_into_memory(tmp_path: Path) -> None:
    write_single(tmp_path, {"w": torch.zeros(64, 1 << 20, dtype=torch.float16)})  # 128 MiB
    code = """
import sys; from pathlib import Path; import torch
from coreai_zoo.checkpoint.files import Checkpoint
def resident():
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1])
checkpoint = Checkpoint.open(Path(sys.argv[1]))
checkpoint.read_rows('w', 0, 1).sum()
before = resident()
checkpoint.read_rows('w', 40, 42).sum()
assert resident() - before < 24 * 1024, resident() - before
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to measure memory")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_identity_is_the_same_twice_and_changes_with_config_header_and_size(tmp_path: Path) -> None:
    identity = Checkpoint.open(write_single(tmp_path / "a")).identity()
    assert json.loads(json.dumps(identity)) == identity == Checkpoint.open(write_single(tmp_path / "b")).identity()
    raw = (tmp_path / "a" / SINGLE).read_bytes()
    header = raw[: 8 + struct.unpack("<Q", raw[:8])[0]]
    assert identity["files"][SINGLE] == {"size": len(raw), "header_sha256": hashlib.sha256(header).hexdigest()}
    assert Checkpoint.open(write_single(tmp_path / "b", model_type="x")).identity() != identity
    assert Checkpoint.open(write_single(tmp_path / "b", {"w": torch.ones(3, 3)})).identity() != identity


def test_links_into_the_blobs_of_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_single(snapshot)
    os.rename(snapshot / SINGLE, blobs / "123")
    (snapshot / SINGLE).symlink_to("../../blobs/123")
    assert Checkpoint.open(snapshot).read_rows("w", 0, 1).tolist() == [[0, 1, 2, 3]]


def test_reading_goes_on_after_the_cached_content_was_given_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_sharded(tmp_path))
    before = {key: checkpoint.read_rows(key, 0, 2).clone() for key in ("a", "c")}
    checkpoint.evict(before)
    for key, rows in before.items():
        assert torch.equal(checkpoint.read_rows(key, 0, 2), rows)


# ---------------------------------------------------------------------------------------------------------------------
# What does not
# ---------------------------------------------------------------------------------------------------------------------


def refuse(directory: Path, *parts: str) -> str:
    """Opening raises one paragraph that names the place and has each of `parts`."""
    with pytest.raises(BadInput) as caught:
        Checkpoint.open(directory).check_index()
    text = str(caught.value)
    assert "\n" not in text and str(directory) in text
    for part in parts:
        assert part in text, text
    return text


def test_a_directory_that_is_missing_or_a_file_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "does not exist")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "is not a directory")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        (b"{", "is not valid JSON"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        (b'{"a": 1, "a": 2}', "names a twice"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    write_single(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    refuse(tmp_path, message, "config.json")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no weights"),
        (["pytorch_model.bin"], "pickles can run code and are never loaded"),
        (["model.pt", "model.gguf"], "pickles can run code and are never loaded"),
        (["model.gguf"], "GGUF weights"),
        (["model-00001-of-00002.safetensors"], f"Download {INDEX} as well"),
    ],
)
def test_a_directory_without_usable_weights_says_what_is_there(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in names:
        (tmp_path / name).write_bytes(b"\x80\x04.")
    refuse(tmp_path, message, *names[:1])


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, a="model-1.safetensors", **{f"k{i}": f"shard-{i}.safetensors" for i in range(30)})
    refuse(tmp_path, "lacks 30 of the 31 files", *(f"shard-{i}.safetensors" for i in range(30)))


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/etc/evil.safetensors", "a/../../evil.safetensors", "", "..\\evil.safetensors", 3, None],
)
def test_an_index_that_leads_outside_is_refused(tmp_path: Path, name: Any) -> None:
    directory = write_sharded(tmp_path / "c")
    save_file({"z": torch.ones(1)}, tmp_path / "evil.safetensors")
    write_index(directory, z=name)
    refuse(directory, "outside of" if isinstance(name, str) and name and "\\" not in name else "not a file name")


def test_a_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    directory = write_sharded(tmp_path / "c")
    os.rename(directory / "model-2.safetensors", tmp_path / "out.safetensors")
    (directory / "model-2.safetensors").symlink_to("../out.safetensors")
    refuse(directory, "model-2.safetensors", "leads outside of")
    single = write_single(tmp_path / "d")
    os.rename(single / SINGLE, tmp_path / "single.safetensors")
    (single / SINGLE).symlink_to(tmp_path / "single.safetensors")
    refuse(single, "leads outside of")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{"])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, content: str) -> None:
    write_sharded(tmp_path)
    (tmp_path / INDEX).write_text(content)
    refuse(tmp_path, INDEX)


def test_an_index_that_names_other_than_safetensors_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "evil.bin").write_bytes(b"")
    write_index(tmp_path, a="evil.bin")
    refuse(tmp_path, "evil.bin", "only .safetensors files are read")


def test_an_index_that_disagrees_with_the_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, a="model-1.safetensors", c="model-2.safetensors", d="model-2.safetensors")
    refuse(tmp_path, "disagree", "d (not in model-2.safetensors)", "b (in model-1.safetensors only)")
    write_index(tmp_path, a="model-2.safetensors", b="model-1.safetensors", c="model-2.safetensors")
    refuse(tmp_path, "a (not in model-2.safetensors)")


def test_a_file_cut_at_any_place_is_refused(tmp_path: Path) -> None:
    write_single(tmp_path)
    whole = (tmp_path / SINGLE).read_bytes()
    for length in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:length])
        refuse(tmp_path, SINGLE, "is truncated" if length else "is empty", "Download it again")


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": F32}, bytes(12), "4 bytes at its end belong to no tensor"),
        ({"w": {**F32, "data_offsets": [4, 12]}}, bytes(12), "starts at byte 4 of the data, expected 0"),
        ({"w": F32, "v": {**F32, "data_offsets": [4, 12]}}, bytes(12), "starts at byte 4 of the data, expected 8"),
        ({"w": F32, "v": F32}, bytes(8), "starts at byte 0 of the data, expected 8"),
        ({"w": {**F32, "shape": [3]}}, bytes(8), "do not fit its shape"),
        ({"w": {**F32, "shape": [-2]}}, bytes(8), "shape that is not a short list of sizes"),
        ({"w": {**F32, "shape": [2.0]}}, bytes(8), "shape that is not a short list of sizes"),
        ({"w": {**F32, "shape": [True, 2]}}, bytes(8), "shape that is not a short list of sizes"),
        ({"w": {**F32, "shape": [2**70, 0]}}, bytes(8), "shape that is not a short list of sizes"),
        ({"w": {**F32, "shape": [1] * 99}}, bytes(8), "shape that is not a short list of sizes"),
        ({"w": {**F32, "shape": [2**62, 2**62]}}, bytes(8), "do not fit its shape"),
        ({"w": {**F32, "data_offsets": [8, 0]}}, bytes(8), "do not fit its shape"),
        ({"w": {**F32, "data_offsets": [0, 2**80]}}, bytes(8), "not two positions"),
        ({"w": {**F32, "data_offsets": [0]}}, bytes(8), "not two positions"),
        ({"w": {**F32, "dtype": "F13"}}, bytes(8), "unknown dtype 'F13'"),
        ({"w": {**F32, "dtype": ["F32"]}}, bytes(8), "unknown dtype"),
        ({"w": {**F32, "more": 1}}, bytes(8), "needs dtype, shape and data_offsets"),
        ({"w": 3}, bytes(8), "needs dtype, shape and data_offsets"),
        ([], b"", "must hold a JSON object"),
        (b"{", b"", "is not valid JSON"),
        (b'{"a": "\xff"}', b"", "is not UTF-8"),
        (b'{"w": 1, "w": 2}', b"", "names w twice"),
        (b"[" * 200_000, b"", "is not valid JSON"),
        ({"__metadata__": {"format": "mlx"}, "w": F32}, bytes(8), "was converted for MLX"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    write_single(tmp_path)
    write_raw(tmp_path / SINGLE, header, data)
    refuse(tmp_path, SINGLE, message)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001])
def test_a_header_of_absurd_size_is_not_read(tmp_path: Path, length: int) -> None:
    write_single(tmp_path)
    write_raw(tmp_path / SINGLE, {"w": F32}, bytes(8), length)
    refuse(tmp_path, "the limit is 100,000,000")


@pytest.mark.parametrize("key", ["l.logit_scale", "l.scale", "l.layer_scales.weight"])
def test_scales_that_models_have_are_not_taken_for_quantization(tmp_path: Path, key: str) -> None:
    assert list(Checkpoint.open(write_single(tmp_path, {key: torch.ones(2)})).tensors) == [key]


@pytest.mark.parametrize("change", [lambda f: os.truncate(f, 100), lambda f: os.utime(f, (1, 1)), Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    checkpoint = Checkpoint.open(write_single(tmp_path))
    checkpoint.read_rows("w", 0, 1)
    change(tmp_path / SINGLE)
    with pytest.raises(EnvironmentLacks, match=r"model\.safetensors .*\n?") as caught:
        checkpoint.read_rows("w", 0, 1)
    assert "run the same command again to go on" in caught.value.hint


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_exactly_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    directory = write_single(tmp_path, {"w": torch.arange(6.0).view(2, 3), "v": torch.ones(4)})
    path = directory / SINGLE
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        header = read_header(path)
        checkpoint = Checkpoint.open(directory)
    except BadInput:
        return
    assert sum(info.rows * info.columns for info in header.tensors.values()) <= len(raw)
    expected = load_file(path)  # whatever we accept, the safetensors library accepts
    for key, info in checkpoint.tensors.items():
        rows = checkpoint.read_rows(key, 0, info.rows)
        assert rows.numpy().tobytes() == expected[key].numpy().tobytes()
