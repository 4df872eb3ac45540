"""LESS: the Adam update that a pool row would cause, against a target row's gradient, over a LoRA warm-up.

After *LESS: Selecting Influential Data for Targeted Instruction Tuning* (Xia et al., 2024)::

    score(i, j) = sum_c eta_c cos(Gamma_c(i), grad l_j) / sum_c eta_c,      Gamma(i) = m^' / (sqrt(v^') + eps)

with Adam's moments at the end of warm-up epoch c advanced by the row's own gradient, and eta_c the epoch's mean
learning rate. Both vectors are of the LoRA factors, projected alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tamis.collect import Task
from tamis.errors import InvalidInput, InvalidSettings
from tamis.gradients.per_sample import MaterialisedGradients, run_batch
from tamis.identity import file_sha256
from tamis.maths.adam import ADAM_FORMS, AdamForm, adam_direction
from tamis.model.load import ModelSettings
from tamis.projection import AnyProjector, NoProjector, make_projector, project_gradients
from tamis.score.features import (
    FeatureFunction,
    FeatureSpec,
    RowScores,
    add_scores,
    rows_with_gradient,
    scores_of_features,
)
from tamis.score.matrix import with_columns
from tamis.score.warmup import random_warmup_rows, warmup_points, warmup_training
from tamis.training.checkpoints import Moments, read_moments
from tamis.training.loop import TrainSettings
from tamis.types import Batch, IntArray, LayerSpec, TargetScores
from tamis.values import check_types

__all__ = ["Less", "moment_vectors", "moments_digest", "transformed_features"]

_MAX_ENTRIES = 1 << 26  # gradient numbers formed at once: 256 MB of float32, and a few times that for Adam's terms


@dataclass(frozen=True, kw_only=True)
class Less:
    """Cosine of a pool row's Adam update with a target row's gradient, summed over the epochs of a LoRA warm-up.

    The warm-up trains LoRA on a random share of the pool (not only of a shortlist); it does not depend on the target,
    so that other targets reuse it. A model that is an adapter already is trained as it is. Positive: an Adam update
    on the pool row lowers the target row's loss.

    The authors' own settings are 5 % of a pool of 270,000 rows, 4 epochs, 32 rows an update, learning rate 2e-5, rank
    128, alpha 512, linear decay after 3 % of the updates. Defaults here keep share, epochs and schedule; a pool of
    hundreds of rows gives only some dozen updates, in which 2e-5 would move nothing, so updates are of 16 rows at 2e-4,
    and rank 8 keeps a whole per-sample gradient small.

    Args:
        form: "adam", Adam's own update; "less-code", ``m'/sqrt(v'+eps)`` as the authors' code computes it; or
            "uncorrected", ``m'/(sqrt(v')+eps)``.
        warmup_pool_share: share of the pool's usable rows, though never fewer than four updates' worth.
        warmup_epochs: epochs, each with a checkpoint at its end.
        warmup_update_rows: rows of one update.
        warmup_learning_rate: the peak.
        lora_rank: rank of the adapter.
        lora_alpha: its scale is ``lora_alpha / lora_rank``; None: twice the rank.
        moments: a Trainer checkpoint folder whose ``optimizer.pt`` belongs to the model given, which must be the
            adapter (or model) it was saved with. Then there is no warm-up, and that is the only checkpoint.
        projection: "hadamard", "rademacher", "mask", "factorized", or "none" for exact numbers (streamed).
        projection_dim: numbers of a feature (8192); per side of a layer for "factorized" (16).
        keep_features: store the pool's features, so that other targets reuse them. False: only scores are stored.
        feature_dtype: "float16", in units of each row's largest entry, or "float32".
        memory_gb: bound on target features held at once when they are streamed.

    Raises:
        InvalidSettings: a value is out of range.
    """

    name: ClassVar[str] = "less"

    form: AdamForm = "adam"
    warmup_pool_share: float = 0.05
    warmup_epochs: int = 4
    warmup_update_rows: int = 16
    warmup_learning_rate: float = 2e-4
    lora_rank: int = 8
    lora_alpha: float | None = None
    moments: str | None = None
    projection: str = "hadamard"
    projection_dim: int | None = None
    keep_features: bool = True
    feature_dtype: Literal["float16", "float32"] = "float16"
    memory_gb: float = 2.0

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.warmup_pool_share <= 1:
            raise InvalidSettings(f"warmup_pool_share must be above 0 and at most 1, got {self.warmup_pool_share}")
        if self.lora_rank < 1:
            raise InvalidSettings(f"lora_rank must be at least 1, got {self.lora_rank}")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise InvalidSettings(f"lora_alpha must be positive, got {self.lora_alpha}")
        if not self.memory_gb > 0:
            raise InvalidSettings(f"memory_gb must be positive, got {self.memory_gb}")
        self.warmup_settings()  # checks the others
        make_projector(self.projection, dim=self.projection_dim)  # before the warm-up, not after it

    def warmup_settings(self) -> TrainSettings:
        """The fine-tuning run whose checkpoints are used."""
        return warmup_training(
            epochs=self.warmup_epochs,
            update_rows=self.warmup_update_rows,
            learning_rate=self.warmup_learning_rate,
        )

    def by_content(self, model: ModelSettings) -> dict[str, Any]:
        """``moments`` by the bytes of the optimizer's state; the model they belong to is the run's own."""
        return {} if self.moments is None else {"moments": moments_digest(Path(self.moments))}

    def warmup_rows(self, task: Task) -> IntArray:
        """The random part of the pool that the warm-up trains on, ascending.

        Raises:
            InvalidInput: the pool has no usable row.
        """
        return random_warmup_rows(task, self.name, share=self.warmup_pool_share, update_rows=self.warmup_update_rows)

    def score(self, task: Task) -> TargetScores:
        """Scores of ``task.rows``, one column per target row that has a gradient.

        ``extra`` has each row's ``loss`` and ``grad_norm`` at the first checkpoint, which has seen a row of the warm-up
        once at most: a wrong answer looks harmless to a model that was trained on it often. ``zero_gradient`` marks
        rows without gradient at any checkpoint; their score of 0 says nothing.

        Raises:
            InvalidInput: no row of a target has a gradient, or ``moments`` do not fit the model.
            NonFinite: a loss or gradient is NaN or infinite, in the warm-up or after it.
        """
        task.note(f"less ran with Adam form '{self.form}': {ADAM_FORMS[self.form]}")
        if self.moments is not None:
            found = self._at(task, Path(self.moments))
        else:
            found = self._over_the_warmup(task)
        kept = rows_with_gradient(task, found.is_zero, found.is_zero_target)
        return TargetScores(
            rows=task.rows,
            values=with_columns(task, found.values, kept),
            group=task.target_group[kept],
            target_names=task.target_names,
            extra={"loss": found.loss, "grad_norm": found.grad_norm, "zero_gradient": found.is_zero},
        )

    def _over_the_warmup(self, task: Task) -> RowScores:
        """The mean of the scores at the warm-up's checkpoints, weighted by their learning rates."""
        points = warmup_points(
            task,
            task.pool,
            self.warmup_rows(task),
            self.warmup_settings(),
            method=self.name,
            lora_rank=self.lora_rank,
            lora_alpha=2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha,
        )
        total = sum(point.learning_rate for point in points)
        found: RowScores | None = None
        for point in points:
            at = task.at_model(point.model_settings)
            found = add_scores(found, self._at(at, point.folder), weight=point.learning_rate / total)
            del at  # its model, before the next one is loaded
        assert found is not None
        return found

    def _at(self, task: Task, folder: Path) -> RowScores:
        """Scores at one checkpoint, whose model is the task's and whose moments lie in ``folder``."""
        projector = make_projector(self.projection, dim=self.projection_dim, seed=task.seed)
        gradient = {"algorithm": "gradients-v1", "projection": projector.identity}
        direction = {
            **gradient,
            "algorithm": "adam-directions-v1",
            "form": self.form,
            "moments": moments_digest(folder),
        }

        def gradients() -> FeatureFunction:
            layers = task.layers()
            return transformed_features(task.loaded.model, layers, projector, lambda grads: grads)

        def directions() -> FeatureFunction:
            model, layers = task.loaded.model, task.layers()
            moments = read_moments(folder, model)
            m, v = moment_vectors(layers, moments)
            m, v = m.to(task.loaded.device), v.to(task.loaded.device)

            def advance(grads: Tensor) -> Tensor:
                return adam_direction(
                    grads,
                    m,
                    v,
                    step=moments.step,
                    beta1=moments.beta1,
                    beta2=moments.beta2,
                    eps=moments.eps,
                    form=self.form,
                )

            return transformed_features(model, layers, projector, advance)

        spec = functools.partial(
            FeatureSpec, dtype=self.feature_dtype, projection=self.projection, projection_dim=self.projection_dim
        )
        return scores_of_features(
            task,
            pool=(spec(name="adam-directions", identity=direction), directions),
            target=(spec(name="gradients", identity=gradient), gradients),
            cosine=True,
            keep_features=self.keep_features and not isinstance(projector, NoProjector),
            memory_bytes=int(self.memory_gb * 2**30),
        )


