"""The reference case of the specification to all its printed digits, from factors and from whole gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from online_case import KEEP, gradients, mean_gradient, moments, rows, target
from tamis.maths.adam import adam_direction
from tamis.online import Anchored, FilterThenWeight, Greats
from tamis.online.measure import exact_interactions, measure_alignments, measure_lengths
from tamis.online.methods.choice import AlignmentForm, Evidence, InteractionForm
from tamis.online.methods.weights import positive_scale
from tamis.online.token_level import position_interactions
from tamis.solve.greedy import top
from tamis.solve.omp import match_orthogonally

PRINTED = {"rtol": 0.0, "atol": 5.1e-9}  # eight decimals

B = {
    "raw": [-0.98345377, -0.38853014, -0.36703704, 0.70837971, 1.85415386, 1.62843114],
    "adam": [0.32098399, -0.33490179, 0.10401871, 2.57721627, 2.66974903, 1.18698125],
    "jacobian": [-0.64029196, -0.00457879, -0.15097549, -0.75695134, -0.24092272, 0.34101764],
    "secant": [0.58653175, 0.35072352, 0.90560996, 0.49957936, 0.93802737, 1.30643637],
}
COSINE = [0.34142419, 0.34222646, 0.57062386, 0.35892899, 0.71031379, 0.90496102]
DIAGONAL = {
    "raw": [5.12119592, 1.74850080, 2.13679492, 5.59562676, 5.16458967, 2.82968197],
    "metric": [1.98980007, 0.66118646, 0.54195068, 5.11211448, 4.46466654, 1.24914678],
    "preconditioned": [1.19166874, 0.37975687, 0.17588579, 8.45525421, 6.74783326, 0.95193156],
}
ROW_0 = {
    "raw": [5.12119592, 2.14988727, 2.22951359, 4.37009493, 1.33392660, -2.28696135],
    "metric": [1.98980007, 0.65137976, 0.67608869, 2.34749200, 1.38554244, -0.52039123],
    "preconditioned": [1.19166874, 0.05534213, 0.33178515, 2.57489274, 2.07251142, 0.28671771],
    "token-level": [3.55995690, 1.20246775, 0.03749388, 2.26174153, 1.20378514, -2.11017447],
}
# (alignment, interactions): top-3, c, greedy unscaled -> w, greedy with c -> w, NNLS on all six, OMP order
TABLE: list[tuple[AlignmentForm, InteractionForm, list[int], float, list[int], list[float], list[int], list[float],
                  list[float], list[int]]] = [
    ("raw", "raw", [4, 5, 3], 5.60357333, [4, 5, 0], [0.18743017, 0.37563748, 0], [4, 5, 3],
     [0.58636846, 2.47961648, 0.54060566], [0, 0, 0, 0.594159, 0.51909579, 2.59195915], [5, 3, 1]),
    ("adam", "raw", [4, 3, 5], 3.65007355, [4, 2, 5], [0.46050619, 0, 0.06348161], [4, 3, 5],
     [0.39635619, 1.44443663, 1.28119070], [0, 0, 0, 1.50304661, 0.33594448, 1.36118755], [4, 1, 3]),
    ("adam", "metric", [4, 3, 5], 3.70322464, [4, 2, 5], [0.46471949, 0, 0.32351008], [4, 3, 5],
     [0.65288145, 1.01536345, 1.61608387], [0, 0, 0, 1.14527442, 0.46927859, 1.87730153], [4, 1, 5]),
    ("adam", "preconditioned", [4, 3, 5], 6.11726668, [4, 1, 2], [0.38186828, 0, 0], [4, 3, 5],
     [1.40194012, 0, 2.86039294], [0, 0, 0, 0, 1.15464751, 3.83268750], [5, 4, 0]),
]  # fmt: skip


def evidence(alignment: AlignmentForm, interactions: InteractionForm, *, materialised: bool = False) -> Evidence:
    held = rows(materialised=materialised, passes=2)
    b = measure_alignments(alignment, held, target(), moments(), mean=mean_gradient())
    gram = exact_interactions(interactions, held, moments(), gather=lambda x: x)
    return Evidence(alignments=b.numpy(), interactions=gram.numpy(), learning_rate=0.1)


def raw_weights(method: FilterThenWeight | Anchored, seen: Evidence) -> tuple[list[int], np.ndarray]:
    """The weights before they were normalised."""
    choice = method.choose(seen)
    assert choice.fallback is None
    assert choice.weights.sum() == pytest.approx(len(choice.rows) if choice.normalised else choice.weight_sum)
    scale = choice.weight_sum / len(choice.rows) if choice.normalised else 1.0
    return choice.rows.tolist(), choice.weights * scale


@pytest.mark.parametrize("materialised", [False, True])
@pytest.mark.parametrize("form", list(B))
def test_alignments(form: AlignmentForm, materialised: bool) -> None:
    held = rows(materialised=materialised, passes=3)
    got = measure_alignments(form, held, target(), moments(), mean=mean_gradient())
    np.testing.assert_allclose(got, B[form], **PRINTED)


def test_cosine_of_less_up_to_the_targets_length() -> None:
    got = measure_alignments("cosine", rows(), target(), moments()) / target()["layer.weight"].norm()
    np.testing.assert_allclose(got, COSINE, **PRINTED)


def test_inputs_of_the_case() -> None:
    np.testing.assert_allclose(
        gradients(range(1))[0].flatten(),
        [1.17795235, 1.09974859, 0.75228803, -1.09898466, -0.80643491, -0.31644178],
        **PRINTED,
    )
    np.testing.assert_allclose(
        target()["layer.weight"].flatten(),
        [-0.60907263, -0.43761671, -0.15901696, 0.24254824, -0.38528985, -0.91879556],
        **PRINTED,
    )
    np.testing.assert_allclose(
        moments()["layer.weight"].diagonal().flatten(),
        [0.40668531, 0.24606250, 0.22449705, 0.29988227, 0.64427133, 2.19365574],
        rtol=0, atol=5.1e-9,
    )  # fmt: skip


@pytest.mark.parametrize("form", list(ROW_0))
def test_interactions(form: InteractionForm) -> None:
    if form == "token-level":
        got = position_interactions(rows(passes=2), projector=None)
    else:
        got = exact_interactions(form, rows(passes=2), moments(), gather=lambda x: x)
    np.testing.assert_allclose(got[0], ROW_0[form], **PRINTED)
    np.testing.assert_allclose(got, got.T, rtol=1e-14)
    if form in DIAGONAL:
        np.testing.assert_allclose(got.diagonal(), DIAGONAL[form], **PRINTED)
        whole = exact_interactions(form, rows(materialised=True), moments(), gather=lambda x: x)
        np.testing.assert_allclose(got, whole, rtol=1e-12)


@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case[0]}-{case[1]}")
def test_choices_and_weights(case: tuple) -> None:  # type: ignore[type-arg]
    alignment, interactions, best, scale, plain, plain_w, scaled, scaled_w, all_w, pursuit = case
    seen = evidence(alignment, interactions)
    forms = {"alignment": alignment, "interactions": interactions, "keep": KEEP, "ridge": 0.1, "weights": "nnls"}
    assert top(seen.alignments, count=KEEP).tolist() == best
    order, weights = raw_weights(FilterThenWeight(scale=1.0, **forms), seen)
    assert order == plain
    np.testing.assert_allclose(weights, plain_w, **PRINTED)
    order, weights = raw_weights(FilterThenWeight(**forms), seen)
    assert order == scaled
    np.testing.assert_allclose(weights, scaled_w, **PRINTED)
    choice = FilterThenWeight(**forms).choose(seen)
    assert choice.scale == pytest.approx(scale, abs=5.1e-9)
    # All six: the scale is that of the top three.
    order, weights = raw_weights(FilterThenWeight(filter="none", **{**forms, "scale": scale}), seen)
    np.testing.assert_allclose(weights, all_w, rtol=0, atol=2e-8)  # the printed c has eight decimals too
    unit = np.diag(seen.gram).mean()
    found, _ = match_orthogonally(seen.gram / unit, scale * seen.alignments / unit, count=KEEP, ridge=0.1)
    assert found.tolist() == pursuit


def test_normalised_weights_and_the_update_they_make() -> None:
    method = FilterThenWeight(keep=KEEP, weights="nnls", ridge=0.1)
    choice = method.choose(evidence("adam", "metric"))
    np.testing.assert_allclose(choice.weights, [0.59636062, 0.92746207, 1.47617731], **PRINTED)
    coefficients = torch.zeros(6, dtype=torch.float64)
    coefficients[choice.rows] = torch.from_numpy(choice.weights) / choice.weights.sum()
    np.testing.assert_allclose(
        rows(passes=2).weighted(coefficients)["layer.weight"].flatten(),
        [-0.68982054, -0.28736967, 0.18543931, -0.56240255, -0.76358435, -0.77781407],
        **PRINTED,
    )


def test_leaving_a_candidate_out_of_the_mean() -> None:
    """What the real step loses along the target when candidate i's part of the mean of six is taken out of it."""
    state, grads = moments()["layer.weight"], gradients(range(6))
    mean = grads.mean(dim=0)
    steps = adam_direction(
        torch.cat([mean[None], mean - grads / 6]), state.exp_avg, state.exp_avg_sq,
        step=state.step, beta1=state.beta1, beta2=state.beta2, eps=state.eps,
    )  # fmt: skip
    lost = ((steps[0] - steps[1:]) * target()["layer.weight"]).flatten(1).sum(dim=1)
    expected = [-0.10651413, -0.00122298, -0.02561789, -0.14434407, -0.05291931, 0.05443808]
    np.testing.assert_allclose(lost, expected, **PRINTED)


