"""Exact gradients of the landmarks, projected: their scores for every target row, and their inner products.

Nothing else of them is kept in memory: the features lie in the store and are read in blocks, and inner products are
taken when they are asked for, since all rows may be landmarks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tamis.collect import Task
from tamis.errors import InvalidInput, InvalidSettings
from tamis.identity import rows_sha256
from tamis.maths.second_order import adam_offset, adam_scale
from tamis.maths.similarity import inner_products, unit_rows
from tamis.projection import AnyProjector, NoProjector, make_projector
from tamis.score.decisions import kept_once
from tamis.score.features import (
    FeatureFunction,
    FeatureSpec,
    collect_features,
    gradient_features,
    read_features,
    rows_with_gradient,
)
from tamis.score.less import moment_vectors, moments_digest, transformed_features
from tamis.store.reader import StageReader
from tamis.training.checkpoints import read_moments
from tamis.types import IntArray

__all__ = ["LandmarkGradients", "adam_vectors", "landmark_gradients", "require_storable"]

_BLOCK_NUMBERS = 1 << 26  # gradient numbers held at once: 256 MB, and as many again of the block beside
_SHARD_NUMBERS = 1 << 27  # gradient numbers of a shard at most: 256 MB in float16, held twice while it is put in order
# Unprojected numbers stored at most: 16 GiB in float16. To compare landmarks with each other, blocks are read against
# each other, so that what is read grows like the square: 2 TB at this bound.
_MOST_NUMBERS = 1 << 33
_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class LandmarkGradients:
    """What the transfer needs of the landmarks' gradients, all scaled to length 1 after the projection."""

    rows: IntArray  # (L,) pool rows, ascending; those without gradient are left out
    without_gradient: IntArray  # pool rows
    columns: IntArray  # (M,) positions in ``task.target_rows``; target rows without gradient are left out
    scores: Float[Tensor, "L M"]
    gram_of: Callable[[IntArray], Float[Tensor, "K K2"]]  # inner products among some landmarks, by ascending places
    identity: dict[str, Any]  # of the two stages

    def only(self, places: IntArray) -> LandmarkGradients:
        """Some of the landmarks alone, by ascending places."""
        digest = rows_sha256(places)
        return dataclasses.replace(
            self,
            rows=self.rows[places],
            scores=self.scores[torch.from_numpy(places)],
            gram_of=lambda among: self.gram_of(places[among]),
            identity={**self.identity, "only": digest},
        )


