"""What each method does to a pool, as passes over rows, and what these cost in operations, time, memory and disk.

Pure arithmetic: no model, no disk. Memory is an estimate within a factor of two; the rest is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tamis.embeddings import Given, Jvp, ModelEmbedding, TfIdf
from tamis.evaluate.devices import Rate
from tamis.evaluate.inputs import CorpusSize
from tamis.model.flops import (
    FACTORIZED_SIDE,
    ModelShape,
    feature_dim,
    feature_flops,
    forward_flops,
    hessian_flops,
    stage_flops,
    weight_gradient_flops,
)
from tamis.score.distillation.candidates import embeddings_within, nominal_passes
from tamis.score.distillation.choice import COMPARED
from tamis.score.distillation.row_embeddings import work_of
from tamis.score.distillation.settings import landmark_count
from tamis.score.influence_distillation import InfluenceDistillation
from tamis.score.warmup import warmup_rows
from tamis.trajectory.adjoint import steps_back

__all__ = ["MethodPlan", "MethodQuestion", "PassPlan", "landmark_tflops", "method_plan"]

_DEFAULT_TOTAL_DIM = 8192  # numbers a row keeps under the projections that are not factorized
_BYTES_BESIDE = 16  # scale, loss and norm of a row, stored with its feature
_BYTES = {"float16": 2, "float32": 4}
# Influence Distillation (2025), section 5.2, after Kaplan et al.: a forward pass costs 2 operations a parameter, a
# backward pass 4, and a row is one token. A JVP costs twice the forward pass of its blocks.
_PAPER_FORWARDS = {"forward": 1.0, "gradient": 3.0}
_PAPER_JVP = 2.0


@dataclass(frozen=True, kw_only=True)
class PassPlan:
    """One pass over rows, as a stage of a run will report it."""

    name: str
    work: Literal["forward", "gradient"]
    size: CorpusSize
    tflops: float  # of the model's passes, as a manifest counts them
    feature_tflops: float = 0.0  # of turning them into features
    paper_forwards: float = 0.0  # what the cost column of Influence Distillation counts for a row, in forward passes
    disk_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """What one method costs at this pool."""

    method: str
    shortlist: str | None  # the cascade in front of it
    scored_rows: int
    passes: tuple[PassPlan, ...]
    tflops: float  # all of it, features included
    paper_tflops: float  # as the cost column of Influence Distillation counts: for comparison with that table only
    forward_passes: float  # the same in units of one forward pass over the whole pool
    seconds: float  # of model work at the plan's rate; reading and tokenizing come on top
    memory_bytes: float
    disk_bytes: float


@dataclass(frozen=True, kw_only=True)
class MethodQuestion:
    """What the estimate of one method depends on."""

    shape: ModelShape
    scored: CorpusSize  # the pool rows to score
    pool: CorpusSize
    target: CorpusSize
    targets: int
    values: Mapping[str, Any]  # the method's settings, defaults filled in
    with_lora: Callable[[int], ModelShape]  # the shape of the model with a LoRA adapter of a rank on all its layers
    projection: str | None = None
    projection_dim: int | None = None

    def model_pass(
        self, name: str, work: Literal["forward", "gradient"], size: CorpusSize, *, shape: ModelShape | None = None
    ) -> PassPlan:
        """A pass whose outputs are a few numbers a row."""
        flops = stage_flops(shape or self.shape, work, size.tokens, size.supervised_tokens, size.squared_tokens)
        return PassPlan(name=name, work=work, size=size, tflops=flops / 1e12, paper_forwards=_PAPER_FORWARDS[work])

    def feature_pass(
        self, name: str, size: CorpusSize, *, shape: ModelShape | None = None, kept: bool, whole: bool = False
    ) -> PassPlan:
        """A gradient pass that keeps one projected gradient a row; unprojected ones only if ``whole`` says so."""
        shape = shape or self.shape
        projection = self.projection or str(self.values["projection"])
        dim = self.projection_dim or self.values["projection_dim"]
        if dim is None:
            dim = FACTORIZED_SIDE if projection == "factorized" else _DEFAULT_TOTAL_DIM
        numbers = feature_dim(shape, projection, int(dim))
        stored = kept and (whole or projection != "none")  # otherwise exact gradients are compared as they pass
        row_bytes = numbers * _BYTES[self.values["feature_dtype"]] if stored else 4 * max(1, self.target.rows)
        return replace(
            self.model_pass(name, "gradient", size, shape=shape),
            feature_tflops=feature_flops(shape, projection, int(dim), rows=size.rows, tokens=size.tokens) / 1e12,
            disk_bytes=float(size.rows) * (row_bytes + _BYTES_BESIDE),
        )


def _without_model(question: MethodQuestion) -> list[PassPlan]:
    return []


def _mid_ppl(question: MethodQuestion) -> list[PassPlan]:
    return [question.model_pass("losses (pool)", "forward", question.scored)]


def _rds(question: MethodQuestion) -> list[PassPlan]:
    passes = []
    for name, size in (("pool", question.scored), ("target", question.target)):
        one_position = replace(size, supervised_tokens=float(size.rows))  # all that the LM head gets to see
        made = question.model_pass(f"hidden states ({name})", "forward", one_position)
        passes.append(replace(made, disk_bytes=4.0 * question.shape.hidden * size.rows))
    return passes


def _loss_drop(question: MethodQuestion) -> list[PassPlan]:
    values = question.values
    adapted = question.with_lora(int(values["lora_rank"]))
    one_target = question.target.times(1 / question.targets)
    seen = one_target.times(int(values["warmup_steps"]) * int(values["warmup_batch_rows"]) / max(1, one_target.rows))
    passes = [question.model_pass("losses (pool)", "forward", question.scored)]
    for _ in range(question.targets):
        passes.append(question.model_pass("warm-up on a target", "gradient", seen, shape=adapted))
        passes.append(question.model_pass("losses after it (pool)", "forward", question.scored, shape=adapted))
    return passes


def _tracin(question: MethodQuestion) -> list[PassPlan]:
    values = question.values
    passes = []
    for _ in range(max(1, len(values["checkpoints"]))):
        passes.append(question.feature_pass("gradients (target)", question.target, kept=True))
        passes.append(question.feature_pass("gradients (pool)", question.scored, kept=bool(values["keep_features"])))
    return passes


def _less(question: MethodQuestion) -> list[PassPlan]:
    values = question.values
    adapted = question.with_lora(int(values["lora_rank"]))
    passes = []
    if values["moments"] is None:
        rows = warmup_rows(values["warmup_share"], int(values["warmup_batch_rows"]), question.pool.rows)
        seen = question.pool.times(rows * values["warmup_epochs"] / question.pool.rows)
        passes.append(question.model_pass("warm-up (LoRA)", "gradient", seen, shape=adapted))
    for _ in range(int(values["warmup_epochs"]) if values["moments"] is None else 1):
        passes.append(question.feature_pass("gradients (target)", question.target, shape=adapted, kept=True))
        kept = bool(values["keep_features"])
        passes.append(question.feature_pass("Adam directions (pool)", question.scored, shape=adapted, kept=kept))
    return passes


def _influence_function(question: MethodQuestion) -> list[PassPlan]:
    values, pool = question.values, question.pool
    rows = pool.rows if values["factor_rows"] is None else min(int(values["factor_rows"]), pool.rows)
    few, shape = pool.times(rows / pool.rows), question.shape
    # a a^T and g g^T of every layer; EK-FAC turns both into the eigenbasis and forms each row's gradient there.
    squares = sum(m.count * (m.out_features**2 + m.in_features**2) for m in shape.gradient_matrices)
    made = question.model_pass("covariances (pool)", "gradient", few)
    factors = 4.0 * 2 * squares
    passes = [replace(made, feature_tflops=2 * few.tokens * squares / 1e12, disk_bytes=factors)]
    if values["strategy"] == "ekfac":
        formed = 2 * few.tokens * squares + weight_gradient_flops(shape, few.tokens)
        again = question.model_pass("eigenvalues (pool)", "gradient", few)
        passes.append(replace(again, feature_tflops=formed / 1e12, disk_bytes=4.0 * shape.gradient_numel))
    passes.append(question.model_pass("gradients (target)", "gradient", question.target))
    lots = max(1, math.ceil(4.0 * question.target.rows * shape.gradient_numel / (values["memory_gb"] * 2**30)))
    return [*passes, *[question.model_pass("influence (pool)", "gradient", question.scored)] * lots]


def _adamw_influence(question: MethodQuestion) -> list[PassPlan]:
    values = question.values
    adapted = question.with_lora(int(values["lora_rank"]))
    seen = question.scored.times(float(values["epochs"]))
    back = seen.times(steps_back(str(values["curvature"])))
    return [
        question.model_pass("reference run (LoRA)", "gradient", seen, shape=adapted),
        question.model_pass("replay of it", "gradient", seen, shape=adapted),
        question.model_pass("sweep back", "gradient", back, shape=adapted),
    ]


def _influence_distillation(question: MethodQuestion) -> list[PassPlan]:
    method = InfluenceDistillation(**question.values)
    lora = method.moments is None and method.warmup == "lora"
    shape = question.with_lora(method.lora_rank) if lora else question.shape
    passes = []
    if method.moments is None and method.warmup != "none":
        share = warmup_rows(method.warmup_share, method.warmup_batch_rows, question.pool.rows)
        rows = share if method.warmup_rows is None else min(method.warmup_rows, question.pool.rows)
        seen = question.pool.times(rows * method.warmup_epochs / question.pool.rows)
        warmup = question.model_pass(f"warm-up ({method.warmup})", "gradient", seen, shape=shape)
        if not lora:
            every_weight = weight_gradient_flops(shape, seen.tokens) / 1e12
            warmup = replace(warmup, feature_tflops=every_weight)
        passes.append(warmup)
    landmarks = landmark_count(method.landmarks, question.scored.rows)
    few = question.scored.times(min(1.0, landmarks / question.scored.rows))
    passes.append(question.feature_pass("gradients (target)", question.target, shape=shape, kept=True, whole=True))
    passes.append(question.feature_pass("gradients (landmarks)", few, shape=shape, kept=True, whole=True))
    passes += _hessian_passes(question, method, few, shape)
    is_exact = few.rows == question.scored.rows
    if is_exact:
        few = few.times(min(1.0, method.hessian_landmarks / few.rows))
        if method.weights != "second-order" or few.rows == question.scored.rows:
            return passes  # every score is exact, and so is the second-order term, if there is one
    within = embeddings_within(method.embedding_settings(), shape.blocks, 0)
    tried = [e for e in within if not isinstance(e, _FREE)]
    entry = _BYTES[method.feature_dtype]
    if tried:
        # Which one leave-one-out will choose is not known: the dearest, which it mostly is.
        dearest = max(tried, key=lambda e: nominal_passes(e, shape.blocks))
        compared = few.times(min(1.0, COMPARED / few.rows))
        others = [e for e in tried if e is not dearest or compared.rows < few.rows] if len(within) > 1 else []
        passes += [_embedding_pass(f"{e.name} (compared)", e, compared, shape, entry_bytes=entry) for e in others]
        passes.append(_embedding_pass(f"{dearest.name} (landmarks)", dearest, few, shape, entry_bytes=entry))
        if method.residual is not False:  # the embedding's own score needs the target's embeddings
            passes.append(
                _embedding_pass(f"{dearest.name} (target)", dearest, question.target, shape, entry_bytes=entry)
            )
        kept = entry if method.keep_embeddings else 0
        pool = _embedding_pass(f"{dearest.name} (pool)", dearest, question.scored, shape, entry_bytes=kept)
        passes.append(pool)
        is_carried = method.weights == "second-order" and method.hessian_landmarks < question.scored.rows
        if is_carried and not (is_exact or method.keep_embeddings):  # scores and that term each embed the pool
            passes.append(replace(pool, name=f"{dearest.name}, second order (pool)"))
    return passes


def _hessian_passes(
    question: MethodQuestion, method: InfluenceDistillation, landmarks: CorpusSize, shape: ModelShape
) -> list[PassPlan]:
    """Products of the target's Hessian; their inner products with the landmarks take passes that memory decides."""
    if method.weights != "second-order" and not method.hessian_ratio:
        return []
    drawn = landmarks.times(min(1.0, method.hessian_landmarks / landmarks.rows))
    products = drawn.rows if method.weights == "second-order" else 1
    target = question.target
    flops = hessian_flops(shape, products, target.tokens, target.supervised_tokens, target.squared_tokens)
    return [PassPlan(name="Hessian products (target)", work="gradient", size=target, tflops=flops / 1e12)]


