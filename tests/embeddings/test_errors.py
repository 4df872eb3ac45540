"""Error embeddings against autograd through the unbatched model, one row at a time."""

import pytest
import torch
from torch import nn

from tamis.embeddings import ErrorMean, ErrorOuter, HiddenError
from tamis.errors import InvalidSettings
from tamis.model.blocks import first_blocks
from tamis.model.targets import output_embeddings
from tiny_models import DECODERS, one_row, random_batch, tiny_model

TOLERANCE = 2e-6  # unit rows in float32, from models parts of which compute in float32


def states_and_errors(model, alone, depth):
    """``h_t`` and ``delta_t`` of one unpadded row: what the head reads, and autograd's gradient of the token losses."""
    shallow = model if depth is None else first_blocks(model, depth)
    caught = []

    def catch(module, args):
        caught.append(args[0].detach().requires_grad_())
        return (caught[0], *args[1:])

    handle = output_embeddings(shallow).register_forward_pre_hook(catch)
    logits = shallow(input_ids=alone.input_ids, use_cache=False).logits[0]
    handle.remove()
    labels = alone.supervised[0, 1:]
    loss = nn.functional.cross_entropy(logits[:-1][labels], alone.input_ids[0, 1:][labels], reduction="sum")
    (grad,) = torch.autograd.grad(loss, caught)
    return caught[0].detach()[0, :-1][labels], grad[0, :-1][labels]


def expected_rows(model, batch, depth, combine):
    rows = torch.stack(
        [combine(*states_and_errors(model, one_row(batch, row), depth)).flatten() for row in range(len(batch.rows))]
    )
    return (rows / rows.norm(dim=1, keepdim=True)).float()


CASES = [(family, False, depth) for family in DECODERS for depth in (None, 0, 1)] + [("llama", True, None)]


@pytest.mark.parametrize(("family", "lora", "depth"), CASES)
def test_error_is_the_mean_gradient_by_the_state(family, lora, depth):
    model, batch = tiny_model(family, lora=lora), random_batch([6, 9, 2])
    found = ErrorMean(depth=depth).start(model)(batch)["embedding"]
    expected = expected_rows(model, batch, depth, lambda states, errors: errors.mean(dim=0))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "lora", "depth"), CASES)
def test_error_outer_is_the_projected_mean_of_outer_products(family, lora, depth):
    model, batch = tiny_model(family, lora=lora), random_batch([6, 9, 2])
    embedding = ErrorOuter(depth=depth, side=5, seed=3)
    left, right = embedding.projection("errors", 16), embedding.projection("states", 16)

    def combine(states, errors):
        return sum(torch.outer(left.T @ e, right.T @ h) for h, e in zip(states, errors, strict=True)) / len(states)

    found = embedding.start(model)(batch)["embedding"]
    torch.testing.assert_close(found, expected_rows(model, batch, depth, combine), rtol=0, atol=TOLERANCE)


def test_unprojected_error_outer_is_the_gradient_of_the_heads_matrix_carried_back():
    # d loss / d W = sum_t (p_t - y_t) h_t^T, and delta_t = W^T (p_t - y_t): so the outer product is W^T (d loss / d W).
    model, batch = tiny_model("llama"), random_batch([7])
    logits = model(input_ids=batch.input_ids).logits[0]
    labels = batch.supervised[0, 1:]
    loss = nn.functional.cross_entropy(logits[:-1][labels], batch.input_ids[0, 1:][labels])
    (grad,) = torch.autograd.grad(loss, model.lm_head.weight)
    expected = (model.lm_head.weight.T @ grad).detach()
    found = ErrorOuter(side=16).start(model)(batch)
    torch.testing.assert_close(found["embedding"][0], (expected / expected.norm()).flatten().float())
    assert float(found["norm"]) == pytest.approx(float(expected.norm()), rel=1e-5)


def test_projections_keep_inner_products_on_average():
    a, b = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for seed in range(400):
        left = ErrorOuter(side=8, seed=seed).projection("errors", 40)
        found.append(float((a @ left) @ (b @ left)))
    draws = torch.tensor(found)
    assert abs(float(draws.mean()) - float(a @ b)) < 4 * float(draws.std()) / 20  # four standard errors


@pytest.mark.parametrize("depth", [None, 1])
def test_halves_of_hidden_error_weigh_the_same(depth):
    model, batch = tiny_model("qwen2"), random_batch([6, 9, 2])

    def combine(states, errors):
        states, errors = states.mean(dim=0), errors.mean(dim=0)
        return torch.cat([states / states.norm(), errors / errors.norm()])

    found = HiddenError(depth=depth).start(model)(batch)["embedding"]
    torch.testing.assert_close(found, expected_rows(model, batch, depth, combine), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[:, :16].norm(dim=1), torch.full((3,), 0.5**0.5))


def test_a_side_of_nothing_is_refused():
    with pytest.raises(InvalidSettings, match="side must be at least 1, got 0"):
        ErrorOuter(side=0)
