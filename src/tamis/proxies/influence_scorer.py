"""The baseline that learns the scores: a linear head on a smaller model's states, fitted to the full model's scores.

After *MATES* (Yu et al., 2024), as *IProX* uses it (appendix A.1): the smaller model is frozen and a regression head is
fitted to scores of some rows. The head is linear here too, but found in closed form, ridge regression with the penalty
that leave-one-out chooses, in place of five epochs of Adam. It knows the targets it was fitted for and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from tamis.disk import replace_atomically
from tamis.model.loss import supervised_positions
from tamis.model.states import mean_by_row, supervised_states
from tamis.model.targets import embedding_matrix
from tamis.proxies.rows import Row, batches_of
from tamis.types import Batch, FloatArray

__all__ = ["ScoreHead", "fit_head", "row_states", "states_of", "write_head"]

_PENALTIES = tuple(10.0**power for power in range(-4, 5))


@dataclass(frozen=True, kw_only=True)
class ScoreHead:
    """Predicts a row's score for every target from its standardised state."""

    mean: Tensor  # (H,)
    scale: Tensor  # (H,)
    weights: Tensor  # (H, G)
    bias: Tensor  # (G,)
    penalty: float  # of the ridge, per row

    def predict(self, states: Float[Tensor, "n H"]) -> FloatArray:
        """Scores ``(n, G)``."""
        found: FloatArray = (((states.double() - self.mean) / self.scale) @ self.weights + self.bias).float().numpy()
        return found


def fit_head(states: Float[Tensor, "n H"], scores: Float[Tensor, "n G"]) -> ScoreHead:
    """Ridge regression on standardised states; one penalty for all targets, by the leave-one-out error."""
    states, scores = states.double(), scores.double()
    mean, scale = states.mean(dim=0), states.std(dim=0, unbiased=False).clamp_min(1e-8)
    bias = scores.mean(dim=0)
    u, s, vh = torch.linalg.svd((states - mean) / scale, full_matrices=False)
    centred = scores - bias
    best: tuple[float, float] | None = None
    for penalty in _PENALTIES:
        shrunk = s.square() / (s.square() + penalty * len(states))
        left_in = u @ (shrunk[:, None] * (u.T @ centred))
        # The mean is fitted too: one more direction that every row has a share of.
        own = (u.square() @ shrunk + 1 / len(states)).clamp_max(1 - 1e-9)
        error = float(((centred - left_in) / (1 - own)[:, None]).square().mean())
        if best is None or error < best[0]:
            best = (error, penalty)
    assert best is not None
    weights = vh.T @ ((s / (s.square() + best[1] * len(states)))[:, None] * (u.T @ centred))
    return ScoreHead(mean=mean, scale=scale, weights=weights, bias=bias, penalty=best[1])


def row_states(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    batch_tokens: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """Each row's mean state over the positions that predict its supervised tokens: ``(n, H)``, one forward pass."""
    found = torch.zeros(len(rows), embedding_matrix(model).shape[1])
    for batch in batches_of(rows, batch_tokens=batch_tokens, pad_id=pad_id):
        found[batch.rows] = states_of(model, batch)
        advance(len(batch.rows))
    return found


def states_of(model: nn.Module, batch: Batch) -> Tensor:
    """The same of one batch, on the CPU."""
    there = batch.to(embedding_matrix(model).device)
    positions = supervised_positions(there)
    return mean_by_row(supervised_states(model, there, positions), positions).float().cpu()


def write_head(head: ScoreHead, names: Sequence[str], path: Path) -> None:
    """The head's tensors, columns in the order of ``names``.

    Raises:
        InvalidInput: the disk is full or may not be written.
    """
    tensors = {name: getattr(head, name).contiguous() for name in ("mean", "scale", "weights", "bias")}
    metadata = {"targets": "\n".join(names), "penalty": str(head.penalty)}
    replace_atomically(path, (save(tensors, metadata=metadata),))
