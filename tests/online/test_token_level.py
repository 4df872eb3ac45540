"""Token-level similarities against materialised gradients of every position, whole and projected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from online_steps import CANDIDATES, TARGET, optimizer_of, row_loss
from tamis.errors import InvalidSettings
from tamis.gradients.parameters import ParamMatrix, param_matrices
from tamis.model.trainable import trainable_layers
from tamis.online import FilterThenWeight
from tamis.online.adam_state import read_adam
from tamis.online.methods.choice import Choice, Evidence, everything
from tamis.online.step import OnlineStep
from tamis.projection.factorized import FactorizedProjector
from tamis.types import Batch
from tiny_models import tiny_model


def position_gradients(model: nn.Module, matrices: tuple[ParamMatrix, ...], batch: Batch) -> dict[str, Tensor]:
    """``(rows, positions, O, I)`` of every linear layer: autograd's output gradient times input, token by token."""
    found: dict[str, list[Tensor]] = {matrix.name: [] for matrix in matrices}
    for row in range(len(batch.rows)):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        names = {id(model.get_submodule(matrix.name)): matrix.name for matrix in matrices}

        def see(module: nn.Module, args: tuple[Tensor], out: Tensor, seen: Any = seen, names: Any = names) -> None:
            seen[names[id(module)]] = (args[0].detach(), out)

        handles = [model.get_submodule(matrix.name).register_forward_hook(see) for matrix in matrices]
        loss = row_loss(model, batch, row)
        for handle in handles:
            handle.remove()
        grads = torch.autograd.grad(loss, [out for _, out in seen.values()])
        for (name, (act, _)), grad in zip(seen.items(), grads, strict=True):
            each = torch.einsum("to,ti->toi", grad[0], act[0])
            found[name].append(torch.nn.functional.pad(each, (0, 0, 0, 0, 0, 9 - len(each))))
    return {name: torch.stack(rows) for name, rows in found.items()}


class Seeing:
    """The method, and what it was shown."""

    def __init__(self, method: FilterThenWeight) -> None:
        self.method, self.seen = method, list[Evidence]()

    def __getattr__(self, name: str) -> object:
        return getattr(self.method, name)

    def choose(self, evidence: Evidence) -> Choice:
        self.seen.append(evidence)
        return everything(len(evidence.alignments))


@pytest.mark.parametrize("alignment", ["raw", "adam", "projected"])
def test_alignments_and_interactions_are_sums_over_equal_positions_alone(alignment: str) -> None:
    """GPT-2 with an adapter, in float64: linear layers only. The sequence-level numbers are others."""
    model = tiny_model("gpt2", lora=True)
    optimizer = optimizer_of(model)
    matrices = param_matrices(model, trainable_layers(model))
    dim = 4 if alignment == "projected" else None
    method = FilterThenWeight.paper(keep=2, oversample=3, token_level=True, alignment=alignment, projection_dim=dim)
    seeing = Seeing(method)
    step = OnlineStep(model, seeing)  # type: ignore[arg-type]
    cold = step.propose([CANDIDATES], [], optimizer, cold=True)
    update = {name: grad / cold.divisor for name, grad in cold.gradient.items()}
    step.observe(update, optimizer)
    step.propose([CANDIDATES], [TARGET], optimizer)

    moments = read_adam(optimizer, step.params)
    rows, target = (position_gradients(model, matrices, batch) for batch in (CANDIDATES, TARGET))
    b, gram, whole = torch.zeros(6).double(), torch.zeros(6, 6).double(), torch.zeros(6).double()
    projector = FactorizedProjector(dim=dim or 1 << 20, seed=0)
    for matrix in matrices:
        left, right = projector.sides(matrix.layers[0], "cpu", torch.float32)

        def sketch(grads: Tensor, left: Tensor | None = left, right: Tensor | None = right) -> Tensor:
            grads = grads if right is None else grads @ right.double()
            return grads if left is None else left.double().T @ grads

        own, goal = sketch(rows[matrix.name]), sketch(target[matrix.name]).mean(dim=0)  # (6, T, O, I), (T, O, I)
        scale = torch.ones_like(goal[0])
        (name, _), *_ = matrix.params
        if alignment == "adam":
            scale = matrix.joined({name: moments[name].diagonal()})
        if alignment == "projected":  # one update was seen: v = 0.001 g² over 1 - 0.999, m's share 0.1 over 1 - 0.9²
            grad = sketch(matrix.joined(update))
            corrected = grad.square()
            scale = torch.where(corrected > 0, 0.1 / 0.19 / (corrected.sqrt() + 1e-8), torch.zeros_like(grad))
        b += torch.einsum("ntoi,toi->n", own, goal * scale)
        gram += torch.einsum("ntoi,mtoi->nm", own, own)
        whole += torch.einsum("noi,oi->n", own.sum(dim=1), goal.sum(dim=0) * scale)
    (evidence,) = seeing.seen
    np.testing.assert_allclose(evidence.gram, gram.numpy(), rtol=1e-6 if dim else 1e-9)
    assert (b - whole).abs().max() > 0.1 * b.abs().max()
    np.testing.assert_allclose(evidence.alignments, b.numpy(), rtol=1e-5 if dim else 1e-9)


def test_forms_without_positions_are_refused() -> None:
    for changes in ({"alignment": "secant"}, {"interactions": "metric"}):
        with pytest.raises(InvalidSettings, match=r"token_level=True with alignment=.*interactions='raw'"):
            FilterThenWeight.paper(token_level=True, **changes)
