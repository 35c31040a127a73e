"""What `zoo plan --contracts` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from coreai_zoo.build.chips import GPU_SHARE_SOURCE, Chip, tokens_per_second
from coreai_zoo.cli.plan_machines import (
    NO_MACHINES,
    NOT_KNOWN,
    Machines,
    describe_efficiency,
    figure,
    fits_from,
)
from coreai_zoo.commands import Column, new_table, print_table, print_text
from coreai_zoo.dtypes import size
from coreai_zoo.planning.contracts import Option, Options
from coreai_zoo.planning.describe import describe_bundle, describe_decode, describe_model
from coreai_zoo.planning.prompts import counts_operations, read_on


def print_contracts(options: Options, machines: Machines) -> None:
    """The contracts, then what each chip would do with them."""
    plan = options.options[0].plan
    target = f" for {plan.design.request.target}" if plan.design.request.target else ""
    _print_bundles(options.options, f"{plan.name}{target}: {plan.design.recipe.published_name}")
    for chip in machines.chips:
        click.echo()
        _print_chip(options, chip, machines)
    click.echo()
    for name, reason in options.left_out.items():
        print_text(f"{name} is left out: {reason}")
    for line in _explanations(options, machines) if machines.chips else [NO_MACHINES]:
        print_text(line)


def _print_bundles(options: Sequence[Option], title: str) -> None:
    table = new_table(
        "contract",
        "needs",
        Column("backend", drop=4),
        Column("context", number=True),
        Column("states", number=True, drop=3),
        Column("asset", number=True),
        Column("read per token", number=True, drop=2),
        Column("prompt tokens per call", number=True, drop=1),
        title=title,
    )
    for option in options:
        design = option.plan.design
        table.add_row(
            design.contract.name,
            design.contract.needed_system or NOT_KNOWN,
            design.backend.name,
            f"{option.plan.context:,}",
            size(option.plan.state_bytes),
            f"{option.plan.asset:,}",
            f"{option.plan.read:,}",
            f"{max(call.tokens for call in option.calls):,}",
        )
    print_table(table)


def _print_chip(options: Options, chip: Chip, machines: Machines) -> None:
    arithmetic = f"arithmetic {NOT_KNOWN}" if chip.tflops is None else f"{chip.tflops:g} TFLOPS"
    table = new_table(
        "contract",
        Column("fits from", number=True, drop=3),
        Column(f"decode {machines.at_efficiency}", number=True),
        Column("prompt by bandwidth", number=True, drop=2),
        Column("by arithmetic", number=True, drop=1),
        Column("at the most", number=True),
        Column("first token, at the earliest", number=True),
        title=f"{chip.name}: {chip.bandwidth:g} GB/s, {arithmetic}; tokens/s, a prompt of {options.prompt_tokens:,}",
    )
    for option in options.options:
        reading = read_on(chip, option.calls)
        rate = tokens_per_second(option.plan.read, chip.bandwidth, machines.efficiency)
        table.add_row(
            option.plan.design.contract.name,
            fits_from(chip, option.plan.resident),
            *map(figure, (rate, reading.bandwidth_bound, reading.compute_bound, reading.bound)),
            NOT_KNOWN if reading.seconds is None else f"{figure(reading.seconds)} s",
        )
    print_table(table)


def _explanations(options: Options, machines: Machines) -> list[str]:
    """Where the predictions come from: their formulas, and the sources of the chips' figures."""
    plan = options.options[0].plan
    beside = ", and what attention and recurrences take beside" if counts_operations(plan) else " and nothing else"
    lines = [
        f"Predictions. Decode: bandwidth x {machines.efficiency:g} / bytes read per token. A prompt: of each call the "
        "longer of bytes / bandwidth and operations / TFLOPS, both at 100 %: an engine stays below, the more so where "
        "steps of a recurrence wait for each other. A call reads each weight once; operations are two for each "
        f"weight and token{beside}. The last token is decoded.",
        f"Decode {machines.at_efficiency} of the bandwidth: {machines.efficiency_source}",
    ]
    if plan.gathers:
        lines.append(
            "Of E experts, k for a token, a call of T tokens reads the share 1 - (1 - k/E)^T, as if all were chosen "
            "equally often and none read in vain."
        )
    if machines.tflops_source is not None:
        lines.append(f"TFLOPS: {machines.tflops_source}")
    if any(chip.tflops is None for chip in machines.chips):
        lines.append(
            "Where the arithmetic is not known, only the bandwidth bounds a prompt, which says little of calls with "
            "many tokens: what it takes at the least is not known."
        )
    if any(chip.memory for chip in machines.chips):
        lines.append(f"Fits: asset and states, nothing of the engine's own. {GPU_SHARE_SOURCE}")
    return lines


def describe_contracts(options: Options, machines: Machines) -> Mapping[str, Any]:
    """The same for a program."""
    return {
        **describe_model(options.options[0].plan),
        "prompt_tokens": options.prompt_tokens,
        "efficiency": describe_efficiency(machines),
        "tflops_source": machines.tflops_source,
        "contracts": [_described(option, machines) for option in options.options],
        "left_out": dict(options.left_out),
    }


def _described(option: Option, machines: Machines) -> Mapping[str, Any]:
    plan = option.plan
    return {
        **describe_bundle(plan),
        "systems": [str(system) for system in plan.design.contract.systems],
        "prompt_calls": len(option.calls),
        "prompt_tokens_per_call": max(call.tokens for call in option.calls),
        "machines": [
            {
                **describe_decode(plan, chip, machines.efficiency),
                "tflops": chip.tflops,
                "prompt_bandwidth_bound": reading.bandwidth_bound,
                "prompt_compute_bound": reading.compute_bound,
                "prompt_bound": reading.bound,
                "least_seconds_to_first_token": reading.seconds,
            }
            for chip in machines.chips
            for reading in (read_on(chip, option.calls),)
        ],
    }
