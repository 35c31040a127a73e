"""`zoo plan --contracts`: how the contracts compare on a chip, and what bounds the rate at which a prompt is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from attrs import evolve
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import toy_plugin
from checkpoints import text_config, tiny_checkpoint, write_json
from command import commands, zoo
from coreai_zoo.backends import builtin
from coreai_zoo.build.chips import (
    CHIPS,
    EFFICIENCY,
    EFFICIENCY_SOURCE,
    MEASURED,
    TFLOPS_SOURCE,
    Chip,
    tokens_per_second,
)
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.build.target import backend_of
from coreai_zoo.cli.plan_machines import figure
from coreai_zoo.commands import Number
from coreai_zoo.contracts import CHUNKED, CONTRACTS, DYNAMIC, Prefill
from coreai_zoo.planning.plan import Plan
from coreai_zoo.planning.plan import plan as make_plan
from coreai_zoo.planning.prompts import Call, Reading, prompt_calls, read_on
from coreai_zoo.plugins import Plugins, default_plugins
from coreai_zoo_overlays.qwen3_5.gated_delta_net import recurrent_gated_delta_rule
from decoders import OVERLAY, feed, fresh_states, load_decoder
from documents import read

DENSE, MOE, FIXED = "qwen3.6-27b", "qwen3.6-35b-a3b", "fixed-s1"
CHIP = {chip.name: chip for chip in CHIPS}


def planned(model: str, contract: str, **asked: Any) -> Plan:
    backend = backend_of(CONTRACTS[contract])
    return make_plan(BuildRequest(model, contract=contract, backend=backend, dry=True, **asked), default_plugins())


def reading(model: str, contract: str, machine: str, tokens: int = 2000) -> Reading:
    return read_on(CHIP[machine], prompt_calls(planned(model, contract), tokens))


def compared(*arguments: str) -> dict[str, Any]:
    result = zoo("plan", DENSE, "--contracts", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_prompt_that_nobody_said_the_length_of_leaves_room_for_an_answer() -> None:
    assert compared()["prompt_tokens"] == 2000
    short = compared("--max-context", "64")
    assert short["prompt_tokens"] == 63 and not short["left_out"]
    refused = zoo("plan", DENSE, "--contracts", "--max-context", "64", "--prompt-tokens", "64")
    assert refused.exit_code == 2 and "allow more with --max-context 65 or above" in refused.stderr


# ---------------------------------------------------------------------------------------------------------------------
# What a call reads
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [DENSE, MOE, "qwen3.5-2b"])
def test_one_token_reads_what_a_decoded_token_reads(model: str) -> None:
    plan = planned(model, "chunked")
    assert plan.read_by(1, head=True) == plan.read


def test_a_call_of_prefill_reads_no_head_and_a_row_of_the_table_for_each_token() -> None:
    plan = planned(DENSE, "chunked")
    head = next(role for role in plan.roles if role.role == "head")
    row = 5120 * 2
    assert plan.read_by(256, head=False) == plan.read - head.bytes + 255 * row


def test_the_share_of_experts_that_a_call_reads_is_that_of_a_router_without_preference() -> None:
    plan, tokens = planned(MOE, "chunked"), 16
    experts = next(role for role in plan.roles if role.role == "moe.expert")
    head = next(role for role in plan.roles if role.role == "head")
    read = plan.read_by(tokens, head=False) - (plan.read - experts.read - head.bytes)
    generator = np.random.default_rng(3)
    drawn = [
        len({int(expert) for _ in range(tokens) for expert in generator.choice(256, 8, replace=False)}) / 256
        for _ in range(400)
    ]
    row = 2048 * 2
    assert (read - (tokens - 1) * row) / experts.bytes == pytest.approx(np.mean(drawn), rel=0.01)
    assert plan.read_by(2048, head=True) == pytest.approx(plan.dense_read, rel=0.001)


# ---------------------------------------------------------------------------------------------------------------------
# What a call computes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", "dense")


def test_the_operations_of_a_call_are_those_that_torch_counts(checkpoint: Path, tmp_path: Path) -> None:
    """Products of matrices: every linear layer, attention against the cache, and the chunks of the delta rule."""
    contract = evolve(CHUNKED, prefill=Prefill(32, 8))
    module, spec = load_decoder(checkpoint, tmp_path / "work", contract=contract, function="prefill")
    states, tokens = fresh_states(spec), list(range(50))
    feed(module, tokens[:20], states, 20)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.tensor([tokens[20:]], dtype=torch.int32), torch.arange(50, dtype=torch.int32)[None], *states)
    weights = sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
    config = OVERLAY.read_config(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    counted = OVERLAY.operations(config, contract.prefill, tokens=30, positions=50)
    assert counter.get_total_flops() == 2 * 30 * weights + counted
    assert counted > 30 * weights / 10  # a miniature's chunks are no small part of it


class _OfSize(TorchDispatchMode):
    """Counts what operations there are on tensors of a size: multiplications, additions, and sums over them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [value.numel() for value in (*args, result) if isinstance(value, torch.Tensor)]
        arithmetic = function.overloadpacket.__name__ in {"mul", "add", "sub", "sum", "div"}
        self.count += self.size * (arithmetic and max(sizes, default=0) == self.size)
        return result


