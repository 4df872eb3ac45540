"""Second moments of projected updates, as *Filter-then-Weight* published them (section 3.4): an ablation.

Adam's own ``v`` cannot be projected, so the paper keeps a second one, of the squares of projected gradients. The exact
``D`` on the unprojected target, which is the default, needs none of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.gradients.layers import inner_products
from tamis.gradients.parameters import ParamMatrix
from tamis.gradients.rows import RowGradients
from tamis.maths.adam import preconditioner
from tamis.projection.factorized import FactorizedProjector

__all__ = ["ShadowMoments"]


class ShadowMoments:
    """Running second moments of the sketches of every update's gradient, by matrix."""

    def __init__(self, projector: FactorizedProjector, *, beta1: float, beta2: float, eps: float) -> None:
        self._projector, self._beta1, self._beta2, self._eps = projector, beta1, beta2, eps
        self.step = 0
        self.moments: dict[str, Tensor] = {}

    def update(self, matrices: Sequence[ParamMatrix], gradient: Mapping[str, Tensor]) -> None:
        """Take in the gradient of the update about to be made."""
        for matrix in matrices:
            sketch = self._sketch(matrix, matrix.joined(gradient))
            before = self.moments.get(matrix.name, torch.zeros_like(sketch))
            self.moments[matrix.name] = before.mul(self._beta2).addcmul(sketch, sketch, value=1 - self._beta2)
        self.step += 1

    def alignments(self, rows: RowGradients, target: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        """``<P grad l_i, D_P * P grad t>`` with ``D_P`` made of these moments, summed over matrices."""
        total = torch.zeros(len(rows), dtype=torch.float64)
        for matrix in rows.matrices:
            goal = self._sketch(matrix, matrix.joined(target))
            diagonal = preconditioner(
                self.moments[matrix.name], step=self.step, beta1=self._beta1, beta2=self._beta2, eps=self._eps
            )
            left, right = self._sides(matrix)
            sketches = rows.sketches(matrix, left, right)
            total += inner_products(sketches, (diagonal * goal).to(sketches)[None])[:, 0].double().cpu()
        return total

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""
        return {"step": torch.tensor(self.step), **{f"moments.{name}": v for name, v in self.moments.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state_dict``."""
        self.step = int(state["step"])
        self.moments = {
            name.removeprefix("moments."): moment for name, moment in state.items() if name.startswith("moments.")
        }

    def _sides(self, matrix: ParamMatrix) -> tuple[Tensor | None, Tensor | None]:
        if matrix.kind == "vector":
            return None, None
        return self._projector.sides(matrix.layers[0], matrix.params[0][1].device, torch.float32)

    def _sketch(self, matrix: ParamMatrix, gradient: Tensor) -> Tensor:
        left, right = self._sides(matrix)
        found = gradient if gradient.dtype == torch.float64 else gradient.float()
        found = found if right is None else found @ right.to(found)
        found = found if left is None else left.to(found).T @ found
        return found.flatten()
