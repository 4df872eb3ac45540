"""Online methods as pure functions: what holds for any evidence. The worked numbers are in test_reference_case."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from tamis.errors import InvalidSettings
from tamis.online import (
    METHODS,
    Anchored,
    FilterThenWeight,
    Full,
    GradMatch,
    Greats,
    Less,
    TargetOnly,
    Tilt,
    TracIn,
    Uniform,
)
from tamis.online.methods import baselines, weights
from tamis.online.methods.choice import Evidence, Lengths, cold_updates
from tamis.online.step import StepSettings
from tamis.solve.solution import Solution, Status

SCORING = [
    FilterThenWeight(keep=3),
    FilterThenWeight.paper(keep=3),
    FilterThenWeight(keep=3, filter="top"),
    FilterThenWeight(keep=3, weights="none"),
    FilterThenWeight(keep=3, alignment="raw", interactions="raw"),
    FilterThenWeight(keep=3, weights="unbounded", ridge=0.1),
    FilterThenWeight(keep=3, filter="none", weights="nnls", ridge=0.1),
    FilterThenWeight(keep=3, normalise=False, weights="nnls"),
    Anchored(keep=3),
    Tilt(keep=3),
    TracIn(keep=3),
    Less(keep=3),
    Greats(keep=3),
    GradMatch(keep=3),
]


def gradients(seed: int, n: int, *, towards: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.normal(size=10)
    return rng.normal(size=(n, 10)) + towards * target, target


def seen_as(b: np.ndarray, gram: np.ndarray, rate: float = 1.0) -> Evidence:
    """Interactions, and the lengths that go with them."""
    aligned = b > 0
    lengths = Lengths(squares=np.diag(gram), aligned=float(gram[np.ix_(aligned, aligned)].sum()))
    return Evidence(alignments=b, interactions=gram, lengths=lengths, learning_rate=rate)


def evidence(x: np.ndarray, target: np.ndarray, rate: float = 0.01) -> Evidence:
    return seen_as(x @ target, x @ x.T, rate)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), which=st.sampled_from(range(len(SCORING))))
def test_every_choice_names_candidates_once_and_keeps_the_sum_of_plain_training(seed: int, n: int, which: int) -> None:
    method = SCORING[which]
    choice = method.choose(evidence(*gradients(seed, n)))
    kept = n if method.keeps_all else min(3, n)
    assert len(choice.rows) == len(set(choice.rows.tolist())) == kept
    assert set(choice.rows.tolist()) <= set(range(n))
    assert np.isfinite(choice.weights).all()
    if choice.normalised:
        assert choice.weights.sum() == pytest.approx(kept)
    if not (isinstance(method, FilterThenWeight) and method.weights == "unbounded"):
        assert (choice.weights >= 0).all()


@given(
    seed=st.integers(0, 10**6), which=st.sampled_from(range(len(SCORING))), unit=st.sampled_from([0.25, 8.0, 1024.0])
)
def test_unit_of_the_loss_changes_no_choice_of_the_consistent_forms(seed: int, which: int, unit: float) -> None:
    """Raw inner products are multiplied by the unit's square on both sides; ``D`` metric ones by the unit."""
    method = SCORING[which]
    if isinstance(method, Greats) or (isinstance(method, FilterThenWeight) and method.scale != "target"):
        return  # the learning rate and a fixed scale have a unit of their own: that is what the scale rule is for
    x, target = gradients(seed, 9)
    plain = evidence(x, target)
    scaled = seen_as(plain.alignments * unit, plain.gram * unit)
    a, b = method.choose(plain), method.choose(scaled)
    assert a.rows.tolist() == b.rows.tolist()
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 10**6), which=st.sampled_from(range(len(SCORING))))
def test_order_of_the_candidates_does_not_matter(seed: int, which: int) -> None:
    method, n = SCORING[which], 8
    x, target = gradients(seed, n)
    order = np.random.default_rng(seed).permutation(n)
    a, b = method.choose(evidence(x, target)), method.choose(evidence(x[order], target))
    weights = {int(row): weight for row, weight in zip(a.rows, a.weights, strict=True)}
    shuffled = {int(order[row]): weight for row, weight in zip(b.rows, b.weights, strict=True)}
    assert weights.keys() == shuffled.keys()
    for row, weight in weights.items():
        assert shuffled[row] == pytest.approx(weight, rel=1e-7, abs=1e-9)


