"""Build requests, and their defaults."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from coreai_zoo.bundle.layout import EXPORTS

DEFAULT_OUTPUT = EXPORTS
DEFAULT_BACKEND = "coreai"
DEFAULT_RECIPE, DEFAULT_CONTRACT, DEFAULT_CONTEXT = "int8hu", "static-s1", 32768
"""The defaults for a checkpoint that comes without an entry."""


@frozen
class BuildRequest:
    """A request for a bundle; see `zoo build --help` for the options.

    Attributes:
        entry: name of an entry, or path of an entry file; None for a checkpoint that is looked at without one.
        dry: whether to look only. Nothing is fetched then: without `checkpoint` or `sample` the model is the one that
            the entry's facts describe, and a checkpoint may be a folder with nothing but its `config.json`.
    """

    entry: str | None = None
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
    dry: bool = False
