import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.errors import InvalidInput
from tamis.solve.greedy import greedy_residual, top


def in_gradient_space(x: np.ndarray, y: np.ndarray, count: int) -> list[int]:
    """Algorithm 1 as printed: a residual vector, and an argmax over those left."""
    residual, chosen = y.copy(), list[int]()
    for _ in range(count):
        rest = [i for i in range(len(x)) if i not in chosen]
        best = max(rest, key=lambda i: (x[i] @ residual, -i))
        chosen.append(best)
        residual = residual - x[best]
    return chosen


@given(seed=st.integers(0, 10**6), n=st.integers(1, 15), scale=st.floats(0.1, 100))
def test_gram_form_chooses_what_the_residual_vector_chooses(seed: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 7)), scale * rng.normal(size=7)
    count = int(rng.integers(0, n + 1))
    assert greedy_residual(x @ x.T, x @ y, count=count).tolist() == in_gradient_space(x, y, count)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 15))
def test_without_interactions_it_is_the_top(seed: int, n: int) -> None:
    scores = np.random.default_rng(seed).normal(size=n)
    assert greedy_residual(np.zeros((n, n)), scores, count=n).tolist() == top(scores, count=n).tolist()


def test_a_copy_waits_until_others_are_as_good() -> None:
    # Two copies of the best gradient (1, 0) and one of (0, 1); the target is (1.5, 1).
    x, y = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), np.array([1.5, 1.0])
    assert greedy_residual(x @ x.T, x @ y, count=3).tolist() == [0, 2, 1]
    assert top(x @ y, count=2).tolist() == [0, 1]


def test_ties_go_to_the_lowest_index() -> None:
    assert greedy_residual(np.eye(4), np.ones(4), count=4).tolist() == [0, 1, 2, 3]
    assert top(np.ones(4), count=2).tolist() == [0, 1]


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(InvalidInput, match="cannot choose 3 of 2"):
        greedy_residual(np.eye(2), np.ones(2), count=3)
    with pytest.raises(InvalidInput, match="cannot choose 3 of 2"):
        top(np.ones(2), count=3)
