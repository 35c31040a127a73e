"""`zoo catalogue`: everything that could be built, as a page and as JSON."""

from __future__ import annotations

from pathlib import Path

import click

from coreai_zoo.commands import json_option, plugins_of, print_json, print_text, say_next
from coreai_zoo.errors import BadInput
from coreai_zoo.planning.catalogue import as_record, read_catalogue
from coreai_zoo.planning.catalogue_page import write_catalogue
from coreai_zoo.progress import Reporter


@click.command("catalogue")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default=Path("catalogue"),
    show_default=True,
    help="Folder for the files, which replace those that are there.",
)
@json_option
@click.pass_context
def catalogue(ctx: click.Context, output: Path, as_json: bool) -> None:
    """Write everything that could be built as a page, and as JSON.

    Every entry by every recipe and contract: bytes, in which memory it fits with how much context, predicted and
    published rates on each chip, and the command that builds it. catalogue.html is one file that needs no network,
    with filters for memory, chip and context. catalogue.json says the same to a program, with the combinations of
    which there is no bundle and why; catalogue.schema.json is its JSON Schema. It is planned from entries alone:
    nothing is fetched.

    \b
    Example:
        zoo catalogue -o site
        zoo catalogue -o site --json
    """
    if output.exists() and not output.is_dir():  # planned are hundreds of bundles
        raise BadInput(f"{output} is a file.", "Name a folder with -o DIR.")
    record = as_record(read_catalogue(plugins_of(ctx), Reporter(silent=as_json)))
    page, data, schema = write_catalogue(record, output)
    bundles, refused = len(record["bundles"]), len(record["refused"])
    if as_json:
        files = {"page": str(page), "catalogue": str(data), "schema": str(schema)}
        print_json({**files, "bundles": bundles, "refused": refused})
        return
    print_text(f"{bundles:,} bundles, {refused:,} combinations refused.")
    print_text(f"Page: {page}\nFor programs: {data}, described by {schema}")
    say_next("look at the page in a browser", page.resolve().as_uri())
