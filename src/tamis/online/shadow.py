"""Second moments of projected updates, as *Filter-then-Weight* published them (section 3.4): an ablation.

Adam's own ``v`` cannot be projected, so the paper keeps a second one, of the squares of projected gradients. The exact
``D`` on the unprojected target, which is the default, needs none of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidInput, Unsupported
from tamis.gradients.layers import inner_products
from tamis.gradients.parameters import ParamMatrix
from tamis.gradients.rows import RowGradients
from tamis.maths.adam import preconditioner
from tamis.online.adam_state import AdamMoments
from tamis.projection.factorized import FactorizedProjector

__all__ = ["ShadowMoments"]


class ShadowMoments:
    """Running second moments of the sketches of every update's gradient, by matrix.

    Decay, ε and learning rates are those that the optimizer has for the matrix's parameters.
    """

    def __init__(self, projector: FactorizedProjector) -> None:
        self._projector = projector
        self.step = 0
        self.moments: dict[str, Tensor] = {}

    def update(
        self, matrices: Sequence[ParamMatrix], gradient: Mapping[str, Tensor], optimizers: Mapping[str, AdamMoments]
    ) -> None:
        """Take in the gradient of the update about to be made, as the optimizer will see it: clipped."""
        for matrix in matrices:
            beta2 = _settings(matrix, optimizers).beta2
            sketch = self._sketch(matrix, matrix.joined(gradient))
            before = self.moments.get(matrix.name, torch.zeros_like(sketch)).to(sketch)
            self.moments[matrix.name] = before.mul(beta2).addcmul(sketch, sketch, value=1 - beta2)
        self.step += 1

    def alignments(
        self, rows: RowGradients, target: Mapping[str, Tensor], optimizers: Mapping[str, AdamMoments]
    ) -> Float[Tensor, " n"]:
        """``<P grad l_i, D_P * P grad t>`` with ``D_P`` made of these moments, summed over matrices.

        Raises:
            InvalidInput: no update was seen yet.
        """
        total = torch.zeros(len(rows), dtype=torch.float64)
        for matrix in rows.matrices:
            goal = self._sketch(matrix, matrix.joined(target))
            diagonal = self.diagonal(matrix, optimizers).to(goal).flatten()
            sketches = rows.sketches(matrix, *self.sides(matrix))
            total += inner_products(sketches, (diagonal * goal).to(sketches)[None])[:, 0].double().cpu()
        return total

    def diagonal(self, matrix: ParamMatrix, optimizers: Mapping[str, AdamMoments]) -> Float[Tensor, "K1 K2"]:
        """``D_P``, in the shape of the matrix's sketch.

        Raises:
            InvalidInput: no update was seen yet.
        """
        if not self.step:
            raise InvalidInput(
                "alignment='projected' has seen no update yet: the run goes on from a checkpoint without its second "
                "moments (tamis_selection.safetensors); resume from one that has them, or use alignment='adam'"
            )
        own, moment = _settings(matrix, optimizers), self.moments[matrix.name]
        found = own.rate * preconditioner(moment, step=self.step, beta1=own.beta1, beta2=own.beta2, eps=own.eps)
        left, _ = self.sides(matrix)
        return found.view(matrix.shape[0] if left is None else left.shape[1], -1)

    def sides(self, matrix: ParamMatrix) -> tuple[Tensor | None, Tensor | None]:
        """What multiplies the matrix's gradient from both sides; None where it is left whole."""
        if matrix.kind == "vector":
            return None, None
        return self._projector.sides(matrix.layers[0], matrix.params[0][1].device, torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""
        return {"step": torch.tensor(self.step), **{f"moments.{name}": v for name, v in self.moments.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state_dict``."""
        self.step = int(state["step"])
        self.moments = {
            name.removeprefix("moments."): moment for name, moment in state.items() if name.startswith("moments.")
        }

    def _sketch(self, matrix: ParamMatrix, gradient: Tensor) -> Tensor:
        left, right = self.sides(matrix)
        found = gradient if gradient.dtype == torch.float64 else gradient.float()
        found = found if right is None else found @ right.to(found)
        found = found if left is None else left.to(found).T @ found
        return found.flatten()


def _settings(matrix: ParamMatrix, optimizers: Mapping[str, AdamMoments]) -> AdamMoments:
    """The one state whose betas, eps and rate hold for a whole matrix: weight and bias are projected together."""
    first, *others = (optimizers[name] for name, _ in matrix.params)
    for other in others:
        if (first.beta1, first.beta2, first.eps, first.rate) != (other.beta1, other.beta2, other.eps, other.rate):
            raise Unsupported(
                f"weight and bias of '{matrix.name}' have other betas, eps or learning rates, and "
                "alignment='projected' projects them together; put them into groups that agree, or use alignment='adam'"
            )
    return first
