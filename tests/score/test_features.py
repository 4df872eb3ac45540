from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tamis.score.features import RowScores, add_scores


def row_scores(seed: int, *, zero: tuple[int, ...] = (), zero_target: tuple[int, ...] = ()) -> RowScores:
    random = np.random.default_rng(seed)
    return RowScores(
        values=random.standard_normal((4, 3), dtype=np.float32),
        loss=random.standard_normal(4, dtype=np.float32),
        grad_norm=random.standard_normal(4, dtype=np.float32),
        is_zero=np.isin(np.arange(4), zero),
        is_zero_target=np.isin(np.arange(3), zero_target),
    )


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5))
def test_adding_scores_sums_them_with_their_weights(weights: list[float]) -> None:
    total = None
    for seed, weight in enumerate(weights):
        total = add_scores(total, row_scores(seed), weight=weight)
    assert total is not None
    wanted = sum(weight * row_scores(seed).values.astype(np.float64) for seed, weight in enumerate(weights))
    # Float32 sums of at most five terms: a few units in the last place of the largest term.
    np.testing.assert_allclose(total.values, wanted, rtol=1e-6, atol=1e-5)


def test_loss_and_norm_are_the_first_s_and_a_row_lacks_a_gradient_if_it_lacks_it_everywhere() -> None:
    first = row_scores(0, zero=(1, 2), zero_target=(0,))
    total = add_scores(None, first, weight=0.5)
    total = add_scores(total, row_scores(1, zero=(2, 3), zero_target=(1,)), weight=0.5)
    np.testing.assert_array_equal(total.loss, row_scores(0).loss)
    np.testing.assert_array_equal(total.grad_norm, row_scores(0).grad_norm)
    assert total.is_zero.tolist() == [False, False, True, False]
    assert not total.is_zero_target.any()


def test_adding_scores_takes_no_new_memory() -> None:
    first = row_scores(0)
    total = add_scores(add_scores(None, first, weight=2.0), row_scores(1), weight=1.0)
    assert total.values is first.values
