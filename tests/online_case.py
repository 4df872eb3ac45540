"""The method's deterministic reference case: one layer (2, 3), two positions, six candidates, two target samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tamis.gradients.held import Factored, Materialised
from tamis.gradients.layers import per_sample_gradient
from tamis.gradients.parameters import ParamMatrix
from tamis.gradients.rows import RowGradients
from tamis.online.adam_state import AdamMoments
from tamis.types import LayerSpec

LAYER = LayerSpec(name="layer", out_features=2, in_features=3, has_bias=False, kind="linear")
KEEP = 3
CANDIDATES = range(6)


def factors(samples: range) -> tuple[Tensor, Tensor]:
    """``act (n, 2, 3)`` and ``grad_out (n, 2, 2)``."""
    i = torch.tensor(list(samples), dtype=torch.float64)[:, None, None]
    t = torch.arange(2, dtype=torch.float64)[None, :, None]
    act = torch.sin(1 + 0.7 * i + 1.3 * t + 0.5 * torch.arange(3, dtype=torch.float64))
    grad_out = torch.cos(0.4 + 1.1 * i + 0.6 * t + 1.7 * torch.arange(2, dtype=torch.float64))
    return act, grad_out


def gradients(samples: range) -> Tensor:
    act, grad_out = factors(samples)
    return torch.einsum("bto,bti->boi", grad_out, act)


def matrix() -> ParamMatrix:
    param = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    return ParamMatrix(name="layer", layers=(LAYER,), params=(("layer.weight", param),), transposed=False)


def rows(*, materialised: bool = False, passes: int = 1) -> RowGradients:
    found = RowGradients([matrix()])
    act, grad_out = factors(CANDIDATES)
    for a, g in zip(act.tensor_split(passes), grad_out.tensor_split(passes), strict=True):
        held = (
            Materialised(per_sample_gradient(a, g, has_bias=False)) if materialised else Factored(a, g, has_bias=False)
        )
        found.add({"layer": held}, len(a))
    return found


def target() -> dict[str, Tensor]:
    return {"layer.weight": gradients(range(100, 102)).mean(dim=0)}


def moments() -> dict[str, AdamMoments]:
    q = torch.arange(6, dtype=torch.float64).view(2, 3)
    state = AdamMoments(
        exp_avg=0.05 * torch.sin(0.3 + q),
        exp_avg_sq=0.001 * (1.2 + torch.sin(0.9 * q)) ** 2,
        step=4,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        rate=1.0,
        largest_exp_avg_sq=None,
    )
    return {"layer.weight": state}


def mean_gradient() -> dict[str, Tensor]:
    return {"layer.weight": gradients(CANDIDATES).mean(dim=0)}
