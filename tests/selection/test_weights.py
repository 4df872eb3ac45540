import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tamis.budget import parse_budget
from tamis.selection.choose import choose
from tamis.selection.weights import best_left_out, notes_of_weights, robust_weights
from tamis.solve.simplex_closed_form import weights_for_count
from tamis.types import TargetScores


def picked_by_hand(values, picked, column, left_out):
    return robust_weights(
        np.asarray(values, np.float32), np.asarray(picked), np.asarray(column), np.asarray(left_out, np.bool_)
    ).weights.tolist()


def test_weights_by_hand_are_margins_over_the_best_row_left_out() -> None:
    values = [[5.0], [3.0], [2.0], [1.0]]  # margins 3 and 1 over 2.0, scaled to sum 2
    assert picked_by_hand(values, [0, 1], [0, 0], [False, False, True, True]) == [1.5, 0.5]
    # Two takers, one bound each: rows 0 and 1 for the first, row 2 for the second.
    values = [[5.0, 0.0], [3.0, 9.0], [9.0, 4.0], [2.0, 1.0]]
    assert picked_by_hand(values, [0, 2, 1], [0, 1, 0], [False, False, False, True]) == [1.5, 1.0, 0.5]


def test_ties_and_nothing_left_out_give_no_row_the_weight_zero() -> None:
    values = [[2.0], [2.0], [2.0]]
    assert picked_by_hand(values, [1, 0], [0, 0], [False, False, True]) == [1.0, 1.0]
    all_taken = picked_by_hand([[3.0], [1.0], [2.0]], [0, 2, 1], [0, 0, 0], [False] * 3)
    assert all_taken == pytest.approx([4 / 3, 1.0, 2 / 3])


def test_a_last_pick_that_ties_with_the_best_row_left_out_is_the_limit_of_one_that_does_not() -> None:
    def weights(left_out: float) -> list[float]:
        return picked_by_hand([[5.0], [3.0], [2.0], [left_out], [1.0]], [0, 1, 2], [0] * 3, [False] * 3 + [True] * 2)

    assert weights(1.9999) == pytest.approx([2.25, 0.75, 0.0], abs=1e-3)
    tied = weights(2.0)
    assert tied == pytest.approx([2.25, 0.75, 0.0], abs=1e-5) and tied[2] > 0
    assert tied == pytest.approx(weights(1.99999), abs=1e-4)
    assert sum(tied) == pytest.approx(3)


def test_notes_give_lambda_its_interval_and_ties_of_each_target() -> None:
    # Target maths: row 0 picks 0 and 1 over 2.0 (margins 3 and 1, sum 4, over 4 rows: 1; less the last one's: 0.5).
    # Target code: row 1 picks row 2, and row 3 is as good: a tie. Target more picks nothing.
    values = np.array([[5.0, 0.0, 0], [3.0, 1.0, 0], [1.0, 4.0, 0], [2.0, 4.0, 0]], np.float32)
    left_out = np.array([False, False, False, True])
    found = robust_weights(values, np.array([0, 2, 1]), np.array([0, 1, 0]), left_out)
    assert found.lambdas[0] == pytest.approx(1.0) and found.intervals[0] == pytest.approx([0.5, 1.0])
    assert found.ties.tolist() == [0, 1]
    maths, code = notes_of_weights(found, np.array([0, 1, 2]), ("maths", "code", "more"))
    assert maths.startswith("Robust weights for target maths: lambda 1 (of equation 7") and maths.endswith(
        "as any above 0.5 does"
    )
    assert "target code" in code and "1 pick ties with the best row left out" in code
    both, *rest = notes_of_weights(found, np.array([0, 0, 0]), ("maths", "code"))
    assert "target maths (by 2 target rows): lambda" in both and not rest


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(4, 30), st.just(1)), elements=st.floats(-5, 5, width=16)),
    st.integers(1, 29),
)
def test_one_taker_of_the_best_rows_gets_the_solution_of_the_whole_problem(values: np.ndarray, count: int) -> None:
    count = min(count, len(values) - 1)
    order = np.argsort(-values[:, 0], kind="stable")
    picked, left_out = order[:count], np.ones(len(values), np.bool_)
    left_out[picked] = False
    found = robust_weights(values, picked, np.zeros(count, np.int64), left_out, block_values=3)
    weights = found.weights
    assert weights.sum() == pytest.approx(count, rel=1e-4)
    assert (weights >= 0).all()
    if values[order[count], 0] < values[order[count - 1], 0]:  # no tie at the end
        solved = weights_for_count(values[:, 0], count)
        whole = solved.value
        assert found.lambdas[0] == pytest.approx(float(solved.stats["lambda"]), rel=1e-4)
        np.testing.assert_allclose(weights, whole[picked] * (count / len(values)), rtol=1e-4, atol=1e-6)
        assert (weights > 0).all()


@given(hnp.arrays(np.float32, (7, 3), elements=st.floats(-5, 5, width=16)), hnp.arrays(np.bool_, 7))
def test_the_best_row_left_out_is_found_whatever_the_blocks(values: np.ndarray, left_out: np.ndarray) -> None:
    wanted = values[left_out].max(axis=0, initial=-np.inf)
    np.testing.assert_array_equal(best_left_out(values, left_out, block_values=4), wanted)


def scores(values, **more):
    values = np.asarray(values, np.float32)
    return TargetScores(
        rows=np.arange(len(values)),
        values=values,
        group=np.zeros(values.shape[1], np.int64),
        target_names=("maths",),
        **more,
    )


@pytest.mark.parametrize("aggregate", ["mean", "round-robin"])
def test_a_choice_weighs_its_rows_when_the_scores_ask_for_it(aggregate: str) -> None:
    values = [[5.0], [3.0], [2.0], [4.0], [9.0]]
    settings = {
        "budget": parse_budget(2),
        "tokens": np.full(5, 10),
        "aggregate": aggregate,
        "first_of": np.array([0, 1, 2, 0, 4]),  # row 3 is a copy of row 0: no rejected row
        "eligible": np.array([True, True, True, True, False]),  # nor is the last one
    }
    plain = choose(scores(values), **settings)
    weighted = choose(scores(values, weights="first-order"), **settings)
    np.testing.assert_array_equal(weighted.order, plain.order)
    assert plain.example_weights.tolist() == [1, 1, 0, 0, 0]
    assert weighted.example_weights.tolist() == [1.5, 0.5, 0, 0, 0]
    assert not plain.notes and "target maths: lambda 1.33 (" in weighted.notes[0]
