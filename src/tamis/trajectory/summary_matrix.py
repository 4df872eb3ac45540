"""The summary-matrix form: embeddings of all samples first, final values later (the paper's algorithm 1).

``M = [M^θ M^m M^v]`` carries ``dθ_T/d(state)`` backwards: it is the adjoint with one row per coordinate. With the
empirical Fisher, sample i of a step changes the final parameters by ``-e_i``::

    e_i = w_i (M^θ K_θ + M^m K_m + M^v K_v) J g_i        score of i = -<∇ℓ(θ_T), e_i>
    M^θ ← M^θ (1 - ηλ) + sum_i e_i g_iᵀ,   M^m, M^v as the adjoint's b and c

Memory is three times the square of the coordinates kept, so large models keep a mask of them. Masks commute with what
Adam does by coordinate, projections do not. Disjoint masks are summed, and then all but curvature between masks is
exact; independent ones, the paper's, are averaged and scaled up to all coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidSettings
from tamis.maths.step_derivative import AdamStep
from tamis.seeds import child_seed, random_permutation, random_subset
from tamis.trajectory.replay import Played
from tamis.trajectory.run import Rule

__all__ = ["SummaryMatrix", "draw_masks", "require_adam", "scores_of_embeddings"]


def require_adam(rule: Rule) -> None:
    """Refuse a run that Adam did not train.

    Raises:
        InvalidSettings: that is so.
    """
    if rule.kind == "sgd":
        raise InvalidSettings("the summary matrix is that of Adam; use the adjoint form for an SGD run")


def draw_masks(numel: int, *, count: int, share: float | None = None, seed: int = 0) -> list[Tensor]:
    """``count`` sets of coordinates: a random partition into equal parts, or independent draws of a ``share`` of all.

    Raises:
        InvalidSettings: there are more masks than coordinates.
    """
    if not 1 <= count <= numel:
        raise InvalidSettings(f"masks={count}: expected at least 1 and at most the {numel} trained numbers")
    if share is None:
        order = torch.from_numpy(random_permutation(child_seed(seed, "disjoint masks"), numel))
        return [part.sort().values for part in order.tensor_split(count)]
    size = max(1, round(share * numel))
    return [torch.from_numpy(random_subset(child_seed(seed, "mask", number), numel, size)) for number in range(count)]


@dataclass(kw_only=True)
class SummaryMatrix:
    """``M`` on its way back, restricted to ``mask``.

    ``rescale`` multiplies the curvature by the share of coordinates left out, which a mask otherwise loses; it helps
    where curvature matters and is off by default.
    """

    mask: Tensor  # (K,) coordinates
    like: Tensor  # a vector of the run's kind and device, (P,)
    rescale: bool = False
    rows: tuple[Tensor, ...] = field(init=False)  # M^θ, M^m, M^v, each (K, K)

    def __post_init__(self) -> None:
        size = len(self.mask)
        eye = torch.eye(size, dtype=self.like.dtype, device=self.like.device)
        self.rows = (eye, torch.zeros_like(eye), torch.zeros_like(eye))

    def embed(self, played: Played, grads: Float[Tensor, "B P"]) -> Float[Tensor, "B K"]:
        """``e_i`` of the step's samples from their gradients; ``M`` moves to before the step."""
        whole = played.derivative()
        assert isinstance(whole, AdamStep)  # of an Adam run, see require_adam
        step = whole.at(self.mask)
        weighted = played.clip.jacobian(grads) * played.step.weights.to(grads)[:, None]
        embeddings = weighted[:, self.mask] @ step.inject(self.rows).T
        curved = embeddings.T @ grads[:, self.mask]
        if self.rescale:
            curved = curved * (len(self.like) / len(self.mask))
        self.rows = step.back(self.rows, curved)
        return embeddings


def scores_of_embeddings(
    embeddings: Float[Tensor, "B K"], goal: Float[Tensor, "V P"], mask: Tensor
) -> Float[Tensor, "B V"]:
    """What one mask contributes to the scores of final values with gradients ``goal``: see
    ``scores_from_embeddings``."""
    return -embeddings @ goal[:, mask].T
