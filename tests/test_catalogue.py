"""The catalogue without a browser: its record, its schema, the page's text; and what `zoo list --for` says."""

from __future__ import annotations

import copy
import functools
import html
import json
import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from command import zoo
from coreai_zoo.build.chips import CHIPS, gpu_bytes
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.errors import BadInput
from coreai_zoo.planning.catalogue import SCHEMA_FILE, as_record, read_catalogue
from coreai_zoo.planning.catalogue_page import render, write_catalogue
from coreai_zoo.planning.machines import Machine, parse_machine
from coreai_zoo.planning.plan import plan
from coreai_zoo.plugins import Plugins, default_plugins
from coreai_zoo.progress import Reporter
from suite import CATALOGUED, NIGHTLY
from web_pages import Page, assert_alone

Record = dict[str, Any]


@functools.cache
def read(path: Path) -> Record:
    found: Record = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture
def folder(catalogue_folder: Path) -> Path:
    return catalogue_folder


@pytest.fixture
def record(folder: Path) -> Record:
    return read(folder / "catalogue.json")


def bundle_of(record: Record, entry: str, recipe: str, contract: str) -> Record:
    (found,) = (
        bundle
        for bundle in record["bundles"]
        if (bundle["entry"], bundle["recipe"], bundle["contract"]) == (entry, recipe, contract)
    )
    return dict(found)


# ---------------------------------------------------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------------------------------------------------


def test_the_record_is_what_its_schema_says_and_the_schema_lies_beside_it(folder: Path, record: Record) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "catalogue.html",
        "catalogue.json",
        "catalogue.schema.json",
    ]
    assert (folder / "catalogue.schema.json").read_bytes() == SCHEMA_FILE.read_bytes()
    schema = read(SCHEMA_FILE)
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(record)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record.update(date="today"),
        lambda record: record["bundles"][0].pop("command"),
        lambda record: record["bundles"][0].update(asset_bytes="1"),
        lambda record: record["bundles"][0]["fits"][0].update(most_context=0),
        lambda record: record["bundles"][0]["machines"][0].update(watts=9),
        lambda record: record["refused"][0].update(reason=""),
    ],
    ids=["a date", "no command", "text for bytes", "a context of nothing", "an unknown key", "no reason"],
)
def test_the_schema_refuses_another_record(spoil: Callable[[Record], object], record: Record) -> None:
    spoilt = copy.deepcopy({**record, "bundles": record["bundles"][:1], "refused": record["refused"][:1]})
    validator = Draft202012Validator(read(SCHEMA_FILE))
    assert validator.is_valid(spoilt)
    spoil(spoilt)
    assert not validator.is_valid(spoilt)


def test_no_part_of_the_schema_lets_unknown_keys_in() -> None:
    def objects(part: Any) -> list[Record]:
        if isinstance(part, dict):
            return [part] * (part.get("type") == "object") + [
                found for each in part.values() for found in objects(each)
            ]
        return [found for each in part for found in objects(each)] if isinstance(part, list) else []

    found = objects(read(SCHEMA_FILE))
    assert len(found) > 10
    assert [part for part in found if part.get("additionalProperties", True) is True] == []


def test_every_combination_is_there_once_or_refused_with_a_reason(record: Record) -> None:
    plugins = default_plugins()
    whole = {path.stem for _, path in plugins.entries()}
    names = [[each["name"] for each in record[kind]] for kind in ("entries", "recipes", "contracts")]
    assert names[1:] == [list(plugins.recipes()), list(plugins.contracts())]
    assert set(names[0]) == (whole if NIGHTLY else set(CATALOGUED))
    assert set(CATALOGUED) < whole

    def keys(kind: str) -> list[tuple[str, ...]]:
        return [(each["entry"], each["recipe"], each["contract"]) for each in record[kind]]

    everything = list(product(*names))
    made, refused = keys("bundles"), keys("refused")
    assert sorted(made + refused) == sorted(everything)
    assert made == [key for key in everything if key in set(made)], "in the order of entries, recipes, contracts"
    assert refused == [key for key in everything if key in set(refused)]