def landmark_gradients(
    task: Task,
    rows: IntArray,
    *,
    form: Literal["raw", "adam"],
    moments: Path | None,
    projection: str,
    projection_dim: int | None,
    dtype: Literal["float16", "float32"],
) -> LandmarkGradients:
    """Gradients of landmarks and target rows, computed as far as they are not in the store, and their products.

    Args:
        task: at the model whose gradients are taken; ``task.rows`` are the landmarks.
        rows: the landmarks, ascending.
        form: "adam" multiplies the landmarks' gradients by Adam's preconditioner at ``moments``; the target stays raw.
        moments: a checkpoint folder with the optimizer's state; read only with "adam".
        projection: a name of ``PROJECTIONS``.
        projection_dim: numbers of a feature, None for the projection's own.
        dtype: of the stored features.

    Raises:
        InvalidInput: no row of a target has a gradient, fewer than two landmarks have one, or moments do not fit.
        InvalidSettings: unprojected gradients are too large to be stored.
        NonFinite: a loss or gradient is NaN or infinite.
    """
    projector = make_projector(projection, dim=projection_dim, seed=task.seed)
    width = _width(task, projector)
    if isinstance(projector, NoProjector):
        require_storable(width, landmarks=len(rows), target_rows=len(task.target_rows), dtype=dtype)
    shard_rows = min(task.collecting.shard_rows, max(1, _SHARD_NUMBERS // width))
    task = dataclasses.replace(task, collecting=dataclasses.replace(task.collecting, shard_rows=shard_rows))
    raw = {"algorithm": "gradients-v1", "projection": projector.identity, "include_head": False}
    spec_of = functools.partial(FeatureSpec, dtype=dtype, projection=projection, projection_dim=projection_dim)
    target = collect_features(
        task,
        task.target,
        task.target_rows,
        spec_of(name="gradients", identity=raw),
        lambda: gradient_features(task, projector),
    )
    if form == "raw":
        spec = spec_of(name="gradients", identity=raw)
        pool = collect_features(task, task.pool, rows, spec, lambda: gradient_features(task, projector))
    else:
        assert moments is not None
        scaled = {**raw, "algorithm": "adam-gradients-v1", "moments": moments_digest(moments)}
        spec = spec_of(name="adam-gradients", identity=scaled)
        pool = collect_features(task, task.pool, rows, spec, lambda: _scaled(task, projector, moments))
    is_zero = pool.read("scale") == 0
    kept = np.flatnonzero(~is_zero)
    if len(kept) < 2:
        raise InvalidInput(
            f"only {len(kept)} of {len(rows)} landmarks have a gradient; at least two are needed: the model predicts "
            "the others' answers with a loss of 0; take more landmarks, other pool rows or another model"
        )
    columns = rows_with_gradient(task, is_zero, target.read("scale") == 0)
    return LandmarkGradients(
        rows=rows[kept],
        without_gradient=rows[is_zero],
        columns=columns,
        scores=_products(pool, target)[kept][:, torch.from_numpy(columns)],
        gram_of=lambda places: _gram(pool, kept[places]),
        identity={"landmarks": pool.fingerprint, "target": target.fingerprint},
    )


def require_storable(width: int, *, landmarks: int, target_rows: int, dtype: Literal["float16", "float32"]) -> None:
    """Refuse unprojected gradients too large to be kept and compared, before any is taken.

    Args:
        width: numbers of a gradient.
        landmarks: their number.
        target_rows: their number.
        dtype: of the stored features.

    Raises:
        InvalidSettings: saying how large they would be, and what makes them smaller.
    """
    numbers = (landmarks + target_rows) * width
    if numbers > _MOST_NUMBERS:
        stored, most = (count * _BYTES[dtype] / 1e9 for count in (numbers, _MOST_NUMBERS))
        raise InvalidSettings(
            f"projection=none would store {width:,} numbers for each of {landmarks} landmarks and {target_rows} target "
            f"rows, {stored:,.3g} GB, above the {most:,.3g} GB that can be compared in reasonable time; project them "
            "(--projection hadamard), set fewer landmarks, or warm an adapter up (--set warmup=lora)"
        )


def _width(task: Task, projector: AnyProjector) -> int:
    """Numbers of a feature, without loading the model again for it: work is shared out by it."""
    spec = {"algorithm": "feature-width-v1", "projection": projector.identity, "include_head": False}
    path = task.workdir("feature-width", spec, uses_target=False) / "width.json"
    found: int = kept_once(path, lambda: projector.output_dim(task.layers()))
    return found


def _scaled(task: Task, projector: AnyProjector, moments: Path) -> FeatureFunction:
    model, layers = task.loaded.model, task.layers()
    scale, _ = adam_vectors(task, moments)
    return transformed_features(model, layers, projector, lambda grads: grads * scale)


def adam_vectors(task: Task, moments: Path) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """Adam's preconditioner a and offset b at the end of the warm-up, in the layout of materialised gradients.

    Raises:
        InvalidInput: the moments do not fit the model.
    """
    layers = task.layers()
    state = read_moments(moments, task.loaded.model)
    m, v = moment_vectors(layers, state)
    settings: dict[str, Any] = {
        "step": state.step,
        "beta1": state.beta1,
        "beta2": state.beta2,
        "eps": state.eps,
    }
    sizes = [layer.numel for layer in layers]
    # One layer at a time: which coordinates have never had a gradient is judged within a layer.
    scale = torch.cat([adam_scale(part, **settings) for part in torch.split(v, sizes)])
    offset = torch.cat(
        [
            adam_offset(first, second, **settings)
            for first, second in zip(torch.split(m, sizes), torch.split(v, sizes), strict=True)
        ]
    )
    return scale.to(task.loaded.device), offset.to(task.loaded.device)


def _unit_blocks(reader: StageReader, rows: IntArray | None = None) -> Iterator[tuple[int, Tensor]]:
    """Blocks of unit features, of all rows or of some, ascending; and the place of each block's first row."""
    step = max(1, _BLOCK_NUMBERS // max(1, reader.row_shape("feature")[0]))
    for start in range(0, reader.num_rows, step):
        stop = min(start + step, reader.num_rows)
        if rows is None:
            yield start, unit_rows(read_features(reader, start, stop))
            continue
        first, last = np.searchsorted(rows, (start, stop))
        if first < last:
            wanted = torch.from_numpy(rows[first:last] - start)
            yield int(first), unit_rows(read_features(reader, start, stop)[wanted])


def _products(pool: StageReader, target: StageReader) -> Float[Tensor, "L M"]:
    found = torch.empty(pool.num_rows, target.num_rows)
    for column, directions in _unit_blocks(target):
        for row, block in _unit_blocks(pool):
            part = inner_products(block, directions).clamp_(-1, 1)
            found[row : row + len(block), column : column + len(directions)] = part
    return found


def _gram(pool: StageReader, rows: IntArray) -> Float[Tensor, "K K2"]:
    found = torch.empty(len(rows), len(rows))
    for column, directions in _unit_blocks(pool, rows):
        for row, block in _unit_blocks(pool, rows):
            found[row : row + len(block), column : column + len(directions)] = inner_products(block, directions)
    return found
