"""The linear datamodelling score is SciPy's rank correlation of added scores with the fall of the loss."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tamis.comparison.datamodel import foretell


def parts_of(rows: int, count: int, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [np.sort(draw.choice(rows, size=rows // 2, replace=False)) for _ in range(count)]


def test_it_is_spearmans_correlation_with_the_gain() -> None:
    draw = np.random.default_rng(1)
    score, losses, parts = draw.normal(size=30), draw.normal(size=12), parts_of(30, 12)
    found = foretell("m", score, parts, losses.tolist())
    wanted = stats.spearmanr([score[rows].sum() for rows in parts], -losses).statistic
    assert found.correlation == pytest.approx(float(wanted), rel=1e-12)
    assert found.low is not None and found.high is not None and found.low <= found.high


def test_true_effects_foretell_everything_and_their_opposite_the_reverse() -> None:
    effect = np.random.default_rng(2).normal(size=20)
    parts = parts_of(20, 15)
    losses = [3.0 - float(effect[rows].sum()) for rows in parts]
    assert foretell("m", effect, parts, losses).correlation == pytest.approx(1.0)
    assert foretell("m", -effect, parts, losses).correlation == pytest.approx(-1.0)


@pytest.mark.parametrize("score", [np.zeros(10), np.where(np.arange(10) == 3, np.nan, 1.0)])
def test_scores_that_say_nothing_of_some_rows_or_the_same_of_all_have_none(score: np.ndarray) -> None:
    found = foretell("m", score, parts_of(10, 6), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert found.correlation is None and found.low is None and found.parts == 6


def test_no_interval_is_given_below_eight_parts() -> None:
    draw = np.random.default_rng(3)
    score, losses, parts = draw.normal(size=30), draw.normal(size=8).tolist(), parts_of(30, 8)
    seven, eight = (foretell("m", score, parts[:count], losses[:count]) for count in (7, 8))
    assert seven.correlation is not None and (seven.low, seven.high, seven.parts) == (None, None, 7)
    assert eight.low is not None and eight.high is not None and eight.low < eight.high
