"""What commands say to whoever types them: headings of options, near names, and the command that comes next."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from checkpoints import tiny_checkpoint
from command import commands, zoo
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.catalogue import find_entry
from coreai_zoo.cli.app import COMMANDS, SECTIONS, cli
from coreai_zoo.cli.build import _folder
from coreai_zoo.commands import Headed
from coreai_zoo.errors import did_you_mean, near_names, near_paths
from coreai_zoo.json_files import write_json
from coreai_zoo.plugins import Plugins, default_plugins

DENSE = "qwen3.6-27b"
MANY = 7  # options, from which on they stand below headings

# ---------------------------------------------------------------------------------------------------------------------
# Headings
# ---------------------------------------------------------------------------------------------------------------------


def sections(help_text: str) -> dict[str, str]:
    """The text below each heading."""
    parts = re.split(r"^(\w.*):$", help_text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_options_stand_below_headings_where_there_are_many(name: str) -> None:
    (command,) = (each for each in commands() if each.name == name)
    options = [option for option in command.params if isinstance(option, click.Option)]
    below = sections(zoo(name, "--help").stdout)
    assert (len(below) > 1) == (len(options) >= MANY)
    assert ("Options" in below) == (len(options) < MANY)
    for option in options:
        places = [
            text for text in below.values() if re.search(rf"^  .*{re.escape(option.opts[-1])}\b", text, re.MULTILINE)
        ]
        assert len(places) == 1, option.opts


def test_a_heading_above_no_option_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"thing has no parameters \['nothing'\]"):
        Headed("thing", headings={"nothing": "What there is not"})


def test_every_command_stands_below_one_heading() -> None:
    below = sections(zoo("--help").stdout)
    assert list(below)[1:] == list(SECTIONS.values())
    for name in COMMANDS:
        assert sum(bool(re.search(rf"^  {name} ", text, re.MULTILINE)) for text in below.values()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Near names
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("biuld", "Did you mean build?"),
        ("lst", "Did you mean list?"),
        ("frobnicate", "There are list, show, plan"),
        ("plan qwen3.6-27b --recpie int8hu", "--recipe"),
        ("show QWEN3.6-27", "Did you mean qwen3.6-27b"),
        ("plan qwen3.6-27b --recipe int8hs", "Did you mean int8hu"),
        ("plan qwen3.6-27b --contract static-s2", "Did you mean static-s1?"),
        ("plan qwen3.6-27b --backend coreaii", "Did you mean coreai"),
        ("plan qwen3.6-27b --target macso27.0", "Did you mean macos?"),
        ("plan qwen3.6-27b --chip M4Mx", "Did you mean M4 Max"),
        ("list --for 'm4 pr 48GB'", "Did you mean M4 Pro"),
        ("check --only golden", "Did you mean goldens?"),
        ("build qwen3.6-27b --progress jsn", "Did you mean json?"),
        ("--without qwen63 list", "Did you mean qwen36?"),
        ("show-recipe int4hu", "Did you mean int4hu8"),
        ("sensitivity qwen3.6-27b --sample --as imt4", "Did you mean int4"),
        ("sensitivity qwen3.6-27b --sample --as int4:blck32", "Did you mean block32?"),
        ("sensitivity qwen3.6-27b --sample --as int4:block32:symetric", "Did you mean symmetric"),
        ("sensitivity qwen3.6-27b --sample --as fp61", "Did you mean fp16?"),
    ],
)
def test_the_nearest_name_is_suggested(line: str, hint: str) -> None:
    result = zoo(*shlex.split(line))
    assert result.exit_code == 2 and hint in result.stderr, result.output


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("gate {}/bundel", "Did you mean {}/bundle?"),
        ("build {}/checkpoit", "Did you mean {}/checkpoint?"),
        ("plan --checkpoint {}/Checkpiont", "Did you mean {}/checkpoint?"),
        ("plan qwen3.6-27b --recipe {}/mien.toml", "Did you mean {}/mine.toml?"),
        ("show {}/mien.toml", "Did you mean {}/mine.toml?"),
        ("gate {}/bundel/deeper", "Did you mean {}/bundle?"),
    ],
)
def test_the_nearest_path_is_suggested(line: str, hint: str, tmp_path: Path) -> None:
    for name in ("bundle", "checkpoint"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.toml").touch()
    result = zoo(*shlex.split(line.format(tmp_path)))
    assert result.exit_code == 2 and hint.format(tmp_path) in result.stderr, result.output


def test_a_path_that_is_like_no_other_has_no_hint(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    assert near_paths(tmp_path / "something-else") == ""
    assert near_paths(tmp_path / "bundel") == f"Did you mean {tmp_path / 'bundle'}?"


def test_where_nothing_can_be_looked_at_there_is_no_hint_and_no_other_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file" / "x", tmp_path / "dangling" / "x", tmp_path / ("x" * 300) / "y", Path("/a\0b/c")):
        assert near_paths(path) == ""
    result = zoo("verify", f"./{'x' * 300}/y")
    assert result.exit_code == 2 and "There is no bundle at" in result.stderr


def test_capital_letters_make_no_name_another_one() -> None:
    assert near_names("m4 MAX", ["M4", "M4 Max", "M5 Max"], 1) == "Did you mean M4 Max?"
    assert near_names("other", ["M4"]) == ""
    assert did_you_mean("other", ["M4", "M5"]) == "There are M4, M5."


# ---------------------------------------------------------------------------------------------------------------------
# What comes next
# ---------------------------------------------------------------------------------------------------------------------


def next_command(result: Result) -> list[str]:
    """The words of the command that is named at the end, which the command line takes as they are."""
    assert result.exit_code == 0, result.output
    found = re.fullmatch(r"Next, [^:]+: zoo (.*?)( > \S+)?", result.stderr.splitlines()[-1])
    assert found is not None, result.stderr
    words = shlex.split(found[1])
    with click.Context(cli, info_name="zoo") as context:
        command = cli.get_command(context, words[0])
        assert command is not None
        command.make_context(words[0], words[1:], parent=context)
    return words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("list", "plan qwen3.5-0.8b"),
        ("list --for 'M4 48GB'", None),
        ("show qwen3.6-27b", "plan qwen3.6-27b"),
        ("plan qwen3.6-27b", "build qwen3.6-27b"),
        (
            "plan qwen3.6-27b --recipe int4lin --context 4096 --target macos27.2",
            "build qwen3.6-27b --recipe int4lin --target macos27.2 --max-context 4096",
        ),
        ("plan qwen3.6-27b --compare", "build qwen3.6-27b"),
        ("plan qwen3.6-27b --compare --recipe int4lin --recipe int8lin", "build qwen3.6-27b"),
        ("plan qwen3.6-27b --contracts", "build qwen3.6-27b --contract"),
        ("recipes", "show-recipe int8hu"),
        ("recipes qwen3.6-27b", "plan qwen3.6-27b --compare"),
        ("show-recipe int8hu", "plan qwen3.5-0.8b --recipe mine.toml"),
        ("plugins", "list"),
        ("doctor", "build"),
    ],
)
def test_an_answer_ends_with_the_next_command_and_json_does_not(line: str, words: str | None) -> None:
    if words is None:  # nothing fits, or what was asked for is refused
        assert zoo(*shlex.split(line)).exit_code == 2
        return
    assert shlex.join(next_command(zoo(*shlex.split(line)))).startswith(words)
    as_json = zoo(*shlex.split(line), "--json")
    assert as_json.exit_code == 0 and "Next" not in as_json.stderr


def test_a_folder_that_was_planned_is_built_by_its_path_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny_checkpoint(Path("-a folder"), "dense")
    for words in (("--checkpoint", folder), ("--", folder)):
        assert next_command(zoo("plan", *words)) == ["build", "./-a folder"]
    assert next_command(zoo("show", "--", folder)) == ["plan", "./-a folder"]


@pytest.mark.slow
def test_a_checkpoint_that_a_gate_cannot_find_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny_checkpoint(Path("a folder"), "dense")
    gate = next_command(zoo("build", folder, "-o", "out"))
    assert gate[0] == "gate" and gate[2:] == ["--checkpoint", "a folder"]
    assert next_command(zoo("bench", gate[1], "-p", "1", "-g", "2", "-n", "1"))[2:] == ["--checkpoint", "DIR"]
    assert next_command(zoo("verify", gate[1], "--checkpoint", folder)) == gate
    gated = zoo(*gate, "-p", "abcdefgh", "--allow-weak-prompt", "--no-control")
    assert "is not at hand" not in gated.output, gated.output


def test_a_list_of_what_fits_ends_with_what_builds_one_of_it(root: Path, host_of: Callable[..., Plugins]) -> None:
    plugins = host_of(root / "zoo_entries" / "qwen3.5-2b.toml")
    assert next_command(zoo("list", "--for", "64GB", plugins=plugins)) == ["build", "qwen3.5-2b"]
    plugins = host_of(root / "zoo_entries" / "qwen3.6-27b.toml")  # whose usual recipe does not fit there
    assert next_command(zoo("list", "--for", "32GB", plugins=plugins)) == ["recipes", "qwen3.6-27b"]


@pytest.mark.slow
def test_whoever_follows_what_is_said_gets_from_an_entry_to_a_bundle_that_was_measured(
    built: Callable[[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built(DENSE, "int8hu").directory
    monkeypatch.chdir(bundle.parent)
    said = zoo("build", DENSE, "--sample", "-o", ".")
    assert "up to date" in said.stdout
    assert next_command(said) == ["gate", bundle.name]
    assert next_command(zoo("run", bundle.name, "-p", "x", "-n", "1")) == ["chat", bundle.name]
    assert next_command(zoo("chat", bundle.name, "-n", "1", stdin="x\n")) == ["bench", bundle.name]
    assert next_command(zoo("bench", bundle.name, "-p", "1", "-g", "2", "-n", "1")) == ["gate", bundle.name]
    assert next_command(zoo("verify", bundle.name)) == ["gate", bundle.name]
    gate = ("gate", bundle.name, "--prompts", "digits", "--positions", "8", "--allow-weak-prompt", "-o", tmp_path)
    assert next_command(zoo(*gate))[:2] == ["run", bundle.name]
    ranked = zoo("sensitivity", DENSE, "--sample", "--role", "head", "--positions", "2")
    assert next_command(ranked) == ["show-recipe", "int8hu"]
    publish = ("publish", bundle.name, "me/mine", "--ungated", "--private", "--dry-run")
    assert zoo(*publish).stderr.splitlines()[-1] == "Next, log in: hf auth login"
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    assert next_command(zoo(*publish)) == ["publish", bundle.name, "me/mine", "--private", "--ungated"]


@pytest.mark.slow
@pytest.mark.parametrize(("sample", "words"), [(True, "chat"), (False, "publish")])
def test_what_has_passed_its_gate_is_not_to_be_gated_again(
    built: Callable[[str, str], Bundle], tmp_path: Path, *, sample: bool, words: str
) -> None:
    bundle = built(DENSE, "int8hu")
    copied = tmp_path / bundle.directory.name
    shutil.copytree(bundle.directory, copied)
    write_json(copied / "build.json", {**bundle.build, "sample": sample})
    bench = ("bench", copied, "-p", "1", "-g", "2", "-n", "1")
    assert next_command(zoo(*bench))[0] == "gate"
    digest = hashlib.sha256((copied / "build.json").read_bytes()).hexdigest()
    (copied / "gate").mkdir()
    verdict = {"bundle": {"build_sha256": digest}, "verdict": {"passed": True}}
    write_json(copied / "gate" / "transcript.json", verdict)
    assert next_command(zoo(*bench))[0] == words
    write_json(copied / "gate" / "transcript.json", {**verdict, "verdict": {"passed": False}})
    assert next_command(zoo(*bench))[0] == "gate"


def test_a_catalogue_ends_with_the_address_of_its_page(
    root: Path, host_of: Callable[..., Plugins], tmp_path: Path
) -> None:
    plugins = host_of(root / "zoo_entries" / "qwen3.5-2b.toml")
    result = zoo("catalogue", "-o", tmp_path / "a folder", plugins=plugins)
    page = tmp_path / "a folder" / "catalogue.html"
    assert page.is_file() and result.stderr.splitlines()[-1] == f"Next, look at the page in a browser: {page.as_uri()}"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused before long work
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("catalogue -o FILE", "FILE is a file. Name a folder with -o DIR."),
        ("check", "There are no golden graphs in tests/goldens. Run `zoo check` in the repository"),
        ("check --only goldens --goldens nosuch", "There are no golden graphs in nosuch."),
        ("run FILE -p x", "FILE is a file, and a bundle is a folder."),
        ("new x --from nosuch", "A repository 'owner/name' on the hub or the path of a folder will do, too."),
        ("list --for 'M4 Pro 1TB'", "names a memory in another unit than GB"),
        ("run FLE -p x", "There is no bundle 'FLE'"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    result = zoo(*shlex.split(line))
    assert result.exit_code == 2 and words in result.stderr and not result.stdout, result.output


def test_without_entries_a_list_says_so() -> None:
    assert "No plugin brings any entry" in zoo("list", plugins=Plugins()).stdout


def test_a_sample_of_an_entry_that_is_only_a_file_is_gated_on_the_folder_of_that(root: Path, tmp_path: Path) -> None:
    """By the name in its record no entry is found."""
    entry = tmp_path / "mine.toml"
    shutil.copyfile(root / "zoo_entries" / "qwen3.6-27b.toml", entry)
    sample = find_entry("qwen3.6-27b", default_plugins())[0].sample_directory()
    assert _folder(BuildRequest(str(entry), sample=True), default_plugins()) == sample
    assert _folder(BuildRequest("qwen3.6-27b", sample=True), default_plugins()) is None
    assert _folder(BuildRequest(str(entry)), default_plugins()) is None