@pytest.mark.parametrize(
    ("prefill", "steps"), [(None, 3), (Prefill(None, None), 3), (Prefill(16, 1), 16)], ids=["main", "loop", "in a row"]
)
def test_steps_of_the_rule_count_what_goes_through_the_state(prefill: Prefill | None, steps: int) -> None:
    config = OVERLAY.read_config(text_config("dense"))
    heads, key, value = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    of = (config.linear_num_key_heads, key)
    inputs = [torch.randn(1, *size) for size in (of, of, (heads, value), (heads,), (heads,), (heads, key, value))]
    with _OfSize(heads * key * value) as counted:
        recurrent_gated_delta_rule(*inputs)
    attention = config.full_layers * config.num_attention_heads * 4 * config.head_dim * 3 * 9
    assert OVERLAY.operations(config, prefill, tokens=3, positions=9) - attention == (
        config.linear_layers * steps * counted.count
    )


def test_a_weight_takes_two_operations_and_the_embedding_table_none() -> None:
    plan = planned(DENSE, "chunked")
    table = 248_320 * 5_120
    assert plan.products(1, head=True) == 2 * (plan.design.weights.parameters - table)
    assert plan.products(256, head=False) == 256 * 2 * (plan.design.weights.parameters - 2 * table)
    routed = planned(MOE, "chunked")
    experts = next(role for role in routed.roles if role.role == "moe.expert")
    idle = experts.parameters - experts.parameters * 8 // 256
    assert routed.products(1, head=True) == 2 * (routed.design.weights.parameters - 248_320 * 2_048 - idle)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contract", "lengths"),
    [
        ("static-s1", [1] * 2000),
        ("fixed-s1", [1] * 2000),
        ("chunked", [250] * 7 + [249, 1]),
        ("chunked-unrolled", [16] * 124 + [15, 1]),
        ("dynamic", [1999, 1]),
    ],
)
def test_a_prompt_is_read_in_the_calls_of_an_engine(contract: str, lengths: list[int]) -> None:
    plan = planned(DENSE, contract)
    calls = prompt_calls(plan, 2000)
    assert [call.tokens for call in calls] == lengths
    assert calls[-1].bytes == plan.read, "the last token is decoded, with the head"
    if contract != "dynamic":  # which has one call of a length
        assert calls[0].tokens == calls[1].tokens and calls[0].operations < calls[1].operations


def test_a_prompt_of_one_token_is_decoded() -> None:
    (call,) = prompt_calls(planned(DENSE, "chunked"), 1)
    assert (call.tokens, call.bytes) == (1, planned(DENSE, "chunked").read)


def test_a_prompt_takes_of_each_call_the_longer_of_memory_and_arithmetic() -> None:
    calls = [Call(tokens=300, bytes=4 * 10**9, operations=10**12), Call(tokens=100, bytes=10**9, operations=6 * 10**12)]
    both = read_on(Chip("toy", 2, (), 1), calls)
    assert (both.memory_seconds, both.arithmetic_seconds, both.seconds) == (2.5, 7, 2 + 6)
    assert (both.bandwidth_bound, both.compute_bound, both.bound) == (160, 400 / 7, 50)
    memory = read_on(Chip("toy", 2, ()), calls)
    assert (memory.bandwidth_bound, memory.seconds, memory.compute_bound, memory.bound) == (160, None, None, None)


