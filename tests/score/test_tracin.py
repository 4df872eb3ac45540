"""Oracle: one example at a time with plain autograd, then the formula. Properties: batches, memory, copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from score_task import POOL, TARGET, loop_gradients_of, make_task, models_alive, save_tiny, unit
from tamis.collect import Collecting
from tamis.errors import InvalidInput, InvalidSettings, NonFinite
from tamis.gradients.per_sample import run_batch
from tamis.projection import make_projector, project_gradients
from tamis.score.tracin import TracIn
from tamis.training.lora import add_lora

FLOAT32 = {"rtol": 2e-4, "atol": 2e-6}  # two float32 passes with sums in different orders
HALF = {"rtol": 0, "atol": 1e-3}  # cosines of features whose entries carry 2^-11 of the row's largest each


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


def expected(task, *, cosine: bool, layers=None) -> Tensor:
    model = task.loaded.model
    _, pool, target = loop_gradients_of(task, model, layers or task.layers())
    return unit(pool) @ unit(target).T if cosine else pool @ target.T


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("normalize", ["cosine", "dot"])
def test_exact_scores_equal_the_slow_loop(tmp_path: Path, family: str, normalize: str) -> None:
    task = make_task(tmp_path, save_tiny(tmp_path / "model", family))
    scores = TracIn(normalize=normalize, projection="none").score(task)
    wanted = expected(task, cosine=normalize == "cosine")
    np.testing.assert_allclose(scores.values, wanted.numpy(), **FLOAT32)
    np.testing.assert_array_equal(scores.rows, task.rows)
    np.testing.assert_array_equal(scores.group, task.target_group)


def test_exact_scores_of_an_adapter_equal_the_slow_loop(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    task = make_task(tmp_path, base)
    adapted = add_lora(task.at_model(task.model_settings).loaded.model, rank=2, alpha=4, seed=1, base=str(base))
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if "lora_B" in name:
                param.add_(torch.randn_like(param) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    task = make_task(tmp_path, tmp_path / "adapter")
    scores = TracIn(projection="none").score(task)
    assert all("lora_" in layer.name for layer in task.layers())
    np.testing.assert_allclose(scores.values, expected(task, cosine=True).numpy(), **FLOAT32)


def test_exact_scores_do_not_depend_on_the_memory_bound(tmp_path: Path, llama: Path) -> None:
    whole = TracIn(projection="none").score(make_task(tmp_path / "a", llama)).values
    one_at_a_time = make_task(tmp_path / "b", llama)
    values = TracIn(projection="none", memory_gb=1e-9).score(one_at_a_time).values
    np.testing.assert_allclose(values, whole, **FLOAT32)
    stages = [path.name for path in one_at_a_time.stages]
    assert sum(name.startswith("exact-alignments") for name in stages) == len(TARGET)


@pytest.mark.parametrize("normalize", ["cosine", "dot"])
def test_the_exact_mean_target_is_the_mean_of_the_single_columns(tmp_path: Path, llama: Path, normalize: str) -> None:
    task = make_task(tmp_path, llama, groups=[0, 1, 0], aggregate="mean")
    scores = TracIn(normalize=normalize, projection="none").score(task)
    single = expected(task, cosine=normalize == "cosine").numpy()
    wanted = np.stack([single[:, [0, 2]].mean(axis=1), single[:, 1]], axis=1)
    np.testing.assert_allclose(scores.values, wanted, **FLOAT32)
    assert scores.group.tolist() == [0, 1]


@pytest.mark.parametrize(("projection", "dim"), [("factorized", 3), ("rademacher", 64), ("hadamard", 64), ("mask", 64)])
def test_projected_scores_equal_the_slow_loop_through_the_same_projection(
    tmp_path: Path, llama: Path, projection: str, dim: int
) -> None:
    task = make_task(tmp_path, llama, seed=5)
    settings = TracIn(projection=projection, projection_dim=dim, normalize="dot", feature_dtype="float32")
    scores = settings.score(task)
    layers = task.layers()
    _, pool, target = loop_gradients_of(task, task.loaded.model, layers)
    projector = make_projector(projection, dim=dim, seed=5)
    features = [project_gradients(projector, grads, layers) for grads in (pool, target)]
    np.testing.assert_allclose(scores.values, (features[0] @ features[1].T).numpy(), rtol=1e-3, atol=1e-5)


def test_half_precision_features_give_the_scores_of_whole_ones(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    half = TracIn(feature_dtype="float16").score(task).values
    np.testing.assert_allclose(half, TracIn(feature_dtype="float32").score(task).values, **HALF)


@pytest.mark.parametrize("normalize", ["cosine", "dot"])
@pytest.mark.parametrize("memory_gb", [2.0, 1e-9])
def test_streamed_scores_equal_those_of_stored_features(
    tmp_path: Path, llama: Path, normalize: str, memory_gb: float
) -> None:
    task = make_task(tmp_path, llama)
    settings = {"normalize": normalize, "feature_dtype": "float32"}
    stored = TracIn(**settings).score(task)
    streamed = TracIn(**settings, keep_features=False, memory_gb=memory_gb).score(task)
    np.testing.assert_allclose(streamed.values, stored.values, **FLOAT32)
    for column in ("loss", "grad_norm"):
        np.testing.assert_allclose(streamed.extra[column], stored.extra[column], **FLOAT32)
    pool_stages = [path for path in task.stages if path.name.startswith("gradients-scores-pool")]
    assert len(pool_stages) == (1 if memory_gb > 1 else len(TARGET))


def test_stored_features_are_reused_by_another_target(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TracIn().score(make_task(tmp_path, llama))
    seen: list[int] = []

    def counting(model, batch, *rest):
        seen.append(len(batch.rows))
        return run_batch(model, batch, *rest)

    monkeypatch.setattr("tamis.gradients.per_sample.run_batch", counting)
    TracIn().score(make_task(tmp_path, llama, target=[("another", "target"), ("of", "two rows")]))
    assert sum(seen) == 2  # the new target rows; no pool row again


def test_cosines_are_bounded_and_a_copy_of_the_target_row_ranks_first(tmp_path: Path, llama: Path) -> None:
    pool = [*POOL, TARGET[1], ("two plus five?", "six"), TARGET[0]]
    scores = TracIn().score(make_task(tmp_path, llama, pool=pool)).values
    assert np.abs(scores).max() <= 1 + 1e-6
    assert scores[:, 0].argmax() == len(pool) - 1  # the copy of target row 0
    assert scores[:, 1].argmax() == len(POOL)
    np.testing.assert_allclose([scores[-1, 0], scores[len(POOL), 1]], 1, atol=1e-3)
    assert scores[:, 0].argsort()[-2] == len(POOL) + 1  # its near-copy comes second


def test_a_step_on_the_best_row_lowers_the_target_loss_and_on_the_worst_raises_it(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    scores = TracIn(projection="none", normalize="dot").score(task).values[:, 0]
    assert scores.min() < 0 < scores.max()
    layers = task.layers()

    def loss_after(row: int | None) -> float:
        fresh = task.at_model(task.model_settings)
        model = fresh.loaded.model
        if row is not None:
            _, pool, _ = loop_gradients_of(fresh, model, layers)
            modules, start = dict(model.named_modules()), 0
            for layer in layers:
                step = pool[row, start : start + layer.numel].view(layer.shape)
                modules[layer.name].weight.data -= 1e-3 * step.float()
                start += layer.numel
        only_loss = loop_gradients_of(make_task(tmp_path, llama, pool=TARGET), model, layers)[0]
        return float(only_loss[0])

    before = loss_after(None)
    assert loss_after(int(scores.argmax())) < before < loss_after(int(scores.argmin()))


@pytest.mark.parametrize("normalize", ["cosine", "dot"])
def test_checkpoints_are_summed_with_their_learning_rates(tmp_path: Path, llama: Path, normalize: str) -> None:
    other = save_tiny(tmp_path / "other", seed=3)
    task = make_task(tmp_path, llama)
    settings = {"normalize": normalize, "projection": "none"}
    both = TracIn(checkpoints=(str(llama), str(other)), learning_rates=(3e-4, 1e-4), **settings).score(task).values
    first = expected(task, cosine=normalize == "cosine")
    second = expected(make_task(tmp_path, other), cosine=normalize == "cosine")
    wanted = 3e-4 * first + 1e-4 * second
    wanted = wanted / 4e-4 if normalize == "cosine" else wanted
    np.testing.assert_allclose(both, wanted.numpy(), rtol=5e-4, atol=2e-6 if normalize == "cosine" else 1e-9)


def test_one_checkpoint_s_model_exists_at_a_time(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [str(llama), *(str(save_tiny(tmp_path / f"other-{seed}", seed=seed)) for seed in (3, 4))]
    task = make_task(tmp_path, llama)
    alive = models_alive(monkeypatch)
    TracIn(checkpoints=tuple(folders)).score(task)
    assert alive == [0, 0, 0]


def test_losses_and_norms_are_those_of_the_first_checkpoint(tmp_path: Path, llama: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=3)
    task = make_task(tmp_path, llama)
    both = TracIn(checkpoints=(str(other), str(llama)), projection="none").score(task).extra
    first = TracIn(checkpoints=(str(other),), projection="none").score(task).extra
    last = TracIn(checkpoints=(str(llama),), projection="none").score(task).extra
    for column in ("loss", "grad_norm"):
        np.testing.assert_array_equal(both[column], first[column])
        assert not np.array_equal(both[column], last[column])


@pytest.mark.parametrize("settings", [{}, {"keep_features": False}, {"projection": "none"}])
def test_a_matrix_on_disk_holds_the_same_scores(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, settings: dict
) -> None:
    task = make_task(tmp_path, llama)
    settings = {"checkpoints": (str(llama), str(save_tiny(tmp_path / "other", seed=3))), **settings}
    in_memory = TracIn(**settings).score(task).values
    monkeypatch.setattr("tamis.score.matrix._IN_MEMORY", 0)
    on_disk = TracIn(**settings).score(task).values
    assert isinstance(on_disk, np.memmap)
    assert not isinstance(in_memory, np.memmap)
    np.testing.assert_array_equal(on_disk, in_memory)


def test_checkpoints_without_learning_rates_weigh_the_same_and_it_is_said(tmp_path: Path, llama: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=3)
    task = make_task(tmp_path, llama)
    both = TracIn(checkpoints=(str(llama), str(other))).score(task).values
    single = [TracIn(checkpoints=(str(folder),)).score(task).values for folder in (llama, other)]
    np.testing.assert_allclose(both, (single[0] + single[1]) / 2, **FLOAT32)
    assert any("equally" in warning for warning in task.warnings)


def test_length_power_multiplies_by_the_supervised_length(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    plain = TracIn(normalize="dot", keep_features=False).score(task).values
    scaled = TracIn(normalize="dot", length_power=0.5, keep_features=False).score(task).values
    np.testing.assert_allclose(scaled, plain * np.sqrt(task.pool.supervised)[:, None], rtol=1e-5)


def test_only_the_plain_dot_product_warns_about_length(tmp_path: Path, llama: Path) -> None:
    for settings, warns in ((TracIn(), False), (TracIn(normalize="dot"), True)):
        task = make_task(tmp_path, llama)
        settings.score(task)
        assert any("short answers" in warning for warning in task.warnings) == warns


def test_scores_do_not_depend_on_the_batches(tmp_path: Path, llama: Path) -> None:
    together = TracIn().score(make_task(tmp_path / "a", llama, collecting=Collecting(batch_tokens=4000))).values
    alone = TracIn().score(make_task(tmp_path / "b", llama, collecting=Collecting(batch_invariant=True))).values
    np.testing.assert_allclose(together, alone, **HALF)


def test_only_the_rows_asked_for_are_scored(tmp_path: Path, llama: Path) -> None:
    every = TracIn().score(make_task(tmp_path, llama))
    some = TracIn().score(make_task(tmp_path, llama, rows=[1, 4, 5]))
    assert some.rows.tolist() == [1, 4, 5]
    np.testing.assert_allclose(some.values, every.values[[1, 4, 5]], **HALF)


def _without_gradient(monkeypatch: pytest.MonkeyPatch, corpus: str, rows: set[int], task) -> None:
    """Pretend that the model predicts some rows with certainty."""
    from tamis.score import features as kept

    original = kept.per_sample_features

    def features(model, batch, layers, projector):
        losses, found, norms = original(model, batch, layers, projector)
        ids = task.pool if corpus == "pool" else task.target
        for place, row in enumerate(batch.rows.tolist()):
            same = row in rows and torch.equal(
                batch.input_ids[place][: int(batch.attention_mask[place].sum())],
                torch.from_numpy(ids[row].input_ids.astype(np.int64)),
            )
            if same:
                found[place] = 0
        return losses, found, norms

    monkeypatch.setattr(kept, "per_sample_features", features)


@pytest.mark.parametrize("keep_features", [True, False])
def test_a_pool_row_without_gradient_scores_zero_and_is_named(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, keep_features: bool
) -> None:
    task = make_task(tmp_path, llama)
    _without_gradient(monkeypatch, "pool", {2}, task)
    scores = TracIn(keep_features=keep_features).score(task)
    values = scores.values
    assert (values[2] == 0).all()
    assert scores.extra["zero_gradient"].tolist() == [row == 2 for row in range(len(POOL))]
    assert np.isfinite(values).all()
    assert any("1 pool rows" in note and "pool-2" in note for note in task.notes)


def test_a_target_row_without_gradient_is_left_out_and_named(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path, llama, groups=[0, 0, 1])
    wanted = TracIn(keep_features=False).score(make_task(tmp_path / "plain", llama)).values
    _without_gradient(monkeypatch, "target", {1}, task)
    scores = TracIn(keep_features=False).score(task)
    np.testing.assert_allclose(scores.values, wanted[:, [0, 2]], **HALF)
    assert scores.group.tolist() == [0, 1]
    assert any("1 target rows" in warning and "target-1" in warning for warning in task.warnings)


def test_a_target_without_any_gradient_is_refused(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, llama, groups=[0, 0, 1])
    _without_gradient(monkeypatch, "target", {2}, task)
    with pytest.raises(InvalidInput, match="no row of target 'target-1' has a gradient"):
        TracIn().score(task)


def test_a_gradient_that_is_not_finite_names_its_row(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tamis.score import features as kept

    original = kept.per_sample_features

    def broken(model, batch, layers, projector):
        losses, found, norms = original(model, batch, layers, projector)
        found[batch.rows == 1, 0] = float("nan")
        return losses, found, norms

    monkeypatch.setattr(kept, "per_sample_features", broken)
    with pytest.raises(NonFinite, match="target rows target-1 is NaN or infinite") as caught:
        TracIn().score(make_task(tmp_path, llama))
    assert caught.value.rows == (1,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": "euclid"}, "normalize='euclid': expected one of cosine, dot"),
        ({"feature_dtype": "int8"}, "feature_dtype='int8': expected one of float16, float32"),
        ({"length_power": 0.5}, "length_power goes with normalize='dot' only"),
        ({"checkpoints": ("a", "b"), "learning_rates": (1.0,)}, "1 entries for 2 checkpoints"),
        ({"checkpoints": ("a",), "learning_rates": (0.0,)}, "must be positive"),
        ({"memory_gb": 0}, "memory_gb must be positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        TracIn(**settings)


def test_an_unknown_projection_is_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(InvalidSettings, match="projection 'gaussian' is unknown"):
        TracIn(projection="gaussian").score(make_task(tmp_path, llama))
