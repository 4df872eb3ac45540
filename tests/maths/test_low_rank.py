"""Matrices cut to a rank, against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from tamis.maths.low_rank import LowRank, cut_to_rank, cutting_pays


def matrix_with(values: torch.Tensor, outs: int, ins: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in (outs, ins)
    )
    return left @ torch.diag(values) @ right.T


@pytest.mark.parametrize(("outs", "ins"), [(40, 90), (90, 40), (64, 64)])
def test_a_matrix_of_that_rank_stays_what_it_is(outs: int, ins: int) -> None:
    matrix = matrix_with(torch.tensor([3.0, 1.0, 1e-3, 1e-5], dtype=torch.float64), outs, ins, seed=1)
    cut = cut_to_rank(matrix, 4, seed=0)
    assert cut.left.shape == (outs, 4)
    assert cut.right.shape == (ins, 4)
    torch.testing.assert_close(cut.whole(), matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("outs", "ins"), [(60, 100), (100, 60)])
def test_nearly_as_much_is_kept_as_by_singular_vectors(outs: int, ins: int, seed: int) -> None:
    values = torch.arange(1, 61, dtype=torch.float64) ** -1.0  # a slow decay, as of gradients
    matrix = matrix_with(values, outs, ins, seed=seed)
    cut = cut_to_rank(matrix, 8, seed=seed)
    left_out = matrix - cut.whole()
    best = values[8:].square().sum()
    assert best <= left_out.square().sum() <= 1.35 * best
    # What is left out is orthogonal to what is kept.
    kept = cut.whole().square().sum()
    torch.testing.assert_close(kept + left_out.square().sum(), matrix.square().sum(), rtol=1e-12, atol=0)


def test_float32_is_as_good_and_a_seed_decides() -> None:
    matrix = matrix_with(torch.arange(1, 61, dtype=torch.float64) ** -1.0, 60, 100, seed=3)
    once, again = (cut_to_rank(matrix.float(), 8, seed=5) for _ in range(2))
    assert once.left.dtype == torch.float32
    assert torch.equal(once.whole(), again.whole())
    exact = cut_to_rank(matrix, 8, seed=5).whole()
    tiny = cut_to_rank(1e-22 * matrix.float(), 8, seed=5).whole()
    torch.testing.assert_close(1e22 * tiny.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(once.whole().double(), exact, rtol=0, atol=1e-5)
    assert not torch.allclose(cut_to_rank(matrix, 8, seed=6).whole(), exact, atol=1e-4)


def test_nothing_and_what_is_not_finite() -> None:
    assert not cut_to_rank(torch.zeros(30, 50), 3, seed=0).whole().any()
    broken = torch.ones(30, 50)
    broken[2, 3] = torch.nan
    assert torch.isnan(cut_to_rank(broken, 3, seed=0).whole()).any()  # not a finite number made of it


def test_rows_are_those_of_the_product() -> None:
    cut = LowRank(torch.arange(6.0).view(3, 2), torch.arange(8.0).view(4, 2))
    ids = torch.tensor([[0, 2], [2, 1]])
    torch.testing.assert_close(cut.rows(ids), cut.whole()[ids])


def test_cutting_pays_where_it_halves_the_products() -> None:
    assert cutting_pays((64, 64), 16)
    assert not cutting_pays((64, 64), 17)
    assert not cutting_pays((8, 4096), 8)  # an adapter's matrix
    assert not cutting_pays((4096, 1), 1)  # a norm's weights
    assert cutting_pays((49152, 576), 64)
