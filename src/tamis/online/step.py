"""One online step: what the candidates and the target say, a choice, and the weighted gradient of the choice.

One forward and backward pass over the candidates, with all weights frozen and the layers' factors captured, and one
over the target rows. The optimizer is read, never stepped; parameters and their ``grad`` are not touched. Several
processes each hold a part of the candidates and of the target; the choice is one, made of all candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tamis.errors import InvalidInput, InvalidSettings, NonFinite, Unsupported
from tamis.gradients.parameters import param_matrices
from tamis.gradients.rows import RowGradients, hold_gradients, summed_gradient
from tamis.model.processes import counts_of_all, rank
from tamis.model.trainable import trainable_layers
from tamis.online.adam_state import AdamMoments, learning_rate, read_adam
from tamis.online.batches import supervised_tokens, take_rows
from tamis.online.choice import Choice, Evidence, InteractionForm, Lengths, Method, Vector, everything, unweighted
from tamis.online.measure import exact_interactions, measure_alignments, measure_lengths, sketched_interactions
from tamis.online.shadow import ShadowMoments
from tamis.online.together import add_up, as_first, gather_rows, offset_of
from tamis.projection.factorized import FactorizedProjector
from tamis.seeds import random_permutation
from tamis.types import Batch, IntArray

__all__ = ["OnlineStep", "Proposal", "StepSettings"]

logger = logging.getLogger(__name__)

# Trainable numbers up to which interactions are exact by default: an adapter of a model of a few billion.
_EXACT_UP_TO = 1 << 23


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a step measures and what its gradient is divided by; the same for every method.

    With ``reduction="tokens"`` a row's part of the update is its mean loss's gradient times its supervised tokens, and
    that is what methods are shown: ``b`` once and ``G`` on both sides times the row's tokens over the candidates' mean.
    Cosines, which have no length, stay as they are.
    """

    reduction: Literal["rows", "tokens"] = "rows"  # every row counts alike, or every supervised token (as in Trainer)
    interactions: Literal["auto", "exact", "sketch"] = "auto"  # auto: exact up to 8 million trainable numbers
    sketch_dim: int = 64  # numbers per side of a layer's sketch
    seed: int = 0  # of sketches

    def __post_init__(self) -> None:
        if self.reduction not in ("rows", "tokens"):
            raise InvalidSettings(f"reduction must be 'rows' or 'tokens', got {self.reduction!r}")
        if self.interactions not in ("auto", "exact", "sketch"):
            raise InvalidSettings(f"interactions must be 'auto', 'exact' or 'sketch', got {self.interactions!r}")
        if self.sketch_dim < 1:
            raise InvalidSettings(f"sketch_dim must be at least 1, got {self.sketch_dim}")


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The gradient of a step and how it came about. Candidates of all processes are counted through.

    ``gradient / divisor``, both summed over processes (and over the steps of an accumulation), is the update's
    gradient: ``sum_i w_i grad l_i / sum_i w_i``, each ``w_i`` times the row's supervised tokens for ``"tokens"``.
    """

    gradient: dict[str, Tensor]  # this process's part of the numerator, by parameter name
    divisor: float  # of all processes
    choice: Choice
    losses: Vector  # (n,) mean cross-entropy; NaN for candidates that were not run
    tokens: IntArray  # (n,) supervised tokens
    alignments: Vector | None  # (n,) b; NaN for candidates left out
    dropped: IntArray  # candidates whose loss or gradient was not finite
    target_loss: float | None  # mean over the target rows, before the update
    target_gradient: dict[str, Tensor] | None  # mean over the target rows of all processes
    cold: bool  # a uniform choice, because the method has not started yet
    held_bytes: int = 0  # this process's candidates' gradients while the choice was made, at most


class OnlineStep:
    """Makes proposals for one model and its optimizer.

    Args:
        model: the model itself, not a wrapper for several processes.
        method: what chooses.
        settings: how to measure.

    Raises:
        Unsupported: a trainable parameter has no per-sample gradient that can be captured; the message names it.
    """

    def __init__(self, model: nn.Module, method: Method, settings: StepSettings | None = None) -> None:
        self.model, self.method = model, method
        self.settings = StepSettings() if settings is None else settings
        self.matrices = param_matrices(model, trainable_layers(model))
        self._params = {name: param for matrix in self.matrices for name, param in matrix.params}
        dim = method.needs.sketch_dim or self.settings.sketch_dim
        self._projector = FactorizedProjector(dim=dim, seed=self.settings.seed)
        self._exact = self._is_exact()
        self.shadow: ShadowMoments | None = None

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """Every trainable parameter by name; the keys of a proposal's gradient."""
        return self._params

    def propose(
        self,
        candidates: Sequence[Batch],
        target: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        *,
        cold: bool = False,
        seed: int = 0,
    ) -> Proposal:
        """The gradient that the method wants the next update to take.

        Args:
            candidates: this process's candidates, one batch per forward pass; every row has a supervised token.
            target: this process's target rows, likewise; not looked at when nothing is aligned with them.
            optimizer: the live optimizer, before its step.
            cold: choose uniformly, as long as the optimizer's moments mean little.
            seed: of a uniform choice; the same in every process.

        Raises:
            InvalidInput: there are no candidates, or no target rows where they are needed.
            NonFinite: a target row, or a candidate of an unmeasured choice, has a loss that is not finite.
            Unsupported: the optimizer's state cannot be read.
        """
        counts = counts_of_all(sum(len(batch.rows) for batch in candidates))
        tokens = gather_rows(supervised_tokens(candidates)).numpy()
        if 0 in counts:
            raise InvalidInput(
                f"process {counts.index(0)} has no candidate with a supervised token in this step; shuffle the pool or "
                "remove rows without supervised tokens"
            )
        needs = self.method.needs
        if needs.target_only:
            return self._on_target(target, tokens)
        if cold or needs.alignment is None:
            return self._unmeasured(candidates, tokens, counts, cold=cold, seed=seed)
        return self._measured(candidates, target, optimizer, tokens, counts)

    def _on_target(self, target: Sequence[Batch], tokens: IntArray) -> Proposal:
        sums, losses, count = self._target(target)
        nothing = np.zeros(0, dtype=np.int64)
        return Proposal(
            gradient=sums,
            divisor=float(count),
            choice=unweighted(nothing),
            losses=np.full(len(tokens), np.nan),
            tokens=tokens,
            alignments=None,
            dropped=nothing,
            target_loss=losses / count,
            target_gradient={name: add_up(grad) / count for name, grad in sums.items()},
            cold=False,
        )

    def _unmeasured(
        self, candidates: Sequence[Batch], tokens: IntArray, counts: list[int], *, cold: bool, seed: int
    ) -> Proposal:
        """Choose first, then compute only what was chosen."""
        n = len(tokens)
        if self.method.keeps_all or self.method.keep >= n:
            choice = everything(n)
        else:
            choice = unweighted(np.sort(random_permutation(seed, n)[: self.method.keep]))
        coefficients, divisor = self._coefficients(choice, tokens)
        mine = coefficients[offset_of(counts) :]
        parts, at, first = [], [], 0
        for batch in candidates:
            index = mine[first : first + len(batch.rows)].nonzero()[0]
            if len(index):
                parts.append((take_rows(batch, index), torch.from_numpy(mine[first + index])))
                at.append(offset_of(counts) + first + index)
            first += len(batch.rows)
        losses = np.full(n, np.nan)
        if parts:
            gradient, seen = summed_gradient(self.model, self.matrices, parts)
            losses[np.concatenate(at)] = seen.numpy()
        else:
            gradient = {name: torch.zeros_like(param) for name, param in self._params.items()}
        return Proposal(
            gradient=gradient,
            divisor=divisor,
            choice=choice,
            losses=gather_rows(torch.from_numpy(losses[offset_of(counts) :][: counts[rank()]])).numpy(),
            tokens=tokens,
            alignments=None,
            dropped=np.zeros(0, dtype=np.int64),
            target_loss=None,
            target_gradient=None,
            cold=cold,
        )

    def _measured(
        self,
        candidates: Sequence[Batch],
        target: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        tokens: IntArray,
        counts: list[int],
    ) -> Proposal:
        needs = self.method.needs
        moments = read_adam(optimizer, self._params) if needs.reads_adam else None
        sums, target_losses, count = self._target(target)
        goal = {name: add_up(grad) / count for name, grad in sums.items()}

        rows = RowGradients(self.matrices)
        keep_factors = needs.interactions == "token-level"
        mine = [hold_gradients(self.model, batch, rows, keep_factors=keep_factors) for batch in candidates]
        losses = gather_rows(torch.cat([part.double().cpu() for part in mine]) if mine else torch.zeros(0).double())

        b = as_first(gather_rows(self._alignments(rows, goal, moments, losses, counts)))
        size = torch.from_numpy(self._sizes(tokens))
        b = b if needs.alignment == "cosine" else b * size
        good = torch.isfinite(losses) & torch.isfinite(b)
        gram, lengths = None, None
        if needs.interactions is not None:
            gram = as_first(self._interactions(needs.interactions, rows, moments)) * size[:, None] * size
            good &= torch.isfinite(gram.diagonal())
        if needs.lengths is not None:
            lengths, good = self._lengths(needs.lengths, rows, moments, b, size, good, offset_of(counts))
        used = good.nonzero()[:, 0]
        if not len(used):
            raise NonFinite(f"none of the {len(b)} candidates of a step has a finite loss and gradient; lower the rate")
        evidence = Evidence(
            alignments=b[used].numpy(),
            interactions=None if gram is None else gram[used][:, used].numpy(),
            lengths=lengths,
            learning_rate=learning_rate(optimizer),
        )
        found = self.method.choose(evidence)
        choice = replace(found, rows=used.numpy()[found.rows])
        coefficients, divisor = self._coefficients(choice, tokens)
        if not divisor > 0:  # weights of either sign, times lengths
            choice = replace(unweighted(choice.rows), scale=choice.scale, fallback="the weights have no positive sum")
            coefficients, divisor = self._coefficients(choice, tokens)
        start = offset_of(counts)
        return Proposal(
            gradient=rows.weighted(torch.from_numpy(coefficients[start : start + len(rows)])),
            divisor=divisor,
            choice=choice,
            losses=losses.numpy(),
            tokens=tokens,
            alignments=torch.where(good, b, torch.nan).numpy(),
            dropped=(~good).nonzero()[:, 0].numpy(),
            target_loss=target_losses / count,
            target_gradient=goal,
            cold=False,
            held_bytes=rows.nbytes,
        )

    def _target(self, target: Sequence[Batch]) -> tuple[dict[str, Tensor], float, int]:
        """This process's sum of target gradients; all processes' sum of losses and number of rows."""
        count = sum(counts_of_all(sum(len(batch.rows) for batch in target)))
        if not count:
            raise InvalidInput(
                f"method '{self.method.name}' needs target rows at every step and was given none with a "
                "supervised token"
            )
        ones = [(batch, torch.ones(len(batch.rows))) for batch in target]
        if ones:
            sums, losses = summed_gradient(self.model, self.matrices, ones)
        else:
            sums, losses = {name: torch.zeros_like(p) for name, p in self._params.items()}, torch.zeros(0)
        return sums, float(add_up(losses.double().sum())), count

    def _alignments(
        self,
        rows: RowGradients,
        goal: dict[str, Tensor],
        moments: dict[str, AdamMoments] | None,
        losses: Tensor,
        counts: list[int],
    ) -> Tensor:
        form = self.method.needs.alignment
        assert form is not None
        if form == "projected":
            assert moments is not None
            return self._shadow().alignments(rows, goal, moments)
        mean = None
        if form == "jacobian":
            finite = torch.isfinite(losses)
            mine = finite[offset_of(counts) :][: len(rows)].double() / max(int(finite.sum()), 1)
            mean = {name: add_up(grad) for name, grad in rows.weighted(mine).items()}
        return measure_alignments(form, rows, goal, moments, mean=mean)

    def _interactions(
        self, form: InteractionForm, rows: RowGradients, moments: dict[str, AdamMoments] | None
    ) -> Tensor:
        if self._exact:
            return exact_interactions(form, rows, moments, gather=gather_rows)
        return sketched_interactions(form, rows, moments, projector=self._projector, gather=gather_rows)

    def _lengths(
        self,
        form: InteractionForm,
        rows: RowGradients,
        moments: dict[str, AdamMoments] | None,
        b: Tensor,
        size: Tensor,
        good: Tensor,
        start: int,
    ) -> tuple[Lengths, Tensor]:
        """Of the candidates whose lengths are finite too, and which those are."""
        projector = None if self._exact else self._projector
        while True:
            mine = torch.where(good & (b > 0), size, 0.0)[start : start + len(rows)]
            squares, aligned = measure_lengths(
                form, rows, moments, mine, gather=gather_rows, add_up=add_up, projector=projector
            )
            squares = as_first(gather_rows(squares)) * size.square()
            left = good & torch.isfinite(squares)
            if torch.equal(left, good):
                total = float(as_first(torch.tensor(aligned, dtype=torch.float64)))
                return Lengths(squares=squares[good].numpy(), aligned=total), good
            good = left  # the sum held a row whose length is not finite

    def _sizes(self, tokens: IntArray) -> Vector:
        """What a row's mean loss is multiplied by in the update, 1 on average."""
        if self.settings.reduction == "rows":
            return np.ones(len(tokens))
        found: Vector = tokens / tokens.mean()
        return found

    def _coefficients(self, choice: Choice, tokens: IntArray) -> tuple[Vector, float]:
        """``c_i`` of every candidate's gradient, and the sum that the update is divided by."""
        size = tokens[choice.rows].astype(np.float64) if self.settings.reduction == "tokens" else 1.0
        found = np.zeros(len(tokens))
        found[choice.rows] = choice.weights * size
        divisor = found.sum() if choice.normalised else (np.ones(len(choice.rows)) * size).sum()
        return found, float(divisor)

    def _is_exact(self) -> bool:
        total = sum(param.numel() for param in self._params.values())
        if self.settings.interactions == "auto":
            exact = total <= _EXACT_UP_TO
        else:
            exact = self.settings.interactions == "exact"
        needs = self.method.needs
        if needs.sketch_dim is not None:
            if self.settings.interactions == "exact":
                raise InvalidSettings(
                    f"the method sketches (projection_dim={needs.sketch_dim}) but StepSettings(interactions='exact'); "
                    "set projection_dim=None or leave interactions='auto'"
                )
            exact = False
        if (needs.interactions or needs.lengths) is not None and not exact:
            if needs.interactions == "token-level":
                raise Unsupported(
                    "token-level interactions are an ablation for small models, without sketches; use "
                    "StepSettings(interactions='exact') and projection_dim=None"
                )
            logger.info(
                "%d trainable numbers: interactions from sketches of %d numbers a side", total, self._projector.dim
            )
        return exact

    @property
    def remembers(self) -> bool:
        """True if ``observe`` must be called before every update."""
        return self.method.needs.alignment == "projected"

    def observe(self, gradient: dict[str, Tensor], optimizer: torch.optim.Optimizer, *, clipped: float = 1.0) -> None:
        """Take in the gradient of the update about to be made, times what clipping will multiply it by."""
        if self.remembers:
            seen = {name: grad * clipped for name, grad in gradient.items()}
            self._shadow().update(self.matrices, seen, read_adam(optimizer, self._params))

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep of the selection: nothing, but for the published projected form."""
        return {} if self.shadow is None else self.shadow.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state_dict``."""
        if state:
            self._shadow().load_state_dict(state)

    def _shadow(self) -> ShadowMoments:
        if self.shadow is None:
            self.shadow = ShadowMoments(self._projector)
        return self.shadow
