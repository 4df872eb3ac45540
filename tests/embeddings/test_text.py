"""TF-IDF against its formula word by word, and the projection against what it promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamis.embeddings import TfIdf
from tamis.embeddings.text import word_buckets
from tamis.errors import InvalidSettings

texts = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "dog"]), max_size=9).map(" ".join)


def slow_cosine(pool, x, y):
    """The formula of the module, with dicts of words."""

    def weights(text):
        split = text.split()
        return {
            word: split.count(word) * (math.log((1 + len(pool)) / (1 + sum(word in t.split() for t in pool))) + 1)
            for word in set(split)
        }

    a, b = weights(x), weights(y)
    length = math.sqrt(sum(v**2 for v in a.values()) * sum(v**2 for v in b.values()))
    return sum(value * b.get(word, 0.0) for word, value in a.items()) / length if length else 0.0


@settings(max_examples=20)
@given(st.lists(texts, min_size=1, max_size=6), st.lists(texts, min_size=1, max_size=3))
def test_weights_follow_the_formula(pool, target):
    embedder = TfIdf().fit(iter(pool))
    found = (embedder.vectors(target) @ embedder.vectors(pool).T).toarray()
    for i, x in enumerate(target):
        for j, y in enumerate(pool):
            assert found[i, j] == pytest.approx(slow_cosine(pool, x, y), abs=1e-12)


def test_words_are_those_of_bm25():
    assert word_buckets("Don't stop — DON'T!") == word_buckets("don t stop don t")
    assert len(word_buckets("你好")) == 2 and not word_buckets("?! …")


def test_projection_keeps_inner_products_on_average():
    x, y = "the cat sat on the mat", "a cat and a dog sat on one mat"
    exact = None
    draws = []
    for seed in range(60):
        embedder = TfIdf(dim=64, seed=seed).fit([x, y])
        exact = float((embedder.vectors([x]) @ embedder.vectors([y]).T).toarray()[0, 0])
        one, other = embedder.embed([x, y]).double()
        # Rows are scaled to length 1 after the projection, whose own length varies: by 1 / dim on average.
        draws.append(float(one @ other))
    found = torch.tensor(draws)
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / len(draws) ** 0.5 + 1 / 64


def test_words_in_common_bring_texts_together_and_order_changes_nothing():
    embedder = TfIdf().fit(["solve the equation for x", "the weather in spring", "a poem on spring"])
    found = embedder.embed(["solve the equation", "equation the solve", "a poem on spring", ""])
    assert found.shape == (4, 1024) and found.dtype == torch.float32
    assert torch.equal(found[0], found[1])
    assert abs(float(found[0] @ found[2])) < 4 * (1 / 1024) ** 0.5  # no word in common: noise of the projection
    torch.testing.assert_close(found[:3].norm(dim=1), torch.ones(3))
    assert not found[3].any()


@settings(max_examples=10)
@given(st.lists(texts, min_size=1, max_size=6))
def test_a_text_does_not_know_its_batch_mates(pool):
    embedder = TfIdf(dim=64).fit(pool)
    whole = embedder.embed(pool)
    for i, text in enumerate(pool):
        assert torch.equal(embedder.embed([text])[0], whole[i])


def test_identity_and_result_depend_on_dim_and_seed():
    pool = ["one two three", "two three four"]
    plain = TfIdf().fit(pool).embed(pool)
    assert torch.equal(TfIdf().fit(pool).embed(pool), plain)
    assert not torch.equal(TfIdf(seed=1).fit(pool).embed(pool), plain)
    identities = [str(TfIdf(**fields).identity) for fields in ({}, {"seed": 1}, {"dim": 64})]
    assert len(set(identities)) == 3


@pytest.mark.parametrize("dim", [0, 4, 100, 1 << 16])
def test_dimensions_that_do_not_divide_are_refused(dim):
    with pytest.raises(InvalidSettings, match=f"dim must be a multiple of 8, from 8 to 32768, got {dim}"):
        TfIdf(dim=dim)
