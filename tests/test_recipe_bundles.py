"""Bundles by recipes of a user's own: built, verified and rebuilt without the file, measured as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attrs import evolve

from command import zoo
from coreai_zoo.recipe_files import as_toml
from coreai_zoo.recipes import QuantizationSpec, Recipe, Rule
from traces import trace_once

INT8 = QuantizationSpec("int8", "symmetric_with_clipping", 32)
INT4 = QuantizationSpec("int4", "symmetric_with_clipping", 32)
PLAIN = Rule(None, "The rest.")

MIXED = """\
description = "Of my own."

[[rule]]
role = "mlp"
layers = [2, -3]
dtype = "int8"
scheme = "symmetric"
why = "To see it."

[[rule]]
role = ["head", "body"]
dtype = "int8"
why = "The rest."

[[rule]]
dtype = "fp16"
why = "Small."
"""


def test_a_bundle_by_a_file_is_verified_and_rebuilt_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_once(monkeypatch)
    path = tmp_path / "int8hu.toml"  # which it is not
    path.write_text(MIXED, encoding="utf-8")
    built = zoo("build", "qwen3.6-27b", "--sample", "--recipe", path, "-o", tmp_path / "out", "--json")
    assert built.exit_code == 0, built.output
    bundle = Path(json.loads(built.stdout)["path"])
    build = json.loads((bundle / "build.json").read_text(encoding="utf-8"))
    assert build["command"][-2:] == ["--recipe", "int8hu.toml"] and not build["recipe"]["installed"]
    assert build["recipe"]["roles"]["mlp"] == [INT8.record, evolve(INT8, scheme="symmetric").record]
    assert "of a file" in (bundle / "README.md").read_text(encoding="utf-8")
    path.unlink()
    assert zoo("verify", bundle, "--rebuild").exit_code == 0
    for key, value in (("installed", True), ("rule", build["recipe"]["rule"][1:])):
        changed = {**build, "recipe": {**build["recipe"], key: value}}
        (bundle / "build.json").write_text(json.dumps(changed), encoding="utf-8")
        assert zoo("verify", bundle).exit_code == 1, key


def test_sensitivity_measures_a_recipe_as_it_is(tmp_path: Path) -> None:
    """Weights that a rule leaves alone are no part, and those of one role in two formats are two."""
    path = tmp_path / "mine.toml"
    rules = (
        Rule(INT4, "why", ("mlp",), layers=(1, 2)),
        Rule(INT8, "why", ("mlp",), layers=(0, 3)),
        Rule(INT8, "why", parameters=("*.o_proj.weight",)),
        PLAIN,
    )
    path.write_text(as_toml(Recipe("mine", "Mine.", rules)), encoding="utf-8")
    result = zoo("sensitivity", "qwen3.6-27b", "--sample", "--recipe", path, "--positions", "4", "--json")
    assert result.exit_code == 0, result.output
    parts = {(part["role"], part["as"]): part["tensors"] for part in json.loads(result.stdout)["parts"]}
    assert parts == {
        ("mlp", "int4:block32:symmetric_with_clipping"): 6,
        ("mlp", "int8:block32:symmetric_with_clipping"): 6,
        ("attention", "int8:block32:symmetric_with_clipping"): 2,
    }