def test_a_copy_of_the_best_candidate_is_left_out_by_the_filter_and_taken_by_the_top() -> None:
    x = np.array([[4.0, 0, 0], [4.0, 0, 0], [0, 3.0, 0], [0, 0, 1.0]])
    seen = evidence(x, np.array([1.0, 1.0, 1.0]))
    # T = {0, 1}: c = (4·16)/(2·4) = 8; after 0 is taken, its copy has 32 - 16 = 16 left and row 2 still has 24.
    assert FilterThenWeight(keep=2).choose(seen).rows.tolist() == [0, 2]
    assert FilterThenWeight(keep=2, filter="top").choose(seen).rows.tolist() == [0, 1]


def test_large_ridges_lead_back_to_plain_training_and_small_ones_to_matching() -> None:
    seen = evidence(*gradients(1, 10))
    for method in (Anchored(ridge=1e7), Tilt(ridge=1e7)):
        np.testing.assert_allclose(method.choose(seen).weights, np.ones(10), atol=1e-5)
    gentle, harsh = Anchored(ridge=4.0).choose(seen), Anchored(ridge=1e-3).choose(seen)
    assert harsh.effective_size < gentle.effective_size <= 10


def test_tilt_is_anchored_without_interactions() -> None:
    """With orthogonal gradients of one length: anchored solves (1 + λ) w = c b + λ, the tilt weighs (c b + λ) / λ."""
    b = np.array([1.0, 0.5, -0.2, 0.1])
    seen = seen_as(b, np.eye(4))
    np.testing.assert_allclose(Tilt().choose(seen).weights, Anchored().choose(seen).weights, rtol=1e-12)


@pytest.mark.parametrize("method", [FilterThenWeight(keep=2), Anchored(keep=2), Tilt(keep=2)])
def test_without_an_aligned_candidate_weights_are_equal_and_the_reason_is_said(method: Any) -> None:
    x, target = gradients(3, 6)
    seen = seen_as(-np.abs(x @ target), x @ x.T)
    choice = method.choose(seen)
    assert choice.weights.tolist() == [1.0] * len(choice.rows)
    assert "not aligned" in (choice.fallback or "") or "no candidate is aligned" in (choice.fallback or "")
    if not method.keeps_all:
        assert choice.rows.tolist() == np.argsort(-seen.alignments, kind="stable")[:2].tolist()


def test_zero_gradients_everywhere_are_survived_and_reported() -> None:
    nothing = seen_as(np.zeros(5), np.zeros((5, 5)))
    for method in SCORING:
        choice = method.choose(nothing)
        assert np.isfinite(choice.weights).all()
        assert choice.weights.sum() == pytest.approx(len(choice.rows))


def test_greats_at_a_small_rate_is_tracin_and_at_a_large_one_looks_at_copies() -> None:
    x = np.array([[2.0, 0], [2.0, 0], [0, 1.0]])
    b, gram = x @ np.array([1.0, 1.0]), x @ x.T
    small = Evidence(alignments=b, interactions=gram, learning_rate=1e-3)
    large = Evidence(alignments=b, interactions=gram, learning_rate=0.5)
    assert Greats(keep=2).choose(small).rows.tolist() == TracIn(keep=2).choose(small).rows.tolist() == [0, 1]
    assert Greats(keep=2).choose(large).rows.tolist() == [0, 2]  # 0.5·2 - 0.25·4 = 0 < 0.5·1


def test_negative_weights_of_the_pursuit_become_zero() -> None:
    x, target = gradients(8, 6, towards=0.0)
    choice = GradMatch(keep=6).choose(evidence(x, target))
    assert (choice.weights == 0).any()
    assert choice.weights.sum() == pytest.approx(6)


def test_unbounded_weights_may_be_negative() -> None:
    seen = Evidence(alignments=np.array([1.0, -0.2]), interactions=np.array([[2.0, 1.0], [1.0, 2.0]]))
    settings = {"keep": 2, "filter": "none", "ridge": 1e-3}
    assert FilterThenWeight(weights="unbounded", **settings).choose(seen).weights[1] < 0  # (2·(-0.2) - 1) / 3
    assert FilterThenWeight(weights="nnls", **settings).choose(seen).weights.tolist() == [2.0, 0.0]


