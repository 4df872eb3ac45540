"""The passes of influence distillation: a warm-up, gradients of some rows, Hessian products, embeddings of all.

They follow ``score/influence_distillation.py`` step by step. Not known before a run are the embedding that
leave-one-out will choose (the dearest is planned, which it mostly is), which embeddings the model cannot be given, and
landmarks without a gradient. Trying each embedding on one row is not counted, by the run neither.
"""

from __future__ import annotations

from typing import Literal

from tamis.embeddings import Given, Jvp, ModelEmbedding, TfIdf
from tamis.evaluate.inputs import CorpusSize
from tamis.evaluate.question import FEATURE_BYTES, MethodQuestion, PassPlan, total_size
from tamis.model.flops import ModelShape, hessian_flops, stage_flops
from tamis.score.distillation.candidates import embeddings_within, nominal_passes
from tamis.score.distillation.choice import COMPARED, KERNELS_COMPARED
from tamis.score.distillation.curvature import product_shards
from tamis.score.distillation.row_embeddings import AnyEmbedding, work_of
from tamis.score.distillation.settings import landmark_count
from tamis.score.influence_distillation import InfluenceDistillation
from tamis.score.warmup import warmup_flops, warmup_rows

__all__ = ["distillation_passes"]

# Influence Distillation (2025), section 5.2: a JVP costs twice the forward pass of its blocks.
_PAPER_JVP = 2.0


def distillation_passes(question: MethodQuestion) -> list[PassPlan]:
    """The passes in the order in which a run makes them."""
    method = InfluenceDistillation(**question.values)
    warms_up = method.moments is None and method.warmup != "none"
    shape = question.with_lora(method.lora_rank) if warms_up and method.warmup == "lora" else question.shape
    scored = question.scored
    landmarks = _part(scored, landmark_count(method.landmarks, scored.rows))
    drawn = _part(landmarks, method.hessian_landmarks)
    embedded = _Embedded(question, method, shape)
    passes = [_warm_up(question, method, shape)] if warms_up else []
    if method.landmark_rule != "uniform" and landmarks.rows < scored.rows:
        embedded.pool(embedded.dearest, scored, "pool")
    own = "gradients-pool" if method.form == "raw" else "adam-gradients-pool"
    passes += [
        question.feature_pass(
            "gradients (target)", "gradients-target", question.target, shape=shape, kept=True, whole=True
        ),
        question.feature_pass("gradients (landmarks)", own, landmarks, shape=shape, kept=True, whole=True),
    ]
    has_term = method.weights == "second-order"
    if has_term or method.hessian_ratio:
        passes += _hessian_passes(question, method, shape, landmarks, drawn)
    is_exact, is_carried = landmarks.rows == scored.rows, has_term and drawn.rows < scored.rows
    if not is_exact or is_carried:
        carrying = drawn if is_exact else landmarks
        _choose(embedded, method, carrying, question.target)
        if not is_exact:
            embedded.scored("landmark-scores")
        if is_carried:
            embedded.pool(embedded.dearest, drawn, _LANDMARKS if drawn.rows == carrying.rows else "second order")
            embedded.scored("landmark-coefficients")
    return [*passes, *embedded.passes]


_LANDMARKS = "landmarks"


class _Embedded:
    """Embeddings as a run computes them: rows embedded before, alone or with the whole pool, are read again."""

    def __init__(self, question: MethodQuestion, method: InfluenceDistillation, shape: ModelShape) -> None:
        self.passes: list[PassPlan] = []
        within = embeddings_within(method.embedding_settings(), shape.blocks, 0)
        self.tried: list[ModelEmbedding] = [e for e in within if not isinstance(e, (TfIdf, Given))]
        self.is_chosen = len(within) > 1
        self.dearest: ModelEmbedding | None = max(
            self.tried, key=lambda e: nominal_passes(e, shape.blocks), default=None
        )
        self._question, self._shape, self._keeps = question, shape, method.keep_embeddings
        self._entry_bytes = FEATURE_BYTES[method.feature_dtype]
        self._done: set[tuple[AnyEmbedding, str]] = set()

    def pool(self, embedding: ModelEmbedding | None, size: CorpusSize, which: str) -> None:
        """Of some pool rows; ``which`` tells sets of rows apart. None: what carries needs no model."""
        question = self._question
        which = "pool" if size.rows == question.scored.rows else which
        has_whole = (embedding, "pool") in self._done and question.scored.rows == question.pool.rows
        if embedding is None or (embedding, which) in self._done or has_whole:
            return
        self._done.add((embedding, which))
        self._add(embedding, which, f"embedding-{embedding.name}-pool", size, self._entry_bytes)

    def target(self, embedding: ModelEmbedding | None, size: CorpusSize) -> None:
        """Of the target rows."""
        if embedding is not None:
            self._add(embedding, "target", f"embedding-{embedding.name}-target", size, self._entry_bytes)

    def scored(self, stage: str) -> None:
        """Of all rows to score: stored, or used as they pass by ``stage``, which then embeds them itself."""
        if self._keeps or self.dearest is None:
            self.pool(self.dearest, self._question.scored, "pool")
        else:
            what = "" if stage == "landmark-scores" else ", second order"
            self._add(self.dearest, "pool", f"{stage}-pool", self._question.scored, 0, what=what)

    def _add(
        self, embedding: ModelEmbedding, which: str, stage: str, size: CorpusSize, entry_bytes: int, *, what: str = ""
    ) -> None:
        shape, work = self._shape, work_of(embedding)
        assert work != "none"
        flops = embedding.operations(
            shape,
            rows=size.rows,
            tokens=size.tokens,
            supervised_tokens=size.supervised_tokens,
            sum_sq_len=size.squared_tokens,
        )
        forwards = nominal_passes(embedding, shape.blocks)
        if isinstance(embedding, Jvp):
            # One pass for averaged directions, as linear as they are, and one for each that is kept.
            times = embedding.directions if embedding.combine == "concat" else 1
            forwards = _PAPER_JVP * times * min(1.0, embedding.depth / shape.blocks)
        self.passes.append(
            PassPlan(
                name=f"{embedding.name}{what} ({which})",
                stage=stage,
                work=work,
                size=size,
                tflops=flops / 1e12,
                disk_bytes=float(entry_bytes) * embedding.numbers(shape) * size.rows,
                paper_forwards=forwards,
            )
        )


