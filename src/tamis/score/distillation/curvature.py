"""Exact Hessian products among landmarks: how the target's loss bends along their gradients. A stage like any other.

Gradients are unprojected and of length 1 here. For a column c with target rows R_c the loss is the one whose gradient
the scores are taken with, ``(1/|R_c|) sum_j l_j / |grad l_j|``, and H_c is its Hessian. Of a product ``H_c d`` nothing
is kept but its inner products with the landmarks' gradients: memory holds a few vectors of θ's size at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamis.collect import Task, named_row
from tamis.corpus import Corpus
from tamis.data.batches import collate, plan_batches
from tamis.errors import Unsupported
from tamis.gradients.hessian import attention_for_hessians, hessian_products
from tamis.gradients.per_sample import Alignments, MaterialisedGradients, WeightedGradient, run_batch
from tamis.model.flops import ModelShape, hessian_flops, stage_flops
from tamis.model.memory import TokenLimit, default_batch_tokens
from tamis.score.decisions import gradient_size, kept_once
from tamis.score.distillation.landmark_gradients import adam_vectors
from tamis.score.less import moments_digest
from tamis.stages import finish, own_shards, record_cost
from tamis.store.reader import StageReader
from tamis.store.writer import StageWriter
from tamis.types import Batch, FloatArray, IntArray

__all__ = ["LandmarkHessians", "ProductShard", "TargetLoss", "product_shards"]

_MAX_ENTRIES = 1 << 26  # gradient numbers formed at once beside those that are kept
_SHARD_PRODUCTS = 64  # products of a shard at most, which is what a kill can lose
# Tensors of a direction's size that exist at once for every product: directions, one column's share of them, its
# products, those of the batch at hand (or joined with their biases), the stack of them, and what is handed on.
_COPIES = 6


@dataclass(frozen=True, kw_only=True)
class TargetLoss:
    """The loss of one score column: rows of the target and what their mean losses are multiplied by."""

    rows: IntArray
    coefficients: FloatArray


@dataclass(frozen=True, kw_only=True)
class ProductShard:
    """Hessian products made together: of some directions with some columns' losses."""

    directions: IntArray  # distinct ones
    columns: IntArray  # distinct ones; each column's rows pass through the model once
    products: IntArray  # of each of these columns


def product_shards(directions: int, columns: int, *, numel: int, memory_bytes: int) -> Iterator[ProductShard]:
    """What each shard makes of the products of all directions and columns, in order.

    Args:
        directions: their number.
        columns: their number.
        numel: numbers of a gradient.
        memory_bytes: bound on vectors of that size held at once.
    """
    total, step = directions * columns, _shard_products(numel, memory_bytes)
    for first in range(0, total, step):
        yield _shard_of(np.arange(first, min(first + step, total)), columns)


