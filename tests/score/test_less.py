"""Oracle: a loop that advances Adam's moments with each row's own gradient, by plain autograd, without the engine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from score_task import POOL, TARGET, file_bytes, loop_gradients_of, make_task, models_alive, save_tiny, unit
from tamis.errors import InvalidInput, InvalidSettings
from tamis.model.load import load_model
from tamis.projection import make_projector, project_gradients
from tamis.score import less
from tamis.score.less import Less
from tamis.seeds import child_seed
from tamis.training.checkpoints import complete_checkpoints
from tamis.training.loop import fine_tune, learning_rate_at, run_identity
from tamis.training.lora import add_lora

SHORT = {
    "warmup_epochs": 2,
    "warmup_update_rows": 2,
    "warmup_learning_rate": 5e-3,
    "lora_rank": 2,
    "feature_dtype": "float32",
}
# Adam divides by sqrt(v'): float32 gradients differ by 1e-6 of their norm, entries near zero by more of themselves.
CLOSE = {"rtol": 5e-3, "atol": 2e-4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


def gamma(grads: Tensor, m: Tensor, v: Tensor, *, t: int, form: str, eps: float = 1e-8) -> Tensor:
    """Adam's update of every row's gradient alone, in float64, straight from the formulas."""
    first, second = 0.9 * m + 0.1 * grads, 0.999 * v + 0.001 * grads**2
    if form == "less-code":
        return first / (second + eps).sqrt()
    if form == "uncorrected":
        return first / (second.sqrt() + eps)
    return (first / (1 - 0.9 ** (t + 1))) / ((second / (1 - 0.999 ** (t + 1))).sqrt() + eps)


def warmup_folder(task) -> Path:
    (folder,) = task.store.glob("less-warm-up-*")
    return folder


def slow_less(task, settings: Less, *, projector=None) -> np.ndarray:
    """From the checkpoints on disk: moments by parameter name, gradients by autograd, scores by definition."""
    total, rates = 0.0, 0.0
    for step_folder in sorted(warmup_folder(task).glob("step-*")):
        at = task.at_model(replace(task.model_settings, name=str(step_folder)))
        model, layers = at.loaded.model, at.layers()
        _, pool, target = loop_gradients_of(at, model, layers)
        saved = load_file(step_folder / "optimizer.safetensors")
        m, v = (
            torch.cat([saved[f"{kind}/{layer.name}.weight"].flatten() for layer in layers]).double()
            for kind in ("exp_avg", "exp_avg_sq")
        )
        step = int(step_folder.name.removeprefix("step-"))
        features = gamma(pool, m, v, t=step, form=settings.form)
        if projector is not None:
            features = project_gradients(projector, features, layers)
            target = project_gradients(projector, target, layers)
        updates = settings.warmup_settings()
        last = 2 * -(-len(settings.warmup_rows(task)) // updates.update_rows)
        rate = np.mean([learning_rate_at(updates, s, last) for s in range(step - last // 2, step)])
        total = total + rate * (unit(features) @ unit(target).T).numpy()
        rates += rate
    return total / rates


@pytest.mark.parametrize("form", ["adam", "less-code", "uncorrected"])
def test_exact_scores_equal_the_slow_loop(tmp_path: Path, llama: Path, form: str) -> None:
    settings = Less(form=form, projection="none", **SHORT)
    task = make_task(tmp_path, llama)
    scores = settings.score(task)
    np.testing.assert_allclose(scores.values, slow_less(task, settings), **CLOSE)
    assert np.abs(scores.values).max() <= 1
    assert any(f"Adam form '{form}'" in note for note in task.notes)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_other_architectures_equal_the_slow_loop(tmp_path: Path, family: str) -> None:
    settings = Less(projection="none", **SHORT)
    task = make_task(tmp_path, save_tiny(tmp_path / "model", family))
    np.testing.assert_allclose(settings.score(task).values, slow_less(task, settings), **CLOSE)


@pytest.mark.parametrize(
    ("projection", "dim"), [("hadamard", 128), ("rademacher", 128), ("mask", 128), ("factorized", 4)]
)
def test_projected_scores_equal_the_slow_loop_through_the_same_projection(
    tmp_path: Path, llama: Path, projection: str, dim: int
) -> None:
    settings = Less(projection=projection, projection_dim=dim, **SHORT)
    task = make_task(tmp_path, llama, seed=4)
    values = settings.score(task).values
    wanted = slow_less(task, settings, projector=make_projector(projection, dim=dim, seed=4))
    np.testing.assert_allclose(values, wanted, **CLOSE)


def test_rows_at_a_time_only_bound_memory(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Less(projection="hadamard", projection_dim=256, **SHORT)
    together = settings.score(make_task(tmp_path / "a", llama)).values
    monkeypatch.setattr(less, "_MAX_ENTRIES", 1)
    np.testing.assert_allclose(settings.score(make_task(tmp_path / "b", llama)).values, together, **CLOSE)


def test_streamed_scores_equal_those_of_stored_features(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    stored = Less(**SHORT).score(task).values
    np.testing.assert_allclose(Less(**SHORT, keep_features=False).score(task).values, stored, **CLOSE)
    half = Less(**{**SHORT, "feature_dtype": "float16"}).score(task).values
    np.testing.assert_allclose(half, stored, rtol=0, atol=2e-3)


def test_the_warmup_is_plain_fine_tuning_of_a_random_part_of_the_pool(tmp_path: Path, llama: Path) -> None:
    settings = Less(**{**SHORT, "warmup_update_rows": 1}, warmup_pool_share=0.2)
    task = make_task(tmp_path, llama)
    settings.score(task)
    rows = settings.warmup_rows(task)
    assert len(rows) == 4  # four updates' worth, more than 20 % of 7
    assert set(rows) < set(range(len(POOL)))
    seed = child_seed(task.seed, "less warm-up")
    model = add_lora(load_model(task.model_settings).model, rank=2, alpha=4, seed=seed, base=str(llama))
    fine_tune(model, task.pool, rows, settings.warmup_settings(), seed=seed, folder=tmp_path / "by hand")
    assert file_bytes(warmup_folder(task)) == file_bytes(tmp_path / "by hand")


def test_the_warmup_is_shared_by_targets_and_leaves_the_task_s_model_alone(tmp_path: Path, llama: Path) -> None:
    first = make_task(tmp_path, llama)
    before = {name: p.clone() for name, p in first.loaded.model.named_parameters()}
    Less(**SHORT).score(first)
    after = dict(first.loaded.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    written = {path: path.stat().st_mtime_ns for path in warmup_folder(first).rglob("*.safetensors")}
    Less(**SHORT).score(make_task(tmp_path, llama, target=[("another", "target")]))
    assert {path: path.stat().st_mtime_ns for path in warmup_folder(first).rglob("*.safetensors")} == written


def test_the_warmup_appears_in_the_cost_table(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    settings = Less(**SHORT)
    settings.score(task)
    (cost,) = [cost for cost in task.costs() if cost.name == "less-warm-up"]
    assert cost.rows == 2 * len(settings.warmup_rows(task))
    assert cost.tokens == 2 * int(task.pool.lengths[settings.warmup_rows(task)].sum())
    resumed = make_task(tmp_path, llama)
    settings.score(resumed)
    assert [c for c in resumed.costs() if c.name == "less-warm-up"] == [cost]


def test_one_checkpoint_s_model_exists_at_a_time(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, llama)
    alive = models_alive(monkeypatch)
    Less(**SHORT).score(task)
    assert alive == [0, 0, 0]  # when the warm-up's model is loaded, and those of the two checkpoints


def test_losses_and_norms_are_those_of_the_first_checkpoint(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    scores = Less(**SHORT).score(task)
    losses, norms = [], []
    for folder in sorted(warmup_folder(task).glob("step-*")):
        at = task.at_model(replace(task.model_settings, name=str(folder)))
        loss, pool, _ = loop_gradients_of(at, at.loaded.model, at.layers())
        losses.append(loss.numpy())
        norms.append(pool.norm(dim=1).numpy())
    np.testing.assert_allclose(scores.extra["loss"], losses[0], rtol=1e-4)
    np.testing.assert_allclose(scores.extra["grad_norm"], norms[0], rtol=1e-3)
    assert (np.abs(losses[0] - losses[1]) > 1e-3 * losses[0]).all()  # so that the two can be told apart


def test_a_copy_of_the_target_row_ranks_first(tmp_path: Path, llama: Path) -> None:
    pool = [*POOL, TARGET[1], ("two plus five?", "six")]
    values = Less(**SHORT).score(make_task(tmp_path, llama, pool=pool)).values
    assert values[:, 1].argmax() == len(POOL)
    assert values[:, 0].argmax() == len(POOL) + 1


def test_a_given_adapter_is_warmed_up_from_where_it_stands(tmp_path: Path, llama: Path) -> None:
    loaded = load_model(make_task(tmp_path, llama).model_settings)
    adapted = add_lora(loaded.model, rank=3, alpha=6, seed=9, base=str(llama))
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if "lora_B" in name:
                param.add_(0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    settings = Less(projection="none", **SHORT)
    task = make_task(tmp_path / "run", tmp_path / "adapter")
    values = settings.score(task).values
    np.testing.assert_allclose(values, slow_less(task, settings), **CLOSE)
    assert any("adapter given" in note for note in task.notes)
    assert any("LoRA settings were not used" in note for note in task.notes)
    first = load_file(next(warmup_folder(task).glob("step-*/adapter_model.safetensors")))
    assert {tensor.shape[0] for name, tensor in first.items() if "lora_A" in name} == {3}


def test_an_adapter_that_names_its_base_by_a_relative_path_can_be_warmed_up(tmp_path: Path, llama: Path) -> None:
    base = tmp_path / "models" / "base"
    shutil.copytree(llama, base)
    adapted = add_lora(load_model(make_task(tmp_path, base).model_settings).model, rank=2, alpha=4, seed=9)
    adapted.save_pretrained(tmp_path / "models" / "adapter")
    config = tmp_path / "models" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "../base"}))
    task = make_task(tmp_path / "run", tmp_path / "models" / "adapter")
    assert np.isfinite(Less(**SHORT).score(task).values).all()
    saved = json.loads(next(warmup_folder(task).glob("step-*/adapter_config.json")).read_text())
    assert saved["base_model_name_or_path"] == str(base.resolve())


def test_given_moments_replace_the_warmup(tmp_path: Path, llama: Path) -> None:
    """The last checkpoint of a warm-up, given as model and moments, scores like that checkpoint alone."""
    task = make_task(tmp_path, llama)
    Less(**SHORT).score(task)
    *_, last = complete_checkpoints(
        warmup_folder(task),
        identity=run_identity(
            Less(**SHORT).warmup_settings(),
            task.pool,
            Less(**SHORT).warmup_rows(task),
            seed=child_seed(0, "less warm-up"),
        ),
    )
    alone = make_task(tmp_path / "alone", last.folder)
    values = Less(projection="none", moments=str(last.folder), **SHORT).score(alone).values
    assert not list(alone.store.glob("less-warm-up-*"))
    _, pool, target = loop_gradients_of(alone, alone.loaded.model, alone.layers())
    saved = load_file(last.folder / "optimizer.safetensors")
    m, v = (
        torch.cat([saved[f"{kind}/{layer.name}.weight"].flatten() for layer in alone.layers()]).double()
        for kind in ("exp_avg", "exp_avg_sq")
    )
    wanted = unit(gamma(pool, m, v, t=last.step, form="adam")) @ unit(target).T
    np.testing.assert_allclose(values, wanted.numpy(), **CLOSE)


def test_moments_that_do_not_fit_are_refused(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    with pytest.raises(InvalidInput, match=r"holds neither optimizer.safetensors nor optimizer.pt"):
        Less(moments=str(tmp_path), **SHORT).score(task)
    Less(**SHORT).score(task)
    step = next(warmup_folder(task).glob("step-*"))
    with pytest.raises(
        InvalidInput, match=r"the optimizer state has nothing for 'model.layers.0.self_attn.q_proj.weight'"
    ):
        Less(moments=str(step), **SHORT).score(task)  # the base model with its adapter's moments


def test_a_row_without_gradient_does_not_inherit_the_momentum_s_direction(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = less.run_batch

    def silent_row_two(model, batch, layers, consumer):
        losses = original(model, batch, layers, consumer)
        consumer.grads[batch.rows == 2] = 0
        return losses

    monkeypatch.setattr(less, "run_batch", silent_row_two)
    # Target row 2 has no gradient either, so its column is left out.
    task = make_task(tmp_path, llama)
    scores = Less(**SHORT).score(task)
    assert (scores.values[2] == 0).all()
    assert (scores.values[[0, 1, 3]] != 0).all()
    assert scores.values.shape == (len(POOL), len(TARGET) - 1)
    assert [sum("exactly zero" in text for text in texts) for texts in (task.notes, task.warnings)] == [1, 1]
    assert scores.extra["zero_gradient"].dtype == np.bool_
    assert np.flatnonzero(scores.extra["zero_gradient"]).tolist() == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "adamw"}, "form='adamw': expected one of adam, less-code, uncorrected"),
        ({"warmup_pool_share": 0.0}, "warmup_pool_share must be above 0 and at most 1"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"lora_alpha": -1.0}, "lora_alpha must be positive"),
        ({"warmup_epochs": 0}, "epochs must be at least 1"),
        ({"warmup_learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"feature_dtype": "int8"}, "feature_dtype='int8': expected one of float16, float32"),
        ({"memory_gb": -1.0}, "memory_gb must be positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        Less(**settings)
