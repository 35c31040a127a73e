"""A package of somebody else, installed with pip, adds entries, a changed layer, a head policy and a command.

Its source is tests/third_party_plugin. It is installed beside this project and not into it, so that discovery, the
command line and everything behind them are those that a user has.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forked
from checkpoints import tiny_checkpoint, write_json
from coreai_zoo.backend import drain
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from documents import public_modules

SOURCE = Path(__file__).parent / "third_party_plugin"
ZOO = Path(sys.executable).with_name("zoo")
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
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if arguments[0] in {"build", "gate", "verify"}:  # what the installed command starts as, the others show
            result = forked.run(*arguments, env=environment)
        else:
            command = [str(ZOO), *map(str, arguments)]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
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
def clamped(zoo: Zoo, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of the entry with the changed layer."""
    options = ("--checkpoint", checkpoint, "-o", tmp_path_factory.mktemp("exports"), "--json")
    return Bundle.open(Path(json.loads(zoo("build", "acme-mini-clamped", *options).stdout)["path"]))


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
    overlays = {module for module in modules if module.startswith("coreai_zoo_overlays.")}
    assert {"coreai_zoo_overlays.NAME"} <= public and all(module.count(".") == 1 for module in overlays)
    public |= overlays
    assert {module for module in modules if module.startswith("coreai")} <= public
    assert {name for name in names if name.startswith("_")} <= {"__init__"}
    assert {module.partition(".")[0] for module in modules - public} <= {
        "__future__", "click", "collections", "pathlib", "torch", "transformers", "typing",
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
    assert shown["facts"].items() >= {"ffn": "dense", "layers": 2, "hidden_size": 32, "gdn_value_heads": 4}.items()
    assert (shown["plugin"], shown["recipe"]) == ("acme", "int8hu")


def test_plugins_names_the_distribution_its_version_and_its_hooks(zoo: Zoo) -> None:
    (acme,) = (plugin for plugin in json.loads(zoo("plugins", "--json").stdout) if plugin["name"] == "acme")

    assert (acme["distribution"], acme["version"], acme["module"]) == ("acme-zoo", "2.1.0", "acme_zoo.plugin")
    assert set(acme["hooks"]) == {
        "zoo_entries", "zoo_claim_overlay", "zoo_layer_rewrites", "zoo_head_quantization", "zoo_tokenizer_classes",
        "zoo_oracle", "zoo_gate_bounds", "zoo_register_commands",
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

    both = run_zoo(installed, tmp_path)
    listed = both("list", "--json")
    error = both("show", "acme-mini", code=2).stderr.splitlines()[-1]

    assert [entry["plugin"] for entry in json.loads(listed.stdout) if entry["name"] == "acme-mini"] == ["acme"]
    assert listed.stderr == f"{error.replace('error: ', 'warning: ')}\n"
    assert both("--without", "other", "show", "acme-mini").stderr.splitlines() == [
        "Next, see what it needs: zoo plan acme-mini"
    ]
    assert error.startswith("error: the entry 'acme-mini' is there twice: from plugin 'acme' (")
    assert f"{installed / 'acme_zoo' / 'entries' / 'acme-mini.toml'}) and from plugin 'other' (" in error
    assert f"{other / 'entries' / 'acme-mini.toml'})" in error
    assert "Traceback" not in error


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def test_a_fine_tune_by_entry_alone_is_planned_as_its_base_model(zoo: Zoo, checkpoint: Path) -> None:
    fine_tune, base = (
        json.loads(zoo("plan", *arguments, "--json").stdout)
        for arguments in (("acme-mini",), ("--checkpoint", checkpoint))
    )

    assert (fine_tune["overlay"], fine_tune["plugin"]) == ("qwen3_5", "qwen36")
    assert fine_tune["published_name"] == "int8hu_block32_sym"
    assert fine_tune["roles"] == base["roles"]
    stored_as = {"dtype": "int8", "scheme": "symmetric", "block_size": 32, "scales": "absmax"}
    assert fine_tune["roles"]["head"]["stored_as"] == stored_as


def test_the_other_head_policy_is_planned(zoo: Zoo) -> None:
    plan = json.loads(zoo("plan", "acme-mini-clamped", "--json").stdout)

    assert plan["published_name"] == "int8hu_block32_sym_head_int8_block16_sym"
    stored_as = {"dtype": "int8", "scheme": "symmetric", "block_size": 16, "scales": "absmax"}
    assert plan["roles"]["head"]["stored_as"] == stored_as
    assert plan["roles"]["mlp"]["stored_as"]["block_size"] == 32


def test_the_changed_layer_is_recorded_with_its_plugin_and_code(clamped: Bundle) -> None:
    overlay = clamped.build["overlay"]
    rewrites = {rewrite["name"]: rewrite for rewrite in overlay["rewrites"]}

    assert (overlay["name"], overlay["plugin"]) == ("qwen3_5", "qwen36")
    assert rewrites.keys() == {"clamped-mlp", "loop-free-step", "conv-as-shifts"}
    assert (rewrites["clamped-mlp"]["plugin"], rewrites["clamped-mlp"]["pattern"]) == ("acme", "model.layers.*.mlp")
    assert rewrites["clamped-mlp"]["code_sha256"] != overlay["code_sha256"]
    assert rewrites["loop-free-step"]["code_sha256"] == overlay["code_sha256"]


def test_the_other_head_policy_is_in_record_card_and_name(clamped: Bundle) -> None:
    card = (clamped.directory / "README.md").read_text(encoding="utf-8")

    assert clamped.build["recipe"]["roles"]["head"] == {"dtype": "int8", "scheme": "symmetric", "block": 16}
    assert clamped.build["recipe"]["head_reason"].startswith("Outliers of this head come in narrow groups")
    assert "Outliers of this head come in narrow groups" in " ".join(card.split())
    assert clamped.directory.name == "acme_mini_clamped_decode_int8hu_block32_sym_head_int8_block16_sym"
    assert (clamped.entry, clamped.build["compared"]) == ("acme-mini-clamped", False)


def test_the_changed_layer_changes_the_logits_of_the_bundle_as_it_changes_those_of_transformers(
    clamped: Bundle, checkpoint: Path
) -> None:
    logits = bundle_logits(clamped)
    with_clamp, without = (oracle_logits(checkpoint, limit) for limit in (0.25, None))

    # Measured 0.020 and 0.96: what quantization costs so narrow a model, and what the clamp does.
    assert distance(logits, with_clamp) < 0.1
    assert distance(logits, without) > 0.3


# ---------------------------------------------------------------------------------------------------------------------
# A variant of an architecture that another plugin claims
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the variant: one more key in its config, and a tokenizer class of its own."""
    directory = tiny_checkpoint(tmp_path_factory.mktemp("limited"), head_scale=20.0)
    for name, change in {
        "config.json": {"acme_limit": 0.25},
        "tokenizer_config.json": {"tokenizer_class": "AcmeTokenizerFast"},
    }.items():
        write_json(directory / name, json.loads((directory / name).read_text()) | change)
    return directory


def test_a_variant_that_differs_in_one_layer_builds_and_passes_its_gate_by_its_own_reference_and_bounds(
    zoo: Zoo, limited: Path, tmp_path: Path
) -> None:
    options = ("--checkpoint", limited, "-o", tmp_path, "--json")
    bundle = Bundle.open(Path(json.loads(zoo("build", "acme-mini", *options).stdout)["path"]))

    overlay = bundle.build["overlay"]
    assert (overlay["name"], overlay["plugin"]) == ("acme_limited", "acme")
    assert {rewrite["plugin"] for rewrite in overlay["rewrites"]} == {"qwen36"}
    tokenizer = json.loads((bundle.tokenizer / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizer"
    assert zoo("verify", bundle.directory).returncode == 0

    prompt = ("--checkpoint", limited, "-p", "Acme makes models.", "--allow-weak-prompt", "--candidate", "coreai")
    record = json.loads(zoo("gate", bundle.directory, *prompt, "--json").stdout)
    (judged,) = record["prompts"]
    assert record["inputs"]["oracle"] == "transformers with Acme's clamp 1.0 in float32"
    assert judged["bounds"]["measured_on"].startswith("Acme Limited")
    assert judged["passed"]

    logits = bundle_logits(bundle)
    assert distance(logits, oracle_logits(limited, 0.25)) < 0.1
    assert distance(logits, oracle_logits(limited, None)) > 0.3


def bundle_logits(bundle: Bundle) -> np.ndarray[Any, Any]:
    """Logits [S, V] of the bundle's own asset on the Core AI runtime."""
    with CoreAIBackend().stepper(bundle.asset, bundle.functions, len(TOKENS)) as stepper:
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
    assert re.search(r"acme-head +How the head of a bundle is stored, and why\.", zoo("--help").stdout)
    assert "zoo acme-head exports/acme_mini" in zoo("acme-head", "--help").stdout


def test_the_command_reads_a_bundle(zoo: Zoo, clamped: Bundle) -> None:
    printed = zoo("acme-head", clamped.directory).stdout

    assert printed.startswith("int8 in blocks of 16, symmetric: Outliers of this head")


def test_an_error_of_the_command_is_one_of_the_zoos(zoo: Zoo, tmp_path: Path) -> None:
    result = zoo("acme-head", tmp_path / "nothing", code=2)

    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
