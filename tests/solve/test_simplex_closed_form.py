import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solver_oracles import enumerated_weights, kkt_violation, weights_at_lambda
from tamis.errors import InvalidInput, NonFinite
from tamis.solve.simplex_closed_form import lambda_interval, weights_for_count
from tamis.solve.solution import Status

COSINES = np.cos(np.arange(8.0))

# float32 values: shares of them do not underflow in float64.
numbers = st.integers(-5, 5) | st.floats(-100, 100, width=32)
scores = st.lists(numbers, min_size=1, max_size=30).map(lambda values: np.array(values, dtype=np.float64))


def gap(w: np.ndarray, p: np.ndarray, lam: float) -> float:
    """Relative certificate, written out."""
    gradient = lam * w - p
    scale = abs(p @ w) + lam * w @ w
    return float(gradient @ w - len(p) * gradient.min()) / scale if scale else 0.0


def test_published_intervals_and_weights() -> None:
    assert lambda_interval(COSINES, 3) == pytest.approx((0.056545722245, 0.136645702924), rel=1e-10)
    assert lambda_interval(COSINES, 1) == (0.0, pytest.approx(0.004978714169, rel=1e-9))
    assert lambda_interval(COSINES, 8) == (pytest.approx(1.17477425639, rel=1e-11), np.inf)
    expected = [3.364157703435, 0, 0, 0, 0, 0, 3.072676065173, 1.563166231393]
    np.testing.assert_allclose(weights_for_count(COSINES, 3).value, expected, rtol=0, atol=1e-12)
    expected = [2.18478518707, 1.265389798806, 0, 0, 0, 0.752109557996, 2.105125760371, 1.692589695757]
    np.testing.assert_allclose(weights_at_lambda(COSINES, 0.5), expected, rtol=0, atol=1e-12)


def test_hand_computed_case() -> None:
    # Two best of (4, 1, 3, 0): margins over 1 are 3 and 2, sum 5, so 4·3/5 and 4·2/5; λ = L_3 / 4 = 5/4.
    solution = weights_for_count(np.array([4.0, 1.0, 3.0, 0.0]), 2)
    np.testing.assert_allclose(solution.value, [2.4, 0, 1.6, 0], rtol=1e-15)
    assert solution.status is Status.OPTIMAL and str(solution.status).startswith("optimal")
    assert solution.stats["lambda"] == solution.stats["lambda_high"] == 1.25
    assert solution.stats["lambda_low"] == 0.25 and solution.stats["nonzero"] == 2


@given(scores)
def test_every_count_is_certified_and_exact_unless_rows_tie(p: np.ndarray) -> None:
    n = len(p)
    best_first = np.sort(p)[::-1]
    for k in range(1, n + 1):
        solution = weights_for_count(p, k)
        w, lam = solution.value, float(solution.stats["lambda"])
        assert w.sum() == pytest.approx(n, rel=1e-12) and w.min() >= 0
        assert gap(w, p, lam) <= 1e-11 and solution.stats["gap"] <= 1e-12
        tied = k < n and best_first[k - 1] == best_first[k]
        assert (solution.status is Status.TIED) == tied
        if tied:
            assert solution.stats["tied_rows"] == np.count_nonzero(p == best_first[k])
            assert solution.stats["lambda_low"] == pytest.approx(solution.stats["lambda_high"], rel=1e-12, abs=1e-300)
        else:
            assert solution.stats["nonzero"] == np.count_nonzero(w) == k
            assert w[p >= best_first[k - 1]].min() > 0  # the k positive weights are those of the k best rows


@given(scores, st.floats(1e-3, 1e3))
def test_weights_at_any_lambda_satisfy_the_optimality_conditions(p: np.ndarray, lam: float) -> None:
    assert kkt_violation(weights_at_lambda(p, lam), p, lam * np.eye(len(p))) <= 1e-11