def published() -> list[tuple[str, str, float, float, int]]:
    """The measured rates in docs/contracts.md: machine, contract of as many tokens per call, rate, bound, percent."""
    like = {"token by token": "static-s1", "16 tokens per call": "chunked-unrolled"}
    row = r"^\| (M\d \w+) \| ([^,|]*), [^|]* \| ([\d.]+) \| ([\d.]+) \| (\d+) % \|$"
    found = re.findall(row, read("contracts.md"), re.MULTILINE)
    return [(machine, like[how], float(rate), float(bound), int(share)) for machine, how, rate, bound, share in found]


def test_what_was_measured_is_below_the_bounds_and_the_page_says_how_far() -> None:
    rows = published()
    assert {(machine, name, rate) for machine, name, rate, _bound, _share in rows} == {
        ("M4 Max", "static-s1", 16.2),
        ("M4 Pro", "static-s1", 6.1),
        ("M4 Max", "chunked-unrolled", 86.0),
    }
    for machine, name, rate, bound, share in rows:
        predicted = reading(DENSE, name, machine)
        assert predicted.compute_bound is not None
        assert rate < min(predicted.bandwidth_bound, predicted.compute_bound)
        assert predicted.bound is not None
        assert bound == round(predicted.bound, 1)
        assert share == round(100 * rate / predicted.bound)


def test_chunks_are_bounded_by_arithmetic_and_steps_by_bandwidth() -> None:
    for machine in MEASURED:
        bounds = {name: reading(DENSE, name, machine) for name in CONTRACTS}
        limits = {name: found.compute_bound or 0.0 for name, found in bounds.items()}
        assert {name for name, found in bounds.items() if found.bandwidth_bound < limits[name]} == {
            "static-s1",
            "chunked-unrolled",
            "fixed-s1",
        }
        steps, chunks = (bounds[name].seconds for name in ("static-s1", "chunked"))
        assert steps is not None and chunks is not None and steps > 10 * chunks


# ---------------------------------------------------------------------------------------------------------------------
# Chips
# ---------------------------------------------------------------------------------------------------------------------


def test_chips_with_a_known_arithmetic_do_the_same_per_core_as_their_family() -> None:
    cores = {"M4": 10, "M4 Pro": 20, "M4 Max, 32-core GPU": 32, "M4 Max": 40}
    assert {round(CHIP[name].tflops or 0, 1) for name in cores} == {round(0.46 * count, 1) for count in cores.values()}
    assert [chip.name for chip in CHIPS if chip.tflops is None] == [
        chip.name for chip in CHIPS if chip.name.startswith("M5")
    ]


def test_a_chip_of_unknown_arithmetic_has_no_bound_that_makes_it_look_better_than_one_that_is_known() -> None:
    (machine,) = next(found for found in compared("--chip", "m5 max")["contracts"] if found["contract"] == "chunked")[
        "machines"
    ]
    assert (machine["name"], machine["tflops"], machine["prompt_compute_bound"]) == ("M5 Max", None, None)
    assert machine["prompt_bandwidth_bound"] > 5000
    assert machine["prompt_bound"] is machine["least_seconds_to_first_token"] is None
    for asked in (("--chip", "M5 Max"), ("--bandwidth", "614")):
        output = zoo("plan", DENSE, "--contracts", *asked).output
        assert ": 614 GB/s, arithmetic not known; tokens/s, a prompt of 2,000\n" in output
        (_, row) = (re.split(r"  +", line) for line in output.splitlines() if line.startswith("chunked  "))
        assert row[-3:] == ["not known"] * 3
        assert "what it takes at the least is not known." in output and "TFLOPS: " not in output


def test_a_machine_of_ones_own_is_given_by_bandwidth_and_arithmetic() -> None:
    ours, chip = compared("--bandwidth", "546", "--tflops", "18.4"), compared("--chip", "M4 Max")
    for own, known in zip(ours["contracts"], chip["contracts"], strict=True):
        names = ("name", "fits_from_gib")
        (one,), (other,) = (
            [{key: value for key, value in machine.items() if key not in names} for machine in found["machines"]]
            for found in (own, known)
        )
        assert one == other
    assert (ours["tflops_source"], chip["tflops_source"]) == ("--tflops", TFLOPS_SOURCE)
    output = zoo("plan", DENSE, "--contracts", "--bandwidth", "546", "--tflops", "18.4").output
    assert "huggingface" not in output
    assert "huggingface" in zoo("plan", DENSE, "--contracts", "--chip", "M4 Max").output


