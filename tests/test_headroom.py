"""The largest values of the oracle: that they are seen where they are, at no change of a result, and what is said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from checkpoints import enlarge_stream, tiny_checkpoint
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.folder import read_config
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.gate import Activations
from coreai_zoo.gates.headroom import LARGEST_HALF, Headroom, headroom, headroom_record
from coreai_zoo.gates.oracle import Oracle
from coreai_zoo.gates.peaks import Peaks, only_updates_caches
from coreai_zoo.gates.stress import prompt_of, stress_samples, write_checkpoint
from coreai_zoo.plugins import default_plugins
from mutants import BOTH
from test_oracle import ACME, TOKENS, gained  # noqa: F401  # pytest finds the fixture by its name here

ENTRIES = {"dense": "qwen3.6-27b", "moe": "qwen3.6-35b-a3b"}


def run(directory: Path, tokens: list[int] = TOKENS, **options: Any) -> Activations:
    return Oracle(Checkpoint.open(directory), read_config(directory), **options).run(tokens)


def peaks_of(directory: Path, tokens: list[int] = TOKENS, **options: Any) -> dict[str, float]:
    found = run(directory, tokens, **options).peaks
    assert found is not None
    return dict(found)


# ---------------------------------------------------------------------------------------------------------------------
# What is seen
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_every_place_has_the_largest_value_that_the_whole_model_has_there(kind: str, tmp_path: Path) -> None:
    """Against from_pretrained with its own cache, hidden states and module outputs."""
    directory = tiny_checkpoint(tmp_path, kind, num_hidden_layers=4)
    found = peaks_of(directory)
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    expected, inputs = {}, {}

    def saw(place: str) -> Any:
        def look(_module: object, _arguments: object, output: Any) -> None:
            expected[place] = output[0] if isinstance(output, tuple) else output

        return look

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(saw(f"model.layers.{index}: residual stream"))
        for part in ("self_attn", "linear_attn", "mlp"):
            if hasattr(layer, part):
                getattr(layer, part).register_forward_hook(saw(f"model.layers.{index}.{part}"))
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.in_proj_qkv.register_forward_hook(saw(f"{index}"))
    with torch.inference_mode():
        outputs = model(input_ids=torch.tensor([TOKENS]), use_cache=True, output_hidden_states=True)
    expected["embedding"] = outputs.hidden_states[0]
    for index, kept in enumerate(outputs.cache.layers):
        place = f"model.layers.{index}"
        if str(index) in expected:  # its convolution is fed this at every position, and keeps the last few of them
            inputs[index] = expected.pop(str(index))
            expected[f"{place}: convolution state"] = inputs[index]
            assert kept.conv_states[0].abs().max() <= inputs[index].abs().max()
            expected[f"{place}: recurrent state"] = kept.recurrent_states[0]
        else:
            expected |= {f"{place}: keys": kept.keys, f"{place}: values": kept.values}

    assert inputs and len(inputs) < 4, "both kinds of layers"
    assert found.keys() == expected.keys()
    for place, tensor in expected.items():
        assert found[place] == pytest.approx(float(tensor.abs().max()), rel=1e-5), place


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("count", [1, 2, 3, 12, 70])
def test_looking_changes_no_bit_of_a_result(
    kind: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_checkpoint(tmp_path, kind, num_hidden_layers=4)
    tokens = (TOKENS * 6)[:count]
    seen = run(directory, tokens)
    monkeypatch.setattr(Peaks, "cache_for", lambda *_: {"use_cache": False})
    monkeypatch.setattr(Peaks, "watch", lambda *_: ())
    blind = run(directory, tokens)

    assert len(seen.peaks or ()) > len(blind.peaks or ()) == 5
    for name in ("hidden", "router_logits"):
        assert (getattr(seen, name) is None) == (getattr(blind, name) is None)
        pairs = list(zip(getattr(seen, name) or (), getattr(blind, name) or (), strict=True))
        assert [np.array_equal(*pair) for pair in pairs] == [True] * len(pairs)
    assert np.array_equal(seen.logits, blind.logits)


def test_a_class_that_may_read_what_a_cache_keeps_is_given_none(gained: Path) -> None:  # noqa: F811
    found = peaks_of(gained, [token % 128 for token in TOKENS], reference=ACME)
    assert [place for place in found if place.endswith(": residual stream")] == [
        f"model.layers.{index}: residual stream" for index in range(3)
    ]
    assert {"model.layers.0.self_attn", "model.layers.2.mlp"} <= found.keys()
    assert not [place for place in found if place.endswith((": keys", ": values"))]


def test_a_file_of_transformers_that_reads_what_a_cache_keeps_is_known() -> None:
    with quiet_transformers():
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert only_updates_caches(torch.nn.Sequential(LlamaRMSNorm(4), torch.nn.Linear(4, 4)))
    assert not only_updates_caches(torch.nn.Sequential(LlamaRMSNorm(4), DeepseekV4RMSNorm(4)))


def test_a_value_that_is_not_a_number_is_not_lost_behind_a_number() -> None:
    for order in ([1.0, math.nan, 2.0], [math.nan, 1.0, 2.0], [1.0, 2.0, math.nan]):
        one, several = Peaks(), Peaks()
        one.see("a", torch.tensor(order))
        for value in order:
            several.see("a", torch.tensor([value]))
        assert math.isnan(one.found["a"]) and math.isnan(several.found["a"])
    peaks = Peaks()
    peaks.see("a", torch.tensor([[-3.0, 2.0], [0.0, 1.0]]))
    peaks.see("a", torch.tensor([2.5, -2.75]))
    peaks.see("nothing", torch.empty(0))
    assert peaks.found == {"a": 3.0}


def test_peaks_are_kept_with_a_result_and_one_without_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, cache = tiny_checkpoint(tmp_path / "checkpoint", num_hidden_layers=4), tmp_path / "cache"
    first = peaks_of(directory, cache=cache)
    layers: list[None] = []
    assert peaks_of(directory, cache=cache, on_layer=lambda: layers.append(None)) == first and not layers
    (kept,) = cache.iterdir()
    with np.load(kept) as file:
        arrays = dict(file)
    np.savez(kept, **{**arrays, "peaks": np.array("{}")})  # type: ignore[arg-type]
    assert peaks_of(directory, cache=cache, on_layer=lambda: layers.append(None)) == first and len(layers) == 4
    assert "no largest value of each layer" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# What is said
# ---------------------------------------------------------------------------------------------------------------------


def test_the_least_headroom_of_all_prompts_comes_first() -> None:
    places = headroom([{"a": 2.0, "b": 8.0}, None, {"a": 16.0, "b": 4.0, "zero": 0.0}])
    assert [(each.where, each.value) for each in places] == [("a", 16.0), ("b", 8.0), ("zero", 0.0)]
    assert [each.factor for each in places] == [LARGEST_HALF / 16, LARGEST_HALF / 8, math.inf]
    assert headroom_record(()) is None and headroom([None]) == ()
    broken = headroom_record(headroom([{"a": 1.0, "b": math.inf}]))
    assert broken is not None and broken["statement"].endswith("computes a value that is not finite (b)")


@pytest.mark.parametrize(
    ("value", "little"),
    [
        (16376.0, False),
        (16377.0, True),
        (-0.0, False),
        (65504.0, True),
        (1e9, True),
        (math.inf, True),
        (math.nan, True),
    ],
)
def test_a_factor_below_4_is_little(value: float, little: bool) -> None:
    places = headroom([{"a": 1.0, "b": value}, {"b": 1.0}])
    record = headroom_record(places)
    assert Headroom("b", value).little is little and record is not None
    assert (record["warning"] is not None) is little
    if little:
        assert places[0].where == "b" and record["warning"].startswith("Little room is left in 1 of 2 places")


@pytest.mark.parametrize("kind", BOTH)
def test_a_sample_is_far_from_the_end_and_one_with_a_scaled_stream_is_warned_of(kind: str, tmp_path: Path) -> None:
    entry = find_entry(ENTRIES[kind], default_plugins())[0]
    sample = entry.sample_directory()
    (large,) = (each for each in stress_samples(entry, default_plugins()) if each.name == "large-activations")

    def larger(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        large.change(weights, config)
        enlarge_stream(weights, 4.0)

    tokens = list(prompt_of(sample, 32))
    places = {}
    for name, folder in {
        "sample": sample,
        "stress": write_checkpoint(sample, large, tmp_path / "stress"),
        "larger": write_checkpoint(sample, evolve(large, change=larger), tmp_path / "larger"),
    }.items():
        places[name] = headroom([peaks_of(folder, tokens)])
    records = {name: headroom_record(found) for name, found in places.items()}
    streams = {
        name: min((each for each in found if each.where.endswith(": residual stream")), key=lambda each: each.factor)
        for name, found in places.items()
    }
    assert streams["sample"].value * 1000 < streams["stress"].value < LARGEST_HALF / 4
    assert LARGEST_HALF / 4 < streams["larger"].value < LARGEST_HALF, "near, and not beyond"
    assert not streams["stress"].little and streams["larger"].little
    assert records["sample"] is not None and records["sample"]["warning"] is None
    assert records["larger"] is not None and "another prompt may overflow" in records["larger"]["warning"]
