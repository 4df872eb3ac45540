import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles import adam_quadratic, adam_scores
from tamis.errors import InvalidInput
from tamis.maths.second_order import TermRatio, adam_offset, adam_scale

F64 = torch.float64


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_hand_computed_ratio() -> None:
    found = TermRatio(first=4.0, second=0.25)
    assert found.ratio == 0.0625 and found.worth_having
    assert not TermRatio(first=-100.0, second=-5.0).worth_having  # at 5 %, not above
    assert TermRatio(first=0.0, second=1.0).ratio == float("inf") and TermRatio(first=0.0, second=0.0).ratio == 0.0


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
def test_the_equations_for_adam_are_the_expansion_of_the_loss_after_its_step(n: int, seed: int, eta: float) -> None:
    # On a quadratic loss the expansion of equation 27 is exact: L(θ - (η/n)(b + G^A w)) - L(θ - (η/n) b).
    grads, target, half = normal(seed, n, 4), normal(seed + 1, 4), normal(seed + 2, 4, 4)
    scale, offset, w = normal(seed + 3, 4).abs(), normal(seed + 4, 4), normal(seed + 5, n).abs()
    hessian = half + half.T

    def loss(move: torch.Tensor) -> float:
        return float(target @ move + move @ hessian @ move / 2)

    own = grads * scale
    change = loss(-(eta / n) * (offset + own.T @ w)) - loss(-(eta / n) * offset)
    p = adam_scores(grads, scale, target, hessian @ offset, step=eta / n)
    q = adam_quadratic(grads, scale, own @ hessian) / n
    assert change == pytest.approx(eta / n * float(-p @ w + eta / 2 * w @ q @ w), rel=1e-8, abs=1e-9)
