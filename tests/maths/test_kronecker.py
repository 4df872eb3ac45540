"""K-FAC where it is exact against the dense Fisher matrix, EK-FAC against its diagonal in the basis, and hand cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.errors import InvalidInput, InvalidSettings
from tamis.maths.kronecker import eigenbasis, kfac_eigenvalues, precondition, squared_coordinates


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def independent_tokens(seed: int, inputs: int = 5, outputs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """One-token rows whose inputs and output gradients are all pairs of a few: independent, so K-FAC is exact."""
    a, g = normal(seed, 6, inputs), normal(seed + 1, 7, outputs)
    act = a.repeat_interleave(7, 0)[:, None]  # (42, 1, I)
    grad_out = g.repeat(6, 1)[:, None]
    return act, grad_out


@given(st.integers(0, 2**31), st.floats(0.01, 10))
def test_where_tokens_are_independent_the_inverse_is_that_of_the_dense_fisher_matrix(seed: int, damping: float) -> None:
    act, grad_out = independent_tokens(seed)
    rows = (grad_out.mT @ act).flatten(1)  # (42, O*I)
    fisher = rows.T @ rows / len(rows)
    basis = eigenbasis(act[:, 0].T @ act[:, 0] / len(act), grad_out[:, 0].T @ grad_out[:, 0] / len(act))
    gradients = normal(seed + 2, 3, 4, 5)
    dense = fisher + damping * float(fisher.diagonal().mean()) * torch.eye(20, dtype=torch.float64)
    wanted = torch.linalg.solve(dense, gradients.flatten(1).T).T.view(3, 4, 5)
    for eigenvalues in (kfac_eigenvalues(basis), squared_coordinates(act, grad_out, basis) / len(act)):
        found = precondition(gradients, basis, eigenvalues, damping=damping)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))


def test_measured_eigenvalues_are_the_diagonal_of_the_dense_matrix_in_the_basis() -> None:
    act, grad_out = normal(0, 9, 3, 5), normal(1, 9, 3, 4)  # rows of three tokens, nothing independent
    basis = eigenbasis(torch.einsum("bti,btj->ij", act, act), torch.einsum("bto,btp->op", grad_out, grad_out))
    rows = torch.einsum("bto,bti->boi", grad_out, act).flatten(1)
    turn = torch.kron(basis.vectors_out, basis.vectors_in)
    wanted = (turn.T @ (rows.T @ rows) @ turn).diagonal().view(4, 5)
    torch.testing.assert_close(squared_coordinates(act, grad_out, basis), wanted, rtol=1e-10, atol=1e-10)


def test_hand_computed_inverse() -> None:
    # A = diag(1, 4), S = (2): eigenvalues 2 and 8, mean 5; damping 0.4 adds 2: the entries are divided by 4 and 10.
    basis = eigenbasis(torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([[2.0]]))
    found = precondition(torch.tensor([[[4.0, 5.0]]]), basis, kfac_eigenvalues(basis), damping=0.4)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.5]]]))


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_damping_is_relative_so_the_loss_s_scale_only_scales_the_answer(seed: int, scale: float) -> None:
    act, grad_out = normal(seed, 8, 2, 3), normal(seed + 1, 8, 2, 4)
    a, s = torch.einsum("bti,btj->ij", act, act), torch.einsum("bto,btp->op", grad_out, grad_out)
    gradients = normal(seed + 2, 2, 4, 3)
    one, other = (eigenbasis(a, factor) for factor in (s, s * scale))
    found = precondition(gradients, other, kfac_eigenvalues(other), damping=0.1) * scale
    torch.testing.assert_close(found, precondition(gradients, one, kfac_eigenvalues(one), damping=0.1))


def test_what_has_no_inverse_is_refused() -> None:
    basis = eigenbasis(torch.zeros(2, 2), torch.zeros(1, 1))
    values = kfac_eigenvalues(basis)
    with pytest.raises(InvalidInput, match=r"no curvature.*use more rows"):
        precondition(torch.ones(1, 1, 2), basis, values, damping=0.1)
    assert not precondition(torch.zeros(1, 1, 2), basis, values, damping=0.1).any()
    with pytest.raises(InvalidSettings, match="damping must be a positive number, got 0"):
        precondition(torch.ones(1, 1, 2), basis, values, damping=0.0)
    with pytest.raises(InvalidInput, match="second moment of a layer's output gradients"):
        eigenbasis(torch.eye(2), torch.full((1, 1), float("nan")))
