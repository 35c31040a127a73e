from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result
from packaging.requirements import Requirement

from command import zoo as run_zoo
from coreai_zoo import __version__
from coreai_zoo.backends import builtin
from coreai_zoo.cli import doctor as doctor_module
from coreai_zoo.cli.app import COMMANDS, cli
from coreai_zoo.errors import BadInput, CheckFailed, EnvironmentLacks
from coreai_zoo.plugins import Plugins, default_plugins

MakePlugin = Callable[..., types.ModuleType]

FAMILY = [
    *(f"qwen3.5-{size}" for size in ("0.8b", "2b", "4b", "9b", "27b", "35b-a3b", "122b-a10b", "397b-a17b")),
    "qwen3.6-27b",
    "qwen3.6-35b-a3b",
    "qwen3.8-27b",
]


def zoo(plugins: Plugins, *arguments: str) -> Result:
    return run_zoo(*arguments, plugins=plugins)


def host(*, tolerant: bool = False, **plugins: types.ModuleType) -> Plugins:
    registered = Plugins(tolerant=tolerant)
    for name, module in plugins.items():
        registered.register(module, name)
    return registered


# ---------------------------------------------------------------------------------------------------------------------
# Help
# ---------------------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_with_its_line() -> None:
    output = " ".join(zoo(Plugins(), "--help").output.split())

    for name, (_target, line) in COMMANDS.items():
        assert f" {name} {line}" in output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_begins_with_its_line_and_has_an_example(name: str) -> None:
    result = zoo(Plugins(), name, "--help")

    assert result.exit_code == 0
    assert COMMANDS[name][1] in " ".join(result.output.split())
    example = result.output.partition("Example")[2]
    assert f"zoo {name}" in example


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_of_help_is_the_commands_own(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)

    assert command is not None
    assert command.name == name
    assert inspect.cleandoc(command.help or "").splitlines()[0] == COMMANDS[name][1]


