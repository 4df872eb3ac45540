"""How well landmarks would recover rows they have not seen, from the landmarks alone.

With ``A = (K + δI)^{-1}``, row i of ``I - diag(A)^{-1} A`` holds the coefficients of the fit without landmark i. From
them come the recovery cosine (how well gradients are rebuilt) and the rank correlation of scores, both for unseen rows,
and by them embedding, kernel, bandwidth and damping are chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.errors import InvalidInput
from tamis.maths.ranks import rank_correlation
from tamis.solve.kernel_ridge import LandmarkKernel, damped_cholesky, kernel_among, landmark_kernel, mean_directions
from tamis.solve.kernels import Kernel, KernelName, embedding_map, median_squared_distance

__all__ = [
    "Candidate",
    "CandidateResult",
    "candidate_basis",
    "candidate_grid",
    "foretelling",
    "leave_one_out_coefficients",
    "leave_one_out_scores",
    "recovery_cosines",
    "spearman",
    "try_candidates",
]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to turn embeddings into coefficients."""

    kernel: Kernel = field(default_factory=Kernel)
    damping: float = 0.1
    centred: bool = True
    half_whitened: bool = False

    def __str__(self) -> str:
        scale = "" if self.kernel.name == "linear" else f" {self.kernel.scale:g} x median"
        parts = [f"{self.kernel.name}{scale}", f"damping {self.damping:g}"]
        parts += ["half-whitened"] * self.half_whitened + ["not centred"] * (not self.centred)
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """What leave-one-out says of a candidate: a row of the table in the report."""

    candidate: Candidate
    recovery: float | None  # mean cosine of rebuilt and true gradients over left-out landmarks; None without a Gram
    spearman: tuple[float, ...]  # rank correlation of left-out and exact scores, per target; empty without scores
    damping: float  # used, more than the candidate's if that failed
    times_raised: int

    @property
    def mean_spearman(self) -> float | None:
        """Average over targets."""
        return sum(self.spearman) / len(self.spearman) if self.spearman else None


def candidate_basis(candidate: Candidate, embeddings: Float[Tensor, "L E"]) -> LandmarkKernel:
    """The factorised kernel of a chosen candidate, on the landmarks' raw embeddings."""
    mean = _mean(embeddings) if candidate.centred else None
    transform = embedding_map(embeddings, mean=mean, half_whitened=candidate.half_whitened)
    return landmark_kernel(embeddings, transform=transform, kernel=candidate.kernel, damping=candidate.damping)


def candidate_grid(
    kernel: KernelName | None = None,
    *,
    scale: float | None = None,
    damping: float | None = None,
    centred: bool | None = None,
    half_whitening: bool = False,
) -> tuple[Candidate, ...]:
    """RBF at 0.5, 2 and 8 times the median and the uncentred linear kernel, each with damping 0.01, 0.1 and 1.

    The default, RBF at 2 with 0.1, comes first, so that it wins ties. The linear kernel is the best where the
    embedding is the gradient. ``half_whitening`` adds every kernel but the linear once more after half-whitening. What
    is given is not searched.
    """
    names: tuple[KernelName, ...] = ("rbf", "linear") if kernel is None else (kernel,)
    dampings = (0.1, 0.01, 1.0) if damping is None else (damping,)
    found = []
    for name in names:
        scales = (2.0,) if name == "linear" else (2.0, 0.5, 8.0) if scale is None else (scale,)
        shifted = name != "linear" if centred is None else centred
        for each in (Kernel(name=name, scale=size) for size in scales):
            found += [Candidate(kernel=each, damping=damped, centred=shifted) for damped in dampings]
    whitened = [dataclasses.replace(c, half_whitened=True) for c in found if c.kernel.name != "linear"]
    return (*found, *(whitened if half_whitening else ()))


def foretelling(grid: Sequence[Candidate], *, landmarks: int, numbers: int) -> tuple[Candidate, ...]:
    """The candidates that leave-one-out can judge: half-whitened ones only from two landmarks per number of a row.

    Whitening fitted on the landmarks has seen the one that is left out, and with few of them it fits each one by a
    direction of its own: the figures then promise more than unseen rows will keep.
    """
    return tuple(candidate for candidate in grid if not candidate.half_whitened or landmarks >= 2 * numbers)


def leave_one_out_coefficients(factor: Float[Tensor, "L L"]) -> Float[Tensor, "L L"]:
    """``I - diag(A)^{-1} A`` with ``A = (K + δI)^{-1}``, from the Cholesky factor of ``K + δI``.

    Row i expresses landmark i by the others, exactly as if it had not been there; its own entry is zero.
    """
    inverse = torch.cholesky_inverse(factor)
    coefficients = -inverse / inverse.diagonal()[:, None]
    return coefficients.fill_diagonal_(0.0)


