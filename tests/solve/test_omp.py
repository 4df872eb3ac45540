import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.errors import InvalidInput, InvalidSettings
from tamis.solve.omp import match_orthogonally


def in_gradient_space(x: np.ndarray, y: np.ndarray, count: int, ridge: float) -> tuple[list[int], np.ndarray]:
    """Algorithm 2 as printed: every trial's residual norm, with its weights from a regression."""
    chosen, weights = list[int](), np.zeros(0)
    for _ in range(count):
        errors = {}
        for u in (u for u in range(len(x)) if u not in chosen):
            part = x[[*chosen, u]]
            w = np.linalg.solve(part @ part.T + ridge * np.eye(len(part)), part @ y)
            errors[u] = float(np.sum((y - w @ part) ** 2) + ridge * np.sum(w**2)), w
        best = min(errors, key=lambda u: (errors[u][0], u))
        chosen.append(best)
        weights = errors[best][1]
    return chosen, weights


@given(seed=st.integers(0, 10**6), n=st.integers(1, 8))
def test_order_and_weights_are_those_of_the_algorithm_on_vectors(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 11)), rng.normal(size=11)
    chosen, solution = match_orthogonally(x @ x.T, x @ y, count=n, ridge=0.3)
    expected, weights = in_gradient_space(x, y, n, 0.3)
    assert chosen.tolist() == expected
    np.testing.assert_allclose(solution.value, weights, rtol=1e-8, atol=1e-10)


def test_one_round_takes_the_largest_squared_correlation() -> None:
    # One candidate: -b^2 / (G + ridge); the second wins by (-3)^2 / 2 although its sign is negative.
    chosen, solution = match_orthogonally(np.eye(3), [1.0, -3.0, 2.0], count=1, ridge=1.0)
    assert chosen.tolist() == [1]
    np.testing.assert_allclose(solution.value, [-1.5])


def test_nothing_asked_gives_nothing() -> None:
    chosen, solution = match_orthogonally(np.eye(3), np.ones(3), count=0, ridge=1.0)
    assert len(chosen) == len(solution.value) == 0


def test_bad_input_is_refused_with_its_reason() -> None:
    with pytest.raises(InvalidSettings, match="positive ridge, got 0"):
        match_orthogonally(np.eye(2), np.ones(2), count=1, ridge=0.0)
    with pytest.raises(InvalidInput, match="cannot choose 4 of 2"):
        match_orthogonally(np.eye(2), np.ones(2), count=4, ridge=1.0)
