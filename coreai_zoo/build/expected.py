"""What a bundle of a design has to hold, in the form in which a bundle is held against it."""

from __future__ import annotations

from pathlib import Path

from coreai_zoo.build.design import Design
from coreai_zoo.build.record import roles_meant, roles_record
from coreai_zoo.bundle.expected import Expected, ExpectedWeight
from coreai_zoo.bundle.metadata import language_block


def expected_by(designed: Design, checkpoint: Path | None) -> Expected:
    """What a bundle of a design has to hold; `checkpoint` is the folder that the design was made from."""
    roles = designed.weights.roles
    return Expected(
        by=f"entry {designed.label}" if checkpoint is None else f"checkpoint {checkpoint.name}",
        checkpoint=checkpoint,
        name=designed.name,
        asset=designed.asset,
        compression=designed.recipe.published_name,
        layers=designed.model.whole_facts["layers"],
        functions=designed.signatures,
        language=language_block(designed.signatures, designed.facts["vocab_size"], designed.max_context),
        weights={tensor.name: ExpectedWeight(tensor.format, roles[tensor.role]) for tensor in designed.weights.stored},
        recorded={
            "sample": designed.sample,
            "backend": designed.backend.name,
            "layers": designed.facts["layers"],
            "whole_layers": designed.model.whole_facts["layers"],
            "facts": dict(designed.facts),
            "recipe.installed": designed.recipe_installed,
            "recipe.roles": roles_record(designed),
            "roles": roles_meant(designed),
            **({} if designed.entry is None else {"entry.differences": list(designed.differences)}),
        },
    )
