import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.errors import InvalidInput
from tamis.solve.landmarks import LANDMARK_RULES, kmeans_plus_plus, leverage_landmarks, uniform_landmarks

RULES = sorted(LANDMARK_RULES)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@given(st.sampled_from(RULES), st.integers(1, 25), st.integers(0, 1000), st.booleans())
def test_landmarks_are_different_rows_in_order_and_a_function_of_the_seed(
    rule: str, n: int, seed: int, copies: bool
) -> None:
    embeddings = torch.ones(n, 3) if copies else normal(seed, n, 3)
    for count in {1, n, (n + 1) // 2}:
        rows = LANDMARK_RULES[rule](embeddings, count, seed)
        assert rows.dtype == np.int64 and len(rows) == count
        assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < n
        assert rows.tolist() == LANDMARK_RULES[rule](embeddings.clone(), count, seed).tolist()


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_are_alike_are_equally_likely(rule: str) -> None:
    n, count, trials = 12, 3, 800
    embeddings = torch.eye(n, dtype=torch.float64)
    drawn = np.zeros(n)
    for seed in range(trials):
        drawn[LANDMARK_RULES[rule](embeddings, count, seed)] += 1
    deviation = (trials * (count / n) * (1 - count / n)) ** 0.5
    assert np.abs(drawn - trials * count / n).max() < 4.5 * deviation


def test_d2_sampling_finds_every_far_cluster() -> None:
    centres = torch.eye(5, dtype=torch.float64) * 1000
    labels = torch.arange(100) % 5
    embeddings = centres[labels] + 0.01 * normal(0, 100, 5)
    for seed in range(20):
        assert len({int(labels[row]) for row in kmeans_plus_plus(embeddings, 5, seed)}) == 5


def test_d2_sampling_follows_its_probabilities() -> None:
    # After the first row (uniform of 4 on a line), the next is drawn by squared distance.
    points = torch.tensor([[0.0], [1.0], [2.0], [4.0]], dtype=torch.float64)
    expected = np.zeros((4, 4))
    for first in range(4):
        squares = ((points[:, 0] - points[first, 0]) ** 2).numpy()
        for second in range(4):
            low, high = sorted((first, second))
            expected[low, high] += squares[second] / squares.sum() / 4
    trials, found = 1500, np.zeros((4, 4))
    for seed in range(trials):
        low, high = kmeans_plus_plus(points, 2, seed)
        found[low, high] += 1
    pairs = expected > 0
    deviation = np.sqrt(trials * expected[pairs] * (1 - expected[pairs]))
    assert (np.abs(found[pairs] - trials * expected[pairs]) < 4.5 * deviation).all()


def test_copies_are_taken_only_when_nothing_else_is_left() -> None:
    points = torch.cat([torch.ones(30, 4), torch.eye(4) * 3]).float()
    for seed in range(20):
        rows = kmeans_plus_plus(points, 5, seed)
        assert set(range(30, 34)) < set(rows.tolist()) and len(kmeans_plus_plus(points, 7, seed)) == 7


def test_a_row_with_a_direction_of_its_own_has_the_highest_leverage() -> None:
    embeddings = normal(0, 200, 1) @ normal(1, 1, 6) + 0.01 * normal(2, 200, 6)
    lonely = torch.zeros(6, dtype=torch.float64)
    lonely[0] = 3.0
    embeddings[77] = lonely - (lonely @ embeddings[0]) / embeddings[0].square().sum() * embeddings[0]
    drawn = [77 in leverage_landmarks(embeddings, 3, seed) for seed in range(200)]
    # Leverages: 77 near 1, the other 199 share near 2; in 3 draws without replacement it is in with about 3/4.
    assert np.mean(drawn) > 0.55
    assert np.mean([77 in uniform_landmarks(200, 3, seed) for seed in range(200)]) < 0.1


def test_rows_of_zeros_come_last_in_leverage() -> None:
    embeddings = torch.zeros(10, 3)
    embeddings[4], embeddings[7] = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    for seed in range(10):
        assert leverage_landmarks(embeddings, 2, seed).tolist() == [4, 7]
        assert len(leverage_landmarks(torch.zeros(10, 3), 4, seed)) == 4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [0, 6])
def test_impossible_counts_are_refused(rule: str, count: int) -> None:
    with pytest.raises(InvalidInput, match=f"between 1 and the 5 rows of the pool, got {count}"):
        LANDMARK_RULES[rule](torch.eye(5), count, 0)
