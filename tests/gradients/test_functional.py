"""Gradients of a functional loss, row by row, against plain autograd on the weights themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from oracles import reference_loss
from tamis.gradients.functional import per_sample_gradients, weighted_gradient
from tamis.trajectory.causal import CausalProblem, random_state_of
from tamis.trajectory.token_rows import TokenMicro
from tamis.types import Batch
from tiny_models import FAMILIES, one_row, random_batch, tiny_model

LENGTHS = [9, 4, 12, 6]


def problem_of(model: nn.Module) -> tuple[CausalProblem, Tensor]:
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    problem = CausalProblem(model, {name: tuple(param.shape) for name, param in trained.items()})
    return problem, problem.layout.flatten(trained)


def autograd_rows(model: nn.Module, batch: Batch) -> Tensor:
    trained = [param for param in model.parameters() if param.requires_grad]
    found = []
    for row in range(len(batch.rows)):
        one = one_row(batch, row)
        grads = torch.autograd.grad(reference_loss(model, one.input_ids[0], one.supervised[0]), trained)
        found.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(found)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_rows_equal_autograd_on_the_weights(family: str, lora: bool) -> None:
    model = tiny_model(family, lora=lora)
    problem, theta = problem_of(model)
    batch = random_batch(LENGTHS)
    found, expected = per_sample_gradients(problem, theta, TokenMicro(batch=batch)), autograd_rows(model, batch)
    # Norms and softmax of these models compute in float32 whatever the dtype.
    assert float((found - expected).norm() / expected.norm()) < 2e-6
    mean = weighted_gradient(problem, theta, [TokenMicro(batch=batch)], torch.full((4,), 0.25))[1]
    assert float((found.mean(dim=0) - mean).norm() / mean.norm()) < 2e-6


def test_a_row_alone_keeps_a_last_label_that_its_mask_hides() -> None:
    """``mask = ids != pad`` hides the label that ends a row where padding is the end-of-text token."""
    model = tiny_model("llama")
    problem, theta = problem_of(model)
    whole = random_batch(LENGTHS)
    hidden = whole.attention_mask.clone()
    hidden.scatter_(1, whole.attention_mask.sum(dim=1, keepdim=True) - 1, 0)
    masked = Batch(
        rows=whole.rows, input_ids=whole.input_ids, attention_mask=hidden, supervised=whole.supervised.clone()
    )
    apart = TokenMicro(batch=masked).apart()
    assert apart is not None
    assert [one.batch.input_ids.shape[1] for one in apart] == LENGTHS
    found = per_sample_gradients(problem, theta, TokenMicro(batch=masked))
    torch.testing.assert_close(found, autograd_rows(model, whole), rtol=1e-5, atol=1e-9)


def test_gradients_of_rows_cost_as_much_as_the_batch_s_gradient() -> None:
    model = tiny_model("llama", dtype=torch.float32, lora=True, blocks=4)
    problem, theta = problem_of(model)
    micro = TokenMicro(batch=random_batch([30] * 8))
    with FlopCounterMode(display=False) as together:
        weighted_gradient(problem, theta, [micro], torch.ones(8))
    with FlopCounterMode(display=False) as apart:
        per_sample_gradients(problem, theta, micro)
    assert apart.get_total_flops() == together.get_total_flops()


def test_rows_that_share_a_draw_of_dropout_stay_together() -> None:
    model = tiny_model("gpt2", dropout=0.4)
    problem, theta = problem_of(model)
    batch = random_batch(LENGTHS)
    micro = TokenMicro(batch=batch, random_state=random_state_of(torch.device("cpu")))
    found = per_sample_gradients(problem, theta, micro)
    total = weighted_gradient(problem, theta, [micro], torch.ones(4))[1]
    assert float((found.sum(dim=0) - total).norm() / total.norm()) < 2e-6
    without = per_sample_gradients(problem, theta, TokenMicro(batch=batch))
    assert float((found - without).norm() / without.norm()) > 0.05