# What the docstring says is done where the paper is silent: a word of the point, and the setting that does it.
SILENT = {
    "1. The ridge": lambda paper: paper.ridge == 1e-3,
    "2. Gradients enter": lambda paper: paper.needs.alignment == "projected",
    "3. The first update": lambda paper: cold_updates(paper) == 1,
    "4. Numbers that never": lambda paper: paper.alignment != "adam",  # test_shadow
    "5. The projection": lambda paper: paper.needs.sketch_dim == 256,
    "6. A sample's loss": lambda paper: StepSettings().reduction == "rows",
    "7. That sum": lambda paper: not paper.normalise,
    "8. Ties": lambda paper: paper.choose(seen_as(np.ones(6), np.zeros((6, 6)) + 1e-9 * np.eye(6))).rows[0] == 0,
    "9. Where the best": lambda paper: paper.choose(seen_as(-np.ones(6), np.eye(6))).fallback is not None,
    "10. Target rows": lambda paper: paper.keep * paper.oversample // 2 == 16,
}


@pytest.mark.parametrize("point", list(SILENT))
def test_paper_preset_names_every_point_it_adds_to_the_paper(point: str) -> None:
    assert point in (FilterThenWeight.paper.__doc__ or "")
    assert SILENT[point](FilterThenWeight.paper())


def test_paper_preset_is_the_published_setting_and_takes_changes() -> None:
    paper = FilterThenWeight.paper(keep=5, oversample=2)
    assert (paper.keep, paper.oversample, paper.needs.alignment, paper.needs.interactions) == (5, 2, "projected", "raw")
    assert (paper.scale, paper.filter, paper.weights) == (1.0, "greedy", "nnls")
    points = [line for line in (paper.paper.__doc__ or "").splitlines() if line.strip()[:2].strip(".").isdigit()]
    assert len(points) == len(SILENT)
    changed = FilterThenWeight.paper(filter="top", weights="none")
    assert (changed.filter, changed.weights, changed.alignment) == ("top", "none", "projected")


def test_paper_preset_sums_weighted_gradients_as_they_come() -> None:
    x, target = gradients(2, 9)
    choice = FilterThenWeight.paper(keep=4).choose(evidence(x, target))
    assert not choice.normalised
    part = x[choice.rows]
    ridge = 1e-3 * float((part**2).sum(axis=1).mean())
    system = np.vstack([part.T, np.sqrt(ridge) * np.eye(4)])
    expected, _ = optimize.nnls(system, np.concatenate([target, np.zeros(4)]))
    np.testing.assert_allclose(choice.weights, expected, rtol=1e-7, atol=1e-9)
    assert choice.weights.sum() == pytest.approx(choice.weight_sum)


