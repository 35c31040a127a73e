"""The overlay against transformers, both in fp32 and on the same checkpoint: the same logits, whatever the sizes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import tiny_checkpoint
from coreai_zoo.checkpoint.folder import read_config
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.contracts import FIXED_S1
from decoders import feed, feed_by_position, fresh_states, load_decoder
from reference import whole_model
from suite import NIGHTLY

LINEAR, FULL = "linear_attention", "full_attention"
POSITIONS = 24
VOCAB = 288
TOLERANCE = 2e-4


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    """A checkpoint of random sizes and ratios, in one of the layouts that occur."""
    kind = draw(st.sampled_from(["dense", "moe"]))
    layers = draw(st.lists(st.sampled_from([LINEAR, FULL]), min_size=0, max_size=3))
    layers = draw(st.permutations([LINEAR, FULL, *layers]))
    kv_heads, key_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([8, 16, 24]))
    factor = draw(st.sampled_from([0.25, 0.5, 1.0]))
    half = int(head_dim * factor) // 2
    options: dict[str, Any] = {
        "hidden_size": draw(st.sampled_from([16, 24, 40])),
        "num_hidden_layers": len(layers),
        "layer_types": list(layers),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 6)),
        "head_dim": head_dim,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * draw(st.integers(1, 4)),
        "linear_key_head_dim": draw(st.sampled_from([4, 8, 20])),
        "linear_value_head_dim": draw(st.sampled_from([4, 12, 16])),
        "linear_conv_kernel_dim": draw(st.integers(2, 5)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": draw(st.sampled_from([1e4, 1e7])),
            "partial_rotary_factor": factor,
            "mrope_interleaved": True,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        },
    }
    if kind == "dense":
        options["intermediate_size"] = draw(st.sampled_from([8, 40]))
    else:
        experts = draw(st.integers(2, 9))
        options |= {
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, experts)),
            "moe_intermediate_size": draw(st.sampled_from([4, 12])),
            "shared_expert_intermediate_size": draw(st.sampled_from([4, 20])),
            "packed_experts": draw(st.booleans()),
        }
    layout = {
        "wrapped": draw(st.booleans()),
        "text_prefix": draw(st.sampled_from(["model.", "model.language_model."])),
        "seed": draw(st.integers(0, 1000)),
    }
    return {"kind": kind, "dtype": "float32", **layout, **options}


def tokens_of(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (POSITIONS,), generator=generator).tolist()


@settings(max_examples=50 if NIGHTLY else 15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(options=architectures(), split=st.integers(1, POSITIONS - 1))
def test_any_architecture_steps_to_the_logits_of_transformers(options: dict[str, Any], split: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = tiny_checkpoint(Path(folder) / "checkpoint", **options)
        tokens = tokens_of(options["seed"])
        expected = torch.from_numpy(whole_model(directory, tokens, read_config(directory)).logits)
        assert expected.std() > 1e-3, "the reference computes nothing"

        stepped, spec = load_decoder(directory, Path(folder) / "store")
        one_by_one = feed(stepped, tokens, fresh_states(spec))
        assert (one_by_one - expected).abs().max() <= TOLERANCE

        by_position, spec = load_decoder(directory, Path(folder) / "store", contract=FIXED_S1)
        assert (feed_by_position(by_position, tokens, fresh_states(spec)) - expected).abs().max() <= TOLERANCE

        reference, spec = load_decoder(directory, Path(folder) / "store", rewritten=False)
        in_two = feed(reference, tokens, fresh_states(spec), split)
        assert (in_two - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_prefill_by_the_reference_continues_in_steps_like_transformers_with_its_own_cache(
    kind: str, tmp_path: Path
) -> None:
    directory = tiny_checkpoint(tmp_path / "checkpoint", kind, dtype="float32", num_hidden_layers=4)
    tokens, prefill = tokens_of(3), 9
    with quiet_transformers(), torch.no_grad():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        outputs = model(torch.tensor([tokens[:prefill]]), use_cache=True)
        rows = [outputs.logits[0]]
        for token in tokens[prefill:]:
            outputs = model(torch.tensor([[token]]), past_key_values=outputs.past_key_values, use_cache=True)
            rows.append(outputs.logits[0])
    expected = torch.cat(rows)

    reference, spec = load_decoder(directory, tmp_path / "reference", rewritten=False)
    stepped, _ = load_decoder(directory, tmp_path / "step")
    states = fresh_states(spec)
    ours = [feed(reference, tokens[:prefill], states, prefill)]
    for position in range(prefill, POSITIONS):
        with torch.no_grad():
            ids = torch.tensor([[tokens[position]]], dtype=torch.int32)
            ours.append(stepped(ids, torch.arange(position + 1, dtype=torch.int32)[None], *states)[0])
    assert (torch.cat(ours) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_states_after_any_split_are_the_states_of_stepping(kind: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "checkpoint", kind, dtype="float32", num_hidden_layers=4)
    stepped, spec = load_decoder(directory, tmp_path / "step")
    reference, _ = load_decoder(directory, tmp_path / "reference", rewritten=False)
    tokens, expected = tokens_of(5), fresh_states(spec)
    feed(stepped, tokens, expected)
    for pieces in ((1,), (12,), (2, 5, 23)):
        states = fresh_states(spec)
        feed(reference, tokens, states, *pieces)
        for name, ours, theirs in zip((s.name for s in spec.states), states, expected, strict=True):
            assert theirs.abs().max() > 1e-3, f"{name} is never written"
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=f"{name} after {pieces}")