def _choose(embedded: _Embedded, method: InfluenceDistillation, landmarks: CorpusSize, target: CorpusSize) -> None:
    """Every embedding on a few landmarks, the best on more for its kernel, and on all for what to expect of it."""
    most = {COMPARED: "compared", KERNELS_COMPARED: "kernels compared"}

    def compare(embedding: ModelEmbedding | None, count: int) -> None:
        few = _part(landmarks, count)
        embedded.pool(embedding, few, _LANDMARKS if few.rows == landmarks.rows else most[count])

    if embedded.is_chosen:
        for embedding in embedded.tried:
            compare(embedding, COMPARED)
    if not embedded.is_chosen or landmarks.rows > COMPARED:
        compare(embedded.dearest, KERNELS_COMPARED)
    embedded.pool(embedded.dearest, landmarks, _LANDMARKS)
    if method.residual is not False:  # the embedding's own score needs the target's embeddings
        embedded.target(embedded.dearest, target)


def _warm_up(question: MethodQuestion, method: InfluenceDistillation, shape: ModelShape) -> PassPlan:
    pool = question.pool
    share = warmup_rows(method.warmup_pool_share, method.warmup_update_rows, pool.rows)
    rows = share if method.warmup_rows is None else min(method.warmup_rows, pool.rows)
    seen = pool.times(rows * method.warmup_epochs / pool.rows)
    sizes = (seen.tokens, seen.supervised_tokens, seen.squared_tokens)
    flops = warmup_flops(shape, *sizes, full=method.warmup == "full")
    name, stage = f"warm-up ({method.warmup})", "influence-distillation-warm-up"
    return PassPlan(name=name, stage=stage, work="gradient", size=seen, tflops=flops / 1e12)


def _hessian_passes(
    question: MethodQuestion,
    method: InfluenceDistillation,
    shape: ModelShape,
    landmarks: CorpusSize,
    drawn: CorpusSize,
) -> list[PassPlan]:
    """Lengths of gradients, the products, and what they are compared with: see ``score/distillation/curvature.py``."""

    def lengths(whose: Literal["target", "pool"], size: CorpusSize) -> PassPlan:
        name = "lengths of landmarks' gradients" if whose == "pool" else "lengths of gradients (target)"
        return question.model_pass(name, f"gradient-lengths-{whose}", "gradient", size, shape=shape)

    def products(kind: Literal["products", "sums", "offsets"], rows: CorpusSize) -> PassPlan:
        return _products(question, shape, rows, kind=kind, memory_bytes=int(method.memory_gb * 2**30))

    is_whole = method.weights == "second-order"
    passes = [
        lengths("target", question.target),
        lengths("pool", drawn),
        products("products" if is_whole else "sums", drawn),
    ]
    if is_whole and method.form == "adam" and method.momentum != "none":
        if drawn.rows < landmarks.rows:
            passes.append(lengths("pool", landmarks))
        passes.append(products("offsets", landmarks))
    return passes


def _products(
    question: MethodQuestion,
    shape: ModelShape,
    rows: CorpusSize,
    *,
    kind: Literal["products", "sums", "offsets"],
    memory_bytes: int,
) -> PassPlan:
    """Products in shards: each passes the rows it compares with, those behind its directions, and target rows."""
    columns = question.columns()
    directions = rows.rows if kind == "products" else 1
    sizes, flops = [], 0.0
    for shard in product_shards(directions, len(columns), numel=shape.gradient_numel, memory_bytes=memory_bytes):
        behind = {"products": len(shard.directions) / rows.rows, "sums": 1.0, "offsets": 0.0}[kind]
        sizes += [rows, rows.times(behind)]
        for column, count in zip(shard.columns.tolist(), shard.products.tolist(), strict=True):
            one = columns[column]
            sizes.append(one)
            flops += hessian_flops(shape, count, one.tokens, one.supervised_tokens, one.squared_tokens)
        flops += sum(
            stage_flops(shape, "gradient", size.tokens, size.supervised_tokens, size.squared_tokens)
            for size in (rows, rows.times(behind))
        )
    stage = f"hessian-{kind}-pool"
    return PassPlan(
        name=f"Hessian {kind}", stage=stage, work="gradient", size=total_size(tuple(sizes)), tflops=flops / 1e12
    )


def _part(size: CorpusSize, rows: int) -> CorpusSize:
    """So many of the rows, or all if there are fewer."""
    return size.times(min(1.0, rows / size.rows))
