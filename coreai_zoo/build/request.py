"""Build requests, and their defaults."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from coreai_zoo.bundle.layout import EXPORTS
from coreai_zoo.recipes import Recipe
from coreai_zoo.systems import System

DEFAULT_OUTPUT = EXPORTS
DEFAULT_BACKEND = "coreai"
DEFAULT_RECIPE, DEFAULT_CONTRACT, DEFAULT_CONTEXT = "int8hu", "static-s1", 32768
"""The defaults for a checkpoint that comes without an entry."""


@frozen
class BuildRequest:
    """A request for a bundle; see `zoo build --help` for the options.

    Attributes:
        model: an entry by its name or file, a repository on the hub, or a folder; None for the folder `checkpoint`.
        checkpoint: the folder of an entry's checkpoint; None to fetch it.
        recipe: name or file of the recipe, or itself; None for the entry's.
        backend: name of the backend; None for the default one, or for the target's.
        target: the system of the machine that is to run the bundle, which decides contract and backend where they are
            None, and refuses those that it does not run; None where nothing is said of the machine.
        label: what to call a model without entry; None for the name of its repository or folder.
        stream: whether weights that are fetched are used file by file and dropped.
        dry: whether to look only. No weight is fetched then: without `checkpoint` or `sample` the model of an entry is
            the one that its facts describe, and a checkpoint may be a folder with nothing but its `config.json`.
    """

    model: str | None = None
    checkpoint: Path | None = None
    sample: bool = False
    recipe: str | Recipe | None = None
    contract: str | None = None
    backend: str | None = None
    target: System | None = None
    output: Path = DEFAULT_OUTPUT
    max_context: int | None = None
    layers: int | None = None
    work_dir: Path | None = None
    keep_weights: bool = False
    force: bool = False
    custom: bool = False
    label: str | None = None
    stream: bool = False
    dry: bool = False
