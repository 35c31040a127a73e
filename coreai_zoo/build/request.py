"""What the user asked for."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

DEFAULT_OUTPUT = Path("exports")
DEFAULT_BACKEND = "coreai"


@frozen
class BuildRequest:
    """What the user asked for; see `zoo build --help`."""

    entry: str
    checkpoint: Path | None = None
    sample: bool = False
    recipe: str | None = None
    contract: str | None = None
    backend: str = DEFAULT_BACKEND
    output: Path = DEFAULT_OUTPUT
    max_context: int | None = None
    layers: int | None = None
    work_dir: Path | None = None
    keep_weights: bool = False
    force: bool = False
    custom: bool = False
    allow_unverified: bool = False
