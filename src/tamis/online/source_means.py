"""Sources that speak for their candidates: a few of each are scored now and then, and all get their source's mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from tamis.seeds import child_seed, random_permutation
from tamis.types import Batch, IntArray

__all__ = ["SourceMeans", "SourceScores", "drawn_by", "said_of_many_sources", "source_numbers"]

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

    def score(
        self,
        candidates: Sequence[Batch],
        goal: Mapping[str, Tensor],
        moments: Moments | None,
        *,
        places: Tensor,
        counts: list[int],
        sizes: Vector,
        seed: int,
    ) -> tuple[int, int]:
        """Run a few candidates of every source; nothing of them is kept but their part in the means.

        Args:
            candidates: this process's.
            goal: the mean target gradient.
            moments: Adam's, where the method needs them.
            places: (n,) of all processes' candidates in the data.
            counts: candidates of every process.
            sizes: (n,) ``row_sizes`` of all processes' candidates.
            seed: of the sample; the same in every process.

        Returns:
            How many candidates of all processes were scored, and the bytes of this process's gradients while they were
            compared, at most.
        """
        sampled = self.means.sample(places, seed=child_seed(seed, "sample of sources"))
        asked = np.zeros(len(places))
        asked[sampled] = 1.0
        start = offset_of(counts)
        mine = [batch for batch, _, _ in regrouped(candidates, asked[start : start + counts[rank()]])]
        rows, losses = self._passes.hold(mine)
        self._passes.counter.add("candidates", self._measurer.work, mine)
        of_each = counts_of_all(len(rows))
        scored = self._measurer.measure(rows, losses, goal, moments, counts=of_each, sizes=sizes[sampled])
        self.means.take(places[sampled], scored)
        return len(sampled), rows.nbytes

    def next(self, places: Tensor, *, seed: int) -> tuple[Measured, Vector]:
        """For one more choice: what the method is shown of the candidates, and their sources' means (NaN: none yet)."""
        means, good = self.means.next(places)
        shown = drawn_by(means, temperature=self._temperature, seed=child_seed(seed, "draw by source"))
        measured = Measured(losses=torch.full_like(means, torch.nan), alignments=shown, good=good)
        known: Vector = torch.where(good, means, torch.nan).numpy()
        return measured, known


def drawn_by(means: Tensor, *, temperature: float, seed: int) -> Tensor:
    """``z_i + τ g_i``, with ``z`` the means in standard deviations of the candidates' and ``g`` of Gumbel's law.

    The largest ``k`` of them are ``k`` draws without replacement, with probabilities in proportion to ``exp(z_i / τ)``;
    with ``τ = 0``, the best sources' first candidates. A candidate without a mean counts as an average one, ``z = 0``.
    """
    known = torch.isfinite(means)
    z = torch.zeros_like(means)
    if bool(known.any()):
        own, spread = means[known] - means[known].mean(), means[known].std(correction=0)
        if spread > 1e-12 * means[known].abs().max():  # equal means differ from their own mean by rounding
            z[known] = own / spread
    if temperature == 0:
        return z
    uniform = torch.from_numpy(np.random.default_rng(seed).random(len(means))).clamp_min(1e-300)
    return z - temperature * (-uniform.log()).log()


def source_numbers(names: Sequence[str | None]) -> IntArray:
    """(N,) of every row of the data, an index of its source; rows without a name are a source of their own.

    Raises:
        InvalidInput: there is nothing to choose between.
    """
    seen: dict[str | None, int] = {}
    numbers = np.fromiter((seen.setdefault(name, len(seen)) for name in names), np.int64, count=len(names))
    if len(seen) < 2:
        name = next(iter(seen), None)
        which = "" if name is None else f" ({name!r})"
        raise InvalidInput(
            f"candidates='sources:K': all {len(names)} rows of the pool are of one source{which}, so there is nothing "
            "to choose between; give rows a field 'source', or every source a file of its own (in Python: give "
            "train_dataset a column 'source')"
        )
    return numbers


def said_of_many_sources(sources: int, candidates: int) -> str | None:
    """A warning where so few candidates of a choice are of any one source that means hardly come about."""
    if sources <= candidates // 2:
        return None
    return (
        f"{sources} sources and {candidates} candidates to a choice: most sources are seldom scored, and their rows "
        "drawn at random; join sources, or raise oversample"
    )


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
        self._sizes = torch.from_numpy(np.bincount(source))
        self._sums = torch.zeros(len(self._sizes), dtype=torch.float64)
        self._counts = torch.zeros(len(self._sizes), dtype=torch.float64)
        self._broken = torch.zeros(0, dtype=torch.int64)  # rows of the last scoring without a finite score
        self.scorings = 0
        self.age = every  # choices made since the last scoring

    @property
    def is_due(self) -> bool:
        """Whether the next choice has to score first."""
        return self.age + 1 >= self._every

    def sample(self, places: Tensor, *, seed: int) -> IntArray:
        """Which candidates to score, ascending: random ones of every source among them, as many as there are.

        Args:
            places: (n,) of the candidates in the data.
            seed: of the draw.
        """
        order = random_permutation(seed, len(places))
        own = self._source[places.numpy()][order]
        by_source = np.argsort(own, kind="stable")
        _, first, size = np.unique(own[by_source], return_index=True, return_counts=True)
        place = np.arange(len(own)) - np.repeat(first, size)
        return np.sort(order[by_source[place < self._rows]])

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
        self.scorings, self.age = self.scorings + 1, -1

    def next(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """For one more choice: the mean of every candidate's source, NaN where there is none, and which candidates are
        not known to have no finite score.
        """
        self.age += 1
        own = torch.from_numpy(self._source[places.numpy()])
        return self._sums[own] / self._counts[own], ~torch.isin(places, self._broken)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""
        counted = torch.tensor([self.scorings, self.age])
        state = {"sums": self._sums, "counts": self._counts, "broken": self._broken, "counted": counted}
        return {f"{_PREFIX}{name}": value for name, value in {**state, "sizes": self._sizes}.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state_dict``; other entries are not looked at.

        Raises:
            InvalidInput: the sources are others than they were.
        """
        own = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        if own:
            if not torch.equal(own["sizes"], self._sizes):
                raise InvalidInput(
                    f"the checkpoint is of a pool with {len(own['sizes'])} sources, and this one's {len(self._sizes)} "
                    "differ from them in number or size; resume with the same train_dataset"
                )
            self._sums, self._counts, self._broken = own["sums"], own["counts"], own["broken"]
            self.scorings, self.age = (int(number) for number in own["counted"])
