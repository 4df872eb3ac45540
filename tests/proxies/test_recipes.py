"""Every choice of a recipe against dense linear algebra: form, weighting, and damping, given or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tamis.proxies.decompose import factor_layer
from tamis.proxies.probes import LayerProbes
from tamis.settings.proxy import Recipe
from tamis.types import LayerSpec

OUT, IN, RANK = 8, 10, 3
FEW, MANY = 5, 40  # tokens: fewer than features on both sides, and more
DAMPING = 0.1


def case(tokens: int, *, size: int | None = None) -> tuple[LayerSpec, Tensor, LayerProbes]:
    """A layer, its matrix, and probes of unequal directions whose gradients are as small as a model's."""
    rows, columns = size or OUT, size or IN
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    probes = LayerProbes(
        inputs=draw(tokens, columns) * torch.linspace(0.5, 4, columns, dtype=torch.float64),
        grads=1e-2 * draw(tokens, rows) * torch.linspace(0.5, 4, rows, dtype=torch.float64),
    )
    layer = LayerSpec(name="layer", out_features=rows, in_features=columns, has_bias=False, kind="linear")
    return layer, draw(rows, columns), probes


def product(tokens: int, **choices: Any) -> Tensor:
    """``A B`` as the library finds it, with the same damping on both sides unless told otherwise."""
    layer, weight, probes = case(tokens)
    recipe = Recipe(**{"damping_input": DAMPING, "damping_output": DAMPING, **choices})
    factors, _ = factor_layer(layer, weight, probes, recipe=recipe, rank=RANK, seed=0)
    return factors.left @ factors.right


def best_product(tokens: int, *, power: float, absolute: float | None = None, is_core: bool = False) -> Tensor:
    """The best product of rank 3 by ``|P_d (W - A B) P_h|`` with ``P = C'^power``, formed densely on both sides.

    In the core form only the directions that the tokens span are there, to weigh and to return to.
    """
    _, weight, probes = case(tokens)
    weighing, undoing = [], []
    for sampled in (probes.grads, probes.inputs):
        moment = sampled.T @ sampled / len(sampled)
        damping = DAMPING * float(moment.trace()) / len(moment) if absolute is None else absolute
        values, basis = torch.linalg.eigh(moment)
        spanned = values > 1e-9 * values.max() if is_core else torch.ones(len(values), dtype=torch.bool)
        values, basis = (values + damping)[spanned], basis[:, spanned]
        weighing.append(basis @ torch.diag(values**power) @ basis.T)
        undoing.append(basis @ torch.diag(values**-power) @ basis.T)
    u, s, vh = torch.linalg.svd(weighing[0] @ weight @ weighing[1])
    return undoing[0] @ u[:, :RANK] @ torch.diag(s[:RANK]) @ vh[:RANK] @ undoing[1]


def apart(x: Tensor, y: Tensor) -> float:
    """The length of their difference as a share of the first."""
    return float((x - y).norm() / x.norm())


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("form", ["probe", "dense", "core"])
def test_every_form_is_its_own_best_product(form: str, tokens: int) -> None:
    expected = best_product(tokens, power=0.5, is_core=form == "core")
    torch.testing.assert_close(product(tokens, form=form), expected, rtol=1e-8, atol=1e-10)


def test_with_fewer_tokens_than_features_the_core_form_is_another_proxy() -> None:
    assert apart(product(FEW, form="core"), product(FEW, form="probe")) > 0.05
    assert apart(product(MANY, form="core"), product(MANY, form="probe")) < 1e-8


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_absolute_damping_adds_that_number_to_both_moments(tokens: int) -> None:
    found = product(tokens, damping="absolute", damping_input=1e-3, damping_output=1e-3)
    expected = best_product(tokens, power=0.5, absolute=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert apart(found, product(tokens, damping_input=1e-3, damping_output=1e-3)) > 0.01


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_inverse_weighting_takes_inverse_roots_on_both_sides(tokens: int) -> None:
    expected = best_product(tokens, power=-0.5)
    torch.testing.assert_close(product(tokens, weighting="inverse"), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("tokens", "damping"), [(40, 0.01), (39, 0.1), (10, 0.1), (9, 1.0)])
def test_damping_follows_how_many_tokens_there_are_for_each_feature(tokens: int, damping: float) -> None:
    """Ten features: four tokens for each, one for each, and fewer."""
    layer, weight, probes = case(tokens, size=10)
    found, expected = (
        factor_layer(layer, weight, probes, recipe=recipe, rank=RANK, seed=0)[0]
        for recipe in (Recipe(), Recipe(damping_input=damping))
    )
    assert torch.equal(found.left, expected.left) and torch.equal(found.right, expected.right)
