"""One online step: what the candidates and the target say, a choice, and the weighted gradient of the choice.

By default one forward and backward pass over the candidates, with all weights frozen and the layers' factors captured,
and one over the target rows; ``StepSettings`` has cheaper ways to score. The optimizer is read, never stepped;
parameters and their ``grad`` are not touched. Several processes each hold a part of the candidates and of the target;
the choice is one, made of all candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from tamis.errors import NonFinite
from tamis.gradients.parameters import param_matrices
from tamis.gradients.rows import RowGradients
from tamis.model.processes import counts_of_all
from tamis.model.trainable import trainable_layers
from tamis.online.adam_state import learning_rate, read_adam
from tamis.online.batches import supervised_tokens
from tamis.online.checks import refuse_sharded, require_candidates
from tamis.online.cost import Part
from tamis.online.evidence import Measured, Measurer, row_sizes
from tamis.online.methods.choice import Choice, Evidence, Method, Vector, everything, unweighted
from tamis.online.passes import Passes
from tamis.online.proposal import Proposal
from tamis.online.proxy import Proxy
from tamis.online.settings import StepSettings, check_combination
from tamis.online.shadow import ShadowMoments
from tamis.online.source_means import SourceScores
from tamis.online.target import Look, TargetMemory
from tamis.online.together import as_first, gather_rows, offset_of
from tamis.online.window import Window
from tamis.seeds import random_permutation
from tamis.types import Batch, IntArray

__all__ = ["OnlineStep", "Proposal", "StepSettings"]

_WORK = "work"


class OnlineStep:
    """Makes proposals for one model and its optimizer.

    Args:
        model: the model itself, not a wrapper for several processes.
        method: what chooses.
        settings: how to measure.
        proxy: the model that scores candidates, for ``candidates="proxy"`` alone.
        sources: (N,) index of the source of every row of the data, for ``candidates="sources:K"`` alone.
        clip: norm to which the update's gradient will be clipped, for alignments that are not linear in it.

    Raises:
        InvalidInput: the proxy has another vocabulary.
        InvalidSettings: the method cannot do with such candidates.
        Unsupported: a trainable parameter has no per-sample gradient that can be captured, or is sharded; the message
            names it.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        settings: StepSettings | None = None,
        *,
        proxy: nn.Module | None = None,
        sources: IntArray | None = None,
        clip: float | None = None,
    ) -> None:
        self.model, self.method = model, method
        self.settings = StepSettings() if settings is None else settings
        check_combination(method, self.settings)
        refuse_sharded(model)
        self.matrices = param_matrices(model, trainable_layers(model))
        self._params = {name: param for matrix in self.matrices for name, param in matrix.params}
        by_position = method.needs.token_level or method.needs.interactions == "token-level"
        self._passes = Passes(model, self.matrices, keep_factors=by_position, target_rank=self.settings.target_rank)
        self._measurer = Measurer(self.matrices, method.needs, self.settings, clip=clip)
        self._target = TargetMemory(every=self.settings.target_every, ema=self.settings.target_ema)
        self._window = Window(self.settings.reuse) if self.settings.reuse > 1 else None
        assert (sources is not None) == (self.settings.candidates_kind == "sources")
        self._sources: SourceScores | None = None
        if sources is not None:
            self._sources = SourceScores(sources, self.settings, passes=self._passes, measurer=self._measurer)
        assert (proxy is not None) == (self.settings.candidates_kind == "proxy")
        self._proxy = None if proxy is None else Proxy(proxy, model, method.needs, self.settings)

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """Every trainable parameter by name; the keys of a proposal's gradient."""
        return self._params

    @property
    def has_target(self) -> bool:
        """Whether choices depend on the target at all."""
        return self.method.needs.target_only or self.method.needs.alignment is not None

    @property
    def scorings(self) -> int | None:
        """How often sources were scored; None if they are not what is scored."""
        return None if self._sources is None else self._sources.means.scorings

    def looks(self, candidates: Sequence[Batch], *, cold: bool) -> bool:
        """Whether the next choice will look at target rows. Every process must ask."""
        needs = self.method.needs
        if needs.target_only:
            return True
        if needs.alignment is None or cold or self._from_window(candidates):
            return False
        if self._sources is not None:
            return self._sources.means.is_due
        return self._proxy is not None or self._target.is_due

    def propose(
        self,
        candidates: Sequence[Batch],
        target: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        *,
        cold: bool = False,
        seed: int = 0,
        fresh_target: bool = True,
    ) -> Proposal:
        """The gradient that the method wants the next update to take.

        Args:
            candidates: this process's candidates, one batch per forward pass; every row has a supervised token.
            target: this process's target rows, likewise; not looked at when nothing is aligned with them.
            optimizer: the live optimizer, before its step.
            cold: choose uniformly, as long as the optimizer's moments mean little.
            seed: of what is drawn; the same in every process.
            fresh_target: look at ``target``; False to choose with the target gradient kept from an earlier choice.

        Raises:
            InvalidInput: there are no candidates, or no target rows where they are needed.
            NonFinite: a target row has a loss that is not finite, or a candidate that is run for the update alone: of
                an unmeasured choice, of a window scored before, of a source.
            Unsupported: the optimizer's state cannot be read.
        """
        counts = counts_of_all(sum(len(batch.rows) for batch in candidates))
        tokens = gather_rows(supervised_tokens(candidates)).numpy()
        require_candidates(sum(counts))
        needs = self.method.needs
        if needs.target_only:
            return self._on_target(target, tokens)
        if cold or needs.alignment is None:
            return self._unmeasured(candidates, tokens, counts, cold=cold, seed=seed)
        if self._from_window(candidates):
            assert self._window is not None
            measured, left = self._window.next()
            found = self._chosen(measured, candidates, optimizer, tokens, counts, left=left)
            return replace(found, score_age=self._window.age, target_age=self._window.age)
        if self._sources is not None and not self._sources.means.is_due:
            return self._by_source(self._sources, candidates, optimizer, tokens, counts, seed=seed)
        if self._proxy is not None:
            sizes = row_sizes(tokens, self.settings.reduction)
            measured = self._proxy.measure(candidates, target, counts=counts, sizes=sizes)
            found = self._chosen(measured, candidates, optimizer, tokens, counts)
            return replace(found, scored=len(tokens))
        return self._measured(candidates, target, optimizer, tokens, counts, fresh=fresh_target, seed=seed)

    def propose_scored(self, candidates: Sequence[Batch], scores: Tensor) -> Proposal:
        """The gradient that the method makes of ``scores`` found elsewhere; only what is chosen is run.

        Args:
            candidates: of the one process, one batch per forward pass.
            scores: (n,), where alignments stand; those that are not finite are left out.

        Raises:
            NonFinite: no candidate has a finite score.
        """
        tokens = supervised_tokens(candidates).numpy()
        good = torch.isfinite(scores)
        if not bool(good.any()):
            raise NonFinite(f"none of the {len(scores)} candidates of a step has a finite score; lower the rate")
        used = good.nonzero()[:, 0].numpy()
        found = self.method.choose(Evidence(alignments=scores[good].numpy()))
        choice = replace(found, rows=used[found.rows])
        coefficients, divisor = self._coefficients(choice, tokens)
        gradient, losses = self._passes.run_chosen(candidates, coefficients, [len(tokens)])
        return Proposal(
            gradient=gradient,
            divisor=divisor,
            choice=choice,
            losses=losses,
            tokens=tokens,
            scored=len(tokens),
            alignments=torch.where(good, scores, torch.nan).numpy(),
            dropped=(~good).nonzero()[:, 0].numpy(),
        )

    def count(self, part: Part, batches: Sequence[Batch], *, times: float) -> None:
        """Add ``times`` forward and backward passes made elsewhere to what the run has cost."""
        self._passes.counter.add(part, "gradient", batches, times=times)

    def look(self, target: Sequence[Batch]) -> Look:
        """One pass over target rows for a forecast, which is no part of the run's cost.

        Raises:
            InvalidInput: no process has a row.
        """
        return self._passes.look(target, count_cost=False)

    def _on_target(self, target: Sequence[Batch], tokens: IntArray) -> Proposal:
        look = self._passes.look(target)
        return Proposal(
            gradient=look.sums,
            divisor=float(look.count),
            choice=unweighted(np.zeros(0, dtype=np.int64)),
            losses=np.full(len(tokens), np.nan),
            tokens=tokens,
            target_loss=look.loss,
            target_gradient=look.mean,
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
        gradient, losses = self._passes.run_chosen(candidates, coefficients, counts)
        return Proposal(gradient=gradient, divisor=divisor, choice=choice, losses=losses, tokens=tokens, cold=cold)

    def _measured(
        self,
        candidates: Sequence[Batch],
        target: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        tokens: IntArray,
        counts: list[int],
        *,
        fresh: bool,
        seed: int,
    ) -> Proposal:
        """Score the candidates by the trained model itself."""
        needs, sizes = self.method.needs, row_sizes(tokens, self.settings.reduction)
        moments = read_adam(optimizer, self._params) if needs.reads_adam else None
        look, target_rows = None, None
        if needs.token_level:
            look, target_rows = self._passes.look_by_row(target)
        elif fresh:
            look = self._passes.look(target)
        goal = self._target.kept() if look is None else self._target.take(look)

        rows: RowGradients | None = None
        if self.settings.candidates_kind == "jvp":
            direction = goal
            if needs.alignment == "adam":
                assert moments is not None
                direction = {name: moments[name].diagonal() * grad for name, grad in goal.items()}
            losses, b = self._passes.slopes(candidates, direction)
            b = as_first(b) * torch.from_numpy(sizes)
            measured = Measured(losses=losses, alignments=b, good=torch.isfinite(losses) & torch.isfinite(b))
        elif self._sources is not None:
            assert look is not None, "sources are scored with fresh target rows"
            places = self._places(candidates)
            scored, held = self._sources.score(
                candidates, goal, moments, places=places, counts=counts, sizes=sizes, seed=seed
            )
            found = self._by_source(self._sources, candidates, optimizer, tokens, counts, seed=seed)
            return replace(found, target_loss=look.loss, target_gradient=look.mean, scored=scored, held_bytes=held)
        else:
            rows, losses = self._passes.hold(candidates)
            self._passes.counter.add("candidates", self._measurer.work, candidates)
            measured = self._measurer.measure(
                rows, losses, goal, moments, counts=counts, sizes=sizes, target_rows=target_rows
            )
        if self._window is not None:
            self._window.open(self._places(candidates), measured)
        found = self._chosen(measured, candidates, optimizer, tokens, counts, rows=rows)
        return replace(
            found,
            losses=measured.losses.numpy(),
            scored=len(tokens),
            target_loss=None if look is None else look.loss,
            target_gradient=None if look is None else look.mean,
            target_age=self._target.age,
        )

    def _by_source(
        self,
        scores: SourceScores,
        candidates: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        tokens: IntArray,
        counts: list[int],
        *,
        seed: int,
    ) -> Proposal:
        """Choose by what is known of the candidates' sources."""
        drawn, means = scores.next(self._places(candidates), seed=seed)
        found = self._chosen(drawn, candidates, optimizer, tokens, counts)
        age = scores.means.age
        return replace(found, alignments=means, by_source=True, score_age=age, target_age=age)

    def _chosen(
        self,
        measured: Measured,
        candidates: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        tokens: IntArray,
        counts: list[int],
        *,
        rows: RowGradients | None = None,
        left: Tensor | None = None,
    ) -> Proposal:
        """The method's choice and its gradient: of ``rows`` if they are held, else of one more pass of the chosen."""
        evidence, used = measured.evidence(learning_rate(optimizer), among=left)
        found = self.method.choose(evidence)
        choice = replace(found, rows=used[found.rows])
        coefficients, divisor = self._coefficients(choice, tokens)
        if not divisor > 0:  # weights of either sign, times lengths
            choice = replace(unweighted(choice.rows), scale=choice.scale, fallback="the weights have no positive sum")
            coefficients, divisor = self._coefficients(choice, tokens)
        if self._window is not None:
            self._window.take(choice.rows)
        if rows is None:
            gradient, losses = self._passes.run_chosen(candidates, coefficients, counts)
        else:
            start = offset_of(counts)
            mine = coefficients[start : start + len(rows)]
            gradient, losses = rows.weighted(torch.from_numpy(mine)), measured.losses.numpy()
            self._passes.counter.add("update", "assembly", candidates, torch.from_numpy(mine != 0))
        usable = measured.good if left is None else measured.good & left
        return Proposal(
            gradient=gradient,
            divisor=divisor,
            choice=choice,
            losses=losses,
            tokens=tokens,
            alignments=torch.where(usable, measured.alignments, torch.nan).numpy(),
            dropped=(~measured.good).nonzero()[:, 0].numpy(),
            held_bytes=0 if rows is None else rows.nbytes,
        )

    def _from_window(self, candidates: Sequence[Batch]) -> bool:
        return self._window is not None and self._window.holds(self._places(candidates))

    def _places(self, candidates: Sequence[Batch]) -> Tensor:
        """Of all processes' candidates in the data."""
        none = torch.zeros(0, dtype=torch.int64)
        return gather_rows(torch.cat([none, *(batch.rows.cpu() for batch in candidates)]))

    def _coefficients(self, choice: Choice, tokens: IntArray) -> tuple[Vector, float]:
        """``c_i`` of every candidate's gradient, and the sum that the update is divided by."""
        size = tokens[choice.rows].astype(np.float64) if self.settings.reduction == "tokens" else 1.0
        found = np.zeros(len(tokens))
        found[choice.rows] = choice.weights * size
        divisor = found.sum() if choice.normalised else (np.ones(len(choice.rows)) * size).sum()
        return found, float(divisor)

    @property
    def remembers(self) -> bool:
        """True if ``observe`` must be called before every update."""
        return self._measurer.remembers

    @property
    def shadow(self) -> ShadowMoments:
        """Second moments of projected updates, for the published form."""
        return self._measurer.shadow

    def observe(self, gradient: dict[str, Tensor], optimizer: torch.optim.Optimizer, *, clipped: float = 1.0) -> None:
        """Take in the gradient of the update about to be made, times what clipping will multiply it by."""
        if self.remembers:
            seen = {name: grad * clipped for name, grad in gradient.items()}
            self.shadow.update(self.matrices, seen, read_adam(optimizer, self._params))

    def work(self) -> Tensor:
        """(parts, 2) as ``Counter.total``, of the trained model and the proxy. Every process must call it."""
        total = self._passes.counter.total()
        return total if self._proxy is None else total + self._proxy.counter.total()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep of the selection. Every process must call it."""
        window = {} if self._window is None else self._window.state_dict()
        sources = {} if self._sources is None else self._sources.means.state_dict()
        return {**self._measurer.state_dict(), **self._target.state_dict(), **window, **sources, _WORK: self.work()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state_dict``; an empty one changes nothing."""
        if _WORK in state:
            self._passes.counter.go_on_from(state[_WORK])
        self._target.load_state_dict(state, device=next(iter(self._params.values())).device)
        if self._window is not None:
            self._window.load_state_dict(state)
        if self._sources is not None:
            self._sources.means.load_state_dict(state)
        if self.remembers and "step" in state:  # of a run of another method otherwise, which is told when it matters
            self.shadow.load_state_dict(state)
