"""A linear head by ridge regression: against the normal equations, its penalty against leaving rows out one by one."""

from __future__ import annotations

import pytest
import torch

import proxy_case
from tamis.proxies import influence_scorer
from tamis.proxies.influence_scorer import fit_head, row_states


def case(rows: int = 30, size: int = 6, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, size, generator=generator) * torch.tensor([1.0, 5, 0.1, 1, 1, 1]) + 3
    scores = states @ torch.randn(size, 2, generator=generator) + noise * torch.randn(rows, 2, generator=generator)
    return states, scores


def ridge(states: torch.Tensor, scores: torch.Tensor, penalty: float, at: torch.Tensor) -> torch.Tensor:
    """The normal equations of one penalty, with an intercept that is not penalised."""
    states, scores, at = states.double(), scores.double(), at.double()
    mean, scale = states.mean(dim=0), states.std(dim=0, unbiased=False)
    z = (states - mean) / scale
    inverse = torch.linalg.inv(z.T @ z + penalty * len(z) * torch.eye(z.shape[1], dtype=z.dtype))
    return ((at - mean) / scale) @ inverse @ z.T @ (scores - scores.mean(dim=0)) + scores.mean(dim=0)


@pytest.mark.parametrize("noise", [0.01, 30.0])
def test_predictions_are_those_of_the_normal_equations(noise: float) -> None:
    states, scores = case(noise=noise)
    head = fit_head(states, scores)
    expected = ridge(states, scores, head.penalty, states)
    torch.testing.assert_close(torch.from_numpy(head.predict(states)).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_penalty_is_the_one_with_the_least_error_on_rows_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence_scorer, "_PENALTIES", (1e-4, 1e-1, 1e2))  # far apart: rescaling cannot decide
    for noise in (0.01, 30.0):
        states, scores = case(noise=noise)
        errors = {}
        for penalty in (1e-4, 1e-1, 1e2):
            missed = []
            for row in range(len(states)):
                rest = torch.arange(len(states)) != row
                missed.append(ridge(states[rest], scores[rest], penalty, states[row : row + 1])[0] - scores[row])
            errors[penalty] = float(torch.stack(missed).square().mean())
        assert fit_head(states, scores).penalty == min(errors, key=lambda penalty: errors[penalty])


def test_states_that_never_change_and_fewer_rows_than_states_are_no_trouble() -> None:
    states, scores = case(rows=4)
    states[:, 2] = 1.0
    assert torch.from_numpy(fit_head(states, scores).predict(states)).isfinite().all()


def test_states_are_means_over_positions_that_predict() -> None:
    model = proxy_case.model("llama")
    rows = proxy_case.rows(5, seed=0)
    found = row_states(model, rows, batch_tokens=20, pad_id=0)
    for index, row in enumerate(rows):
        ids = torch.from_numpy(row.tokens.input_ids.astype("int64"))[None]
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        predicting = torch.from_numpy(row.tokens.supervised[1:])
        torch.testing.assert_close(found[index], states[:-1][predicting].mean(dim=0), rtol=1e-4, atol=1e-5)