@pytest.mark.parametrize("option", ["--bandwidth", "--tflops", "--efficiency"])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e300", "1e-320", "0", "-1"])
def test_what_is_no_number_of_a_machine_is_refused(option: str, number: str) -> None:
    result = zoo("plan", DENSE, "--contracts", "--bandwidth", "100", "--tflops", "5", option, number)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Invalid value for '{option}': " in result.stderr


@pytest.mark.parametrize("bandwidth", ["0.001", "1000000"])
@pytest.mark.parametrize("tflops", ["0.001", "1000000"])
def test_every_number_that_is_taken_gives_figures(bandwidth: str, tflops: str) -> None:
    for option in compared("--bandwidth", bandwidth, "--tflops", tflops, "--prompt-tokens", "1")["contracts"]:
        (machine,) = option["machines"]
        assert 0 < machine["least_seconds_to_first_token"] < float("inf") and machine["prompt_bound"] > 0


def test_no_option_takes_numbers_that_are_not_finite() -> None:
    floats = [
        option.type
        for command in commands()
        for option in command.params
        if isinstance(option.type, click.types.FloatParamType)
    ]
    assert len(floats) >= 4 and {type(each) for each in floats} == {Number}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not known"),
        (0.0, "0.0"),
        (0.0498, "0.050"),
        (0.57, "0.57"),
        (1.04, "1.0"),
        (5.46, "5.5"),
        (12345.6, "12,345.6"),
        (3e-6, "0.0000030"),
    ],
)
def test_a_figure_has_two_digits_that_count(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_a_short_time_and_a_low_rate_are_not_nothing() -> None:
    output = zoo("plan", DENSE, "--contracts", "--chip", "M4 Max", "--prompt-tokens", "1").output
    assert [line for line in output.splitlines() if line.startswith("static-s1  ")][1].endswith("  0.050 s")
    output = zoo("plan", DENSE, "--bandwidth", "1").output
    assert next(line for line in output.splitlines() if line.startswith("1 GB/s")).split()[-2:] == ["0.037", "0.029"]


def test_a_chip_is_shown_once_however_often_it_is_named() -> None:
    for found in compared("--chip", "M4 Max", "--chip", "m4 max")["contracts"]:
        assert [machine["name"] for machine in found["machines"]] == ["M4 Max"]


def test_an_unknown_chip_is_told_which_there_are_and_what_to_do_for_another() -> None:
    stderr = zoo("plan", DENSE, "--contracts", "--chip", "Z9").stderr
    assert "M4 Pro; M4 Max, 32-core GPU; M4 Max; M3 Ultra" in stderr
    assert "--bandwidth GB/s, and with --contracts also --tflops N." in stderr


@pytest.mark.parametrize("arguments", [(), ("--compare",), ("--contracts",)])
def test_a_target_that_is_no_mac_has_no_macs_unless_they_are_named(arguments: tuple[str, ...]) -> None:
    asked = ("plan", DENSE, "--target", "ios18", "--recipe", "int8hu", *arguments)
    output = zoo(*asked).output
    assert "M4" not in output and "The chips that are known run macOS: " in output
    assert re.search(r"\bM5\b", zoo(*asked, "--chip", "M5").output)
    assert "100 GB/s" in zoo(*asked, "--bandwidth", "100").output


def test_one_chip_can_be_asked_for_in_an_ordinary_plan() -> None:
    plan = json.loads(zoo("plan", DENSE, "--chip", "M4", "--chip", "M3 Ultra", "--json").stdout)
    assert [machine["name"] for machine in plan["machines"]] == ["M4", "M3 Ultra"]


@pytest.mark.parametrize(
    ("options", "machines"),
    [
        (("--chip", "M4 Pro"), ["M4 Pro"]),
        (("--chip", "M4"), []),
        (("--bandwidth", "400"), ["M4 Max", "M4 Pro"]),
        ((), ["M4 Max", "M4 Pro"]),
    ],
)
def test_what_was_published_is_told_of_the_chips_that_are_asked_for(
    options: tuple[str, ...], machines: list[str]
) -> None:
    output = " ".join(zoo("plan", DENSE, *options).output.split())
    assert re.findall(r"Published: [\d.]+ tokens/s on (M4 \w+)", output) == machines


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_every_contract_is_compared_on_the_chips_that_were_measured() -> None:
    found = compared()
    assert [option["contract"] for option in found["contracts"]] == list(CONTRACTS)
    assert (found["prompt_tokens"], found["left_out"]) == (2000, {})
    assert found["efficiency"] == {"share": EFFICIENCY, "source": EFFICIENCY_SOURCE}
    for option in found["contracts"]:
        plan = planned(DENSE, option["contract"])
        assert option["asset_bytes"] == plan.asset
        assert (option["states"]["context"], option["states"]["bytes"]) == (plan.context, plan.state_bytes)
        assert option["systems"] == [str(system) for system in CONTRACTS[option["contract"]].systems]
        for machine in option["machines"]:
            chip, expected = CHIP[machine["name"]], reading(DENSE, option["contract"], machine["name"])
            rate = tokens_per_second(plan.read, chip.bandwidth, EFFICIENCY)
            assert machine["tokens_per_second_at_efficiency"] == rate
            assert machine["prompt_bound"] == expected.bound
            assert machine["least_seconds_to_first_token"] == expected.seconds
        assert [machine["name"] for machine in option["machines"]] == list(MEASURED)
    assert {option["contract"]: option["states"]["context"] for option in found["contracts"]} == {
        **dict.fromkeys(CONTRACTS, 32768),
        FIXED: 4096,
    }


def test_what_both_forms_for_programs_say_is_said_alike() -> None:
    asked = ("--chip", "M4 Max", "--target", "macos27.0")
    found = compared(*asked)
    (option,) = (each for each in found["contracts"] if each["contract"] == "static-s1")
    plan = json.loads(zoo("plan", DENSE, *asked, "--json").stdout)
    for here, there, more in (
        (found, plan, {"prompt_tokens", "tflops_source", "contracts", "left_out"}),
        (option, plan, {"systems", "prompt_calls", "prompt_tokens_per_call", "machines"}),
        (option["machines"][0], plan["machines"][0], None),
    ):
        common = set(here) & set(there) - {"machines"}
        assert {key: here[key] for key in common} == {key: there[key] for key in common}
        assert more is None or set(here) - common == more
    assert set(plan["machines"][0]) < set(option["machines"][0])
    assert (plan["target"], plan["backend"], plan["bundle"]) == ("macOS 27.0", "coreai", option["bundle"])
    assert {"name", "entry", "recipe", "efficiency", "target"} <= set(found)


def test_the_text_has_what_json_has() -> None:
    output = zoo("plan", DENSE, "--contracts", "--chip", "M4 Max").output
    (option,) = (each for each in compared("--chip", "M4 Max")["contracts"] if each["contract"] == "chunked")
    (machine,) = option["machines"]
    first, second = (re.split(r"  +", line) for line in output.splitlines() if line.startswith("chunked  "))
    assert first[1:] == [
        "macOS 27.0 or later",
        "coreai",
        "32,768",
        "2.1 GiB",
        f"{option['asset_bytes']:,}",
        f"{option['decode']['read_per_token']:,}",
        "250",
    ]
    assert second[1:] == [
        f"{machine['fits_from_gib']} GB",
        f"{machine['tokens_per_second_at_efficiency']:.1f}",
        f"{machine['prompt_bandwidth_bound']:,.1f}",
        f"{machine['prompt_compute_bound']:,.1f}",
        f"{machine['prompt_bound']:,.1f}",
        f"{machine['least_seconds_to_first_token']:,.1f} s",
    ]
    assert "   at the most   first token, at the earliest\n" in output
    assert f"Decode at 79 % of the bandwidth: {EFFICIENCY_SOURCE}" in output
    assert "Predictions. Decode: bandwidth x 0.79 / bytes read per token." in output
    assert "1 - (1 - k/E)^T" not in output
    assert "1 - (1 - k/E)^T" in zoo("plan", MOE, "--contracts").output


def test_the_contracts_are_those_that_the_target_runs() -> None:
    assert [each["contract"] for each in compared("--target", "macos15")["contracts"]] == ["fixed-s1"]
    assert DYNAMIC.name not in {each["contract"] for each in compared("--target", "macos27.0")["contracts"]}


def test_a_contract_that_cannot_be_is_left_out_with_the_reason() -> None:
    found = compared("--recipe", "mix68")
    assert FIXED not in [each["contract"] for each in found["contracts"]]
    assert "int6" in found["left_out"][FIXED]
    output = zoo("plan", DENSE, "--contracts", "--recipe", "mix68").output
    assert f"{FIXED} is left out: {found['left_out'][FIXED]}" in output
    long = compared("--prompt-tokens", "5000")
    assert long["left_out"] == {
        FIXED: "A prompt of 5,000 tokens leaves no room for an answer in a context of 4,096: the longest is 4,095."
    }
    assert FIXED in compared("--prompt-tokens", "4096")["left_out"]
    assert not compared("--prompt-tokens", "4095")["left_out"]


def test_an_overlay_that_counts_no_operations_is_planned_by_its_weights_alone(tmp_path: Path) -> None:
    sizes = {"vocab_size": 264, "hidden_size": 64, "layers": 2, "intermediate_size": 96}
    sizes |= {"heads": 4, "kv_heads": 2, "head_dim": 16, "max_context_length": 64}
    write_json(tmp_path / "config.json", {"model_type": toy_plugin.MODEL_TYPE, **sizes})
    plugins = Plugins()
    plugins.register(builtin, "coreai")
    plugins.register(toy_plugin.ToyPlugin(Path("none.toml")), "toys")
    arguments = ("plan", "--checkpoint", tmp_path, "--recipe", "fp16", "--contracts", "--prompt-tokens", "20")
    result = zoo(*arguments, plugins=plugins)
    assert result.exit_code == 0, result.output
    assert "two for each weight and token and nothing else." in result.output
    option = json.loads(zoo(*arguments, "--json", plugins=plugins).stdout)["contracts"][0]
    assert option["contract"] == "static-s1" and option["prompt_calls"] == 20


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--compare",), "--contracts compares all of them: it goes with neither --compare nor --contract nor"),
        (("--contract", "chunked"), "--contracts compares all of them"),
        (("--backend", "coreml"), "--contracts compares all of them"),
        ((MOE,), "This asks for several plans. Name one model and one recipe, whose contracts are compared"),
        (("--recipe", "fp16", "--recipe", "int8hu"), "This asks for several plans. Name one model and one recipe"),
        (("--recipe", "int3"), "There is no recipe 'int3'"),
        (("--chip", "M4 Mex"), "No chip is called 'M4 Mex'. Did you mean M4 Max"),
        (("--tflops", "10"), "--tflops is of the machine that --bandwidth is of."),
        (("--chip", "M4", "--bandwidth", "100"), "--bandwidth is of another machine than --chip."),
        (
            ("--prompt-tokens", "32768"),
            "A prompt of 32,768 tokens leaves no room for an answer in a context of 32,768: the longest is 32,767. "
            "Shorten it, or allow more with --max-context 32769 or above.",
        ),
        (("--target", "macos14"), "macOS 14 is not known to run any of the contracts that there are: static-s1"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments: tuple[str, ...], complaint: str) -> None:
    result = zoo("plan", DENSE, "--contracts", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert complaint in result.stderr


@pytest.mark.parametrize("arguments", [("--prompt-tokens", "2000"), ("--bandwidth", "100", "--tflops", "5")])
def test_what_is_of_prompts_is_refused_where_nothing_is_said_of_prompts(arguments: tuple[str, ...]) -> None:
    for more in ((), ("--compare",)):
        result = zoo("plan", DENSE, *arguments, *more)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "Pass --contracts to see" in result.stderr


def test_the_page_shows_the_comparison_that_the_command_prints(root: Path) -> None:
    page = (root / "docs" / "contracts.md").read_text(encoding="utf-8")
    for model in (DENSE, MOE):
        tables = zoo("plan", model, "--contracts").stdout.partition("\n\nPredictions. ")[0]
        assert f"<!-- output: zoo plan {model} --contracts -->\n\n```text\n{tables}\n```\n" in page
