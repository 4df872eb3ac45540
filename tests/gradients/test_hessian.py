"""Hessian products against the dense Hessian of torch.func, central differences, and hand-made directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from oracles import reference_loss
from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.gradients.hessian import attention_for_hessians, hessian_products
from tamis.model.loss import per_sample_losses, twice_differentiable_losses
from tamis.model.targets import gradient_layers
from tamis.types import Batch, LayerSpec
from tiny_models import FAMILIES, padded_by, random_batch, tiny_model

# Norms and rotary tables of these models compute in float32 whatever the dtype, so no float64 digits are to be had.
ROUNDING = 2e-4


def weighted_gradient(model: nn.Module, batch: Batch, coefficients: Tensor, layers: list[LayerSpec]) -> list[Tensor]:
    """Gradient of the weighted loss, row by row and unpadded, by its own loss; as matrices."""
    modules = dict(model.named_modules())
    params = [p for layer in layers for p in (modules[layer.name].weight, *_bias(modules, layer))]
    total = sum(
        c * reference_loss(model, ids[: int(mask.sum())], supervised[: int(mask.sum())])
        for c, ids, mask, supervised in zip(
            coefficients, batch.input_ids, batch.attention_mask, batch.supervised, strict=True
        )
    )
    found = iter(torch.autograd.grad(total, params))
    matrices = []
    for layer in layers:
        matrix = next(found)
        matrix = matrix.T if layer.kind == "conv1d" else matrix
        matrices.append(torch.cat([matrix, next(found)[:, None]], dim=1) if layer.has_bias else matrix)
    return matrices


def _bias(modules: dict[str, nn.Module], layer: LayerSpec) -> list[Tensor]:
    return [modules[layer.name].bias] if layer.has_bias else []


def move(model: nn.Module, layers: list[LayerSpec], directions: dict[str, Tensor], step: float) -> None:
    modules = dict(model.named_modules())
    with torch.no_grad():
        for layer in layers:
            matrix = directions[layer.name][0]
            weight = matrix[:, : layer.in_features]
            modules[layer.name].weight += step * (weight.T if layer.kind == "conv1d" else weight)
            if layer.has_bias:
                modules[layer.name].bias += step * matrix[:, -1]


def some_directions(layers: list[LayerSpec], count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.name: torch.randn(count, *layer.shape, generator=generator, dtype=torch.float64) * 0.1 for layer in layers
    }


def inner(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    return sum(torch.einsum("ioj,koj->ik", a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_products_are_the_derivative_of_the_gradient_along_the_direction(family: str, lora: bool) -> None:
    model = tiny_model(family, lora=lora)
    layers = list(gradient_layers(model))
    batch, coefficients = random_batch([7, 12, 9]), torch.tensor([0.5, 0.2, 1.3], dtype=torch.float64)
    directions = some_directions(layers, 1)
    found = hessian_products(model, [(batch, coefficients)], layers, directions)
    step = 2e-3
    move(model, layers, directions, step)
    ahead = weighted_gradient(model, batch, coefficients, layers)
    move(model, layers, directions, -2 * step)
    behind = weighted_gradient(model, batch, coefficients, layers)
    got = torch.cat([found[layer.name].flatten() for layer in layers])
    wanted = torch.cat([((a - b) / (2 * step)).flatten() for a, b in zip(ahead, behind, strict=True)])
    # Shorter steps drown in the float32 rounding of the gradients, longer ones in third derivatives.
    assert float((got - wanted).norm() / wanted.norm()) < 2e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_products_are_those_of_the_dense_hessian(family: str) -> None:
    """One layer, whose whole Hessian torch.func can write down."""
    model = tiny_model(family, blocks=1)
    layers = [max(gradient_layers(model), key=lambda layer: layer.has_bias)]
    layer = layers[0]
    batch, coefficients = random_batch([6, 9]), torch.tensor([0.4, 1.0], dtype=torch.float64)
    module = dict(model.named_modules())[layer.name]

    def loss(flat: Tensor) -> Tensor:
        matrix = flat.view(layer.shape)
        weight = matrix[:, : layer.in_features]
        values = {f"{layer.name}.weight": weight.T if layer.kind == "conv1d" else weight}
        if layer.has_bias:
            values[f"{layer.name}.bias"] = matrix[:, -1]
        call = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        model.config._attn_implementation = "eager"
        logits = torch.func.functional_call(model, values, (), call).logits[:, :-1].double()
        token = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none"
        ).view(len(batch.rows), -1)
        mask = batch.supervised[:, 1:].double()
        return ((token * mask).sum(1) / mask.sum(1) * coefficients).sum()

    weight = module.weight.detach()
    flat = weight.T if layer.kind == "conv1d" else weight
    if layer.has_bias:
        flat = torch.cat([flat, module.bias.detach()[:, None]], dim=1)
    hessian = torch.func.hessian(loss)(flat.flatten())
    directions = some_directions(layers, 3)
    found = hessian_products(model, [(batch, coefficients)], layers, directions)[layer.name].flatten(1)
    wanted = (directions[layer.name].flatten(1) @ hessian.T).detach()
    torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING * float(wanted.abs().max()))


def test_hessians_are_symmetric_and_add_up_over_batches_whatever_the_padding() -> None:
    model = tiny_model("llama")
    layers = list(gradient_layers(model))
    directions = some_directions(layers, 3)
    batch, c = random_batch([7, 12, 9]), torch.tensor([0.5, 0.2, 1.3], dtype=torch.float64)
    whole = hessian_products(model, [(batch, c)], layers, directions)
    products = inner(directions, whole)
    torch.testing.assert_close(products, products.T, rtol=0, atol=ROUNDING * float(products.abs().max()))

    def part(rows: slice) -> tuple[Batch, Tensor]:
        few = Batch(
            rows=batch.rows[rows],
            input_ids=batch.input_ids[rows],
            attention_mask=batch.attention_mask[rows],
            supervised=batch.supervised[rows],
        )
        return padded_by(few, 5), c[rows]

    split = hessian_products(model, [part(slice(0, 2)), part(slice(2, 3))], layers, directions)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=0, atol=ROUNDING * float(whole[name].abs().max()))


def test_the_loss_is_the_one_of_every_other_pass_and_the_model_is_left_alone() -> None:
    model = tiny_model("qwen2", lora=True).train()
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    batch = random_batch([5, 8])
    with torch.no_grad():
        torch.testing.assert_close(twice_differentiable_losses(model, batch), per_sample_losses(model, batch))
    layers = list(gradient_layers(model))
    hessian_products(model, [(batch, torch.ones(2))], layers, some_directions(layers, 1))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_what_cannot_be_differentiated_twice_is_refused() -> None:
    model = tiny_model("llama")
    layers = list(gradient_layers(model))
    with pytest.raises(InvalidInput, match="at least one row"):
        hessian_products(model, [], layers, some_directions(layers, 1))
    assert "plain kernel (math)" in attention_for_hessians(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(Unsupported, match="'flash_attention_2' cannot be differentiated twice"):
        attention_for_hessians(model)
    half = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(InvalidSettings, match="--dtype float32"):
        hessian_products(half, [(random_batch([5]), torch.ones(1))], layers, some_directions(layers, 1))
