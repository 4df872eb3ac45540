"""What an online step knows of its candidates, and what a method makes of it: plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tamis.errors import InvalidSettings
from tamis.solve.greedy import top
from tamis.types import IntArray
from tamis.values import check_types

__all__ = [
    "AlignmentForm",
    "Choice",
    "Evidence",
    "InteractionForm",
    "Lengths",
    "Method",
    "Needs",
    "Vector",
    "check_settings",
    "check_start",
    "cold_updates",
    "everything",
    "top_choice",
    "unweighted",
    "weighted",
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
    lengths: InteractionForm | None = None  # of the gradients and of one sum of them, in that metric; no pairs
    sketch_dim: int | None = None  # numbers per side of a layer's sketch, if the method itself prescribes sketches
    token_level: bool = False  # alignments of equal positions only, an ablation
    target_only: bool = False  # train on the target rows themselves; candidates are not looked at
    ahead: bool = False  # scores come from training ahead, not from one step's inner products

    @property
    def adam(self) -> bool:
        """True if the optimizer must be an Adam that has taken a step."""
        forms = (self.interactions, self.lengths)
        return self.alignment in ("adam", "jacobian", "projected") or "metric" in forms or "preconditioned" in forms

    @property
    def reads_adam(self) -> bool:
        """True if the optimizer's moments take part at all; a candidate's own Adam step needs no step before it."""
        return self.adam or self.alignment in ("secant", "cosine")


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What is needed of ``G`` where no pair of candidates is looked at."""

    squares: Vector  # (n,) ||grad l_i||²: the diagonal of G
    aligned: float  # ||the sum of all grad l_i with b_i > 0||²: the sum of G over them


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Inner products of the ``n`` candidates of one step, every number finite, positive = lowers the target loss.

    ``grad l_i`` is what weight 1 adds to the update: where every supervised token counts alike, it is the gradient of
    the row's mean loss times the row's share of tokens (its tokens over the candidates' mean).
    """

    alignments: Vector  # (n,) b
    interactions: Vector | None = None  # (n, n) G
    lengths: Lengths | None = None
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
    scale: float | None = None  # c of the filter and of matching weights, c_P of anchored and tilted ones
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
    def cold_start(self) -> int | None:
        """Updates before the method starts, drawn uniformly; None for the default of ``cold_updates``."""
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


def cold_updates(method: Method) -> int:
    """Updates before ``method`` starts: what it says, else 1 for the Jacobian, which is right early, and 10."""
    if method.cold_start is not None:
        return method.cold_start
    return 1 if method.needs.alignment == "jacobian" else 10


def unweighted(rows: IntArray) -> Choice:
    """Weight 1 for ``rows``."""
    return Choice(rows=rows, weights=np.ones(len(rows)), weight_sum=float(len(rows)))


def top_choice(evidence: Evidence, keep: int) -> Choice:
    """Weight 1 for the ``keep`` candidates of the largest alignments."""
    return unweighted(top(evidence.alignments, count=min(keep, len(evidence.alignments))))


def everything(count: int) -> Choice:
    """Weight 1 for all of ``count`` candidates."""
    return unweighted(np.arange(count, dtype=np.int64))


def weighted(rows: IntArray, weights: Vector, *, scale: float | None, normalise: bool) -> Choice:
    """Bring the weights to the sum of plain training, ``len(rows)``; equal weights where they have no usable sum."""
    total = float(weights.sum())
    if not total > 1e-6 * float(np.abs(weights).sum()):
        return replace(unweighted(rows), scale=scale, fallback="the weights have no positive sum")
    if normalise:
        weights = weights * (len(rows) / total)
    return Choice(rows=rows, weights=weights, normalised=normalise, weight_sum=total, scale=scale)


def check_settings(method: Any) -> None:
    """Refuse settings of a wrong type, and sizes that mean nothing. For a method's ``__post_init__``.

    Raises:
        InvalidSettings: naming the setting and what it may be.
    """
    check_types(method)
    for name, least in (("keep", 1), ("oversample", 1), ("cold_start", 0)):
        value = getattr(method, name)
        if value is not None and value < least:
            raise InvalidSettings(f"{name}={value}: expected at least {least}")


def check_start(alignment: AlignmentForm, interactions: InteractionForm, cold_start: int | None) -> None:
    """Refuse a start without the second moments that a form divides by.

    Raises:
        InvalidSettings: that is so.
    """
    divides = alignment in ("adam", "jacobian", "projected") or interactions in ("metric", "preconditioned")
    if divides and cold_start is not None and cold_start < 1:
        raise InvalidSettings(
            f"alignment={alignment!r} with interactions={interactions!r} needs Adam's second moments, which exist "
            "after the first update: set cold_start to 1 or more (10 is the default)"
        )
