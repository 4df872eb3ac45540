"""Second moments of projected updates: with nothing projected they are the optimizer's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from online_case import LAYER, rows, target
from tamis.errors import InvalidInput, Unsupported
from tamis.gradients.parameters import ParamMatrix
from tamis.online.adam_state import AdamMoments, read_adam
from tamis.online.measure import measure_alignments
from tamis.online.shadow import ShadowMoments
from tamis.projection.factorized import FactorizedProjector

WHOLE = FactorizedProjector(dim=64, seed=0)


def trained(updates: int, **group: object) -> tuple[ShadowMoments, dict[str, AdamMoments]]:
    """The case's layer beside another one in a group of its own, after some updates that both saw."""
    param, other = (nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [other], "lr": 0.1}, {"params": [param], "lr": 0.1, **group}])
    named = {"layer.weight": param, "other.weight": other}
    matrices = [
        ParamMatrix(
            name=name.split(".")[0], layers=(replace(LAYER, name=name.split(".")[0]),), params=((name, p),),
            transposed=False,
        )
        for name, p in named.items()
    ]  # fmt: skip
    shadow = ShadowMoments(WHOLE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        for p in named.values():
            p.grad = torch.randn(2, 3, dtype=torch.float64, generator=generator)
        gradient = {name: p.grad for name, p in named.items() if p.grad is not None}
        shadow.update(matrices, gradient, read_adam(optimizer, named))
        optimizer.step()
    return shadow, read_adam(optimizer, named)


@pytest.mark.parametrize("group", [{}, {"betas": (0.7, 0.9), "eps": 1e-3, "lr": 0.02}])
def test_unprojected_they_give_the_alignments_of_the_exact_form_in_every_group(group: dict[str, object]) -> None:
    shadow, moments = trained(4, **group)
    expected = measure_alignments("adam", rows(), target(), moments)
    torch.testing.assert_close(shadow.alignments(rows(), target(), moments), expected, rtol=1e-9, atol=0)


def test_a_weight_and_a_bias_with_other_settings_are_refused() -> None:
    shadow, moments = trained(1)
    weight, bias = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((2, 3), (2,)))
    both = ParamMatrix(
        name="layer", layers=(replace(LAYER, has_bias=True),), params=(("w", weight), ("b", bias)), transposed=False
    )
    state = moments["layer.weight"]
    with pytest.raises(Unsupported, match="weight and bias of 'layer' have other betas"):
        shadow.update([both], {"w": weight, "b": bias}, {"w": state, "b": replace(state, beta2=0.5)})


def test_without_an_update_the_error_says_what_is_missing() -> None:
    _, moments = trained(1)
    with pytest.raises(InvalidInput, match=r"has seen no update yet.*tamis_selection\.safetensors"):
        ShadowMoments(WHOLE).alignments(rows(), target(), moments)


def test_numbers_that_never_had_a_gradient_count_for_nothing() -> None:
    shadow, moments = trained(3)
    shadow.moments["layer"] = shadow.moments["layer"].clone()
    shadow.moments["layer"][0] = 0.0
    found = shadow.alignments(rows(), target(), moments)
    assert float(found.abs().max()) < 1e4  # 1/eps is 1e8
