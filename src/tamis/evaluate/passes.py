"""What each method does to a pool, as passes over rows, and what these cost in operations, time, memory and disk.

Pure arithmetic: no model, no disk. Memory is an estimate within a factor of two; the rest is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tamis.evaluate.devices import Rate
from tamis.evaluate.distillation_passes import distillation_passes
from tamis.evaluate.inputs import CorpusSize
from tamis.evaluate.question import BYTES_BESIDE, MethodQuestion, PassPlan, total_size
from tamis.model.flops import ModelShape, forward_flops, stage_flops, weight_gradient_flops
from tamis.score.exact import direction_passes
from tamis.score.features import vectors_at_once
from tamis.score.warmup import warmup_rows
from tamis.training.loop import rows_of_steps
from tamis.trajectory.adjoint import steps_back

__all__ = ["MethodPlan", "MethodQuestion", "PassPlan", "landmark_tflops", "method_plan", "passes_of"]

# Methods whose scoring tells each row's own loss, which --drop-flagged needs: of others it takes a pass more.
_KNOW_LOSSES = ("loss-drop", "mid-ppl", "tracin", "less", "influence-function")


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


def _without_model(question: MethodQuestion) -> list[PassPlan]:
    return []


def _mid_ppl(question: MethodQuestion) -> list[PassPlan]:
    return [_losses(question)]


def _losses(question: MethodQuestion) -> PassPlan:
    return question.model_pass("losses (pool)", "losses-pool", "forward", question.scored)


def _rds(question: MethodQuestion) -> list[PassPlan]:
    passes = []
    for name, size in (("pool", question.scored), ("target", question.target)):
        one_position = replace(size, supervised_tokens=float(size.rows))  # all that the LM head gets to see
        made = question.model_pass(f"hidden states ({name})", f"hidden-states-{name}", "forward", one_position)
        passes.append(replace(made, disk_bytes=4.0 * question.shape.hidden * size.rows))
    return passes


def _loss_drop(question: MethodQuestion) -> list[PassPlan]:
    values = question.values
    adapted = question.with_lora(int(values["lora_rank"]))
    passes = [_losses(question)]
    for target in question.targets:
        rows = rows_of_steps(int(values["warmup_steps"]), int(values["warmup_update_rows"]), target.rows)
        seen = target.times(rows / target.rows)
        passes += [
            question.model_pass("warm-up on a target", "loss-drop-warm-up", "gradient", seen, shape=adapted),
            question.model_pass("losses after it (pool)", "losses-pool", "forward", question.scored, shape=adapted),
        ]
    return passes


def _tracin(question: MethodQuestion) -> list[PassPlan]:
    values = question.values
    passes = []
    for _ in range(max(1, len(values["checkpoints"]))):
        if values["projection"] == "none":
            passes += _exact(question, "alignments (pool)", preconditioned=False)
            continue
        passes.append(question.feature_pass("gradients (target)", "gradients-target", question.target, kept=True))
        passes += _pool_features(question, "gradients", "gradients (pool)", kept=bool(values["keep_features"]))
    return passes


def _less(question: MethodQuestion) -> list[PassPlan]:
    values = question.values
    adapted = question.with_lora(int(values["lora_rank"])) if values["moments"] is None else question.shape
    passes = []
    if values["moments"] is None:
        rows = warmup_rows(values["warmup_pool_share"], int(values["warmup_update_rows"]), question.pool.rows)
        seen = question.pool.times(rows * values["warmup_epochs"] / question.pool.rows)
        passes.append(question.model_pass("warm-up (LoRA)", "less-warm-up", "gradient", seen, shape=adapted))
    kept = bool(values["keep_features"]) and values["projection"] != "none"
    for _ in range(int(values["warmup_epochs"]) if values["moments"] is None else 1):
        # Whole gradients of the target are stored, too: only the pool's are compared as they pass.
        passes.append(
            question.feature_pass(
                "gradients (target)", "gradients-target", question.target, shape=adapted, kept=True, whole=True
            )
        )
        passes += _pool_features(question, "adam-directions", "Adam directions (pool)", kept=kept, shape=adapted)
    return passes


def _pool_features(
    question: MethodQuestion, stage: str, name: str, *, kept: bool, shape: ModelShape | None = None
) -> list[PassPlan]:
    """Features of the pool, once where they are stored, and else once for every lot of the target's that fits."""
    if kept:
        return [question.feature_pass(name, f"{stage}-pool", question.scored, shape=shape, kept=True)]
    at_once = vectors_at_once(question.feature_numbers(shape), int(question.values["memory_gb"] * 2**30))
    passing = question.feature_pass(name, f"{stage}-scores-pool", question.scored, shape=shape, kept=False)
    lots = math.ceil(question.target.rows / at_once)
    # Scores against the target rows are stored once in all, whatever the lots.
    return [replace(passing, disk_bytes=passing.disk_bytes / lots)] * lots


