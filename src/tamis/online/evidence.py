"""From the candidates' gradients to the evidence of a choice: what the method asked for, of all processes' candidates.

Beside the numbers stands which candidates they may be used of: a loss or gradient that is not finite drops its own row.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tamis.errors import InvalidSettings, NonFinite
from tamis.gradients.parameters import ParamMatrix
from tamis.gradients.rows import RowGradients
from tamis.maths.autocast import autocast_off
from tamis.maths.clip import clip_factor
from tamis.online.adam_state import AdamMoments
from tamis.online.cost import Work
from tamis.online.measure import exact_interactions, measure_alignments, measure_lengths, sketched_interactions
from tamis.online.methods.choice import AlignmentForm, Evidence, InteractionForm, Lengths, Needs, Vector
from tamis.online.settings import StepSettings
from tamis.online.shadow import ShadowMoments
from tamis.online.together import add_up, as_first, gather_rows, offset_of
from tamis.online.token_level import position_alignments, position_interactions
from tamis.projection.factorized import FactorizedProjector
from tamis.types import IntArray

__all__ = ["Measured", "Measurer", "Moments", "row_sizes"]

logger = logging.getLogger(__name__)

# Trainable numbers up to which interactions are exact by default: an adapter of a model of a few billion.
_EXACT_UP_TO = 1 << 23

Moments = Mapping[str, AdamMoments]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Numbers of the ``n`` candidates of all processes, in the units in which the update adds them up."""

    losses: Tensor  # (n,)
    alignments: Tensor  # (n,) b
    good: Tensor  # (n,) may be chosen
    gram: Tensor | None = None  # (n, n) G
    lengths: Lengths | None = None  # of the good ones

    def evidence(self, learning_rate: float, *, among: Tensor | None = None) -> tuple[Evidence, IntArray]:
        """What the method is shown, and which candidates its positions are; ``among`` leaves others out.

        Raises:
            NonFinite: nothing can be chosen.
        """
        used = (self.good if among is None else self.good & among).nonzero()[:, 0]
        if not len(used):
            raise NonFinite(
                f"none of the {len(self.good)} candidates of a step has a finite loss and gradient; lower the rate"
            )
        found = Evidence(
            alignments=self.alignments[used].numpy(),
            interactions=None if self.gram is None else self.gram[used][:, used].numpy(),
            lengths=self.lengths,
            learning_rate=learning_rate,
        )
        return found, used.numpy()


