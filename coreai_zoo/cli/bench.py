"""`zoo bench`: how fast a bundle reads and writes on this machine."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import click

from coreai_zoo import __version__
from coreai_zoo.backend import Backend
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import find_bundle
from coreai_zoo.cli.after import say_what_is_next
from coreai_zoo.cli.completion import complete_bundle
from coreai_zoo.cli.generation import interpreter_note
from coreai_zoo.commands import (
    Column,
    json_option,
    new_table,
    plugins_of,
    print_json,
    print_table,
    print_text,
)
from coreai_zoo.contracts import benchmark_command
from coreai_zoo.dtypes import size
from coreai_zoo.entry import Published
from coreai_zoo.errors import BadInput, CheckFailed
from coreai_zoo.machine import operating_system, physical_memory, processor
from coreai_zoo.planning.machines import parse_machine
from coreai_zoo.progress import Reporter
from coreai_zoo.toml_files import toml_lines

if TYPE_CHECKING:
    from coreai_zoo.bundle.bench import Measured, Run

_FIGURES: tuple[tuple[str, str, Callable[[Run], float]], ...] = (
    ("load", "s", lambda run: run.load),
    ("first_token", "s", lambda run: run.first_token),
    ("prefill", "tokens/s", lambda run: run.prefill_rate),
    ("decode", "tokens/s", lambda run: run.decode_rate),
)
"""Name, unit and what it is of a run, in the order in which they happen."""

_DIGITS = 4  # of a figure that is published; a machine does not repeat more


@click.command("bench")
@click.argument("bundle", metavar="BUNDLE", shell_complete=complete_bundle)
@click.option("-p", "--prompt-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of the prompt.")
@click.option("-g", "--answer-tokens", type=click.IntRange(2), default=128, show_default=True, help="Of the answer.")
@click.option("-n", "--runs", type=click.IntRange(1), default=3, show_default=True, help="How many times.")
@json_option
@click.pass_context
def bench(ctx: click.Context, /, bundle: str, prompt_tokens: int, answer_tokens: int, runs: int, as_json: bool) -> None:
    """Measure how fast a bundle reads and writes on this machine.

    Each run loads the bundle anew, reads a prompt as an engine does, and decodes the most probable token again and
    again. Told are medians with the least and the largest: time to load, time until the first token, tokens of the
    prompt per second, tokens of the answer per second, and how much memory this process took at its peak, what it
    maps of the bundle included.

    On Linux an interpreter runs the bundle, and its figures mean nothing for a Mac. The line for the engine's own
    benchmark is printed with the same numbers.

    BUNDLE is a path or a name, as for `zoo gate`. With --json, `published` has the keys of a table `published` of an
    entry, and `published_toml` is that table; see docs/entries.md. Of a sample or a slice they say that it is one.

    \b
    Example:
        zoo bench qwen3.6-27b
        zoo bench exports/qwen3_6_27b_sample_decode_int8hu_block32_sym -p 16 -g 16 -n 5
        zoo bench qwen3.6-27b --json | jq -r .published_toml >> zoo_entries/qwen3.6-27b.toml
    """
    from coreai_zoo.bundle.bench import bench as measure
    from coreai_zoo.bundle.verify import backend_of, require_asset

    plugins = plugins_of(ctx)
    opened = Bundle.open(find_bundle(bundle, plugins))
    backend = backend_of(opened, plugins.backends())
    require_asset(opened)
    for part in ("recipe", "contract"):  # before anything is measured
        _named(opened, part)
    measured = measure(opened, backend, prompt_tokens, answer_tokens, runs, Reporter(silent=as_json))
    unlike = _unlike_its_entry(opened)
    options = f"-p {prompt_tokens} -g {answer_tokens} -n {runs}"
    published = _published(opened, backend, measured, options, unlike)
    engines = (
        None
        if opened.engine is None
        else benchmark_command(str(opened.directory.resolve()), prompt_tokens, answer_tokens, runs)
    )
    if as_json:
        print_json(_described(opened, measured, published, engines) | {"interpreted": bool(interpreter_note(backend))})
        return
    _print(measured, prompt_tokens, answer_tokens)
    note = interpreter_note(backend)
    if note:
        print_text(note)
    if unlike:
        print_text(f"Nothing for an entry's file: {unlike}, not the model.")
    elif not note:
        click.echo(f"\nFor the entry's file:\n\n{_toml(published)}")
    if engines:
        click.echo(f"The engine's own benchmark, in a checkout of it on a Mac:\n    {engines}")
    say_what_is_next(opened, bundle, plugins)


# ---------------------------------------------------------------------------------------------------------------------
# What was measured
# ---------------------------------------------------------------------------------------------------------------------


def _print(measured: Measured, prompt_tokens: int, answer_tokens: int) -> None:
    by = f"{measured.prefill_calls} of `prefill` and one more" if measured.prefill_calls else f"{prompt_tokens:,}"
    plural = "" if prompt_tokens == 1 else "s"
    print_text(f"A prompt of {prompt_tokens:,} token{plural} ({by} call{plural}), an answer of {answer_tokens:,}.\n")
    table = new_table("", *(Column(name, number=True) for name in ("median", "least", "largest")), "")
    for name, unit, figure in _FIGURES:
        shown = (f"{value:.{_DIGITS}g}" for value in (measured.median(figure), *measured.spread(figure)))
        table.add_row(name.replace("_", " "), *shown, unit)
    print_table(table)
    if measured.peak_memory is not None:
        print_text(f"\nMemory at the peak: {size(measured.peak_memory)}, this process and what it maps of the bundle.")


def _described(bundle: Bundle, measured: Measured, published: Published, engines: str | None) -> dict[str, Any]:
    return {
        "bundle": bundle.directory.name,
        "runs": [{name: figure(run) for name, _, figure in _FIGURES} for run in measured.runs],
        "medians": {name: measured.median(figure) for name, _, figure in _FIGURES},
        "spread": {name: measured.spread(figure) for name, _, figure in _FIGURES},
        "prefill_calls": measured.prefill_calls,
        "peak_memory": measured.peak_memory,
        "published": _known(published),
        "published_toml": _toml(published),
        "llm_benchmark": engines,
    }


# ---------------------------------------------------------------------------------------------------------------------
# As an entry has it
# ---------------------------------------------------------------------------------------------------------------------


def _unlike_its_entry(bundle: Bundle) -> str:
    """Why the figures of a bundle are not those of an entry's model; empty where they are."""
    entry = bundle.build["entry"]
    if bundle.build.get("sample"):
        return "a sample"
    if bundle.build["layers"] != bundle.build.get("whole_layers", bundle.build["layers"]):
        return "a slice"
    if entry is None:
        return "built from no entry"
    if bundle.build["recipe"].get("installed") is False:
        return "built by a recipe file"
    return "built with --custom" if entry.get("differences") else ""