def test_what_is_refused_is_what_a_plan_refuses(record: Record) -> None:
    assert {one["contract"] for one in record["refused"]} == {"fixed-s1"}
    for refused in record["refused"][:2]:
        request = BuildRequest(
            refused["entry"], recipe=refused["recipe"], contract=refused["contract"], backend="coreml", dry=True
        )
        with pytest.raises(BadInput) as error:
            plan(request, default_plugins())
        assert error.value.message == refused["reason"]


@pytest.mark.parametrize(
    ("entry", "recipe", "contract"),
    [
        ("qwen3.6-27b", "int8hu", "static-s1"),
        ("qwen3.6-27b", "int8lin", "fixed-s1"),
        ("qwen3.6-35b-a3b", "int4lin", "chunked"),
        ("qwen3.5-397b-a17b", "int4hu8", "dynamic"),
    ],
)
def test_a_bundle_is_what_zoo_plan_says_of_the_command_that_builds_it(
    entry: str, recipe: str, contract: str, record: Record
) -> None:
    bundle = bundle_of(record, entry, recipe, contract)
    words = shlex.split(bundle["command"])
    assert words[:2] == ["zoo", "build"]
    result = zoo("plan", *words[2:], "--json")
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)

    same = set(bundle) & set(planned)
    assert same >= {
        "entry",
        "recipe",
        "contract",
        "backend",
        "asset_bytes",
        "decode",
        "states",
        "machines",
        "published",
    }
    assert {key: bundle[key] for key in same} == {key: planned[key] for key in same}
    assert zoo("build", *words[2:], "--help").exit_code == 0


@pytest.mark.parametrize(
    ("entry", "recipe", "contract", "memory"),
    [
        ("qwen3.6-27b", "int8hu", "static-s1", 48),
        ("qwen3.6-27b", "int4lin", "static-s1", 32),
        ("qwen3.6-27b", "int8lin", "fixed-s1", 48),
        ("qwen3.6-35b-a3b", "int4lin", "chunked", 32),
    ],
)
def test_the_most_context_fits_and_one_token_more_does_not(
    entry: str, recipe: str, contract: str, memory: int, record: Record
) -> None:
    bundle = bundle_of(record, entry, recipe, contract)
    (most,) = (fit["most_context"] for fit in bundle["fits"] if fit["memory_gib"] == memory)
    limit = 262_144
    assert most is not None and most < limit

    def resident(context: int) -> int:
        request = BuildRequest(
            entry, recipe=recipe, contract=contract, backend=bundle["backend"], max_context=context, dry=True
        )
        return plan(request, default_plugins()).resident

    assert resident(most) <= gpu_bytes(memory) < resident(most + 1)


def test_more_memory_holds_more_context_up_to_what_the_model_was_made_for(record: Record) -> None:
    limits = {entry["name"]: entry["max_context_length"] for entry in record["entries"]}
    sizes = [memory["gib"] for memory in record["memories"]]
    assert sizes == sorted({memory for chip in CHIPS for memory in chip.memory})
    assert {16, 24, 32, 36, 48, 64, 96, 128} <= set(sizes)
    for bundle in record["bundles"]:
        assert [fit["memory_gib"] for fit in bundle["fits"]] == sizes
        most = [fit["most_context"] or 0 for fit in bundle["fits"]]
        assert most == sorted(most)
        assert max(most) <= limits[bundle["entry"]]
        needed = [machine["fits_from_gib"] for machine in bundle["machines"] if machine["fits_from_gib"]]
        usual = bundle["states"]["context"]
        assert all(most[sizes.index(size)] >= usual for size in needed)
    big = bundle_of(record, "qwen3.5-397b-a17b", "int8hu", "static-s1")
    assert {fit["most_context"] for fit in big["fits"] if fit["memory_gib"] <= 128} == {None}


