"""`--target` names the system of a machine: it chooses contract and backend, and refuses what that does not run."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from attrs import evolve

from command import commands, zoo
from coreai_zoo.backends import builtin
from coreai_zoo.build.design import Design, design
from coreai_zoo.build.figures import Figures
from coreai_zoo.build.record import describe
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.cli.app import cli
from coreai_zoo.contracts import CONTRACTS, FIXED_S1, STATIC_S1, Contract
from coreai_zoo.errors import BadInput
from coreai_zoo.plugins import Plugins, default_plugins
from coreai_zoo.systems import System
from coreai_zoo_qwen36 import plugin as qwen36_plugin
from toy_plugin import PAIR

DENSE = "qwen3.6-27b"


def designed(plugins: Plugins | None = None, target: str | None = None, **asked: Any) -> Design:
    request = BuildRequest(**{"model": DENSE, **asked}, target=System.parse(target) if target else None, dry=True)
    return design(request, plugins or default_plugins())


def chosen(plugins: Plugins | None = None, target: str | None = None, **asked: Any) -> tuple[str, str]:
    found = designed(plugins, target, **asked)
    return found.contract.name, found.backend.name


@pytest.fixture
def with_contract(make_plugin: Callable[..., types.ModuleType]) -> Callable[[Contract], Plugins]:
    """A host with our plugin and another one, which brings a contract."""

    def make(contract: Contract) -> Plugins:
        plugins = Plugins()
        plugins.register(make_plugin(zoo_contracts=lambda: [contract]), "acme")
        plugins.register(builtin, "coreai")
        plugins.register(qwen36_plugin, "qwen36")
        return plugins

    return make


# ---------------------------------------------------------------------------------------------------------------------
# Systems
# ---------------------------------------------------------------------------------------------------------------------


def test_a_system_runs_what_it_and_every_earlier_version_runs() -> None:
    mac = System.parse("macOS 27.2")
    assert (mac, str(mac), mac.target) == (System("macOS", "27.2"), "macOS 27.2", "macos27.2")
    assert mac.runs(System("macOS", "27.0")) and mac.runs(System("macOS", "15")) and mac.runs(mac)
    assert System("macOS", "27.10").runs(mac)
    assert not mac.runs(System("macOS", "27.2.1"))
    assert not mac.runs(System("iOS", "15"))
    assert System("macOS", "27").runs(System("macOS", "27.0"))


@pytest.mark.parametrize(
    "text", ["", "macos", "27.0", "windows11", "macos27.", "macos27.0 beta", "macos\u0662\u0667", "macos27\n"]
)
def test_what_names_no_system_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="names no system"):
        System.parse(text)
    result = zoo("plan", DENSE, "--target", text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Invalid value for '--target'" in result.stderr
    assert "names no system. Write macos or ios and its version, such as macos27.0 or ios18." in result.stderr


def test_a_version_is_written_in_the_digits_of_ascii() -> None:
    with pytest.raises(ValueError, match="version"):
        System("macOS", "\u0662\u0667")


def test_the_card_still_names_the_system_first() -> None:
    assert [contract.needs[0] for contract in CONTRACTS.values()] == [
        "macOS 27.0 or later",
        "macOS 27.0 or later",
        "macOS 27.0 or later",
        "macOS 27.2 or later",
        "macOS 27.2 or later",
        "macOS 15 or iOS 18 or later",
    ]
    assert PAIR.needs == ("a box of toys",)


# ---------------------------------------------------------------------------------------------------------------------
# What a target chooses
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (None, ("static-s1", "coreai")),
        ("macos15", ("fixed-s1", "coreml")),
        ("macos26", ("fixed-s1", "coreml")),
        ("ios18", ("fixed-s1", "coreml")),
        ("macos27.0", ("static-s1", "coreai")),
        ("macos27.1", ("static-s1", "coreai")),
        ("macos27.2", ("dynamic", "coreai")),
        ("macos28", ("dynamic", "coreai")),
    ],
)
def test_a_target_chooses_contract_and_backend(target: str | None, expected: tuple[str, str]) -> None:
    assert chosen(target=target) == expected


def test_what_is_given_is_kept_where_the_target_runs_it() -> None:
    assert chosen(target="macos27.2", contract="chunked") == ("chunked", "coreai")
    assert chosen(target="macos27.0", contract="fixed-s1") == ("fixed-s1", "coreml")
    assert chosen(target="macos27.2", backend="coreml") == ("fixed-s1", "coreml")


def test_of_contracts_for_the_same_system_the_entrys_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "chunked-by-default.toml"
    text = Path(f"zoo_entries/{DENSE}.toml").read_text(encoding="utf-8")
    path.write_text(text.replace(DENSE, path.stem).replace('"static-s1"', '"chunked"'), encoding="utf-8")
    assert chosen(model=str(path)) == chosen(target="macos27.0", model=str(path)) == ("chunked", "coreai")
    assert chosen(target="macos27.2", model=str(path)) == ("dynamic", "coreai")


def test_a_contract_of_a_plugin_takes_part(with_contract: Callable[[Contract], Plugins]) -> None:
    plugins = with_contract(evolve(STATIC_S1, name="acme", systems=(System("macOS", "27.1"),)))
    assert chosen(plugins, "macos27.0") == ("static-s1", "coreai")
    assert chosen(plugins, "macos27.1") == ("acme", "coreai")
    assert chosen(plugins, "macos27.2") == ("dynamic", "coreai")
    with pytest.raises(BadInput, match=r"acme needs macOS 27\.1 or later"):
        chosen(plugins, "macos27.0", contract="acme")


def test_a_contract_that_names_no_system_is_never_chosen(with_contract: Callable[[Contract], Plugins]) -> None:
    plugins = with_contract(evolve(FIXED_S1, name="acme", systems=()))
    assert chosen(plugins, "macos15") == ("fixed-s1", "coreml")
    with pytest.raises(BadInput, match="acme needs a system that is not known"):
        chosen(plugins, "macos15", contract="acme")


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        ("macos27.2", {"contract": "dynamic"}),
        ("macos15", {"backend": "coreml"}),
        ("macos27.0", {}),
    ],
)
def test_a_bundle_for_a_target_is_the_one_of_its_contract(target: str, asked: dict[str, str]) -> None:
    aimed, asked_for = designed(target=target), designed(**asked)
    assert aimed.name == asked_for.name
    assert describe(aimed) == describe(asked_for)


# ---------------------------------------------------------------------------------------------------------------------
# What a target refuses
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ("--target", "macos27.0", "--contract", "dynamic"),
            "macOS 27.0 is not known to run the contract dynamic: dynamic needs macOS 27.2 or later. It runs "
            "static-s1, chunked-unrolled, chunked, fixed-s1 (coreml): name one with --contract, or none, and one "
            "is chosen.",
        ),
        (
            ("--target", "macos15", "--backend", "coreai"),
            "macOS 15 is not known to run any of the contracts of the backend coreai: static-s1, chunked-unrolled and "
            "chunked need macOS 27.0 or later; dynamic and dynamic-bf16 need macOS 27.2 or later. It runs fixed-s1 "
            "(coreml)",
        ),
        (("--target", "macos14"), "macOS 14 is not known to run any of the contracts that there are: static-s1"),
        (("--target", "macos27.0", "--backend", "onnx"), "There is no backend 'onnx'"),
        (("--target", "macos27.0", "--contract", "elastic"), "There is no contract 'elastic'"),
        (
            ("--target", "macos27.0", "--contract", "chunked", "--backend", "coreml"),
            "The backend coreml does not write for the contract chunked",
        ),
    ],
)
def test_a_build_refuses_what_its_target_does_not_run(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    result = zoo("build", DENSE, "--sample", *arguments, "-o", tmp_path / "bundles")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"error: {complaint}" in result.stderr
    assert not (tmp_path / "bundles").exists()


def test_a_plan_is_of_what_the_target_chooses() -> None:
    plan = json.loads(zoo("plan", DENSE, "--target", "macos15", "--json").stdout)
    assert (plan["contract"], plan["states"]["context"]) == ("fixed-s1", 4096)
    assert (plan["backend"], plan["target"]) == ("coreml", "macOS 15")
    output = zoo("plan", DENSE, "--target", "macos15").output
    assert output.startswith(
        "qwen3.6-27b, unverified: int8hu_block32_sym, contract fixed-s1, backend coreml for macOS 15, overlay"
    )
    assert (
        "qwen3.6-27b for macOS 15: int8hu_block32_sym\n"
        in zoo("plan", DENSE, "--target", "macos15", "--contracts").output
    )
    side_by_side = zoo("plan", DENSE, "--target", "macos15", "--recipe", "int8hu", "--compare").output
    assert [line.split() for line in side_by_side.splitlines() if line.startswith(("contract", "backend"))] == [
        ["contract", "fixed-s1"],
        ["backend", "coreml"],
    ]


def test_a_plan_refuses_what_a_build_for_the_target_refuses() -> None:
    planned = zoo("plan", DENSE, "--target", "macos15", "--recipe", "mix68")
    built = zoo("build", DENSE, "--sample", "--target", "macos15", "--recipe", "mix68")
    assert planned.exit_code == built.exit_code == 2
    assert "The Core ML backend does not write int6" in planned.stderr
    assert planned.stderr.splitlines()[-1] == built.stderr.splitlines()[-1]
    assert zoo("plan", DENSE, "--target", "macos15", "--recipe", "int8lin").exit_code == 0


def test_what_was_published_of_an_entry_is_shown_for_its_own_contract_and_backend_alone() -> None:
    assert {known.machine for known in Figures(designed(target="macos27.0")).published} == {"M4 Max", "M4 Pro"}
    for asked in ({"target": "macos15"}, {"contract": "chunked"}, {"target": "macos27.2"}):
        assert Figures(designed(**asked)).published == ()
    output = zoo("plan", DENSE, "--target", "macos15").output
    assert "published: " not in output and "Published: " not in output


@pytest.mark.parametrize("command", [("plan", DENSE), ("build", DENSE, "--sample")])
def test_a_contract_that_the_usual_backend_does_not_write_for_names_the_one_that_does(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    output = ("-o", tmp_path) if command[0] == "build" else ()
    (tmp_path / designed(sample=True).name).mkdir()  # of the contract that the usual backend writes for
    result = zoo(*command, "--contract", "fixed-s1", *output)
    assert result.exit_code == 2
    assert (
        "error: The backend coreai does not write for the contract fixed-s1. Pass --backend coreml: that does. coreai "
        "writes for static-s1, chunked-unrolled, chunked, dynamic, dynamic-bf16.\n"
    ) in result.stderr
    plan = json.loads(zoo("plan", DENSE, "--contract", "fixed-s1", "--backend", "coreml", "--json").stdout)
    assert plan["backend"] == "coreml"


# ---------------------------------------------------------------------------------------------------------------------
# The option
# ---------------------------------------------------------------------------------------------------------------------


def test_every_command_that_plans_or_builds_by_a_contract_takes_a_target() -> None:
    options = {command.name: {option for each in command.params for option in each.opts} for command in commands()}
    taking = {name for name, of in options.items() if "--contract" in of}
    assert taking - {"diff"} == {"build", "plan"} == {name for name, of in options.items() if "--target" in of}


def test_a_shell_completes_the_systems_that_contracts_begin_with() -> None:
    (option,) = (
        each for command in commands() for each in command.params if each.name == "target" if command.name == "plan"
    )
    context = click.Context(cli, obj=default_plugins())
    assert [item.value for item in option.type.shell_complete(context, option, "mac")] == [
        "macos27.0",
        "macos27.2",
        "macos15",
    ]
