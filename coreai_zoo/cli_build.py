"""The commands that build, run and judge: `zoo build`, `zoo run`, `zoo gate`, `zoo verify`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from coreai_zoo import pipeline
from coreai_zoo.bundle import Bundle
from coreai_zoo.checkpoint import read_config
from coreai_zoo.cli import json_option, new_table, plugins_of, print_json, print_table
from coreai_zoo.contracts import CONTRACTS
from coreai_zoo.entry import find_entry, load_entries
from coreai_zoo.errors import BadInput
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import EventReporter, Reporter
from coreai_zoo.quantize import RECIPES
from coreai_zoo.resolve import DEFAULT_BACKEND

_EXISTING = click.Path(path_type=Path)


@click.command("build")
@click.argument("entry", metavar="ENTRY")
@click.option("--checkpoint", type=_EXISTING, metavar="DIR", help="A local Hugging Face checkpoint.")
@click.option("--sample", is_flag=True, help="The miniature trained checkpoint that ships with the entry.")
@click.option("--recipe", metavar="R", help=f"Quantization: {', '.join(RECIPES)}. Default: the entry's.")
@click.option("--contract", metavar="C", help=f"Engine contract: {', '.join(CONTRACTS)}. Default: the entry's.")
@click.option("--backend", default=DEFAULT_BACKEND, show_default=True, metavar="B", help="coreai or coreml.")
@click.option(
    "-o",
    "--output",
    type=_EXISTING,
    default=pipeline.DEFAULT_OUTPUT,
    show_default=True,
    metavar="DIR",
    help="Folder in which the bundle's own folder is made.",
)
@click.option("--max-context", type=int, metavar="N", help="Positions that the bundle allows. Default: the entry's.")
@click.option("--layers", type=int, metavar="N", help="Build a slice: the first N layers only.")
@click.option("--custom", is_flag=True, help="The checkpoint is of other sizes than the entry says: build it as such.")
@click.option("--allow-unverified", is_flag=True, help="Build an entry that was not compared with its checkpoint yet.")
@click.option("--work-dir", type=_EXISTING, metavar="DIR", help="Where weights are kept during the build.")
@click.option("--keep-weights", is_flag=True, help="Keep them afterwards: a rebuild quantizes nothing again.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option(
    "--progress",
    type=click.Choice(["auto", "json"]),
    default="auto",
    show_default=True,
    help="On stderr: a bar or plain lines (with --json nothing), or one JSON object per event.",
)
@json_option
@click.pass_context
def build(ctx: click.Context, /, as_json: bool, progress: str, **options: Any) -> None:
    """Build a bundle.

    Without --checkpoint or --sample the entry's checkpoint is fetched from the Hugging Face hub. The output path is
    untouched until the bundle is complete and verified. An interrupted build resumes when it is run again.

    A checkpoint that contradicts a fact of the entry is refused, each fact named: another model wants an entry of its
    own, which `zoo new` writes. ENTRY may be the path of such a file. With --custom the checkpoint is built without
    one, and the bundle's name and card say that it is not the entry's model.

    \b
    Example:
        zoo build qwen3.6-27b --sample
        zoo build qwen3.6-27b --checkpoint ~/Qwen3.6-27B -o bundles --allow-unverified
        zoo build qwen3.6-27b --checkpoint ~/smaller-sibling --custom
    """
    if options["checkpoint"] is not None and options["sample"]:
        raise BadInput("--checkpoint and --sample exclude each other.")
    request = pipeline.BuildRequest(**options)
    try:
        report = EventReporter() if progress == "json" else Reporter(silent=as_json)
        result = pipeline.build(request, plugins_of(ctx), report)
    except KeyboardInterrupt:
        command = shlex.join([str(ctx.find_root().info_name), *sys.argv[1:]])
        click.echo(f"\nFinished weights are kept. To resume, run:\n    {command}", err=True)
        raise
    if as_json:
        click.echo(pipeline.request_json(request, result))
    else:
        click.echo(f"{result.path} ({result.bytes:,} bytes, {sum(result.seconds.values()):.1f} s)")


@click.command("verify")
@click.argument("bundle", type=_EXISTING)
@click.option("--rebuild", is_flag=True, help="Also build it again as recorded, and compare every byte.")
@click.option("--checkpoint", type=_EXISTING, metavar="DIR", help="For --rebuild. Default: as for a build.")
@json_option
@click.pass_context
def verify(ctx: click.Context, bundle: Path, rebuild: bool, checkpoint: Path | None, as_json: bool) -> None:
    """Check a bundle's files, hashes, metadata, signature, and, if it is small, one real step.

    Exits with 1 if anything is not as recorded.

    \b
    Example:
        zoo verify exports/qwen3_6_27b_sample_decode_int8hu_block32_sym
        zoo verify exports/qwen3_6_27b_decode_int8hu_block32_sym --rebuild --checkpoint ~/Qwen3.6-27B
    """
    from coreai_zoo.rebuild import rebuild as rebuild_bundle
    from coreai_zoo.verify import require
    from coreai_zoo.verify import verify as verify_bundle

    if checkpoint is not None and not rebuild:
        raise BadInput("--checkpoint is for --rebuild.")
    opened, plugins = Bundle.open(bundle), plugins_of(ctx)
    checks = verify_bundle(opened, plugins.backends())
    if rebuild:
        checks.append(rebuild_bundle(opened, checkpoint, plugins, Reporter(silent=as_json)))
    if as_json:
        print_json([{"name": check.name, "passed": check.passed, "detail": check.detail} for check in checks])
    else:
        rows = new_table("check", "", "found")
        for check in checks:
            rows.add_row(check.name, "ok" if check.passed else "FAILED", check.detail)
        print_table(rows)
    require(checks)


@click.command("run")
@click.argument("bundle", type=_EXISTING)
@click.option("-p", "--prompt", required=True, help="Text to continue.")
@click.option("-n", "--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="At most so many.")
@click.option("--chat", is_flag=True, help="Treat the prompt as a user's message, in the bundle's chat template.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: most probable token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampler.")
@click.pass_context
def run(
    ctx: click.Context, bundle: Path, prompt: str, new_tokens: int, chat: bool, temperature: float, seed: int
) -> None:
    """Generate text with a bundle, on the runtime of this machine.

    On Linux that is a slow CPU interpreter: fine for samples and slices.

    \b
    Example:
        zoo run exports/qwen3_6_27b_sample_decode_int8hu_block32_sym -p "def main(" -n 40
    """
    from coreai_zoo.generate import Sampling, chat_prompt, generate
    from coreai_zoo.verify import backend_of, require_asset

    opened = Bundle.open(bundle)
    backend = backend_of(opened, plugins_of(ctx).backends())
    require_asset(opened)
    if chat:
        prompt = chat_prompt(opened, prompt)
    else:
        click.echo(prompt, nl=False)
    for text in generate(opened, backend, prompt, new_tokens, Sampling(temperature, seed)):
        click.echo(text, nl=False)
        sys.stdout.flush()
    click.echo()


# ---------------------------------------------------------------------------------------------------------------------
# What a bundle's record leads to
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_of(bundle: Bundle, plugins: Plugins, given: Path | None) -> Path:
    """The checkpoint that `bundle` was built from: as given, or the sample's."""
    if given is not None:
        return given
    if not bundle.build.get("sample"):
        raise BadInput(f"{bundle.directory.name} is not a sample.", "Pass its checkpoint with --checkpoint DIR.")
    entry, _ = find_entry(str(bundle.build["entry"].get("name")), plugins)
    return entry.sample_directory()


def config_of(bundle: Bundle, plugins: Plugins, checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's config, or that of the slice that was built."""
    hf_config = read_config(checkpoint)
    overlay, _ = plugins.claim_overlay(str(hf_config.get("model_type")), hf_config)
    layers = overlay.facts(overlay.read_config(hf_config))["layers"]
    return hf_config if bundle.build["layers"] == layers else overlay.with_layers(hf_config, bundle.build["layers"])


def run_plugin_gates(bundle: Bundle, plugins: Plugins, checkpoint: Path) -> list[Any]:
    """Results of the gates that plugins add."""
    hf_config = read_config(checkpoint)
    overlay, _ = plugins.claim_overlay(str(hf_config.get("model_type")), hf_config)
    entry, _ = load_entries(plugins).get(str(bundle.build["entry"].get("name")), (None, None))
    results = []
    for plugin, extra in plugins.gates(overlay, entry):
        with plugins.blame(plugin, f"gate {extra.name!r}"):
            results.append(extra.run(bundle, checkpoint))
    return results