def test_without_a_filter_the_scale_is_that_of_the_best_and_opposed_candidates_do_not_forbid_matching() -> None:
    """Five of six candidates point away: the sum of all is opposed, the best one is not."""
    x = np.diag([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    seen = evidence(x, np.array([1.0, -1.0, -1.0, -1.0, -1.0, -1.0]))
    matched = FilterThenWeight(keep=1, filter="none", weights="nnls").choose(seen)
    assert matched.fallback is None
    assert matched.scale == pytest.approx(2.0)  # T = {0}: 4 / 2
    assert matched.weights.tolist() == [6.0, 0, 0, 0, 0, 0]
    wide = FilterThenWeight(keep=3, filter="none")  # T's sum is opposed; anchored weights look at P only
    assert wide.choose(seen).fallback is None
    np.testing.assert_allclose(wide.choose(seen).weights, Anchored().choose(seen).weights)
    assert wide.choose(seen).scale == pytest.approx(2.0)


@pytest.mark.parametrize("scale", ["target", 1.0, 7.0])
def test_a_filter_with_nothing_to_go_by_takes_the_top(scale: Any) -> None:
    x, target = gradients(3, 6)
    b = -np.abs(x @ target)
    choice = FilterThenWeight(keep=3, scale=scale, weights="nnls").choose(seen_as(b, x @ x.T))
    assert choice.rows.tolist() == np.argsort(-b, kind="stable")[:3].tolist()
    assert choice.weights.tolist() == [1.0] * 3
    assert choice.fallback == "the best candidates are not aligned with the target"


def test_greats_at_rate_zero_is_its_limit() -> None:
    x, target = gradients(5, 7)
    assert Greats(keep=3).choose(evidence(x, target, rate=0.0)).rows.tolist() == (
        Greats(keep=3).choose(evidence(x, target, rate=1e-12)).rows.tolist()
    )


def test_scale_of_anchored_and_tilted_weights_is_that_of_the_aligned() -> None:
    seen = seen_as(np.array([1.0, 0.5, -0.2]), np.eye(3))
    for method in (Anchored(), Tilt(), FilterThenWeight(filter="top", keep=3)):
        assert method.choose(seen).scale == pytest.approx(2 / 1.5)  # P = {0, 1}


def test_tilt_looks_at_no_pair() -> None:
    assert Tilt().needs.interactions is None
    x, target = gradients(4, 8)
    whole = evidence(x, target)
    lengths_only = Evidence(alignments=whole.alignments, lengths=whole.lengths)
    scale = weights.positive_scale(whole.alignments, whole.gram)
    assert scale is not None
    expected = np.maximum(0, 1 + scale * whole.alignments / (4 * np.diag(whole.gram).mean()))
    np.testing.assert_allclose(Tilt().choose(lengths_only).weights, expected * 8 / expected.sum(), rtol=1e-12)
    with pytest.raises(InvalidSettings, match="token-level' is about pairs"):
        Tilt(interactions="token-level")


@pytest.mark.parametrize("status", [Status.MAX_STEPS, Status.INDEFINITE, Status.SINGULAR])
@pytest.mark.parametrize("method", [FilterThenWeight(keep=2, weights="nnls"), Anchored(), GradMatch(keep=2)])
def test_a_solver_that_gives_up_leaves_equal_weights_and_its_reason(
    method: Any, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsolved = Solution(value=np.ones(2), status=status, stats={})
    monkeypatch.setattr(weights, "solve_nnls", lambda *args, **kwargs: unsolved)
    monkeypatch.setattr(baselines, "match_orthogonally", lambda *args, **kwargs: (np.array([0, 1]), unsolved))
    choice = method.choose(seen_as(np.ones(2), np.eye(2)))
    assert choice.fallback == status.value
    assert choice.weights.tolist() == [1.0, 1.0]


def test_cold_start_is_ten_updates_and_one_for_the_jacobian() -> None:
    assert [cold_updates(m) for m in (FilterThenWeight(), Tilt(), Anchored(), TracIn())] == [10, 10, 10, 0]
    for kind in (FilterThenWeight, Tilt, Anchored):
        assert cold_updates(kind(alignment="jacobian")) == 1
        assert cold_updates(kind(alignment="jacobian", cold_start=4)) == 4


def test_needs_name_what_is_measured_and_nothing_more() -> None:
    assert Uniform().needs.alignment is Full().needs.alignment is None
    assert TracIn().needs.interactions is None and not TracIn().needs.adam
    assert FilterThenWeight(filter="top", weights="none").needs.interactions is None
    assert FilterThenWeight().needs.adam and Tilt().needs.adam
    assert FilterThenWeight(filter="none", weights="none").needs.interactions is None
    assert not FilterThenWeight(alignment="raw", interactions="raw", cold_start=0).needs.adam
    assert TargetOnly().needs.target_only


def test_effective_size_counts_equal_weights() -> None:
    choice = Full().choose(Evidence(alignments=np.zeros(7)))
    assert choice.effective_size == pytest.approx(7)


def test_table_of_methods_is_named_as_the_methods_are() -> None:
    assert {name: method().name for name, method in METHODS.items()} == {name: name for name in METHODS}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "keep=0: expected at least 1"),
        ({"oversample": 0}, "oversample=0: expected at least 1"),
        ({"cold_start": 2.5}, "cold_start=2.5: expected a whole number, got float"),
        ({"cold_start": 0}, "cold_start to 1 or more"),
        ({"alignment": "adm"}, "alignment='adm': expected one of adam, .*, did you mean 'adam'?"),
        ({"interactions": "x"}, "interactions='x': expected one of metric"),
        ({"scale": -1.0}, "scale=-1.0: expected 'target' or a number above zero"),
        ({"scale": "auto"}, "scale='auto': expected target or a number"),
        ({"scale": None}, "scale=None: expected target or a number"),
        ({"keep": None}, "keep=None: expected a whole number"),
        ({"keep": "8"}, "keep='8': expected a whole number, got str"),
        ({"token_level": 1}, "token_level=1: expected true or false"),
        ({"filter": "best"}, "filter='best': expected one of greedy, top, none"),
        ({"weights": "best"}, "weights='best': expected one of anchored"),
        ({"ridge": 0.0}, "ridge must be at least 0.001"),
        ({"projection_dim": 0}, "projection_dim must be at least 1"),
    ],
)
def test_bad_settings_are_refused_with_their_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        FilterThenWeight(**settings)
