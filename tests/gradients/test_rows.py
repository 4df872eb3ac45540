"""Per-sample gradients of every trainable parameter against plain autograd, one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from oracles import reference_loss
from tamis.errors import Unsupported
from tamis.gradients.parameters import param_matrices
from tamis.gradients.rows import RowGradients, hold_gradients, summed_gradient
from tamis.model.trainable import trainable_layers
from tamis.types import Batch
from tiny_models import FAMILIES, one_row, permuted, random_batch, tiny_model

LENGTHS = (9, 4, 7, 6)
# The models' norms and softmax compute in float32 even in a float64 model; one rounding of that size per layer.
TOLERANCE = 2e-6


def autograd_rows(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """``(n, *shape)`` per trainable parameter: backward passes on the weights themselves."""
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in trainable}
    for row in range(len(batch.rows)):
        one = one_row(batch, row)
        loss = reference_loss(model, one.input_ids[0], one.supervised[0])
        grads = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        for (name, param), grad in zip(trainable.items(), grads, strict=True):
            found[name].append(torch.zeros_like(param) if grad is None else grad)
    return {name: torch.stack(rows) for name, rows in found.items()}


def close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).norm() <= TOLERANCE * expected.norm() + 1e-12


def rows_of(model: nn.Module, batch: Batch, *, passes: int = 1, keep_factors: bool = False) -> RowGradients:
    held = RowGradients(param_matrices(model, trainable_layers(model)))
    for part in torch.arange(len(batch.rows)).tensor_split(passes):
        hold_gradients(model, permuted(batch, part.tolist()), held, keep_factors=keep_factors)
    return held


def test_a_bias_of_a_tied_head_is_a_column_that_looking_up_leaves_alone() -> None:
    model = tiny_model("gpt2", tied=True)
    head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, dtype=torch.float64)
    head.weight = model.transformer.wte.weight
    model.lm_head = head
    batch = random_batch(LENGTHS, seed=3)
    expected = autograd_rows(model, batch)
    held = rows_of(model, batch, passes=2)
    weights = torch.tensor([0.5, 0.0, 2.0, -1.0], dtype=torch.float64)
    got = held.weighted(weights)
    assert "lm_head.bias" in got and got.keys() == expected.keys()
    for name, grad in got.items():
        close(grad, torch.tensordot(weights, expected[name], dims=1))
    direction = {name: grads.mean(dim=0) for name, grads in expected.items()}
    dots = held.dots(lambda matrix: matrix.joined(direction))
    close(dots, sum((expected[n] * direction[n]).flatten(1).sum(dim=1) for n in expected))  # type: ignore[arg-type]
    (shared,) = [matrix for matrix in held.matrices if len(matrix.layers) == 2]
    whole = held.rows_of(shared, 0, shared.shape[0])
    close(held.sketches(shared, None, None), whole.flatten(1))


CASES = [(family, tied, lora) for family in FAMILIES for tied, lora in ((False, False), (True, False), (False, True))]


@pytest.mark.parametrize(("family", "tied", "lora"), CASES)
@pytest.mark.parametrize("keep_factors", [False, True])
def test_weighted_gradient_of_every_parameter_is_autograds(
    family: str, tied: bool, lora: bool, keep_factors: bool
) -> None:
    model = tiny_model(family, tied=tied, lora=lora)
    batch = random_batch(LENGTHS, seed=3)
    expected = autograd_rows(model, batch)
    weights = torch.tensor([0.5, 0.0, 2.0, -1.0], dtype=torch.float64)
    got = rows_of(model, batch, passes=2, keep_factors=keep_factors).weighted(weights)
    assert got.keys() == expected.keys()  # no parameter is left out
    assert all(grad.is_contiguous() for grad in got.values())  # fused optimizers take it for granted
    for name, rows in expected.items():
        assert got[name].shape == rows.shape[1:]
        close(got[name], torch.tensordot(weights, rows, dims=1))


@pytest.mark.parametrize(("family", "tied", "lora"), CASES)
def test_inner_products_rows_and_sketches_are_those_of_the_gradients_themselves(
    family: str, tied: bool, lora: bool
) -> None:
    model = tiny_model(family, tied=tied, lora=lora)
    batch = random_batch(LENGTHS, seed=5)
    expected = autograd_rows(model, batch)
    generator = torch.Generator().manual_seed(0)
    directions = {
        name: torch.randn(rows.shape[1:], generator=generator, dtype=torch.float64) for name, rows in expected.items()
    }
    for keep_factors in (False, True):
        held = rows_of(model, batch, passes=2, keep_factors=keep_factors)
        close(
            held.dots(lambda matrix: matrix.joined(directions)),
            sum((rows * directions[name]).flatten(1).sum(1) for name, rows in expected.items()),
        )
        for matrix in held.matrices:
            whole = torch.stack(
                [matrix.joined({name: expected[name][i] for name, _ in matrix.params}) for i in range(len(LENGTHS))]
            )
            first, stop = matrix.shape[0] // 3, matrix.shape[0] // 3 + max(1, matrix.shape[0] // 2)
            close(held.rows_of(matrix, first, stop), whole[:, first:stop])
            left = torch.randn(matrix.shape[0], 3, generator=generator, dtype=torch.float64)
            right = torch.randn(matrix.shape[1], 2, generator=generator, dtype=torch.float64)
            for a, b in ((left, right), (None, right), (left, None)):
                sketch = whole if a is None else a.T @ whole
                sketch = sketch if b is None else sketch @ b
                close(held.sketches(matrix, a, b), sketch.flatten(1))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    batch = random_batch(LENGTHS, seed=5)
    plain, checkpointed = (tiny_model(family, tied=True) for _ in range(2))
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ones = torch.ones(len(LENGTHS), dtype=torch.float64)
    expected = rows_of(plain, batch).weighted(ones)
    for name, grad in rows_of(checkpointed.train(), batch).weighted(ones).items():
        close(grad, expected[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_summing_as_they_come_equals_keeping_them(family: str) -> None:
    model = tiny_model(family, tied=True)
    batch = random_batch(LENGTHS, seed=2)
    weights = torch.tensor([0.25, 1.0, 0.0, 2.0], dtype=torch.float64)
    kept = rows_of(model, batch).weighted(weights)
    parts = [(permuted(batch, [0, 1]), weights[:2]), (permuted(batch, [2, 3]), weights[2:])]
    summed, losses = summed_gradient(model, param_matrices(model, trainable_layers(model)), parts)
    assert losses.shape == (4,)
    for name, grad in kept.items():
        close(summed[name], grad)


def test_a_row_that_is_not_finite_spoils_only_itself() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    batch = random_batch(LENGTHS, seed=1)
    spoiled = torch.tensor([1.0, float("nan"), 1.0, 1.0])[:, None, None]
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * spoiled)
    held = RowGradients(param_matrices(model, trainable_layers(model)))
    losses = hold_gradients(model, batch, held)
    assert torch.isfinite(losses).tolist() == [True, False, True, True]
    for grad in held.weighted(torch.tensor([1.0, 0.0, 1.0, 1.0])).values():
        assert torch.isfinite(grad).all()


def test_small_layers_are_held_as_matrices_and_large_ones_as_factors() -> None:
    batch = random_batch((9, 9))
    lora, full = tiny_model("llama", lora=True), tiny_model("llama")
    kinds = {type(held).__name__ for held in rows_of(lora, batch)._passes[0].values()}
    assert kinds == {"Materialised"}
    assert {"Materialised", "Factored", "Lookups"} == {
        type(held).__name__ for held in rows_of(full, batch)._passes[0].values()
    }


def test_matrices_give_their_parameters_back() -> None:
    for family in FAMILIES:
        model = tiny_model(family)
        params = {name: param.detach() for name, param in model.named_parameters()}
        seen: set[str] = set()
        for matrix in param_matrices(model, trainable_layers(model)):
            joined = matrix.joined(params)
            assert joined.shape == matrix.shape
            back = matrix.split(joined)
            for name, tensor in back.items():
                torch.testing.assert_close(tensor, params[name], rtol=0, atol=0)
            assert not seen & back.keys()
            seen |= back.keys()
        assert seen == params.keys()


def test_parameters_that_cannot_be_told_apart_by_rows_are_refused_by_name() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.register_parameter("gate", nn.Parameter(torch.zeros(4)))
    with pytest.raises(Unsupported, match=r"'model\.layers\.0\.self_attn\.gate'.*freeze it"):
        trainable_layers(model)


def test_a_parameter_whose_module_is_never_called_is_refused_when_the_model_runs() -> None:
    model = tiny_model("llama")
    model.spare = nn.Linear(3, 3).double()
    with pytest.raises(Unsupported, match="'spare' was never called"):
        rows_of(model, random_batch((5, 4)))


def test_a_trained_module_with_a_second_input_is_refused() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16, dtype=torch.float64))

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return self.weight * x if gate is None else self.weight * x * gate

    model = tiny_model("llama")
    gated = Gated()
    model.model.layers[0].input_layernorm = gated
    gated.register_forward_pre_hook(lambda module, args: (*args, torch.ones_like(args[0])))
    with pytest.raises(Unsupported, match="more than one tensor"):
        rows_of(model, random_batch((5, 4)))


def test_a_tied_matrix_is_one_matrix_of_two_layers() -> None:
    tied = [m for m in param_matrices(*_with_layers(tiny_model("llama", tied=True))) if len(m.layers) == 2]
    assert [{layer.kind for layer in m.layers} for m in tied] == [{"embedding", "head"}]
    assert [name for name, _ in tied[0].params] == ["model.embed_tokens.weight"]


def _with_layers(model: nn.Module) -> tuple[nn.Module, object]:
    return model, trainable_layers(model)
