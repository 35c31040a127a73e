"""Figures in README.md and docs/: those that no machine decides are compared, all are written by one script."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from coreai_zoo.bundle.bundle import Bundle

ENTRIES = ("qwen3.6-27b", "qwen3.6-35b-a3b")


@pytest.fixture
def figures(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, working on copies of the pages."""
    spec = importlib.util.spec_from_file_location("figures", root / "scripts" / "figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    copies = [tmp_path / page.name for page in module.PAGES]
    for page, copy in zip(module.PAGES, copies, strict=True):
        copy.write_bytes(page.read_bytes())
    monkeypatch.setattr(module, "PAGES", copies)
    return module


@pytest.fixture
def samples(built: Callable[[str, str], Bundle]) -> list[str]:
    return [str(built(entry, "int8hu").directory) for entry in ENTRIES]


@pytest.mark.slow
def test_what_no_machine_decides_is_as_stated(
    figures: ModuleType, samples: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = figures.main(["--check", *samples])

    assert (code, capsys.readouterr().err) == (0, ""), "run `make figures`"


# In which page, what to put a digit behind, and the name of the figure that then differs.
CHANGES = [
    ("README.md", "figure: mistakes -->", "mistakes"),
    ("README.md", "figure: sample-parameters -->", "sample-parameters"),
    ("README.md", "figure: bytes-read -->", "bytes-read"),
    ("README.md", "figure: bytes-written -->", "bytes-written"),
    ("recipes.md", "| qwen3.6-27b | `int8hu` | ", "costs"),  # the first of two tables
    ("recipes.md", "| qwen3.6-35b-a3b | `int8hu` | ", "costs"),
    ("README.md", "bytes               ", "demo"),
    ("README.md", "weights  109 tensors as", "demo"),
]


@pytest.mark.slow
def test_every_figure_that_differs_is_named(
    figures: ModuleType, samples: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, stated, _ in CHANGES:
        (page,) = (each for each in figures.PAGES if each.name == name)
        assert page.read_text().count(stated) == 1 + (name == "recipes.md")
        changed = f"{stated}1" if stated.endswith((" ", ">")) else stated.replace("9", "8")
        page.write_text(page.read_text().replace(stated, changed, 1))

    code = figures.main(["--check", *samples])

    assert code == 1
    named = [line.partition(" is ")[0] for line in capsys.readouterr().err.splitlines()]
    assert sorted(named) == sorted(f"{page}: {name}" for page, _, name in CHANGES)


def test_every_figure_is_written_where_it_stands_and_nothing_else_changes(
    figures: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {page: page.read_text() for page in figures.PAGES}
    for table in ("KNOWN", "MEASURED"):
        monkeypatch.setattr(figures, table, {name: lambda name=name: f"<{name}>" for name in getattr(figures, table)})

    assert figures.main([]) == 0

    stated = {name: text for _, name, text in figures.places()}
    assert stated == {name: f"<{name}>" for name in (*figures.KNOWN, *figures.MEASURED)}
    for page, text in before.items():
        assert figures.PLACE.sub("", page.read_text()) == figures.PLACE.sub("", text)


@pytest.mark.parametrize("text", ["", "<!-- figure: height -->8 km<!-- end -->"])
def test_a_figure_that_is_not_known_or_stands_nowhere_is_an_error(text: str, figures: ModuleType) -> None:
    page = next(each for each in figures.PAGES if each.name == "README.md")
    page.write_text(page.read_text() + text if text else "")

    with pytest.raises(SystemExit, match="height" if text else "bytes-read, bytes-written, demo, mistakes"):
        figures.main(["--check"])
