"""The catalogue as a page, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coreai_zoo import pages
from coreai_zoo.dtypes import size
from coreai_zoo.errors import BadInput
from coreai_zoo.gates.transcript import replace
from coreai_zoo.planning.catalogue import SCHEMA_FILE

PAGE, DATA = "catalogue.html", "catalogue.json"

CONTEXTS = tuple(2**power for power in range(12, 19))
"""The contexts that the page filters by: 4,096 to 262,144."""


def render(record: Mapping[str, Any]) -> str:
    """The page as HTML, from the record alone. Everything is there without its script, which filters."""
    environment = pages.environment("planning")
    environment.filters |= {"size": size, "count": "{:,}".format, "rate": _rate, "needed": _needed}
    bundles: dict[str, dict[str, list[Mapping[str, Any]]]] = {entry["name"]: {} for entry in record["entries"]}
    for bundle in record["bundles"]:
        bundles[bundle["entry"]].setdefault(bundle["recipe"], []).append(bundle)
    return environment.get_template("catalogue.html.j2").render(
        record=record,
        bundles=bundles,
        reasons={refused["entry"]: refused["reason"] for refused in reversed(record["refused"])},
        recipes={recipe["name"]: recipe for recipe in record["recipes"]},
        contracts={contract["name"]: contract for contract in record["contracts"]},
        contexts=CONTEXTS,
        at_efficiency=f"at {100 * record['efficiency']['share']:.3g} %",
    )


def write_catalogue(record: Mapping[str, Any], folder: Path) -> tuple[Path, Path, Path]:
    """Write the page, the record and its schema into a folder; their paths.

    Raises:
        BadInput: when they cannot be written.
    """
    data = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    paths = folder / PAGE, folder / DATA, folder / SCHEMA_FILE.name
    for path, content in zip(paths, (render(record).encode(), data.encode(), SCHEMA_FILE.read_bytes()), strict=True):
        try:
            replace(path, content, folder)
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {error.strerror}.", "Choose another -o DIR.") from error
    return paths


def _rate(value: float) -> str:
    """Tokens per second, with as many digits as a prediction deserves."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _needed(bundle: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The smallest memory in which a bundle has the context that it is built with, or else any; None for no memory."""
    fits = [fit for fit in bundle["fits"] if fit["most_context"] is not None]
    usual = bundle["states"]["context"]
    return next((fit for fit in fits if fit["most_context"] >= usual), fits[-1] if fits else None)