def moment_vectors(layers: tuple[LayerSpec, ...], moments: Moments) -> tuple[Tensor, Tensor]:
    """First and second moments ``(P,)`` in the layout of materialised gradients.

    Raises:
        InvalidInput: the moments lack a layer's weight, or have it in another shape.
    """
    return _layout(layers, moments.exp_avg), _layout(layers, moments.exp_avg_sq)


def _layout(layers: tuple[LayerSpec, ...], by_name: Mapping[str, Tensor]) -> Tensor:
    parts = []
    for layer in layers:
        weight = by_name.get(f"{layer.name}.weight")
        wanted = (layer.out_features, layer.in_features)
        if weight is not None and layer.kind == "conv1d":
            weight = weight.T  # stored (I, O)
        if weight is None or weight.shape != wanted:
            got = "nothing" if weight is None else str(tuple(weight.shape))
            raise InvalidInput(
                f"the optimizer state has {got} for '{layer.name}.weight', the model needs {wanted}; "
                "give the checkpoint that was saved together with this model or adapter"
            )
        if layer.has_bias:
            bias = by_name.get(f"{layer.name}.bias")
            if bias is None:
                raise InvalidInput(f"the optimizer state lacks '{layer.name}.bias', which the model trains")
            weight = torch.cat([weight, bias[:, None]], dim=1)
        parts.append(weight.reshape(-1).float())
    return torch.cat(parts)


