"""A store shared by runs: what changes a number of a stage makes another stage, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from score_task import make_task, save_tiny
from tamis.collect import Collecting, Task
from tamis.embeddings import HiddenMean
from tamis.score.distillation.choice import Choice
from tamis.score.distillation.curvature import LandmarkHessians
from tamis.score.distillation.landmark_rows import landmark_rows
from tamis.score.distillation.row_embeddings import RowEmbeddings
from tamis.score.distillation.transfer import transfer_coefficients
from tamis.score.influence_distillation import InfluenceDistillation
from tamis.score.warmup import warmup_points, warmup_training
from tamis.solve.leave_one_out import Candidate

CHOICE = Choice(
    embedding=HiddenMean(),
    candidate=Candidate(),
    residual=False,
    recovery=0.5,
    spearman=(0.5,),
    with_half=None,
    tried=(),
)
ROWS = np.array([0, 2, 5])


def hessian_products(task: Task) -> None:
    LandmarkHessians(task, [np.array([0])], moments=None, memory_bytes=1 << 20).products(ROWS)


def hessian_sums(task: Task) -> None:
    LandmarkHessians(task, [np.array([0])], moments=None, memory_bytes=1 << 20).equal_weights(ROWS)


def coefficients(task: Task) -> None:
    transfer_coefficients(task, RowEmbeddings(task, dtype="float32"), CHOICE, ROWS, keep_embeddings=True)


def passing_coefficients(task: Task) -> None:
    transfer_coefficients(task, RowEmbeddings(task, dtype="float32"), CHOICE, ROWS, keep_embeddings=False)


def drawn(task: Task, *, dtype: str = "float32", rule: str = "k-means++") -> None:
    settings = InfluenceDistillation(embedding="hidden-mean", landmark_rule=rule).embedding_settings()
    landmark_rows(task, RowEmbeddings(task, dtype=dtype), count=3, rule=rule, settings=settings)


def drawn_in_half(task: Task) -> None:
    drawn(task, dtype="float16")


def drawn_by_leverage(task: Task) -> None:
    drawn(task, rule="leverage")


def warmed_up(task: Task, *, rank: int | None = None, alpha: float = 1.0) -> None:
    training = warmup_training(epochs=1, update_rows=3, learning_rate=1e-3)
    warmup_points(task, task.pool, ROWS, training, method="m", lora_rank=rank, lora_alpha=alpha)


def with_rank(task: Task) -> None:
    warmed_up(task, rank=2)


def with_alpha(task: Task) -> None:
    warmed_up(task, alpha=2.0)


def with_rank_and_alpha(task: Task) -> None:
    warmed_up(task, rank=2, alpha=2.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize(
    ("stage", "first", "second", "batch_invariant", "stages"),
    [
        ("hessian-products-pool", hessian_products, hessian_products, True, 2),
        ("hessian-sums-pool", hessian_sums, hessian_sums, True, 2),
        ("landmark-coefficients-pool", coefficients, coefficients, True, 2),
        ("landmark-coefficients-pool", passing_coefficients, passing_coefficients, True, 2),
        ("landmarks", drawn, drawn, True, 2),
        ("landmarks", drawn, drawn_in_half, False, 2),
        ("landmarks", drawn, drawn_by_leverage, False, 2),
        ("landmarks", drawn, drawn, False, 1),
        ("hessian-products-pool", hessian_products, hessian_products, False, 1),
        ("landmark-coefficients-pool", coefficients, coefficients, False, 1),
        ("m-warm-up", warmed_up, with_alpha, False, 1),
        ("m-warm-up", warmed_up, with_rank, False, 2),
        ("m-warm-up", with_rank, with_rank_and_alpha, False, 2),
    ],
)
def test_a_stage_is_shared_by_runs_whose_numbers_are_the_same_to_the_last_bit(
    tmp_path: Path,
    llama: Path,
    stage: str,
    first: Callable[[Task], None],
    second: Callable[[Task], None],
    batch_invariant: bool,
    stages: int,
) -> None:
    first(make_task(tmp_path, llama))
    collecting = Collecting(batch_tokens=150, shard_rows=3, batch_invariant=batch_invariant)
    second(make_task(tmp_path, llama, collecting=collecting))
    assert len(list((tmp_path / "store").glob(f"{stage}-*"))) == stages