def _embedding_pass(
    name: str, embedding: ModelEmbedding, size: CorpusSize, shape: ModelShape, *, entry_bytes: int
) -> PassPlan:
    """``entry_bytes`` is what a number takes on disk; 0 where rows are scored as they pass."""
    flops = embedding.operations(
        shape,
        rows=size.rows,
        tokens=size.tokens,
        supervised_tokens=size.supervised_tokens,
        sum_sq_len=size.squared_tokens,
    )
    work: Literal["forward", "gradient"] = "gradient" if work_of(embedding) == "gradient" else "forward"
    forwards = nominal_passes(embedding, shape.blocks)
    if isinstance(embedding, Jvp):
        # One pass for averaged directions, as linear as they are, and one for each that is kept.
        passes = embedding.directions if embedding.combine == "concat" else 1
        forwards = _PAPER_JVP * passes * min(1.0, embedding.depth / shape.blocks)
    return PassPlan(
        name=name,
        work=work,
        size=size,
        tflops=flops / 1e12,
        disk_bytes=float(entry_bytes) * embedding.numbers(shape) * size.rows,
        paper_forwards=forwards,
    )


_FREE = (TfIdf, Given)  # embeddings without the model

_PASSES: dict[str, Callable[[MethodQuestion], list[PassPlan]]] = {
    "uniform": _without_model,
    "length": _without_model,
    "bm25": _without_model,
    "mid-ppl": _mid_ppl,
    "rds+": _rds,
    "loss-drop": _loss_drop,
    "tracin": _tracin,
    "less": _less,
    "influence-function": _influence_function,
    "influence-distillation": _influence_distillation,
    "adamw-influence": _adamw_influence,
}