def test_what_was_published_is_beside_what_is_predicted(record: Record, folder: Path) -> None:
    bundle = bundle_of(record, "qwen3.6-27b", "int8hu", "static-s1")
    assert [(known["machine"], known["decode"]) for known in bundle["published"]] == [("M4 Max", 15.9), ("M4 Pro", 8.7)]
    page = (folder / "catalogue.html").read_text(encoding="utf-8")
    assert "Published: 15.9 tokens/s on M4 Max" in page


def test_the_same_installation_gives_the_same_bytes(
    host_of: Callable[..., Plugins], root: Path, tmp_path: Path, record: Record
) -> None:
    def written(name: str) -> list[bytes]:
        plugins = host_of(root / "zoo_entries" / "qwen3.5-2b.toml")
        made = as_record(read_catalogue(plugins, Reporter(silent=True)))
        return [path.read_bytes() for path in write_catalogue(made, tmp_path / name)]

    one = written("one")
    assert one == written("other")
    (alone,) = {bundle["entry"] for bundle in json.loads(one[1])["bundles"]}
    assert json.loads(one[1])["bundles"] == [bundle for bundle in record["bundles"] if bundle["entry"] == alone]


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def test_the_page_has_every_bundle_without_its_script(folder: Path, record: Record) -> None:
    text = (folder / "catalogue.html").read_text(encoding="utf-8")
    page = assert_alone(text)

    assert text.count("<script>") == 1 and text.count('class="bundle"') == len(record["bundles"])
    for bundle in record["bundles"]:
        assert f'<pre class="command">{bundle["command"]}</pre>' in text
        assert f"{bundle['asset_bytes']:,} in the asset" in page.text
    for refused in record["refused"]:
        words = f"zoo build {refused['entry']} --recipe {refused['recipe']} --contract {refused['contract']} "
        assert words not in page.text, "what is refused is not on the page"
    assert "prefers-color-scheme: dark" in text


def test_what_entries_and_recipes_say_is_escaped(record: Record) -> None:
    evil = "<script>alert(1)</script>"
    entry, recipe = ({**record[kind][0], **dict.fromkeys(keys, evil)} for kind, keys in (
        ("entries", ("title", "summary", "hf_id")), ("recipes", ("description", "quality")),
    ))  # fmt: skip
    text = render({**record, "entries": [entry], "recipes": [recipe], "bundles": record["bundles"][:1], "refused": []})

    assert evil not in text
    assert text.count(html.escape(evil)) >= 5


def test_an_entry_that_nothing_can_be_planned_of_says_why(
    host_of: Callable[..., Plugins], entry_file: Callable[..., Path], root: Path
) -> None:
    plugins = host_of(root / "zoo_entries" / "qwen3.5-2b.toml", entry_file())
    made = as_record(read_catalogue(plugins, Reporter(silent=True)))

    Draft202012Validator(read(SCHEMA_FILE)).validate(made)
    reasons = {one["reason"] for one in made["refused"] if one["entry"] == "toy-1b"}
    assert len([one for one in made["refused"] if one["entry"] == "toy-1b"]) == len(made["recipes"]) * len(
        made["contracts"]
    )
    assert "There is no bundle of it: " in render(made)
    assert any(reason in Page(render(made)).text for reason in reasons)