@pytest.mark.parametrize("seed", range(8))
def test_weights_equal_the_best_over_all_supports(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.integers(-3, 3, 7) + (seed % 2) * rng.standard_normal(7)
    for lam in (0.01, 0.3, 5.0):
        expected = enumerated_weights(p, lam * np.eye(7))
        np.testing.assert_allclose(weights_at_lambda(p, lam), expected, rtol=0, atol=1e-9)


@given(scores)
def test_lambda_just_inside_and_outside_the_interval_leaves_k_and_not_k(p: np.ndarray) -> None:
    for k in range(1, len(p) + 1):
        low, high = lambda_interval(p, k)
        if high <= low * (1 + 1e-6) or high < 1e-6:
            continue
        inside = (low + high) / 2 if np.isfinite(high) else 2 * low + 1
        assert np.count_nonzero(weights_at_lambda(p, inside)) == k
        if low > 1e-6:
            assert np.count_nonzero(weights_at_lambda(p, low * (1 - 1e-6))) < k
        if np.isfinite(high):
            assert np.count_nonzero(weights_at_lambda(p, high * (1 + 1e-6))) > k


@given(scores)
def test_intervals_follow_each_other_from_zero_to_infinity(p: np.ndarray) -> None:
    intervals = [lambda_interval(p, k) for k in range(1, len(p) + 1)]
    assert intervals[0][0] == 0 and intervals[-1][1] == np.inf
    for (_, high), (low, _) in pairwise(intervals):
        assert high == pytest.approx(low, rel=1e-12, abs=1e-12)


@given(scores, st.integers(0, 2**32 - 1), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_order_shift_and_scale_of_scores_do_not_matter(p: np.ndarray, seed: int, shift: float, scale: float) -> None:
    k = 1 + seed % len(p)
    order = np.random.default_rng(seed).permutation(len(p))
    w = weights_at_lambda(p, 0.7)
    np.testing.assert_allclose(weights_at_lambda(p[order], 0.7), w[order], rtol=1e-9, atol=1e-9)
    # A shift costs p its digits below the shift's last one.
    np.testing.assert_allclose(weights_at_lambda(p + shift, 0.7), w, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(weights_at_lambda(p * scale, 0.7 * scale), w, rtol=1e-8, atol=1e-8)
    if weights_for_count(p, k).status is Status.OPTIMAL:
        for other in (weights_for_count(p[order], k).value, weights_for_count(p * 4.0, k).value[order]):
            np.testing.assert_allclose(other, weights_for_count(p, k).value[order], rtol=1e-12, atol=1e-12)


@given(scores)
def test_all_rows_get_weights_at_most_twice_each_other(p: np.ndarray) -> None:
    solution = weights_for_count(p, len(p))
    assert solution.value.max() <= 2 * solution.value.min() * (1 + 1e-12)
    assert solution.value.sum() == pytest.approx(len(p), rel=1e-12)
    at_lambda = weights_at_lambda(p, float(solution.stats["lambda"]))
    np.testing.assert_allclose(at_lambda, solution.value, rtol=1e-9)


def test_ties_through_the_budget_leave_equal_weights_on_the_first_rows() -> None:
    solution = weights_for_count(np.array([0.0, 2.0, -1.0, 2.0, 2.0]), 2)
    assert solution.value.tolist() == [0, 2.5, 0, 2.5, 0]
    assert solution.status is Status.TIED and solution.stats["tied_rows"] == 3 and solution.stats["lambda"] == 0
    assert solution.stats["gap"] == 0


def test_ties_at_the_budget_alone_leave_fewer_weights_and_say_so() -> None:
    # 5 is clearly in; one of three equal rows should be, but no λ tells them apart.
    p = np.array([1.0, 5.0, 1.0, 1.0, 0.0])
    solution = weights_for_count(p, 2)
    assert solution.value.tolist() == [0, 5, 0, 0, 0]
    assert solution.status is Status.TIED and solution.stats["nonzero"] == 1 and solution.stats["tied_rows"] == 3


def test_broken_ties_keep_the_first_rows_by_index() -> None:
    p = np.array([1.0, 5.0, 1.0, 1.0, 0.0])
    solution = weights_for_count(p, 3, break_ties=True)
    # Without row 3 the best rejected score is 0: margins 1, 5, 1.
    np.testing.assert_allclose(solution.value, np.array([1, 5, 1, 0, 0]) * 5 / 7, rtol=1e-15)
    assert solution.status is Status.TIES_BROKEN and solution.stats["nonzero"] == 3
    # Nothing below the tied rows: those that fit, weighed as if they were all.
    solution = weights_for_count(np.array([1.0, 3.0, 1.0]), 2, break_ties=True)
    np.testing.assert_allclose(solution.value, np.array([2, 4, 0]) * 3 / 6, rtol=1e-15)
    assert weights_for_count(np.array([4.0, 3.0, 1.0]), 2, break_ties=True).status is Status.OPTIMAL


@given(scores)
def test_with_ties_broken_every_count_is_reached(p: np.ndarray) -> None:
    for k in range(1, len(p) + 1):
        solution = weights_for_count(p, k, break_ties=True)
        assert np.count_nonzero(solution.value) == solution.stats["nonzero"] == k
        assert solution.value.sum() == pytest.approx(len(p), rel=1e-12) and solution.stats["gap"] <= 1e-12
        assert set(np.flatnonzero(solution.value)) == set(np.argsort(-p, kind="stable")[:k])


def test_float32_scores_with_a_large_common_part_keep_their_digits() -> None:
    p = np.array([1000.25, 1000.0, 1000.5, 999.0], dtype=np.float32)
    np.testing.assert_allclose(weights_for_count(p, 2).value, [4 / 3, 0, 8 / 3, 0], rtol=1e-15)


def test_subnormal_differences_neither_overflow_nor_vanish() -> None:
    p = np.array([5e-324, 0.0, 0.0])
    assert weights_for_count(p, 1).value.tolist() == [3, 0, 0]
    np.testing.assert_allclose(weights_for_count(p, 3).value, [1.5, 0.75, 0.75], rtol=1e-15)


def test_one_row_gets_the_whole_weight() -> None:
    assert weights_for_count(np.array([-7.0]), 1).value.tolist() == [1.0]
    assert weights_at_lambda(np.array([-7.0]), 3.0).tolist() == [1.0]


def test_memory_is_a_few_vectors() -> None:
    p = np.random.default_rng(0).standard_normal(200_000)
    tracemalloc.start()
    weights_for_count(p, 10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.5 * p.nbytes


@pytest.mark.parametrize(
    ("p", "k", "error", "sentence"),
    [
        ([], 1, InvalidInput, "no rows to weigh"),
        ([1.0, 2.0], 0, InvalidInput, "between 1 and the 2 rows of the pool, got 0"),
        ([1.0, 2.0], 3, InvalidInput, "between 1 and the 2 rows of the pool, got 3"),
        ([1.0, np.nan, np.inf], 1, NonFinite, "2 of 3 scores are NaN or infinite, the first in row 1"),
    ],
)
def test_what_cannot_be_weighed_is_refused(p: list[float], k: int, error: type[Exception], sentence: str) -> None:
    for function in (weights_for_count, lambda_interval):
        with pytest.raises(error, match=sentence):
            function(np.array(p, dtype=np.float64), k)
