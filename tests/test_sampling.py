"""How a token is chosen: as transformers chooses it, by what the checkpoint says unless the user says otherwise."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coreai_zoo.bundle.sampling import Chooser, Sampling, sampling_of, sentence
from coreai_zoo.checkpoint.generation_config import FILE, SETTINGS, StatedSampling, stated_sampling
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.errors import BadInput, CheckFailed
from coreai_zoo.json_files import write_json

WIDTH = 97
LOGITS = np.random.default_rng(5).normal(0, 3, WIDTH).astype(np.float16)
READ = [3, 14, 15, 14, 92]
STATED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}


# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------


def scores_of_transformers(settings: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """What transformers' `generate` draws from for these settings, [V]."""
    with quiet_transformers():
        from transformers import GenerationConfig, GenerationMixin

        # Without a config of a model there is nothing to ask but how to sample.
        mixin = type("Mixin", (GenerationMixin,), {"config": type("Config", (), {"is_encoder_decoder": False})()})()
        off = {name: SETTINGS[name].off for name in ("top_k", "top_p")}
        config = GenerationConfig(**{"do_sample": True, **off, **settings})
        processors = mixin._get_logits_processor(generation_config=config, input_ids_seq_length=len(READ))
    scores: np.ndarray[Any, Any] = processors(torch.tensor([READ]), torch.from_numpy(LOGITS.astype(np.float32))[None])
    return np.asarray(scores)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        {"temperature": 2.0, "top_p": 0.7, "top_k": 30, "min_p": 0.02},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 12, "min_p": 0.01, "repetition_penalty": 1.8},
    ],
    ids=",".join,
)
def test_what_is_drawn_from_is_what_transformers_draws_from(settings: Mapping[str, Any]) -> None:
    ours, theirs = Chooser(Sampling(**settings)).scores(LOGITS, READ), scores_of_transformers(settings)
    kept = np.isfinite(theirs)
    assert np.array_equal(np.isfinite(ours), kept)
    assert ours[kept] == pytest.approx(theirs[kept], rel=1e-5, abs=1e-5)
    filters = settings.keys() & {"top_p", "top_k", "min_p"}
    assert (0 < kept.sum() < WIDTH) if filters else kept.all()
    assert np.array_equal(LOGITS, np.random.default_rng(5).normal(0, 3, WIDTH).astype(np.float16)), "changed in place"


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    choose = Chooser(Sampling(temperature=1.5, top_k=4, seed=11))
    scores = choose.scores(LOGITS, READ)
    expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    drawn = np.bincount([choose(LOGITS, READ) for _ in range(4000)], minlength=WIDTH) / 4000
    assert np.flatnonzero(drawn).tolist() == np.flatnonzero(expected).tolist()
    assert np.abs(drawn - expected).max() < 0.03  # four standard deviations of the most common one


def test_a_seed_makes_the_same_choices_and_another_one_others() -> None:
    def choices(seed: int) -> list[int]:
        choose = Chooser(Sampling(temperature=2.0, top_p=0.99, seed=seed))
        return [choose(LOGITS, READ) for _ in range(40)]

    assert choices(1) == choices(1) != choices(2)


def test_a_temperature_alone_draws_what_it_always_drew() -> None:
    choose = Chooser(Sampling(temperature=0.9, seed=4))
    scaled = LOGITS.astype(np.float64) / 0.9
    weights = np.exp(scaled - scaled.max())
    dice = np.random.default_rng(4)
    assert [choose(LOGITS, []) for _ in range(30)] == [
        int(dice.choice(WIDTH, p=weights / weights.sum())) for _ in range(30)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 5e-324])
def test_no_temperature_is_the_most_probable_token(temperature: float) -> None:
    assert Chooser(Sampling(temperature, top_k=3))(LOGITS, READ) == int(LOGITS.argmax())


