"""`zoo plan`: what a bundle would hold, need and run at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from attrs import asdict, evolve

from coreai_zoo.build.chips import EFFICIENCY, GPU_SHARE_SOURCE, MEASURED, tokens_per_second
from coreai_zoo.build.request import DEFAULT_BACKEND, BuildRequest
from coreai_zoo.cli.completion import complete_entry
from coreai_zoo.cli.plan_contracts import describe_contracts, print_contracts
from coreai_zoo.cli.plan_machines import (
    NO_MACHINES,
    Machines,
    describe_efficiency,
    figure,
    find_machines,
    fits_from,
)
from coreai_zoo.cli.recipe_option import print_misfits, recipe_option
from coreai_zoo.cli.target import target_option
from coreai_zoo.commands import (
    Column,
    Headed,
    Number,
    json_option,
    new_table,
    plugins_of,
    print_json,
    print_rows,
    print_table,
    print_text,
    say_next,
)
from coreai_zoo.contracts import CONTRACTS, MINIMUM_CONTEXT
from coreai_zoo.dtypes import size
from coreai_zoo.errors import BadInput, argument, zoo_command
from coreai_zoo.overlay import COMMON_ROLES
from coreai_zoo.planning.contracts import PROMPT_TOKENS, compare_contracts
from coreai_zoo.planning.describe import (
    IDEAL_GATHERING,
    describe_bundle,
    describe_decode,
    describe_model,
    describe_published,
)
from coreai_zoo.planning.plan import Plan, plans_by_recipe
from coreai_zoo.planning.plan import plan as make_plan
from coreai_zoo.recipes import one_or_several, stored_text

_RATES = (1e-3, 1e6)  # GB/s and TFLOPS of anything that may be a machine: with these nothing overflows or vanishes


@click.command(
    "plan",
    cls=Headed,
    headings={
        "checkpoints": "What is planned",
        "chips": "Machines",
        "compare": "Side by side",
        "as_json": "What is printed",
    },
)
@click.argument("models", metavar="[MODEL]...", nargs=-1, shell_complete=complete_entry)
@click.option(
    "--checkpoint",
    "checkpoints",
    type=click.Path(path_type=Path),
    metavar="DIR",
    multiple=True,
    help="A checkpoint, or a folder with nothing but its config.json, instead of an entry.",
)
@recipe_option("A name from `zoo recipes`, or a TOML file. Default: the entry's.", "recipes", multiple=True)
@click.option("--contract", metavar="C", help=f"Engine contract: {', '.join(CONTRACTS)}. Default: the entry's.")
@click.option("--backend", metavar="B", help=f"coreai or coreml. Default: {DEFAULT_BACKEND}, or the target's.")
@target_option
@click.option(
    "--context",
    "--max-context",
    type=click.IntRange(MINIMUM_CONTEXT),
    metavar="N",
    help="Positions to count states at.",
)
@click.option("--chip", "chips", metavar="NAME", multiple=True, help="Of the machines only this; may be repeated.")
@click.option("--bandwidth", type=Number(*_RATES), metavar="GB/s", help="Of another machine.")
@click.option(
    "--tflops",
    type=Number(*_RATES),
    metavar="N",
    help="Of that machine's GPU, in half precision: bounds how fast it reads a prompt.",
)
@click.option(
    "--efficiency",
    type=Number(0.001, 1),
    metavar="SHARE",
    help=f"Of the bandwidth that decode reaches. Default: {EFFICIENCY}, from a published measurement.",
)
@click.option("--compare", is_flag=True, help="Several entries or recipes side by side. Default: every recipe.")
@click.option(
    "--contracts",
    is_flag=True,
    help=f"The contracts side by side: rates of decoding and of prompts, on {' and '.join(MEASURED)} by default.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    metavar="N",
    help=f"Tokens of the prompt for --contracts. Default: {PROMPT_TOKENS}, or what the context allows.",
)
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    models: tuple[str, ...],
    checkpoints: tuple[Path, ...],
    recipes: tuple[str, ...],
    compare: bool,
    contracts: bool,
    prompt_tokens: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """What a bundle would hold, need and run at, from a config alone.

    MODEL is an entry, a repository on the Hugging Face hub, of which config.json and the index are fetched, or a
    folder. Of an entry the facts are taken, and nothing is fetched. No weight is read. Sizes are exact up to the
    graph's few megabytes. Rates are predictions: a decoded token reads every weight but the embedding table (of
    experts, the chosen ones), and nothing but the memory takes time. Reading the states comes on top, and grows
    with the context.

    --contracts compares what a bundle of each contract needs, how fast it decodes, and what memory and arithmetic
    of a chip allow for a prompt.

    \b
    Example:
        zoo plan qwen3.6-27b
        zoo plan qwen3.6-27b --recipe int4lin --context 8192 --bandwidth 400
        zoo plan Qwen/Qwen3.6-27B
        zoo plan ~/some-sibling
        zoo plan qwen3.6-27b --target macos15
        zoo plan qwen3.6-27b --contracts --chip "M4 Max"
        zoo plan qwen3.6-27b --contracts --target ios18 --bandwidth 100
        zoo plan qwen3.6-27b --compare
        zoo plan qwen3.6-27b qwen3.6-35b-a3b --compare --json
    """
    if not models and not checkpoints:
        raise BadInput(
            "There is nothing to plan.", "Name an entry, a repository or a folder; `zoo list` shows entries."
        )
    _require_one_question(given, prompt_tokens, contracts=contracts, compare=compare)
    plugins = plugins_of(ctx)
    several = len(models) + len(checkpoints) > 1
    every_recipe = compare and not several and not recipes
    chosen: Sequence[str | None] = recipes or (None,)
    if not compare and (several or len(chosen) > 1):
        raise BadInput(
            "This asks for several plans.",
            "Name one model and one recipe, whose contracts are compared; --checkpoint DIR is one by itself."
            if contracts
            else "Pass --compare to see them side by side, or name one: --checkpoint DIR is one by itself.",
        )
    asked = BuildRequest(
        recipe=chosen[0],
        contract=given["contract"],
        backend=given["backend"],
        target=given["target"],
        max_context=given["context"],
        dry=True,
    )
    subjects = [evolve(asked, model=name) for name in models] + [evolve(asked, checkpoint=path) for path in checkpoints]
    machines = find_machines(given, measured=contracts)
    if contracts:
        options = compare_contracts(subjects[0], plugins, prompt_tokens)
        if as_json:
            print_json(describe_contracts(options, machines))
        else:
            print_contracts(options, machines)
            fewest = min(options.options, key=lambda option: len(option.calls))
            contract = fewest.plan.design.contract
            if contract.on_devices:
                click.echo(f"Of {contract.name}: {contract.on_devices}", err=True)
            say_next(
                "build what reads a prompt in the fewest calls",
                zoo_command(*_words(subjects[0]), "--contract", contract.name),
            )
        return
    if every_recipe:
        by_recipe, misfits = plans_by_recipe(subjects[0], plugins)
        plans = [*by_recipe.values()]
    else:
        misfits = {}
        plans = [make_plan(evolve(subject, recipe=recipe), plugins) for recipe in chosen for subject in subjects]
    if as_json:
        described = [_described(made, machines) for made in plans]
        print_json(described if compare else described[0])
    elif compare:
        _print_side_by_side(plans, machines)
        print_misfits(misfits)
        usual = evolve(subjects[0], recipe=None) if len(chosen) > 1 else subjects[0]
        say_next("build the usual one", zoo_command(*_words(usual)))
    else:
        _print(plans[0], machines)
        say_next("build it", zoo_command(*_words(subjects[0])))


def _words(asked: BuildRequest) -> list[object]:
    """The words of the command that builds what was planned."""
    options = {
        "--recipe": asked.recipe,
        "--contract": asked.contract,
        "--backend": asked.backend,
        "--target": asked.target.target if asked.target else None,
        "--max-context": asked.max_context,
    }
    given = [word for option, value in options.items() if value is not None for word in (option, value)]
    model = asked.model if asked.model is not None else asked.checkpoint
    return ["build", argument(model or ""), *given]


def _require_one_question(
    given: Mapping[str, Any], prompt_tokens: int | None, *, contracts: bool, compare: bool
) -> None:
    """Refuse options that contradict each other, or that would be passed over.

    Raises:
        BadInput: naming them.
    """
    if contracts and (compare or given["contract"] or given["backend"]):
        raise BadInput(
            "--contracts compares all of them: it goes with neither --compare nor --contract nor --backend.",
            "Leave one of them out; --target leaves only the contracts that a system runs.",
        )
    if not contracts and given["tflops"] is not None:
        raise BadInput("--tflops bounds how fast a prompt is read.", "Pass --contracts to see that.")
    if not contracts and prompt_tokens is not None:
        raise BadInput("--prompt-tokens is the length of a prompt that is read.", "Pass --contracts to see how fast.")


# ---------------------------------------------------------------------------------------------------------------------
# One plan
# ---------------------------------------------------------------------------------------------------------------------


def _print(plan: Plan, machines: Machines) -> None:
    design = plan.design
    status = f", {design.entry.status}" if design.entry else ""
    target = f" for {design.request.target}" if design.request.target else ""
    print_text(
        f"{plan.name}{status}: {design.recipe.published_name}, contract {design.contract.name}, backend "
        f"{design.backend.name}{target}, overlay {design.model.overlay.name} of plugin {design.model.plugin}\n"
    )
    _print_roles(plan)
    click.echo()
    print_rows(_figures(plan))
    click.echo()
    if machines.chips:
        _print_rates(plan, machines)
        click.echo()
    for note in plan.design.notes:
        print_text(f"Note: {note}.")
    for measured in plan.published:
        if not machines.leave_out(measured.machine):
            print_text(f"Published: {measured.sentence}.")
    if not machines.chips:
        print_text(NO_MACHINES)
        return
    print_text(f"The rate {machines.at_efficiency} of the bandwidth: {machines.efficiency_source}")
    if plan.gathers:
        print_text(IDEAL_GATHERING)
    if any(chip.memory for chip in machines.chips):
        print_text(f"Fits: asset and states, nothing of the engine's own. {GPU_SHARE_SOURCE}")


def _print_roles(plan: Plan) -> None:
    table = new_table(
        "role",
        Column("tensors", number=True, drop=4),
        Column("parameters", number=True, drop=2),
        "stored as",
        Column("bits", number=True, drop=3),
        Column("bytes", number=True),
        Column("read per token", number=True, drop=1),
    )
    for role in plan.roles:
        stored = f"with the {role.stored_with}" if role.stored_with else stored_text(role.specs)
        bits = "" if role.bits is None else f"{role.bits:.2f}"
        numbers = (bits, f"{role.bytes:,}", f"{role.read:,}")
        table.add_row(role.role, str(role.tensors), f"{role.parameters:,}", stored, *numbers)
    table.add_row(
        "all",
        str(len(plan.design.weights.tensors)),
        f"{plan.design.weights.parameters:,}",
        "",
        f"{plan.bits:.2f}",
        f"{plan.design.weights.stored_bytes:,}",
        f"{plan.read:,}",
    )
    print_table(table)
    common = {role.meaning for role in COMMON_ROLES}
    if own := [f"{role.role}: {role.meaning}" for role in plan.roles if role.meaning not in common]:
        print_text(f"\n{'; '.join(own)}")


def _figures(plan: Plan) -> list[tuple[str, str]]:
    """The figures of a plan, as pairs of a name and a text."""
    tokenizer = "with" if plan.tokenizer else "without"
    figures = [
        ("asset", f"{plan.asset:,} bytes ({size(plan.asset)}){_published_size(plan)}"),
        ("bundle", f"{plan.bundle:,} bytes ({size(plan.bundle)}), {tokenizer} the tokenizer's files"),
        ("read per token", f"{plan.read:,} bytes ({size(plan.read)})"),
    ]
    if plan.gathers:
        dense = f"{plan.dense_read:,} bytes ({size(plan.dense_read)}) if every expert were read"
        figures.append(("", dense))
    states = ", ".join(f"{name} {size(count)}" for name, count in plan.states.items())
    return [
        *figures,
        ("states", f"{plan.state_bytes:,} bytes ({size(plan.state_bytes)}) at {plan.context:,} positions: {states}"),
        ("", f"{plan.growth:,} bytes more with each position; a token reads them all"),
        ("build", f"{plan.build}; needs {size(plan.build.least_memory)} of memory at least"),
    ]


def _published_size(plan: Plan) -> str:
    sizes = [measured.asset_bytes for measured in plan.published if measured.asset_bytes]
    return "".join(f"; published: {known:,} ({100 * (plan.asset / known - 1):+.3f} %)" for known in sizes)


def _print_rates(plan: Plan, machines: Machines) -> None:
    dense = plan.gathers
    every_expert = [Column("every expert, 100 %", number=True, drop=3)] if dense else []
    table = new_table(
        "machine",
        Column("GB/s", number=True, drop=4),
        Column("fits from", number=True),
        Column("tokens/s at 100 %", number=True, drop=2),
        Column(machines.at_efficiency, number=True),
        *every_expert,
        Column("published", number=True, drop=1),
    )
    for chip in machines.chips:
        rates = [tokens_per_second(plan.read, chip.bandwidth, share) for share in (1.0, machines.efficiency)]
        rates += [tokens_per_second(plan.dense_read, chip.bandwidth)] if dense else []
        published = ", ".join(f"{known.decode:g}" for known in plan.published if known.machine == chip.name)
        table.add_row(
            chip.name,
            f"{chip.bandwidth:g}",
            fits_from(chip, plan.resident),
            *map(figure, rates),
            published,
        )
    print_table(table)


# ---------------------------------------------------------------------------------------------------------------------
# Several, side by side
# ---------------------------------------------------------------------------------------------------------------------


def _recipe_names(plans: Sequence[Plan]) -> list[str]:
    """The names of the plans' recipes; where two that differ are called alike, what they were asked for by."""
    recipes = [plan.design.recipe for plan in plans]
    alike = {one.name for one in recipes for other in recipes if one.name == other.name and one.rules != other.rules}
    return [
        str(plan.design.request.recipe) if recipe.name in alike else recipe.name
        for plan, recipe in zip(plans, recipes, strict=True)
    ]


