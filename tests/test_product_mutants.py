"""Every mistake of tests/product_mutants.py is caught by the check that the table names, through the real commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from command import zoo
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.review.golden_metadata import metadata_differences
from product_mutants import ENTRY, NAME, PRODUCT_MUTANTS, ProductMutant, record, table
from test_fingerprint import CHANGES

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture
def bundle(built: Callable[[str, str], Bundle], tmp_path: Path) -> Path:
    """A copy of a built sample that a mistake may be made in."""
    return shutil.copytree(built(ENTRY, "int8hu").directory, tmp_path / NAME)


def caught(bundle: Path, by: str) -> set[str]:
    """What fails, by the name of the command and of the check."""
    command, _, _check = by.partition(": ")
    if command == "golden metadata":
        return {by} if metadata_differences(Bundle.open(bundle), GOLDENS) else set()
    if command == "verify":
        result = zoo("verify", bundle, "--json")
        found = {f"verify: {check['name']}" for check in json.loads(result.stdout) if not check["passed"]}
        assert result.exit_code == bool(found)
        return found
    result = zoo("gate", bundle, "--prompts", "chat", "--no-control")
    assert result.exit_code in (0, 1), result.output
    return {by} if result.exit_code == 1 and "The bundle does not verify: copy: " in result.stderr else set()


@pytest.mark.parametrize("mutant", PRODUCT_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_is_caught_by_what_the_table_says_and_by_no_hash(
    mutant: ProductMutant, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant.make(bundle, monkeypatch)

    found = caught(bundle, mutant.caught_by)

    assert mutant.caught_by in found
    assert not {"verify: files", "verify: main.hash"} & found


def test_a_bundle_without_a_mistake_is_caught_by_nothing(bundle: Path) -> None:
    record(bundle)
    assert caught(bundle, "verify: any") == caught(bundle, "golden metadata") == set()


def test_the_table_has_a_row_for_each_mutant_and_each_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in PRODUCT_MUTANTS}) == len(PRODUCT_MUTANTS) >= 14
    rows = table().splitlines()[2:]
    assert len(rows) == len(PRODUCT_MUTANTS) + len(CHANGES)
    assert all(row.count("|") == 5 for row in rows)
