"""The comparison of two revisions' bundles, on folders that no build made; what is built is in test_diff.py."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from documents import DOCS

SCRIPT = DOCS.parent / "scripts" / "compare_builds.py"
NAMES = runpy.run_path(str(SCRIPT))
compare: Callable[..., list[Any]] = NAMES["compare"]
table: Callable[[Mapping[str, list[Any]]], str] = NAMES["table"]

RECORD: Mapping[str, Any] = {
    "zoo": "0.1.0",
    "overlay": {"name": "qwen3_5", "code_sha256": "aa", "rewrites": [{"name": "step", "code_sha256": "aa"}]},
    "files": {"model.aimodel/main.mlirb": {"sha256": "bb", "bytes": 5}},
}


@pytest.fixture
def bundles(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same files."""
    for side in ("before", "after"):
        (tmp_path / side / "model.aimodel").mkdir(parents=True)
        (tmp_path / side / "model.aimodel" / "main.mlirb").write_bytes(b"\0\1\2\3\4")
        (tmp_path / side / "metadata.json").write_text("{}")
        write_record(tmp_path / side, RECORD)
    return tmp_path / "before", tmp_path / "after"


def write_record(bundle: Path, record: Mapping[str, Any], **options: Any) -> None:
    (bundle / "build.json").write_text(json.dumps(record, **options))


def found(rows: list[Any]) -> tuple[list[str], list[str]]:
    """What differs, and what of it nobody expects."""
    return [name for row in rows for name in row.differs], [name for row in rows for name in row.unexpected]


def test_equal_bundles_are_the_same_file_by_file(bundles: tuple[Path, Path]) -> None:
    rows = compare(*bundles)
    assert [(row.file, row.bytes, row.verdict) for row in rows][1:] == [
        ("metadata.json", (2, 2), "same"),
        ("model.aimodel/main.mlirb", (5, 5), "same"),
    ]
    assert rows[0].file == "build.json" and found(rows) == ([], [])
    assert "1 bundles, 3 files: 3 the same, 0 differ as expected, 0 differ otherwise" in table({"b": rows})


def test_one_changed_byte_is_found_and_named(bundles: tuple[Path, Path]) -> None:
    (bundles[1] / "model.aimodel" / "main.mlirb").write_bytes(b"\0\1\2\3\5")
    rows = compare(*bundles)
    assert found(rows) == (["model.aimodel/main.mlirb"],) * 2
    text = table({"some_bundle": rows})
    assert "model.aimodel/main.mlirb      5  DIFFERS\n" in text
    assert "some_bundle: model.aimodel/main.mlirb differs\n" in text and "1 differ otherwise" in text


def test_a_file_that_only_one_side_has_differs(bundles: tuple[Path, Path]) -> None:
    (bundles[0] / "extra").write_text("1234")
    (bundles[1] / "metadata.json").unlink()
    rows = compare(*bundles)
    assert found(rows) == (["extra", "metadata.json"],) * 2
    assert "4 -> none" in table({"b": rows}) and "2 -> none" in table({"b": rows})


def test_changed_digests_of_code_are_expected_and_other_keys_are_not(bundles: tuple[Path, Path]) -> None:
    overlay = RECORD["overlay"] | {"code_sha256": "cc", "rewrites": [{"name": "step", "code_sha256": "cc"}]}
    write_record(bundles[1], {**RECORD, "overlay": overlay})
    rows = compare(*bundles)
    digests = ["build.json:overlay.code_sha256", "build.json:overlay.rewrites.0.code_sha256"]
    assert found(rows) == (digests, []) and rows[0].verdict == "differs as expected"
    assert "b: build.json:overlay.code_sha256 differs, as expected\n" in table({"b": rows})

    files = {"model.aimodel/main.mlirb": {"sha256": "dd", "bytes": 5}}
    write_record(bundles[1], {"zoo": "0.2.0", "overlay": overlay, "files": files, "new": 1})
    rows = compare(*bundles)
    others = ["build.json:zoo", "build.json:files.model.aimodel/main.mlirb.sha256", "build.json:new"]
    assert sorted(found(rows)[1]) == sorted(others) and rows[0].verdict == "DIFFERS"
    assert set(found(compare(*bundles, []))[1]) == {*digests, *others}
    assert found(compare(*bundles, ["build.json:*"]))[1] == []
    assert found(compare(*bundles, ["build.json:overlay.*", "build.json:zoo", "build.json:files.*"]))[1] == [others[2]]


def test_another_list_and_another_type_of_a_key_are_named(bundles: tuple[Path, Path]) -> None:
    write_record(bundles[1], {**RECORD, "overlay": {**RECORD["overlay"], "rewrites": []}, "files": None})
    assert found(compare(*bundles))[1] == ["build.json:overlay.rewrites", "build.json:files"]


def test_the_same_record_in_other_bytes_differs(bundles: tuple[Path, Path]) -> None:
    write_record(bundles[1], RECORD, indent=2)
    assert found(compare(*bundles)) == (["build.json"], ["build.json"])


def test_a_revision_that_is_none_ends_in_words_before_anything_is_built() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "nowhere"], cwd=DOCS.parent, check=False, capture_output=True, text=True
    )
    assert done.returncode == 2 and "has no revision 'nowhere'" in done.stderr and done.stdout == ""
