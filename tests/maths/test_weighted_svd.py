"""Influence-preserving factors: the reference case to its digits, optimality, and the three forms of a damped root."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.maths.moment_roots import core_root, damping_of, dense_root, identity_root, probe_root
from tamis.maths.weighted_svd import WeightedFactors, balance, weighted_svd

# Section 8 of the specification, computed there by other code.
SIGMA = [0.6386722647070338, 0.26789075004823043, 0.0753862013333942, 0.03046949134268252]
PRODUCT = [
    [0.8566248393162703, 0.7656490523279105, 1.2598403300555572, 0.757827418135407, 1.109558101556408],
    [0.4302570004571624, -0.5830693456676561, -0.8056430445136659, -0.8296995288940066, 0.3660386891834697],
    [-0.7125485728677883, 0.1028121525074045, 0.05162578927626468, 0.2948464863773161, -0.7767367593761483],
    [-0.7301454417668533, 0.12637565281308988, 0.08415445040624739, 0.3284257693498391, -0.791763164809322],
]


def relative_error(found: WeightedFactors, rank: int) -> float:
    """Weighted norm of what rank ``rank`` leaves out, over that of the matrix."""
    if not found.energy:  # of a matrix of zeros
        return 0.0
    return math.sqrt(max(0.0, 1 - float(found.values[:rank].double().square().sum()) / found.energy))


def reference_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def table(rows: int, columns: int, entry: Any) -> torch.Tensor:
        return torch.tensor([[entry(i, j) for j in range(columns)] for i in range(rows)], dtype=torch.float64)

    return (
        table(4, 5, lambda i, j: math.cos(i * j + i)),
        table(5, 6, lambda j, t: math.sin((j + 1) * (t + 1))),
        table(4, 6, lambda i, t: math.cos(0.7 * (i + 2) * (t + 1)) / (1 + t)),
    )


def random_case(rows: int, columns: int, number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, inputs, grads = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, columns), (columns, number), (rows, number))
    )
    return weight, inputs, grads * 1e-3


def second_moment(probes: torch.Tensor, damping: float) -> torch.Tensor:
    return probes @ probes.T / probes.shape[1] + damping * torch.eye(len(probes), dtype=probes.dtype)


def power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    values, basis = torch.linalg.eigh(matrix)
    return basis @ torch.diag(values.clamp_min(0) ** exponent) @ basis.T


def error(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """``|C_d^{1/2} matrix C_h^{1/2}|``, by dense roots."""
    return float((power(left, 0.5) @ matrix @ power(right, 0.5)).norm())


@pytest.mark.parametrize("form", [dense_root, probe_root], ids=["dense", "probe"])
def test_the_reference_case_to_its_digits(form: Any) -> None:
    weight, inputs, grads = reference_case()
    left = form(grads, damping_of(grads, 1e-2, relative=True))
    right = form(inputs, damping_of(inputs, 1e-2, relative=True))
    found = weighted_svd(weight, left, right, rank=2)
    torch.testing.assert_close(found.values, torch.tensor(SIGMA, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    product = found.left @ found.right
    torch.testing.assert_close(product, torch.tensor(PRODUCT, dtype=torch.float64), rtol=1e-12, atol=1e-13)
    assert relative_error(found, 2) == pytest.approx(0.11660204070687018, rel=1e-12)
    moments = second_moment(grads, 0), second_moment(inputs, 0)
    assert error(weight - product, *moments) / error(weight, *moments) == pytest.approx(0.10449323816007872, rel=1e-9)
    assert float(found.left.norm()) == pytest.approx(2.871089536870891, rel=1e-12)
    assert float(found.right.norm()) == pytest.approx(1.6284941091199943, rel=1e-12)
    even = balance(found.left, found.right)
    assert float(even[0].norm()) == pytest.approx(2.065632005263676, rel=1e-12)
    assert float(even[1].norm()) == pytest.approx(2.065632005263676, rel=1e-12)
    torch.testing.assert_close(even[0] @ even[1], product, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(even[0].T @ even[0], even[1] @ even[1].T, rtol=1e-12, atol=1e-12)


def test_the_reference_case_without_weights_is_plain_svd() -> None:
    weight, inputs, grads = reference_case()
    found = weighted_svd(weight, identity_root(4, like=weight), identity_root(5, like=weight), rank=2)
    moments = second_moment(grads, 0), second_moment(inputs, 0)
    left_out = weight - found.left @ found.right
    assert error(left_out, *moments) / error(weight, *moments) == pytest.approx(0.4393794162417374, rel=1e-9)


def test_the_reference_case_with_three_probes_tells_core_and_probe_apart() -> None:
    weight, inputs, grads = reference_case()
    few_inputs, few_grads = inputs[:, :3], grads[:, :3]
    dampings = [damping_of(few, 1e-2, relative=True) for few in (few_grads, few_inputs)]
    moments = second_moment(grads, 0), second_moment(inputs, 0)
    for form, expected in ((core_root, 0.7818624239018364), (probe_root, 0.4534585106532548)):
        found = weighted_svd(weight, form(few_grads, dampings[0]), form(few_inputs, dampings[1]), rank=2)
        left_out = weight - found.left @ found.right
        assert error(left_out, *moments) / error(weight, *moments) == pytest.approx(expected, rel=1e-9)


@given(
    rows=st.integers(2, 12), columns=st.integers(2, 12), number=st.integers(1, 40), seed=st.integers(0, 9999),
    damping=st.sampled_from([1e-3, 1e-2, 1.0]),
)  # fmt: skip
def test_dense_and_probe_roots_are_one(rows: int, columns: int, number: int, seed: int, damping: float) -> None:
    weight, inputs, grads = random_case(rows, columns, number, seed)
    rank = min(rows, columns) // 2 or 1
    products = []
    for form in (dense_root, probe_root):
        roots = [form(probes, damping_of(probes, damping, relative=True)) for probes in (grads, inputs)]
        found = weighted_svd(weight, roots[0], roots[1], rank=rank)
        if rank < len(found.values) and found.values[rank - 1] - found.values[rank] < 1e-4 * found.values[0]:
            return  # two directions of one size: which of them is kept is free
        products.append(found.left @ found.right)
    torch.testing.assert_close(products[0], products[1], rtol=1e-8, atol=1e-8)


@given(seed=st.integers(0, 9999))
def test_no_perturbation_of_the_factors_lowers_the_weighted_error(seed: int) -> None:
    weight, inputs, grads = random_case(6, 8, 30, seed)
    dampings = [damping_of(probes, 1e-2, relative=True) for probes in (grads, inputs)]
    moments = second_moment(grads, dampings[0]), second_moment(inputs, dampings[1])
    found = weighted_svd(weight, probe_root(grads, dampings[0]), probe_root(inputs, dampings[1]), rank=3)
    best = error(weight - found.left @ found.right, *moments)
    assert best == pytest.approx(float(found.values[3:].norm()), rel=1e-8)
    left, right = balance(found.left, found.right)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(10):
            other = (left + size * torch.randn(left.shape, generator=generator, dtype=left.dtype)) @ (
                right + size * torch.randn(right.shape, generator=generator, dtype=right.dtype)
            )
            assert error(weight - other, *moments) >= best * (1 - 1e-12)


def test_singular_rank_deficient_and_tiny_layers_give_finite_factors() -> None:
    weight, inputs, grads = random_case(5, 7, 20, 0)
    inputs[3:] = 0  # four inputs are never used
    grads[:, 2:] = 0  # rank two
    for damping in (1e-2, 0.0):
        roots = [probe_root(probes, damping_of(probes, damping, relative=True)) for probes in (grads, inputs)]
        for matrix in (weight, torch.zeros_like(weight), weight[:, :1] @ weight[:1]):
            found = weighted_svd(matrix, roots[0], roots[1], rank=4)
            left, right = balance(found.left, found.right)
            assert left.isfinite().all() and right.isfinite().all()
            assert relative_error(found, 5) < 1e-6
    one = torch.tensor([[3.0]], dtype=torch.float64)
    found = weighted_svd(one, probe_root(one, 0.1), probe_root(one, 0.1), rank=1)
    torch.testing.assert_close(found.left @ found.right, one)


def test_a_randomised_decomposition_of_a_falling_spectrum_is_nearly_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(80, 80, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q
    weight = left[:, :60] @ torch.diag(0.8 ** torch.arange(60, dtype=torch.float64)) @ right.T
    plain = identity_root(80, like=weight), identity_root(60, like=weight)
    exact, quick = (weighted_svd(weight, *plain, rank=10, randomised=r) for r in (False, True))
    best, found = (float((weight - f.left @ f.right).norm()) for f in (exact, quick))
    assert best <= found <= 1.001 * best
    assert relative_error(quick, 10) == pytest.approx(relative_error(exact, 10), rel=1e-3)


def test_the_inverted_weighting_keeps_what_inverse_moments_weigh() -> None:
    weight, inputs, grads = random_case(6, 8, 30, 3)
    dampings = [damping_of(probes, 0.1, relative=True) for probes in (grads, inputs)]
    roots = probe_root(grads, dampings[0]).inverted(), probe_root(inputs, dampings[1]).inverted()
    found = weighted_svd(weight, *roots, rank=3)
    moments = [
        power(second_moment(probes, damping), -1.0) for probes, damping in zip((grads, inputs), dampings, strict=True)
    ]
    tail = float(found.values[3:].norm())
    assert error(weight - found.left @ found.right, *moments) == pytest.approx(tail, rel=1e-8)