def recovery_cosines(
    coefficients: Float[Tensor, "N L"],
    gram: Float[Tensor, "L L"],
    products: Float[Tensor, "N L"],
    norms: Float[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """``cos(C_i G_L, g_i)`` without gradients: ``C_i·<g_i, G_L> / (√(C_i G_L G_L^T C_i^T) ‖g_i‖)``; 0 if one is zero.

    Args:
        coefficients: C.
        gram: inner products of the landmarks' (projected) gradients.
        products: inner products of each row's gradient with those of the landmarks; for leave-one-out, ``gram``.
        norms: of each row's gradient; for leave-one-out, the roots of ``gram``'s diagonal. Unit gradients are not
            quite unit after a projection.
    """
    along = (coefficients * products).sum(1)
    lengths = ((coefficients @ gram) * coefficients).sum(1).clamp(min=0).sqrt() * norms
    return torch.where(lengths > 0, along / torch.where(lengths > 0, lengths, torch.ones_like(lengths)), 0.0)


def leave_one_out_scores(
    coefficients: Float[Tensor, "L L"], scores: Float[Tensor, "L M"], direct: Float[Tensor, "L M"] | None = None
) -> Float[Tensor, "L M"]:
    """Score of each landmark as the others would have it; with ``direct`` scores in residual form, line refitted too.

    Leaving a landmark out of the least-squares line changes its sums by that landmark's terms alone, so all lines come
    at once.
    """
    if direct is None:
        return coefficients @ scores
    # Centred first: variances as differences of large sums would lose their digits.
    s, y = direct - direct.mean(0), scores - scores.mean(0)
    count = len(s) - 1
    mean_s, mean_y = -s / max(count, 1), -y / max(count, 1)  # means of the others
    spread = s.square().sum(0) - s.square() - count * mean_s.square()
    common = (s * y).sum(0) - s * y - count * mean_s * mean_y
    constant = spread <= 1e-12 * s.square().sum(0).clamp(min=torch.finfo(s.dtype).tiny)
    slopes = torch.where(constant, torch.zeros_like(spread), common / torch.where(constant, torch.ones_like(s), spread))
    intercepts = mean_y - slopes * mean_s
    # C_i (y - b0_i - b1_i s), with the line of row i taken out of the sums.
    rest = coefficients @ y - intercepts * coefficients.sum(1, keepdim=True) - slopes * (coefficients @ s)
    return intercepts + slopes * s + rest + scores.mean(0)


def spearman(x: Float[Tensor, "N M"], y: Float[Tensor, "N M"]) -> tuple[float, ...]:
    """Rank correlation of each pair of columns, ties at their mean rank; 0 where a column is constant."""
    columns = zip(x.double().cpu().numpy().T, y.double().cpu().numpy().T, strict=True)
    return tuple(rank_correlation(a, b) or 0.0 for a, b in columns)


def try_candidates(
    embeddings: Float[Tensor, "L E"],
    *,
    grid: Sequence[Candidate],
    gram: Float[Tensor, "L2 L2"] | None = None,
    scores: Float[Tensor, "L3 M"] | None = None,
    targets: Sequence[Float[Tensor, "_ E"]] | None = None,
    sample: Float[Tensor, "S E"] | None = None,
) -> tuple[CandidateResult, ...]:
    """Leave-one-out results of every candidate, the best first: by recovery, without a Gram by mean Spearman.

    One ℓ³ factorisation for each candidate. Equal results keep the order of the grid.

    Args:
        embeddings: raw, of the landmarks.
        grid: the candidates, in the order in which equal results stay.
        gram: inner products of the landmarks' gradients.
        scores: exact scores of the landmarks, one column per target.
        targets: raw embeddings of each target's rows: scores are then fitted in residual form.
        sample: raw rows for half-whitening; by default the landmarks, which flatters unless they are many
            (``foretelling``).

    Raises:
        InvalidInput: fewer than two landmarks, neither ``gram`` nor ``scores``, or sizes that do not fit.
    """
    count = len(embeddings)
    if count < 2:
        raise InvalidInput(f"leaving one out needs at least two landmarks, got {count}")
    if gram is None and scores is None:
        raise InvalidInput("leave-one-out needs the landmarks' gradient inner products, their scores, or both")
    if targets is not None and (scores is None or len(targets) != scores.shape[1]):
        raise InvalidInput("targets must be as many as columns of scores: one block of embeddings for each")
    for name, values in (("gradient inner products", gram), ("scores", scores)):
        if values is not None and len(values) != count:
            raise InvalidInput(f"{count} landmarks need as many rows of {name}, got {len(values)}")
    mean = _mean(embeddings)
    sample = embeddings if sample is None else sample
    results: dict[Candidate, CandidateResult] = {}
    for (centred, whitened), members in _grouped(grid):
        transform = embedding_map(sample, mean=mean if centred else None, half_whitened=whitened)
        mapped = transform.apply(embeddings)
        median = median_squared_distance(mapped)
        direct = None
        if targets is not None:
            direct = mapped.double() @ mean_directions(transform, targets).double().T
        for candidate in members:
            factor, damping, raised = damped_cholesky(kernel_among(mapped, candidate.kernel, median), candidate.damping)
            coefficients = leave_one_out_coefficients(factor)
            recovery: float | None = None
            ranks: tuple[float, ...] = ()
            if gram is not None:
                known = gram.double()
                norms = known.diagonal().clamp(min=0).sqrt()
                recovery = float(recovery_cosines(coefficients, known, known, norms).mean())
            if scores is not None:
                ranks = spearman(leave_one_out_scores(coefficients, scores.double(), direct), scores)
            results[candidate] = CandidateResult(
                candidate=candidate, recovery=recovery, spearman=ranks, damping=damping, times_raised=raised
            )
    return tuple(sorted((results[candidate] for candidate in grid), key=_merit, reverse=True))


def _mean(embeddings: Float[Tensor, "L E"]) -> Float[Tensor, " E"]:
    return embeddings.double().mean(0).to(embeddings.dtype)


def _grouped(grid: Sequence[Candidate]) -> list[tuple[tuple[bool, bool], list[Candidate]]]:
    """Candidates by the map they need, so that each map is made once."""
    groups: dict[tuple[bool, bool], list[Candidate]] = {}
    for candidate in grid:
        groups.setdefault((candidate.centred, candidate.half_whitened), []).append(candidate)
    return list(groups.items())


def _merit(result: CandidateResult) -> float:
    value = result.mean_spearman if result.recovery is None else result.recovery
    return -float("inf") if value is None or value != value else value
