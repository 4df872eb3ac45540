"""What a run did, from its candidates and its log: against counts by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tamis.online.account import fallback_share, forecast_correlation, read_account
from tamis.online.fate import CandidateLog
from tamis.online.methods.choice import Choice
from tamis.online.proposal import Proposal


def proposal(rows: list[int], weights: list[float], losses: list[float], *, cold: bool = False) -> Proposal:
    count = len(losses)
    return Proposal(
        gradient={"w": torch.zeros(1)}, divisor=1.0,
        choice=Choice(rows=np.array(rows, dtype=np.int64), weights=np.array(weights)),
        losses=np.array(losses), tokens=np.full(count, 4), alignments=None, dropped=np.zeros(0, dtype=np.int64),
        target_loss=None, target_gradient=None, cold=cold,
    )  # fmt: skip


def test_counts_are_those_of_the_choices(tmp_path: Path) -> None:
    log = CandidateLog(tmp_path, first_step=1)
    nan = float("nan")
    first = proposal([0, 2], [1.0, 1.0], [0.5, nan, 0.7], cold=True)
    log.add(first, step=1, choice=0, rows=np.array([7, 8, 9]), sources=["a", "b", "b"])
    log.flush()
    second = proposal([1], [2.0], [0.1, 0.2, 0.3])
    log.add(second, step=2, choice=1, rows=np.array([7, 9, 5]), sources=["a", "b", "c"])
    log.flush()
    account = read_account(tmp_path)
    assert (account.candidates, account.distinct_candidates) == (6, 4)
    assert (account.kept, account.distinct_rows) == (3, 2)  # row 9 twice
    assert account.share_by_source == {"b": 0.75, "a": 0.25, "c": 0.0}


def test_forecasts_are_correlated_where_there_are_three_pairs_with_a_spread() -> None:
    def entry(predicted: float | None, realised: float | None) -> dict[str, float | None]:
        return {"step": 1, "selection/predicted_drop": predicted, "selection/realised_drop": realised}

    straight = [entry(x, 3 * x + 1) for x in (1.0, 2.0, 4.0)]
    assert forecast_correlation([{"step": 0}, *straight]) == (pytest.approx(1.0), 3)
    assert forecast_correlation([*straight, entry(None, 1.0)])[1] == 3
    assert forecast_correlation(straight[:2]) == (None, 2)
    assert forecast_correlation([entry(1.0, x) for x in (1.0, 2.0, 3.0)]) == (None, 3)
    bent = forecast_correlation([entry(1, 1), entry(2, 3), entry(3, 2)])
    assert bent == (pytest.approx(0.5), 3)


def test_fallbacks_count_by_the_updates_that_an_entry_stands_for() -> None:
    log = [{"step": 0}, {"step": 4, "selection/fallback": 0.5}, {"step": 4, "eval_loss": 1.0}]
    assert fallback_share(log) == 0.5
    assert fallback_share([*log, {"step": 5, "selection/fallback": 0.0}]) == pytest.approx(2 / 5)
    assert fallback_share([{"step": 0}]) == 0.0
