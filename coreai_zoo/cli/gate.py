"""`zoo gate`: does a bundle compute what its checkpoint computes, and how far is it off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from attrs import evolve

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import find_bundle
from coreai_zoo.cli.after import say_what_is_next
from coreai_zoo.cli.completion import complete_bundle
from coreai_zoo.commands import (
    Column,
    Headed,
    OneOf,
    json_option,
    new_table,
    plugins_of,
    print_table,
    print_text,
    say_next,
)
from coreai_zoo.errors import BadInput, argument, zoo_command
from coreai_zoo.gates.run import (
    GateOptions,
    failure,
    replaced_by_less,
    report_folder,
    run_gate,
    write_report,
)
from coreai_zoo.machine import cores
from coreai_zoo.progress import Reporter

_EXISTING = click.Path(path_type=Path)

_SHOWN_FLIPS = 5  # of a bundle that fails badly; the report has them all


@click.command(
    "gate",
    cls=Headed,
    headings={"checkpoint": "The two sides", "prompt": "What they are run on", "output": "What comes of it"},
)
@click.argument("bundle", metavar="BUNDLE", shell_complete=complete_bundle)
@click.option("--checkpoint", type=_EXISTING, metavar="DIR", help="The one it was built from. Not needed for a sample.")
@click.option(
    "--candidate",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="The asset on the runtime of its backend: coreai, for a Core ML bundle mil (a reference interpreter), or that "
    "of a plugin's backend; torch: the overlay in PyTorch on the asset's weights; auto: by size.",
)
@click.option(
    "--control/--no-control", default=True, help="Also run unquantized weights, to tell where flips are from."
)
@click.option(
    "--oracle-dtype",
    type=OneOf(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What the oracle computes in.",
)
@click.option("--oracle-cache", type=_EXISTING, metavar="DIR", help="Keep the oracle's results here and reuse them.")
@click.option("--cached-only", is_flag=True, help="Fail where the cache has no result, instead of computing it.")
@click.option(
    "--against",
    metavar="OTHER",
    help="Compare with another bundle of the same checkpoint. The exit code says whether BUNDLE passes, not OTHER.",
)
@click.option("-p", "--prompt", metavar="TEXT", help="Text to force through both, instead of the built-in prompts.")
@click.option("--prompts", metavar="NAME,...", help="Some of the built-in: code, text, digits, spanish, chat, long.")
@click.option("--prompt-file", type=_EXISTING, multiple=True, metavar="FILE", help="A text file; may be repeated.")
@click.option(
    "--positions",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens of each prompt, or positions of the corpus that count. Default: see docs/gate.md.",
)
@click.option(
    "--corpus",
    metavar="FILE|builtin",
    help="Also measure perplexity and KL divergence over a text file, or over the text that ships.",
)
@click.option("--allow-weak-prompt", is_flag=True, help="Judge prompts too on which the oracle is unsure of itself.")
@click.option("-o", "--output", type=_EXISTING, metavar="DIR", help="Where the report goes. Default: BUNDLE/gate.")
@click.option(
    "--sensitivity", is_flag=True, help="Instead: rank roles by what quantizing them costs, as `zoo sensitivity`."
)
@json_option
@click.pass_context
def gate(
    ctx: click.Context,
    /,
    bundle: str,
    against: str | None,
    output: Path | None,
    sensitivity: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare a bundle with Hugging Face, position by position.

    Prompts are forced through the bundle and through transformers in fp32 on the same checkpoint. A different top token
    where the oracle's two best logits are at least 0.1 apart is a confident flip and fails the gate (exit code 1);
    closer than that it is a tie. In bfloat16 it takes 0.8 or more. It also fails where errors are larger than the
    recipe's bounds (see docs/gate.md). A prompt on which more than one position in eight is a tie for the oracle is
    refused before the bundle runs.

    --corpus also measures perplexity, KL divergence and agreement over running text, in the conventions of llama.cpp's
    --kl-divergence and with 95 % intervals, and applies the rule of confident flips to every position of it.

    BUNDLE is a path or a name: that of a bundle in exports/ or in this folder, or of an entry of which exactly one is
    there.

    Writes BUNDLE/gate/report.html and transcript.json, and puts the measured numbers into the bundle's card. A Core ML
    bundle also gets the logits that its compare_on_mac.py compares a device with.

    \b
    Example:
        zoo gate qwen3.6-27b
        zoo gate exports/qwen3_6_27b_sample_decode_int8hu_block32_sym
        zoo gate BUNDLE --checkpoint ~/Qwen3.6-27B --oracle-cache ~/oracle --prompts code,chat
        zoo gate BUNDLE --against exports/qwen3_6_27b_sample_decode_fp16
        zoo gate BUNDLE --corpus builtin --positions 3072
    """
    from coreai_zoo.gates import transcript as transcripts

    options = GateOptions(**given)
    if sensitivity:
        if against is not None or output is not None:
            raise BadInput("--sensitivity judges nothing: leave out --against and --output.")
        _rank(ctx, bundle, options, as_json=as_json)
        return
    plugins = plugins_of(ctx)
    folders = [find_bundle(name, plugins) for name in (bundle, against) if name is not None]
    opened = [Bundle.open(folder) for folder in folders]
    folder = report_folder(opened[0], output)
    transcripts.check_writable(folder)
    records = run_gate(opened, evolve(options, jobs=cores()), plugins, Reporter(silent=as_json), keep_in=folder)
    replaces = replaced_by_less(opened[0], records[0], output)
    page = write_report(opened[0], records, output)
    if as_json:
        for remark in records[0]["remarks"]:
            click.echo(f"note: {remark}", err=True)
        if warning := (records[0]["headroom"] or {}).get("warning"):
            click.echo(f"note: {warning}", err=True)
        click.echo(transcripts.to_json(records[0] | ({"against": records[1]} if against else {})), nl=False)
    else:
        show(records)
        click.echo(f"Report: {page}")
    if replaces:
        click.echo(replaces, err=True)
    if not records[0]["verdict"]["passed"]:
        raise failure(opened[0].directory.name, records[0]["verdict"]["reasons"])
    if output is not None and not as_json:  # what is next to the bundle is of another gate, or of none
        say_next("have it write", zoo_command("run", argument(bundle), "-p", "def main("))
    elif not as_json:
        say_what_is_next(opened[0], bundle, plugins)


