"""Sources that speak for their candidates: a few of each are scored now and then, and all get their source's mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tamis.errors import InvalidInput
from tamis.model.processes import counts_of_all, rank
from tamis.online.batches import regrouped
from tamis.online.evidence import Measured, Measurer, Moments
from tamis.online.methods.choice import Vector
from tamis.online.passes import Passes
from tamis.online.settings import StepSettings
from tamis.online.together import offset_of
from tamis.types import Batch, IntArray

__all__ = ["SourceMeans", "SourceScores", "drawn_by", "source_numbers"]

_PREFIX = "sources."


class SourceScores:
    """Scores a few candidates of every source with the trained model, and lends every candidate its source's mean.

    Args:
        source: (N,) index of the source of every row of the data.
        settings: of the step.
        passes: of the trained model.
        measurer: what a score is.
    """

    def __init__(self, source: IntArray, settings: StepSettings, *, passes: Passes, measurer: Measurer) -> None:
        self._passes, self._measurer = passes, measurer
        self.means = SourceMeans(
            source, every=settings.scored_every, rows=settings.source_rows, memory=settings.source_memory
        )
        self._temperature = settings.source_temperature

    @property
    def age(self) -> int:
        """Choices made since the last scoring."""
        return self.means.age

    def is_due(self, places: Tensor, *, keep: int) -> bool:
        """Whether a choice of ``keep`` of the candidates at ``places`` has to score first."""
        return self.means.is_due(places, keep=keep)

    def score(
        self,
        candidates: Sequence[Batch],
        goal: Mapping[str, Tensor],
        moments: Moments | None,
        *,
        places: Tensor,
        counts: list[int],
        tokens: IntArray,
    ) -> None:
        """Run a few candidates of every source; nothing of them is kept but their part in the means.

        Args:
            candidates: this process's.
            goal: the mean target gradient.
            moments: Adam's, where the method needs them.
            places: (n,) of all processes' candidates in the data.
            counts: candidates of every process.
            tokens: (n,) supervised tokens of all processes' candidates.
        """
        sampled = self.means.sample(places)
        asked = np.zeros(len(places))
        asked[sampled] = 1.0
        start = offset_of(counts)
        mine = [batch for batch, _, _ in regrouped(candidates, asked[start : start + counts[rank()]])]
        rows, losses = self._passes.hold(mine)
        self._passes.counter.add("candidates", "gradient", mine)
        of_each = counts_of_all(len(rows))
        scored = self._measurer.measure(rows, losses, goal, moments, counts=of_each, tokens=tokens[sampled])
        self.means.take(places[sampled], scored)

    def next(self, places: Tensor, *, seed: int) -> tuple[Vector, Measured, Tensor]:
        """Of one more choice: every candidate's mean (NaN where there is none), what the method sees in its stead, and
        which candidates may be chosen.
        """
        means, known = self.means.next(places)
        shown = drawn_by(means.alignments, temperature=self._temperature, seed=seed)
        seen: Vector = torch.where(means.good & known, means.alignments, torch.nan).numpy()
        return seen, replace(means, alignments=shown), known


def drawn_by(means: Tensor, *, temperature: float, seed: int) -> Tensor:
    """``z_i + τ g_i``, with ``z`` the means in standard deviations of the candidates' and ``g`` of Gumbel's law.

    The largest ``k`` of them are ``k`` draws without replacement, with probabilities in proportion to ``exp(z_i / τ)``;
    with ``τ = 0``, the best sources' first candidates. Candidates without a mean stay NaN.
    """
    known = torch.isfinite(means)
    if not bool(known.any()):
        return means
    z, spread = means - means[known].mean(), means[known].std(correction=0)
    # Equal means differ from their own mean by rounding.
    z = z / spread if spread > 1e-12 * means[known].abs().max() else torch.where(known, 0.0, torch.nan)
    if temperature == 0:
        return z
    uniform = torch.from_numpy(np.random.default_rng(seed).random(len(means)))
    return z - temperature * (-uniform.log()).log()


def source_numbers(names: Sequence[str | None]) -> IntArray:
    """(N,) of every row of the data, an index of its source; rows without a name are a source of their own.

    Raises:
        InvalidInput: there is nothing to choose between.
    """
    found, numbers = np.unique(["" if name is None else name for name in names], return_inverse=True)
    if len(found) < 2:
        which = f" ({str(found[0])!r})" if len(found) and found[0] else ""
        raise InvalidInput(
            f"candidates='sources:K': all {len(names)} rows of the pool are of one source{which}, so there is nothing "
            "to choose between; give rows a field 'source', or every source a file of its own (in Python: give "
            "train_dataset a column 'source')"
        )
    return numbers.astype(np.int64)


class SourceMeans:
    """Running means of the alignments of every source's candidates.

    After scorings ``1 ... k`` with ``n_j`` rows of a source, whose alignments sum to ``s_j``, its mean is
    ``Σ_j β^(k-j) s_j / Σ_j β^(k-j) n_j``, over those scorings that saw it. A source that was never scored has none.

    Args:
        source: (N,) index of the source of every row of the data.
        every: choices from one scoring to the next.
        rows: of each source to score.
        memory: ``β``.
    """

    def __init__(self, source: IntArray, *, every: int, rows: int, memory: float) -> None:
        self._source, self._every, self._rows, self._memory = source, every, rows, memory
        count = int(source.max()) + 1
        self._sums = torch.zeros(count, dtype=torch.float64)
        self._counts = torch.zeros(count, dtype=torch.float64)
        self._broken = torch.zeros(0, dtype=torch.int64)  # rows of the last scoring without a finite score
        self.age = every  # choices made since the last scoring

    def is_due(self, places: Tensor, *, keep: int) -> bool:
        """Whether a choice of ``keep`` of the candidates at ``places`` has to score first.

        Also if too few of them are of a source with a mean.
        """
        known = self._counts[torch.from_numpy(self._source[places.numpy()])] > 0
        return self.age + 1 >= self._every or int(known.sum()) < min(keep, len(places))

    def sample(self, places: Tensor) -> IntArray:
        """Which candidates to score, ascending: the first few of every source, in an order that is random already.

        Args:
            places: (n,) of the candidates in the data.
        """
        own = self._source[places.numpy()]
        order = np.argsort(own, kind="stable")
        _, first, size = np.unique(own[order], return_index=True, return_counts=True)
        rank = np.arange(len(own)) - np.repeat(first, size)
        return np.sort(order[rank < self._rows])

    def take(self, places: Tensor, scored: Measured) -> None:
        """Take in the scores of the candidates at ``places``; those that are not finite enter no mean."""
        own = torch.from_numpy(self._source[places.numpy()][scored.good.numpy()])
        values = scored.alignments[scored.good].double()
        seen = torch.from_numpy(np.unique(own.numpy()))
        self._sums[seen] *= self._memory
        self._counts[seen] *= self._memory
        self._sums.index_add_(0, own, values)
        self._counts.index_add_(0, own, torch.ones_like(values))
        self._broken = places[~scored.good]
        self.age = -1

    def next(self, places: Tensor) -> tuple[Measured, Tensor]:
        """Every candidate with its source's mean, and which of their sources have one: the others cannot be chosen."""
        self.age += 1
        own = torch.from_numpy(self._source[places.numpy()])
        known = self._counts[own] > 0
        means = torch.where(known, self._sums[own] / self._counts[own], torch.nan)
        losses, good = torch.full_like(means, torch.nan), ~torch.isin(places, self._broken)
        return Measured(losses=losses, alignments=means, good=good), known

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""
        state = {"sums": self._sums, "counts": self._counts, "broken": self._broken, "age": torch.tensor(self.age)}
        return {f"{_PREFIX}{name}": value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state_dict``; other entries are not looked at."""
        own = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        if own:
            self._sums, self._counts, self._broken = own["sums"], own["counts"], own["broken"]
            self.age = int(own["age"])
