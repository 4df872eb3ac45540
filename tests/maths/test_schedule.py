"""The line up and the line down."""

from __future__ import annotations

import pytest

from tamis.maths.schedule import linear_rate


def test_it_rises_to_the_peak_and_falls_as_evenly() -> None:
    assert [linear_rate(step, 6, 2) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("total", [1, 2, 7])
def test_no_update_has_a_rate_of_zero_and_one_has_the_peak(total: int) -> None:
    for rising in range(total + 1):
        rates = [linear_rate(step, total, rising) for step in range(total)]
        assert min(rates) > 0 and max(rates) == 1
