"""What an online step knows of its candidates, and what a method makes of it: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from tamis.errors import InvalidSettings
from tamis.types import IntArray

__all__ = [
    "AlignmentForm",
    "Choice",
    "Evidence",
    "InteractionForm",
    "Method",
    "Needs",
    "Vector",
    "check_forms",
    "check_sizes",
]

Vector = npt.NDArray[np.float64]

# How b_i is taken, with l_i the loss of candidate i and t the target:
#   adam       <grad l_i, D * grad t>, D the diagonal of Adam's next step
#   jacobian   <grad l_i, K * grad t>, K the derivative of Adam's step at the candidates' mean gradient
#   secant     <Γ_i, grad t>, Γ_i the step that Adam would take with candidate i alone
#   cosine     the secant over the length of Γ_i: the cosine of LESS but for the target's length
#   raw        <grad l_i, grad t>
#   projected  adam, with projected gradients and second moments kept of projected updates (as published)
AlignmentForm = Literal["adam", "jacobian", "secant", "cosine", "raw", "projected"]
# How G_ij is taken:
#   metric          <grad l_i, D * grad l_j>, the units of b
#   raw             <grad l_i, grad l_j>
#   preconditioned  <D * grad l_i, D * grad l_j>
#   token-level     raw, products of equal positions only
InteractionForm = Literal["metric", "raw", "preconditioned", "token-level"]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method must be told about the candidates. None: not needed, and not computed."""

    alignment: AlignmentForm | None = None
    interactions: InteractionForm | None = None
    target_only: bool = False  # train on the target rows themselves; candidates are not looked at

    @property
    def adam(self) -> bool:
        """True if the optimizer must be an Adam that has taken a step."""
        return self.alignment in ("adam", "jacobian", "projected") or self.interactions in ("metric", "preconditioned")

    @property
    def reads_adam(self) -> bool:
        """True if the optimizer's moments take part at all; a candidate's own Adam step needs no step before it."""
        return self.adam or self.alignment in ("secant", "cosine")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Inner products of the ``n`` candidates of one step, every number finite, positive = lowers the target loss."""

    alignments: Vector  # (n,) b
    interactions: Vector | None = None  # (n, n) G
    learning_rate: float = 1.0  # of the coming update

    @property
    def gram(self) -> Vector:
        """G, for methods that asked for it."""
        assert self.interactions is not None, "the method did not ask for interactions"
        return self.interactions


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which candidates the update is made of, and with which weights.

    The update's gradient is ``sum_i w_i grad l_i / sum_i w_i`` (``normalised``) or ``sum_i w_i grad l_i / k`` with
    ``k`` candidates kept. Normalised weights sum to ``k``.
    """

    rows: IntArray  # (k,) positions among the candidates, in the order chosen
    weights: Vector  # (k,)
    normalised: bool = True
    weight_sum: float = float("nan")  # before normalising; follows gradient noise
    scale: float | None = None  # c
    fallback: str | None = None  # why the method could not do what it does, and did something simpler

    def __post_init__(self) -> None:
        assert self.rows.shape == self.weights.shape

    @property
    def effective_size(self) -> float:
        """``exp`` of the weights' entropy: how many equally weighted candidates they amount to."""
        share = np.abs(self.weights) / max(float(np.abs(self.weights).sum()), 1e-300)
        share = share[share > 0]
        return float(np.exp(-(share * np.log(share)).sum()))


class Method(Protocol):
    """An online method: a frozen dataclass whose fields are its settings."""

    @property
    def name(self) -> str:
        """What a user types to get it."""
        ...

    @property
    def keep(self) -> int:
        """Candidates of a hard choice."""
        ...

    @property
    def oversample(self) -> int:
        """Candidates looked at per candidate kept."""
        ...

    @property
    def cold_start(self) -> int:
        """Updates before the method starts; until then candidates are drawn uniformly."""
        ...

    @property
    def keeps_all(self) -> bool:
        """True if every candidate may get a weight."""
        ...

    @property
    def needs(self) -> Needs:
        """What must be measured."""
        ...

    def choose(self, evidence: Evidence) -> Choice:
        """The choice; the same evidence gives the same choice."""
        ...


def check_sizes(keep: int, oversample: int, cold_start: int) -> None:
    """Refuse sizes that mean nothing.

    Raises:
        InvalidSettings: naming the setting.
    """
    for name, value, least in (("keep", keep, 1), ("oversample", oversample, 1), ("cold_start", cold_start, 0)):
        if value < least:
            raise InvalidSettings(f"{name} must be at least {least}, got {value}")


def check_forms(alignment: str, interactions: str, cold_start: int) -> None:
    """Refuse unknown forms, and a start without the second moments that a form divides by.

    Raises:
        InvalidSettings: naming the setting and what it may be.
    """
    if alignment not in get_args(AlignmentForm):
        raise InvalidSettings(f"alignment={alignment!r} is unknown; choose one of {', '.join(get_args(AlignmentForm))}")
    if interactions not in get_args(InteractionForm):
        raise InvalidSettings(
            f"interactions={interactions!r} is unknown; choose one of {', '.join(get_args(InteractionForm))}"
        )
    divides = alignment in ("adam", "jacobian", "projected") or interactions in ("metric", "preconditioned")
    if divides and cold_start < 1:
        raise InvalidSettings(
            f"alignment={alignment!r} with interactions={interactions!r} needs Adam's second moments, which exist "
            "after the first update: set cold_start to 1 or more (10 is the default)"
        )
