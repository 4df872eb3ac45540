"""Progress is sparse off a terminal, its time left is the rate of the work itself, and only the main rank speaks."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tamis.arguments import as_progress
from tamis.errors import InvalidSettings
from tamis.progress import LiveProgress, NoProgress, PlainProgress, Rate, choose_progress, time_text


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def test_work_of_an_earlier_run_does_not_count_as_speed() -> None:
    clock = Clock()
    rate = Rate(clock)
    rate.report(900)  # found on disk
    assert rate.per_second() is None and rate.seconds_left(1000) is None
    clock.now += 10
    rate.report(920)
    assert rate.per_second() == pytest.approx(2.0)
    assert rate.seconds_left(1000) == pytest.approx(40.0)
    clock.now += 15  # waiting for the next report shortens the rest
    assert rate.seconds_left(1000) == pytest.approx(25.0)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 50)), min_size=2, max_size=30))
def test_a_constant_rate_is_measured_exactly_and_time_left_is_never_negative(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    rate = Rate(clock)
    done = 0
    for _, units in steps:
        clock.now += units / 4.0
        done += units
        rate.report(done)
    assert rate.per_second() == pytest.approx(4.0, rel=1e-6)
    clock.now += 1e6
    assert rate.seconds_left(done + 10) == 0.0


def test_short_stages_say_nothing_off_a_terminal() -> None:
    clock, to = Clock(), console()
    with PlainProgress(to, clock).stage("tokenize pool", 5, "rows") as advance:
        clock.now += 1
        advance(5)
    assert written(to) == ""


def test_long_stages_say_a_line_every_ten_seconds() -> None:
    clock, to = Clock(), console()
    with PlainProgress(to, clock).stage("gradients (pool)", 1000, "rows") as advance:
        for _ in range(100):
            clock.now += 0.5
            advance(10)
    lines = written(to).splitlines()
    assert lines[0] == "gradients (pool): 200 of 1,000 rows (20%), 20 rows/s, 40 s left"
    assert lines[-1] == "gradients (pool): 1,000 rows in 50 s"
    assert len(lines) == 6


def test_an_interrupted_stage_does_not_claim_to_be_done() -> None:
    clock, to = Clock(), console()
    with pytest.raises(KeyboardInterrupt), PlainProgress(to, clock).stage("x", 10, "rows") as advance:
        clock.now += 30
        advance(1)
        raise KeyboardInterrupt
    assert " in " not in written(to)


def test_a_live_stage_shows_its_name_and_ends() -> None:
    to = console(terminal=True)
    with LiveProgress(to).stage("gradients [pool]", 4, "rows") as advance:
        advance(4)
    assert "gradients [pool]" in written(to)


def test_quiet_and_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_progress(console(), quiet=True), NoProgress)
    assert isinstance(choose_progress(console(), quiet=False), PlainProgress)
    assert isinstance(choose_progress(console(terminal=True), quiet=False), LiveProgress)
    monkeypatch.setenv("RANK", "3")
    assert isinstance(choose_progress(console(terminal=True), quiet=False), NoProgress)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (45, "45 s"),
        (59.7, "1 min 00 s"),
        (250, "4 min 10 s"),
        (12000, "3 h 20 min"),
        (216000, "2.5 days"),
    ],
)
def test_times_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert time_text(seconds) == said


def test_python_asks_for_a_bar_with_true() -> None:
    assert isinstance(as_progress(True), PlainProgress) and as_progress(False) is as_progress(None) is None
    own = NoProgress()
    assert as_progress(own) is own
    with pytest.raises(InvalidSettings, match="progress='yes': expected True for a bar"):
        as_progress("yes")  # type: ignore[arg-type]
