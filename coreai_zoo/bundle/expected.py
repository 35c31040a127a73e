"""What a bundle has to hold by what it was built from: its checkpoint or its entry, the contract and the recipe.

Nothing in it is read from the bundle but what somebody chose: which entry, contract, recipe, context and slice.
`build.expected` makes it of a design, since it takes plugins to read a config; here bundles are held against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from coreai_zoo.overlay import Role
from coreai_zoo.signature import TraceSpec
from coreai_zoo.weights.formats import Format


@frozen
class ExpectedWeight:
    """One weight of the decoder that has bytes of its own, stored as it was designed."""

    format: Format
    role: Role


@frozen
class Expected:
    """What a bundle has to hold.

    Attributes:
        by: what says so, for the report: the checkpoint's folder or the entry's facts.
        checkpoint: the folder that its tokenizer has to be of; None where only the entry is known.
        name: of the bundle.
        asset: name of its asset.
        compression: as its recipe is published.
        layers: of the whole model.
        functions: the signature of each function by name, the one that decodes first.
        language: the block `language` of metadata.json, but for the name of the tokenizer.
        weights: every weight that has bytes of its own, by name.
        recorded: what build.json has to say of the model, by path. By it gates choose what they hold a bundle to.
    """

    by: str
    checkpoint: Path | None
    name: str
    asset: str
    compression: str
    layers: int
    functions: Mapping[str, TraceSpec]
    language: Mapping[str, Any]
    weights: Mapping[str, ExpectedWeight]
    recorded: Mapping[str, Any]