def _published(bundle: Bundle, backend: Backend, measured: Measured, options: str, unlike: str) -> Published:
    interpreted = "by an interpreter, which says nothing about a Mac" if interpreter_note(backend) else ""
    load, first_token, prefill, decode = (_rounded(measured.median(figure)) for _, _, figure in _FIGURES)
    return Published(
        recipe=_named(bundle, "recipe"),
        machine=_machine(),
        decode=decode,
        source=f"zoo bench {options}, {dt.datetime.now(dt.UTC):%Y-%m-%d}",
        asset_bytes=None if unlike else bundle.asset_bytes,
        note=", ".join(filter(None, [unlike and f"{unlike}, not the model", interpreted])) or None,
        contract=_named(bundle, "contract"),
        prompt_tokens=measured.runs[0].prompt_tokens,
        prefill=prefill,
        first_token=first_token,
        load=load,
        peak_memory=measured.peak_memory,
        system=operating_system(),
        versions=", ".join(f"{name} {version}" for name, version in _versions(backend).items()),
    )


def _named(bundle: Bundle, part: str) -> str:
    """The name of the recipe or contract in a bundle's record.

    Raises:
        CheckFailed: when there is none.
    """
    recorded = bundle.build.get(part)
    name = recorded.get("name") if isinstance(recorded, Mapping) else None
    if not isinstance(name, str) or not name:
        raise CheckFailed(f"build.json of {bundle.directory} names no {part}.")
    return name


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _machine() -> str:
    """The chip as `zoo plan` names it; else what the processor is sold as."""
    name, memory = processor(), physical_memory()
    try:
        machine = parse_machine(f"{name} {round((memory or 0) / 2**30)}GB")
    except BadInput:  # no Mac's, or one that is not known yet
        return name.removeprefix("Apple ")
    return machine.chip.name if machine.chip else name


def _versions(backend: Backend) -> dict[str, str]:
    return {**backend.versions, "coreai-zoo": __version__}


def _toml(published: Published) -> str:
    return "\n".join(["[[published]]", *toml_lines(_known(published)), ""])


def _known(published: Published) -> dict[str, Any]:
    return attrs.asdict(published, filter=lambda _, value: value is not None)