def transformed_features(
    model: nn.Module,
    layers: tuple[LayerSpec, ...],
    projector: AnyProjector,
    transform: Callable[[Tensor], Tensor],
) -> FeatureFunction:
    """Projected ``transform(per-sample gradients)``, as many rows at a time as their whole gradients fit."""
    rows = max(1, _MAX_ENTRIES // sum(layer.numel for layer in layers))

    def compute(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        for part in batch.split(rows):
            whole = MaterialisedGradients(layers)
            losses = run_batch(model, part, layers, whole)
            norms = torch.linalg.vector_norm(whole.grads, dim=1)
            features = project_gradients(projector, transform(whole.grads), layers)
            # A row without gradient would be given the momentum's direction, which is not its own.
            found.append((losses, torch.where(norms[:, None] > 0, features, 0), norms))
        losses, features, norms = (torch.cat(parts) for parts in zip(*found, strict=True))
        return losses, features, norms

    return compute


def moments_digest(folder: Path) -> str:
    """Identity of a checkpoint's optimizer state, from its bytes."""
    for name in ("optimizer.safetensors", "optimizer.pt"):
        path = folder / name
        if path.is_file():
            return file_sha256(path)
    raise InvalidInput(
        f"moments={str(folder)!r} holds neither optimizer.safetensors nor optimizer.pt; "
        "give a checkpoint folder that was saved together with its optimizer"
    )
