"""Look-ahead selection: candidates by what they do to the target loss k updates later, through AdamW's own dynamics.

Section 5 of *How Faithful Is Trajectory-Based Data Attribution?*. Unlike those of the other methods, a score here is
not a function of one step's inner products: ``rehearsal`` computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tamis.errors import InvalidSettings
from tamis.online.methods.choice import Choice, Evidence, Needs, check_settings, top_choice
from tamis.trajectory.adjoint import steps_back

__all__ = ["Lookahead"]


@dataclass(frozen=True, kw_only=True)
class Lookahead:
    """The candidates whose removal would raise the target loss most, ``horizon`` updates later; all weigh the same.

    ``horizon=1`` is the exact per-step rule ``<grad t, K J g_i>`` with Adam's derivative K and the clip Jacobian J, and
    holds one copy of the parameters and both moments. For longer horizons:

    * ``form="rehearsal"`` (recommended) trains ahead on the next ``horizon`` candidate batches, takes the target's
      gradient where that ends, and sweeps back once: scores for all of them. Slot j of a block looks ``horizon - j``
      updates ahead; a block ends with its epoch.
    * ``form="frozen"`` repeats this update's own transition: one Fisher product per update looked ahead, in every
      update, and the target's gradient where the run is.

    Args:
        keep: candidates kept.
        oversample: candidates looked at per candidate kept.
        horizon: k; tune it with the learning rate: the smaller the rate, the longer.
        form: "rehearsal" or "frozen", as above.
        curvature: what stands for the Hessian on the way back; "exact", "ggn", "fisher" or "none".
        secant: remove a candidate from its own update exactly instead of to first order; needs every candidate's
            gradient, so small models or adapters.
        cold_start: updates before the method starts.

    Raises:
        InvalidSettings: a value is out of range.
    """

    name: ClassVar[str] = "lookahead"
    keeps_all: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(alignment="jacobian", ahead=True)  # its scores come in place of alignments
    keep: int = 8
    oversample: int = 4
    horizon: int = 1
    form: Literal["rehearsal", "frozen"] = "rehearsal"
    curvature: Literal["exact", "ggn", "fisher", "none"] = "fisher"
    secant: bool = False
    cold_start: int = 1

    def __post_init__(self) -> None:
        check_settings(self)
        if self.horizon < 1:
            raise InvalidSettings(f"horizon must be at least 1 update, got {self.horizon}")
        if self.cold_start < 1 and not self.secant:
            raise InvalidSettings(
                "cold_start=0: Adam's first step hardly depends on a gradient's size, so that its derivative does not "
                "say what leaving out a candidate does; set cold_start to 1 or more (1 is the default), or "
                "secant=True, which is exact there"
            )

    @property
    def block(self) -> int:
        """Updates that one rehearsal serves."""
        return self.horizon if self.form == "rehearsal" else 1

    def spent(self, slot: int) -> float:
        """Training steps on the candidates of update ``slot`` of a block that scoring them is as dear as; measured.

        One ahead, one for their own gradients if those are needed, and the way back: without curvature over the first
        update, which nothing is carried on from, and not at all where finite removal has scored it.
        """
        back = steps_back(self.curvature)
        repeated = back * (self.horizon - 1) if self.form == "frozen" else 0.0
        over = back if slot else 0.0 if self.secant else steps_back("none")
        return 1 + self.secant + repeated + over

    @property
    def cost(self) -> str:
        """Work per update beside the update on what was kept, in a sentence."""
        steps = sum(self.spent(slot) for slot in range(self.block)) / self.block
        found = f"per update: as much as {steps:.3g} training steps on all candidates, and "
        if self.block == 1:
            return f"{found}the target rows"
        return (
            f"{found}every {self.block} updates the target rows. Memory: {self.block} copies of parameters, both "
            "moments and two gradients"
        )

    def choose(self, evidence: Evidence) -> Choice:
        """Weight 1 for the best scores, which stand where alignments do."""
        return top_choice(evidence, self.keep)
