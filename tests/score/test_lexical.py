import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tamis.score.lexical as lexical
from fake_task import FakeCorpus, FakeTask, random_tokens
from tamis.errors import InvalidSettings
from tamis.score.lexical import Bm25, WordIndex

texts = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "dog", "the"]), max_size=9).map(" ".join)


def slow_bm25(documents, query, k1, b):
    """The formula of the docstring, word by word."""
    split = [document.split() for document in documents]
    mean_length = sum(len(d) for d in split) / len(split) or 1.0
    scores = []
    for document in split:
        total = 0.0
        for word in query.split():
            with_word = sum(word in d for d in split)
            idf = math.log(1 + (len(split) - with_word + 0.5) / (with_word + 0.5))
            f = document.count(word)
            denominator = f + k1 * (1 - b + b * len(document) / mean_length)
            total += idf * f * (k1 + 1) / denominator if f else 0.0
        scores.append(total)
    return scores


def scores_of(documents, queries, k1=1.2, b=0.75):
    out = np.empty((len(documents), len(queries)), np.float32)
    return WordIndex(documents, queries).scores(k1=k1, b=b, out=out)


@given(
    st.lists(texts, min_size=1, max_size=8), st.lists(texts, min_size=1, max_size=5), st.floats(0, 3), st.floats(0, 1)
)
def test_scores_equal_the_formula(documents, queries, k1, b):
    expected = np.array([slow_bm25(documents, query, k1, b) for query in queries]).T
    np.testing.assert_allclose(scores_of(documents, queries, k1, b), expected, rtol=1e-6, atol=1e-9)  # float32 output


def test_blocks_of_rows_and_columns_do_not_matter(monkeypatch):
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(30)]
    documents = [" ".join(rng.choice(vocabulary, rng.integers(0, 20))) for _ in range(50)]
    whole = scores_of(documents, documents[:13])
    monkeypatch.setattr(lexical, "_DENSE_NUMBERS", 70)
    monkeypatch.setattr(lexical, "_BLOCK_ROWS", 7)
    np.testing.assert_array_equal(scores_of(documents, documents[:13]), whole)


@given(st.lists(texts, min_size=1, max_size=6), st.randoms())
def test_order_of_words_does_not_matter_to_the_last_bit(documents, random):
    shuffled = []
    for document in documents:
        parts = document.split()
        random.shuffle(parts)
        shuffled.append(" ".join(parts))
    np.testing.assert_array_equal(scores_of(shuffled, documents), scores_of(documents, documents))


def test_rare_words_count_more_and_absent_words_nothing():
    scores = scores_of(["alpha common", "beta common", "gamma common"], ["alpha", "common", "delta"])
    assert scores[0, 0] > scores[0, 1] > 0
    assert scores[1, 0] == 0
    np.testing.assert_array_equal(scores[:, 2], 0)


def test_by_hand():
    # N = 2, "x" in one document: ln(1 + 1.5 / 1.5) = ln 2. L = 2 of mean 1.5, f = 2: 2 * 2 / (2 + 0.5 + 0.5 * 2 / 1.5).
    scores = scores_of(["x x", "y"], ["x"], k1=1, b=0.5)
    np.testing.assert_allclose(scores[0, 0], math.log(2) * 4 / (2 + 0.5 + 2 / 3), rtol=1e-6)


def test_scores_have_one_column_per_target_row_and_stream_the_pool(tmp_path):
    pool = FakeCorpus("pool", random_tokens([4] * 4), ["red fish", "blue bird", "red bird", "unused"])
    target = FakeCorpus("target", random_tokens([4] * 3), ["a red one", "no", "BIRD!"])
    task = FakeTask(
        pool=pool,
        target=target,
        store=tmp_path,
        rows=np.array([0, 1, 2]),
        target_rows=np.array([0, 2]),
        target_group=np.array([0, 1]),
        target_names=("colour", "animal"),
    )
    scores = Bm25().score(task)
    assert scores.values.shape == (3, 2)
    assert scores.group.tolist() == [0, 1]
    assert (scores.values > 0).tolist() == [[True, False], [False, True], [True, True]]
    np.testing.assert_allclose(scores.values, scores_of(["red fish", "blue bird", "red bird"], ["a red one", "bird"]))


def test_pool_without_any_word_scores_nothing():
    np.testing.assert_array_equal(scores_of(["", "..."], ["word"]), [[0], [0]])
    np.testing.assert_array_equal(scores_of(["word"], ["", "?"]), [[0, 0]])


def test_impossible_settings_are_refused():
    with pytest.raises(InvalidSettings, match="k1 must be at least 0, got -1"):
        Bm25(k1=-1)
    with pytest.raises(InvalidSettings, match=r"b must be between 0 and 1, got 1\.5"):
        Bm25(b=1.5)
