"""`zoo check` passes what holds, fails what does not, and runs all checks either way."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner, Result
from torch import nn

from coreai_zoo.catalogue import find_entry
from coreai_zoo.cli.app import cli
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, CheckFailed
from coreai_zoo.gates import stress as gate_stress
from coreai_zoo.gates.run import GateOptions
from coreai_zoo.lowering.graph import Graph, LayerKind
from coreai_zoo.overlay import LayerRewrite
from coreai_zoo.plugins import Plugins, default_plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.review import check, structure
from coreai_zoo.review.check import CHECKS, judge_sample
from coreai_zoo.review.goldens import (
    Wanted,
    compare,
    counts_of,
    golden,
    golden_path,
    of_recipe,
    read,
    take,
    wanted,
    write,
)
from coreai_zoo.review.revision import base_revision
from coreai_zoo.review.structure import of_entry
from coreai_zoo.stress import StressSample
from mutants import Edit, Mutant, applied
from suite import NIGHTLY

GOLDENS = Path(__file__).parent / "goldens"
FILES = sorted(GOLDENS.glob("*.toml"))


def checked(plugins: Plugins, *only: str) -> Result:
    arguments = [part for name in only for part in ("--only", name)]
    return CliRunner().invoke(cli, ["check", "--json", *arguments], obj=plugins)


def outcome(result: Result, name: str) -> dict[str, object]:
    (found,) = (each for each in json.loads(result.stdout)["checks"] if each["name"] == name)
    return dict(found)


def with_entry(path: Path, make_plugin: Callable[..., types.ModuleType]) -> Plugins:
    """What is installed, and one more entry."""
    plugins = Plugins.discover()
    plugins.register(make_plugin(zoo_entries=lambda: [path]), "another")
    return plugins


def sibling(root: Path, tmp_path: Path, *replacements: tuple[str, str]) -> Path:
    """The dense entry under another name, with pieces of its text replaced."""
    text = (root / "zoo_entries" / "qwen3.6-27b.toml").read_text()
    for old, new in (('name = "qwen3.6-27b"', 'name = "sibling"'), *replacements):
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "sibling.toml"
    path.write_text(text)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The checks
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_installed_has_valid_entries_and_unambiguous_overlays() -> None:
    result = checked(default_plugins(), "entries", "overlays")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"]
    assert [(check["name"], check["passed"]) for check in found["checks"]] == [("entries", True), ("overlays", True)]


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (('recipe = "int8hu"', 'recipe = "int9"'), "There is no recipe 'int9'"),
        (('contract = "static-s1"', 'contract = "elastic"'), "There is no contract 'elastic'"),
        (('path = "samples/dense"', 'path = "samples/none"'), "samples/none"),
        (('machine = "M4 Pro"', 'machine = "M4 pro"'), "No chip is called 'M4 pro'. Did you mean M4 Pro?"),
        (('recipe = "int4lin"', 'recipe = "int4hu"'), "published: There is no recipe 'int4hu'"),
        (("decode = 8.7", 'decode = 8.7\ncontract = "dynamik"'), "published: There is no contract 'dynamik'"),
        (
            ("linear_attention_layers = 48", "linear_attention_layers = 47"),
            "linear_attention_layers is 47, and the other facts make it 48",
        ),
    ],
)
def test_an_entry_that_cannot_be_built_from_fails(
    replacement: tuple[str, str],
    message: str,
    root: Path,
    tmp_path: Path,
    make_plugin: Callable[..., types.ModuleType],
) -> None:
    result = checked(with_entry(sibling(root, tmp_path, replacement), make_plugin), "entries", "overlays")
    assert result.exit_code == 1, result.output
    assert outcome(result, "entries")["passed"] is False
    assert message in str(outcome(result, "entries")["detail"])
    assert outcome(result, "overlays")["passed"] is True  # the next check ran all the same
    assert "Failed: entries." in result.output


@pytest.mark.parametrize("only", [("entries",), ("overlays",), ("entries", "overlays")], ids=" ".join)
def test_a_plugin_that_cannot_say_what_it_claims_fails(
    make_plugin: Callable[..., types.ModuleType], only: tuple[str, ...]
) -> None:
    plugins = Plugins.discover()
    plugins.register(make_plugin(zoo_claim_overlay=lambda hf_config: hf_config["of_mine"]), "unsure")
    result = checked(plugins, *only)
    assert result.exit_code == 1
    assert "plugin 'unsure' failed in zoo_claim_overlay: KeyError" in str(outcome(result, only[0])["detail"])


def test_two_overlays_for_one_architecture_fail(make_plugin: Callable[..., types.ModuleType]) -> None:
    from coreai_zoo_overlays.qwen3_5 import Qwen35Overlay

    plugins = Plugins.discover()
    plugins.register(make_plugin(zoo_claim_overlay=lambda model_type: Qwen35Overlay()), "greedy")
    result = checked(plugins, "overlays")
    assert result.exit_code == 1
    assert "greedy" in str(outcome(result, "overlays")["detail"])


def test_a_sample_that_does_not_build_fails(
    root: Path, tmp_path: Path, make_plugin: Callable[..., types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "broken_samples"
    shutil.copytree(root / "coreai_zoo_qwen36" / "samples" / "dense", package / "dense")
    (package / "__init__.py").touch()
    config = json.loads((package / "dense" / "config.json").read_text())
    config.get("text_config", config)["hidden_size"] = 161
    (package / "dense" / "config.json").write_text(json.dumps(config))
    monkeypatch.syspath_prepend(str(tmp_path))
    package_line = ('package = "coreai_zoo_qwen36"', 'package = "broken_samples"')
    entry = sibling(root, tmp_path, package_line, ("samples/dense", "dense"))

    class OneEntry(Plugins):
        """What is installed, with no entry but the broken one."""

        def entries(self) -> list[tuple[str, Path]]:
            return [("another", entry)]

    shown = OneEntry.discover()
    result = checked(shown, "samples")
    assert result.exit_code == 1, result.output
    assert str(outcome(result, "samples")["detail"]).startswith("sample dense of broken_samples as sibling: ")


@pytest.mark.parametrize("step", [None, "_require_golden_metadata", "judge_sample"])
def test_every_sample_is_held_against_the_golden_file_and_judged(
    step: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of either, of the last sample alone, fails the check."""
    monkeypatch.setattr(check, "build", lambda request, *_: types.SimpleNamespace(path=request.model))
    monkeypatch.setattr(check.Bundle, "open", lambda path: path)
    seen: dict[str, list[str]] = {}

    def of(name: str) -> Callable[..., None]:
        def look(entry: str, *_: object) -> None:
            seen.setdefault(name, []).append(entry)
            if name == step and len(seen[name]) == 2:
                raise CheckFailed("it was only looked at.")

        return look

    for name in ("_require_golden_metadata", "judge_sample"):
        monkeypatch.setattr(check, name, of(name))
    result = checked(default_plugins(), "samples")

    assert result.exit_code == (step is not None)
    first = seen["_require_golden_metadata"]
    assert len({*first}) == len(first) == 2, "a dense and a routed one"
    assert seen["judge_sample"] == first[: 1 if step == "_require_golden_metadata" else 2]


