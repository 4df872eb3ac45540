"""The variance of projected inner products, by formula: what the projections' measured noise is held against.

Relative errors are by the product of the two norms, the scale of a cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from tamis.projection.factorized import FactorizedProjector
from tamis.types import LayerSpec


def factorized_variance(
    x: Float[Tensor, "O I"], y: Float[Tensor, "O I"], *, k_out: int | None, k_in: int | None, gaussian: bool = False
) -> float:
    """Variance of ``<P_out^T x P_in, P_out^T y P_in>`` over the random sides, one layer. The mean is ``<x, y>``.

    With ``W = x^T y``, ``Z = x y^T``, Frobenius norms, and Gaussian sides of variance 1/k (section 9 of the
    specification of *Filter-then-Weight*)::

        Var = (tr W² + ‖W‖²)/k_in + (tr W² + ‖Z‖²)/k_out + (‖W‖² + ‖Z‖² + <x, y>² + ‖x‖²‖y‖²)/(k_in k_out)

    Sides of ±1/√k, which this library draws, have a fourth moment of 1 and not of 3. That takes away, exactly::

        2 Σ_i W_ii²/k_in + 2 Σ_o Z_oo²/k_out
        + (2 Σ_i (‖x_·i‖²‖y_·i‖² + W_ii²) + 2 Σ_o (‖x_o·‖²‖y_o·‖² + Z_oo²) - 4 Σ_oi x_oi² y_oi²)/(k_in k_out)

    Args:
        x: one example's gradient of the layer.
        y: another's, or the same.
        k_out: columns of ``P_out``; None for a side that is left whole.
        k_in: columns of ``P_in``; None for a side that is left whole.
        gaussian: leave the second part out.
    """
    x, y = x.double(), y.double()
    if x.shape[0] > x.shape[1]:  # everything is symmetric under transposing; form the smaller of W and Z only
        x, y, k_out, k_in = x.T, y.T, k_in, k_out
    z = x @ y.T  # (O, O)
    z_squared = float(z.square().sum())
    w_squared = float(((x @ x.T) * (y @ y.T)).sum())  # ‖x^T y‖² without forming it
    trace = float((z * z.T).sum())  # tr Z² = tr W²
    xy = x * y
    product = float(xy.sum())
    norms = float(x.square().sum() * y.square().sum())
    to_in, to_out = (0.0 if k is None else 1 / k for k in (k_in, k_out))
    variance = (trace + w_squared) * to_in + (trace + z_squared) * to_out
    variance += (w_squared + z_squared + product**2 + norms) * to_in * to_out
    if gaussian:
        return variance
    w_diagonal, z_diagonal = float(xy.sum(0).square().sum()), float(xy.sum(1).square().sum())
    columns = float((x.square().sum(0) * y.square().sum(0)).sum())
    rows = float((x.square().sum(1) * y.square().sum(1)).sum())
    variance -= 2 * w_diagonal * to_in + 2 * z_diagonal * to_out
    both = 2 * (columns + w_diagonal) + 2 * (rows + z_diagonal) - 4 * float(xy.square().sum())
    return variance - both * to_in * to_out


def dense_variance(x: Float[Tensor, " P"], y: Float[Tensor, " P"], *, dim: int, gaussian: bool = False) -> float:
    """Variance of ``<Sx, Sy> / K`` for a dense ``S`` of ``K = dim`` rows: ``(‖x‖²‖y‖² + <x, y>²)/K``.

    Entries of ±1 instead of Gaussian ones take away ``2 Σ x²y² / K``.
    """
    x, y = x.double(), y.double()
    variance = float(x.square().sum() * y.square().sum() + (x @ y) ** 2)
    if not gaussian:
        variance -= 2 * float((x.square() * y.square()).sum())
    return variance / dim


def factorized_sd(
    projector: FactorizedProjector,
    layers: Sequence[LayerSpec],
    x: Mapping[str, Float[Tensor, "O I"]],
    y: Mapping[str, Float[Tensor, "O I"]],
) -> float:
    """Standard deviation of the projected inner product of two examples over seeds, by ``‖x‖‖y‖``, all layers.

    The layers' sides are independent, so their variances add. Compare with the cosine of the pair: where it is
    smaller, a single projected product says little. Costs a few matrix products per layer; meant for a few pairs.
    """
    variance, x_squared, y_squared = 0.0, 0.0, 0.0
    for layer in layers:
        a, b = x[layer.name], y[layer.name]
        rows, columns = layer.shape
        kept_rows, kept_columns = projector.layer_shape(layer)
        k_out = None if kept_rows == rows else kept_rows
        k_in = None if kept_columns == columns else kept_columns
        variance += factorized_variance(a, b, k_out=k_out, k_in=k_in)
        x_squared += float(a.double().square().sum())
        y_squared += float(b.double().square().sum())
    return float((max(variance, 0.0) / (x_squared * y_squared)) ** 0.5)
