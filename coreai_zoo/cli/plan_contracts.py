"""What `zoo plan --contracts` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from coreai_zoo.build.chips import GPU_SHARE_SOURCE, TFLOPS_SOURCE, Chip, tokens_per_second
from coreai_zoo.commands import Column, new_table, print_table, print_text
from coreai_zoo.planning.contracts import Option, Options
from coreai_zoo.planning.prompts import counts_operations, read_on


def print_contracts(options: Options, chips: Sequence[Chip], efficiency: float, prompt_tokens: int) -> None:
    """The contracts, then what each chip would do with them."""
    plan = options.options[0].plan
    _print_bundles(options.options, f"{plan.name}: {plan.design.recipe.published_name}")
    for chip in chips:
        click.echo()
        _print_chip(options.options, chip, efficiency, prompt_tokens)
    click.echo()
    for name, reason in options.left_out.items():
        print_text(f"{name} is left out: {reason}")
    for line in _explanations(options, chips, efficiency):
        print_text(line)


def _print_bundles(options: Sequence[Option], title: str) -> None:
    table = new_table(
        "contract",
        "needs",
        Column("backend", drop=3),
        Column("asset", number=True),
        Column("read per token", number=True, drop=2),
        Column("tokens of a prompt per call", number=True, drop=1),
        title=title,
    )
    for option in options:
        design = option.plan.design
        table.add_row(
            design.contract.name,
            design.contract.needed_system or "not known",
            design.backend.name,
            f"{option.plan.asset:,}",
            f"{option.plan.read:,}",
            f"{max(call.tokens for call in option.calls):,}",
        )
    print_table(table)


def _print_chip(options: Sequence[Option], chip: Chip, efficiency: float, prompt_tokens: int) -> None:
    arithmetic = "arithmetic not known" if chip.tflops is None else f"{chip.tflops:g} TFLOPS"
    table = new_table(
        "contract",
        Column("fits from", number=True, drop=3),
        Column(f"decode at {100 * efficiency:.0f} %", number=True),
        Column("prompt by bandwidth", number=True, drop=2),
        Column("by arithmetic", number=True, drop=1),
        Column("at the most", number=True),
        Column(f"first token after {prompt_tokens:,}", number=True),
        title=f"{chip.name}: {chip.bandwidth:g} GB/s, {arithmetic}; tokens/s",
    )
    for option in options:
        reading = read_on(chip, option.calls)
        compute = "" if reading.compute_bound is None else f"{reading.compute_bound:,.1f}"
        table.add_row(
            option.plan.design.contract.name,
            fits_from(chip, option.plan.resident),
            f"{tokens_per_second(option.plan.read, chip.bandwidth, efficiency):.1f}",
            f"{reading.bandwidth_bound:,.1f}",
            compute,
            f"{reading.bound:,.1f}",
            f"{reading.seconds:,.1f} s",
        )
    print_table(table)


def fits_from(chip: Chip, resident: int) -> str:
    """The smallest memory of a chip that holds so many bytes, in words; empty where its sizes are not known."""
    if not chip.memory:
        return ""
    smallest = chip.smallest_memory(resident)
    return "does not" if smallest is None else f"{smallest} GB"


def _explanations(options: Options, chips: Sequence[Chip], efficiency: float) -> list[str]:
    """Where the predictions come from: their formulas, and the sources of the chips' figures."""
    plan = options.options[0].plan
    beside = ", and what attention and recurrences take beside" if counts_operations(plan) else " and nothing else"
    lines = [
        f"Predictions. Decode: bandwidth x {efficiency:g} / bytes read per token. A prompt: of each call the longer of "
        "bytes / bandwidth and operations / TFLOPS, both at 100 %: an engine stays below, the more so where steps of a "
        "recurrence wait for each other. A call reads each weight once; operations are two for each weight and token"
        f"{beside}. The last token is decoded.",
    ]
    if plan.dense_read > plan.read:
        lines.append(
            "Of E experts, k for a token, a call of T tokens reads the share 1 - (1 - k/E)^T, as if all were chosen "
            "equally often and none read in vain."
        )
    if any(chip.tflops is not None for chip in chips):
        lines.append(f"TFLOPS: {TFLOPS_SOURCE}")
    if any(chip.tflops is None for chip in chips):
        lines.append("Where the arithmetic is not known, a prompt is bounded by the bandwidth alone.")
    if any(chip.memory for chip in chips):
        lines.append(f"Fits: asset and states, nothing of the engine's own. {GPU_SHARE_SOURCE}")
    return lines


def describe_contracts(
    options: Options, chips: Sequence[Chip], efficiency: float, prompt_tokens: int
) -> Mapping[str, Any]:
    """The same for a program."""
    return {
        "prompt_tokens": prompt_tokens,
        "efficiency": efficiency,
        "contracts": [_described(option, chips, efficiency) for option in options.options],
        "left_out": dict(options.left_out),
        "tflops_source": TFLOPS_SOURCE,
    }


def _described(option: Option, chips: Sequence[Chip], efficiency: float) -> Mapping[str, Any]:
    plan = option.plan
    return {
        "contract": plan.design.contract.name,
        "systems": [str(system) for system in plan.design.contract.systems],
        "backend": plan.design.backend.name,
        "bundle": plan.design.name,
        "asset_bytes": plan.asset,
        "read_per_token": plan.read,
        "prompt_calls": len(option.calls),
        "prompt_tokens_per_call": max(call.tokens for call in option.calls),
        "machines": [
            {
                "name": chip.name,
                "bandwidth_gb_per_second": chip.bandwidth,
                "tflops": chip.tflops,
                "fits_from_gib": chip.smallest_memory(plan.resident),
                "decode_tokens_per_second": tokens_per_second(plan.read, chip.bandwidth, efficiency),
                "prompt_bandwidth_bound": reading.bandwidth_bound,
                "prompt_compute_bound": reading.compute_bound,
                "prompt_tokens_per_second": reading.bound,
                "seconds_to_first_token": reading.seconds,
            }
            for chip in chips
            for reading in (read_on(chip, option.calls),)
        ],
    }