def test_a_penalty_moves_the_most_probable_token_as_well() -> None:
    best = int(LOGITS.argmax())
    assert Chooser(Sampling(repetition_penalty=50.0))(LOGITS, [best]) != best
    assert Chooser(Sampling(repetition_penalty=50.0))(LOGITS, [best + 1]) == best


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(CheckFailed, match="not finite"):
        Chooser(Sampling())(np.array([1.0, math.nan]), [])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, r"A temperature is a number of at least 0, not -0\.1\."),
        ({"temperature": math.inf}, r"A temperature is a number of at least 0, not inf\."),
        ({"temperature": math.nan}, r"A temperature is a number of at least 0, not nan\."),
        ({"top_p": 0.0}, r"A top-p is a number above 0 and at most 1, not 0\.0\."),
        ({"top_p": 1.01}, r"A top-p is a number above 0 and at most 1, not 1\.01\."),
        ({"top_k": -1}, r"A top-k is a whole number of at least 0, not -1\."),
        ({"min_p": 2}, r"A min-p is a number from 0 to 1, not 2\."),
        ({"repetition_penalty": 0}, r"A repetition penalty is a number above 0, not 0\."),
        ({"seed": -1}, r"A seed is a whole number of at least 0, not -1\."),
    ],
)
def test_a_value_out_of_range_is_told_in_words(settings: Mapping[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=f"^{words}$"):
        Sampling(**settings)


def test_the_most_probable_token_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, numpy\n"
        "from coreai_zoo.bundle.sampling import Chooser, Sampling\n"
        "for temperature in (0.0, 1.0):\n"
        "    Chooser(Sampling(temperature))(numpy.arange(4.0), [1])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
        "Chooser(Sampling(1.0, top_k=2))(numpy.arange(4.0), [1])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "['torch', 'transformers']"]


# ---------------------------------------------------------------------------------------------------------------------
# Who says what
# ---------------------------------------------------------------------------------------------------------------------

GREEDY = "--temperature 0 takes the most probable token."


@pytest.mark.parametrize(
    ("stated", "given", "sampling", "said"),
    [
        ({}, {}, Sampling(), ""),
        (
            STATED,
            {},
            Sampling(0.6, 0.95, 20),
            f"Sampling as the checkpoint says: temperature 0.6, top-p 0.95, top-k 20; {GREEDY}",
        ),
        (STATED, {"temperature": 0}, Sampling(), ""),
        (
            STATED,
            {"temperature": 1.2, "top_k": 0},
            Sampling(1.2, 0.95),
            f"Sampling: temperature 1.2 as given, top-p 0.95 as the checkpoint says; {GREEDY}",
        ),
        # As in transformers: without `do_sample`, what else is stated is not in use.
        ({"temperature": 0.6, "top_k": 20}, {}, Sampling(top_k=20), ""),
        ({"do_sample": False, "top_k": 20}, {}, Sampling(top_k=20), ""),
        (
            {"do_sample": False, "top_k": 20},
            {"temperature": 0.5},
            Sampling(0.5, top_k=20),
            f"Sampling: temperature 0.5 as given, top-k 20 as the checkpoint says; {GREEDY}",
        ),
        ({"do_sample": True}, {}, Sampling(), ""),
        (
            {"do_sample": True, "top_k": 3},
            {},
            Sampling(1.0, top_k=3),
            f"Sampling as the checkpoint says: temperature 1, top-k 3; {GREEDY}",
        ),
        # Who asks for a filter wants to sample.
        ({}, {"top_p": 0.9}, Sampling(1.0, 0.9), ""),
        ({}, {"top_p": 1.0, "top_k": 0, "min_p": 0.0}, Sampling(), ""),
        ({}, {"temperature": 0, "top_p": 0.9}, Sampling(top_p=0.9), ""),
        (
            {"repetition_penalty": 1.1},
            {},
            Sampling(repetition_penalty=1.1),
            "As the checkpoint says: the most probable token, repetition penalty 1.1; --temperature 0 is without it.",
        ),
        ({"repetition_penalty": 1.1}, {"temperature": 0}, Sampling(), ""),
    ],
)
def test_each_option_is_the_users_or_else_the_checkpoints(
    stated: Mapping[str, Any], given: Mapping[str, Any], sampling: Sampling, said: str
) -> None:
    assert sampling_of(stated, given) == sampling
    assert sentence(sampling, stated, given) == said


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"temperature": "hot"}', "temperature in generation_config.json is 'hot', not a number of at least 0"),
        ('{"temperature": NaN}', "temperature in generation_config.json is nan, not a number of at least 0"),
        ('{"temperature": 1e999}', "temperature in generation_config.json is inf, not a number of at least 0"),
        ('{"temperature": -1}', "temperature in generation_config.json is -1, not a number of at least 0"),
        ('{"temperature": true}', "temperature in generation_config.json is True, not a number of at least 0"),
        ('{"top_p": [0.9]}', "top_p in generation_config.json is [0.9], not a number above 0 and at most 1"),
        ('{"top_p": 0}', "top_p in generation_config.json is 0, not a number above 0 and at most 1"),
        ('{"top_k": 20.0}', "top_k in generation_config.json is 20.0, not a whole number of at least 0"),
        ('{"min_p": {"a": 1}}', "min_p in generation_config.json is {'a': 1}, not a number from 0 to 1"),
        ('{"repetition_penalty": 0}', "repetition_penalty in generation_config.json is 0, not a number above 0"),
        ('{"do_sample": 1}', "do_sample in generation_config.json is 1, not true or false"),
        (f'{{"top_k": 1{"0" * 400}}}', f"top_k in generation_config.json is 1{'0' * 59} ..., not a whole number of at"),
    ],
)
def test_what_nobody_can_sample_by_is_left_out_and_noted(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(f'{{"min_p": 0.5, {text[1:]}' if "min_p" not in text else text, encoding="utf-8")
    found = stated_sampling(tmp_path)
    (said,) = found.faults
    assert said.startswith(fault) and said.endswith(": not used")
    assert found.values == ({} if "min_p" in text else {"min_p": 0.5})


@pytest.mark.parametrize("content", ["", "[]", "{", '{"eos_token_id": 7, "temperature": null}'])
def test_a_file_that_says_nothing_of_sampling_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    found = stated_sampling(tmp_path)
    assert (found.values, found.faults) == ({}, ())
    assert stated_sampling(None) == stated_sampling(tmp_path / "nowhere") == found


def test_what_is_stated_is_all_that_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "generation_config.json", {**STATED, "eos_token_id": [1, 2], "min_p": 0, "max_length": 3})
    assert stated_sampling(tmp_path) == StatedSampling({**STATED, "min_p": 0})