def method_plan(
    method: str,
    question: MethodQuestion,
    rate: Rate,
    *,
    bytes_per_param: int,
    batch_tokens: int,
    shortlist: str | None = None,
) -> MethodPlan:
    """Passes, operations, time, memory and disk of one method.

    Args:
        method: a name of ``tamis.score.METHODS``.
        question: rows, model and the method's settings.
        rate: how fast the device is.
        bytes_per_param: of the weights and activations.
        batch_tokens: padded tokens per forward pass.
        shortlist: named in the result if the scored rows come from one.
    """
    passes = tuple(_PASSES[method](question))
    # Neither the warm-up nor the target is in that column.
    paper = sum(p.paper_forwards * p.size.rows for p in passes if p.name.endswith(("(pool)", "(landmarks)")))
    pool = question.pool
    whole = forward_flops(question.shape, pool.tokens, pool.supervised_tokens, pool.squared_tokens) / 1e12
    tflops = sum(p.tflops + p.feature_tflops for p in passes)
    speed = {"forward": rate.forward / 1e12, "gradient": rate.gradient / 1e12}
    return MethodPlan(
        method=method,
        shortlist=shortlist,
        scored_rows=question.scored.rows,
        passes=passes,
        tflops=tflops,
        paper_tflops=2 * question.shape.params * paper / 1e12,
        forward_passes=tflops / whole,
        seconds=sum((p.tflops + p.feature_tflops) / speed[p.work] for p in passes),
        memory_bytes=_memory(question, passes, bytes_per_param=bytes_per_param, batch_tokens=batch_tokens),
        disk_bytes=sum(p.disk_bytes for p in passes),
    )


