"""How far projected inner products are from exact ones: the formula for the factorized form, and measurement for all.

Errors are relative to the product of the two norms, the scale of a cosine: compare them with the cosines of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tamis.errors import InvalidInput
from tamis.maths.similarity import row_norms
from tamis.projection.factorized import FactorizedProjector
from tamis.seeds import child_seed, random_uniform
from tamis.types import LayerSpec

__all__ = [
    "LengthBin",
    "PairErrors",
    "dense_variance",
    "factorized_sd",
    "factorized_variance",
    "measure_distortion",
    "sample_pairs",
    "summarise_by_length",
]


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """Exact against projected inner products of sampled pairs of examples; all of length n."""

    first: Int[Tensor, " n"]  # rows
    second: Int[Tensor, " n"]
    cosine: Float[Tensor, " n"]  # exact: <x, y> / (‖x‖‖y‖)
    error: Float[Tensor, " n"]  # (projected - exact product) / (‖x‖‖y‖)

    @property
    def bias(self) -> float:
        """Mean error. Zero in expectation over seeds for every projection here."""
        return float(self.error.mean())

    @property
    def rms(self) -> float:
        """Root of the mean squared error: the noise that the projection adds to a cosine."""
        return float(self.error.square().mean().sqrt())


@dataclass(frozen=True, kw_only=True)
class LengthBin:
    """Pairs whose mean length lies in one range: what a long context does to the projection, measured."""

    shortest: float
    longest: float
    pairs: int
    rms_error: float
    mean_error: float
    mean_cosine: float


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

    Raises:
        InvalidInput: one of the gradients is zero.
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
    if x_squared == 0 or y_squared == 0:
        raise InvalidInput("a zero gradient has no relative error; leave rows without a gradient out")
    return float((max(variance, 0.0) / (x_squared * y_squared)) ** 0.5)


def sample_pairs(num_rows: int, count: int, *, seed: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """At most ``count`` different pairs of different rows, ``first < second``; all pairs if there are no more.

    Raises:
        InvalidInput: there are fewer than two rows.
    """
    if num_rows < 2:
        raise InvalidInput(f"pairs need at least two rows, got {num_rows}")
    total = num_rows * (num_rows - 1) // 2
    if total <= count:
        first, second = torch.triu_indices(num_rows, num_rows, offset=1)
        return first, second
    # Twice as many draws as pairs wanted; with more pairs than that to choose from, repeats are few.
    numbers = torch.from_numpy(random_uniform(child_seed(seed, "distortion pairs"), 4 * count)).view(2, -1)
    one = (numbers[0] * num_rows).long()
    other = (one + 1 + (numbers[1] * (num_rows - 1)).long()) % num_rows
    keys = torch.unique(torch.minimum(one, other) * num_rows + torch.maximum(one, other))
    keys = keys[torch.linspace(0, len(keys) - 1, min(count, len(keys))).long()]
    return keys // num_rows, keys % num_rows


def measure_distortion(
    gradients: Float[Tensor, "N P"],
    features: Float[Tensor, "N K"],
    pairs: tuple[Int[Tensor, " n"], Int[Tensor, " n"]],
) -> PairErrors:
    """Projected against exact inner products of the given pairs of rows, for any projection.

    Args:
        gradients: whole gradients of a few examples.
        features: their projections.
        pairs: see ``sample_pairs``.

    Raises:
        InvalidInput: a row that occurs in a pair has a zero gradient.
    """
    first, second = pairs
    x, y = gradients[first].double(), gradients[second].double()
    norms = row_norms(x) * row_norms(y)
    if bool((norms == 0).any()):
        raise InvalidInput("a zero gradient has no relative error; leave rows without a gradient out")
    exact = (x * y).sum(1)
    projected = (features[first].double() * features[second].double()).sum(1)
    return PairErrors(first=first, second=second, cosine=exact / norms, error=(projected - exact) / norms)


def summarise_by_length(errors: PairErrors, lengths: Int[Tensor, " N"], *, bins: int = 4) -> list[LengthBin]:
    """The pairs cut into ``bins`` groups of nearly equal size by the mean length of their two rows, shortest first.

    Groups that would share one length are merged, so fewer may come back.
    """
    mean_length = (lengths[errors.first] + lengths[errors.second]).double() / 2
    edges = torch.unique(torch.quantile(mean_length, torch.linspace(0, 1, bins + 1, dtype=torch.float64)))
    groups = torch.bucketize(mean_length, edges[1:-1], right=True)
    summary = []
    for group in torch.unique(groups):
        inside = groups == group
        summary.append(
            LengthBin(
                shortest=float(mean_length[inside].min()),
                longest=float(mean_length[inside].max()),
                pairs=int(inside.sum()),
                rms_error=float(errors.error[inside].square().mean().sqrt()),
                mean_error=float(errors.error[inside].mean()),
                mean_cosine=float(errors.cosine[inside].mean()),
            )
        )
    return summary
