from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from tamis.errors import InvalidInput, InvalidSettings, NonFinite
from tamis.solve import nnls
from tamis.solve.nnls import solve_nnls, solve_ridge
from tamis.solve.solution import Status


def problem(seed: int, n: int, *, rank: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, rank or n + 3))
    y = rng.normal(size=x.shape[1])
    return x, y, x @ x.T, x @ y


def by_enumeration(gram: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The optimum over every possible set of positive weights: slow and certain."""
    best, best_value = np.zeros(len(b)), 0.0
    for size in range(1, len(b) + 1):
        for inside in combinations(range(len(b)), size):
            w = np.zeros(len(b))
            w[list(inside)] = np.linalg.solve(gram[np.ix_(inside, inside)], b[list(inside)])
            value = w @ gram @ w - 2 * b @ w
            if (w >= 0).all() and value < best_value:
                best, best_value = w, value
    return best


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n", [1, 2, 8, 40])
def test_weights_are_those_of_scipy(seed: int, n: int) -> None:
    x, y, gram, b = problem(seed, n)
    expected, _ = optimize.nnls(x.T, y)
    solution = solve_nnls(gram, b)
    assert solution.status is Status.OPTIMAL
    np.testing.assert_allclose(solution.value, expected, rtol=1e-8, atol=1e-10)  # Gram form squares the condition


@pytest.mark.parametrize("seed", range(10))
def test_weights_are_the_best_of_all_active_sets(seed: int) -> None:
    _, _, gram, b = problem(seed, 6)
    np.testing.assert_allclose(solve_nnls(gram, b).value, by_enumeration(gram, b), rtol=1e-9, atol=1e-12)


@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 24), rank=st.integers(1, 30), ridge=st.sampled_from([1e-6, 0.1, 5.0])
)
def test_conditions_of_the_optimum_hold(seed: int, n: int, rank: int, ridge: float) -> None:
    _, _, gram, b = problem(seed, n, rank=rank)
    ridge *= np.diag(gram).mean()
    solution = solve_nnls(gram, b, ridge=ridge)
    slope = gram @ solution.value + ridge * solution.value - b
    scale = np.abs(b).max()
    assert solution.status is Status.OPTIMAL
    assert (solution.value >= 0).all()
    assert slope.min() >= -1e-8 * scale
    assert np.abs(slope[solution.value > 0]).max(initial=0) <= 1e-8 * scale
    assert float(solution.stats["residual"]) <= 1e-8


@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), factor=st.floats(1e-6, 1e6))
def test_weights_are_linear_in_the_target(seed: int, n: int, factor: float) -> None:
    _, _, gram, b = problem(seed, n)
    np.testing.assert_allclose(
        solve_nnls(gram, factor * b).value, factor * solve_nnls(gram, b).value, rtol=1e-7, atol=1e-9 * factor
    )


@given(seed=st.integers(0, 10**6), n=st.integers(2, 12))
def test_order_of_candidates_does_not_matter(seed: int, n: int) -> None:
    _, _, gram, b = problem(seed, n)
    order = np.random.default_rng(seed).permutation(n)
    shuffled = solve_nnls(gram[np.ix_(order, order)], b[order]).value
    np.testing.assert_allclose(shuffled, solve_nnls(gram, b).value[order], rtol=1e-7, atol=1e-9)


def test_hand_computed_case() -> None:
    # G = [[2, 1], [1, 2]]: b = (3, 3) gives (1, 1); b = (1, -1) leaves the second at zero and the first at 1/2.
    gram = np.array([[2.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(solve_nnls(gram, [3, 3]).value, [1, 1])
    np.testing.assert_allclose(solve_nnls(gram, [1, -1]).value, [0.5, 0])
    np.testing.assert_allclose(solve_ridge(gram, [1, -1]).value, [1, -1])
    np.testing.assert_allclose(solve_nnls(gram, [1, -1], ridge=2.0).value, [0.25, 0])


def test_targets_pointing_away_give_zero_weights() -> None:
    _, _, gram, _ = problem(0, 5)
    np.testing.assert_array_equal(solve_nnls(gram, -np.ones(5)).value, np.zeros(5))


def test_no_candidate_is_no_problem() -> None:
    solution = solve_nnls(np.zeros((0, 0)), np.zeros(0))
    assert solution.status is Status.OPTIMAL
    assert solution.value.shape == (0,)


def test_exact_copies_without_ridge_are_reported_as_singular_and_with_ridge_share_the_weight() -> None:
    gram = np.ones((2, 2))
    solution = solve_nnls(gram, [1, 1])
    np.testing.assert_allclose(gram @ solution.value, [1, 1])
    np.testing.assert_allclose(solve_nnls(gram, [1, 1], ridge=0.5).value, [0.4, 0.4])
    assert solve_ridge(gram, [1, 1]).status is Status.SINGULAR
    assert "add a ridge" in Status.SINGULAR.value


def test_direction_without_curvature_is_reported() -> None:
    solution = solve_nnls(np.zeros((1, 1)), [1.0])
    assert solution.status is Status.SINGULAR


@given(seed=st.integers(0, 10**6), n=st.integers(1, 10))
def test_an_indefinite_matrix_ends_in_a_status_and_never_in_an_error(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    gram = rng.normal(size=(n, n))
    solution = solve_nnls(gram + gram.T, rng.normal(size=n))
    assert solution.status in Status
    assert np.isfinite(solution.value).all()


def test_a_set_that_becomes_unsolvable_on_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two columns fit, then the second would leave: the smaller set is refused, as rounding may do."""
    solve, calls = nnls._solve_on, []

    def refusing(matrix: np.ndarray, b: np.ndarray, inside: np.ndarray) -> np.ndarray | None:
        calls.append(inside.copy())
        return None if len(calls) == 3 else solve(matrix, b, inside)

    monkeypatch.setattr(nnls, "_solve_on", refusing)
    # Alone the first gets 1; with the second, which the target asks for more, it would be (3 - 4) / ... < 0.
    solution = solve_nnls([[4.0, 2.0], [2.0, 1.5]], [4.0, 3.5])
    assert [inside.tolist() for inside in calls] == [[True, False], [True, True], [False, True]]
    assert solution.status is Status.INDEFINITE
    assert "positive semi-definite" in solution.status.value
    assert solution.value.tolist() == [1.0, 0.0]


def test_an_asymmetric_matrix_is_read_as_its_symmetric_part() -> None:
    np.testing.assert_allclose(solve_nnls([[2, 2], [0, 2]], [3, 3]).value, solve_nnls([[2, 1], [1, 2]], [3, 3]).value)


def test_bad_input_is_refused_with_its_reason() -> None:
    with pytest.raises(InvalidInput, match=r"expected a Gram matrix \(n, n\)"):
        solve_nnls(np.eye(2), np.ones(3))
    with pytest.raises(NonFinite, match="NaN or infinity"):
        solve_nnls(np.eye(2), [1, np.nan])
    with pytest.raises(InvalidSettings, match="ridge must be 0 or more, got -1"):
        solve_nnls(np.eye(2), np.ones(2), ridge=-1.0)
