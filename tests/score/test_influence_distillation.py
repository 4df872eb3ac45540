"""Oracles: exact `tracin` scores, Adam's form by autograd, and the transfer written out by dense inverses."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from score_task import TARGET, batch_of, file_bytes, loop_gradients_of, make_task, models_alive, save_tiny, unit
from tamis.embeddings import HiddenError, save_embeddings
from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.model.load import LoadedModel, ModelSettings, load_model
from tamis.runs.select import make_method
from tamis.score import features
from tamis.score.distillation import landmark_gradients
from tamis.score.distillation.candidates import (
    beyond_the_budget,
    blocks_beyond_the_model,
    embeddings_within,
    label_of,
)
from tamis.score.distillation.choice import Choice
from tamis.score.distillation.settings import PRESETS, landmark_count
from tamis.score.influence_distillation import InfluenceDistillation
from tamis.score.tracin import TracIn
from tamis.settings import SelectSettings
from tamis.solve.kernels import Kernel
from tamis.solve.leave_one_out import Candidate, spearman

WORDS = (
    *("one", "two", "plus", "four", "rain", "stone", "wind", "sea", "cold"),
    *("roof", "nine", "six", "word", "more", "night"),
)


def random_pool(rows: int = 60) -> list[tuple[str, str]]:
    draw = random.Random(0)
    return [
        (" ".join(draw.choices(WORDS, k=3)), " ".join(draw.choices(WORDS, k=draw.randint(1, 5)))) for _ in range(rows)
    ]


POOL = random_pool()
COLD = {"warmup": "none", "projection": "none", "feature_dtype": "float32"}
WARM = {"warmup_rows": 8, "warmup_update_rows": 4, "warmup_epochs": 2, "lora_rank": 2, "warmup_learning_rate": 5e-3}
WARM_FULL = {name: value for name, value in WARM.items() if name != "lora_rank"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> np.ndarray:
    """Unprojected gradient cosines of every row with every target row."""
    return TracIn(projection="none").score(make_task(tmp_path_factory.mktemp("exact"), llama, pool=POOL)).values


def unseen_correlation(scores, exact: np.ndarray) -> float:
    """Mean rank correlation of the columns, landmarks left aside: theirs are exact."""
    rows = ~scores.extra["is_landmark"]
    found = spearman(torch.from_numpy(scores.values[rows]), torch.from_numpy(exact[rows]))
    return sum(found) / len(found)


@pytest.mark.parametrize(("projection", "dim"), [("none", None), ("factorized", 4), ("hadamard", 64)])
def test_with_every_row_a_landmark_scores_are_those_of_tracin(
    tmp_path: Path, llama: Path, projection: str, dim: int | None
) -> None:
    settings = {**COLD, "landmarks": 100, "projection": projection, "projection_dim": dim}
    task = make_task(tmp_path / "a", llama, pool=POOL, groups=[0, 1, 1])
    scores = InfluenceDistillation(**settings).score(task)
    wanted = TracIn(projection=projection, projection_dim=dim, feature_dtype="float32").score(
        make_task(tmp_path / "b", llama, pool=POOL, groups=[0, 1, 1])
    )
    np.testing.assert_allclose(scores.values, wanted.values, rtol=0, atol=2e-6)  # float32 in two orders of summing
    np.testing.assert_array_equal(scores.group, wanted.group)
    assert scores.extra["is_landmark"].all()
    assert any("all 60 rows to score are landmarks" in note for note in task.notes)
    assert any("all scores are exact" in note for note in task.notes)


@pytest.mark.parametrize(
    ("wanted", "rows", "count"),
    [
        ("auto", 100, 100),
        ("auto", 768, 768),
        ("auto", 769, 256),
        ("auto", 1000, 256),
        ("auto", 12_052, 1205),
        ("auto", 10**6, 4096),
        ("all", 70, 70),
        (9, 5, 9),
    ],
)
def test_landmarks_are_a_tenth_of_the_rows_within_bounds_unless_a_number_says_how_many(
    wanted: int | str, rows: int, count: int
) -> None:
    assert landmark_count(wanted, rows) == count


def test_landmarks_keep_exact_scores_and_others_are_carried(tmp_path: Path, llama: Path, exact: np.ndarray) -> None:
    task = make_task(tmp_path, llama, pool=POOL)
    scores = InfluenceDistillation(**COLD, landmarks=20, embedding="gradient", side=8).score(task)
    landmarks = scores.extra["is_landmark"]
    assert landmarks.sum() == 20
    np.testing.assert_allclose(scores.values[landmarks], exact[landmarks], rtol=0, atol=2e-6)
    assert unseen_correlation(scores, exact) > 0.85


def test_residual_form_of_the_gradient_itself_is_exact(tmp_path: Path, llama: Path, exact: np.ndarray) -> None:
    # A sketch as wide as the layers is a rotation: its cosines are the scores, and nothing is left to be carried.
    settings = {**COLD, "landmarks": 12, "embedding": "gradient", "side": 64, "kernel": "linear", "residual": True}
    scores = InfluenceDistillation(**settings).score(make_task(tmp_path, llama, pool=POOL))
    np.testing.assert_allclose(scores.values, exact, rtol=0, atol=5e-5)


@pytest.mark.parametrize("residual", [True, False])
def test_scores_equal_the_transfer_written_out(tmp_path: Path, llama: Path, residual: bool) -> None:
    task = make_task(tmp_path, llama, pool=POOL)
    settings = {**COLD, "landmarks": 15, "embedding": "hidden-error", "kernel": "rbf", "scale": 2.0, "damping": 0.1}
    scores = InfluenceDistillation(**settings, residual=residual).score(task)
    embed = HiddenError().start(task.loaded.model)
    pool, target = (
        embed(batch_of(corpus, range(len(corpus))))["embedding"].double() for corpus in (task.pool, task.target)
    )
    marks = torch.from_numpy(scores.extra["is_landmark"])
    mean = pool[marks].mean(0)
    pool, target = unit(pool - mean), unit(target - mean)
    squares = torch.cdist(pool, pool[marks]) ** 2
    among = squares[marks]
    median = among[torch.triu_indices(15, 15, 1).unbind()].median()  # 105 pairs: an odd number
    kernel, kernel_among = (-squares / (2 * median)).exp(), (-among / (2 * median)).exp()
    _, grads, wanted_grads = loop_gradients_of(task, task.loaded.model, task.layers())
    known = unit(grads)[marks] @ unit(wanted_grads).T
    fitted = torch.zeros(len(pool), known.shape[1], dtype=torch.float64)
    if residual:
        direct = pool @ target.T
        for j in range(known.shape[1]):
            slope, intercept = np.polyfit(direct[marks, j].numpy(), known[:, j].numpy(), 1)
            fitted[:, j] = intercept + slope * direct[:, j]
    fitted += kernel @ torch.linalg.inv(kernel_among + 0.1 * torch.eye(15)) @ (known - fitted[marks])
    fitted[marks] = known
    # Embeddings are float32, so are kernels of small differences of unit rows.
    np.testing.assert_allclose(scores.values, fitted.numpy(), rtol=0, atol=2e-4)


def test_adam_s_form_scales_landmarks_and_leaves_the_target_raw(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    scores = InfluenceDistillation(**{**COLD, "warmup": "lora"}, **WARM, form="adam").score(task)
    *_, folder = sorted(task.store.glob("influence-distillation-warm-up-*/step-*"))
    at = task.at_model(dataclasses.replace(task.model_settings, name=str(folder)))
    _, pool, target = loop_gradients_of(at, at.loaded.model, at.layers())
    saved = load_file(folder / "optimizer.safetensors")
    step = json.loads((folder / "training.json").read_text())["step"]
    v = torch.cat([saved[f"exp_avg_sq/{layer.name}.weight"].flatten() for layer in at.layers()]).double()
    scale = 0.1 / ((1 - 0.9**step) * ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    wanted = unit(pool * scale) @ unit(target).T
    assert step == 4
    np.testing.assert_allclose(scores.values, wanted.numpy(), rtol=0, atol=2e-4)  # Adam divides by small numbers
    raw = unit(pool) @ unit(target).T
    assert np.abs(raw.numpy() - wanted.numpy()).max() > 0.02  # so that the two can be told apart


@pytest.mark.parametrize("embedding", ["auto", "tfidf", "error-outer", "jvp", "lens-gradient", "tail-gradient", "rds"])
def test_every_embedding_carries_scores_and_says_how_well(tmp_path: Path, llama: Path, embedding: str) -> None:
    task = make_task(tmp_path, llama, pool=POOL)
    settings = InfluenceDistillation(warmup="none", landmarks=20, embedding=embedding)
    values = settings.score(task).values
    assert np.isfinite(values).all()
    notes = " ".join(task.notes + task.warnings)
    assert "Expected on rows that are no landmarks" in notes
    assert "Verdict: " in notes
    again = make_task(tmp_path / "again", llama, pool=POOL)
    np.testing.assert_array_equal(settings.score(again).values, values)
    assert again.notes == task.notes and again.warnings == task.warnings


def test_auto_takes_what_rebuilds_left_out_landmarks_best_within_its_budget(
    tmp_path: Path, llama: Path, exact: np.ndarray
) -> None:
    found = {}
    for budget in (0.0, 2.0):
        task = make_task(tmp_path / str(budget), llama, pool=POOL)
        scores = InfluenceDistillation(**COLD, landmarks=20, embedding_budget=budget).score(task)
        (choice,) = (json.loads(path.read_text()) for path in task.store.glob("embedding-choice-*/choice.json"))
        recoveries = [tried["recovery"] for tried in choice["tried"]]
        named = next(t["label"] for t in choice["tried"] if t["recovery"] == max(recoveries))
        assert named == label_of(Choice.from_plain(choice).embedding)
        found[budget] = (choice, unseen_correlation(scores, exact))
    cheap, dear = found[0.0][0], found[2.0][0]
    assert [tried["label"] for tried in cheap["tried"]] == ["tfidf", "error-outer of no block"]
    assert {"gradient", "jvp of 1 block", "hidden-error"} <= {tried["label"] for tried in dear["tried"]}
    assert dear["recovery"] > cheap["recovery"]
    assert found[2.0][1] > found[0.0][1]


def test_leave_one_out_foretells_the_order_of_unseen_rows(tmp_path: Path, llama: Path, exact: np.ndarray) -> None:
    foretold, kept = [], []
    for seed in range(4):
        task = make_task(tmp_path / str(seed), llama, pool=POOL, seed=seed)
        scores = InfluenceDistillation(**COLD, landmarks=30, embedding="hidden-error").score(task)
        (choice,) = (json.loads(path.read_text()) for path in task.store.glob("embedding-choice-*/choice.json"))
        foretold += choice["spearman"]
        kept.append(unseen_correlation(scores, exact))
    # Each is a correlation of 30 rows, with a standard error of about 0.1; these are means of four.
    assert np.mean(foretold) == pytest.approx(np.mean(kept), abs=0.15)


def test_the_verdict_is_by_the_columns_that_select_and_names_the_worst_target(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama, pool=POOL, groups=[0, 1, 1])
    InfluenceDistillation(**COLD, landmarks=30, embedding="tfidf", residual=False).score(task)
    (choice,) = (json.loads(path.read_text()) for path in task.store.glob("embedding-choice-*/choice.json"))
    kernel = Candidate(**{**choice["candidate"], "kernel": Kernel(**choice["candidate"]["kernel"])})
    alone = []
    for row in range(3):  # each target row as a target of its own
        single = make_task(tmp_path / str(row), llama, pool=POOL, target=[TARGET[row]])
        settings = {"kernel": kernel.kernel.name, "scale": kernel.kernel.scale, "damping": kernel.damping}
        settings |= {"centred": kernel.centred, "landmarks": 30, "embedding": "tfidf", "residual": False}
        InfluenceDistillation(**COLD, **settings).score(single)
        (found,) = (json.loads(path.read_text()) for path in single.store.glob("embedding-choice-*/choice.json"))
        alone += found["spearman"]
    assert choice["spearman"] == pytest.approx([alone[0], (alone[1] + alone[2]) / 2], abs=1e-6)
    worst = task.target_names[int(np.argmin(choice["spearman"]))]
    assert any(f"Verdict: by the worst target, {worst} (" in said for said in (*task.notes, *task.warnings))


def test_whitening_is_not_tried_on_landmarks_too_few_to_judge_it(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama, pool=POOL)
    InfluenceDistillation(**COLD, landmarks=40, embedding="hidden-error", half_whitening=True).score(task)
    assert any("Half-whitened kernels of hidden-error were not tried" in note for note in task.notes)
    (choice,) = (json.loads(path.read_text()) for path in task.store.glob("embedding-choice-*/choice.json"))
    assert not choice["candidate"]["half_whitened"]


def test_the_mean_target_is_one_column_each(tmp_path: Path, llama: Path, exact: np.ndarray) -> None:
    task = make_task(tmp_path, llama, pool=POOL, groups=[0, 1, 1], aggregate="mean")
    scores = InfluenceDistillation(**COLD, landmarks=20).score(task)
    marks = scores.extra["is_landmark"]
    wanted = np.stack([exact[:, 0], exact[:, 1:].mean(axis=1)], axis=1)
    assert scores.values.shape == (60, 2)
    np.testing.assert_allclose(scores.values[marks], wanted[marks], rtol=0, atol=2e-6)


def test_rows_scored_as_they_pass_get_the_scores_of_stored_embeddings(tmp_path: Path, llama: Path) -> None:
    settings = InfluenceDistillation(warmup="none", landmarks=20, embedding="hidden-error")
    kept = settings.score(make_task(tmp_path / "a", llama, pool=POOL)).values
    task = make_task(tmp_path / "b", llama, pool=POOL)
    passed = dataclasses.replace(settings, keep_embeddings=False).score(task).values
    np.testing.assert_allclose(passed, kept, rtol=0, atol=1e-4)
    stored = list(task.store.glob("embedding-hidden-error-pool-*/manifest.json"))
    assert len(stored) == 1  # the landmarks' own


def test_embeddings_from_elsewhere_are_used_by_id(tmp_path: Path, llama: Path, exact: np.ndarray) -> None:
    task = make_task(tmp_path, llama, pool=POOL)
    _, pool, target = loop_gradients_of(task, task.loaded.model, task.layers())
    ids = [*task.target.examples.ids, *task.pool.examples.ids]
    save_embeddings(tmp_path / "vectors", ids, torch.cat([unit(target), unit(pool)]).numpy())
    settings = {**COLD, "landmarks": 20, "given": str(tmp_path / "vectors")}
    chosen = InfluenceDistillation(**settings, kernel="linear").score(task)
    assert any("by the embedding given" in note for note in task.notes)  # they are the gradients: none is better
    np.testing.assert_allclose(chosen.values, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("embedding", ["auto", "given"])
def test_rows_that_given_embeddings_lack_are_named_before_the_warm_up(
    tmp_path: Path, llama: Path, embedding: str
) -> None:
    task = make_task(tmp_path, llama, pool=POOL)
    pool, target = task.pool.examples.ids, task.target.examples.ids
    settings = InfluenceDistillation(landmarks=20, embedding=embedding, given=str(tmp_path / "few"), **WARM)
    for ids, said in (
        ([*pool[:10], *target], "has no embedding for 50 of 60 pool rows .first: 'pool-10', 'pool-11'"),
        ([*pool, target[0]], "has no embedding for 2 of 3 target rows .*; --set residual=false scores without those"),
    ):
        shutil.rmtree(tmp_path / "few", ignore_errors=True)
        save_embeddings(tmp_path / "few", ids, np.random.default_rng(0).normal(size=(len(ids), 4)))
        with pytest.raises(InvalidInput, match=said):
            settings.score(task)
        assert not list(task.store.glob("*warm-up*"))
    dataclasses.replace(settings, residual=False).score(task)


@pytest.mark.parametrize("rule", ["k-means++", "leverage"])
def test_landmarks_by_their_embeddings_are_kept_for_the_next_call(
    tmp_path: Path, llama: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = InfluenceDistillation(warmup="none", landmarks=10, landmark_rule=rule, embedding="hidden-mean")
    first = settings.score(make_task(tmp_path, llama, pool=POOL))
    assert first.extra["is_landmark"].sum() == 10
    monkeypatch.setattr("tamis.collect.load_model", lambda settings: pytest.fail("the model was loaded again"))
    second = settings.score(make_task(tmp_path, llama, pool=POOL))
    np.testing.assert_array_equal(second.values, first.values)


def test_a_resumed_run_says_what_the_first_one_said(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: object) -> None:
        raise Unsupported("its head is not known")

    settings = InfluenceDistillation(warmup="none", landmarks=20)
    first, second = make_task(tmp_path, llama, pool=POOL), make_task(tmp_path, llama, pool=POOL)
    with monkeypatch.context() as patched:
        patched.setattr("tamis.score.distillation.candidates.head_of", refuse)
        settings.score(first)
    assert any("was not tried: its head is not known" in note for note in first.notes)
    settings.score(second)
    assert second.notes == first.notes and second.warnings == first.warnings
    assert set(second.stages) == set(first.stages)  # what the choice looked at is part of both runs' cost
    assert sum("embedding" in stage.name for stage in set(second.stages)) > 2


def wrapped_forward(model: nn.Module) -> None:
    add_hook_to_module(model.model, ModelHook())  # as accelerate does for --device-map


def lora_on(block: int) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[block])
        inject_adapter_in_model(config, model)
        for name, param in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param, generator=torch.Generator().manual_seed(0))

    return change


class OwnKernel(torch.autograd.Function):
    """Attention of a fused kernel's kind: it can be differentiated once, and not in forward mode."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        ctx.save_for_backward(query, key, value, mask)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, mask = ctx.saved_tensors
        with torch.enable_grad():
            parts = [part.detach().requires_grad_() for part in (query, key, value)]
            out = scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
        return (*torch.autograd.grad(out, parts, grad), None)


