"""`zoo check`: what a maintainer's CI runs on a change."""

from __future__ import annotations

from pathlib import Path

import attrs
import click
from click.core import ParameterSource

from coreai_zoo.commands import Column, OneOf, json_option, new_table, plugins_of, print_json, print_table, say_next
from coreai_zoo.errors import BadInput, CheckFailed, ZooError, listing, zoo_command
from coreai_zoo.progress import Reporter
from coreai_zoo.review.check import CHECKS, Checks
from coreai_zoo.review.goldens import DEFAULT_FOLDER, wanted
from coreai_zoo.review.revision import base_revision, displaced, repository


@click.command("check")
@click.option("--only", multiple=True, type=OneOf([*CHECKS]), help="Run this check only; may be repeated.")
@click.option(
    "--goldens",
    "golden_folder",
    type=click.Path(path_type=Path),
    default=DEFAULT_FOLDER,
    show_default=True,
    metavar="DIR",
    help="Folder of the golden graphs.",
)
@click.option("--update-goldens", is_flag=True, help="Write the golden graphs instead of comparing them.")
@json_option
@click.pass_context
def check(ctx: click.Context, only: tuple[str, ...], golden_folder: Path, update_goldens: bool, as_json: bool) -> None:
    """Everything that has to hold before a change is merged.

    Run it in the repository. Entries are valid; every architecture is claimed by one overlay; the golden graphs are
    those that the code gives; the samples build and pass `zoo gate`; the overlay keeps its bounds on every stress
    sample; the documentation is complete. Exits with 1 if anything does not hold. It takes some minutes, most of them
    on the runtime of the samples: `--only goldens --only stress` is the quick part that sees most mistakes.

    \b
    Example:
        zoo check
        zoo check --only goldens --update-goldens
    """
    if update_goldens and only and "goldens" not in only:
        raise BadInput("--update-goldens writes nothing when the check `goldens` is not among --only.")
    plugins, folder = plugins_of(ctx), _repository()
    if ctx.get_parameter_source("golden_folder") is ParameterSource.DEFAULT and folder != Path.cwd():
        golden_folder = folder / golden_folder
    compared = not update_goldens and (not only or "goldens" in only)
    if compared and not golden_folder.is_dir() and wanted(golden_folder, folder, plugins):
        raise BadInput(
            f"There are no golden graphs in {golden_folder}.",
            "Run `zoo check` in the repository that has them, or name their folder with --goldens DIR; "
            "`zoo check --only goldens --update-goldens` writes them.",
        )
    if elsewhere := displaced(plugins.packages()):
        places = listing([f"{name} is found at {place}" for name, place in elsewhere.items()])
        raise BadInput(f"{places}, and not in {folder}: that would be checked.", "Install it with `pip install -e .`.")
    checks = Checks(
        plugins=plugins,
        folder=folder,
        golden_folder=golden_folder,
        update_goldens=update_goldens,
        report=Reporter(silent=as_json),
    )
    outcomes = list(checks.run(only))
    failed = [outcome.name for outcome in outcomes if outcome.passed is False]
    if as_json:
        print_json({"passed": not failed, "checks": [attrs.asdict(outcome) for outcome in outcomes]})
    else:
        table = new_table("check", "", Column("seconds", number=True, drop=1), "found")
        verdicts = {True: "passed", False: "FAILED", None: "nothing"}
        for outcome in outcomes:
            table.add_row(outcome.name, verdicts[outcome.passed], f"{outcome.seconds:.0f}", outcome.detail)
        print_table(table)
    if failed:
        raise CheckFailed(f"Failed: {listing(failed)}.")
    if not as_json:
        say_next("see what a change does to a bundle", zoo_command("diff", "ENTRY", "--rev", base_revision()))


def _repository() -> Path:
    """What is checked: the nearest folder above with golden graphs, or the repository; outside of one, this folder."""
    here = Path.cwd()
    try:
        top = repository()
    except ZooError:
        return here
    above = [folder for folder in (here, *here.parents) if folder.is_relative_to(top)]
    return next((folder for folder in above if (folder / DEFAULT_FOLDER).is_dir()), top)