def _shard_products(numel: int, memory_bytes: int) -> int:
    return max(1, min(_SHARD_PRODUCTS, memory_bytes // (4 * _COPIES * numel)))


def _shard_of(flat: IntArray, columns: int) -> ProductShard:
    """Of some products, numbered with the directions varying slowest."""
    used, products = np.unique(flat % columns, return_counts=True)
    return ProductShard(directions=np.unique(flat // columns), columns=used, products=products)


class LandmarkHessians:
    """Hessian products of the columns' losses with unit gradients of pool rows, computed as far as not in the store.

    Args:
        task: at the model whose gradients are taken.
        groups: the target rows behind each column, as positions in ``task.target_rows``.
        moments: a checkpoint folder for Adam's form: gradients are multiplied by its preconditioner before they are
            scaled to length 1; the target's loss is the same. None: raw gradients.
        memory_bytes: bound on the vectors of θ's size that are held at once; one product is always taken.
    """

    def __init__(self, task: Task, groups: Sequence[IntArray], *, moments: Path | None, memory_bytes: int) -> None:
        self._task, self._moments, self._memory = task, moments, memory_bytes
        self._adam: tuple[Tensor, Tensor] | None = None
        self._most_tokens = 0  # padded tokens of a batch at most, in the shard at hand
        self._latest: tuple[Corpus, IntArray] = (task.pool, task.rows[:0])  # rows of the batch at hand
        lengths = self._lengths(task.target, task.target_rows, None)
        self.losses = [
            TargetLoss(
                rows=task.target_rows[group],
                coefficients=(1 / (len(group) * lengths[group].astype(np.float64))).astype(np.float32),
            )
            for group in groups
        ]

    def products(self, rows: IntArray) -> FloatArray:
        """``<g_i, H_c g_j>`` for all pairs of ``rows``, ``(C, L, L)``, symmetric."""
        lengths = self._lengths(self._task.pool, rows, self._moments)

        def directions(chosen: IntArray) -> Tensor:
            return self._unit_gradients(rows[chosen], lengths[chosen])

        found = self._aligned(
            "hessian-products",
            rows,
            lengths,
            len(rows),
            directions,
            {"directions": "landmarks"},
            lambda which: rows[which],
        )
        symmetric: FloatArray = (found + found.transpose(0, 2, 1)) / 2
        return symmetric

    def equal_weights(self, rows: IntArray) -> FloatArray:
        """``<s, H_c s>`` for the sum s of the rows' unit gradients, ``(C,)``: one product per column, not one a row."""
        lengths = self._lengths(self._task.pool, rows, self._moments)

        def directions(chosen: IntArray) -> Tensor:
            return self._sum_of_unit_gradients(rows, lengths)[None]

        found = self._aligned("hessian-sums", rows, lengths, 1, directions, {"directions": "sum"}, lambda which: rows)
        total: FloatArray = found[:, 0].sum(1, dtype=np.float64).astype(np.float32)
        return total

    def offsets(self, rows: IntArray) -> FloatArray:
        """``<g_i, H_c b>`` with Adam's offset b (equation 8), ``(n, C)``.

        Scores are of unit gradients, so b is divided by the mean length of the rows' Adam gradients: it keeps its size
        beside the sum of theirs.
        """
        assert self._moments is not None, "only Adam's form has an offset"
        lengths = self._lengths(self._task.pool, rows, self._moments)
        unit = float(lengths.mean(dtype=np.float64))

        def directions(chosen: IntArray) -> Tensor:
            return (self._vectors()[1] / unit)[None]

        found = self._aligned(
            "hessian-offsets", rows, lengths, 1, directions, {"directions": "offset"}, lambda which: rows[:0]
        )
        return np.ascontiguousarray(found[:, 0].T)

    def _vectors(self) -> tuple[Tensor, Tensor]:
        assert self._moments is not None
        if self._adam is None:
            self._adam = adam_vectors(self._task, self._moments)
        return self._adam

    def _form(self) -> str | None:
        return None if self._moments is None else moments_digest(self._moments)

    def _lengths(self, corpus: Corpus, rows: IntArray, moments: Path | None) -> FloatArray:
        """Exact lengths of the rows' gradients; stored features of some projections know only an estimate."""

        def start() -> Callable[[Batch], Mapping[str, Tensor]]:
            model, layers = self._task.loaded.model, self._task.layers()
            if moments is None:

                def plain(batch: Batch) -> dict[str, Tensor]:
                    found = Alignments(None)
                    run_batch(model, batch, layers, found)
                    return {"length": found.norm.float()}

                return plain
            scale, _ = self._vectors()
            few = max(1, _MAX_ENTRIES // len(scale))

            def scaled(batch: Batch) -> dict[str, Tensor]:
                norms = []
                for part in batch.split(few):
                    whole = MaterialisedGradients(layers)
                    run_batch(model, part, layers, whole)
                    norms.append(torch.linalg.vector_norm(whole.grads * scale, dim=1))
                return {"length": torch.cat(norms).float()}

            return scaled

        spec = {"algorithm": "gradient-lengths-v1", "moments": None if moments is None else self._form()}
        reader = self._task.map_rows(corpus, rows, name="gradient-lengths", spec=spec, start=start)
        found: FloatArray = reader.read("length")
        return found

    def _unit_gradients(self, rows: IntArray, lengths: FloatArray) -> Tensor:
        """``(J, P)`` unit gradients of pool rows, in the order given."""
        task, layers = self._task, self._task.layers()
        found: Tensor | None = None
        few = max(1, _MAX_ENTRIES // sum(layer.numel for layer in layers))
        for planned, whole_batch in self._batches(task.pool, rows):
            starts = range(0, len(planned), few)
            for start, batch in zip(starts, whole_batch.split(few), strict=True):
                places = planned[start : start + few]
                whole = MaterialisedGradients(layers)
                run_batch(task.loaded.model, batch, layers, whole)
                grads = whole.grads if self._moments is None else whole.grads * self._vectors()[0]
                found = grads.new_empty(len(rows), grads.shape[1]) if found is None else found
                found[torch.from_numpy(places).to(found.device)] = grads / _column(lengths[places], grads)
        assert found is not None
        return found

    def _sum_of_unit_gradients(self, rows: IntArray, lengths: FloatArray) -> Tensor:
        task, layers = self._task, self._task.layers()
        total: Tensor | None = None
        for places, batch in self._batches(task.pool, rows):
            consumer = WeightedGradient(torch.from_numpy(1 / lengths[places]))
            run_batch(task.loaded.model, batch, layers, consumer)
            part = torch.cat([consumer.grads[layer.name].flatten() for layer in layers])
            total = part if total is None else total + part
        assert total is not None
        return total if self._moments is None else total * self._vectors()[0]

    def _aligned(
        self,
        name: str,
        rows: IntArray,
        lengths: FloatArray,
        count: int,
        directions: Callable[[IntArray], Tensor],
        spec: Mapping[str, Any],
        behind: Callable[[IntArray], IntArray],
    ) -> FloatArray:
        """``<g_i, H_c d_j>`` for ``rows`` i, columns c and ``count`` directions j, ``(C, count, n)``.

        ``behind`` has the pool rows whose gradients make some directions.
        """
        task, columns = self._task, len(self.losses)
        full = {
            "algorithm": "hessian-products-v1",
            **spec,
            "stage": name,
            "pool": task.pool.identity,
            "target": task.target.identity,
            "rows": _digest(rows),
            "columns": [[_digest(loss.rows), _digest(loss.coefficients)] for loss in self.losses],
            "moments": self._form(),
            "model": task.model_identity(),
            "batch_invariant": task.collecting.batch_invariant,
        }
        # Directions vary slowest, so that a shard needs few of them.
        writer = StageWriter(
            task.store,
            f"{name}-{task.pool.name}",
            full,
            num_rows=count * columns,
            shard_rows=_shard_products(gradient_size(task), self._memory),
            fixed={"batch_tokens": task.collecting.batch_tokens},
        )
        task.stages.append(writer.path)
        limit = TokenLimit(writer.fixed["batch_tokens"] or 0, writer.path)
        with task.progress.stage(f"{name} ({task.pool.name})", count * columns, "products") as advance:
            for shard in own_shards(writer, advance):
                started = time.perf_counter()
                first, stop = writer.shard_range(shard)
                flat = np.arange(first, stop)
                limit.tokens = limit.tokens or default_batch_tokens(task.loaded.device)

                def compute(flat: IntArray = flat, shard: int = shard) -> Tensor:
                    self._most_tokens = limit.at(shard)
                    return self._shard(flat // columns, flat % columns, rows, lengths, directions)

                found = limit.within_memory(shard, compute, latest=self._size, refuse=self._too_large)
                spent = time.perf_counter() - started
                record_cost(
                    writer.path, shard, spent, work="gradient", **self._counts(_shard_of(flat, columns), rows, behind)
                )
                writer.write_shard(shard, {"product": found})
                advance(stop - first)
        finish(writer)
        task.note(attention_note(task, writer))
        whole = StageReader(writer.path).read("product")
        return np.ascontiguousarray(whole.reshape(count, columns, len(rows)).transpose(1, 0, 2))

    def _shard(
        self,
        which: IntArray,
        column: IntArray,
        rows: IntArray,
        lengths: FloatArray,
        directions: Callable[[IntArray], Tensor],
    ) -> Tensor:
        """Products of some (direction, column) pairs with every row, ``(pairs, n)``."""
        task, layers = self._task, self._task.layers()
        model = task.loaded.model
        needed = np.unique(which)
        split = [layer.numel for layer in layers]
        parts = torch.split(directions(needed), split, dim=1)
        by_layer = {layer.name: part.view(-1, *layer.shape) for layer, part in zip(layers, parts, strict=True)}
        products = {layer.name: by_layer[layer.name].new_empty(len(which), *layer.shape) for layer in layers}
        for c in np.unique(column):
            pairs = np.flatnonzero(column == c)
            chosen = torch.from_numpy(np.searchsorted(needed, which[pairs]))
            loss = self.losses[c]
            batches = (
                (batch, torch.from_numpy(loss.coefficients[places]))
                for places, batch in self._batches(task.target, loss.rows)
            )
            mine = {name: matrix[chosen.to(matrix.device)] for name, matrix in by_layer.items()}
            for name, matrix in hessian_products(model, batches, layers, mine).items():
                products[name][torch.from_numpy(pairs).to(matrix.device)] = matrix.to(products[name])
        if self._moments is not None:  # <a * g, H d> = <g, a * H d>
            for layer, scale in zip(layers, torch.split(self._vectors()[0], split), strict=True):
                products[layer.name] *= scale.view(layer.shape)
        found = torch.empty(len(which), len(rows))
        for places, batch in self._batches(task.pool, rows):
            aligned = Alignments(products, norms=False)
            run_batch(model, batch, layers, aligned)
            found[:, torch.from_numpy(places)] = (aligned.dot / _column(lengths[places], aligned.dot)).T.float().cpu()
        return found

    def _batches(self, corpus: Corpus, rows: IntArray) -> Iterator[tuple[IntArray, Batch]]:
        """Positions in ``rows``, and these rows, on the model's device."""
        most = 1 if self._task.collecting.batch_invariant else None
        for places in plan_batches(corpus.lengths[rows], batch_tokens=self._most_tokens, max_rows=most):
            self._latest = (corpus, rows[places])
            yield places, collate(rows[places], corpus.take(rows[places]), 0).to(self._task.loaded.device)

    def _size(self) -> tuple[int, int]:
        """Rows and padded tokens of the batch at hand."""
        corpus, rows = self._latest
        return len(rows), len(rows) * int(corpus.lengths[rows].max())

    def _too_large(self) -> Unsupported:
        corpus, rows = self._latest
        return Unsupported(
            f"{named_row(corpus, int(rows[0]))}: a Hessian product over its {self._size()[1]} tokens alone does not "
            "fit in memory beside the vectors of the gradient's size that are held at once; lower "
            f"--set memory_gb={self._memory / 2**30:g} or --max-length, or train an adapter (--set warmup=lora)"
        )

    def _counts(self, shard: ProductShard, rows: IntArray, behind: Callable[[IntArray], IntArray]) -> dict[str, float]:
        """What a shard went through: rows behind its directions, target rows once per column, and every pool row."""
        shape = ModelShape.from_model(self._task.loaded.model)
        pool, target = self._task.pool, self._task.target
        total: Counter[str] = Counter(pool.sizes(np.concatenate([rows, behind(shard.directions)])))
        _, *tokens = total.values()
        operations = stage_flops(shape, "gradient", *tokens)
        for c, products in zip(shard.columns, shard.products, strict=True):
            sizes = target.sizes(self.losses[c].rows)
            _, *tokens = sizes.values()
            operations += hessian_flops(shape, float(products), *tokens)
            total.update(sizes)
        return {**total, "operations": operations}


def attention_note(task: Task, writer: StageWriter) -> str:
    """Which attention the products ran with; a resumed run says what the first one said."""
    said: str = kept_once(writer.path / "attention.json", lambda: attention_for_hessians(task.loaded.model))
    return said


def _column(numbers: FloatArray, like: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(like)[:, None]


def _digest(values: np.ndarray[Any, np.dtype[Any]]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()).hexdigest()
