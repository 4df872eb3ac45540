"""Which embedding carries the landmarks' scores to the other rows, and through which kernel: tried on landmarks alone.

Leave-one-out over the landmarks says how well gradients of unseen rows would be rebuilt, so every embedding within the
budget is computed for a few thousand rows at most, and only the best one for the pool.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tamis.collect import Task
from tamis.embeddings import EMBEDDINGS, Given, TfIdf, forward_passes
from tamis.errors import InvalidSettings
from tamis.model.flops import ModelShape
from tamis.score.decisions import kept_once
from tamis.score.distillation.candidates import (
    EmbeddingSettings,
    blocks_beyond_the_model,
    candidate_embeddings,
    label_of,
)
from tamis.score.distillation.landmark_gradients import LandmarkGradients
from tamis.score.distillation.row_embeddings import AnyEmbedding, RowEmbeddings
from tamis.seeds import child_seed, random_subset
from tamis.solve.kernels import Kernel, KernelName
from tamis.solve.leave_one_out import Candidate, CandidateResult, candidate_grid, foretelling, try_candidates
from tamis.types import IntArray

__all__ = ["COMPARED", "KERNELS_COMPARED", "Choice", "KernelSettings", "Tried", "choose_embedding"]

# Landmarks that embeddings are compared on, which is enough to tell them apart (docs/results.md, "Scores carried from
# landmarks"): the losers are computed for no other row. And those that the winner's kernels are compared on, at the
# cube of their number. The winner's figures are of all landmarks.
COMPARED = 256
KERNELS_COMPARED = 1024


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """What the user says of the transfer; None and "auto" leave it to leave-one-out."""

    name: KernelName | Literal["auto"]
    scale: float | None
    damping: float | None
    centred: bool | None
    half_whitening: bool
    residual: bool | Literal["auto"]

    def grid(self) -> tuple[Candidate, ...]:
        """Every kernel to try, the default first."""
        return candidate_grid(
            None if self.name == "auto" else self.name,
            scale=self.scale,
            damping=self.damping,
            centred=self.centred,
            half_whitening=self.half_whitening,
        )


@dataclass(frozen=True, kw_only=True)
class Tried:
    """An embedding on the landmarks."""

    label: str
    recovery: float  # the best over the kernels
    passes: float | None  # counted, in forward passes a row; None: without the model


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the transfer uses, and what is to be expected of it on rows that are no landmarks."""

    embedding: AnyEmbedding
    candidate: Candidate
    residual: bool
    recovery: float  # mean cosine of rebuilt and true gradients
    spearman: tuple[float, ...]  # rank correlation of scores, per target: mean over the columns it selects by
    with_half: float | None  # its mean over targets with half the landmarks; None if they are too few to tell
    tried: tuple[Tried, ...]

    @property
    def mean_spearman(self) -> float:
        """Over targets."""
        return sum(self.spearman) / len(self.spearman)

    @property
    def worst_target(self) -> int:
        """The target whose scores are the least to be trusted."""
        return self.spearman.index(min(self.spearman))

    def to_plain(self) -> dict[str, Any]:
        """As JSON keeps it; of given embeddings without the place where they lie."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        settings = dataclasses.asdict(self.embedding)  # type: ignore[arg-type]  # all embeddings are dataclasses
        settings.pop("path", None)  # a folder may move
        return {
            **plain,
            "embedding": {"name": self.embedding.name, **settings},
            "candidate": dataclasses.asdict(self.candidate),
            "tried": [dataclasses.asdict(tried) for tried in self.tried],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], *, given: str | None = None) -> Choice:
        """The inverse of ``to_plain``; ``given`` is where given embeddings lie now."""
        settings = dict(plain["embedding"])
        if settings["name"] == Given.name:
            settings["path"] = given
        kernel = Kernel(**plain["candidate"]["kernel"])
        return cls(
            embedding=EMBEDDINGS[settings.pop("name")](**settings),
            candidate=Candidate(**{**plain["candidate"], "kernel": kernel}),
            residual=plain["residual"],
            recovery=plain["recovery"],
            spearman=tuple(plain["spearman"]),
            with_half=plain["with_half"],
            tried=tuple(Tried(**tried) for tried in plain["tried"]),
        )


def choose_embedding(
    task: Task,
    embeddings: RowEmbeddings,
    gradients: LandmarkGradients,
    columns: Sequence[Tensor],
    of_target: IntArray,
    *,
    settings: EmbeddingSettings,
    kernels: KernelSettings,
) -> Choice:
    """Try every embedding and kernel on the landmarks, once; kept in the store, so that a resumed run takes the same.

    Args:
        task: at the model whose gradients were taken.
        embeddings: of its rows.
        gradients: of the landmarks.
        columns: for each column that the run selects by, the columns of ``gradients.scores`` that it is the mean of.
        of_target: the target of each of these columns.
        settings: which embeddings.
        kernels: which kernels.

    Raises:
        InvalidSettings: no embedding is within the budget.
        Unsupported: the model cannot be embedded in the way that was named.
    """
    spec = {
        "algorithm": "embedding-choice-v4",
        **gradients.identity,
        "embedding": settings.identity(task.pool, task.target),
        "kernels": dataclasses.asdict(kernels),
        "columns": [column.tolist() for column in columns],
        "of_target": of_target.tolist(),
        "seed": task.seed,
    }
    path = task.workdir("embedding-choice", spec) / "choice.json"

    def decide() -> dict[str, Any]:
        earlier = set(task.notes)
        choice = _tried_out(task, embeddings, gradients, columns, of_target, settings, kernels)
        return {**choice.to_plain(), "notes": [sentence for sentence in task.notes if sentence not in earlier]}

    plain = kept_once(path, decide, task=task)
    for sentence in plain["notes"]:  # a resumed run says what the first one said
        task.note(sentence)
    return Choice.from_plain(plain, given=settings.given)


def _tried_out(
    task: Task,
    embeddings: RowEmbeddings,
    gradients: LandmarkGradients,
    columns: Sequence[Tensor],
    of_target: IntArray,
    settings: EmbeddingSettings,
    kernels: KernelSettings,
) -> Choice:
    candidates = candidate_embeddings(settings, task)
    if not candidates:
        raise InvalidSettings(f"no embedding is within embedding_budget={settings.budget:g}; raise it, or name one")
    for sentence in blocks_beyond_the_model(settings, task):
        task.note(sentence)
    is_chosen = len(candidates) > 1
    tried: list[Tried] = []
    best: tuple[float, AnyEmbedding, Candidate] | None = None
    for embedding in candidates:
        most = COMPARED if is_chosen else KERNELS_COMPARED
        found = _best_kernel(task, embeddings, gradients, embedding, kernels, most=most)
        recovery = float(found.recovery or 0.0)
        tried.append(Tried(label=label_of(embedding), recovery=recovery, passes=_counted_passes(task, embedding)))
        if best is None or recovery > best[0]:
            best = (recovery, embedding, found.candidate)
    assert best is not None
    _, embedding, kernel = best
    if is_chosen and len(gradients.rows) > COMPARED:
        kernel = _best_kernel(task, embeddings, gradients, embedding, kernels, most=KERNELS_COMPARED).candidate
    return _expected(task, embeddings, gradients, columns, of_target, embedding, kernel, kernels, tuple(tried))


def _best_kernel(
    task: Task,
    embeddings: RowEmbeddings,
    gradients: LandmarkGradients,
    embedding: AnyEmbedding,
    kernels: KernelSettings,
    *,
    most: int,
) -> CandidateResult:
    """The kernel that rebuilds the gradients of left-out landmarks best, on ``most`` landmarks drawn at random."""
    places, of_all = np.arange(len(gradients.rows)), len(gradients.rows)
    if of_all > most:
        places = np.sort(random_subset(child_seed(task.seed, "compared landmarks", most), of_all, most))
    rows = embeddings.of(embedding, task.pool, gradients.rows[places])(0, len(places))
    grid = foretelling(kernels.grid(), landmarks=len(places), numbers=rows.shape[1])
    if len(grid) < len(kernels.grid()):
        task.note(
            f"Half-whitened kernels of {label_of(embedding)} were not tried on {len(places)} landmarks: with fewer "
            f"than twice the {rows.shape[1]} numbers of its rows leave-one-out would flatter them"
        )
    return try_candidates(rows, gram=gradients.gram_of(places), grid=grid)[0]


def _expected(
    task: Task,
    embeddings: RowEmbeddings,
    gradients: LandmarkGradients,
    columns: Sequence[Tensor],
    of_target: IntArray,
    embedding: AnyEmbedding,
    candidate: Candidate,
    kernels: KernelSettings,
    tried: tuple[Tried, ...],
) -> Choice:
    """Figures of the winner from all landmarks, with and without the direct score of its own embeddings."""
    count = len(gradients.rows)
    rows = embeddings.of(embedding, task.pool, gradients.rows)(0, count)
    scores = torch.stack([gradients.scores[:, column].mean(1) for column in columns], dim=1)
    targets: list[Float[Tensor, "m E"]] | None = None
    if kernels.residual is not False:
        target_rows = task.target_rows[gradients.columns]
        whole = embeddings.of(embedding, task.target, target_rows)(0, len(target_rows))
        targets = [whole[column] for column in columns]

    def by_target(result: CandidateResult) -> tuple[float, ...]:
        # Not of a target's mean scores, which are smoother than the single rows that round robin selects by.
        ranks = np.array(result.spearman)
        return tuple(float(ranks[of_target == target].mean()) for target in range(len(task.target_names)))

    def overall(result: CandidateResult) -> float:
        return float(np.mean(by_target(result)))

    gram = gradients.gram_of(np.arange(count))
    plain = try_candidates(rows, gram=gram, scores=scores, grid=[candidate])[0]
    found, residual = plain, False
    if targets is not None:
        direct = try_candidates(rows, gram=gram, scores=scores, targets=targets, grid=[candidate])[0]
        if kernels.residual is True or overall(direct) >= overall(plain):
            found, residual = direct, True
    with_half = None
    if count >= 16:
        half = torch.from_numpy(random_subset(child_seed(task.seed, "half the landmarks"), count, count // 2))
        known = targets if residual else None
        fewer = try_candidates(rows[half], scores=scores[half], targets=known, sample=rows, grid=[candidate])[0]
        with_half = overall(fewer)
    if found.times_raised:
        task.note(
            f"The kernel of the landmarks could not be factorised with damping {candidate.damping:g}; "
            f"{found.damping:g} was used"
        )
    return Choice(
        embedding=embedding,
        candidate=candidate,
        residual=residual,
        recovery=float(found.recovery or 0.0),
        spearman=by_target(found),
        with_half=with_half,
        tried=tried,
    )


def _counted_passes(task: Task, embedding: AnyEmbedding) -> float | None:
    if isinstance(embedding, (TfIdf, Given)):
        return None
    lengths = task.pool.lengths[task.rows]
    return forward_passes(
        embedding,
        ModelShape.from_model(task.loaded.model),
        rows=len(lengths),
        tokens=float(lengths.sum()),
        supervised_tokens=float(task.pool.supervised[task.rows].sum()),
        sum_sq_len=float((lengths**2).sum()),
    )
