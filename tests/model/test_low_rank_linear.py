"""Factored layers: the same function, gradients of the product, folders that load by name and run no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oracles import reference_gradients
from tamis.errors import InvalidInput
from tamis.gradients.jvp import gaussian_direction, hidden_tangents
from tamis.gradients.per_sample import MaterialisedGradients, per_sample_features, run_batch
from tamis.model.flops import ModelShape
from tamis.model.limits import skeleton
from tamis.model.load import ModelSettings, load_model, model_fingerprint
from tamis.model.loss import supervised_positions
from tamis.model.low_rank_linear import LowRankLinear, low_rank_layers, moved_products, put_low_rank_layers, set_space
from tamis.model.proxy_folder import ProxyLayout
from tamis.model.states import mean_by_row, supervised_states
from tamis.model.targets import coverage, gradient_layers
from tamis.projection.factorized import FactorizedProjector
from tiny_models import FAMILIES, random_batch, tiny_model
from tiny_run import byte_tokenizer, save_model


def factored(family: str, *, rank: int = 5, **options: Any) -> nn.Module:
    """Every linear layer of the blocks in random factors."""
    model = tiny_model(family, **options)
    names = {layer.name: rank for layer in gradient_layers(model)}
    put_low_rank_layers(model, names, space="product")
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in low_rank_layers(model).values():
            for param in layer.parameters():
                param.copy_(torch.randn_like(param) * 0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_product_gradients_are_autograds_with_the_targets_names_and_shapes(family: str) -> None:
    model, target = factored(family), tiny_model(family)
    layers, own = gradient_layers(model), gradient_layers(target)
    assert [(layer.name, layer.shape) for layer in layers] == [(layer.name, layer.shape) for layer in own]
    batch = random_batch([9, 5, 7])
    consumer = MaterialisedGradients(layers)
    run_batch(model, batch, layers, consumer)
    _, slow = reference_gradients(model, batch, layers)
    for row, grads in enumerate(slow):
        expected = torch.cat([grads[layer.name].flatten() for layer in layers])
        torch.testing.assert_close(consumer.grads[row], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_products_and_factors_obey_the_chain_rule(family: str) -> None:
    """grad A = grad W B^T and grad B = A^T grad W, by the same engine in its two spaces."""
    model, batch = factored(family), random_batch([6, 8])
    products = gradient_layers(model)
    whole = MaterialisedGradients(products)
    run_batch(model, batch, products, whole)
    set_space(model, "factors")
    factors = gradient_layers(model)
    assert len(factors) == 2 * len(products)
    parts = MaterialisedGradients(factors)
    run_batch(model, batch, factors, parts)
    modules, starts = low_rank_layers(model), {}
    first = 0
    for layer in factors:
        starts[layer.name] = (first, layer)
        first += layer.numel
    first = 0
    for layer in products:
        grads = whole.grads[:, first : first + layer.numel].view(-1, *layer.shape)
        first += layer.numel
        weights = grads[:, :, : layer.in_features]
        a, b = modules[layer.name].A.weight, modules[layer.name].B.weight
        for leaf, expected in (("A", weights @ b.T), ("B", a.T @ weights)):
            start, spec = starts[f"{layer.name}.{leaf}"]
            found = parts.grads[:, start : start + spec.numel].view(-1, *spec.shape)[:, :, : spec.in_features]
            torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)


def test_features_of_a_proxy_that_lost_nothing_are_the_targets() -> None:
    """Of full rank, the proxy is the target: every feature must be equal, layer by layer, under the same names."""
    target, model = tiny_model("qwen2"), tiny_model("qwen2")
    layers = gradient_layers(target)
    put_low_rank_layers(
        model, {layer.name: min(layer.out_features, layer.in_features) for layer in layers}, space="product"
    )
    modules = dict(target.named_modules())
    for name, layer in low_rank_layers(model).items():
        u, s, vh = torch.linalg.svd(modules[name].weight.detach(), full_matrices=False)
        with torch.no_grad():
            layer.A.weight.copy_(u * s.sqrt())
            layer.B.weight.copy_(s.sqrt()[:, None] * vh)
            if layer.A.bias is not None:
                layer.A.bias.copy_(modules[name].bias)
    batch, projector = random_batch([7, 9, 4]), FactorizedProjector(dim=4, seed=0)
    losses, features, _ = per_sample_features(target, batch, layers, projector)
    losses_of_proxy, of_proxy, _ = per_sample_features(model, batch, gradient_layers(model), projector)
    torch.testing.assert_close(losses_of_proxy, losses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of_proxy, features, rtol=1e-8, atol=1e-10)


def test_tangents_of_a_proxy_are_finite_differences_of_its_products() -> None:
    model, batch = factored("gpt2"), random_batch([6, 8])  # other families norm in float32: too coarse for differences
    layers = gradient_layers(model)
    direction = gaussian_direction(layers, seed=0, dtype=torch.float64)
    tangent = hidden_tangents(model, batch, layers, direction, positions="mean")
    positions, step = supervised_positions(batch), 1e-5
    states = []
    for sign in (1, -1):
        with moved_products(model, {name: sign * step * move for name, move in direction.items()}):
            states.append(mean_by_row(supervised_states(model, batch, positions), positions))
    torch.testing.assert_close(tangent, (states[0] - states[1]) / (2 * step), rtol=1e-6, atol=1e-9)


def test_every_parameter_of_a_proxy_is_accounted_for() -> None:
    model = factored("qwen2")
    found = coverage(model, gradient_layers(model))
    factors = [row for row in found.rows if row.reason == "factor of a low-rank layer"]
    assert {row.parameters.rpartition(".")[0].rpartition(".")[2] for row in factors} == {"A", "B"}
    assert found.covered == sum(p.numel() for layer in low_rank_layers(model).values() for p in layer.parameters())


def saved(folder: Path, model: Any, *, ranks: dict[str, int]) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "proxy.json").write_text(json.dumps(ProxyLayout(ranks=ranks).to_json()))
    return folder


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("gemma3", True), ("gpt2", True)])
def test_a_folder_loads_by_name_to_the_same_numbers(family: str, tied: bool, tmp_path: Path) -> None:
    model = factored(family, tied=tied, dtype=torch.float32)
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    folder = saved(tmp_path / "proxy", model, ranks=ranks)
    loaded = load_model(ModelSettings(name=str(folder), device="cpu"))
    assert loaded.description["class"].endswith("Proxy") and loaded.description["parameters"] == sum(
        p.numel() for p in model.parameters()
    )
    batch = random_batch([6, 9])
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        found = loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(found, expected)
    for name, param in model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), param), name


def test_costs_count_the_factors_and_not_the_product(tmp_path: Path) -> None:
    model = factored("llama", dtype=torch.float32, rank=3)
    folder = saved(tmp_path, model, ranks={n: m.rank for n, m in low_rank_layers(model).items()})
    shape = ModelShape.from_model(skeleton(ModelSettings(name=str(folder))))
    by_hand = sum(3 * (m.in_features + m.out_features) for m in low_rank_layers(model).values())
    assert shape.block_products == by_hand
    assert shape.gradient_numel == sum(layer.numel for layer in gradient_layers(model))
    assert shape.params == sum(p.numel() for p in model.parameters())


def test_the_layout_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = saved(tmp_path, factored("llama", dtype=torch.float32), ranks={})
    settings = ModelSettings(name=str(folder))
    before = model_fingerprint(settings)
    (folder / "proxy.json").write_text(json.dumps(ProxyLayout(ranks={}, space="factors").to_json()))
    assert model_fingerprint(settings) != before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not readable JSON"),
        ("[]", "expected format 'tamis-proxy-1', found 'list'"),
        ('{"format": "tamis-proxy-9"}', "expected format 'tamis-proxy-1', found 'tamis-proxy-9'"),
        ('{"format": "tamis-proxy-1", "space": "product", "ranks": {"x": 0}}', "a whole number above zero"),
        ('{"format": "tamis-proxy-1", "space": "other", "ranks": {}}', "must be product or factors"),
        ('{"format": "tamis-proxy-1", "space": "product", "ranks": {"no.such": 2}}', "factors of a layer 'no.such'"),
    ],
)
def test_a_broken_layout_is_an_error_that_says_what_to_do(content: str, said: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "proxy.json").write_text(content)
    with pytest.raises(InvalidInput, match=said):
        load_model(ModelSettings(name=str(folder), device="cpu"))


def test_a_layer_keeps_its_type_in_a_model_of_another() -> None:
    layer = LowRankLinear(3, 4, 2, bias=True)
    assert layer(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