def _exact(question: MethodQuestion, name: str, *, preconditioned: bool) -> list[PassPlan]:
    """Unprojected gradients of the target as directions, and the pool once for every lot of these that fits."""
    values, target, stage = question.values, question.target, "exact-alignments-pool"
    columns = question.columns()
    lots = 1
    if len(columns) > 1:
        at_once = vectors_at_once(question.gradient_numbers(), int(values["memory_gb"] * 2**30))
        lots = math.ceil(len(columns) / at_once)
    is_unit = values["normalize"] == "cosine"
    passed = [
        column.times(direction_passes(column.rows, unit=is_unit, preconditioned=preconditioned)) for column in columns
    ]
    scored, each = question.scored, len(columns) / lots
    # A row's gradient is formed and compared, or each direction is brought to its tokens, whichever is cheaper.
    formed, numbers = weight_gradient_flops(question.shape, scored.tokens), question.shape.gradient_numel
    compared = replace(
        question.model_pass(name, stage, "gradient", scored),
        feature_tflops=min(formed + 2 * each * numbers * scored.rows, each * formed) / 1e12,
        disk_bytes=scored.rows * (4 * each + BYTES_BESIDE),
    )
    return [
        question.model_pass("gradient norms (target)", "gradient-norms-target", "gradient", target),
        question.model_pass("directions (target)", stage, "gradient", total_size(tuple(passed))),
        *[compared] * lots,
    ]


def _influence_function(question: MethodQuestion) -> list[PassPlan]:
    values, pool = question.values, question.pool
    rows = pool.rows if values["factor_rows"] is None else min(int(values["factor_rows"]), pool.rows)
    few, shape, stage = pool.times(rows / pool.rows), question.shape, "kronecker-factors"
    # a a^T and g g^T of every layer; EK-FAC turns both into the eigenbasis and forms each row's gradient there.
    squares = sum(m.count * (m.out_features**2 + m.in_features**2) for m in shape.gradient_matrices)
    made = question.model_pass("covariances (pool)", stage, "gradient", few)
    factors = 4.0 * 2 * squares
    passes = [replace(made, feature_tflops=2 * few.tokens * squares / 1e12, disk_bytes=factors)]
    if values["strategy"] == "ekfac":
        formed = 2 * few.tokens * squares + weight_gradient_flops(shape, few.tokens)
        again = question.model_pass("eigenvalues (pool)", stage, "gradient", few)
        passes.append(replace(again, feature_tflops=formed / 1e12, disk_bytes=4.0 * shape.gradient_numel))
    return [*passes, *_exact(question, "influence (pool)", preconditioned=True)]


def _adamw_influence(question: MethodQuestion) -> list[PassPlan]:
    values, stage, targets = question.values, "adamw-influence", len(question.targets)
    adapted = question.with_lora(int(values["lora_rank"]))
    seen = question.scored.times(float(values["epochs"]))
    back = seen.times(steps_back(str(values["curvature"]), values=targets))
    return [
        question.model_pass("reference run (LoRA)", f"{stage}-run", "gradient", seen, shape=adapted),
        question.model_pass("replay of it", stage, "gradient", seen, shape=adapted),
        # All target rows for each target, those of the others with weight 0.
        question.model_pass(
            "gradients at its end (target)", stage, "gradient", question.target.times(targets), shape=adapted
        ),
        question.model_pass("sweep back", stage, "gradient", back, shape=adapted),
    ]


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
    "influence-distillation": distillation_passes,
    "adamw-influence": _adamw_influence,
}


def passes_of(method: str, question: MethodQuestion) -> tuple[PassPlan, ...]:
    """The passes of scoring by ``method``, as the account of a run will have them."""
    return tuple(_PASSES[method](question))


def method_plan(
    method: str,
    question: MethodQuestion,
    rate: Rate,
    *,
    bytes_per_param: int,
    batch_tokens: int,
    shortlist: str | None = None,
    before: Sequence[PassPlan] = (),
) -> MethodPlan:
    """Passes, operations, time, memory and disk of one method.

    Args:
        method: a name of ``tamis.score.METHODS``.
        question: rows, model and the method's settings.
        rate: how fast the device is.
        bytes_per_param: of the weights and activations.
        batch_tokens: padded tokens per forward pass.
        shortlist: named in the result if the scored rows come from one.
        before: the passes of the shortlist's own method.
    """
    own = passes_of(method, question)
    if question.drop_flagged and method not in _KNOW_LOSSES:
        own = (*own, replace(_losses(question), name="losses, to flag rows"))
    if any(p.name == "losses (pool)" for p in before):  # of shortlisted rows they are read from there
        own = tuple(p for p in own if p.name not in ("losses (pool)", "losses, to flag rows"))
    passes = (*before, *own)
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