def _rank(ctx: click.Context, bundle: str, options: GateOptions, *, as_json: bool) -> None:
    """Run `zoo sensitivity` with what it has in common with `zoo gate`."""
    from coreai_zoo.cli.sensitivity import sensitivity

    shared = GateOptions(checkpoint=options.checkpoint, prompt=options.prompt, positions=options.positions)
    if options != shared:
        raise BadInput(
            "--sensitivity goes with --checkpoint, --prompt, --positions and --json only.",
            "`zoo sensitivity` has more options of its own.",
        )
    ctx.invoke(
        sensitivity,
        subject=bundle,
        checkpoint=shared.checkpoint,
        prompt=shared.prompt,
        positions=shared.positions,
        as_json=as_json,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------------------


_MEASURES = (
    Column("positions", number=True, drop=1),
    Column("matched", number=True),
    Column("ties", number=True, drop=2),
    Column("flips", number=True),
    Column("lowest cosine", number=True, drop=3),
    Column("median error", number=True, drop=4),
    Column("largest KL", number=True, drop=5),
)


def show(records: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of prompts for each bundle, what went wrong, and the verdict."""
    from coreai_zoo.gates.report import headroom_line, prompt_totals, significant

    for record in records:
        table = new_table("prompt", *_MEASURES, "verdict", title=record["bundle"]["name"] if len(records) > 1 else None)
        for prompt in record["prompts"]:
            length = str(len(prompt["tokens"]))
            if not prompt["judged"]:
                weak = prompt["strength"]["weak"]
                why = f"not judged: {prompt['strength']['ties']} oracle ties" if weak else "not judged"
                table.add_row(prompt["name"], length, *["-"] * 6, why)
                continue
            measures = prompt_totals(prompt)
            table.add_row(
                prompt["name"],
                length,
                *(str(prompt[key]) for key in ("matched", "ties", "confident_flips")),
                f"{measures['cosine']:.6f}",
                *(significant(measures[key]) for key in ("median_error", "kl")),
                "passed" if prompt["passed"] else "FAILED",
            )
        print_table(table)
        _show_flips(record)
        print_text(_verdict_line(record))
        print_text(_power_line(record))
        if record.get("headroom"):
            print_text(headroom_line(record["headroom"]))
        for gate in record.get("gates", ()):
            print_text(f"{gate['gate']}: {'passed' if gate['passed'] else 'FAILED'}, {gate['summary']}.")
        if record.get("corpus"):
            _show_corpus(record["corpus"])


def _show_flips(record: Mapping[str, Any]) -> None:
    from coreai_zoo.gates.report import quoted, token

    for prompt in record["prompts"]:
        flips = [position for position in prompt.get("positions", ()) if position["verdict"] == "FLIP"]
        for position in sorted(flips, key=lambda flip: -flip["margin"])[:_SHOWN_FLIPS]:
            source = position.get("attribution")
            print_text(
                f"  {prompt['name']} position {position['index']}: after {quoted(prompt['pieces'][position['index']])} "
                f"{token(position, 'candidate')} instead of {token(position, 'oracle')}, oracle margin "
                f"{position['margin']:.3f}" + (f", from {source}" if source else "")
            )
        if len(flips) > _SHOWN_FLIPS:
            click.echo(f"  {prompt['name']}: {len(flips) - _SHOWN_FLIPS} more flips, of smaller margins, in the report")


def _show_corpus(corpus: Mapping[str, Any]) -> None:
    from coreai_zoo.gates.report import corpus_flips, corpus_line, corpus_rows, token

    print_text(corpus_line(corpus))
    table = new_table("", *(Column(name, number=True) for name in ("value", "standard error", "95 % interval")))
    for row in corpus_rows(corpus):
        table.add_row(*row)
    print_table(table)
    for flip in corpus["flips"][:_SHOWN_FLIPS]:
        print_text(
            f"  window {flip['window'] + 1} position {flip['index']}: after {token(flip, 'token')} "
            f"{token(flip, 'candidate')} instead of {token(flip, 'oracle')}, oracle margin {flip['margin']:.3f}"
        )
    print_text(corpus_flips(corpus))


def _verdict_line(record: Mapping[str, Any]) -> str:
    from coreai_zoo.gates.report import confident_margin, totals

    counts, margin = totals(record), confident_margin(record)
    candidates = dict.fromkeys(prompt["candidate"] for prompt in record["prompts"] if prompt["judged"])
    line = (
        f"{'passed' if record['verdict']['passed'] else 'FAILED'}: {' and '.join(candidates)} against "
        f"{record['inputs']['oracle']}, {counts['matched']} of {counts['positions']} matched, ties: {counts['ties']}, "
        f"confident flips: {counts['flips']} ({counts['confident']} positions have a margin of {margin} or more)."
    )
    weak = record["verdict"]["weak_prompts_allowed"]
    if counts["flips"] and record["verdict"]["passed"]:
        line += " A routed model may have a few over running text, see docs/gate.md."
    return line + (f" Weak prompts allowed: {', '.join(weak)}." if weak else "")


def _power_line(record: Mapping[str, Any]) -> str:
    """What the verdict could have seen."""
    from coreai_zoo.gates.report import power

    seen = power(record)
    return " ".join(filter(None, [f"{seen.statement}.", seen.caution]))
