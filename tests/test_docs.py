"""The documentation is complete, and what it shows is real."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import click
import pytest

from coreai_zoo import hookspecs
from coreai_zoo.backends import builtin
from coreai_zoo.bounds import GENERAL
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.catalogue import find_contract
from coreai_zoo.cli.app import COMMANDS
from coreai_zoo.contracts import CONTRACTS, STATIC_S1
from coreai_zoo.entry import BundleDefaults, Entry, Facts, Published, Sample, load_entry
from coreai_zoo.overlay import Overlay
from coreai_zoo.planning.plan import plan
from coreai_zoo.plugins import HOOKS, Plugins, default_plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.signature import KVCache
from coreai_zoo_overlays import qwen3_5
from coreai_zoo_overlays.qwen3_5.table import ROLES
from documents import DOCS, blocks, first_column, public_modules, read, sections
from recipe_roles import spec_of_role
from toy_plugin import ToyOverlay

HOOKS_PAGE = sections(read("hooks.md"))
ENTRIES_PAGE = sections(read("entries.md"))


# ---------------------------------------------------------------------------------------------------------------------
# Hooks
# ---------------------------------------------------------------------------------------------------------------------


def test_the_page_of_hooks_documents_every_hook_in_order_and_no_other() -> None:
    assert [heading for heading in HOOKS_PAGE if heading.startswith("zoo_")] == list(HOOKS)
    introduction = read("hooks.md").partition("## ")[0]
    assert re.findall(r"^\| \[`(zoo_\w+)`\]\(#(zoo_\w+)\) \|", introduction, re.MULTILINE) == [
        (hook, hook) for hook in HOOKS
    ]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_documented_with_when_it_is_called_its_arguments_and_its_result(hook: str) -> None:
    text = HOOKS_PAGE[hook]
    prose, _fence, _rest = text.partition("```python")

    assert "**Called** " in prose
    assert "**Returns** " in prose
    arguments = list(inspect.signature(getattr(hookspecs, hook)).parameters)
    table = prose[prose.index("**Called**") : prose.index("**Returns**")]
    assert first_column(table) == arguments
    assert bool(arguments) != ("Takes nothing." in prose)


def example(hook: str) -> types.ModuleType:
    """The module that the page shows for `hook`, executed."""
    (block,) = (block for block in blocks(HOOKS_PAGE[hook]) if block.language == "python")
    module = types.ModuleType(f"example_of_{hook}")
    module.__file__ = str(DOCS / "hooks.md")
    exec(compile(block.text, f"docs/hooks.md, {hook}", "exec"), vars(module))
    return module


QWEN = qwen3_5.Qwen35Overlay()
CLAMPED = Entry(
    name="acme-mini-clamped",
    title="Acme",
    summary="Acme.",
    model_type=("qwen3_5",),
    hf_id="acme/acme",
    facts=Facts("dense"),
    bundle=BundleDefaults(256),
)


def facts_of(entry: str) -> Mapping[str, Any]:
    return load_entry(DOCS.parent / "zoo_entries" / f"{entry}.toml").facts.stated


TOY = ToyOverlay()
(FUNCTION,) = STATIC_S1.functions(KVCache(1, 1, 1), (), 8, 64).values()
TOY_CONFIG = TOY.read_config(
    {
        "vocab_size": 8, "hidden_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8,
        "intermediate_size": 8, "max_context_length": 8,
    }
)  # fmt: skip


CLIPPED = "symmetric_with_clipping"


def with_the_hosts_own(plugins: Plugins) -> Plugins:
    plugins.register(builtin, "coreai")
    return plugins


def commands(plugins: Plugins) -> list[str]:
    group = click.Group()
    plugins.register_commands(group)
    return list(group.commands)


# Each calls the example through the host and gives something by which its answer can be told.
ANSWERS: dict[str, tuple[Callable[[Plugins], Any], Any]] = {
    "zoo_entries": (lambda plugins: plugins.entries(), []),  # no folder of entries is beside the page
    "zoo_recipes": (lambda plugins: str(plugins.recipes()["acme-int8"].rules[0].spec), f"int8 block 64 {CLIPPED}"),
    "zoo_contracts": (lambda plugins: find_contract("acme-s1", plugins).summary[:9], "one token"),
    "zoo_register_commands": (commands, ["roles"]),
    "zoo_claim_overlay": (lambda plugins: plugins.claim_overlay("acme_hybrid", {})[0].name, "acme_hybrid"),
    "zoo_layer_rewrites": (
        lambda plugins: [
            rewrite.name for _, rewrite in plugins.layer_rewrites(QWEN, CLAMPED, None, STATIC_S1, FUNCTION)
        ],
        ["clamped-mlp"],
    ),
    "zoo_extra_states": (
        lambda plugins: [state.shape for state in plugins.extra_states(TOY, None, TOY_CONFIG, STATIC_S1)],
        [(1, 1, 8)],
    ),
    "zoo_weight_map": (lambda plugins: len(plugins.weight_map(TOY, None, TOY_CONFIG)[1].rules), 4),
    "zoo_head_quantization": (
        lambda plugins: str(plugins.head_quantization(QWEN, CLAMPED, None).spec),
        "int8 block 16 symmetric",
    ),
    "zoo_tokenizer_classes": (
        lambda plugins: with_the_hosts_own(plugins).tokenizer_classes()["AcmeTokenizer"],
        "PreTrainedTokenizer",
    ),
    "zoo_backends": (lambda plugins: list(plugins.backends()), ["coreai-every-layer"]),
    "zoo_oracle": (lambda plugins: plugins.oracle(TOY, {}).name, "acme-models 2.1"),
    "zoo_gate_bounds": (lambda plugins: plugins.gate_bounds(TOY).of_class("int8", "torch").error, 8e-2),
    "zoo_stress_samples": (lambda plugins: [s.name for s in plugins.stress_samples(TOY, TOY_CONFIG)], ["quiet-stream"]),
    "zoo_gates": (lambda plugins: [gate.name for _, gate in plugins.gates(QWEN, CLAMPED)], ["fits-the-phone"]),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_a_hook_is_a_plugin_that_answers(hook: str) -> None:
    plugins = Plugins()
    plugins.register(example(hook), "example")
    ask, answer = ANSWERS[hook]

    assert [info.hooks for info in plugins.info()] == [(hook,)]
    assert ask(plugins) == answer


@pytest.mark.parametrize("hook", ["zoo_layer_rewrites", "zoo_head_quantization", "zoo_gates"])
def test_the_examples_leave_other_entries_alone(hook: str) -> None:
    plugins = Plugins()
    plugins.register(example(hook), "example")
    other = attrs.evolve(CLAMPED, name="qwen3.6-27b")

    for entry in (other, None):
        assert not {
            "zoo_layer_rewrites": lambda: plugins.layer_rewrites(QWEN, entry, None, STATIC_S1, FUNCTION),  # noqa: B023
            "zoo_head_quantization": lambda: plugins.head_quantization(QWEN, entry, None),  # noqa: B023
            "zoo_gates": lambda: plugins.gates(QWEN, entry),  # noqa: B023
        }[hook]()


def test_the_examples_leave_other_overlays_alone() -> None:
    plugins = Plugins()
    for hook in ("zoo_oracle", "zoo_gate_bounds", "zoo_stress_samples"):
        plugins.register(example(hook), hook)

    assert plugins.oracle(QWEN, {}) is None
    assert plugins.gate_bounds(QWEN) is GENERAL
    assert plugins.stress_samples(QWEN, None) == []


def test_the_claimed_overlay_of_the_example_reads_its_own_config() -> None:
    overlay = example("zoo_claim_overlay").AcmeHybrid()
    known = QWEN.config_of_facts(facts_of("qwen3.6-27b"))
    flat = {**known["text_config"], "model_type": "acme_hybrid"}

    config = overlay.read_config({**flat, "depth": flat.pop("num_hidden_layers")})

    assert overlay.facts(config)["layers"] == 64


def test_the_page_of_hooks_tells_every_member_of_an_overlay() -> None:
    members = {name for name in vars(Overlay) if not name.startswith("_")}

    assert set(first_column(HOOKS_PAGE["zoo_claim_overlay"])) - {"model_type", "hf_config"} == members


def test_what_the_examples_import_is_what_the_page_offers() -> None:
    offered = public_modules()
    for block in blocks(read("hooks.md")):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("coreai"):
                overlay = node.module.startswith("coreai_zoo_overlays.")
                assert ("coreai_zoo_overlays.NAME" if overlay else node.module) in offered


def test_what_the_page_offers_is_there() -> None:
    rows = [
        line.strip("| ").split(" | ") for line in HOOKS_PAGE["Rules for all of them"].splitlines() if "`: " not in line
    ]
    offers = [(row[0], row[1]) for row in rows if len(row) == 2 and row[0].startswith("`coreai_zoo")]
    assert {name for cell, _ in offers for name in re.findall(r"`(.+?)`", cell)} == public_modules()
    for cell, purpose in offers:
        modules = [importlib.import_module(name) for name in re.findall(r"`(.+?)`", cell) if "NAME" not in name]
        for name in re.findall(r"`(\w+)`", purpose):
            assert any(hasattr(module, name) for module in modules), f"{cell} has no {name}"


# ---------------------------------------------------------------------------------------------------------------------
# Entries, commands, recipes, contracts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "table"),
    [
        ("Keys", Entry),
        ("Table `facts`", Facts),
        ("Table `bundle`", BundleDefaults),
        ("Table `sample`", Sample),
        ("Tables `published`", Published),
    ],
)
def test_every_key_of_an_entry_is_documented_and_said_to_be_required_if_it_is(heading: str, table: type) -> None:
    documented = {
        match[1]: match[2]
        for match in re.finditer(r"^\| `(\w+)` \| (yes|no) \| \S", ENTRIES_PAGE[heading], re.MULTILINE)
    }
    keys = {
        attribute.name: "yes" if attribute.default is attrs.NOTHING else "no"
        for attribute in attrs.fields(table)
        if attribute.name != "more"  # further facts, which the page tells in words
    }

    assert documented == keys


def test_the_entry_that_the_page_shows_is_valid(tmp_path: Path) -> None:
    (block,) = (block for block in blocks(read("entries.md")) if block.language == "toml")
    file = tmp_path / "entry.toml"
    file.write_text(block.text, encoding="utf-8")

    assert load_entry(file).name == "acme-mini"


def test_the_page_of_commands_is_what_the_commands_say() -> None:
    script = DOCS.parent / "scripts" / "command_docs.py"
    result = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


def test_the_page_of_commands_has_a_section_for_each() -> None:
    assert list(sections(read("commands.md"))) == ["zoo", *(f"zoo {name}" for name in COMMANDS)]


def test_every_recipe_is_in_its_table_with_what_it_does() -> None:
    rows = re.findall(r"^\| `(\w+)`[^|]* \| ([^|]+) \| ([^|]+) \| `(\w+)` \|$", read("recipes.md"), re.MULTILINE)

    assert {name: published for name, _body, _head, published in rows} == {
        recipe.name: recipe.published_name for recipe in default_plugins().recipes().values()
    }


def test_every_role_is_documented() -> None:
    assert set(first_column(sections(read("recipes.md"))["Roles"])) == {role.name for role in ROLES}


@pytest.mark.parametrize(("entry", "column"), [("qwen3.6-27b", 0), ("qwen3.6-35b-a3b", 1)])
def test_the_parameters_of_each_role_are_those_of_the_entry(entry: str, column: int) -> None:
    row = r"^\| `([\w.]+)` \| [^|]+ \| ([\d,]*) ?\| ([\d,]*) ?\| (.+) \|$"
    rows = re.findall(row, sections(read("recipes.md"))["Roles"], re.MULTILINE)
    documented = {role: int((numbers[column] or "0").replace(",", "")) for role, *numbers, _quantized in rows}
    planned = plan(BuildRequest(entry, recipe="int8hu", dry=True), default_plugins())
    counted = {role.name: 0 for role in ROLES} | {role.role: role.parameters for role in planned.roles}

    assert documented == counted
    assert {role for role, *_numbers, quantized in rows if quantized == "never"} == {
        role.name for role in ROLES if spec_of_role(RECIPES["int8hu"], role) is None
    }


def test_the_states_of_the_27b_are_as_documented() -> None:
    rows = re.findall(r"^\| `(\w+)`.* \| [^|]+ \| ([\dT x]+) \| ([\d,]+)", read("overlay.md"), re.MULTILINE)
    documented = {name: (shape, int(size.replace(",", ""))) for name, shape, size in rows}
    config = QWEN.read_config(QWEN.config_of_facts(facts_of("qwen3.6-27b")))
    kv = QWEN.kv_cache(config)

    states = {
        state.name: (" x ".join(map(str, state.shape)), 2 * math.prod(map(int, state.shape)))
        for state in qwen3_5.extra_states(config, STATIC_S1)
    }
    pair = (f"{kv.layers} x 1 x {kv.heads} x T x {kv.head_dim}", 2 * 2 * kv.layers * kv.heads * kv.head_dim)
    assert documented == {"keyCache": pair, **states}


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_contract_is_documented(name: str) -> None:
    assert any(heading.startswith(f"`{name}`") for heading in sections(read("contracts.md")))


# ---------------------------------------------------------------------------------------------------------------------
# All pages
# ---------------------------------------------------------------------------------------------------------------------

PAGES = sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", ["../README.md", "../CONTRIBUTING.md", *PAGES])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    folder = (DOCS / page).parent
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", read(page)):
        path, _, anchor = target.partition("#")
        linked = (folder / path).resolve() if path else DOCS / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


FOLDERS = "benchmarks|coreai_zoo|coreai_zoo_qwen36|docs|overlays|scripts|tests|zoo_entries"


@pytest.mark.parametrize("page", ["../README.md", "../CONTRIBUTING.md", *PAGES])
def test_the_files_and_modules_that_a_page_names_are_there(page: str) -> None:
    root = DOCS.parent
    named = re.findall(r"`([\w./]+)`", read(page))
    files = [name for name in named if re.match(rf"({FOLDERS})/", name)]
    assert [name for name in files if not (root / name).exists()] == []

    rooms = "|".join(
        {path.parent.name for path in root.glob("coreai_zoo/*/__init__.py")} - {"cli"}
    )  # a hook's argument
    for name in named:
        if match := re.fullmatch(rf"(?:coreai_zoo\.)?((?:{rooms})\.(?!json|py)[\w.]+)", name):
            pkgutil.resolve_name(f"coreai_zoo.{match[1]}")  # raises where there is none


@pytest.mark.parametrize("page", PAGES)
def test_toml_and_python_of_a_page_can_be_parsed(page: str) -> None:
    for block in blocks(read(page)):
        if block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "python":
            compile(block.text, f"docs/{page}, line {block.line}", "exec")