@pytest.mark.parametrize("form", list(DIAGONAL))
def test_lengths_are_the_diagonal_and_the_sum_over_the_aligned(form: InteractionForm) -> None:
    b = measure_alignments("adam", rows(), target(), moments())
    inside = (b > 0).double()
    squares, aligned = measure_lengths(form, rows(passes=2), moments(), inside, gather=lambda x: x, add_up=lambda x: x)
    np.testing.assert_allclose(squares, DIAGONAL[form], **PRINTED)
    gram = exact_interactions(form, rows(), moments(), gather=lambda x: x)
    assert aligned == pytest.approx(float(inside @ gram @ inside), rel=1e-12)


def test_greats() -> None:
    assert Greats(keep=KEEP).choose(evidence("raw", "raw")).rows.tolist() == [4, 5, 3]


def test_anchored_weights_of_all_six() -> None:
    seen = evidence("adam", "metric")
    assert positive_scale(seen.alignments, seen.gram) == pytest.approx(5.36135253, abs=5.1e-9)
    for ridge, expected in (
        (1.0, [0, 0, 0.44242895, 1.20901921, 1.31201023, 1.60713789]),
        (4.0, [0.5964074, 0.61534941, 0.79807821, 1.03563333, 1.15407646, 1.27681563]),
    ):
        order, weights = raw_weights(Anchored(ridge=ridge), seen)
        assert order == [0, 1, 2, 3, 4, 5]
        np.testing.assert_allclose(weights, expected, **PRINTED)
