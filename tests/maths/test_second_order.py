import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.errors import InvalidInput, NonFinite
from tamis.maths.second_order import (
    TermRatio,
    adam_offset,
    adam_quadratic,
    adam_scale,
    adam_scores,
    term_ratio,
)

F64 = torch.float64


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def symmetric(seed: int, size: int) -> torch.Tensor:
    half = normal(seed, size, size)
    return half + half.T


@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.floats(1e-6, 10))
def test_one_hessian_product_gives_the_ratio_of_the_whole_matrices(n: int, seed: int, eta: float) -> None:
    grads, target, hessian = normal(seed, n, 7), normal(seed + 1, 7), symmetric(seed + 2, 7)
    w = normal(seed + 3, n).abs()
    p, q = grads @ target, grads @ hessian @ grads.T / n
    s = grads.T @ w
    found = term_ratio(s, hessian @ s, target, eta=eta, pool_size=n)
    assert found.first == pytest.approx(float(p @ w), rel=1e-9, abs=1e-9)
    assert found.second == pytest.approx(eta / 2 * float(w @ q @ w), rel=1e-9, abs=1e-9 * eta)
    double = term_ratio(s, hessian @ s, target, eta=2 * eta, pool_size=n)
    assert double.ratio == pytest.approx(2 * found.ratio, rel=1e-12)


def test_hand_computed_ratio() -> None:
    # s = (1, 2), H s = (3, 0), g_T = (2, 1): T1 = 4, T2 = 0.5/2 · 3/3.
    found = term_ratio(
        torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]), torch.tensor([2.0, 1.0]), eta=0.5, pool_size=3
    )
    assert (found.first, found.second, found.ratio) == (4.0, 0.25, 0.0625) and found.worth_having
    assert not TermRatio(first=-100.0, second=-5.0).worth_having  # at 5 %, not above
    assert TermRatio(first=0.0, second=1.0).ratio == float("inf") and TermRatio(first=0.0, second=0.0).ratio == 0.0


def test_ratios_of_nothing_are_refused() -> None:
    ones = torch.ones(2)
    with pytest.raises(InvalidInput, match="got 0 rows"):
        term_ratio(ones, ones, ones, eta=0.1, pool_size=0)
    with pytest.raises(InvalidInput, match="eta=-1"):
        term_ratio(ones, ones, ones, eta=-1.0, pool_size=2)
    with pytest.raises(NonFinite, match="first-order term is nan"):
        term_ratio(torch.full((2,), float("nan")), ones, ones, eta=0.1, pool_size=2)


@given(st.integers(1, 2000), st.floats(0, 0.99), st.floats(0.9, 0.9999), st.integers(0, 2**32 - 1))
def test_scale_and_offset_are_the_papers(step: int, beta1: float, beta2: float, seed: int) -> None:
    m, v = normal(seed, 5), normal(seed + 1, 5).square() + 1e-3
    eps = 1e-6
    settings = {"step": step, "beta1": beta1, "beta2": beta2, "eps": eps}
    root = (v / (1 - beta2**step)).sqrt() + eps
    a = (1 - beta1) / ((1 - beta1**step) * root)
    b = beta1 * m / ((1 - beta1**step) * root)
    torch.testing.assert_close(adam_scale(v, **settings), a, rtol=1e-9, atol=0)
    torch.testing.assert_close(adam_offset(m, v, **settings), b, rtol=1e-9, atol=1e-300)


def test_coordinates_without_a_gradient_move_nothing() -> None:
    v = torch.tensor([1.0, 0.0, 4.0], dtype=F64)
    assert adam_scale(v, step=3)[1] == 0 and adam_offset(torch.ones(3, dtype=F64), v, step=3)[1] == 0
    with pytest.raises(InvalidInput, match="at least one finished optimizer step"):
        adam_scale(v, step=0)


@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_adam_terms_are_the_expansion_of_the_loss_after_an_adam_step(n: int, seed: int, eta: float) -> None:
    # On a quadratic loss the expansion of equation 27 is exact: L(θ - (η/n)(b + G^A w)) - L(θ - (η/n) b).
    grads, target, hessian = normal(seed, n, 4), normal(seed + 1, 4), symmetric(seed + 2, 4)
    scale, offset, w = normal(seed + 3, 4).abs(), normal(seed + 4, 4), normal(seed + 5, n).abs()

    def loss(move: torch.Tensor) -> float:
        return float(target @ move + move @ hessian @ move / 2)

    own = grads * scale
    change = loss(-(eta / n) * (offset + own.T @ w)) - loss(-(eta / n) * offset)
    p = adam_scores(grads, scale, target, hessian @ offset, eta=eta)
    q = adam_quadratic(grads, scale, own @ hessian)
    assert change == pytest.approx(eta / n * float(-p @ w + eta / 2 * w @ q @ w), rel=1e-8, abs=1e-9)
    torch.testing.assert_close(q, q.T, rtol=0, atol=0)


def test_without_the_offset_scores_are_first_order_and_some_rows_can_be_scored_alone() -> None:
    grads, target, scale = normal(0, 6, 4), normal(1, 4), normal(2, 4).abs()
    torch.testing.assert_close(adam_scores(grads, scale, target), (grads * scale) @ target)
    product = normal(3, 4)
    whole = adam_scores(grads, scale, target, product, eta=0.3)
    part = adam_scores(grads[:2], scale, target, product, eta=0.3, pool_size=6)
    torch.testing.assert_close(part, whole[:2])
