import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import norm

from tamis.errors import InvalidSettings, NonFinite
from tamis.selection.flags import HighLoss, flag_high_losses


def slow_flags(losses, sources, supervised, threshold, min_group):
    """Row by row: find the smallest group that is large enough, then its median and spread."""
    z = []
    for i in range(len(losses)):
        same_source = [j for j in range(len(losses)) if sources[j] == sources[i]]
        same_bin = [j for j in same_source if int(supervised[j]).bit_length() == int(supervised[i]).bit_length()]
        wide_enough = [group for group in (same_bin, same_source, list(range(len(losses)))) if len(group) >= min_group]
        group = wide_enough[0] if wide_enough else []
        own = losses[group].astype(np.float64)
        if not len(own):
            z.append(0.0)
            continue
        # By hand: the middle, and the value below which lies the share that a normal has below minus one deviation.
        place = norm.cdf(-1) * (len(own) - 1)
        low, high = np.sort(own)[int(place)], np.sort(own)[min(int(place) + 1, len(own) - 1)]
        spread = np.median(own) - (low + (place - int(place)) * (high - low))
        if spread < 1e-12:
            spread = np.sqrt(np.pi / 2) * np.abs(own - np.median(own)).mean()
        z.append((losses[i] - np.median(own)) / spread if spread else 0.0)
    return np.array(z), np.array(z) > threshold


@given(st.data(), st.integers(1, 30), st.integers(3, 8))
def test_flags_equal_the_row_by_row_definition(data, n, min_group):
    losses = data.draw(hnp.arrays(np.float32, n, elements=st.integers(0, 12).map(lambda k: k / 4)))
    sources = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, 2)))
    supervised = data.draw(hnp.arrays(np.int64, n, elements=st.integers(1, 20)))
    found = flag_high_losses(losses, sources, supervised, HighLoss(threshold=2.0, min_group=min_group))
    z, flagged = slow_flags(losses, sources, supervised, 2.0, min_group)
    np.testing.assert_allclose(found.z, z, rtol=1e-6)  # stored in single precision
    np.testing.assert_array_equal(found.flagged, flagged)


def test_high_loss_is_judged_within_its_source_and_length():
    rng = np.random.default_rng(0)
    easy, hard = rng.normal(1.0, 0.1, 50), rng.normal(4.0, 0.1, 50)
    easy[7] = 2.0  # far above its source, far below the other
    losses = np.concatenate([easy, hard]).astype(np.float32)
    found = flag_high_losses(losses, np.repeat([0, 1], 50), np.full(100, 40), HighLoss(threshold=5.0))
    assert np.flatnonzero(found.flagged).tolist() == [7]
    by_length = flag_high_losses(losses, np.zeros(100, int), np.repeat([64, 4], 50), HighLoss(threshold=5.0))
    assert np.flatnonzero(by_length.flagged).tolist() == [7]


def test_wrong_answers_do_not_hide_each_other():
    # A fifth of the rows two units above the rest: around the median the spread would be half as large again.
    rng = np.random.default_rng(1)
    losses = rng.normal(0.0, 1.0, 4000)
    losses[:800] += 4
    found = flag_high_losses(losses.astype(np.float32), np.zeros(4000, int), np.full(4000, 40))
    assert found.flagged[:800].mean() > 0.8
    assert found.flagged[800:].mean() < 0.02
    deviation = 1.4826 * np.median(np.abs(losses - np.median(losses)))
    assert ((losses - np.median(losses)) / deviation > HighLoss().threshold)[:800].mean() < found.flagged[:800].mean()


def test_the_score_counts_standard_deviations_of_a_normal():
    losses = norm.ppf((np.arange(20_000) + 0.5) / 20_000) * 0.3 + 2
    found = flag_high_losses(losses, np.zeros(20_000, int), np.ones(20_000, int))
    np.testing.assert_allclose(found.z, (losses - 2) / 0.3, atol=2e-3)  # the percentile falls between two rows


def test_too_few_rows_are_not_judged():
    found = flag_high_losses(np.array([1, 1, 1, 99], np.float32), np.zeros(4, int), np.ones(4, int))
    assert found.z.tolist() == [0.0] * 4
    assert not found.flagged.any()


def test_equal_losses_are_not_flagged():
    found = flag_high_losses(np.full(30, 0.7, np.float32), np.zeros(30, int), np.ones(30, int))
    np.testing.assert_array_equal(found.z, 0)


@given(st.floats(0.1, 100), st.floats(-50, 50))
def test_flags_do_not_depend_on_the_unit_of_the_loss(scale, shift):
    losses = np.random.default_rng(3).gamma(2.0, size=60)
    sources, supervised = np.arange(60) % 2, np.full(60, 9)
    plain = flag_high_losses(losses.astype(np.float32), sources, supervised)
    other = flag_high_losses((losses * scale + shift).astype(np.float32), sources, supervised)
    np.testing.assert_allclose(other.z, plain.z, rtol=1e-2, atol=1e-2)  # float32 losses around a shift of 50


def test_bad_settings_and_losses_are_refused():
    with pytest.raises(InvalidSettings, match="threshold is 0; expected a number above zero"):
        HighLoss(threshold=0)
    with pytest.raises(InvalidSettings, match="min_group is 2; expected at least 3"):
        HighLoss(min_group=2)
    with pytest.raises(NonFinite, match="the loss at place 1 is nan"):
        flag_high_losses(np.array([1, np.nan], np.float32), np.zeros(2, int), np.ones(2, int))
