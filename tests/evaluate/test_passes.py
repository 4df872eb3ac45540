"""What a method passes over the pool, and what that costs beside one forward pass."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.errors import InvalidSettings
from tamis.evaluate.devices import ASSUMED_UTILISATION, DEVICES, Rate, assumed_rate
from tamis.evaluate.inputs import CorpusSize
from tamis.evaluate.passes import MethodPlan, MethodQuestion, landmark_tflops, method_plan
from tamis.model.flops import Matrix, ModelShape
from tamis.score import METHODS

# A 7B model in round figures: 32 blocks of one 14000 x 15625 matrix each, no head, no attention.
MATRICES = (Matrix(out_features=14000, in_features=15625, count=32),)
SEVEN_B = ModelShape(
    name="7B",
    blocks=32,
    hidden=4096,
    vocabulary=0,
    params=7 * 10**9,
    matrices=MATRICES,
    gradient_matrices=MATRICES,
    attention_width=0,
)
ONE_TOKEN_EACH = CorpusSize(rows=200_000, tokens=200_000, supervised_tokens=200_000, squared_tokens=200_000)
POOL = CorpusSize(rows=10_000, tokens=1e6, supervised_tokens=4e5, squared_tokens=2e8)
TARGET = CorpusSize(rows=40, tokens=4e3, supervised_tokens=1e3, squared_tokens=5e5)
RATE = Rate(device="x", forward=1e13, gradient=5e12, origin="by hand")


def plan(
    method: str,
    *,
    scored: CorpusSize = POOL,
    targets: int = 1,
    aggregate: Literal["round-robin", "mean"] = "round-robin",
    drop_flagged: bool = False,
    **settings: Any,
) -> MethodPlan:
    kind: Any = METHODS[method]
    values = {f.name: getattr(kind(**settings), f.name) for f in dataclasses.fields(kind)}
    question = MethodQuestion(
        shape=SEVEN_B,
        scored=scored,
        pool=POOL,
        targets=(TARGET.times(1 / targets),) * targets,
        values=values,
        with_lora=lambda rank: SEVEN_B,
        aggregate=aggregate,
        drop_flagged=drop_flagged,
    )
    return method_plan(method, question, RATE, bytes_per_param=2, batch_tokens=4096)


def test_the_papers_own_figures_come_out_with_one_token_a_row() -> None:
    # Influence Distillation (2025), Table 1: 2800 TFLOP for a forward pass over 200k rows of Llama-2-7B, 872 for
    # landmarks with embeddings from 4 of 32 blocks. That is two operations a parameter and row, whatever its length.
    question = MethodQuestion(
        shape=SEVEN_B,
        scored=ONE_TOKEN_EACH,
        pool=ONE_TOKEN_EACH,
        targets=(TARGET,),
        values={},
        with_lora=lambda rank: SEVEN_B,
    )
    full = method_plan("mid-ppl", question, RATE, bytes_per_param=2, batch_tokens=4096)
    assert full.tflops == pytest.approx(2800)
    assert landmark_tflops(SEVEN_B, ONE_TOKEN_EACH) == pytest.approx(872, abs=1)


# Table 1 of the paper: parameters, blocks, and the cost columns of RDS+ (and Mid-PPL) and of Influence Distillation.
PUBLISHED = [(7e9, 32, 2800, 872), (3e9, 28, 1200, 417), (1.5e9, 28, 600, 208), (3e9, 36, 1200, 340)]


@pytest.mark.parametrize(("params", "blocks", "forward", "landmarks"), PUBLISHED)
def test_the_paper_s_column_is_that_of_its_table_1_whatever_the_rows_lengths(
    params: float, blocks: int, forward: float, landmarks: float
) -> None:
    shape = dataclasses.replace(SEVEN_B, params=int(params), blocks=blocks)
    long = CorpusSize(rows=200_000, tokens=5e7, supervised_tokens=2e7, squared_tokens=2e10)
    found = {}
    for method, settings in {"mid-ppl": {}, "rds+": {}, "influence-distillation": {"preset": "paper"}}.items():
        kind: Any = METHODS[method]
        question = MethodQuestion(
            shape=shape,
            scored=long,
            pool=long,
            targets=(TARGET,),
            values={f.name: getattr(kind(**settings), f.name) for f in dataclasses.fields(kind)},
            with_lora=lambda rank, shape=shape: shape,
        )
        found[method] = method_plan(method, question, RATE, bytes_per_param=2, batch_tokens=4096)
    assert found["mid-ppl"].paper_tflops == found["rds+"].paper_tflops == pytest.approx(forward)
    # The paper embeds every row once; we embed the landmarks a second time, to choose the kernel.
    again = 2 * 2 * params * 4 / blocks * 4096 / 1e12
    assert found["influence-distillation"].paper_tflops - again == pytest.approx(landmarks, abs=0.6)
    assert found["influence-distillation"].tflops > 10 * found["influence-distillation"].paper_tflops


def test_second_order_and_influence_functions_are_planned_with_the_passes_they_make() -> None:
    forward = plan("mid-ppl")
    plain = plan("influence-distillation", landmarks=1000, warmup="none", embedding="tfidf")
    bent = {"weights": "second-order", "eta": 1e-4}
    second = plan("influence-distillation", landmarks=1000, warmup="none", embedding="tfidf", **bent)
    extra = {p.name: p for p in second.passes if p not in plain.passes}
    assert {name: p.size.rows for name, p in extra.items() if name != "Hessian products"} == {
        "lengths of gradients (target)": 40,
        "lengths of landmarks' gradients": 256,
    }
    # In 2 GiB fit no six of 7e9 numbers: a shard is one product of one landmark with one target row's loss, compared
    # with all landmarks. Of each a product of six times a forward pass, and the graph (three times).
    shards = 256 * 40
    made = extra["Hessian products"]
    assert made.size.rows == shards * (256 + 1 + 1)
    over_a_row, over_landmarks = 9 / POOL.rows, 2 * 257 / POOL.rows
    assert made.tflops / forward.tflops == pytest.approx(shards * (over_a_row + over_landmarks), rel=0.02)
    # With room for 64 products, a shard shares the graphs and the comparison.
    roomy = plan("influence-distillation", landmarks=1000, warmup="none", embedding="tfidf", memory_gb=1e5, **bent)
    made = {p.name: p for p in roomy.passes}["Hessian products"]
    assert made.size.rows == 160 * 256 + sum(
        len({flat // 40 for flat in range(first, first + 64)}) + len({flat % 40 for flat in range(first, first + 64)})
        for first in range(0, shards, 64)
    )
    kfac, ekfac = (plan("influence-function", strategy=s, factor_rows=1000, memory_gb=1e4) for s in ("kfac", "ekfac"))
    assert [p.name for p in kfac.passes] == [
        *("covariances (pool)", "gradient norms (target)", "directions (target)", "influence (pool)"),
    ]
    assert sum(p.tflops for p in kfac.passes) / forward.tflops == pytest.approx(2 * (1 + 0.1 + 2 * 0.004), rel=0.02)
    assert [p.name for p in ekfac.passes][1] == "eigenvalues (pool)" and ekfac.tflops > kfac.tflops
    # 3 target gradients of 7e9 numbers of 4 bytes fit in 100 GiB: 40 take 14 lots, two mean targets one.
    lots = plan("influence-function", factor_rows=1000, memory_gb=100.0).passes
    assert sum(p.name == "influence (pool)" for p in lots) == 14
    lots = plan("influence-function", factor_rows=1000, memory_gb=100.0, targets=2, aggregate="mean").passes
    assert sum(p.name == "influence (pool)" for p in lots) == 1


def test_scores_without_a_model_cost_no_operation() -> None:
    for method in ("uniform", "length", "bm25"):
        found = plan(method)
        assert (found.tflops, found.seconds, found.memory_bytes, found.disk_bytes) == (0, 0, 0, 0)
        assert found.scored_rows == POOL.rows


def test_passes_are_those_that_the_methods_make() -> None:
    assert plan("mid-ppl").forward_passes == pytest.approx(1)
    assert plan("rds+").forward_passes == pytest.approx(1, rel=0.01)
    # Forward and activation backward: twice a forward pass without attention, the factorized sketch on top.
    assert plan("tracin").forward_passes == pytest.approx(2, rel=0.02)
    assert plan("tracin", checkpoints=("a", "b", "c")).forward_passes == pytest.approx(6, rel=0.02)
    # 5 % of the pool for 4 epochs, then 4 checkpoints, twice a forward pass each, gradients formed and projected.
    less = plan("less")
    assert sum(p.tflops for p in less.passes) / plan("mid-ppl").tflops == pytest.approx(4 * 0.05 * 2 + 4 * 2, rel=0.02)
    assert [p.work for p in less.passes].count("gradient") == 1 + 4 * 2
    assert len(plan("less", moments="folder").passes) == 2


def test_landmarks_cost_gradients_of_a_few_rows_and_an_embedding_of_all() -> None:
    found = plan("influence-distillation", landmarks=1000, warmup="none", embedding="hidden-error")
    names = [p.name for p in found.passes]
    assert names == [
        "gradients (target)",
        "gradients (landmarks)",
        "hidden-error (landmarks)",
        "hidden-error (target)",
        "hidden-error (pool)",
    ]
    model_work = sum(p.tflops for p in found.passes) / plan("mid-ppl").tflops
    assert model_work == pytest.approx(2 * 0.1 + 2 * 0.004 + 0.1 + 0.004 + 1, rel=0.02)
    jvp = plan("influence-distillation", landmarks=1000, warmup="none", embedding="jvp", depth=4)
    assert jvp.passes[-1].tflops / plan("mid-ppl").tflops == pytest.approx(3 * 4 / 32, rel=0.02)
    every = {"landmarks": POOL.rows, "warmup": "none"}
    assert len(plan("influence-distillation", **every).passes) == 2
    # Scores need no embedding then, but the second-order term is carried from its own landmarks.
    bent = {**every, "embedding": "hidden-error", "weights": "second-order", "eta": 1e-4}
    sizes = {p.name: p.size.rows for p in plan("influence-distillation", **bent).passes}
    assert {name: rows for name, rows in sizes.items() if name.startswith("hidden-error")} == {
        "hidden-error (landmarks)": 256,
        "hidden-error (target)": TARGET.rows,
        "hidden-error (pool)": POOL.rows,
    }
    whole = plan("influence-distillation", **bent, hessian_landmarks=POOL.rows).passes
    assert not any(p.name.startswith("hidden-error") for p in whole)
    warmed = plan("influence-distillation", landmarks=1000, embedding="tfidf")
    assert [p.name for p in warmed.passes] == ["warm-up (lora)", "gradients (target)", "gradients (landmarks)"]
    tried = plan("influence-distillation", landmarks=1000, warmup="none", embedding_budget=0.5)
    assert tried.passes[-1].tflops < 0.6 * plan("mid-ppl").tflops


@pytest.mark.parametrize(("dtype", "entry"), [("float16", 2), ("float32", 4)])
@pytest.mark.parametrize(
    ("embedding", "numbers"),
    [
        ({"embedding": "hidden-error"}, 2 * 4096),
        ({"embedding": "gradient", "side": 8}, 64 * 32),
        ({"embedding": "jvp", "directions": 3, "combine": "concat"}, 3 * 4096),
    ],
)
def test_embeddings_take_as_much_of_the_disk_as_they_have_numbers(
    embedding: dict[str, Any], numbers: int, dtype: str, entry: int
) -> None:
    settings = {**embedding, "landmarks": 1000, "warmup": "none", "feature_dtype": dtype}

    def disk(**more: Any) -> list[float]:
        passes = plan("influence-distillation", **settings, **more).passes
        return [p.disk_bytes for p in passes if not p.name.startswith("gradients")]

    rows = [1000, TARGET.rows, POOL.rows]
    assert disk() == [entry * numbers * count for count in rows]
    assert disk(residual=False) == [entry * numbers * count for count in (1000, POOL.rows)]
    assert disk(keep_embeddings=False) == [*(entry * numbers * count for count in rows[:2]), 0]


def test_embeddings_that_are_not_kept_are_computed_again_for_the_second_order_term() -> None:
    def over_the_pool(**more: Any) -> list[float]:
        settings = {"embedding": "hidden-error", "landmarks": 1000, "weights": "second-order", **more}
        passes = plan("influence-distillation", **settings).passes
        return [p.tflops for p in passes if p.name.endswith("(pool)")]

    (once,) = over_the_pool()
    assert over_the_pool(keep_embeddings=False) == [once, once]
    assert over_the_pool(keep_embeddings=False, weights="first-order") == [once]
    assert over_the_pool(keep_embeddings=False, landmarks="all") == [once]  # for that term alone
    assert over_the_pool(keep_embeddings=False, landmarks="all", hessian_landmarks=POOL.rows) == []


def test_loss_drop_pays_for_every_target() -> None:
    one, four = plan("loss-drop").forward_passes, plan("loss-drop", targets=4).forward_passes
    assert one == pytest.approx(2, rel=0.05)
    assert four == pytest.approx(5, rel=0.05)


@given(st.floats(0.01, 1.0))
def test_a_shortlist_costs_its_share(share: float) -> None:
    whole, part = plan("tracin"), plan("tracin", scored=POOL.times(share))
    on_pool = whole.passes[1].tflops
    assert part.passes[1].tflops == pytest.approx(share * on_pool)
    assert part.passes[0] == whole.passes[0]  # the target is scored against in full
    assert part.scored_rows == round(share * POOL.rows)


def test_time_is_operations_over_the_rate_of_their_kind() -> None:
    assert plan("mid-ppl").seconds == pytest.approx(plan("mid-ppl").tflops * 1e12 / RATE.forward)
    assert plan("tracin").seconds == pytest.approx(plan("tracin").tflops * 1e12 / RATE.gradient)


def test_stored_features_are_counted_in_the_dtype_they_are_stored_in() -> None:
    half = plan("tracin").passes[1].disk_bytes
    single = plan("tracin", feature_dtype="float32").passes[1].disk_bytes
    assert half == POOL.rows * (2 * 32 * 16 * 16 + 16)
    assert single == POOL.rows * (4 * 32 * 16 * 16 + 16)
    assert plan("tracin", keep_features=False).passes[1].disk_bytes < half / 50


def test_devices_are_peaks_times_a_stated_part() -> None:
    rate = assumed_rate("H100", "bfloat16", utilisation=None)
    assert rate.forward == pytest.approx(DEVICES["h100"].half_tflops * ASSUMED_UTILISATION * 1e12)
    assert "35% of a peak of 989 TFLOP/s in bfloat16" in rate.origin
    assert assumed_rate("a100", "float32", utilisation=0.5).gradient == pytest.approx(19.5e12 / 2)
    with pytest.raises(InvalidSettings, match=r"unknown device 'h1000', did you mean 'h100'\?"):
        assumed_rate("h1000", "bfloat16", utilisation=None)


@pytest.mark.parametrize(("dtype", "entry_bytes"), [("float16", 2), ("float32", 4)])
def test_whole_gradients_of_landmarks_are_planned_as_stored(dtype: str, entry_bytes: int) -> None:
    whole = plan("influence-distillation", landmarks=1000, warmup="none", projection="none", feature_dtype=dtype)
    by_name = {p.name: p for p in whole.passes}
    assert by_name["gradients (landmarks)"].disk_bytes == pytest.approx(
        1000 * entry_bytes * SEVEN_B.gradient_numel, rel=1e-6
    )
    assert by_name["gradients (target)"].disk_bytes == pytest.approx(
        TARGET.rows * entry_bytes * SEVEN_B.gradient_numel, rel=1e-6
    )
    passing = {p.name: p for p in plan("tracin", projection="none", memory_gb=1e4).passes}
    assert passing["alignments (pool)"].disk_bytes == POOL.rows * (4 * TARGET.rows + 16)
