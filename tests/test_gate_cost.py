"""What a gate says of its cost before it starts, and what long work says of its end."""

from __future__ import annotations

import itertools

import pytest

from coreai_zoo import progress
from coreai_zoo.gates import cost
from coreai_zoo.gates.cost import Cost, Pace, active_parameters, measured_pace
from coreai_zoo.progress import Reporter, duration

BUILD = {
    "facts": {"experts": 8, "experts_per_token": 2},
    "roles": {
        "table": {"kind": "embedding", "routed": False},
        "expert": {"kind": "body", "routed": True},
        "head": {"kind": "head", "routed": False},
    },
    "weights": {"table": {"parameters": 1000}, "expert": {"parameters": 800}, "head": {"parameters": 30}},
}


def test_a_position_meets_the_experts_that_are_chosen_and_no_table_is_multiplied() -> None:
    assert active_parameters(BUILD) == 800 * 2 // 8 + 30
    assert active_parameters(BUILD | {"facts": {}}) == 830
    assert active_parameters({}) == 0


def test_the_time_is_the_oracles_at_one_pace_and_all_others_at_the_other() -> None:
    assert Cost("prompts", 10, 2, 300, 3).seconds(Pace(100.0, 50.0)) == pytest.approx(30 + 3 * 60)
    assert Cost("prompts", 10, 2, 300, 3, readers=2).seconds(Pace(100.0, 50.0)) == pytest.approx(3 * 30 + 3 * 60)


def test_a_large_gate_tells_its_time_and_a_small_one_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "measured_pace", lambda: Pace(2e11, 2e10))

    small = Cost("prompts", 3901, 8, 2_900_000, 2).note()
    assert small == "prompts: 3,901 positions through 8 layers, by the oracle and 2 models beside it"
    large = Cost("corpus", 829, 64, 27_000_000_000, 1).note()
    assert large.startswith(
        "corpus: 829 positions through 64 layers, by the oracle and 1 model beside it: 4.5e+13 mult"
    )
    assert "some 21 min at this CPU's pace" in large  # 112 s and 1,119 s


def test_the_pace_of_this_machine_is_that_of_a_machine() -> None:
    pace = measured_pace()

    assert 1e7 < pace.step < 1e14 and 1e7 < pace.together < 1e14


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (12_000, "3 h 20 min")]
)
def test_a_duration_is_said_as_a_person_would(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float, steps: int
) -> list[str]:
    """The lines of a stage whose steps take so many seconds each."""
    clock = itertools.count(0.0, seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Reporter().steps("", steps) as count:
        for _ in range(steps):
            count()
    return [line.strip() for line in capsys.readouterr().err.splitlines()]


def test_long_work_is_foretold_once_after_its_first_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert counted(monkeypatch, capsys, 2.0, 64) == ["8 of 64 steps in 16 s, about 2 min left"]
    assert counted(monkeypatch, capsys, 20.0, 8) == ["3 of 8 steps in 60 s, about 2 min left"]
    assert counted(monkeypatch, capsys, 1.0, 50) == [], "what takes less than a minute more is not worth a line"


def test_work_of_hours_says_now_and_then_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = counted(monkeypatch, capsys, 100.0, 30)

    assert lines[:2] == ["1 of 30 steps in 2 min, about 48 min left", "7 of 30 steps in 12 min, about 38 min left"]
    assert len(lines) == 5 and lines[-1].endswith("about 8 min left")


def test_a_silent_reporter_says_nothing_of_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0.0, 1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Reporter(silent=True).steps("what", 20) as count:
        for _ in range(20):
            count()

    assert capsys.readouterr().err == ""