def test_a_folder_that_cannot_be_written_is_told_in_words(tmp_path: Path, record: Record) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="cannot be written: "):
        write_catalogue(record, tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------------------
# zoo list --for
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "chip", "memory"),
    [
        ("M4 Pro 48GB", "M4 Pro", 48),
        ("48 gib m4-pro", "M4 Pro", 48),
        ("m4pro/48g", "M4 Pro", 48),
        ("Apple M4 Pro with 48 GB of unified memory", "M4 Pro", 48),
        ("MacBook Air, M5, 16 GB", "M5", 16),
        ("M3 Ultra 96", "M3 Ultra", 96),
        ("m4 max, 32-core gpu", "M4 Max, 32-core GPU", 36),
        ("M4 Max 36GB", "M4 Max, 32-core GPU", 36),
        ("M4 Max 64 GB", "M4 Max", 64),
        ("24 GB", None, 24),
    ],
)
def test_a_machine_is_read_however_it_is_written(text: str, chip: str | None, memory: int) -> None:
    found = parse_machine(text)
    assert (found.chip.name if found.chip else None, found.memory) == (chip, memory)
    assert found.gpu_bytes == gpu_bytes(memory)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("M4 Prp 48GB", "No chip is called 'M4 Prp'. Did you mean M4 Pro"),
        ("Snapdragon 16GB", "No chip is called 'Snapdragon'. There are M4; M4 Pro; "),
        ("M4 Pro", 'The M4 Pro is sold with 24, 48 or 64 GB. Say how much it has: "M4 Pro 24GB".'),
        (
            "M4 Max 24GB",
            "No M4 Max with 24 GB is known. Sold are the M4 Max with 48, 64 or 128 GB; the M4 Max, 32-core",
        ),
        ("16GB 32GB", "does not name the memory of one machine"),
        ("0 GB", "does not name the memory of one machine"),
        (" ", "names neither a chip nor a memory"),
    ],
)
def test_a_machine_that_is_none_is_told_what_to_say(text: str, words: str) -> None:
    result = zoo("list", "--for", text)
    assert result.exit_code == 2
    assert words in result.stderr
    assert isinstance(parse_machine("M4 Pro 48GB"), Machine)


def test_what_fits_in_a_machine_is_what_the_catalogue_says(
    record: Record, host_of: Callable[..., Plugins], root: Path
) -> None:
    names = ("qwen3.6-27b", "qwen3.6-35b-a3b", "qwen3.5-397b-a17b")
    plugins = host_of(*(root / "zoo_entries" / f"{name}.toml" for name in names))
    result = zoo("list", "--for", "m4 pro 48 gb", "--json", plugins=plugins)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    usual = {entry["name"]: entry["contract"] for entry in record["entries"] if entry["name"] in names}
    expected = []
    for bundle in record["bundles"]:
        (most,) = (fit["most_context"] for fit in bundle["fits"] if fit["memory_gib"] == 48)
        (rate,) = (each["tokens_per_second_at_efficiency"] for each in bundle["machines"] if each["name"] == "M4 Pro")
        if most is not None and bundle["contract"] == usual.get(bundle["entry"]):
            expected.append((bundle["entry"], bundle["recipe"], bundle["contract"], bundle["asset_bytes"], most, rate))

    assert (told["chip"], told["memory_gib"], told["gpu_bytes"]) == ("M4 Pro", 48, 36 * 2**30)
    assert sorted(tuple(fit.values()) for fit in told["fits"]) == sorted(expected)
    assert set(told["does_not_fit"]) == {"qwen3.5-397b-a17b"}


def test_the_table_of_what_fits_says_recipe_context_and_rate(host_of: Callable[..., Plugins], root: Path) -> None:
    plugins = host_of(*(root / "zoo_entries" / f"{name}.toml" for name in ("qwen3.6-27b", "qwen3.5-122b-a10b")))
    result = zoo("list", "--for", "M4 Pro 48GB", plugins=plugins)

    assert result.exit_code == 0
    assert "M4 Pro, 48 GB: the GPU may hold 36.0 GiB" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("qwen3.6-27b ")]
    assert ["qwen3.6-27b", "int8hu", "static-s1", "27.7", "GiB", "134,326", "7.9"] in rows
    assert "fp16" not in {row[1] for row in rows}
    assert "qwen3.5-122b-a10b does not fit: the smallest, int4hu8, is 64.7 GiB of asset alone." in result.stdout

    by_memory = zoo("list", "--for", "16 GB", plugins=plugins)
    assert "Nothing fits." in by_memory.stdout and "tokens/s" not in by_memory.stdout
