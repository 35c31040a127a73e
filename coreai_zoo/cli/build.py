"""`zoo build`: a bundle from a checkpoint."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import attrs
import click

from coreai_zoo.build import pipeline
from coreai_zoo.build.pipeline import BuildResult
from coreai_zoo.build.request import DEFAULT_BACKEND, DEFAULT_OUTPUT, BuildRequest
from coreai_zoo.build.source import find_subject
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.cli.after import say_what_is_next
from coreai_zoo.cli.completion import complete_entry
from coreai_zoo.cli.recipe_option import recipe_option
from coreai_zoo.cli.target import target_option
from coreai_zoo.commands import Headed, OneOf, json_option, plugins_of, print_json
from coreai_zoo.contracts import CONTRACTS
from coreai_zoo.errors import BadInput, tell_failure_as
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import EventReporter, Reporter

_EXISTING = click.Path(path_type=Path)


@click.command(
    "build",
    cls=Headed,
    headings={
        "checkpoint": "Where weights come from",
        "recipe": "What is built",
        "output": "Where it goes",
        "progress": "What is printed",
    },
)
@click.argument("model", shell_complete=complete_entry)
@click.option("--checkpoint", type=_EXISTING, metavar="DIR", help="A local copy of the entry's checkpoint.")
@click.option("--sample", is_flag=True, help="The miniature trained checkpoint that ships with the entry.")
@click.option(
    "--custom", is_flag=True, help="The checkpoint is of another model than the entry says: build it as such."
)
@click.option(
    "--stream",
    is_flag=True,
    help="Fetch weights file by file, use and drop each: two are on the disk at a time, and not all.",
)
@recipe_option("Quantization: a name from `zoo recipes`, or a TOML file. Default: the entry's.")
@click.option("--contract", metavar="C", help=f"Engine contract: {', '.join(CONTRACTS)}. Default: the entry's.")
@click.option("--backend", metavar="B", help=f"coreai or coreml. Default: {DEFAULT_BACKEND}, or the target's.")
@target_option
@click.option("--max-context", type=int, metavar="N", help="Positions that the bundle allows. Default: the entry's.")
@click.option("--layers", type=int, metavar="N", help="Build a slice: the first N layers only.")
@click.option(
    "-o",
    "--output",
    type=_EXISTING,
    default=DEFAULT_OUTPUT,
    show_default=True,
    metavar="DIR",
    help="Folder in which the bundle's own folder is made.",
)
@click.option("--work-dir", type=_EXISTING, metavar="DIR", help="Where streamed files lie meanwhile, and what is kept.")
@click.option("--keep-weights", is_flag=True, help="Note which weights are where: a rebuild copies them.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option(
    "--progress",
    type=OneOf(["auto", "json"]),
    default="auto",
    show_default=True,
    help="On stderr: a bar or plain lines (with --json nothing), or one JSON object per event, also for a failure.",
)
@json_option
@click.pass_context
def build(ctx: click.Context, /, as_json: bool, progress: str, **options: Any) -> None:
    """Build a bundle.

    MODEL is an entry (its name, or a file that `zoo new` wrote), a repository on the Hugging Face hub (its id, also
    with @revision, or its URL), or the folder of a checkpoint. What is not an entry is built as what its config says.

    Whatever is not at hand is fetched, once all that can be checked without weights has been. The output path is
    untouched until the bundle is complete and verified. An interrupted build resumes when it is run again. With
    --stream no checkpoint stays: a file of weights is dropped when all of it is in the bundle.

    A checkpoint that is not the entry's model, by a fact or by what shows where it comes from, is refused under its
    name. With --custom it is built by the entry's defaults, and the bundle's name and card say that it is another one.

    --target names the system of the machine that is to run the bundle, and chooses contract and backend by it.

    \b
    Example:
        zoo build qwen3.6-27b
        zoo build qwen3.6-27b --target macos27.2
        zoo build qwen3.6-27b --sample
        zoo build qwen3.6-27b --recipe mine.toml
        zoo build qwen3.6-27b --stream
        zoo build someone/a-fine-tune@v2 -o bundles
        zoo build ~/a-checkpoint
        zoo build qwen3.6-27b --checkpoint ~/Qwen3.6-27B
    """
    report = Reporter(silent=as_json)
    if progress == "json":
        report = events = EventReporter()
        tell_failure_as(events.failure_line)
    if options["checkpoint"] is not None and options["sample"]:
        raise BadInput("--checkpoint and --sample exclude each other.")
    request = BuildRequest(**options)
    try:
        result = pipeline.build(request, plugins_of(ctx), report)
    except KeyboardInterrupt:
        command = shlex.join([str(ctx.find_root().info_name), *sys.argv[1:]])
        if progress == "json":
            report.note(f"Finished weights are kept. To resume, run: {command}")
            raise click.Abort from None  # of an interruption, click would print an empty line
        click.echo(f"\nFinished weights are kept. To resume, run:\n    {command}", err=True)
        raise
    if as_json:
        print_json(_described(request, result))
    elif result.preflight is None:
        click.echo(f"{result.path} is there already, and up to date.")
    else:
        click.echo(f"{result.path} ({result.bytes:,} bytes, {sum(result.seconds.values()):.1f} s)")
    if not as_json and progress != "json":
        checkpoint = request.checkpoint or _folder(request, plugins_of(ctx))
        say_what_is_next(Bundle.open(result.path), result.path, plugins_of(ctx), checkpoint)


def _folder(request: BuildRequest, plugins: Plugins) -> Path | None:
    """The folder of a checkpoint that was built by its path, or of the sample of an entry that is only a file."""
    if request.model is None:
        return None
    subject = find_subject(request.model, plugins)
    if request.sample and subject.entry is not None and request.model.endswith(".toml"):
        return subject.entry.sample_directory()
    return subject.directory


def _described(request: BuildRequest, result: BuildResult) -> dict[str, Any]:
    return {
        "model": request.model,
        "name": result.name,
        "path": str(result.path),
        "bytes": result.bytes,
        "weights": {"computed": result.computed, "reused": result.reused},
        "preflight": None if result.preflight is None else result.preflight.as_json(),
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
        "checks": [attrs.asdict(check) for check in result.checks],
    }
