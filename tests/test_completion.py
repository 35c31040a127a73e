"""What a shell is told to complete: by click's own scripts, through the command loader that imports nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from coreai_zoo.cli.app import COMMANDS
from coreai_zoo.cli.demo import next_steps

HEAVY = ("torch", "transformers", "numpy", "coreai", "coremltools", "huggingface_hub", "coreai_zoo.cli.build")

DRIVER = """
import sys
from coreai_zoo.cli.app import main
try:
    main()
finally:
    print("heavy", sorted(set(sys.argv.pop().split(",")) & set(sys.modules)), file=sys.__stderr__)
"""


def completed(folder: Path, words: str, *, environment: dict[str, str] | None = None) -> tuple[list[str], str]:
    """What is completed for a line of which the last word is incomplete, and stderr."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_ZOO_COMPLETE": "bash_complete"}
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, ",".join(HEAVY)],
        cwd=folder,
        env={**os.environ, **asked, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.splitlines(), result.stderr


def test_every_command_is_completed_and_none_is_imported_for_it(tmp_path: Path) -> None:
    found, said = completed(tmp_path, "zoo ")

    assert found == [f"plain,{name}" for name in COMMANDS]
    assert said == "heavy []\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("zoo pl", ["plain,plan", "plain,plugins"]),
        ("zoo --w", ["plain,--without"]),
        ("zoo gate --ca", ["plain,--candidate", "plain,--cached-only"]),
        ("zoo build --progress ", ["plain,auto", "plain,json"]),
        ("zoo show qwen3.6-", ["plain,qwen3.6-27b", "plain,qwen3.6-35b-a3b"]),
        ("zoo plan qwen3.6-27b qwen3.8", ["plain,qwen3.8-27b"]),
        ("zoo build qwen3.5-4", ["plain,qwen3.5-4b"]),
        ("zoo build ~/Down", ["file,~/Down"]),
        ("zoo gate my_", ["plain,my_bundle"]),
        ("zoo publish my", ["plain,my_bundle"]),
        ("zoo verify exports/", ["dir,exports/"]),
    ],
)
def test_a_word_is_completed(tmp_path: Path, words: str, expected: list[str]) -> None:
    (tmp_path / "exports" / "my_bundle").mkdir(parents=True)
    (tmp_path / "exports" / "my_bundle" / "build.json").write_text(json.dumps({}))

    found, said = completed(tmp_path, words)

    assert found == expected
    assert not {"torch", "transformers", "coreai"} & set(re.findall(r"\w+", said)), "it has to be there at once"


def test_a_broken_plugin_says_nothing_into_the_line(tmp_path: Path) -> None:
    (tmp_path / "zoo_test_wreck.py").write_text("import a_module_that_is_not_there\n", encoding="utf-8")
    information = tmp_path / "wreck-1.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: wreck\nVersion: 1.5\n", encoding="utf-8")
    (information / "entry_points.txt").write_text("[coreai_zoo]\nwreck = zoo_test_wreck\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])

    found, said = completed(tmp_path, "zoo ver", environment={"PYTHONPATH": path})

    assert (found, said) == (["plain,verify"], "heavy []\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(tmp_path: Path, shell: str, root: Path) -> None:
    environment = {**os.environ, "_ZOO_COMPLETE": f"{shell}_source"}
    command = [sys.executable, "-m", "coreai_zoo"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)

    assert f"_ZOO_COMPLETE={shell}_complete" in result.stdout
    assert f"_ZOO_COMPLETE={shell}_source zoo" in (root / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("folder", "path", "typed", "exported"),
    [
        (".venv/bin", "", ".venv/bin/zoo", 'export PATH="$PWD/.venv/bin:$PATH"'),
        (".venv/bin", ".venv/bin", "zoo", None),
        ("an env/bin", "", "'an env/bin/zoo'", 'export PATH="$PWD/an env/bin:$PATH"'),
    ],
)
def test_the_demo_says_what_to_type_next_with_the_zoo_that_is_installed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    path: str,
    typed: str,
    exported: str | None,
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "zoo").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / path) if path else "")

    lines = next_steps(Path("exports/it's"), "qwen3.6-27b")

    assert lines[2] == f"""    {typed} run 'exports/it'"'"'s' -p 'class Stack:' -n 40"""
    assert lines[3] == f"    {typed} plan qwen3.6-27b"
    assert (lines[-1] == f"To type `zoo` alone: {exported}") == (exported is not None)


def test_what_follows_an_unknown_command_is_completed_as_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from coreai_zoo.cli.app import cli

    monkeypatch.setenv("_ZOO_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "zoo lst ")
    monkeypatch.setenv("COMP_CWORD", "2")
    result = CliRunner().invoke(cli, prog_name="zoo")
    assert result.exit_code == 0 and "plain,list" in result.stdout


def test_a_plugins_command_is_completed(make_plugin: Callable[..., types.ModuleType]) -> None:
    from coreai_zoo.cli.app import cli
    from coreai_zoo.plugins import Plugins

    plugins = Plugins()
    hook = {"zoo_register_commands": lambda cli: cli.add_command(click.Command("bake", help="From a plugin."))}
    plugins.register(make_plugin(**hook), "a")

    found = cli.shell_complete(click.Context(cli, obj=plugins), "b")

    assert [(item.value, item.help) for item in found] == [
        ("build", COMMANDS["build"][1]),
        ("bench", COMMANDS["bench"][1]),
        ("bake", "From a plugin."),
    ]
