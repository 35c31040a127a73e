"""The overlay's reading of `config.json` against transformers' own configuration classes, over spellings."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import read_weights, text_config, tiny_checkpoint, write_json, write_weights
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.files import read_config as read_json
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.errors import BadInput
from coreai_zoo.gates.huggingface import StreamedCausalLM
from coreai_zoo_overlays.qwen3_5.attention import RotaryEmbedding
from coreai_zoo_overlays.qwen3_5.config import Qwen35Config, read_config
from decoders import feed, fresh_states, load_decoder
from reference import whole_model
from suite import NIGHTLY

with quiet_transformers():
    from transformers.models.qwen3_5 import configuration_qwen3_5 as dense
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding
    from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe as moe

TEXT: Mapping[str, Any] = {"dense": dense.Qwen3_5TextConfig, "moe": moe.Qwen3_5MoeTextConfig}
WRAPPER: Mapping[str, Any] = {"dense": dense.Qwen3_5Config, "moe": moe.Qwen3_5MoeConfig}

KINDS = sorted(TEXT)

ABSENT = object()
"""Stands for a key that is not there."""

# Rotary types that transformers computes and the overlay refuses by name.
NOT_OURS = frozenset({"linear", "dynamic", "longrope", "llama3", "proportional"})


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not ABSENT}


def absent_or(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([ABSENT, *values])


def rope_settings() -> st.SearchStrategy[Any]:
    """What stands under `rope_parameters` or `rope_scaling`: absent, null, empty, or an object in old or new names."""
    fields = {
        "rope_type": absent_or("default", "yarn", "linear", None),
        "type": absent_or("default", "yarn", "mrope"),
        "rope_theta": absent_or(1e4, 1e7, 500, None),
        "partial_rotary_factor": absent_or(0.25, 0.5, 1.0, None),
        "mrope_section": absent_or([11, 11, 10]),
        "factor": absent_or(1.0, 4.0, 0.5, None),
        "original_max_position_embeddings": absent_or(64, 4096, 262144),
        "beta_fast": absent_or(32, 8.0, None),
        "beta_slow": absent_or(1, 2.0, None),
        "attention_factor": absent_or(1.0, 1.3, None),
        "mscale": absent_or(0.7, 1.0),
        "mscale_all_dim": absent_or(1.2),
        "truncate": absent_or(True, False, None),
    }
    return st.one_of(st.sampled_from([ABSENT, None, {}]), st.fixed_dictionaries(fields).map(present))


SPELLINGS = st.fixed_dictionaries(
    {
        "rope_parameters": rope_settings(),
        "rope_scaling": rope_settings(),
        "rope_theta": absent_or(1e4, 2e6, None),
        "partial_rotary_factor": absent_or(0.25, 0.5, None),
        "original_max_position_embeddings": absent_or(ABSENT, ABSENT, 128),
        "max_position_embeddings": absent_or(256, 262144),
        "layer_types": absent_or(None),
        "full_attention_interval": absent_or(2, 4),
        "head_dim": absent_or(64, 256, 256, None),
        "rms_norm_eps": absent_or(1e-5, 1e-6, None),
        "attention_bias": absent_or(False),
        "tie_word_embeddings": absent_or(True, False),
    }
).map(present)


def theirs(kind: str, text: Mapping[str, Any]) -> tuple[Any, Any]:
    """transformers' config and rotary embedding; raises whatever they raise."""
    fields = copy.deepcopy({key: value for key, value in text.items() if key not in ("model_type", "dtype")})
    with quiet_transformers():
        config = TEXT[kind](**fields)
        return config, Qwen3_5TextRotaryEmbedding(config)


def attempted(make: Callable[[], Any], refusal: type[Exception]) -> tuple[Any, Exception | None]:
    """What `make` gives, or the error by which it refuses."""
    try:
        return make(), None
    except refusal as error:
        return None, error


def require_equal(ours: Qwen35Config, config: Any, rotary: Any) -> None:
    for name in ("vocab_size", "hidden_size", "head_dim", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(config, name), name
    assert list(ours.layer_types) == list(config.layer_types)
    assert ours.tie_word_embeddings == config.tie_word_embeddings
    embedding = RotaryEmbedding(ours)
    assert embedding.scale == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert embedding.inverse_frequency.shape == rotary.inv_freq.shape
    torch.testing.assert_close(embedding.inverse_frequency, rotary.inv_freq, rtol=2e-6, atol=0)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kind=st.sampled_from(KINDS), spelling=SPELLINGS)
