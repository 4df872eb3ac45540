"""Numbers of the choices since the last log entry: is the choice working, and what is it made of?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from tamis.online.proposal import Proposal
from tamis.solve.greedy import top

__all__ = ["Meter"]

_MOST_SOURCES = 20  # named in a log entry; the candidates' own log has them all


class Meter:
    """Averages over choices; ``take`` empties it."""

    def __init__(self) -> None:
        self._empty()

    def _empty(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._last: dict[str, float] = {}
        self._sources: Counter[str] = Counter()
        self._kept = 0.0

    def add(self, proposal: Proposal, sources: Sequence[str | None]) -> None:
        """One choice."""
        choice, sums = proposal.choice, self._sums
        sums["effective_size"].append(choice.effective_size)
        sums["dropped"].append(float(len(proposal.dropped)))
        sums["fallback"].append(float(choice.fallback is not None))
        if proposal.target_loss is not None:
            sums["target_loss"].append(proposal.target_loss)
        if proposal.alignments is not None:
            sums["scored"].append(float(proposal.scored))
            sums["score_age"].append(float(proposal.score_age))
            sums["target_age"].append(float(proposal.target_age))
            known = proposal.alignments[np.isfinite(proposal.alignments)]
            if len(known):  # no source has a mean while all scored rows were not finite
                sums["aligned_share"].append(float((known > 0).mean()))
            sums["weight_sum"].append(choice.weight_sum)
            sums["held_gb"].append(proposal.held_bytes / 1e9)
            if choice.scale is not None:
                sums["scale"].append(choice.scale)
            if not proposal.by_source and 0 < len(choice.rows) < len(known):  # rows of one source are all alike
                best = top(np.nan_to_num(proposal.alignments, nan=-np.inf), count=len(choice.rows))
                sums["overlap_with_top"].append(len(set(best) & set(choice.rows)) / len(best))
        for row, weight in zip(choice.rows.tolist(), choice.weights.tolist(), strict=True):
            source = sources[row]
            if source is not None:
                self._sources[source] += weight
                self._kept += weight

    def note(self, name: str, value: float) -> None:
        """One more number to average."""
        self._sums[name].append(value)

    def note_last(self, name: str, value: float) -> None:
        """A number that grows over the run, of which the latest counts."""
        self._last[name] = value

    def take(self) -> dict[str, float]:
        """The averages by name, and the share of the update's weight by source."""
        found = {f"selection/{name}": float(np.mean(values)) for name, values in self._sums.items()}
        found |= {f"selection/{name}": value for name, value in self._last.items()}
        if self._kept > 0:
            for source, weight in self._sources.most_common(_MOST_SOURCES):
                found[f"selection/share/{source}"] = weight / self._kept
        self._empty()
        return found
