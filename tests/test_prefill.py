"""Prompts read many tokens per call: the forms of the delta rule and of the convolution, and the decoder with them.

The oracle of the rule is the recurrence in fp64 and transformers' own chunked form; that of the decoder is transformers
over the whole text. What a form computes on the runtime is tested in test_contracts.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from attrs import evolve
from torch import Tensor, nn

import prefill_mutants
from checkpoints import tiny_checkpoint
from coreai_zoo.checkpoint.folder import read_config
from coreai_zoo.contracts import CHUNKED, DYNAMIC, Contract, Prefill
from coreai_zoo.engine import prompt_chunks
from coreai_zoo.gates.prefill import DECODED, edge_lengths, pieces_with_room, uneven_pieces
from coreai_zoo_overlays.qwen3_5.gated_delta_chunks import (
    CausalConv1dTokens,
    ChunkedGatedDeltaRule,
    PaddedGatedDeltaRule,
)
from coreai_zoo_overlays.qwen3_5.gated_delta_net import CausalConv1d, GatedDeltaLoop, GatedDeltaRule
from decoders import feed, fresh_states, load_decoder
from mutants import Mutant, applied
from reference import whole_model

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 6, 16, 12

# Largest error over the largest value. The recurrence itself in fp32 has up to 6e-7 of it, on these inputs.
RULE_TOLERANCE = 3e-6

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def rule_inputs(tokens: int, kind: str = "usual") -> Inputs:
    """What a rule takes for so many tokens, fp32."""
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(1, tokens, KEY_HEADS, KEY_DIM, generator=generator)
    key = torch.randn(1, tokens, KEY_HEADS, KEY_DIM, generator=generator) + 0.5
    value = torch.randn(1, tokens, VALUE_HEADS, VALUE_DIM, generator=generator)
    # A head that forgets nothing, one that forgets all at once, and some between.
    rates = torch.tensor([0.0, 1e-3, 0.05, 1.0, 10.0, 200.0])
    g = -torch.rand(1, tokens, VALUE_HEADS, generator=generator) * rates
    beta = torch.rand(1, tokens, VALUE_HEADS, generator=generator)
    state = torch.randn(1, VALUE_HEADS, KEY_DIM, VALUE_DIM, generator=generator)
    if kind == "one key":  # each token corrects what the one before wrote: the system is as far from I as it can be
        key, beta = key[:, :1].expand_as(key).contiguous(), torch.ones_like(beta)
    if kind == "far apart":  # decays that a difference of two sums would lose
        g = torch.where(torch.arange(tokens)[:, None] % 7 == 3, g * 0 - 1e4, g * 1e-3)
    return query, key, value, g, beta, state


def recurrence(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """The rule in fp64, token by token."""
    query, key, value, g, beta, state = (x.double() for x in (query, key, value, g, beta, state))
    query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query, key = (x.repeat_interleave(VALUE_HEADS // KEY_HEADS, dim=2) for x in (query * KEY_DIM**-0.5, key))
    outputs = []
    for t in range(query.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        recalled = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], (value[:, t] - recalled) * beta[:, t, :, None])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outputs, dim=1), state


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def in_chunks(length: int, chunk: int) -> nn.Module:
    return PaddedGatedDeltaRule(ChunkedGatedDeltaRule(chunk), length)


KINDS = ("usual", "one key", "far apart")
RULES = {
    "unrolled": (lambda: PaddedGatedDeltaRule(GatedDeltaRule(), 16), 16),
    "loop": (GatedDeltaLoop, 130),
    **{f"chunks of {chunk}": (lambda chunk=chunk: in_chunks(256, chunk), 256) for chunk in (16, 32, 64, 128)},
}


def require_recurrence(name: str, *kinds: str) -> None:
    make, most = RULES[name]
    for kind, tokens in itertools.product(kinds, (1, 2, 15, 16, 17, 63, 64, 65, 130, 255, 256)):
        if tokens <= most:
            inputs = rule_inputs(tokens, kind)
            out, state = make()(*inputs)
            expected, after = recurrence(*inputs)
            assert error(out, expected) < RULE_TOLERANCE, tokens
            assert error(state, after) < RULE_TOLERANCE, tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_for_prompts_is_the_recurrence(name: str, kind: str) -> None:
    require_recurrence(name, kind)


@pytest.mark.parametrize("tokens", [5, 64, 100])
def test_a_rule_for_prompts_is_that_of_transformers(tokens: int) -> None:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    *inputs, state = rule_inputs(tokens)
    expected, after = torch_chunk_gated_delta_rule(
        *inputs, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    assert after is not None
    for make in (lambda: in_chunks(128, 64), GatedDeltaLoop, GatedDeltaRule):
        out, found = make()(*inputs, state)
        assert error(out, expected) < 1e-5
        assert error(found, after) < 1e-5


@pytest.mark.parametrize("tokens", [1, 13, 16])
def test_padding_changes_no_bit_of_the_state(tokens: int) -> None:
    inputs = rule_inputs(tokens)
    alone, one_chunk = in_chunks(16, 16)(*inputs), in_chunks(64, 16)(*inputs)
    assert all(torch.equal(one, other) for one, other in zip(alone, one_chunk, strict=True))
    if tokens == 13:
        padded, exact = PaddedGatedDeltaRule(GatedDeltaRule(), 16)(*inputs), GatedDeltaRule()(*inputs)
        assert all(torch.equal(one, other) for one, other in zip(padded, exact, strict=True))


def require_reference_convolution(tokens: int, taps: int) -> None:
    torch.manual_seed(tokens)
    reference = CausalConv1d(10, taps)
    nn.init.normal_(reference.weight)
    x, state = torch.randn(1, tokens, 10), torch.randn(1, 10, taps - 1)
    out, after = CausalConv1dTokens(reference.weight)(x, state)
    expected, window = reference(x, state)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.equal(after, window)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 40])
@pytest.mark.parametrize("taps", [2, 4])
def test_the_convolution_of_prompts_is_the_reference_with_its_window(tokens: int, taps: int) -> None:
    require_reference_convolution(tokens, taps)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder
# ---------------------------------------------------------------------------------------------------------------------

CHUNK, MOST = 8, 16
PROMPTS = {
    "small chunks": evolve(CHUNKED, prefill=Prefill(most_tokens=MOST, chunk=CHUNK)),
    "steps in a row": evolve(CHUNKED, prefill=Prefill(most_tokens=MOST, chunk=1)),
    "a loop": evolve(DYNAMIC, query_length=1),
}
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, MOST, MOST + 1, 2 * MOST + 3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each kind, with layers behind attention: what a token sees there shows in their states."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("dense", "moe")}
    for kind, folder in made.items():
        layers = 2 * ["linear_attention", "full_attention"]
        tiny_checkpoint(folder / "checkpoint", kind=kind, num_hidden_layers=len(layers), layer_types=layers)
    return made


def require_single_steps(folder: Path, contract: Contract, lengths: Sequence[int], work: Path) -> None:
    """Read prompts of some lengths, and compare states and what follows with single steps and with transformers."""
    checkpoint = folder / "checkpoint"
    decode, spec = load_decoder(checkpoint, work / "main", contract=contract)
    prefill, _ = load_decoder(checkpoint, work / "prefill", contract=contract, function="prefill")
    tokens = torch.randint(0, 200, (2 * MOST + 8,), generator=torch.Generator().manual_seed(3)).tolist()
    oracle = torch.from_numpy(whole_model(checkpoint, tokens, read_config(checkpoint)).logits)
    for length in lengths:
        states = read(prefill, contract, tokens[:length], fresh(spec, len(tokens)))
        stepped = fresh(spec, len(tokens))
        feed(decode, tokens[:length], stepped)
        for state, one, other in zip(spec.states, states, stepped, strict=True):
            unwritten = one[..., length:, :] if state.kind == "kv_cache" else one[:0]
            assert torch.isnan(unwritten).all(), f"{state.name} is written behind {length} tokens"
            assert torch.allclose(one, other, atol=1e-5, rtol=1e-4, equal_nan=True), f"{state.name}, {length} tokens"
        # The next tokens, and a second prompt behind them, go on from there.
        for at in (length, length + 1):
            assert torch.allclose(call(decode, tokens, at, 1, states), oracle[at : at + 1], atol=2e-4)
        call(prefill, tokens, length + 2, 2, states)
        assert torch.allclose(call(decode, tokens, length + 4, 1, states), oracle[length + 4 : length + 5], atol=2e-4)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("form", PROMPTS)
def test_prompts_of_any_length_leave_the_states_and_logits_of_single_steps(
    form: str, kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    require_single_steps(checkpoints[kind], PROMPTS[form], LENGTHS, tmp_path)


def fresh(spec: object, capacity: int) -> list[Tensor]:
    """States at a reset, the caches holding what is no number."""
    states = fresh_states(spec, capacity)  # type: ignore[arg-type]
    for state in states[:2]:
        state.fill_(float("nan"))
    return states


def call(module: nn.Module, tokens: list[int], start: int, count: int, states: list[Tensor]) -> Tensor:
    """Logits [count, V] of the tokens from `start` on."""
    ids = torch.tensor([tokens[start : start + count]], dtype=torch.int32)
    with torch.no_grad():
        logits: Tensor = module(ids, torch.arange(start + count, dtype=torch.int32)[None], *states)[0]
    return logits


def read(prefill: nn.Module, contract: Contract, tokens: list[int], states: list[Tensor]) -> list[Tensor]:
    """The states after a prompt is read as an engine reads it."""
    assert contract.prefill is not None
    at = 0
    for count in prompt_chunks(len(tokens), contract.prefill.most_tokens or 11):
        call(prefill, tokens, at, count, states)
        at += count
    return states


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", prefill_mutants.CHUNKS, ids=lambda mutant: mutant.name)
def test_a_mistake_in_the_rule_by_chunks_is_seen(mutant: Mutant) -> None:
    with applied(mutant), pytest.raises(AssertionError):
        require_recurrence("chunks of 64", *KINDS)


def require_other_forms() -> None:
    require_reference_convolution(5, 4)
    require_recurrence("unrolled", "usual")
    require_recurrence("loop", "usual")


@pytest.mark.parametrize("mutant", prefill_mutants.OTHER_FORMS, ids=lambda mutant: mutant.name)
def test_a_mistake_in_another_form_is_seen(mutant: Mutant) -> None:
    with applied(mutant), pytest.raises(AssertionError):
        require_other_forms()


@pytest.mark.parametrize("mutant", prefill_mutants.DECODER, ids=lambda mutant: mutant.name)
def test_a_mistake_in_the_decoder_over_many_tokens_is_seen(
    mutant: Mutant, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with applied(mutant), pytest.raises(AssertionError):
        require_single_steps(checkpoints["dense"], PROMPTS["small chunks"], [CHUNK + 1], tmp_path)


def test_the_documentation_has_every_mistake(root: Path) -> None:
    assert prefill_mutants.table() in (root / "docs" / "gate-mutants.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Chunks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "most", "chunks"),
    [(1, 16, [1]), (16, 16, [16]), (17, 16, [9, 8]), (35, 16, [12, 12, 11]), (515, 256, [172, 172, 171])],
)
def test_a_prompt_is_sent_in_chunks_as_even_as_can_be(tokens: int, most: int, chunks: list[int]) -> None:
    assert prompt_chunks(tokens, most) == chunks


def test_a_contract_whose_chunks_do_not_fill_a_call_is_refused() -> None:
    with pytest.raises(ValueError, match="100 tokens are no whole chunks of 64"):
        Prefill(most_tokens=100, chunk=64)


def test_a_chunk_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="which 48 cannot be"):
        ChunkedGatedDeltaRule(48)


@pytest.mark.parametrize(
    ("prefill", "lengths"),
    [(Prefill(256, 64), (65, 64, 63, 1, 256)), (Prefill(16, 1), (16, 16, 15, 1)), (Prefill(None, None), (24, 3, 1))],
    ids=["chunks", "steps", "a loop"],
)
@pytest.mark.parametrize("tokens", [1, 2, 3, 40, 66, 200, 512])
def test_a_gate_reads_every_token_once_in_pieces_of_edge_lengths(
    prefill: Prefill, lengths: tuple[int, ...], tokens: int
) -> None:
    assert edge_lengths(prefill) == lengths
    pieces = uneven_pieces(tokens, prefill)
    assert sum(pieces) == tokens and min(pieces) > 0
    assert pieces[:-1] == list(itertools.islice(itertools.cycle(lengths), len(pieces) - 1))
    behind = pieces_with_room(tokens, prefill)
    assert sum(behind) + DECODED * len(behind) <= tokens
    assert behind[:-1] == list(lengths[: len(behind)])[:-1]
    assert bool(behind) is (tokens > DECODED)