def test_a_sample_is_looked_at_once_for_all_that_make_the_same_of_it(
    root: Path, tmp_path: Path, make_plugin: Callable[..., types.ModuleType]
) -> None:
    """Whatever the entries are called."""
    assert len(check._with_samples(default_plugins())) == 2
    plugins = with_entry(sibling(root, tmp_path, ('name = "sibling"', 'name = "zz-sibling"')), make_plugin)
    assert len(check._with_samples(plugins)) == 2, "it makes what all others make"

    def hook(entry: Entry | None) -> list[LayerRewrite]:
        ours = entry is not None and entry.name == "zz-sibling"
        return [LayerRewrite("mine", "model.norm", "of mine alone", lambda norm: norm)] if ours else []

    plugins.register(make_plugin(zoo_layer_rewrites=hook), "mine")
    looked_at = check._with_samples(plugins)
    assert [entry.name for entry in looked_at.values()][-1] == "zz-sibling" and len(looked_at) == 3


def test_every_stress_sample_of_an_entry_is_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry, _ = find_entry("qwen3.6-27b", default_plugins())
    names = [stress.name for stress in gate_stress.stress_samples(entry, default_plugins())]

    def write(_sample: Path, stress: StressSample, folder: Path) -> Path:
        folder.mkdir()
        return folder

    def opened(_folder: Path, stress: StressSample, *_: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(run=lambda: stress.name)

    monkeypatch.setattr(gate_stress, "write_checkpoint", write)
    monkeypatch.setattr(gate_stress.StressTest, "open", opened)

    assert [*gate_stress.judge_all(entry, default_plugins(), tmp_path)] == names
    assert len({*names}) == len(names) >= 6


class OneStressSample(Plugins):
    """What is installed, with the dense entry and its first stress sample only."""

    def entries(self) -> list[tuple[str, Path]]:
        return [each for each in super().entries() if each[1].stem == "qwen3.6-27b"]

    def stress_samples(self, overlay: Any, config: Any) -> list[StressSample]:
        return super().stress_samples(overlay, config)[:1]


def test_the_overlay_is_run_on_stress_samples_and_a_wrong_eps_fails_there_by_name() -> None:
    plugins = OneStressSample.discover()
    passed = checked(plugins, "stress")
    assert passed.exit_code == 0, passed.output
    assert outcome(passed, "stress")["detail"] == "1 stress samples keep their bounds"
    norm = "self.k_norm = RMSNorm(self.head_dim, "
    edit = Edit("attention.Attention.__init__", f"{norm}config.rms_norm_eps)", f"{norm}1e-5)")
    with applied(Mutant("eps", "the norm of keys has another eps", edits=(edit,))):
        failed = checked(plugins, "stress")
    assert failed.exit_code == 1
    detail = str(outcome(failed, "stress")["detail"])
    assert detail.startswith(
        "sample dense of coreai_zoo_qwen36 as qwen3.6-27b, small-activations (what every norm is given"
    )
    assert "confident flips" in detail


def test_the_gate_of_the_check_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options that `zoo gate` has by default, none weaker."""
    asked: list[GateOptions] = []

    def look(_bundles: object, options: GateOptions, *_rest: object, **_more: object) -> list[dict[str, Any]]:
        asked.append(options)
        return [{"verdict": {"passed": False, "reasons": ["it was only looked at"]}}]

    monkeypatch.setattr("coreai_zoo.review.check.run_gate", look)
    monkeypatch.setattr("coreai_zoo.review.check.write_report", lambda *_: None)
    bundle = types.SimpleNamespace(directory=tmp_path)
    with pytest.raises(CheckFailed, match="it was only looked at"):
        judge_sample(bundle, default_plugins())  # type: ignore[arg-type]
    monkeypatch.setattr("coreai_zoo.cli.gate.run_gate", look)
    monkeypatch.setattr("coreai_zoo.cli.gate.write_report", lambda *_: tmp_path)
    monkeypatch.setattr("coreai_zoo.cli.gate.Bundle.open", lambda _directory: bundle)
    CliRunner().invoke(cli, ["gate", str(tmp_path)])
    assert len(asked) == 2
    assert asked[0] == attrs.evolve(asked[1], oracle_cache=None)  # a cache changes no result


def test_the_documentation_is_checked_by_the_tests_of_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nothing = checked(Plugins(), "docs")
    assert nothing.exit_code == 0
    assert outcome(nothing, "docs")["passed"] is None
    (tmp_path / "tests").mkdir()
    tests = tmp_path / "tests" / "test_docs.py"
    tests.write_text("def test_a_hook_is_documented():\n    pass\n")
    assert outcome(checked(Plugins(), "docs"), "docs")["passed"] is True
    tests.write_text("def test_a_hook_is_documented():\n    assert 'zoo_new_hook' == 'documented'\n")
    failed = checked(Plugins(), "docs")
    assert failed.exit_code == 1
    assert "test_a_hook_is_documented" in str(outcome(failed, "docs")["detail"])


def test_a_check_that_is_none_and_an_update_of_nothing_are_refused() -> None:
    assert CliRunner().invoke(cli, ["check", "--only", "spelling"]).exit_code == 2
    result = CliRunner().invoke(cli, ["check", "--only", "entries", "--update-goldens"])
    assert result.exit_code == 2
    assert "writes nothing" in result.output


def test_every_check_says_what_it_is() -> None:
    assert [*CHECKS] == ["entries", "overlays", "goldens", "samples", "stress", "docs"]
    assert all(check.__doc__ for check in CHECKS.values())


# ---------------------------------------------------------------------------------------------------------------------
# Golden graphs
# ---------------------------------------------------------------------------------------------------------------------


def graph(linear: dict[str, int]) -> Graph:
    kinds = (LayerKind("linear", (0, 2), linear), LayerKind("full", (1,), {"mul": 3}))
    return Graph(kinds, {"cos": 1}, {"rms_norm": (9, 9)})


def of_main(linear: dict[str, dict[str, int]]) -> dict[str, dict[str, Graph]]:
    """Graphs by recipe of a program that has one function."""
    return {recipe: {"main": graph(counts)} for recipe, counts in linear.items()}


def test_a_golden_graph_reads_back_as_it_was_written(tmp_path: Path) -> None:
    entry, _ = find_entry("qwen3.6-27b", default_plugins())
    made = golden(entry, of_main({"fp16": {"mul": 2}, "int8": {"mul": 2, "blockwise_shift_scale": 4}}))
    write(made, tmp_path / "golden.toml")
    assert read(tmp_path / "golden.toml") == made
    assert compare(made, made) == []
    text = (tmp_path / "golden.toml").read_text()
    assert "blockwise_shift_scale = { fp16 = 0, int8 = 4 } # one for each quantized matrix" in text
    counts = [line for line in text.splitlines() if " = " in line and not line.startswith(("#", "entry", "ffn"))]
    assert counts and all(" # " in line for line in counts)
    assert of_recipe(made, "fp16")["linear"] == {"layers": 2, "operations": 2, "mul": 2}


def test_a_count_that_changed_is_named_with_both_numbers() -> None:
    entry, _ = find_entry("qwen3.6-27b", default_plugins())
    before, after = (golden(entry, of_main({"fp16": counts})) for counts in ({"mul": 2}, {"mul": 3, "add": 1}))
    assert compare(before, after) == [
        "all: operations is 12, the golden graph has 8",
        "linear: add is 1, the golden graph has none",
        "linear: mul is 3, the golden graph has 2",
        "linear: operations is 4, the golden graph has 2",
    ]


def test_a_check_is_of_the_repository_whatever_folder_of_it_one_is_in(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "docs")
    seen: list[check.Checks] = []

    def run(self: check.Checks, _only: object) -> list[check.Outcome]:
        seen.append(self)
        return []

    monkeypatch.setattr(check.Checks, "run", run)
    assert checked(default_plugins(), "goldens").exit_code == 0
    assert (seen[0].folder, seen[0].golden_folder) == (root, root / "tests" / "goldens")
    seen.clear()
    monkeypatch.setattr("coreai_zoo.cli.check.repository", lambda: tmp_path)
    inner = tmp_path / "plugins" / "one"
    (inner / "tests" / "goldens").mkdir(parents=True)
    (inner / "src").mkdir()
    for folder in (inner, inner / "src"):
        monkeypatch.chdir(folder)
        assert checked(default_plugins(), "goldens").exit_code == 0
        assert seen.pop().folder == inner
    words = ["check", "--only", "goldens", "--goldens", "tests/goldens"]
    result = CliRunner().invoke(cli, words, obj=default_plugins())
    assert result.exit_code == 2 and not seen, "what is named is meant from here"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    refused = checked(default_plugins(), "goldens")
    assert refused.exit_code == 2 and "There are no golden graphs in tests/goldens" in refused.stderr


def test_a_repository_whose_entries_have_no_golden_graphs_is_checked_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoEntries(Plugins):
        def entries(self) -> list[tuple[str, Path]]:
            return []

    monkeypatch.chdir(tmp_path)
    result = checked(NoEntries.discover(), "goldens")
    assert result.exit_code == 0 and outcome(result, "goldens")["passed"] is None


def test_code_that_is_not_what_is_installed_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "plugins" / "one" / "src" / "coreai_zoo_qwen36"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    assert "found at" not in checked(Plugins.discover(), "entries").stderr, "it is no repository"
    for words in (("init", "--quiet"), ("add", ".")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    refused = checked(Plugins.discover(), "entries")
    assert refused.exit_code == 2
    assert re.search(
        r"coreai_zoo_qwen36 is found at .*, and not in .*pip install -e", refused.stderr.replace("\n", " ")
    )


@pytest.mark.parametrize(("branch", "revision"), [("main", "main"), ("master", "master"), ("work", "HEAD")])
def test_what_to_do_next_names_a_revision_that_there_is(
    branch: str, revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@example.org")
    for words in (("init", "--quiet", "-b", branch), (*identity, "commit", "--quiet", "--allow-empty", "-m", "first")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    assert base_revision() == revision


def test_a_file_that_is_no_golden_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(BadInput, match="cannot be read as a golden graph"):
        read(tmp_path / "bad.toml")
    numbered = 'entry = "x"\ncontract = 1'
    for text, problem in (("a = 1", "names no entry"), (numbered, "says `contract`, but names none")):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(BadInput, match=problem):
            wanted(tmp_path, tmp_path, default_plugins())


def test_a_file_of_two_lines_asks_for_the_golden_graph_of_another_contract(tmp_path: Path) -> None:
    plugins = default_plugins()
    entry, _ = find_entry("qwen3.6-27b", plugins)
    path = golden_path(tmp_path, entry, "dynamic")
    path.write_text('entry = "qwen3.6-27b"\ncontract = "dynamic"\n')
    first, *others = wanted(tmp_path, tmp_path, plugins)
    assert first == Wanted(path, entry, "dynamic")
    assert [(each.entry.facts.ffn, each.contract) for each in others] == [("moe", None)]

    graphs = of_main({"int8hu": {"mul": 2}})
    made = golden(entry, graphs, "dynamic")
    write(made, path)
    assert read(path) == made and made["contract"] == "dynamic"
    assert path.read_text().startswith("# Operation counts of qwen3.6-27b by contract dynamic, per kind of layer")
    assert compare(made, golden(entry, graphs, "chunked")) == [
        "contract is chunked, the golden graph has dynamic",
    ]


def test_in_the_repository_of_a_plugin_golden_graphs_are_of_its_own_entries(
    root: Path, tmp_path: Path, make_plugin: Callable[..., types.ModuleType]
) -> None:
    goldens = tmp_path / "tests" / "goldens"
    goldens.mkdir(parents=True)
    (tmp_path / "entries").mkdir()
    plugins = with_entry(sibling(root, tmp_path / "entries"), make_plugin)
    ours = Wanted(goldens / "sibling.toml", find_entry("sibling", plugins)[0])
    assert wanted(goldens, tmp_path, plugins) == [ours]
    kinds = [each.entry.facts.ffn for each in wanted(goldens, tmp_path / "elsewhere", plugins)]
    assert kinds == ["dense", "moe"], "where no plugin is at home, all are asked"

    asked = goldens / "prompts.toml"
    asked.write_text('entry = "sibling"\ncontract = "dynamic"\n')
    assert wanted(goldens, tmp_path / "elsewhere", plugins) == [Wanted(asked, ours.entry, "dynamic")], "in its own file"


def test_a_golden_graph_of_an_entry_that_is_gone_is_refused_unless_its_plugin_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text('entry = "acme-27b"\n')
    with pytest.raises(BadInput, match=r"entries that nobody brings: old\.toml \(of acme-27b\)\. Remove the file"):
        wanted(tmp_path, tmp_path, default_plugins())
    plugins = Plugins.discover()
    plugins.without = ("acme",)
    assert {each.entry.facts.ffn for each in wanted(tmp_path, tmp_path, plugins)} == {"dense", "moe"}


def test_a_sibling_for_which_a_plugin_has_another_layer_has_a_golden_graph_of_its_own(
    root: Path, tmp_path: Path, make_plugin: Callable[..., types.ModuleType]
) -> None:
    (tmp_path / "entries").mkdir()
    path = sibling(root, tmp_path / "entries")
    other = tmp_path / "entries" / "other.toml"
    other.write_text(path.read_text().replace('name = "sibling"', 'name = "other"'))

    def hook(entry: Entry | None) -> list[LayerRewrite]:
        ours = entry is not None and entry.name == "other"
        return [LayerRewrite("mine", "model.norm", "of mine alone", lambda norm: norm)] if ours else []

    plugins = Plugins.discover()
    plugins.register(make_plugin(zoo_entries=lambda: [path, other], zoo_layer_rewrites=hook), "another")
    assert [each.entry.name for each in wanted(tmp_path / "goldens", tmp_path, plugins)] == ["other", "sibling"]


@pytest.mark.slow
def test_a_layer_that_is_unlike_the_others_of_its_name_is_in_the_golden_graph_wherever_it_is(
    make_plugin: Callable[..., types.ModuleType],
) -> None:
    def other_eps(norm: nn.Module) -> nn.Module:
        norm.get_submodule("impl").eps = 1e-5
        return norm

    rewrite = LayerRewrite("other-eps", "model.layers.9.input_layernorm", "a test", other_eps, keeps_parameters=True)
    plugins = Plugins.discover()
    plugins.register(make_plugin(zoo_layer_rewrites=lambda: [rewrite]), "other")
    entry, _ = find_entry("qwen3.6-27b", plugins)
    as_shipped, other = (
        golden(entry, dict(structure.graphs(entry, each, ["fp16"]))) for each in (default_plugins(), plugins)
    )
    changes = compare(as_shipped, other)
    assert any(line.startswith("linear_attn from layer 9: rms_norm{axes = -1, eps = 9.99999974E-6") for line in changes)
    assert other["linear_attn from layer 9"]["layers"] == 1
    assert other["linear_attn"]["layers"] == as_shipped["linear_attn"]["layers"] - 1
    assert other["all"] == as_shipped["all"]


def test_the_recipe_of_an_entry_is_among_those_of_its_golden_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def graphs(_entry: Entry, _plugins: Plugins, recipes: Any, _contract: str | None) -> list[Any]:
        asked.append([*recipes])
        return []

    monkeypatch.setattr(structure, "graphs", graphs)
    entry, _ = find_entry("qwen3.6-27b", default_plugins())
    for recipe in (entry.recipe, "mix68"):
        take(attrs.evolve(entry, recipe=recipe), default_plugins())
    assert asked == [[*RECIPES], [*RECIPES, "mix68"]]


def test_what_is_installed_within_a_repository_is_not_its_own(
    root: Path, tmp_path: Path, make_plugin: Callable[..., types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    plugins = with_entry(sibling(root, installed), make_plugin)
    assert {each.entry.facts.ffn for each in wanted(tmp_path, tmp_path, plugins)} == {"dense", "moe"}


def test_there_is_a_golden_graph_of_each_kind_of_feed_forward_and_of_how_prompts_are_read() -> None:
    plugins = default_plugins()
    kinds = set()
    for path in FILES:
        found = read(path)
        kinds.add((found["ffn"], found.get("contract")))
        assert golden_path(GOLDENS, find_entry(found["entry"], plugins)[0], found.get("contract")) == path
    both = itertools.product(("dense", "moe"), (None, "chunked", "dynamic", "dynamic-bf16"))
    assert kinds == {*both, ("dense", "fixed-s1")}


def judged(path: Path) -> Any:
    other = "contract" in read(path)
    reason = "traces two functions of true width; zoo check compares them, and make nightly"
    return pytest.param(path, id=path.stem, marks=pytest.mark.skipif(other and not NIGHTLY, reason=reason))


@pytest.mark.slow
@pytest.mark.parametrize("path", [judged(path) for path in FILES])
def test_the_golden_graph_is_what_the_shipped_recipe_gives(path: Path) -> None:
    """Traced as it is built, with every expert; `zoo check` compares all recipes, from one trace with few experts."""
    plugins = default_plugins()
    entry, _ = find_entry(read(path)["entry"], plugins)
    contract = read(path).get("contract")
    made = golden(entry, {entry.recipe: of_entry(entry, plugins, contract=contract).graphs}, contract)
    found = of_recipe(made, entry.recipe)
    expected = of_recipe(read(path), entry.recipe)
    assert compare(counts_of(expected), counts_of(found)) == []
    if entry.facts.ffn == "dense":  # the number of experts stands in the types
        assert compare(expected, found) == []
