"""Scores, their agreement, and the advice that follows from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

import proxy_case
from tamis.gradients.per_sample import MaterialisedGradients, run_batch
from tamis.model.targets import gradient_layers
from tamis.projection.factorized import FactorizedProjector
from tamis.proxies.influence import (
    Interval,
    Measured,
    ModelAgreement,
    mean_correlation,
    mixed_scores,
    model_agreement,
    resampled_overlap,
)
from tamis.proxies.retention import Kept, SweepPoint, advise
from tamis.proxies.rows import batches_of


def test_scores_are_mean_cosines_of_gradients() -> None:
    model = proxy_case.model(dtype=torch.float64)
    wide = replace(proxy_case.bench(), projector=FactorizedProjector(dim=99, seed=0))  # nothing is projected
    found = wide.held_out(model)
    layers, roles = gradient_layers(model), proxy_case.roles()

    def units(rows: tuple[object, ...]) -> torch.Tensor:
        made = torch.zeros(len(rows), sum(layer.numel for layer in layers), dtype=torch.float64)
        for batch in batches_of(rows, batch_tokens=1, pad_id=0):  # type: ignore[arg-type]
            consumer = MaterialisedGradients(layers)
            run_batch(model, batch, layers, consumer)
            made[batch.rows] = consumer.grads / consumer.grads.norm(dim=1, keepdim=True)
        return made

    cosines = units(roles.held_out) @ units(roles.target.rows).T
    expected = torch.stack([cosines[:, :3].mean(dim=1), cosines[:, 3:].mean(dim=1)], dim=1)
    np.testing.assert_allclose(found.scores, expected.numpy(), rtol=1e-5, atol=1e-6)  # features are float32
    again = mixed_scores(found, found, roles.target)
    assert again is not None
    np.testing.assert_array_equal(again, found.scores)


def test_mixed_scores_are_the_proxys_rows_against_the_full_models_targets() -> None:
    draw, target = np.random.default_rng(0), proxy_case.roles().target  # two targets of three rows

    def measured(size: int) -> Measured:
        units, target_units = (
            torch.nn.functional.normalize(torch.from_numpy(draw.normal(size=(rows, size))), dim=1) for rows in (20, 6)
        )
        losses, scores = np.zeros(20, dtype=np.float32), np.zeros((20, 2), dtype=np.float32)
        return Measured(losses=losses, units=units, target_units=target_units, scores=scores)

    proxy, full = measured(7), measured(7)
    cosines = proxy.units.numpy() @ full.target_units.numpy().T
    expected = np.stack([cosines[:, :3].mean(axis=1), cosines[:, 3:].mean(axis=1)], axis=1)
    found = mixed_scores(proxy, full, target)
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert mixed_scores(measured(8), full, target) is None  # features of another space do not compare


def test_the_mean_correlation_is_over_all_targets() -> None:
    full = np.stack([np.arange(6.0), np.arange(6.0)], axis=1)
    assert mean_correlation(full * [1, -1], full) == pytest.approx(0)
    assert mean_correlation(full * [1, 0], full) == pytest.approx(0.5)  # no ranking counts as none kept


def test_agreement_is_spearmans_and_the_interval_holds_it() -> None:
    draw = np.random.default_rng(0)
    full = draw.normal(size=(200, 2)).astype(np.float32)
    ours = (full + draw.normal(size=(200, 2))).astype(np.float32)
    found = model_agreement(ours, full, ["a", "b"])
    expected = [spearmanr(ours[:, j], full[:, j]).statistic for j in range(2)]
    assert found.by_target == pytest.approx({"a": expected[0], "b": expected[1]}, abs=1e-9)
    assert found.spearman.value == pytest.approx(np.mean(expected), abs=1e-9)
    assert found.spearman.low is not None and found.spearman.high is not None
    assert found.spearman.low < found.spearman.value < found.spearman.high
    assert found.spearman.high - found.spearman.low < 0.25
    assert model_agreement(full, full, ["a", "b"]).spearman == Interval(value=1.0, low=1.0, high=1.0)
    assert model_agreement(ours, full, ["a", "b"]) == found  # the same rows are drawn again


def test_overlap_counts_the_best_rows() -> None:
    once = np.ones((1, 40), dtype=np.int64)
    x = np.arange(40, dtype=np.float32)
    y = x.copy()
    y[[39, 0]] = y[[0, 39]]
    found = [float(resampled_overlap(x, other, once)[0]) for other in (y, x, -x)]
    assert found == [0.5, 1, 0]


def test_agreement_reports_the_overlap_beside_the_correlation() -> None:
    full = np.repeat(np.arange(40, dtype=np.float32)[:, None], 2, axis=1)
    ours = full.copy()
    ours[[39, 0], 0] = ours[[0, 39], 0]  # the first target's best row and worst row change places
    found = model_agreement(ours, full, ["a", "b"])
    assert found.top_overlap.value == 0.75  # one of its best two, and both of the second target's
    assert found.by_target == pytest.approx({"a": 1 - 6 * 2 * 39**2 / (40 * (40**2 - 1)), "b": 1})
    assert found.spearman.value == pytest.approx(np.mean(list(found.by_target.values())))
    turned = model_agreement(-full, full, ["a", "b"])  # whichever rows are drawn
    assert turned.top_overlap == Interval(value=0.0, low=0.0, high=0.0)
    spearman = turned.spearman
    assert [spearman.value, spearman.low, spearman.high] == pytest.approx([-1, -1, -1])


def test_a_target_without_a_ranking_counts_as_none_kept_in_the_interval_too() -> None:
    draw = np.random.default_rng(0)
    full = draw.normal(size=(50, 2)).astype(np.float32)
    ours = full + draw.normal(size=(50, 2)).astype(np.float32)
    one, blank = model_agreement(ours[:, :1], full[:, :1], ["a"]).spearman, ours * np.array([1, 0], dtype=np.float32)
    both = model_agreement(blank, full, ["a", "b"])
    assert both.by_target["b"] == 0
    assert both.spearman == Interval(value=one.value / 2, low=one.low / 2, high=one.high / 2)  # type: ignore[operator]
    none = model_agreement(0 * ours, full, ["a", "b"])
    assert none.spearman == Interval(value=0.0, low=None, high=None)


def test_too_few_rows_have_no_interval() -> None:
    full = np.arange(7, dtype=np.float32)[:, None]
    found = model_agreement(full, full, ["a"])
    assert found.spearman == found.top_overlap == Interval(value=1.0, low=None, high=None)


@given(seed=st.integers(0, 9999), ties=st.booleans())
def test_the_resampled_overlap_is_that_of_the_rows_written_out(seed: int, ties: bool) -> None:
    draw = np.random.default_rng(seed)
    x, y = (draw.normal(size=30).astype(np.float32) for _ in range(2))
    if ties:
        x, y = np.round(x), np.round(y)
    counts = np.bincount(draw.integers(0, 30, 30), minlength=30)[None]
    written = np.repeat(np.arange(30), counts[0])
    best = [set(np.argsort(-scores[written], kind="stable")[:3].tolist()) for scores in (x, y)]
    assert resampled_overlap(x, y, counts, share=0.1)[0] == pytest.approx(len(best[0] & best[1]) / 3)


def at(value: float, *, name: str = "x", width: float = 0.1) -> Kept:
    interval = Interval(value=value, low=value - width / 2, high=value + width / 2)
    return Kept(name=name, loss=1.0, agreement=ModelAgreement(spearman=interval, top_overlap=interval, by_target={}))


@pytest.mark.parametrize(
    ("final", "sweep", "sparsity", "said"),
    [
        (0.95, {0.3: 0.97, 0.7: 0.8}, 0.5, "Score with it"),
        (0.95, {0.3: 0.97, 0.7: 0.92}, 0.7, "0.7 kept that much before alignment"),
        (0.8, {0.3: 0.93, 0.1: 0.97}, 0.3, "build with --sparsity 0.3"),
        (0.6, {0.1: 0.7}, None, "No sparsity that was measured kept it"),
        (0.6, {}, None, "or accept the loss of agreement"),
        (0.2, {}, None, "or take a lower --sparsity. With so little agreement a selection by it is not the model's"),
        (-0.1, {0.3: 0.95}, 0.3, "do not select with it"),
    ],
)
def test_advice_names_the_largest_measured_sparsity_that_keeps_enough(
    final: float, sweep: dict[float, float], sparsity: float | None, said: str
) -> None:
    points = [SweepPoint(sparsity=rho, achieved=rho, kept=at(value)) for rho, value in sweep.items()]
    found = advise(keep=0.9, sparsity=0.5, before=None, final=at(final), sweep=points, control=None, seconds_ratio=0.5)
    assert found.sparsity == sparsity and said in " ".join(found.sentences)


def test_advice_says_when_alignment_or_rows_were_not_enough() -> None:
    found = advise(
        keep=0.9, sparsity=0.5, before=at(0.8), final=at(0.7, width=0.3), sweep=(), control=at(0.75), seconds_ratio=1.3
    )
    said = " ".join(found.sentences)
    assert "did not raise the agreement" in said and "--objective kl" in said and "raise --held-out-rows" in said
    assert "took 1.30 times as long as one of the full model" in said


def test_advice_says_that_there_is_no_interval() -> None:
    none = Interval(value=0.95, low=None, high=None)
    final = replace(at(0.95), agreement=ModelAgreement(spearman=none, top_overlap=none, by_target={}))
    found = advise(keep=0.9, sparsity=0.5, before=None, final=final, sweep=(), control=None, seconds_ratio=0.5)
    assert "too little for an interval: raise --held-out-rows" in found.sentences[-1]


def test_advice_never_names_what_was_done_or_what_a_baseline_cannot_do() -> None:
    half = SweepPoint(sparsity=0.5, achieved=0.5, kept=at(0.95))
    worse = advise(
        keep=0.9, sparsity=0.5, before=at(0.95), final=at(0.8), sweep=[half], control=None, seconds_ratio=0.5
    )
    assert "build with --objective none" in " ".join(worse.sentences) and "--sparsity" not in " ".join(worse.sentences)
    for final in (0.2, 0.7, 0.95):
        sibling = advise(
            keep=0.9, sparsity=None, before=None, final=at(final), sweep=(), control=None, seconds_ratio=0.5,
            is_low_rank=False,
        )  # fmt: skip
        said = " ".join(sibling.sentences)
        assert sibling.sparsity is None and "--steps" not in said and "sparsity" not in said
        assert ("take another --sibling" in said) == (final == 0.2)