def test_nothing_is_collected_once_more_at_the_end() -> None:
    """What is left is frozen: a collection of what torch is made of takes half a second of every command."""
    told = "import gc, sys; from coreai_zoo.cli.app import main; gc.freeze = lambda: print('frozen'); main()"
    result = subprocess.run([sys.executable, "-c", told, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "frozen"


def test_version_is_the_distributions() -> None:
    assert zoo(Plugins(), "--version").output == f"zoo, version {__version__}\n"
    assert importlib.metadata.version("coreai-zoo") == __version__


# ---------------------------------------------------------------------------------------------------------------------
# Errors and exit codes
# ---------------------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[click.Group], None]:
    def zoo_register_commands(cli: click.Group) -> None:
        @cli.command()
        def fail() -> None:
            """Fail."""
            raise error

    return zoo_register_commands


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (BadInput("No such thing.", "Try another."), 2, "error: No such thing. Try another.\n"),
        (EnvironmentLacks("No GPU."), 3, "error: No GPU.\n"),
        (CheckFailed("3 flips."), 1, "error: 3 flips.\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (click.FileError("a.txt", "gone"), 2, "error: Could not open file 'a.txt': gone\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_one_paragraph_on_stderr_and_an_exit_code(
    make_plugin: MakePlugin, error: BaseException, code: int, text: str
) -> None:
    result = zoo(host(a=make_plugin(zoo_register_commands=raising(error))), "fail")

    assert (result.exit_code, result.stderr, result.stdout) == (code, text, "")


def test_debug_shows_the_traceback(make_plugin: MakePlugin) -> None:
    plugins = host(a=make_plugin(zoo_register_commands=raising(BadInput("No such thing."))))

    assert isinstance(zoo(plugins, "--debug", "fail").exception, BadInput)
    assert isinstance(zoo(plugins, "fail").exception, SystemExit), "--debug of one run must not stay for the next"


def test_a_bug_keeps_its_traceback(make_plugin: MakePlugin) -> None:
    plugins = host(a=make_plugin(zoo_register_commands=raising(ZeroDivisionError())))

    assert isinstance(zoo(plugins, "fail").exception, ZeroDivisionError)


def test_the_exit_code_of_a_command_is_that_of_zoo(make_plugin: MakePlugin) -> None:
    def zoo_register_commands(cli: click.Group) -> None:
        @cli.command()
        @click.pass_context
        def leave(ctx: click.Context) -> None:
            """Leave."""
            ctx.exit(1)

    assert zoo(host(a=make_plugin(zoo_register_commands=zoo_register_commands)), "leave").exit_code == 1


@pytest.mark.parametrize("arguments", [["shwo"], ["show"], ["list", "--colour"], ["--colour"]], ids=" ".join)
def test_bad_usage_exits_with_2(shipped: Plugins, arguments: list[str]) -> None:
    result = zoo(shipped, *arguments)

    assert result.exit_code == 2
    assert "Usage: zoo" in result.stderr


def test_an_unknown_entry_exits_with_2_and_the_nearest_name(shipped: Plugins) -> None:
    result = zoo(shipped, "show", "qwen3.6-27")

    assert result.exit_code == 2
    assert result.stderr.startswith("error: no entry is called 'qwen3.6-27'. Did you mean qwen3.6-27b")


def test_the_installed_command_reports_an_error_without_a_traceback() -> None:
    command = [str(Path(sys.executable).with_name("zoo")), "show", "qwen3.6-27"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: no entry is called 'qwen3.6-27'.")
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Plugins' commands
# ---------------------------------------------------------------------------------------------------------------------


def adding(name: str) -> Callable[[click.Group], None]:
    def zoo_register_commands(cli: click.Group) -> None:
        cli.add_command(click.Command(name, callback=lambda: click.echo("ran"), help="From a plugin."))

    return zoo_register_commands


def test_a_plugins_command_runs_and_is_in_the_help(make_plugin: MakePlugin) -> None:
    plugins = host(a=make_plugin(zoo_register_commands=adding("polish")))

    assert zoo(plugins, "polish").output == "ran\n"
    assert "From a plugin." in zoo(plugins, "--help").output
    assert zoo(Plugins(), "polish").exit_code == 2, "commands of one run must not stay for the next"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_plugin_cannot_replace_a_command_of_the_host(make_plugin: MakePlugin, name: str) -> None:
    plugins = host(rude=make_plugin(zoo_register_commands=adding(name)))

    result = zoo(plugins, "list")

    assert result.exit_code == 2
    assert result.stderr == f"error: plugin 'rude' replaces the command {name} in zoo_register_commands. Rename it.\n"
    tolerated = zoo(host(rude=make_plugin(zoo_register_commands=adding(name)), tolerant=True), "list")
    assert (tolerated.exit_code, tolerated.stderr) == (0, result.stderr.replace("error: ", "warning: "))
    assert "ran" not in tolerated.stdout


def broken() -> None:
    raise RuntimeError("broken")


def test_help_list_and_doctor_survive_a_broken_plugin(make_plugin: MakePlugin) -> None:
    def plugins() -> Plugins:
        return host(bad=make_plugin(zoo_register_commands=broken, zoo_entries=broken), tolerant=True)

    helped = zoo(plugins(), "--help")
    assert (helped.exit_code, helped.stderr[:9]) == (0, "warning: ")
    doctored = zoo(plugins(), "doctor")
    assert doctored.exit_code == 3
    assert "plugin 'bad' failed in zoo_entries: RuntimeError: broken." in doctored.stdout
    assert "plugin 'bad' failed in zoo_register_commands: RuntimeError: broken." in doctored.stdout
    listed = zoo(plugins(), "list")
    assert listed.exit_code == 0
    for line, hook in zip(listed.stderr.splitlines(), ("zoo_register_commands", "zoo_entries"), strict=True):
        assert line.startswith(f"warning: plugin 'bad' failed in {hook}: RuntimeError: broken. It is raised at ")


@pytest.mark.parametrize(
    "hook",
    ["zoo_entries", "zoo_recipes", "zoo_contracts", "zoo_tokenizer_classes", "zoo_backends", "zoo_claim_overlay"],
)
def test_doctor_fails_on_a_plugin_that_is_broken_in_any_list(make_plugin: MakePlugin, hook: str) -> None:
    plugins = Plugins.discover()
    plugins.register(make_plugin(**{hook: broken}), "bad")
    doctored = zoo(plugins, "doctor")

    assert doctored.exit_code == 3
    assert f"plugin 'bad' failed in {hook}: RuntimeError: broken." in doctored.stdout
    assert "not as required: plugins." in doctored.stderr


def test_a_bad_entry_file_leaves_the_others_of_its_plugin_and_fails_where_it_is_asked_for(
    make_plugin: MakePlugin, entry_file: Callable[..., Path]
) -> None:
    good = entry_file()
    bad = entry_file(('name = "toy-1b"', 'name = "toy-2b"'), ("layers = 2", "layers = 0"), name="bad")
    plugins = host(toys=make_plugin(zoo_entries=lambda: [bad, good]), tolerant=True)

    listed = zoo(plugins, "list")
    assert listed.exit_code == 0
    assert "toy-1b" in listed.stdout
    assert listed.stderr.count("warning: ") == 1
    assert "facts.layers: 0 is not positive" in listed.stderr
    assert "plugin 'toys', zoo_entries" in listed.stderr
    shown = zoo(plugins, "show", "toy-2b")
    assert shown.exit_code == 2
    assert "facts.layers: 0 is not positive" in shown.stderr


def test_an_entry_that_two_plugins_bring_is_listed_once_and_refused_where_it_is_asked_for(
    make_plugin: MakePlugin, entry_file: Callable[..., Path]
) -> None:
    first, second, other = (
        entry_file(name="first"),
        entry_file(name="second"),
        entry_file(('name = "toy-1b"', 'name = "toy-2b"'), name="other"),
    )
    plugins = host(
        ours=make_plugin(zoo_entries=lambda: [first]),
        theirs=make_plugin(zoo_entries=lambda: [second, other]),
        coreai=builtin,
        tolerant=True,
    )

    listed = [record["plugin"] for record in json.loads(zoo(plugins, "list", "--json").stdout)]
    assert listed == ["ours", "theirs"]
    refused = zoo(plugins, "show", "toy-1b")
    assert refused.exit_code == 2
    for part in ("error: the entry 'toy-1b' is there twice", "'ours'", "'theirs'", str(first), str(second)):
        assert part in refused.stderr
    assert zoo(plugins, "show", "toy-2b").exit_code == 0


@pytest.fixture
def with_a_broken_plugin(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed `zoo` beside an installed plugin that cannot be imported."""
    (tmp_path / "zoo_test_wreck.py").write_text("import a_module_that_is_not_there\n", encoding="utf-8")
    information = tmp_path / "wreck-1.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: wreck\nVersion: 1.5\n", encoding="utf-8")
    (information / "entry_points.txt").write_text("[coreai_zoo]\nwreck = zoo_test_wreck\n", encoding="utf-8")
    command = str(Path(sys.executable).with_name("zoo"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run([command, *arguments], capture_output=True, text=True, check=False, env=environment)

    return run


@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["show", "qwen3.6-27b"], ["plugins"]], ids=" ".join)
def test_an_installed_plugin_that_cannot_be_imported_is_reported_in_one_line(
    with_a_broken_plugin: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str]
) -> None:
    result = with_a_broken_plugin(*arguments)

    assert result.returncode == 0
    assert result.stdout
    line, *others = result.stderr.splitlines()
    assert all(other.startswith("Next, ") for other in others)
    assert line.startswith("warning: plugin 'wreck' (zoo_test_wreck of wreck 1.5) cannot be imported: ModuleNotFound")


@pytest.mark.parametrize("arguments", [["list"], ["--help"]], ids=" ".join)
def test_a_plugin_can_be_left_out(
    with_a_broken_plugin: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str]
) -> None:
    result = with_a_broken_plugin("--without", "wreck", *arguments)
    assert (result.returncode, "wreck" in result.stderr) == (0, False)
    assert result.stdout == with_a_broken_plugin(*arguments).stdout

    neither = with_a_broken_plugin("--without", "wreck", "--without", "qwen36", "list", "--json")
    assert (neither.returncode, neither.stdout, neither.stderr) == (0, "[]\n", "")


def test_leaving_out_a_plugin_that_is_not_there_is_refused() -> None:
    result = run_zoo("--without", "qwen63", "list")

    assert result.exit_code == 2
    assert result.stderr == "error: There is no plugin 'qwen63' to leave out. Did you mean qwen36?\n"


# ---------------------------------------------------------------------------------------------------------------------
# list, show, plugins
# ---------------------------------------------------------------------------------------------------------------------


def test_list_is_a_table_of_the_entries(shipped: Plugins) -> None:
    lines = [line.split() for line in zoo(shipped, "list").output.splitlines()]

    assert ["qwen3.6-27b", "dense", "26.9", "B", "int8hu", "static-s1", "unverified", "shipped"] in lines
    assert ["qwen3.6-35b-a3b", "moe", "34.7", "B", "int8hu", "static-s1", "unverified", "shipped"] in lines


def test_list_as_json_has_a_record_for_each_entry(shipped: Plugins) -> None:
    records = {record["name"]: record for record in json.loads(zoo(shipped, "list", "--json").stdout)}

    assert records["qwen3.6-27b"] == {
        "name": "qwen3.6-27b",
        "ffn": "dense",
        "parameters": 26_895_998_464,
        "recipe": "int8hu",
        "contract": "static-s1",
        "status": "unverified",
        "plugin": "shipped",
    }
    assert [*records] == FAMILY


def test_an_unknown_parameter_count_is_said_to_be_unknown(
    make_plugin: MakePlugin, entry_file: Callable[..., Path]
) -> None:
    path = entry_file()

    assert "unknown" in zoo(host(toy=make_plugin(zoo_entries=lambda: [path])), "list").output


def test_show_tells_all_that_the_entry_states() -> None:
    output = zoo(default_plugins(), "show", "qwen3.6-35b-a3b").output

    for part in (
        "Qwen/Qwen3.6-35B-A3B at 995ad96eacd98c81ed38be0c5b274b04031597b0",
        "34,660,610,688",
        "experts_per_token",
        "samples/moe in",
    ):
        assert part in output
    rows = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    assert rows["head"].split()[1:] == ["int8", "block", "32", "symmetric"]
    assert rows["moe.router"].split()[1:] == ["not", "quantized"]


def test_show_as_json_has_facts_recipe_and_plugin() -> None:
    shown = json.loads(zoo(default_plugins(), "show", "qwen3.6-27b", "--json").stdout)

    assert (shown["plugin"], shown["facts"]["layers"], shown["sample"]["path"]) == ("qwen36", 64, "samples/dense")
    assert shown["recipe_by_role"]["mlp"] == "int8 block 32 symmetric_with_clipping"
    assert shown["recipe_by_role"]["norm"] is None


def test_show_of_an_entry_with_an_unknown_recipe_is_bad_input(
    make_plugin: MakePlugin, entry_file: Callable[..., Path]
) -> None:
    path = entry_file(('summary = "A toy."', 'summary = "A toy."\nrecipe = "int3"'))

    result = zoo(host(toy=make_plugin(zoo_entries=lambda: [path])), "show", "toy-1b")

    assert result.exit_code == 2
    assert "'int3'" in result.stderr


def test_plugins_tells_what_each_brings(shipped: Plugins) -> None:
    (record,) = json.loads(zoo(shipped, "plugins", "--json").stdout)

    assert record["name"] == "shipped"
    assert record["entries"] == FAMILY
    assert record["hooks"] == ["zoo_entries"]
    assert "qwen3.6-35b-a3b" in zoo(shipped, "plugins").output


def test_without_plugins_the_group_is_named() -> None:
    assert "entry-point group 'coreai_zoo'" in zoo(Plugins(), "plugins").output


# ---------------------------------------------------------------------------------------------------------------------
# doctor
# ---------------------------------------------------------------------------------------------------------------------


def test_doctor_checks_every_requirement_of_the_distribution(shipped: Plugins) -> None:
    report = json.loads(zoo(shipped, "doctor", "--json").stdout)

    required = {Requirement(text) for text in importlib.metadata.requires("coreai-zoo") or ()}
    expected = {requirement.name for requirement in required if requirement.marker is None}
    found = {finding["name"]: finding for finding in report["requirements"]}
    extra = {requirement.name for requirement in required if 'extra == "cluster"' in str(requirement.marker)}
    assert extra == {"distributed"}
    assert expected | extra | {"python", "plugins"} == set(found)
    assert [name for name, finding in found.items() if not finding["needed"]] == [*extra]
    assert found["coreai-core"]["wanted"] == "==1.0.0b3"
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["free_disk_gib"] > 0


@pytest.mark.parametrize(
    ("requirements", "verdict", "name", "typed"),
    [
        (["no-such-package-at-all==1.0"], "missing", "no-such-package-at-all", "no-such-package-at-all==1.0"),
        (["click>=0.1,<0.2"], "wrong version", "click", "'click<0.2,>=0.1'"),
    ],
)
def test_doctor_exits_with_3_for_what_is_missing_or_another_version(
    shipped: Plugins, monkeypatch: pytest.MonkeyPatch, requirements: list[str], verdict: str, name: str, typed: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _distribution: requirements)

    result = zoo(shipped, "doctor")

    assert result.exit_code == 3
    assert result.stderr == f"error: not as required: {name}. The table says what is wanted, and what to type.\n"
    row, command = [line for line in result.stdout.splitlines() if line.strip().startswith(name)]
    assert verdict in row
    assert command.split(maxsplit=1) == [name, f"pip install {typed}"]
    assert "no: needs the packages above" in result.stdout


def test_doctor_does_not_fail_for_what_an_option_alone_needs(shipped: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ['no-such-package==1.0; extra == "cluster"'])

    result = zoo(shipped, "doctor")

    assert result.exit_code == 0 and "not needed but by `zoo sensitivity --scheduler`" in result.stdout
    assert "pip install no-such-package==1.0" in result.stdout
    assert "yes: converts and writes bundles" in result.stdout


def test_doctor_says_how_to_install_again_what_cannot_be_imported(
    shipped: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "coreai_opt", None)

    result = zoo(shipped, "doctor", "--deep")

    assert result.exit_code == 3
    assert "pip install --force-reinstall coreai-opt==0.3.0" in result.stdout


@pytest.mark.parametrize(
    ("system", "macos", "able"),
    [
        ("Linux", "", {"build": True, "gate": True, "run on the GPU": False}),
        ("Darwin", "26.4", {"build": True, "gate": True, "run on the GPU": False}),
        ("Darwin", "27.0.1", {"build": True, "gate": True, "run on the GPU": True}),
        ("Windows", "", {"build": False, "gate": False, "run on the GPU": False}),
    ],
)
def test_what_a_platform_can_do(system: str, macos: str, able: dict[str, bool]) -> None:
    abilities = doctor_module._abilities(system, macos, toolchain=True)

    assert {name: can for name, (can, _why) in abilities.items()} == able
    assert all(why for _can, why in abilities.values())


def test_nothing_builds_without_the_toolchain() -> None:
    abilities = doctor_module._abilities("Darwin", "27.0", toolchain=False)

    assert (abilities["build"][0], abilities["gate"][0]) == (False, False)
