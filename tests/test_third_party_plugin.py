"""A package of somebody else, installed with pip, adds entries, a changed layer, a head policy and a command.

Its source is tests/third_party_plugin. It is installed beside this project and not into it, so that discovery, the
command line and everything behind them are those that a user has.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import tiny_checkpoint
from coreai_zoo.backends import drain
from coreai_zoo.backends.coreai import CoreAIBackend
from coreai_zoo.bundle import Bundle
from coreai_zoo.gates.oracle import quiet_transformers
from documents import public_modules

SOURCE = Path(__file__).parent / "third_party_plugin"
ZOO = Path(sys.executable).with_name("zoo")
ENTRIES = ("acme-mini", "acme-mini-clamped")
TOKENS = [72, 105, 44, 32, 122, 111, 111, 33]

Zoo = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the plugin as pip installs it."""
    folder = tmp_path_factory.mktemp("acme")
    source = shutil.copytree(SOURCE, folder / "source")  # a build leaves files beside what it builds
    target = folder / "site-packages"
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def run_zoo(*path: Path) -> Zoo:
    """Run `zoo` with `path` in front of where packages are found."""
    paths = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [str(ZOO), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},  # two run at once
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == code, result.stderr
        return result

    return run


@pytest.fixture(scope="module")
def zoo(installed: Path) -> Zoo:
    """`zoo` in an environment that has the plugin."""
    return run_zoo(installed)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the size that both entries state."""
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def bundles(zoo: Zoo, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Both entries, built from the same checkpoint, at the same time."""
    output = tmp_path_factory.mktemp("exports")
    options = ("--checkpoint", checkpoint, "-o", output, "--json")
    with ThreadPoolExecutor() as two_at_once:
        results = two_at_once.map(lambda entry: zoo("build", entry, *options), ENTRIES)
        paths = [Path(json.loads(result.stdout)["path"]) for result in results]
    return {entry: Bundle.open(path) for entry, path in zip(ENTRIES, paths, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# The package itself
# ---------------------------------------------------------------------------------------------------------------------


def test_the_package_imports_public_modules_and_reads_public_names_only() -> None:
    modules, names = set(), set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(str(node.module))
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)

    public = public_modules()
    assert {module for module in modules if module.startswith("coreai")} <= public
    assert {name for name in names if name.startswith("_")} <= {"__init__"}
    assert {module.partition(".")[0] for module in modules - public} <= {
        "__future__", "click", "collections", "pathlib", "torch", "typing",
    }  # fmt: skip


def test_the_package_depends_on_the_zoo_alone() -> None:
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert project["dependencies"] == ["coreai-zoo"]


# ---------------------------------------------------------------------------------------------------------------------
# Discovery
# ---------------------------------------------------------------------------------------------------------------------


def test_the_entries_are_listed_beside_ours(zoo: Zoo) -> None:
    entries = {entry["name"]: entry["plugin"] for entry in json.loads(zoo("list", "--json").stdout)}

    assert entries["acme-mini"] == entries["acme-mini-clamped"] == "acme"
    assert entries["qwen3.6-27b"] == "qwen36"


def test_an_entry_is_shown_with_its_facts(zoo: Zoo) -> None:
    shown = json.loads(zoo("show", "acme-mini", "--json").stdout)

    assert shown["title"] == "Acme Mini"
    assert shown["facts"] == {"ffn": "dense", "layers": 2, "hidden_size": 32, "vocab_size": 288}
    assert (shown["plugin"], shown["recipe"]) == ("acme", "int8hu")


def test_plugins_names_the_distribution_its_version_and_its_hooks(zoo: Zoo) -> None:
    (acme,) = (plugin for plugin in json.loads(zoo("plugins", "--json").stdout) if plugin["name"] == "acme")

    assert (acme["distribution"], acme["version"], acme["module"]) == ("acme-zoo", "2.1.0", "acme_zoo.plugin")
    assert set(acme["hooks"]) == {
        "zoo_entries", "zoo_layer_rewrites", "zoo_head_quantization", "zoo_register_commands",
    }  # fmt: skip


def test_without_the_package_there_is_neither_entry_nor_command() -> None:
    plain = run_zoo()

    assert "no entry is called 'acme-mini'" in plain("show", "acme-mini", code=2).stderr
    assert "No such command 'acme-head'" in plain("acme-head", ".", code=2).stderr


def test_an_entry_name_that_two_packages_bring_is_refused_with_both_and_their_files(
    installed: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other_zoo"
    shutil.copytree(installed / "acme_zoo" / "entries", other / "entries")
    (other / "__init__.py").write_text(
        "from pathlib import Path\nfrom coreai_zoo import hookimpl\n\n@hookimpl\ndef zoo_entries():\n"
        "    return [Path(__file__).parent / 'entries' / 'acme-mini.toml']\n"
    )
    information = tmp_path / "other_zoo-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: other-zoo\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[coreai_zoo]\nother = other_zoo\n")

    error = run_zoo(installed, tmp_path)("list", code=2).stderr

    assert error.startswith("error: the entry 'acme-mini' is there twice: from plugin 'acme' (")
    assert f"{installed / 'acme_zoo' / 'entries' / 'acme-mini.toml'}) and from plugin 'other' (" in error
    assert f"{other / 'entries' / 'acme-mini.toml'})" in error
    assert "Traceback" not in error


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def test_a_fine_tune_by_entry_alone_is_built_as_its_base_model(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["acme-mini"]

    assert bundle.directory.name == "acme_mini_decode_int8hu_block32_sym"
    assert bundle.metadata["source"]["hf_model_id"] == "acme/Acme-Mini"
    assert {rewrite["plugin"] for rewrite in bundle.build["overlay"]["rewrites"]} == {"qwen36"}
    assert bundle.build["recipe"]["roles"]["head"] == {"dtype": "int8", "scheme": "symmetric", "block": 32}


def test_the_changed_layer_is_recorded_with_its_plugin_and_code(bundles: dict[str, Bundle]) -> None:
    overlay = bundles["acme-mini-clamped"].build["overlay"]
    rewrites = {rewrite["name"]: rewrite for rewrite in overlay["rewrites"]}

    assert (overlay["name"], overlay["plugin"]) == ("qwen3_5", "qwen36")
    assert rewrites.keys() == {"clamped-mlp", "loop-free-step", "conv-as-shifts"}
    assert (rewrites["clamped-mlp"]["plugin"], rewrites["clamped-mlp"]["pattern"]) == ("acme", "model.layers.*.mlp")
    assert rewrites["clamped-mlp"]["code_sha256"] != overlay["code_sha256"]
    assert rewrites["loop-free-step"]["code_sha256"] == overlay["code_sha256"]


def test_the_other_head_policy_is_in_record_card_and_name(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["acme-mini-clamped"]
    card = (bundle.directory / "README.md").read_text(encoding="utf-8")

    assert bundle.build["recipe"]["roles"]["head"] == {"dtype": "int8", "scheme": "symmetric", "block": 16}
    assert bundle.build["recipe"]["head_reason"].startswith("Outliers of this head come in narrow groups")
    assert "Outliers of this head come in narrow groups" in " ".join(card.split())
    assert bundle.directory.name == "acme_mini_clamped_decode_int8hu_block32_sym_head_int8_block16_sym"


def test_the_changed_layer_changes_the_logits_of_the_bundle_as_it_changes_those_of_transformers(
    bundles: dict[str, Bundle], checkpoint: Path
) -> None:
    plain, clamped = (bundle_logits(bundles[name]) for name in ENTRIES)
    oracle, oracle_clamped = (oracle_logits(checkpoint, limit) for limit in (None, 0.25))

    # Measured 0.027, 0.020, 0.99 and 0.96: what quantization costs so narrow a model, and what the clamp does.
    assert distance(plain, oracle) < 0.1
    assert distance(clamped, oracle_clamped) < 0.1
    assert distance(plain, clamped) > 0.3
    assert distance(clamped, oracle) > 0.3


def bundle_logits(bundle: Bundle) -> np.ndarray[Any, Any]:
    """Logits [S, V] of the bundle's own asset on the Core AI runtime."""
    with CoreAIBackend().stepper(bundle.asset, bundle.signature, len(TOKENS)) as stepper:
        return np.stack(list(drain(stepper, TOKENS))).astype(np.float32)


def oracle_logits(checkpoint: Path, limit: float | None) -> np.ndarray[Any, Any]:
    """Logits [S, V] of transformers' own model in fp32, its feed-forward clamped at `limit` if there is one."""
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for name, module in model.named_modules() if limit is not None else ():
        if name.endswith("mlp.gate_proj"):
            module.register_forward_hook(lambda _module, _inputs, out: out.clamp(max=limit))
        elif name.endswith("mlp.up_proj"):
            module.register_forward_hook(lambda _module, _inputs, out: out.clamp(-limit, limit))
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


def distance(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Root mean square of the difference, relative to the spread of the second's logits."""
    return float(np.sqrt(np.square(one - other).mean()) / other.std())


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_is_in_the_help(zoo: Zoo) -> None:
    assert "acme-head  How the head of a bundle is stored, and why." in zoo("--help").stdout
    assert "zoo acme-head exports/acme_mini" in zoo("acme-head", "--help").stdout


def test_the_command_reads_a_bundle(zoo: Zoo, bundles: dict[str, Bundle]) -> None:
    plain, clamped = (zoo("acme-head", bundle.directory).stdout for bundle in bundles.values())

    assert plain.startswith("int8 in blocks of 32, symmetric: The rows of a head over a large vocabulary")
    assert clamped.startswith("int8 in blocks of 16, symmetric: Outliers of this head")


def test_an_error_of_the_command_is_one_of_the_zoos(zoo: Zoo, tmp_path: Path) -> None:
    result = zoo("acme-head", tmp_path / "nothing", code=2)

    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