class Measurer:
    """Measures what one method needs, on the trained model or on a proxy.

    Args:
        matrices: of the parameters that gradients are taken of.
        needs: of the method.
        settings: of the step.
        clip: norm to which gradients are clipped before the optimizer sees them; None or 0: not at all.

    Raises:
        InvalidSettings: the method and the settings disagree on sketches.
    """

    def __init__(
        self, matrices: Sequence[ParamMatrix], needs: Needs, settings: StepSettings, *, clip: float | None = None
    ) -> None:
        self._matrices, self._needs, self._clip = matrices, needs, clip
        self._rank = settings.target_rank
        self._projector = FactorizedProjector(dim=needs.sketch_dim or settings.sketch_dim, seed=settings.seed)
        self._exact = self._is_exact(settings)
        self._shadow: ShadowMoments | None = None

    @autocast_off()
    def measure(
        self,
        rows: RowGradients,
        losses: Tensor,
        goal: Mapping[str, Tensor],
        moments: Moments | None,
        *,
        counts: list[int],
        sizes: Vector,
        target_rows: RowGradients | None = None,
    ) -> Measured:
        """Of ``rows`` of this process, and of all others'.

        Args:
            rows: this process's candidates.
            losses: of all processes' candidates.
            goal: the mean target gradient.
            moments: Adam's, where the method needs them.
            counts: candidates of every process.
            sizes: of all candidates, what weight 1 adds in units of the row's mean loss; see ``row_sizes``.
            target_rows: of the target, row by row, for token-level scores.
        """
        needs, start = self._needs, offset_of(counts)
        size = torch.from_numpy(sizes)
        b = as_first(gather_rows(self._alignments(rows, goal, moments, losses, size, start, target_rows)))
        b = b if needs.alignment == "cosine" else b * size
        good = torch.isfinite(losses) & torch.isfinite(b)
        gram, lengths = None, None
        if needs.interactions is not None:
            gram = as_first(self._interactions(needs.interactions, rows, moments)) * size[:, None] * size
            good &= torch.isfinite(gram.diagonal())
        measured = Measured(losses=losses, alignments=b, good=good, gram=gram)
        if needs.lengths is not None:
            lengths, good = self._lengths(needs.lengths, rows, moments, measured, size, start)
            measured = replace(measured, lengths=lengths, good=good)
        return measured

    @property
    def work(self) -> Work:
        """What a row costs, for the counter: its whole gradient, or no more than inner products of its factors."""
        needs = self._needs
        pairs = self._exact and (needs.interactions or needs.lengths) is not None
        # The Jacobian is taken at the candidates' mean gradient, a product of all of them.
        whole = pairs or needs.alignment == "jacobian" or self._rank is None
        return "gradient" if whole else "alignment"

    @property
    def remembers(self) -> bool:
        """True if ``shadow`` must see every update."""
        return self._needs.alignment == "projected"

    @property
    def shadow(self) -> ShadowMoments:
        """Second moments of projected updates, for the published form."""
        if self._shadow is None:
            self._shadow = ShadowMoments(self._projector)
        return self._shadow

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing, but for the published projected form."""
        return {} if self._shadow is None else self._shadow.state_dict()

    def _alignments(
        self,
        rows: RowGradients,
        goal: Mapping[str, Tensor],
        moments: Moments | None,
        losses: Tensor,
        size: Tensor,
        start: int,
        target_rows: RowGradients | None,
    ) -> Tensor:
        form: AlignmentForm | None = self._needs.alignment
        assert form is not None
        if target_rows is not None:
            shadow = self.shadow if form == "projected" else None
            return position_alignments(form, rows, target_rows, moments, shadow=shadow)
        if form == "projected":
            assert moments is not None
            return self.shadow.alignments(rows, goal, moments)
        mean = self._mean_gradient(rows, goal, torch.isfinite(losses), size, start) if form == "jacobian" else None
        return measure_alignments(form, rows, goal, moments, mean=mean, rank=self._rank, clip=self._clip)

    def _mean_gradient(
        self, rows: RowGradients, goal: Mapping[str, Tensor], good: Tensor, size: Tensor, start: int
    ) -> Mapping[str, Tensor]:
        """The gradient of an update on all candidates of all processes that are ``good``, as the optimizer gets it."""
        for _ in range(2):
            share = torch.where(good, size, 0.0)
            mine = (share / share.sum().clamp_min(1e-300))[start:][: len(rows)]
            mean = {name: add_up(grad) for name, grad in rows.weighted(mine).items()}
            if all(bool(torch.isfinite(grad).all()) for grad in mean.values()):
                break
            # A finite loss may have a gradient that is not: such a row is left out here, as it will be of the choice.
            good = good & torch.isfinite(as_first(gather_rows(rows.dots(lambda matrix: matrix.joined(goal)))))
        factor = clip_factor(mean, self._clip)
        return {name: grad * factor for name, grad in mean.items()}

    def _interactions(self, form: InteractionForm, rows: RowGradients, moments: Moments | None) -> Tensor:
        projector = None if self._exact else self._projector
        if form == "token-level":
            return position_interactions(rows, projector=projector)
        if projector is None:
            return exact_interactions(form, rows, moments, gather=gather_rows)
        return sketched_interactions(form, rows, moments, projector=projector, gather=gather_rows)

    def _lengths(
        self, form: InteractionForm, rows: RowGradients, moments: Moments | None, found: Measured, size: Tensor, at: int
    ) -> tuple[Lengths, Tensor]:
        """Of the candidates whose lengths are finite too, and which those are."""
        projector, good = None if self._exact else self._projector, found.good
        while True:
            mine = torch.where(good & (found.alignments > 0), size, 0.0)[at : at + len(rows)]
            squares, aligned = measure_lengths(
                form, rows, moments, mine, gather=gather_rows, add_up=add_up, projector=projector
            )
            squares = as_first(gather_rows(squares)) * size.square()
            left = good & torch.isfinite(squares)
            if torch.equal(left, good):
                total = float(as_first(torch.tensor(aligned, dtype=torch.float64)))
                return Lengths(squares=squares[good].numpy(), aligned=total), good
            good = left  # the sum held a row whose length is not finite

    def _is_exact(self, settings: StepSettings) -> bool:
        total = sum(param.numel() for matrix in self._matrices for _, param in matrix.params)
        if settings.gram == "auto":
            exact = total <= _EXACT_UP_TO
        else:
            exact = settings.gram == "exact"
        needs = self._needs
        if needs.sketch_dim is not None:
            if settings.gram == "exact":
                raise InvalidSettings(
                    f"the method sketches (projection_dim={needs.sketch_dim}) but StepSettings(gram='exact'); "
                    "set projection_dim=None or leave gram='auto'"
                )
            exact = False
        if (needs.interactions or needs.lengths) is not None and not exact:
            logger.info(
                "%d trainable numbers: interactions from sketches of %d numbers a side", total, self._projector.dim
            )
        return exact


def row_sizes(tokens: IntArray, reduction: str) -> Vector:
    """What a row's mean loss is multiplied by in the update, 1 on average."""
    if reduction == "rows":
        return np.ones(len(tokens))
    found: Vector = tokens / tokens.mean()
    return found
