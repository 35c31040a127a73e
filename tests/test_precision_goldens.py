"""Golden graphs see a cast, an eps or a constant of another precision, even where no model's answer shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coreai_zoo.catalogue import find_entry
from coreai_zoo.plugins import Plugins
from coreai_zoo.review.goldens import compare, golden, golden_path, of_recipe, read
from coreai_zoo.review.structure import graphs
from mutants import applied
from precision_mutants import GOLDEN, PRECISION
from suite import NIGHTLY
from test_wiring import RECIPE, goldens, plugins

__all__ = ["goldens", "plugins"]  # fixtures: a tiny mixture of experts, and its golden graph

# What a change of a norm's own arithmetic does is in no graph: the toolchain brings its own norm and its own attention.
IN_THE_GRAPH = [mutant for mutant in PRECISION.values() if mutant.edits and ":" not in mutant.edits[0].function]
BY_NOTHING_ELSE = [mutant for mutant in IN_THE_GRAPH if mutant.on == GOLDEN]
# A cast, a constant and one in the mixture.
BY_DAY = [PRECISION[name] for name in ("beta-in-half", "a-in-bf16", "router-softmax-in-half")]
# The compiler takes a cast from half precision to bf16 and back for nothing, so these do not reach an asset.
TAKEN_AWAY = {"recurrent-state-in-bf16", "conv-state-in-bf16", "residual-in-bf16", "logits-in-bf16", "router-in-bf16"}
OTHERS = [mutant for mutant in IN_THE_GRAPH if mutant.on != GOLDEN]


def test_some_mutants_are_seen_by_the_golden_graph_alone() -> None:
    assert len(BY_NOTHING_ELSE) == 5
    assert all(mutant in BY_NOTHING_ELSE for mutant in BY_DAY)
    assert len(OTHERS) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("mutant", IN_THE_GRAPH if NIGHTLY else BY_DAY, ids=lambda mutant: mutant.name)
def test_the_golden_graph_shows(mutant: Any, plugins: Plugins, goldens: Path) -> None:
    entry, _ = find_entry("tiny-moe", plugins)
    with applied(mutant):
        found = golden(entry, dict(graphs(entry, plugins, [RECIPE])))
    problems = compare(of_recipe(read(golden_path(goldens, entry)), RECIPE), found)
    if mutant.name in TAKEN_AWAY:
        assert not problems, "the compiler keeps such a cast now: it is to be shown like the others"
    else:
        assert problems, f"{mutant.mistake}, and the golden graph is the same"