def own_kernel(module, query, key, value, attention_mask, **others):
    return OwnKernel.apply(query, key, value, attention_mask).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize(
    ("change", "left_out", "reason"),
    [
        (wrapped_forward, ("error-outer of no block", "error of 1 block", "jvp of 1 block"), "is wrapped"),
        (lora_on(1), ("jvp of 1 block", "lens-gradient of 1 block"), r"none of the 4 layers .* in the first 1 blocks"),
        (lora_on(0), ("tail-gradient",), "none of the 4 layers .* in the last 1 blocks"),
    ],
)
def test_auto_leaves_out_what_the_model_does_not_allow_and_says_why(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, change, left_out: tuple[str, ...], reason: str
) -> None:
    def changed(settings: ModelSettings) -> LoadedModel:
        loaded = load_model(settings)
        change(loaded.model)
        return loaded

    monkeypatch.setattr("tamis.collect.load_model", changed)
    task = make_task(tmp_path, llama, pool=POOL)
    settings = InfluenceDistillation(
        warmup="none", landmarks=20, embedding_budget=2.0, depth=1, tail_blocks=1, projection="none"
    )
    assert np.isfinite(settings.score(task).values).all()
    for label in left_out:
        (note,) = [said for said in task.notes if said.startswith(f"Embedding {label} was not tried")]
        assert re.search(reason, note), note
    assert any("by the embedding" in said for said in task.notes)
    with pytest.raises(Unsupported):  # a named one is what the user wants, so it is no small thing that it is missing
        name = left_out[-1].split()[0]
        shape = {"tail_blocks": 1} if name == "tail-gradient" else {"depth": 1}
        named = InfluenceDistillation(warmup="none", landmarks=20, embedding=name, projection="none", **shape)
        named.score(make_task(tmp_path / "named", llama, pool=POOL))


