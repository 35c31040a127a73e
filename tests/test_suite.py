"""The suite itself: each file of tests is in one list, and what is shared is made once and left alone."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from shared import Shared
from suite import LONG, QUICK, THOROUGH, TRACED_ANEW, long_ones_first

TESTS = Path(__file__).parent


def test_every_file_of_tests_is_either_quick_or_thorough() -> None:
    files = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    assert files == QUICK | THOROUGH, "tests/suite.py has to list what is there"
    assert not QUICK & THOROUGH
    assert {*LONG} | TRACED_ANEW <= THOROUGH


def test_the_quick_loop_collects_the_quick_files_only(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ignored(name: str) -> bool | None:
        path = TESTS / f"test_{name}.py"
        found: bool | None = pytestconfig.hook.pytest_ignore_collect(collection_path=path, config=pytestconfig)
        return found

    for asked in (False, True):
        monkeypatch.setattr(pytestconfig.option, "quick", asked)
        assert {name for name in QUICK | THOROUGH if ignored(name)} == (THOROUGH if asked else set())


def test_each_half_of_the_tests_begins_with_long_ones_and_none_is_lost() -> None:
    files = sorted([*LONG, *(f"short_{number}" for number in range(20))])
    ordered = long_ones_first(files, str)
    assert sorted(ordered) == files
    assert (ordered[:4], ordered[len(files) // 2 :][:4]) == ([*LONG[::2]], [*LONG[1::2]])
    assert long_ones_first(["a", "b"], str) == ["a", "b"]


def test_no_example_fails_because_the_machine_is_busy() -> None:
    assert settings().deadline is None


def number_of_fills(root: Path, worker: int) -> int:
    def fill(folder: Path) -> None:
        time.sleep(0.3)  # long enough for the other to come in between
        (folder / f"by-{worker}").touch()

    return len(list(Shared(root).folder("thing", fill).iterdir()))


def test_processes_that_ask_at_the_same_time_get_one_folder_that_one_of_them_filled(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(number_of_fills, [tmp_path] * 4, range(4))) == [1] * 4


def test_a_folder_is_filled_again_after_a_try_that_failed_and_never_after_one_that_did_not(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Shared(tmp_path).folder("thing", fail)
    made = Shared(tmp_path).folder("thing", lambda folder: (folder / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]
    assert Shared(tmp_path).folder("thing", fail) == made


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_a_folder_that_a_test_changed_is_not_handed_out(change: str, tmp_path: Path) -> None:
    made = Shared(tmp_path).folder("thing", lambda folder: (folder / "file").write_text("a"))
    if change == "removed":
        (made / "file").unlink()
    else:
        (made / ("file" if change == "edited" else "another")).write_text("b" * 2)
    with pytest.raises(AssertionError, match="which is shared"):
        Shared(tmp_path).folder("thing", lambda _: None)


def test_arrays_are_computed_once_and_come_back_as_they_were(tmp_path: Path) -> None:
    first = Shared(tmp_path).arrays("some", lambda: {"x": np.arange(3, dtype=np.float16), "y": np.ones((2, 1))})
    again = Shared(tmp_path).arrays("some", lambda: pytest.fail("computed twice"))
    assert {name: (array.dtype, array.tolist()) for name, array in again.items()} == {
        "x": (np.float16, [0, 1, 2]),
        "y": (np.float64, [[1.0], [1.0]]),
    }
    assert first.keys() == again.keys()
