"""A bundle is found by its name, or by that of its entry, where exactly one fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command import zoo
from coreai_zoo.bundle.find import find_bundle
from coreai_zoo.errors import BadInput
from coreai_zoo.plugins import Plugins

COMMANDS = {"verify": (), "run": ("-p", "x"), "gate": (), "sensitivity": ()}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(folder: str, **entry: Any) -> Path:
    """A folder that looks like a bundle from outside; opening it says that its record is damaged, and where it is."""
    path = Path(folder)
    path.mkdir(parents=True)
    (path / "metadata.json").write_text("{}")
    (path / "build.json").write_text(json.dumps({"schema": 2, "entry": entry}))
    return path


@pytest.mark.parametrize(
    "text",
    ["toy_1_5_sample_decode", "toy-1.5", "toy_1_5", "Toy 1.5", "toys/Toy-1.5-Chat", "TOY-1.5"],
)
@pytest.mark.parametrize("parent", ["exports", "."])
def test_a_bundle_is_found_by_its_folder_and_by_the_names_of_its_entry(
    shipped: Plugins, text: str, parent: str
) -> None:
    bundle = make(f"{parent}/toy_1_5_sample_decode", name="toy-1.5", title="Toy 1.5", hf_id="toys/Toy-1.5-Chat")
    make("exports/other", name="toy-1", title="Toy 1")

    assert find_bundle(text, shipped) == bundle


def test_a_path_that_exists_wins_over_every_name(shipped: Plugins) -> None:
    make("exports/toy", name="toy")
    at_path = make("toy", name="something-else")

    assert find_bundle("toy", shipped) == at_path
    assert find_bundle("exports/toy/", shipped) == Path("exports/toy")


def test_a_bundles_own_name_wins_over_the_entry_of_another(shipped: Plugins) -> None:
    wanted = make("exports/toy", name="one")
    make("exports/two", name="toy")

    assert find_bundle("toy", shipped) == wanted


def test_several_bundles_of_one_name_are_listed(shipped: Plugins) -> None:
    make("exports/toy_a", name="toy")
    make("toy_b", name="toy")

    with pytest.raises(BadInput) as raised:
        find_bundle("toy", shipped)
    assert str(raised.value) == "'toy' fits 2 bundles: exports/toy_a, toy_b. Give the path of one."


def test_a_bundle_that_can_be_reached_twice_is_one(shipped: Plugins) -> None:
    bundle = make("toy_a", name="toy")
    Path("exports").symlink_to(".")

    assert find_bundle("toy", shipped).samefile(bundle)


def test_what_is_half_built_or_unreadable_or_no_bundle_is_passed_over(shipped: Plugins) -> None:
    make("exports/.toy_a.partial", name="toy")
    make("exports/damaged", name="toy").joinpath("build.json").write_text("{")
    make("exports/a_list", name="toy").joinpath("build.json").write_text('{"entry": ["toy"]}')
    Path("exports/checkpoint").mkdir()
    Path("exports/file").touch()
    wanted = make("exports/toy_b", name="toy")

    assert find_bundle("toy", shipped) == wanted
    assert find_bundle("damaged", shipped) == Path("exports/damaged"), "its record says best what is wrong with it"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("qwen3.6-27b", "Make one: `zoo build qwen3.6-27b`."),
        ("Qwen3.6-27B", "Make one: `zoo build qwen3.6-27b`."),
        ("my_finetune_decod", "Did you mean my_finetune_decode? `zoo build NAME` makes a bundle of an entry."),
        ("qwen3.6-27", "Did you mean qwen3.6-27b or qwen3.8-27b or qwen3.5-27b? `zoo build NAME` makes a bundle"),
    ],
)
def test_a_name_that_no_bundle_has_is_refused_with_the_nearest(shipped: Plugins, text: str, hint: str) -> None:
    make("exports/my_finetune_decode", name="my-finetune")

    with pytest.raises(BadInput) as raised:
        find_bundle(text, shipped)
    assert str(raised.value).startswith(f"There is no bundle {text!r}, neither here nor in exports/. {hint}")


@pytest.mark.parametrize("text", ["exports/toy", "x" * 5000, "~/toy"])
def test_a_path_where_nothing_is_is_refused(shipped: Plugins, text: str) -> None:
    with pytest.raises(BadInput, match="There is no bundle"):
        find_bundle(text, shipped)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["toy", "toy_decode"])
def test_every_command_that_takes_a_bundle_takes_its_name(command: str, name: str) -> None:
    make("exports/toy_decode", name="toy")

    result = zoo(command, name, *COMMANDS[command])

    assert result.exit_code == 2
    assert "exports/toy_decode/build.json is damaged" in result.stderr


def test_the_other_bundle_of_a_gate_is_named_like_the_first() -> None:
    make("exports/toy_decode", name="toy")

    assert "There is no bundle 'qwen3.6-27b'" in zoo("gate", "exports/toy_decode", "--against", "qwen3.6-27b").stderr


def test_beside_a_bundle_the_name_of_an_entry_means_its_bundle_in_a_diff() -> None:
    make("exports/toy_decode", name="toy")
    make("exports/qwen_decode", name="qwen3.6-27b")

    for sides in (("qwen3.6-27b", "toy"), ("qwen3.6-27b", "exports/toy_decode"), ("qwen_decode", "toy_decode")):
        result = zoo("diff", *sides)
        assert result.exit_code == 2
        assert "exports/qwen_decode/build.json is damaged" in result.stderr, sides
    alone = zoo("diff", "toy", "qwen3.5-2b")
    assert "toy is a bundle and qwen3.5-2b is none" in alone.stderr


def test_two_names_of_entries_are_compared_as_entries() -> None:
    make("exports/qwen_decode", name="qwen3.6-27b")
    make("exports/other_decode", name="qwen3.6-27b")

    assert zoo("diff", "qwen3.6-27b:int8hu", "qwen3.6-27b:int3").stderr.startswith("error: There is no recipe 'int3'")
