"""`zoo acme-head`."""

from __future__ import annotations

from pathlib import Path

import click

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.commands import json_option, print_json
from coreai_zoo.errors import BadInput


@click.command("acme-head")
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def acme_head(bundle: Path, as_json: bool) -> None:
    """How the head of a bundle is stored, and why.

    \b
    Example:
        zoo acme-head exports/acme_mini_decode_int8hu_block32_sym
    """
    recipe = Bundle.open(bundle).build["recipe"]
    spec, reason = recipe["roles"]["head"], recipe["head_reason"]
    if spec is None:
        raise BadInput(f"The head of {bundle} is not quantized.", "Build it with a recipe that does: int8hu.")
    if as_json:
        print_json({"head": spec, "reason": reason})
    else:
        click.echo(f"{spec['dtype']} in blocks of {spec['block']}, {spec['scheme']}: {reason}")
