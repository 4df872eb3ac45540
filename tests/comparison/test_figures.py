"""The bars of the page's first figure reach from the gain to the end of its interval."""

from __future__ import annotations

import numpy as np
import pytest

from comparison_runs import contender, made_run
from tamis.comparison.verdict import Difference, compare_pairs
from tamis.report.comparison_figures import gain_figure


def differences(seeds: int) -> list[Difference]:
    contenders = [contender("tracin", "selected"), contender("less", "selected"), contender("full", "full")]
    draw = np.random.default_rng(0)
    runs = {
        (one.name, "5%"): [made_run(one.name, seed, draw.normal(3 + place, 0.1, 6).tolist()) for seed in range(seeds)]
        for place, one in enumerate(contenders)
    }
    found = compare_pairs(runs, contenders, budget="5%", metric="loss", content_of=np.arange(6))
    return [difference for difference in found if difference.against == "full at equal cost"]


def test_the_bars_of_the_gain_reach_to_the_end_of_its_interval() -> None:
    shown = differences(4)
    (points,) = gain_figure(shown, "loss").spec["data"]
    assert list(points["x"]) == [d.gain for d in shown] and len(shown) == 2
    for reach, d in zip(points["error_x"]["array"], shown, strict=True):
        assert d.over_seeds.low is not None and d.over_seeds.high is not None
        assert reach == pytest.approx(d.over_seeds.high - d.gain) == pytest.approx(d.gain - d.over_seeds.low)
        assert reach < d.gain < d.over_seeds.high, "else the two ends could be taken for each other"


def test_a_single_seed_has_no_bar() -> None:
    (points,) = gain_figure(differences(1), "loss").spec["data"]
    assert list(points["error_x"]["array"]) == [0.0, 0.0]
