"""`zoo list`: what there is to build."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click

from coreai_zoo.build.chips import EFFICIENCY, EFFICIENCY_SOURCE, GPU_SHARE_SOURCE
from coreai_zoo.catalogue import load_entries
from coreai_zoo.cli.plan_machines import figure
from coreai_zoo.commands import (
    Column,
    json_option,
    new_table,
    plugins_of,
    print_json,
    print_table,
    print_text,
    say_next,
)
from coreai_zoo.dtypes import size
from coreai_zoo.entry import Entry
from coreai_zoo.errors import zoo_command
from coreai_zoo.planning.describe import IDEAL_GATHERING
from coreai_zoo.planning.machines import Fit, Machine, fitting, parse_machine


def _billions(parameters: int | None) -> str:
    return "unknown" if parameters is None else f"{parameters / 1e9:.1f} B"


@click.command("list")
@click.option(
    "--for",
    "machine",
    metavar="MACHINE",
    help='Only what fits in a machine, chip and memory: "M4 Pro 48GB". The memory alone will do.',
)
@json_option
@click.pass_context
def list_entries(ctx: click.Context, machine: str | None, as_json: bool) -> None:
    """What there is to build.

    With --for, what fits in a machine: each recipe of an entry, by the entry's own contract, with the most context
    that fits beside it and the rate of decoding that `zoo plan` predicts.

    \b
    Example:
        zoo list
        zoo list --json | jq '.[].name'
        zoo list --for "M4 Pro 48GB"
    """
    plugins = plugins_of(ctx)
    entries = load_entries(plugins)
    if machine is not None:
        asked = parse_machine(machine)
        fits, reasons = fitting((entry for entry, _ in entries.values()), asked, plugins)
        if as_json:
            print_json(_described(asked, fits, reasons))
        else:
            _print_fitting(asked, fits, reasons)
        return
    _print_entries(entries.values(), as_json=as_json)


def _print_entries(entries: Iterable[tuple[Entry, str]], *, as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "name": entry.name,
                    "ffn": entry.facts.ffn,
                    "parameters": entry.facts.parameters,
                    "recipe": entry.recipe,
                    "contract": entry.contract,
                    "status": entry.status,
                    "plugin": plugin,
                }
                for entry, plugin in entries
            ]
        )
        return
    table = new_table(
        "entry",
        Column("FFN", drop=1),
        Column("parameters", number=True),
        Column("recipe", drop=3),
        Column("contract", drop=4),
        Column("status", drop=2),
        Column("plugin", drop=5),
    )
    for entry, plugin in entries:
        row = (entry.facts.ffn, _billions(entry.facts.parameters), entry.recipe, entry.contract, entry.status, plugin)
        table.add_row(entry.name, *row)
    if not table.rows:
        print_text("No plugin brings any entry: `zoo plugins` shows what is installed.")
        return
    print_table(table)
    say_next("see what it needs", zoo_command("plan", table.rows[0][0]))


# ---------------------------------------------------------------------------------------------------------------------
# What fits in a machine
# ---------------------------------------------------------------------------------------------------------------------


def _print_fitting(machine: Machine, fits: Mapping[str, tuple[Fit, ...]], reasons: Mapping[str, str]) -> None:
    rate = [] if machine.chip is None else [Column(f"tokens/s at {100 * EFFICIENCY:.3g} %", number=True)]
    table = new_table(
        "entry",
        "recipe",
        Column("contract", drop=2),
        Column("asset", number=True, drop=1),
        Column("context at most", number=True),
        *rate,
        title=f"{machine}: the GPU may hold {size(machine.gpu_bytes)}",
    )
    for name, found in fits.items():
        for fit in found:
            design = fit.plan.design
            cells = [design.recipe.name, design.contract.name, size(fit.plan.asset), f"{fit.context:,}"]
            table.add_row(name, *cells, *([] if machine.chip is None else [figure(fit.rate)]))
    if table.rows:
        print_table(table)
        click.echo()
    else:
        print_text(f"{table.title}. Nothing fits.\n")
    for name, reason in reasons.items():
        print_text(f"{name} does not fit: {reason}.".replace("..", "."))
    print_text(f"Fits: asset and states, nothing of the engine's own. {GPU_SHARE_SOURCE}")
    print_text("A bundle allows less context than fits until it is built with --max-context N; see `zoo plan`.")
    if machine.chip is not None:
        print_text(f"The rate at {100 * EFFICIENCY:.3g} % of the bandwidth: {EFFICIENCY_SOURCE}")
    if machine.chip is not None and any(fit.plan.gathers for found in fits.values() for fit in found):
        print_text(IDEAL_GATHERING)
    every = [fit.plan for found in fits.values() for fit in found]
    usual = [plan for plan in every if plan.design.entry and plan.design.recipe.name == plan.design.entry.recipe]
    if usual:
        largest = max(usual, key=lambda plan: plan.asset)
        say_next("build one of them", zoo_command("build", largest.name))
    elif table.rows:  # only what is smaller than usual
        say_next("see what is known of recipes", zoo_command("recipes", table.rows[-1][0]))


def _described(machine: Machine, fits: Mapping[str, tuple[Fit, ...]], reasons: Mapping[str, str]) -> Mapping[str, Any]:
    return {
        "chip": machine.chip.name if machine.chip else None,
        "memory_gib": machine.memory,
        "gpu_bytes": machine.gpu_bytes,
        "efficiency": EFFICIENCY,
        "fits": [
            {
                "entry": name,
                "recipe": fit.plan.design.recipe.name,
                "contract": fit.plan.design.contract.name,
                "asset_bytes": fit.plan.asset,
                "most_context": fit.context,
                "tokens_per_second_at_efficiency": fit.rate,
            }
            for name, found in fits.items()
            for fit in found
        ],
        "does_not_fit": dict(reasons),
    }