def _print_side_by_side(plans: Sequence[Plan], machines: Machines) -> None:
    recipes = _recipe_names(plans)
    one_name = len({plan.name for plan in plans}) == 1
    one_recipe = len(set(recipes)) == 1
    heads = recipes if one_name else [plan.name for plan in plans]
    if not one_name and not one_recipe:
        heads = [f"{plan.name} {recipe}" for plan, recipe in zip(plans, recipes, strict=True)]
    title = plans[0].name if one_name else recipes[0] if one_recipe else None
    table = new_table("", *(Column(head, number=True) for head in heads), title=title)
    rows: list[tuple[str, list[str]]] = [
        ("contract", [plan.design.contract.name for plan in plans]),
        ("backend", [plan.design.backend.name for plan in plans]),
        ("parameters", [f"{plan.design.weights.parameters:,}" for plan in plans]),
        ("bits per parameter", [f"{plan.bits:.2f}" for plan in plans]),
        ("asset", [f"{plan.asset:,}" for plan in plans]),
        ("read per token", [f"{plan.read:,}" for plan in plans]),
        ("with every expert", [f"{plan.dense_read:,}" if plan.gathers else "" for plan in plans]),
        ("context", [f"{plan.context:,}" for plan in plans]),
        ("states", [f"{plan.state_bytes:,}" for plan in plans]),
        ("a build reads", [size(plan.build.read) for plan in plans]),
        ("writes", [size(plan.build.written) for plan in plans]),
    ]
    for chip in machines.chips:
        rates = [tokens_per_second(plan.read, chip.bandwidth, machines.efficiency) for plan in plans]
        fits = [fits_from(chip, plan.resident) for plan in plans]
        cells = [f"{figure(rate)}{f' ({fit})' if fit else ''}" for rate, fit in zip(rates, fits, strict=True)]
        rows.append((f"tokens/s, {chip.name}", cells))
    for name, cells in rows:
        if any(cells):
            table.add_row(name, *cells)
    print_table(table)
    click.echo()
    if not machines.chips:
        print_text(NO_MACHINES)
        return
    print_text(f"Rates {machines.at_efficiency} of the bandwidth: {machines.efficiency_source}")
    if any(chip.memory for chip in machines.chips):
        print_text(f"In parentheses, the memory from which it fits. {GPU_SHARE_SOURCE}")


# ---------------------------------------------------------------------------------------------------------------------
# For programs
# ---------------------------------------------------------------------------------------------------------------------


def _described(plan: Plan, machines: Machines) -> Mapping[str, Any]:
    return {
        **describe_model(plan),
        **describe_bundle(plan),
        "facts": dict(plan.design.model.facts),
        "notes": list(plan.design.notes),
        "parameters": plan.design.weights.parameters,
        "roles": {
            role.role: {
                "meaning": role.meaning,
                "tensors": role.tensors,
                "parameters": role.parameters,
                "stored_as": one_or_several([None if spec is None else asdict(spec) for spec in role.specs]),
                "bits": role.bits,
                "bytes": role.bytes,
                "stored_with": role.stored_with,
                "read_per_token": role.read,
            }
            for role in plan.roles
        },
        "build": plan.build.as_json(),
        "efficiency": describe_efficiency(machines),
        "machines": [describe_decode(plan, chip, machines.efficiency) for chip in machines.chips],
        "published": describe_published(plan),
    }
