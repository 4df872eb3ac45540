"""The second-order term of Influence Distillation: is it worth having, and what Adam makes of it.

Notation: scores p and curvature Q of the n pool rows, learning rate η, weights w >= 0 with sum n; ``m`` and ``v`` are
Adam's raw moments after ``step`` finished steps. Positive scores mean that training on the row lowers the target loss.
Equations 8 and 9 put ``a`` and ``b`` to use: ``p = (G ⊙ a)(g_T - (η/n) H_T b)``, ``Q = (G ⊙ a) H_T (G ⊙ a)^T / n``.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tamis.maths.adam import Untouched, preconditioner

__all__ = ["WORTH_HAVING", "TermRatio", "adam_offset", "adam_scale"]

# Above this ratio the second-order term changes which rows are selected, and the first order should not stand alone.
WORTH_HAVING = 0.05


@dataclass(frozen=True, kw_only=True)
class TermRatio:
    """Sizes of the two terms of ``f(w) = -T1 + T2``."""

    first: float  # T1 = p·w
    second: float  # T2 = (η/2) w·Qw; negative where the Hessian is

    @property
    def ratio(self) -> float:
        """``|T2 / T1|``, linear in η; infinite if only T1 is zero, 0 if T2 is."""
        if self.second == 0:
            return 0.0
        return abs(self.second / self.first) if self.first != 0 else float("inf")

    @property
    def worth_having(self) -> bool:
        """The ratio is above 5 %."""
        return self.ratio > WORTH_HAVING


def adam_scale(
    v: Float[Tensor, "*P"],
    *,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    untouched: Untouched = "zero",
) -> Float[Tensor, "*P"]:
    """``a = (1-β1) / ((1-β1^s) (√(v/(1-β2^s)) + ε))`` with s = ``step`` finished steps (section 3.2 of the paper).

    The bias correction of the first moment is the paper's, at s; ``preconditioner`` has that of the next step. What
    coordinates get that have never had a gradient is said there too: pass one layer's ``v`` at a time.

    Raises:
        InvalidInput: ``step`` is below 1 or ``v`` has a negative entry.
        InvalidSettings: β1, β2, ε or ``untouched`` is out of range.
    """
    next_step = preconditioner(v, step=step, beta1=beta1, beta2=beta2, eps=eps, untouched=untouched)
    return next_step * ((1 - beta1 ** (step + 1)) / (1 - beta1**step))


def adam_offset(
    m: Float[Tensor, "*P"],
    v: Float[Tensor, "*P"],
    *,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    untouched: Untouched = "zero",
) -> Float[Tensor, "*P"]:
    """``b = β1 m / ((1-β1^s) (√(v/(1-β2^s)) + ε))``: the part of the update that no row's weight changes.

    Raises:
        InvalidInput: ``step`` is below 1 or ``v`` has a negative entry.
        InvalidSettings: β1, β2, ε or ``untouched`` is out of range.
    """
    scale = adam_scale(v, step=step, beta1=beta1, beta2=beta2, eps=eps, untouched=untouched)
    return scale * m * (beta1 / (1 - beta1))
