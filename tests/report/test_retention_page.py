"""Drawings of a proxy's page: round ticks, points where the numbers are, and the level that is wanted."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.report.retention_page import _drawing, round_numbers


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_even_and_inside(low: float, width: float) -> None:
    high = low + width
    ticks = round_numbers(low, high)
    slack = 1e-6 * (abs(low) + width)
    assert 2 <= len(ticks) <= 7
    assert low - slack <= ticks[0] and ticks[-1] <= high + slack
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) - min(steps) <= slack
    digits = f"{steps[0]:.3e}"
    assert (digits[0] in "125" and digits[2:5] == "000") or abs(low) > 1e6 * width  # rounding of a far-off pair


def test_ticks_of_a_hand_case_and_of_a_single_value() -> None:
    assert round_numbers(0.0, 37.0) == [0.0, 10.0, 20.0, 30.0]
    assert round_numbers(3.0, 3.0) == [3.0]


def test_a_drawing_places_points_and_the_wanted_level_on_one_scale() -> None:
    made = _drawing("t", "a", "x", [("selected", "kept", [(0.1, 0.9), (0.9, -0.1)])], wanted=0.9, x_ticks=[0.1, 0.9])
    (_, _, ((left, top), (right, bottom))) = made.lines[0]
    assert left < right and top < bottom
    assert made.wanted is not None and made.wanted[0] == top  # 0.9 is where 0.9 was measured
    heights = {label: y for y, label in made.y_ticks}
    assert list(heights) == ["−0.25", "0", "0.25", "0.5", "0.75", "1"]
    assert heights["1"] < top < heights["0.75"] and heights["0"] < bottom < heights["−0.25"]
    assert [label for _, label in made.x_ticks] == ["0.1", "0.9"]


@pytest.mark.parametrize(("highest", "most"), [(1.0, 8), (9.0, 9), (30.0, 9)])
def test_a_high_ratio_of_losses_does_not_crowd_the_axis(highest: float, most: int) -> None:
    made = _drawing("t", "a", "x", [("pool", "loss kept", [(0.1, highest), (0.9, 0.5)])], wanted=0.9)
    assert 4 <= len(made.y_ticks) <= most and "0" in [label for _, label in made.y_ticks]
