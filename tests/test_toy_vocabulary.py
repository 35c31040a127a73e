"""An architecture of a plugin with words of its own: roles, recipe, contract, bounds and oracle, and no line for it in
the host. Everything goes through the command line.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import toy_reference
import toy_vocabulary
import toys
from command import zoo
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.plugins import Plugins
from documents import public_modules

ASKED = ("--recipe", "toy-int8", "--contract", "toy-pair")
WORDS = {"toy.way-back": "the way back from the toy's wide layer", "toy.memory": "gains of what the toy remembers"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    toys.write_checkpoint(folder / "checkpoint")
    text = toys.write_entry(folder / "toy.toml").read_text(encoding="utf-8")
    hf_id = 'hf_id = "toys/toy-mean"\n'
    named = text.replace(hf_id, f'{hf_id}recipe = "toy-int8"\ncontract = "toy-pair"\n')
    (folder / "toy.toml").write_text(named, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def plugins(folder: Path) -> Plugins:
    return toys.host(toy_vocabulary.ToyVocabulary(folder / "toy.toml"))


@pytest.fixture(scope="module")
def bundle(folder: Path, plugins: Plugins) -> Bundle:
    options = ("--checkpoint", folder / "checkpoint", "-o", folder / "exports", "--json")
    result = zoo("build", "toy-mean", *options, *ASKED, plugins=plugins)
    assert result.exit_code == 0, result.output
    return Bundle.open(Path(json.loads(result.stdout)["path"]))


def test_the_plugin_imports_public_modules_only() -> None:
    modules: set[str] = set()
    for module in (toy_vocabulary, toy_reference):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                modules.add(str(node.module))
            elif isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
    assert {module for module in modules if module.startswith("coreai")} <= public_modules()
    assert {name.partition(".")[0] for name in modules} <= {
        "__future__", "attrs", "collections", "coreai_zoo", "torch", "toy_plugin", "toy_reference", "transformers",
        "typing",
    }  # fmt: skip


def test_its_recipe_decides_one_of_its_roles_otherwise(plugins: Plugins) -> None:
    roles = {
        recipe: json.loads(zoo("plan", "toy-mean", "--recipe", recipe, "--json", plugins=plugins).stdout)["roles"]
        for recipe in ("toy-int8", "int8hu")
    }
    blocks = {
        recipe: {role: row["stored_as"] and row["stored_as"]["block_size"] for role, row in of_recipe.items()}
        for recipe, of_recipe in roles.items()
    }
    assert blocks["int8hu"] == {
        "embedding": None, "head": 16, "attention": 32, "mlp": 32, "norm": None, "toy.way-back": 32, "toy.memory": None,
    }  # fmt: skip
    assert blocks["toy-int8"] == {**blocks["int8hu"], "toy.way-back": 16}


def test_a_plan_says_what_its_roles_are(plugins: Plugins) -> None:
    planned = json.loads(zoo("plan", "toy-mean", "--json", plugins=plugins).stdout)
    assert (planned["recipe"], planned["contract"]) == ("toy-int8", "toy-pair")
    assert {role: planned["roles"][role]["meaning"] for role in WORDS} == WORDS
    text = zoo("plan", "toy-mean", plugins=plugins).output
    assert "; ".join(f"{role}: {meaning}" for role, meaning in WORDS.items()) in text.splitlines()


def test_an_entry_is_shown_with_how_its_roles_are_stored(plugins: Plugins) -> None:
    shown = json.loads(zoo("show", "toy-mean", "--json", plugins=plugins).stdout)
    assert (shown["recipe"], shown["contract"], shown["plugin"]) == ("toy-int8", "toy-pair", "toys")
    assert shown["recipe_by_role"]["toy.way-back"] == "int8 block 16 symmetric"
    assert shown["recipe_by_role"]["toy.memory"] is None
    assert "toy.way-back" in zoo("show", "toy-mean", plugins=plugins).output


def test_the_records_of_a_bundle_say_what_its_roles_are(bundle: Bundle) -> None:
    build = bundle.build
    assert bundle.directory.name == "toy_mean_decode_mix_int8_cf529cc4a2cc_head_int8_block16_sym"
    assert (build["recipe"]["name"], build["contract"]["name"]) == ("toy-int8", "toy-pair")
    assert build["recipe"]["roles"]["toy.way-back"] == {"dtype": "int8", "scheme": "symmetric", "block": 16}
    assert build["recipe"]["roles"]["toy.memory"] is None
    assert {role: build["roles"][role]["meaning"] for role in WORDS} == WORDS
    assert [build["weights"][role]["tensors"] for role in WORDS] == [2, 2]
    rows = (bundle.directory / "README.md").read_text(encoding="utf-8").splitlines()
    for role, meaning in WORDS.items():
        assert any(row.startswith(f"- `{role}`, {meaning}: ") for row in rows), role
    assert "It needs a box of toys." in rows


def test_the_bundle_verifies(bundle: Bundle, plugins: Plugins) -> None:
    assert zoo("verify", bundle.directory, plugins=plugins).exit_code == 0


PROMPT = ("-p", "Hi, toy! A box?", "--allow-weak-prompt", "--json")


def gated(bundle: Bundle, checkpoint: Path, plugins: Plugins, code: int = 0) -> dict[str, Any]:
    result = zoo("gate", bundle.directory, "--checkpoint", checkpoint, *PROMPT, plugins=plugins)
    assert result.exit_code == code, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_the_bundle_is_gated_against_its_own_reference_and_bounds(
    bundle: Bundle, folder: Path, plugins: Plugins
) -> None:
    record = gated(bundle, folder / "checkpoint", plugins)
    (judged,) = record["prompts"]
    assert record["inputs"]["oracle"] == "toy 1.0 in float32"
    assert judged["bounds"]["measured_on"] == toy_vocabulary.BOUNDS.measured_on
    assert judged["passed"]


def test_a_reference_that_computes_something_else_fails_the_gate(
    bundle: Bundle, folder: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference forgets the mean of the tokens before: the gate would pass if it asked nobody but the overlay."""
    forward = toy_reference.ToyBlock.forward
    monkeypatch.setattr(toy_reference.ToyBlock, "forward", lambda self, x: forward(self, x + x.mean(1, keepdim=True)))
    (judged,) = gated(bundle, folder / "checkpoint", plugins, code=1)["prompts"]
    assert not judged["passed"]
