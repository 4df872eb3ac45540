"""The second-order term of Influence Distillation: is it worth having, and its form under Adam (equations 4, 8 and 9).

Notation: n pool rows with gradients ``G`` (n, P) of the mean supervised loss, target gradient ``g_T`` and Hessian
``H_T``, learning rate η, weights w >= 0 with sum n. Positive scores mean that training on the row lowers the target
loss. ``m`` and ``v`` are Adam's raw moments after ``step`` finished steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidInput, NonFinite
from tamis.maths.adam import Untouched, preconditioner

__all__ = [
    "WORTH_HAVING",
    "TermRatio",
    "adam_offset",
    "adam_quadratic",
    "adam_scale",
    "adam_scores",
    "term_ratio",
]

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


def term_ratio(
    weighted_gradient: Float[Tensor, " P"],
    hessian_product: Float[Tensor, " P"],
    target_gradient: Float[Tensor, " P"],
    *,
    eta: float,
    pool_size: int,
) -> TermRatio:
    """``T1 = s·g_T`` and ``T2 = (η/2) s·H_T s / n`` of weights w, from ``s = G^T w`` and one product ``H_T s``.

    Equations 3 to 5 with ``p = G g_T`` and ``Q = G H_T G^T / n``. For the paper's ``w = 1``, s is the plain sum of the
    pool's gradients. Unit and raw gradients give ratios that differ tenfold: say which ones were used. Sums in float64.

    Raises:
        InvalidInput: η is negative or the pool is empty.
        NonFinite: a product is NaN or infinite.
    """
    if pool_size < 1 or not 0 <= eta < float("inf"):
        raise InvalidInput(f"the ratio needs rows and eta >= 0, got {pool_size} rows and eta={eta}")
    s = weighted_gradient.double()
    first = float(s @ target_gradient.double())
    second = eta / 2 * float(s @ hessian_product.double()) / pool_size
    if not (abs(first) < float("inf") and abs(second) < float("inf")):
        raise NonFinite(f"the first-order term is {first} and the second-order one {second}; look for NaN gradients")
    return TermRatio(first=first, second=second)


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


def adam_scores(
    grads: Float[Tensor, "N P"],
    scale: Float[Tensor, " P"],
    target_gradient: Float[Tensor, " P"],
    offset_product: Float[Tensor, " P"] | None = None,
    *,
    eta: float = 0.0,
    pool_size: int | None = None,
) -> Float[Tensor, " N"]:
    """Equation 8: ``p = G^Adam (g_T - (η/n) H_T b)``, ``G^Adam = G ⊙ a``.

    Args:
        grads: G, or some of its rows.
        scale: a, from ``adam_scale``.
        target_gradient: g_T, raw: it is not multiplied by a.
        offset_product: ``H_T b`` with b from ``adam_offset``; None leaves the correction out, as first order does.
        eta: η, read only with ``offset_product``.
        pool_size: n, read only with ``offset_product``; by default the rows of ``grads``.
    """
    target = target_gradient
    if offset_product is not None:
        target = target - (eta / (len(grads) if pool_size is None else pool_size)) * offset_product
    return grads @ (scale * target)


def adam_quadratic(
    grads: Float[Tensor, "N P"],
    scale: Float[Tensor, " P"],
    hessian_products: Float[Tensor, "N P"],
) -> Float[Tensor, "N N"]:
    """Equation 9: ``Q = G^Adam H_T G^Adam^T / n`` from ``H_T`` times each row of ``G^Adam``; symmetrised.

    With ``scale`` all ones this is the plain Q of equation 4. η is not in it.
    """
    q = (grads * scale) @ hessian_products.T / max(len(grads), 1)
    return torch.add(q, q.T).div_(2)