@pytest.mark.parametrize("error", [None, RuntimeError("no forward mode here")])
def test_auto_leaves_out_jvp_where_attention_cannot_run_in_forward_mode(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def refusing(module, query, *others, **more):
        if error is not None and forward_ad.unpack_dual(query).tangent is not None:
            raise error
        return own_kernel(module, query, *others, **more)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", refusing)
    task = make_task(tmp_path, llama, pool=POOL)
    InfluenceDistillation(**COLD, landmarks=20, embedding_budget=2.0, depth=1).score(task)
    (note,) = [said for said in task.notes if said.startswith("Embedding jvp of 1 block was not tried")]
    assert "cannot be run in forward mode" in note and (error is None or str(error) in note)


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        (
            {"depth": 12},
            ["jvp of 12 blocks was not tried: depth=12 costs 1.2 forward passes a row, above embedding_budget=1"],
        ),
        (
            {"depth": 0},
            [f"{name} was not tried: it runs through at least" for name in ("error", "jvp", "lens-gradient")],
        ),
        (
            {"directions": 20, "combine": "concat"},
            ["jvp of 1 block was not tried: directions=20 with combine=concat costs 2 "],
        ),
        (
            {"embedding_budget": 1.05},
            ["tail-gradient was not tried: tail_blocks=2 costs 1.07 forward passes a row, above embedding_budget=1.05"],
        ),
        ({"embedding_budget": 0.0}, []),
        ({"embedding_budget": 2.0, "depth": 12}, []),
        ({"depth": 12, "embedding": "jvp"}, []),
    ],
)
def test_a_setting_that_prices_an_embedding_out_of_auto_is_named(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, left_out: list[str]
) -> None:
    monkeypatch.setattr("tamis.score.distillation.candidates._blocks_of", lambda task: 30)
    asked = InfluenceDistillation(**settings).embedding_settings()
    found = beyond_the_budget(asked, make_task(tmp_path, llama))
    assert len(found) == len(left_out)
    for sentence, wanted in zip(found, left_out, strict=True):
        assert sentence.startswith(f"Embedding {wanted}")


