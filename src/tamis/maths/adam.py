"""What Adam would do with a gradient: its diagonal preconditioner and its update direction, three published forms.

``m`` and ``v`` are the raw moments as the optimizer keeps them (``exp_avg``, ``exp_avg_sq``), never bias-corrected;
``step`` is the number of steps finished, the optimizer's own ``step``. A gradient enters as that of step ``step + 1``.
Everything here has the sign of the gradient: the parameters move against it. No learning rate, no weight decay.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidInput, InvalidSettings

__all__ = ["ADAM_FORMS", "AdamForm", "Untouched", "adam_direction", "adam_jacobian", "preconditioner", "row_column"]

AdamForm = Literal["adam", "less-code", "uncorrected"]
Untouched = Literal["zero", "median", "keep"]

ADAM_FORMS: dict[AdamForm, str] = {
    "adam": "m̂' / (√v̂' + ε), both moments bias-corrected: Adam's own update",
    "less-code": "m' / √(v' + ε), no bias correction: as the public code of LESS computes it",
    "uncorrected": "m' / (√v' + ε), no bias correction: as the formula is often printed",
}

# A coordinate whose second moment is this far below its layer's mean has practically never had a gradient.
_UNTOUCHED_SHARE = 1e-12


def adam_direction(
    grad: Float[Tensor, " B *P"],
    m: Float[Tensor, "*P"],
    v: Float[Tensor, "*P"],
    *,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    form: AdamForm = "adam",
) -> Float[Tensor, " B *P"]:
    """Update direction Adam would take if each row of ``grad``, on its own, were the next gradient.

    Implements the Γ of LESS (Xia et al., 2024, section 2). With ``t = step + 1``::

        m' = β1 m + (1 - β1) g          v' = β2 v + (1 - β2) g²
        m̂' = m' / (1 - β1^t)            v̂' = v' / (1 - β2^t)

        "adam"         m̂' / (√v̂' + ε)      Adam's own update, what training does
        "less-code"    m' / √(v' + ε)       the public code of LESS; ε under the root damps coordinates with
                                            v' below it, 1e-8 = (1e-4)², and the first steps are not corrected
        "uncorrected"  m' / (√v' + ε)       bias correction left out

    Without correction, all coordinates are scaled by one factor (up to ε), so that cosines hardly differ between the
    first and the third form; dot products do. Rows of ``grad`` are per-sample gradients, of the mean loss over the
    supervised tokens of one example. The learning rate is not applied; the result has the sign of the gradient, not
    of the step. Computed in float32, in float64 if ``grad`` is.

    Raises:
        InvalidInput: ``step`` is negative or ``v`` has a negative entry.
        InvalidSettings: ``form`` is not one of ``ADAM_FORMS``, or β1, β2 or ε is out of range.
    """
    _check(step, beta1, beta2, eps, v)
    if form not in get_args(AdamForm):
        raise InvalidSettings(f"Adam form {form!r} is unknown; choose one of {', '.join(ADAM_FORMS)}")
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    grad, m, v = grad.to(dtype), m.to(dtype), v.to(dtype)
    first = torch.lerp(m.expand_as(grad), grad, 1 - beta1)
    second = (v * beta2).addcmul(grad, grad, value=1 - beta2)
    if form == "less-code":
        return first.div_(second.add_(eps).sqrt_())
    if form == "uncorrected":
        return first.div_(second.sqrt_().add_(eps))
    # In this order it is also PyTorch's: the root first, then its correction.
    second.sqrt_().div_((1 - beta2 ** (step + 1)) ** 0.5).add_(eps)
    return first.div_(second).div_(1 - beta1 ** (step + 1))


def preconditioner(
    v: Float[Tensor, "*P"],
    *,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    untouched: Untouched = "zero",
) -> Float[Tensor, "*P"]:
    """Adam's diagonal preconditioner ``D``: what the next update is multiplied by, per unit of its gradient.

    Implements equation 9 of *Filter-then-Weight*, with ``t = step`` finished steps::

        D = (1 - β1) / ((1 - β1^(t+1)) (√(v / (1 - β2^t)) + ε))

    It is the derivative of Adam's direction with respect to the new gradient, the change of ``v`` by that gradient
    left out. Pass one layer's ``v`` at a time: a coordinate with ``v`` below 1e-12 of its mean over the tensor has
    practically never had a gradient (all of a LoRA ``A`` while ``B`` is still zero), and the formula's 1/ε there
    would outweigh everything else.

    Args:
        v: second moments of one layer, not bias-corrected.
        step: finished steps, at least 1.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: Adam's ε.
        untouched: what such coordinates get: "zero", the "median" of the others' D, or "keep" for the bare formula.

    Raises:
        InvalidInput: ``step`` is below 1 or ``v`` has a negative entry.
        InvalidSettings: β1, β2, ε or ``untouched`` is out of range.
    """
    _check(step, beta1, beta2, eps, v)
    if step < 1:
        raise InvalidInput("the preconditioner needs at least one finished optimizer step; v is zero before")
    if untouched not in get_args(Untouched):
        raise InvalidSettings(f"untouched={untouched!r} is unknown; choose one of {', '.join(get_args(Untouched))}")
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    v = v.to(dtype)
    d = (1 - beta1) / ((1 - beta1 ** (step + 1)) * ((v / (1 - beta2**step)).sqrt() + eps))
    if untouched == "keep" or v.numel() == 0:
        return d
    dead = v <= _UNTOUCHED_SHARE * v.mean()  # <=, so that a layer of zeros is untouched as a whole
    value = d[~dead].median() if untouched == "median" and not dead.all() else torch.zeros((), dtype=dtype)
    return torch.where(dead, value.to(d.device), d)


def adam_jacobian(
    grad: Float[Tensor, "*P"],
    m: Float[Tensor, "*P"],
    v: Float[Tensor, "*P"],
    *,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Float[Tensor, "*P"]:
    """Derivative of Adam's update direction with respect to the new gradient, at ``grad``: a diagonal, ``K``.

    With ``t = step + 1`` and both moments advanced by ``grad`` and bias-corrected (``m̂``, ``v̂``)::

        K = (1 - β1) / ((1 - β1^t) (√v̂ + ε))  -  m̂ (1 - β2) grad / ((1 - β2^t) √v̂ (√v̂ + ε)²)

    The second term, which :func:`preconditioner` leaves out, is what a gradient changes through ``v``; it matters
    while history does not dominate ``v``, in the first ten steps or so. It can make entries negative, so K is no
    metric. Coordinates without any gradient (``v̂`` below 1e-12 of its mean) get 0.

    Raises:
        InvalidInput: ``step`` is negative or ``v`` has a negative entry.
        InvalidSettings: β1, β2 or ε is out of range.
    """
    _check(step, beta1, beta2, eps, v)
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    grad, m, v = grad.to(dtype), m.to(dtype), v.to(dtype)
    first, second = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
    mean = torch.lerp(m, grad, 1 - beta1) / first
    root = ((v * beta2).addcmul(grad, grad, value=1 - beta2) / second).sqrt()
    through_v = mean * grad * ((1 - beta2) / second) / (root * (root + eps) ** 2)
    k = (1 - beta1) / (first * (root + eps)) - through_v
    dead = root.square() <= _UNTOUCHED_SHARE * root.square().mean()
    return torch.where(dead, torch.zeros((), dtype=dtype, device=k.device), k)


def row_column(d: Float[Tensor, "O I"]) -> tuple[Float[Tensor, " O"], Float[Tensor, " I"]]:
    """``(r, q)`` with ``r qᵀ ≈ d``: a preconditioner's rank-one form, after Adafactor (Shazeer and Stern, 2018).

    ``1/d²``, the second moments, is approximated by the outer product of its row and column means over its mean; so a
    preconditioner made of one row scale and one column scale comes back exactly. Rows and columns of ``d`` that are
    zero throughout (never touched) stay zero.

    Raises:
        InvalidInput: ``d`` has a negative entry.
    """
    if d.numel() and bool((d < 0).any()):
        raise InvalidInput("a preconditioner must not be negative; a Jacobian is no metric")
    moments = torch.where(d > 0, d.square().reciprocal(), torch.zeros((), dtype=d.dtype, device=d.device))
    rows, columns = moments.mean(dim=1), moments.mean(dim=0)
    root = moments.mean() ** 0.25
    none = torch.zeros((), dtype=d.dtype, device=d.device)
    return torch.where(rows > 0, root * rows.rsqrt(), none), torch.where(columns > 0, root * columns.rsqrt(), none)


def _check(step: int, beta1: float, beta2: float, eps: float, v: Tensor) -> None:
    if step < 0:
        raise InvalidInput(f"step counts finished optimizer steps and cannot be negative, got {step}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and eps > 0):
        raise InvalidSettings(f"Adam needs 0 <= beta < 1 and eps > 0, got beta1={beta1}, beta2={beta2}, eps={eps}")
    if v.numel() and bool((v < 0).any()):
        raise InvalidInput("second moments v must not be negative; pass the optimizer's exp_avg_sq as it is")