def landmark_tflops(shape: ModelShape, pool: CorpusSize, *, landmarks: int = 4096, blocks: int = 4) -> float:
    """Teraflops of the landmark scheme of influence distillation: cheap embeddings of all rows, gradients of a few.

    After the cost column of *Influence Distillation* (2025): a forward-mode derivative costs twice the forward pass of
    the blocks that it goes through; landmarks cost a forward and a backward pass, weight gradients included. The
    paper's own figures (872 against 2800 TFLOP for 200,000 rows of a 7B model) count one token a row; this counts all.
    """
    through = forward_flops(shape, pool.tokens, 0, pool.squared_tokens) * min(1.0, blocks / shape.blocks)
    few = pool.times(min(1.0, landmarks / pool.rows))
    exact = stage_flops(shape, "gradient", few.tokens, few.supervised_tokens, few.squared_tokens)
    return (2 * through + exact + weight_gradient_flops(shape, few.tokens)) / 1e12


def _memory(question: MethodQuestion, passes: Sequence[PassPlan], *, bytes_per_param: int, batch_tokens: int) -> float:
    """Weights, one batch's activations, and logits: within a factor of two of what an allocator reports."""
    if not passes:
        return 0.0
    shape = question.shape
    weights = float(shape.params * bytes_per_param)
    tokens = max(batch_tokens, question.pool.tokens / question.pool.rows)
    supervised = tokens * question.pool.supervised_tokens / question.pool.tokens
    logits = supervised * shape.vocabulary * (bytes_per_param + 4)
    if any(p.work == "gradient" for p in passes):
        # Kept until the backward pass: about every matrix product's output and four residual-sized tensors a block.
        kept = sum(m.out_features * m.count * m.active for m in shape.matrices) + 4 * shape.hidden * shape.blocks
    else:
        kept = 8 * shape.hidden
    return weights + tokens * kept * bytes_per_param + logits
