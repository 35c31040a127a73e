"""The names under which checkpoints of the overlay are met: each is read as the parameter that it means, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import read_weights, tiny_checkpoint, write_weights
from coreai_zoo.build.design import Design, design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.errors import BadInput
from coreai_zoo.gates.oracle import Oracle
from coreai_zoo.overlay import WeightMap
from coreai_zoo.plugins import default_plugins
from coreai_zoo.weights.names import WRAPPERS, Names
from coreai_zoo_overlays.qwen3_5.weights import PREFIXES
from shared import Shared

TOKENS = [5, 80, 80, 17, 250, 3]
Rename = Callable[[str], str]


def designed(folder: Path) -> Design:
    return design(BuildRequest(checkpoint=folder, dry=True), default_plugins())


@pytest.fixture(scope="module", params=["dense", "moe"])
def plain(request: pytest.FixtureRequest, shared: Shared) -> Path:
    """A checkpoint as transformers saves the causal model: `model.*` and `lm_head.weight`."""
    options: dict[str, Any] = {"wrapped": False, "text_prefix": "model.", "extra_keys": False}
    kind = request.param
    return shared.folder(f"names-{kind}", lambda folder: tiny_checkpoint(folder, kind, **options))


def renamed(plain: Path, folder: Path, rename: Rename, extra: Mapping[str, torch.Tensor] | None = None) -> Path:
    """The same checkpoint with other names, and more tensors."""
    folder.mkdir(exist_ok=True)
    for file in plain.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    write_weights(folder, {rename(key): tensor for key, tensor in read_weights(plain).items()} | dict(extra or {}))
    return folder


def in_front(text: str) -> Rename:
    return lambda key: text + key


def below_model(text: str, head: str = "lm_head.") -> Rename:
    """Names with `text` in the place of `model.`, and `head` in that of `lm_head.`."""
    return lambda key: (
        text + key.removeprefix("model.") if key.startswith("model.") else head + key.removeprefix("lm_head.")
    )


def in_layers(text: str) -> Rename:
    return lambda key: key.replace(".mlp.", f".{text}.mlp.").replace("self_attn.", f"self_attn.{text}.")


# What is in front, by name: how a key is written, and the words of the note; none for the released layout.
SPELLINGS: dict[str, tuple[Rename, str]] = {
    "released": (below_model("model.language_model."), ""),
    "model. missing": (below_model(""), "called * and read as model.*"),
    "model.model.": (below_model("model.model."), "called model.model.*"),
    "model. everywhere": (in_front("model."), "called model.* and read as *"),
    "three deep": (below_model("model.model.language_model."), "called model.model.language_model.*"),
    "language_model.": (below_model("language_model."), "called language_model.* and read as model.*"),
    "language_model.model.": (
        below_model("language_model.model.", "language_model.lm_head."),
        "language_model.model.*",
    ),
    "model.language_model.model.": (
        below_model("model.language_model.model.", "model.language_model.lm_head."),
        "called model.language_model.model.*",
    ),
    "torch.compile": (in_front("_orig_mod."), "called _orig_mod.* and read as *, as torch.compile names them"),
    "torch.compile of layers": (in_layers("_orig_mod"), "as torch.compile names them"),
    "FSDP": (lambda key: in_front("_fsdp_wrapped_module.")(in_layers("_fsdp_wrapped_module")(key)), "as FSDP names"),
    "activation checkpointing": (in_layers("_checkpoint_wrapped_module"), "as activation checkpointing names them"),
    "Lightning Fabric": (in_front("_forward_module."), "as Lightning Fabric names them"),
    "DDP": (in_front("module."), "called module.* and read as *, as DistributedDataParallel or DeepSpeed"),
    "DDP of torch.compile": (in_front("module._orig_mod."), "as torch.compile names them"),
    "torch.compile of DDP": (in_front("_orig_mod.module."), "as DistributedDataParallel or DeepSpeed names them"),
    "PEFT": (in_front("base_model.model."), "called base_model.model.* and read as *, as PEFT, merged names them"),
    "PEFT of the text model": (
        lambda key: f"base_model.model.{below_model('')(key)}",
        "called * and read as model.*",
    ),
    "DDP of PEFT of the released": (
        lambda key: f"module.base_model.model.{below_model('model.language_model.')(key)}",
        "as PEFT, merged names them",
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling_fills_each_parameter_with_the_tensor_that_it_means(
    plain: Path, tmp_path: Path, name: str
) -> None:
    rename, words = SPELLINGS[name]
    expected, found = designed(plain), designed(renamed(plain, tmp_path / "renamed", rename))

    assert expected.notes == ()
    assert (words in "; ".join(found.notes)) if words else found.notes == ()
    for one, other in zip(expected.weights.tensors, found.weights.tensors, strict=True):
        assert one.name == other.name
        for meant, read in zip(one.sources, other.sources, strict=True):
            assert read.key == rename(meant.key)
            rows = meant.stop - meant.start
            values = expected.checkpoint.read_rows(meant.key, 0, rows)
            assert torch.equal(values, found.checkpoint.read_rows(read.key, 0, rows)), one.name


def test_every_prefix_and_every_wrapper_is_tried_above() -> None:
    def found(key: str) -> set[str]:
        notes = [note for spelling in names.spellings(key) for note in spelling.notes]
        return {before for before, _, _ in notes}

    names = Names(WeightMap((), prefixes=PREFIXES))
    keys = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"]
    tried = {note for rename, _ in SPELLINGS.values() for key in keys for note in found(rename(key))}
    assert {prefix.found for prefix in PREFIXES if prefix.written_by is not None} <= tried
    assert {f"{wrapper.name}." for wrapper in WRAPPERS} <= tried


@pytest.mark.parametrize(
    "name", ["DDP of PEFT of the released", "three deep", "torch.compile of layers", "model. missing"]
)
def test_the_oracle_reads_the_same_tensors_under_such_names(plain: Path, tmp_path: Path, name: str) -> None:
    rename, _ = SPELLINGS[name]
    folder = renamed(plain, tmp_path / "renamed", rename)
    made = designed(folder)
    respelled = Oracle(made.checkpoint, made.model.hf_config, respelled=made.weights.respelled).run(TOKENS)
    theirs = Oracle(Checkpoint.open(plain), designed(plain).model.hf_config).run(TOKENS)
    assert np.array_equal(respelled.logits, theirs.logits)


# ---------------------------------------------------------------------------------------------------------------------
# Strangers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        *(f"{front}visual.blocks.0.norm1.weight" for front in ("", "model.", "model.model.", "module.model.")),
        *(f"{front}mtp.layers.0.input_layernorm.weight" for front in ("", "model.", "model.model.", "_orig_mod.")),
        "language_model.mtp.fc.weight",
        "mtp_layers.0.fc.weight",
    ],
)
def test_vision_tower_and_token_prediction_head_are_left_out_wherever_they_are(
    plain: Path, tmp_path: Path, key: str
) -> None:
    made = designed(renamed(plain, tmp_path / "more", lambda name: name, {key: torch.ones(4)}))
    assert [dropped for dropped, _ in made.weights.dropped] == [key]
    assert made.notes == ()


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.language_model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.language_model.rotary_emb.original_inv_freq",
        "rotary_emb.inv_freq",
        "module.model.rotary_emb.inv_freq",
    ],
)
def test_stored_frequencies_are_left_out_with_a_note(plain: Path, tmp_path: Path, key: str) -> None:
    made = designed(renamed(plain, tmp_path / "more", lambda name: name, {key: torch.ones(4)}))
    assert [dropped for dropped, _ in made.weights.dropped] == [key]
    assert "1 tensor left out: rotary embedding: its frequencies follow from the config" in made.notes


def test_a_parameter_under_two_names_is_refused(plain: Path, tmp_path: Path) -> None:
    key = "model.layers.0.input_layernorm.weight"
    twice = {f"module.{key}": read_weights(plain)[key].clone()}
    with pytest.raises(BadInput, match=rf"filled twice: {key} by (module\.)?{key} and (module\.)?{key}"):
        designed(renamed(plain, tmp_path / "twice", lambda name: name, twice))


@pytest.mark.parametrize("front", ["model.text_model.", "policy.", "transformer."])
def test_a_name_that_transformers_would_not_find_is_refused(plain: Path, tmp_path: Path, front: str) -> None:
    with pytest.raises(BadInput, match="unknown to the weight map"):
        designed(renamed(plain, tmp_path / "odd", below_model(front)))
