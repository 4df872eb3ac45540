"""What the way back over an update costs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tamis.gradients.functional import Curvature, products, weighted_gradient
from tamis.trajectory.adjoint import steps_back
from tamis.trajectory.causal import CausalProblem, TokenMicro
from tiny_models import random_batch, tiny_model


@pytest.mark.parametrize("curvature", ["exact", "ggn", "fisher", "none"])
def test_several_final_values_share_one_step_s_worth_of_the_way_back(curvature: Curvature) -> None:
    model = tiny_model("llama", dtype=torch.float32, lora=True, blocks=4)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    problem = CausalProblem(model, {name: tuple(param.shape) for name, param in trained.items()})
    theta = torch.cat([param.detach().flatten() for param in trained.values()])
    micros, weights = [TokenMicro(batch=random_batch([30] * 4))], torch.full((4,), 0.25)

    def operations(values: int) -> float:
        with FlopCounterMode(display=False) as counter:
            products(problem, theta, micros, weights, torch.randn(values, len(theta)), curvature)
        return counter.get_total_flops()

    with FlopCounterMode(display=False) as counter:
        weighted_gradient(problem, theta, micros, weights)
    step = counter.get_total_flops()
    one, two, four = (operations(values) for values in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-6)
    assert (one - (two - one)) / step == pytest.approx(1, rel=0.05)  # what is shared: forward, and back with a graph
    assert steps_back(curvature, values=4) - steps_back(curvature) == 3 * (steps_back(curvature) - 1)