def test_blocks_beyond_the_model_are_said_to_be_capped_where_auto_uses_them(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    for budget, said in ((2.0, True), (1.0, False)):
        asked = InfluenceDistillation(tail_blocks=5, embedding_budget=budget).embedding_settings()
        found = blocks_beyond_the_model(asked, task)
        assert any("tail_blocks=5 was asked for, but the model has 2 blocks" in line for line in found) == said


def test_only_the_rows_to_score_become_landmarks(tmp_path: Path, llama: Path) -> None:
    rows = range(5, 45)
    scores = InfluenceDistillation(warmup="none", landmarks=12).score(make_task(tmp_path, llama, pool=POOL, rows=rows))
    np.testing.assert_array_equal(scores.rows, np.arange(5, 45))
    assert scores.extra["is_landmark"].sum() == 12


@pytest.mark.parametrize(("warmup", "training"), [("lora", WARM), ("full", WARM_FULL)])
def test_the_warmup_changes_scores_and_leaves_the_model_alone(
    tmp_path: Path, llama: Path, warmup: str, training: dict
) -> None:
    settings = InfluenceDistillation(landmarks=20, embedding="hidden-mean", warmup=warmup, **training)
    task = make_task(tmp_path, llama, pool=POOL)
    before = {name: p.clone() for name, p in task.loaded.model.named_parameters()}
    values = settings.score(task).values
    assert all(torch.equal(before[name], p) for name, p in task.loaded.model.named_parameters())
    unwarmed = InfluenceDistillation(landmarks=20, embedding="hidden-mean", warmup="none")
    cold = unwarmed.score(make_task(tmp_path / "cold", llama, pool=POOL))
    assert np.abs(values - cold.values).max() > 0.05
    (cost,) = [c for c in task.costs() if c.name == "influence-distillation-warm-up"]
    assert cost.rows == 2 * len(settings.rows_for_warmup(task)) == 16
    resumed = make_task(tmp_path, llama, pool=POOL)
    folder = next(task.store.glob("influence-distillation-warm-up-*"))
    written = file_bytes(folder)
    np.testing.assert_array_equal(settings.score(resumed).values, values)
    assert file_bytes(folder) == written


def test_a_tokenizer_half_written_beside_a_full_warmup_is_written_again(tmp_path: Path, llama: Path) -> None:
    settings = InfluenceDistillation(landmarks=20, embedding="hidden-mean", warmup="full", **WARM_FULL)
    values = settings.score(make_task(tmp_path, llama, pool=POOL)).values
    for folder in tmp_path.glob("store/influence-distillation-warm-up-*/step-*"):
        (folder / "tokenizer_config.json").unlink()
        (folder / "tokenizer.partial").mkdir()
        (folder / "tokenizer.partial" / "tokenizer.json").write_text("{")
    np.testing.assert_array_equal(settings.score(make_task(tmp_path, llama, pool=POOL)).values, values)


def test_a_full_warmup_of_an_adapter_is_refused(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama, pool=POOL)
    InfluenceDistillation(landmarks=20, embedding="hidden-mean", **WARM).score(task)
    *_, adapter = sorted(task.store.glob("influence-distillation-warm-up-*/step-*"))
    with pytest.raises(InvalidSettings, match="is an adapter; give the whole model"):
        InfluenceDistillation(warmup="full").score(make_task(tmp_path / "b", adapter, pool=POOL))


def test_given_moments_replace_the_warmup(tmp_path: Path, llama: Path) -> None:
    settings = InfluenceDistillation(**{**COLD, "warmup": "lora"}, **WARM, form="adam")
    task = make_task(tmp_path, llama)
    warmed = settings.score(task).values
    *_, last = sorted(task.store.glob("influence-distillation-warm-up-*/step-*"))
    alone = make_task(tmp_path / "alone", last)
    given = InfluenceDistillation(**{**COLD, "warmup": "lora"}, form="adam", moments=str(last))
    np.testing.assert_allclose(given.score(alone).values, warmed, rtol=0, atol=1e-6)
    assert not list(alone.store.glob("influence-distillation-warm-up-*"))
    assert not alone.warnings
    elsewhere = make_task(tmp_path / "elsewhere", shutil.copytree(last, tmp_path / "copy"))
    given.score(elsewhere)
    assert any(f"moments are those of {last}, but gradients are taken at" in said for said in elsewhere.warnings)


def test_one_checkpoint_s_model_exists_at_a_time(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, llama, pool=POOL)
    alive = models_alive(monkeypatch)
    InfluenceDistillation(landmarks=20, **WARM).score(task)
    assert alive[:1] == [0] and len(alive) <= 3
    assert max(alive) <= 1


PAPER = PRESETS["paper"]
DEFAULTS = {field.name: field.default for field in dataclasses.fields(InfluenceDistillation)}


def test_the_paper_s_preset_is_what_sections_4_and_5_publish() -> None:
    published = dataclasses.asdict(InfluenceDistillation(preset="paper"))
    assert published == {
        **DEFAULTS,
        "preset": "paper",
        "landmarks": 4096,
        "landmark_rule": "uniform",
        "embedding": "jvp",
        "depth": 4,
        "directions": 2,
        "positions": "last",
        "combine": "mean",
        "kernel": "rbf",
        "scale": 2.0,
        "damping": 0.01,
        "centred": False,
        "residual": False,
        "form": "adam",
        "projection": "hadamard",
        "projection_dim": 131_072,
        "weights": "none",
        "warmup": "full",
        "warmup_rows": 10_000,
        "warmup_epochs": 2,
        "warmup_update_rows": 128,
        "warmup_learning_rate": 2e-5,
    }


@pytest.mark.parametrize("name", list(PAPER))
def test_a_setting_beside_a_preset_wins_even_where_it_is_the_default(name: str) -> None:
    wanted = {**DEFAULTS, **PAPER, "preset": "paper", name: DEFAULTS[name]}
    made = InfluenceDistillation(preset="paper", **{name: DEFAULTS[name]})
    assert dataclasses.asdict(made) == wanted
    # As a run's YAML, a plan and a resumed run give it: all settings at once.
    assert InfluenceDistillation(**wanted) == made == pickle.loads(pickle.dumps(made))
    asked = {"preset": "paper", name: DEFAULTS[name]}
    settings = SelectSettings(model="m", pool=("p",), target=("t",), method="influence-distillation", set=asked)
    assert make_method(settings) == made
    again = dataclasses.replace(made, keep_embeddings=False)
    assert again == InfluenceDistillation(**{**wanted, "keep_embeddings": False})


def test_the_paper_s_preset_runs(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama, pool=POOL)
    few = InfluenceDistillation(preset="paper", landmarks=20, warmup_rows=12, warmup_update_rows=4)
    assert few.landmarks == 20 and few.damping == 0.01
    scores = few.score(task)
    assert np.isfinite(scores.values).all()
    assert any("jvp of 2 blocks" in note and "not centred" in note for note in task.notes)
    assert "depth=4 was asked for, but the model has 2 blocks; all are used" in task.notes


@pytest.mark.parametrize("embedding", ["jvp", "lens-gradient"])
def test_an_embedding_of_no_block_is_refused_where_it_needs_one(embedding: str) -> None:
    settings = InfluenceDistillation(embedding=embedding, depth=0).embedding_settings()
    with pytest.raises(InvalidSettings, match=f"depth=0: embedding='{embedding}' runs through at least one block"):
        embeddings_within(settings, blocks=8, seed=0)


def test_landmarks_without_gradient_are_left_out_and_marked(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = features.per_sample_features

    def silent(model, batch, layers, projector):
        losses, found, norms = original(model, batch, layers, projector)
        for row in (3, 7):
            found[batch.rows == row] = 0
        return losses, found, norms

    monkeypatch.setattr(features, "per_sample_features", silent)
    target = [*[("one plus five?", "six")] * 3, ("sing", "la la la")]  # row 3 of the target has no gradient either
    task = make_task(tmp_path, llama, pool=POOL[:20], target=target)
    scores = InfluenceDistillation(warmup="none", landmarks=19).score(task)
    silenced = np.flatnonzero(scores.extra["zero_gradient"])
    assert set(silenced) <= {3, 7} and len(silenced) >= 1
    assert (scores.values[silenced] == 0).all()
    assert scores.values.shape == (20, 3)
    assert [sum("exactly zero" in said for said in kind) for kind in (task.notes, task.warnings)] == [1, 1]


def test_weights_are_asked_of_the_choice(tmp_path: Path, llama: Path) -> None:
    for weights, wanted in (("none", "equal"), ("first-order", "first-order")):
        settings = InfluenceDistillation(warmup="none", landmarks=20, embedding="tfidf", weights=weights)
        assert settings.score(make_task(tmp_path / weights, llama, pool=POOL)).weights == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "thesis"}, "preset='thesis' is unknown; there is paper"),
        ({"landmarks": 1}, "landmarks must be at least 2, got 1"),
        ({"landmark_rule": "best"}, "landmark_rule='best': expected one of uniform, k-means"),
        ({"landmark_rule": "leverage"}, "name an embedding, or take uniform landmarks"),
        ({"embedding": "bert"}, "embedding='bert': expected one of auto, error-outer"),
        ({"embedding": "given"}, "embedding=given needs given"),
        ({"embedding": "rds", "given": "x"}, "embedding='rds' does not use"),
        ({"embedding_budget": -1.0}, "embedding_budget must be at least 0"),
        ({"depth": -1}, "depth must be at least 0"),
        ({"directions": 0}, "directions must be at least 1"),
        ({"positions": "first"}, "positions='first': expected one of mean, last"),
        ({"kernel": "sinc"}, "kernel='sinc': expected rbf or laplace or linear or auto"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"residual": "yes"}, "residual='yes': expected auto or true or false"),
        ({"form": "sgd"}, "form='sgd': expected one of raw, adam"),
        ({"form": "adam", "warmup": "none"}, "form=adam needs Adam's moments"),
        ({"moments": "run"}, "moments are read for form=adam only"),
        ({"warmup": "short"}, "warmup='short': expected one of lora, full, none"),
        ({"warmup_pool_share": 0.0}, "warmup_pool_share must be above 0"),
        ({"warmup_epochs": 0}, "^warmup_epochs must be at least 1"),
        ({"projection": "pca"}, "projection 'pca' is unknown"),
        ({"weights": "third-order"}, "weights='third-order': expected one of none, first-order, second-order"),
        ({"momentum": "half"}, "momentum='half': expected one of paper, whole, none"),
        ({"landmarks": "some"}, "landmarks='some': expected auto or all or a whole number"),
        ({"hessian_landmarks": 1}, "hessian_landmarks must be at least 2"),
        ({"eta": 0.0}, "eta must be positive"),
        ({"eta": float("inf"), "hessian_ratio": True}, "eta=inf: expected a finite number"),
        ({"eta": 0.1}, "eta is read by the second-order term only"),
        ({"weights": "second-order", "warmup": "none"}, "with warmup=none, there is none: set eta to the learning"),
        ({"hessian_ratio": True, "warmup": "none"}, "with warmup=none, there is none: set eta to the learning"),
        ({"hessian_ratio": True, "form": "adam", "moments": "x"}, "with moments, there is no warm-up: set eta"),
        ({"momentum": "none"}, "momentum='none' would change nothing: it is read with form=adam and weights=second"),
        ({"momentum": "none", "weights": "second-order"}, "momentum='none' would change nothing"),
        ({"hessian_landmarks": 9}, "hessian_landmarks=9 would change nothing: it is read by the second-order term"),
        ({"memory_gb": 9.0}, "memory_gb=9.0 would change nothing"),
        ({"directions": 2, "embedding": "rds"}, "directions=2 would change nothing: it is read by embedding jvp only"),
        ({"positions": "last", "embedding": "tfidf"}, "positions='last' would change nothing"),
        ({"combine": "concat", "embedding": "error"}, "combine='concat' would change nothing"),
        ({"depth": 2, "embedding": "gradient"}, "depth=2 would change nothing: it is read by embedding error-outer or"),
        ({"side": 9, "embedding": "jvp"}, "side=9 would change nothing: it is read by embedding error-outer or"),
        ({"tail_blocks": 3, "embedding": "jvp"}, "tail_blocks=3 would change nothing"),
        ({"embedding_budget": 2.0, "embedding": "jvp"}, "embedding_budget=2.0 would change nothing"),
        ({"scale": 2.0, "kernel": "linear"}, "scale=2.0 would change nothing: it is of no use with kernel=linear"),
        ({"half_whitening": True, "kernel": "linear"}, "half_whitening=True would change nothing"),
        ({"lora_rank": 9, "warmup": "full"}, "lora_rank=9 would change nothing: it is of no use with warmup=full"),
        ({"lora_alpha": 9.0, "warmup": "full"}, "lora_alpha=9.0 would change nothing"),
        ({"preset": "paper", "embedding": "rds", "directions": 3}, "directions=3 would change nothing"),
        ({"damping": "much"}, "damping='much': expected a number, got str"),
        ({"memory_gb": float("inf")}, "memory_gb=inf: expected a finite number"),
        ({"feature_dtype": "int8"}, "feature_dtype='int8'"),
        ({"warmup": "none", "warmup_rows": 10}, "warmup_rows=10 would change nothing.*there is no warm-up"),
        ({"warmup": "none", "lora_rank": 4}, "lora_rank=4 would change nothing.*there is no warm-up"),
        ({"moments": "m", "form": "adam", "warmup_epochs": 3}, "warmup_epochs=3 would change nothing.*with moments"),
        ({"moments": "m", "form": "adam", "warmup": "full"}, "warmup='full' would change nothing.*take its place"),
        ({"warmup_rows": 10, "warmup_pool_share": 0.5}, "warmup_pool_share=0.5 would change nothing.*warmup_rows"),
        ({"landmarks": "all", "damping": 0.1}, "damping=0.1 would change nothing.*landmarks=all"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        InfluenceDistillation(**settings)


def test_whole_gradients_are_stored_in_shards_by_their_size_and_scored_the_same(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = InfluenceDistillation(**COLD, landmarks=20, embedding="tfidf")
    wanted = settings.score(make_task(tmp_path / "a", llama, pool=POOL)).values
    task = make_task(tmp_path / "b", llama, pool=POOL)
    width = sum(layer.numel for layer in task.layers())
    monkeypatch.setattr(landmark_gradients, "_SHARD_NUMBERS", 2 * width + 1)
    found = settings.score(task).values
    shards = list(task.store.glob("gradients-pool-*/shard-*.safetensors"))
    assert len(shards) == 10
    assert all(len(load_file(shard)["feature"]) == 2 for shard in shards)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)  # other batches round otherwise


@pytest.mark.parametrize("warmup", ["none", "full"])
def test_whole_gradients_too_large_to_compare_are_refused_before_any_is_taken(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, warmup: str
) -> None:
    task = make_task(tmp_path, llama, pool=POOL)
    width = sum(layer.numel for layer in task.layers())
    settings = InfluenceDistillation(warmup=warmup, landmarks=20, embedding="tfidf", projection="none")
    said = rf"projection=none would store {width:,} numbers for each of 20 landmarks and 3 target rows, .* GB.*hadamard"
    monkeypatch.setattr(landmark_gradients, "_MOST_NUMBERS", 23 * width - 1)
    with pytest.raises(InvalidSettings, match=said):
        settings.score(task)
    assert not list(task.store.glob("gradients-*")) and not list(task.store.glob("*warm-up*"))
    dataclasses.replace(settings, warmup="none", projection="factorized").score(task)
    monkeypatch.setattr(landmark_gradients, "_MOST_NUMBERS", 23 * width)
    dataclasses.replace(settings, warmup="none").score(task)


def test_one_row_cannot_be_carried_to(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(
        InvalidInput, match=r"at least two rows to score, got 1: .* a --shortlist of more rows, or score"
    ):
        InfluenceDistillation(warmup="none").score(make_task(tmp_path, llama, rows=[2]))
