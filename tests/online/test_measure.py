"""Forms of inner products that the reference case and the models of test_step do not reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from online_case import factors, matrix, moments, rows, target
from tamis.errors import Unsupported
from tamis.gradients.held import Factored
from tamis.gradients.rows import RowGradients
from tamis.online import measure
from tamis.online.measure import exact_interactions, measure_alignments, measure_lengths, sketched_interactions
from tamis.projection.factorized import FactorizedProjector

WHOLE = FactorizedProjector(dim=64, seed=0)  # wider than the case's sides: nothing is projected


@pytest.mark.parametrize("form", ["metric", "preconditioned"])
def test_sketches_carry_the_rank_one_form_of_the_means_of_second_moments(form: str) -> None:
    """``v ≈ mean over rows x mean over columns / mean``, and its root after that (specification, section 4)."""
    state = replace(moments()["layer.weight"], eps=1e-30)
    v = state.exp_avg_sq
    approximate = replace(state, exp_avg_sq=torch.outer(v.mean(dim=1), v.mean(dim=0)) / v.mean())
    got = sketched_interactions(form, rows(), {"layer.weight": state}, projector=WHOLE, gather=lambda x: x)
    expected = exact_interactions(form, rows(), {"layer.weight": approximate}, gather=lambda x: x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    # It matters: the mean of roots for the root of means is off by several per cent here.
    roots = replace(state, exp_avg_sq=(torch.outer(v.sqrt().mean(dim=1), v.sqrt().mean(dim=0)) / v.sqrt().mean()) ** 2)
    other = exact_interactions(form, rows(), {"layer.weight": roots}, gather=lambda x: x)
    assert float((other.trace() - expected.trace()).abs() / expected.trace()) > 0.02


def test_lengths_of_sketches_are_those_of_their_interactions() -> None:
    projector = FactorizedProjector(dim=1, seed=3)
    inside = torch.tensor([0.0, 1.5, 0.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    squares, total = measure_lengths(
        "metric", rows(passes=2), moments(), inside, gather=lambda x: x, add_up=lambda x: x, projector=projector
    )
    gram = sketched_interactions("metric", rows(), moments(), projector=projector, gather=lambda x: x)
    torch.testing.assert_close(squares, gram.diagonal(), rtol=1e-6, atol=0)
    assert total == pytest.approx(float(inside @ gram @ inside), rel=1e-6)


def test_lengths_form_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(features: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"pairs of {len(features)} rows")

    monkeypatch.setattr(measure, "_gram", refuse)
    measure_lengths("metric", rows(), moments(), torch.ones(6), gather=lambda x: x, add_up=lambda x: x)


def test_a_row_without_part_in_the_sum_may_be_anything() -> None:
    act, grad_out = factors(range(2))
    act[1] = float("nan")
    held = RowGradients([matrix()])
    held.add({"layer": Factored(act, grad_out, has_bias=False)}, 2)
    squares, total = measure_lengths(
        "raw", held, None, torch.tensor([1.0, 0.0]), gather=lambda x: x, add_up=lambda x: x
    )
    assert not torch.isfinite(squares[1])
    assert total == pytest.approx(float(squares[0]))


def test_blocks_are_cut_by_the_process_with_the_most_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has 60 rows: with room for 180 numbers, a block is one row of the matrix, here as there."""
    monkeypatch.setattr(measure, "_CHUNK", 180)
    widths = []

    def gathered(mine: torch.Tensor) -> torch.Tensor:
        if mine.shape == (1,):
            return torch.tensor([len(rows()), 60])
        widths.append(mine.shape[1])
        return mine

    exact_interactions("raw", rows(), None, gather=gathered)
    assert widths == [3, 3]


@pytest.mark.parametrize("form", ["secant", "cosine", "jacobian"])
def test_decay_that_is_part_of_the_gradient_has_no_own_step_of_a_candidate(form: str) -> None:
    coupled = {"layer.weight": replace(moments()["layer.weight"], decay=0.1, decay_is_coupled=True)}
    with pytest.raises(Unsupported, match=r"Adam with weight_decay=0.1.*use AdamW"):
        measure_alignments(form, rows(), target(), coupled, mean=target())
    plain = measure_alignments("adam", rows(), target(), coupled)
    torch.testing.assert_close(plain, measure_alignments("adam", rows(), target(), moments()))
