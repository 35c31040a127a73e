"""Fixtures that several test modules share."""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coreai_zoo import hookimpl
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.cli.app import cli
from coreai_zoo.plugins import Plugins

ROOT = Path(__file__).parent.parent

ENTRY = """\
name = "toy-1b"
title = "Toy 1B"
summary = "A toy."
model_type = ["toy"]
hf_id = "toys/Toy-1B"

[facts]
ffn = "dense"
layers = 2
hidden_size = 8
vocab_size = 32

[bundle]
max_context = 64
"""


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def entry_file(tmp_path: Path) -> Callable[..., Path]:
    """Write an entry file: the toy entry, with pieces of its text replaced."""

    def write(*replacements: tuple[str, str], name: str = "toy") -> Path:
        text = ENTRY
        for old, new in replacements:
            assert old in text, f"the toy entry has no {old!r} to replace"
            text = text.replace(old, new)
        path = tmp_path / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_plugin() -> Callable[..., types.ModuleType]:
    """Make a plugin: a real module whose hooks are the functions that are given by hook name."""

    def make(**hooks: Callable[..., Any]) -> types.ModuleType:
        module = types.ModuleType("a_plugin")
        for name, function in hooks.items():
            setattr(module, name, hookimpl(function))
        return module

    return make


@pytest.fixture
def shipped(root: Path, make_plugin: Callable[..., types.ModuleType]) -> Plugins:
    """A host with one plugin, which brings the entries of this repository."""
    plugins = Plugins()
    directory = root / "coreai_zoo_qwen36" / "zoo_entries"  # through the symlink, as it is packaged
    plugins.register(make_plugin(zoo_entries=lambda: sorted(directory.glob("*.toml"))), "shipped")
    return plugins


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    """Build a sample once per entry and recipe, through the command line. Tests leave it as it is."""

    @functools.cache
    def build(entry: str, recipe: str) -> Bundle:
        output = tmp_path_factory.mktemp("exports")
        arguments = ["build", entry, "--sample", "--recipe", recipe, "-o", str(output), "--json"]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        return Bundle.open(Path(json.loads(result.stdout)["path"]))

    return build