def test_every_spelling_is_read_as_transformers_reads_it(kind: str, spelling: dict[str, Any]) -> None:
    basis = {key: value for key, value in text_config(kind).items() if key not in (*spelling, "rope_parameters")}
    text = {**basis, "num_hidden_layers": 4, **spelling}
    text.setdefault("layer_types", None)
    ours, refusal = attempted(lambda: read_config(text), BadInput)
    found, _ = attempted(lambda: theirs(kind, text), Exception)
    if ours is not None:
        assert found is not None, "transformers refuses what is read"
        require_equal(ours, *found)
    elif found is not None:
        config, rotary = found
        rope = config.rope_parameters
        odd = 2 * len(rotary.inv_freq) > config.head_dim * rope.get("partial_rotary_factor", 1.0)
        assert rope["rope_type"] in NOT_OURS or odd, f"transformers takes what is refused: {refusal}"
        assert odd or rope["rope_type"] in str(refusal)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"factor": None, "original_max_position_embeddings": 128},
        {"attention_factor": 1.3},
        {"mscale": 0.7, "mscale_all_dim": 1.2},
        {"beta_fast": 8.0, "beta_slow": 2.0},
        {"truncate": False},
        {"truncate": False, "beta_fast": 2, "beta_slow": 2},  # no ramp at all
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_yarn_stretches_frequencies_as_transformers_does(change: dict[str, Any]) -> None:
    rope = {"rope_theta": 1e7, "partial_rotary_factor": 1.0, **YARN, **change}
    text = text_config("dense", head_dim=64, rope_parameters=rope)
    ours = read_config(text)
    assert ours.yarn is not None
    require_equal(ours, *theirs("dense", text))
    plain = read_config(text | {"rope_parameters": rope | {"rope_type": "default"}})
    assert not torch.equal(RotaryEmbedding(ours).inverse_frequency, RotaryEmbedding(plain).inverse_frequency)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_with_yarn_computes_what_transformers_computes(kind: Any, tmp_path: Path) -> None:
    # Beside a default rope_parameters, as people extend the context: it is replaced, and its theta with it.
    directory = tiny_checkpoint(tmp_path / "checkpoint", kind, dtype="float32", rope_scaling=YARN)
    config, tokens = read_json(directory), list(range(10, 44))
    read = read_config(config)
    assert read.yarn is not None and read.rope_theta == 10_000
    expected = whole_model(directory, tokens, config).logits
    module, spec = load_decoder(directory, tmp_path / "store")
    assert np.abs(feed(module, tokens, fresh_states(spec)).numpy() - expected).max() <= 2e-4


@pytest.mark.parametrize("name", ["linear", "dynamic", "longrope", "llama3", "mrope", "spiral"])
def test_another_way_to_scale_positions_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadInput, match=f"rope_type is '{name}'"):
        read_config(text_config("dense", rope_scaling={"type": name, "factor": 2.0}))


@pytest.mark.parametrize(
    "field", ["head_dim", "rms_norm_eps", "attention_bias", "tie_word_embeddings", "max_position_embeddings"]
)
def test_null_is_refused_where_transformers_refuses_it(field: str) -> None:
    text = text_config("dense") | {field: None}
    with pytest.raises(BadInput, match=f"{field} is null"):
        read_config(text)
    with pytest.raises(StrictDataclassError, match=field):
        theirs("dense", text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [ABSENT, None, "nothing"])
def test_a_wrapper_without_a_text_config_says_what_to_write(kind: str, text: object) -> None:
    wrapper = text_config(kind)["model_type"].removesuffix("_text")
    with pytest.raises(BadInput, match="text_config") as caught:
        read_config({**text_config(kind), "model_type": wrapper, **present({"text_config": text})})
    assert f'"model_type": "{wrapper}_text"' in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The head: tied or not
# ---------------------------------------------------------------------------------------------------------------------


TIED = {"silent": ABSENT, "untied": False, "tied": True}
SPELLINGS_OF_A_HEAD = list(itertools.product(("ConditionalGeneration", "CausalLM", None), TIED, TIED, (True, False)))


# By day each spelling with one kind of feed-forward, which has no say in it; at night with both.
@pytest.mark.parametrize(
    ("kind", "of", "wrapper", "text", "stored"),
    [
        (kind, *spelling)
        for number, spelling in enumerate(SPELLINGS_OF_A_HEAD)
        for kind in (KINDS if NIGHTLY else (KINDS[number // 2 % 2],))
    ],
)
def test_a_head_is_tied_where_the_class_that_the_config_names_ties_it(
    kind: Any, of: str | None, wrapper: str, text: str, stored: bool, tmp_path: Path
) -> None:
    directory = tiny_checkpoint(tmp_path / "checkpoint", kind, dtype="float32", extra_keys=False)
    config, weights = read_json(directory), read_weights(directory)
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"], config["architectures"]
    config |= present({"tie_word_embeddings": TIED[wrapper]})
    config["text_config"] |= present({"tie_word_embeddings": TIED[text]})
    config["vision_config"] = VISION
    if of:
        config["architectures"] = [f"{ARCHITECTURE[kind]}For{of}"]
    if not stored:
        del weights["lm_head.weight"]
    write_weights(directory, weights)
    write_json(directory / "config.json", config)

    expected, missing = logits_of(f"{ARCHITECTURE[kind]}For{of or 'ConditionalGeneration'}", directory)
    assert missing <= {"lm_head.weight"}
    if missing:
        with pytest.raises(BadInput, match="missing: lm_head"):
            load_decoder(directory, tmp_path / "store")
        return
    module, spec = load_decoder(directory, tmp_path / "store")
    assert np.abs(feed(module, TOKENS, fresh_states(spec)).numpy() - expected).max() <= 2e-4
    streamed = StreamedCausalLM(Checkpoint.open(directory), config, torch.float32).run(TOKENS)
    assert np.abs(streamed.logits - expected).max() <= 2e-5


TOKENS = list(range(20, 30))
ARCHITECTURE = {"dense": "Qwen3_5", "moe": "Qwen3_5Moe"}
VISION = {"depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "out_hidden_size": 32, "patch_size": 4}


def logits_of(architecture: str, directory: Path) -> tuple[np.ndarray[Any, Any], set[str]]:
    """The logits of one class of transformers, and which parameters of the language model it does not find."""
    with quiet_transformers():
        import transformers

        model, report = getattr(transformers, architecture).from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        with torch.inference_mode():
            logits = model.eval()(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    return logits.numpy(), {name for name in report["missing_keys"] if ".visual." not in name}


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_positions_that_are_scaled_beside_the_text_config_are_refused(name: str) -> None:
    wrapped = {"model_type": "qwen3_5", "text_config": text_config("dense")}
    with pytest.raises(BadInput, match=f"{name} in config.json stands beside text_config"):
        read_config({**wrapped, name: YARN})
    assert read_config({**wrapped, name: {"rope_type": "default"}}) == read_config(
        wrapped
    )  # as transformers: no effect