@pytest.mark.parametrize(
    "stated",
    [
        {"suppress_tokens": [136]},
        {"bad_words_ids": [[1, 2]]},
        {"no_repeat_ngram_size": 3},
        {"presence_penalty": 1.5},
        {"forced_bos_token_id": 0},
        {"stop_strings": "END"},
        {"num_beams": 4},
        {"typical_p": 0.9},
    ],
    ids=lambda stated: next(iter(stated)),
)
def test_whatever_else_would_choose_tokens_is_said_to_be_not_used(tmp_path: Path, stated: dict[str, Any]) -> None:
    write_json(tmp_path / "generation_config.json", {**STATED, **stated})
    (name, value), *_ = stated.items()
    assert stated_sampling(tmp_path) == StatedSampling(STATED, (f"{name} in {FILE} is {value!r}: not used",))


def test_what_transformers_writes_for_nothing_is_not_noted(tmp_path: Path) -> None:
    with quiet_transformers():
        from transformers import GenerationConfig

        GenerationConfig().save_pretrained(tmp_path)
        every = GenerationConfig().to_dict()
    assert stated_sampling(tmp_path).faults == ()
    defaults = {"typical_p": 1.0, "guidance_scale": None, "num_beams": 1, "bad_words_ids": None, "min_length": 0}
    write_json(tmp_path / "generation_config.json", {**every, **defaults, "stop_strings": [], "sequence_bias": {}})
    assert stated_sampling(tmp_path).faults == ()
