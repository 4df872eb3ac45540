import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tamis.selection.top import best_rows

few_values = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 3.0])  # so that ties are common


@given(st.data(), st.integers(1, 40), st.integers(1, 4), st.integers(1, 12))
def test_best_rows_equal_a_full_sort_of_every_column(data, n, columns, block_values):
    values = data.draw(hnp.arrays(np.float32, (n, columns), elements=few_values))
    available = data.draw(hnp.arrays(bool, n))
    counts = data.draw(hnp.arrays(np.int64, columns, elements=st.integers(0, n + 2)))
    found = best_rows(values, available, counts, block_values=block_values)
    for column, (rows, count) in enumerate(zip(found, counts, strict=True)):
        free = [row for row in range(n) if available[row]]
        assert rows.tolist() == sorted(free, key=lambda row: (-values[row, column], row))[:count]


def test_memmap_gives_the_same_rows_as_memory(tmp_path):
    values = np.random.default_rng(0).standard_normal((500, 3)).astype(np.float32)
    on_disk = np.memmap(tmp_path / "values", np.float32, "w+", shape=values.shape)
    on_disk[:] = values
    counts = np.array([5, 50, 500])
    for a, b in zip(
        best_rows(on_disk, np.ones(500, bool), counts, block_values=100),
        best_rows(values, np.ones(500, bool), counts),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_equal_scores_go_to_the_lowest_rows_across_blocks():
    values = np.array([[1], [2], [1], [2], [1], [2], [2]], np.float32)
    (rows,) = best_rows(values, np.ones(7, bool), np.array([3]), block_values=2)
    assert rows.tolist() == [1, 3, 5]
