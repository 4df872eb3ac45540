import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.seeds import (
    child_seed,
    random_normal,
    random_permutation,
    random_signs,
    random_subset,
    random_uniform,
    raw_words,
)

GOLDEN = {
    "seed": 74028962463534001537990895351672517945,
    "words": "a75b1a05fb85bfa0",
    "signs": "376e4b616ef5590b",
    "uniform": "2318ab6add063ab0",
    "permutation": "adcc104bedd71c23",
    "subset": "bd3b9e8bbf3992af",
    "large subset": "bdd0273a346b0394",
}

SEEDS = st.integers(0, 2**128 - 1)


def digest(array: np.ndarray) -> str:
    little = array.astype(array.dtype.newbyteorder("<"))
    return hashlib.sha256(np.ascontiguousarray(little).tobytes()).hexdigest()[:16]


def test_every_stream_is_the_one_of_the_first_release() -> None:
    # A change here makes every stored feature incomparable with new ones: it needs a new algorithm name instead.
    seed = child_seed(0, "golden", 1)
    assert seed == GOLDEN["seed"]
    assert digest(raw_words(seed, 1000)) == GOLDEN["words"]
    assert digest(random_signs(seed, 1000)) == GOLDEN["signs"]
    assert digest(random_uniform(seed, 1000)) == GOLDEN["uniform"]
    assert digest(random_permutation(seed, 1000)) == GOLDEN["permutation"]
    assert digest(random_subset(seed, 10**9, 1000)) == GOLDEN["subset"]
    assert digest(random_subset(seed, 1500, 1000)) == GOLDEN["large subset"]


def test_words_are_those_of_philox_as_defined_in_its_paper() -> None:
    # Known answer of Philox4x64-10 for counter 0 and key 0 (Salmon et al., 2011, and the vectors of Random123);
    # NumPy's generator steps its counter before the first block, so that its first block has counter 1.
    def philox(counter: list[int], key: list[int]) -> list[int]:
        mask = 2**64 - 1
        for _ in range(10):
            first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
            counter = [
                (second >> 64) ^ counter[1] ^ key[0],
                second & mask,
                (first >> 64) ^ counter[3] ^ key[1],
                first & mask,
            ]
            key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
        return counter

    assert philox([0, 0, 0, 0], [0, 0])[0] == 0x16554D9ECA36314C
    seed = child_seed(5, "x")
    key = [seed % 2**64, seed >> 64]
    expected = philox([1, 0, 0, 0], key) + philox([2, 0, 0, 0], key)
    assert raw_words(seed, 8).tolist() == expected


@given(SEEDS, st.integers(0, 500), st.integers(0, 500))
def test_a_longer_draw_starts_with_the_shorter_one(seed: int, short: int, more: int) -> None:
    assert np.array_equal(random_signs(seed, short + more)[:short], random_signs(seed, short))
    assert np.array_equal(random_uniform(seed, short + more)[:short], random_uniform(seed, short))


@given(SEEDS, st.integers(0, 400), st.floats(0, 1))
def test_a_subset_has_distinct_ascending_members(seed: int, population: int, share: float) -> None:
    count = int(population * share)
    chosen = random_subset(seed, population, count)
    assert chosen.dtype == np.int64 and len(chosen) == count
    assert np.all(np.diff(chosen) > 0)
    assert count == 0 or (chosen[0] >= 0 and chosen[-1] < population)


def test_a_subset_of_billions_takes_neither_time_nor_memory_for_billions() -> None:
    chosen = random_subset(3, 2**40, 10_000)
    assert len(np.unique(chosen)) == 10_000 and chosen.max() > 2**39


@pytest.mark.parametrize("count", [3, 8])
def test_every_index_is_equally_likely_in_a_subset(count: int) -> None:
    population, trials = 11, 4000
    hits = np.zeros(population)
    for trial in range(trials):
        hits[random_subset(child_seed(0, trial), population, count)] += 1
    share = count / population
    sd = (share * (1 - share) / trials) ** 0.5
    assert np.abs(hits / trials - share).max() < 4.5 * sd  # 11 indices: chance of a false alarm below 1e-4


@pytest.mark.parametrize(("population", "count"), [(3, 4), (3, -1)])
def test_an_impossible_subset_is_refused(population: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot take {count} distinct indices out of 3"):
        random_subset(0, population, count)


@given(SEEDS, st.integers(0, 300))
def test_a_permutation_has_every_index_once(seed: int, count: int) -> None:
    assert sorted(random_permutation(seed, count)) == list(range(count))


def test_signs_are_balanced_and_uncorrelated() -> None:
    signs = random_signs(child_seed(0, "balance"), 1_000_000).astype(np.float64)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4.5e-3  # 4.5 standard errors of 1e-3
    assert abs((signs[:-1] * signs[1:]).mean()) < 4.5e-3


def test_uniform_numbers_fill_the_unit_interval() -> None:
    numbers = random_uniform(child_seed(0, "uniform"), 1_000_000)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4.5 * (1 / 12) ** 0.5 * 1e-3


def test_child_seeds_depend_on_every_name_and_its_type() -> None:
    seeds = [
        child_seed(0), child_seed(1), child_seed(0, "a"), child_seed(0, "b"), child_seed(0, "a", "b"),
        child_seed(0, "ab"), child_seed(0, 1), child_seed(0, "1"), child_seed(0, "b", "a"),
    ]  # fmt: skip
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**128 for seed in seeds)


def test_another_process_draws_the_same() -> None:
    code = "from tamis.seeds import *; print(child_seed(7, 'x'), *random_signs(child_seed(7, 'x'), 40))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert other == [str(child_seed(7, "x")), *map(str, random_signs(child_seed(7, "x"), 40))]


@given(SEEDS, st.integers(0, 50))
def test_normal_numbers_are_those_of_box_and_muller(seed: int, count: int) -> None:
    pairs = (count + 1) // 2
    uniform = random_uniform(seed, 2 * pairs)
    expected = [
        math.sqrt(-2 * math.log(1 - uniform[i % pairs])) * turn(2 * math.pi * uniform[pairs + i % pairs])
        for i, turn in enumerate([math.cos] * pairs + [math.sin] * pairs)
    ]
    np.testing.assert_allclose(random_normal(seed, count), expected[:count], rtol=1e-12, atol=1e-12)


def test_normal_numbers_have_the_moments_of_a_standard_normal() -> None:
    numbers = random_normal(child_seed(0, "normal"), 100_001)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((numbers**power).mean()) - moment) < 4 * (variance / len(numbers)) ** 0.5  # standard errors
    assert abs(float((numbers[:50_000] * numbers[50_001:]).mean())) < 4 * 50_000**-0.5  # the two of a pair
