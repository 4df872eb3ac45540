"""Square roots of damped second moments, in three forms that share one shape: a few directions, and all the others.

The second moment of ``N`` sampled vectors ``H`` of size ``D`` is ``C = H H^T / N``, damped ``C' = C + l I``. All three
forms are ``basis diag(values) basis^T + rest (I - basis basis^T)``; they differ in the basis and in ``rest``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["MomentRoot", "core_root", "damping_of", "dense_root", "identity_root", "probe_root"]

# A direction this much weaker than the strongest is rounding in float64; its inverse would be noise.
_SMALLEST = {torch.float64: 1e-13, torch.float32: 1e-6}


@dataclass(frozen=True, kw_only=True)
class MomentRoot:
    """A symmetric root ``C'^{1/2}`` that is applied without being formed."""

    basis: Tensor  # (D, K) orthonormal columns
    values: Tensor  # (K,) the root's eigenvalues along them
    rest: float  # its eigenvalue along everything else

    def times(self, x: Float[Tensor, "D C"]) -> Float[Tensor, "D C"]:
        """``C'^{1/2} x``, in ``O(D K C)``."""
        return self._apply(x, self.values, self.rest)

    def inverse_times(self, x: Float[Tensor, "D C"]) -> Float[Tensor, "D C"]:
        """``C'^{-1/2} x``; directions along which the root is zero stay zero (the pseudo-inverse)."""
        smallest = _SMALLEST[self.values.dtype] * max(self.rest, float(self.values.max()) if len(self.values) else 0.0)
        kept = self.values > smallest
        inverse = torch.where(kept, 1 / torch.where(kept, self.values, 1), 0)
        return self._apply(x, inverse, 1 / self.rest if self.rest > smallest else 0.0)

    def inverted(self) -> InvertedRoot:
        """The weighting of influence functions (IProX, appendix E): ``C'^{-1/2}`` in the place of ``C'^{1/2}``."""
        return InvertedRoot(root=self)

    def _apply(self, x: Tensor, values: Tensor, rest: float) -> Tensor:
        along = self.basis.T @ x  # (K, C)
        return rest * x + self.basis @ ((values - rest)[:, None] * along)


@dataclass(frozen=True, kw_only=True)
class InvertedRoot:
    """A root whose two directions have changed places."""

    root: MomentRoot

    def times(self, x: Float[Tensor, "D C"]) -> Float[Tensor, "D C"]:
        """``C'^{-1/2} x``."""
        return self.root.inverse_times(x)

    def inverse_times(self, x: Float[Tensor, "D C"]) -> Float[Tensor, "D C"]:
        """``C'^{1/2} x``."""
        return self.root.times(x)


def damping_of(probes: Float[Tensor, "D N"], damping: float, *, relative: bool) -> float:
    """``l``: ``damping`` itself, or that many times the mean eigenvalue of the undamped moment.

    Output gradients are of size 1e-3 and inputs of size 1, so one absolute number for both switches one side off.
    """
    if not relative:
        return damping
    return damping * float(probes.square().sum()) / probes.numel()


def identity_root(size: int, *, like: Tensor) -> MomentRoot:
    """No weighting: the limit of ever stronger relative damping, but for a factor that cancels."""
    return MomentRoot(basis=like.new_zeros(size, 0), values=like.new_zeros(0), rest=1.0)


def dense_root(probes: Float[Tensor, "D N"], damping: float) -> MomentRoot:
    """The damped root by a symmetric eigendecomposition, ``O(D^3)``: slow on wide layers, and beyond doubt."""
    values, basis = torch.linalg.eigh(probes @ probes.T / probes.shape[1])
    return MomentRoot(basis=basis, values=(values.clamp_min(0) + damping).sqrt(), rest=damping**0.5)


def probe_root(probes: Float[Tensor, "D N"], damping: float) -> MomentRoot:
    """The same damped root from the probes alone, without an eigenproblem of size ``D`` while there are fewer of them.

    With the thin decomposition ``H = U S V^T``, ``d = sqrt(S^2/N + l)`` and ``c = sqrt(l)`` the root is
    ``U diag(d - c) U^T + c I``. With ``N >= D`` the basis is complete, and the eigenvectors of ``C`` are cheaper.
    """
    size, number = probes.shape
    if number >= size:
        return dense_root(probes, damping)
    return _from_thin(probes, damping, rest=damping**0.5)


def core_root(probes: Float[Tensor, "D N"], damping: float) -> MomentRoot:
    """The paper's probe-space form (appendix F), which forgets the damping outside the span of the probes.

    It writes ``(U S^2 U^T / N + l I)^{1/2} = U (S^2/N + l)^{1/2} U^T`` and drops ``sqrt(l) (I - U U^T)``, so that what
    it weights has rank ``N`` at most. It equals the damped root only where the probes span everything.
    """
    return _from_thin(probes, damping, rest=0.0)


def _from_thin(probes: Tensor, damping: float, *, rest: float) -> MomentRoot:
    basis, sizes, _ = torch.linalg.svd(probes, full_matrices=False)
    return MomentRoot(basis=basis, values=(sizes.square() / probes.shape[1] + damping).sqrt(), rest=rest)
