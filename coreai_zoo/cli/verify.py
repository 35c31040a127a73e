"""`zoo verify`: does a bundle hold what it says."""

from __future__ import annotations

from pathlib import Path

import attrs
import click

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import find_bundle
from coreai_zoo.cli.after import say_what_is_next
from coreai_zoo.cli.completion import complete_bundle
from coreai_zoo.commands import json_option, new_table, plugins_of, print_json, print_table
from coreai_zoo.progress import Reporter


@click.command("verify")
@click.argument("bundle", metavar="BUNDLE", shell_complete=complete_bundle)
@click.option("--rebuild", is_flag=True, help="Also build it again as recorded, and compare every byte.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The one it was built from. Not needed for a sample, nor for what is in the Hugging Face cache.",
)
@json_option
@click.pass_context
def verify(ctx: click.Context, bundle: str, rebuild: bool, checkpoint: Path | None, as_json: bool) -> None:
    """Check a bundle's files, metadata, tokenizer, functions and weights, and, if it is small, real steps.

    Where its checkpoint is at hand, all of it is compared with that, and a few tokens with Hugging Face. How far it is
    off from it, `zoo gate` says.

    Exits with 1 if anything is not as it has to be. BUNDLE is a path or a name, as for `zoo gate`.

    \b
    Example:
        zoo verify qwen3.6-27b
        zoo verify exports/qwen3_6_27b_sample_decode_int8hu_block32_sym
        zoo verify exports/qwen3_6_27b_decode_int8hu_block32_sym --checkpoint ~/Qwen3.6-27B
        zoo verify exports/qwen3_6_27b_decode_int8hu_block32_sym --rebuild --checkpoint ~/Qwen3.6-27B
    """
    from coreai_zoo.build.rebuild import rebuild as rebuild_bundle
    from coreai_zoo.bundle.verify import require
    from coreai_zoo.gates.verify import verify_bundle

    plugins = plugins_of(ctx)
    opened = Bundle.open(find_bundle(bundle, plugins))
    checks = verify_bundle(opened, plugins, checkpoint)
    if rebuild:
        checks.append(rebuild_bundle(opened, checkpoint, plugins, Reporter(silent=as_json)))
    if as_json:
        print_json([attrs.asdict(check) for check in checks])
    else:
        table = new_table("check", "", "found")
        for check in checks:
            table.add_row(check.name, "ok" if check.passed else "FAILED", check.detail)
        print_table(table)
    require(checks)
    if not as_json:
        say_what_is_next(opened, bundle, plugins, checkpoint)
