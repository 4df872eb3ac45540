"""Look-ahead selection: candidates by what they do to the target loss k updates later, through AdamW's own dynamics.

Section 5 of *How Faithful Is Trajectory-Based Data Attribution?*. Unlike the methods of ``scorers``, a score here is
not a function of one step's inner products: ``rehearsal`` computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tamis.errors import InvalidSettings
from tamis.online.choice import Choice, Evidence, Needs, check_sizes, unweighted
from tamis.solve.greedy import top

__all__ = ["Lookahead"]


@dataclass(frozen=True, kw_only=True)
class Lookahead:
    """The candidates whose removal would raise the target loss most, ``horizon`` updates later; all weigh the same.

    ``horizon=1`` is the exact per-step rule ``<grad t, K J g_i>`` with Adam's derivative K and the clip Jacobian J, and
    costs no second copy of anything. For longer horizons:

    * ``form="rehearsal"`` (recommended) trains ahead on the next ``horizon`` candidate batches, takes the target's
      gradient where that ends, and sweeps back once: scores for all of them. Slot j of a block looks ``horizon - j``
      updates ahead.
    * ``form="frozen"`` repeats this update's own transition: one Fisher product per update looked ahead, in every
      update, and the target's gradient where the run is.

    Args:
        keep: candidates kept.
        oversample: candidates looked at per candidate kept.
        horizon: k. Tune it with the learning rate: the smaller the rate, the longer.
        form: see above.
        curvature: what stands for the Hessian on the way back; "exact", "ggn", "fisher" or "none".
        secant: remove a candidate from its own update exactly instead of to first order; needs every candidate's
            gradient, so small models or adapters.
        cold_start: updates before the method starts.

    Raises:
        InvalidSettings: a value is out of range.
    """

    keep: int = 8
    oversample: int = 4
    horizon: int = 1
    form: Literal["rehearsal", "frozen"] = "rehearsal"
    curvature: Literal["exact", "ggn", "fisher", "none"] = "fisher"
    secant: bool = False
    cold_start: int = 1

    def __post_init__(self) -> None:
        check_sizes(self.keep, self.oversample, self.cold_start)
        if self.horizon < 1:
            raise InvalidSettings(f"horizon must be at least 1 update, got {self.horizon}")
        if self.form not in ("rehearsal", "frozen"):
            raise InvalidSettings(f"form must be 'rehearsal' or 'frozen', got {self.form!r}")
        if self.curvature not in ("exact", "ggn", "fisher", "none"):
            raise InvalidSettings(f"curvature must be exact, ggn, fisher or none, got {self.curvature!r}")

    @property
    def name(self) -> str:
        """What a user types to get it."""
        return "lookahead"

    @property
    def keeps_all(self) -> bool:
        """Never."""
        return False

    @property
    def block(self) -> int:
        """Updates that one rehearsal serves."""
        return self.horizon if self.form == "rehearsal" else 1

    @property
    def needs(self) -> Needs:
        """Target rows and an Adam that has taken a step; the scores come in place of alignments."""
        return Needs(alignment="jacobian", ahead=True)

    @property
    def back(self) -> int:
        """Training steps that the way back over one update is as dear as, by measurement."""
        return 3 if self.curvature == "exact" else 2

    @property
    def cost(self) -> str:
        """Work per update beside plain training on all candidates, in a sentence."""
        passes = {2: "two", 3: "three"}[self.back]
        own = "every candidate's own gradient, " if self.secant else ""
        if self.horizon == 1:
            return f"per update: {own}a pass as dear as {passes} training steps on the candidates, and the target rows"
        if self.form == "frozen":
            return (
                f"per update: {own}{self.horizon} passes, each as dear as {passes} training steps on the candidates, "
                "and the target rows"
            )
        return (
            f"per update: {own}one training step on all candidates and a pass as dear as {passes} more; every "
            f"{self.horizon} updates the target rows. Memory: {self.horizon} copies of parameters, both moments and "
            "two gradients"
        )

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for the best scores, which stand where alignments do."""
        return unweighted(top(evidence.alignments, count=min(self.keep, len(evidence.alignments))))
