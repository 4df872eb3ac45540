"""Influence functions against a brute-force K-FAC and EK-FAC: plain autograd, one row and one token at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from score_task import POOL, TARGET, batch_of, file_bytes, loop_gradients_of, make_task, save_tiny
from tamis.collect import Collecting, Task
from tamis.errors import InvalidSettings
from tamis.gradients.kronecker import curvature_losses, label_sampler
from tamis.model.loss import per_sample_losses, supervised_positions
from tamis.score import kronecker_factors
from tamis.score.influence_function import InfluenceFunction
from tamis.score.warmup import warmup_points, warmup_training
from tamis.types import LayerSpec

OWN_LABELS = {"labels": "empirical", "normalize": "dot", "damping": 0.1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


def tokens_of(model: nn.Module, layers: tuple[LayerSpec, ...], ids: Tensor, supervised: Tensor):
    """Inputs and output gradients ``(T, features)`` of every layer for one unpadded row; its loss is a sum over √c."""
    modules = dict(model.named_modules())
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def remember(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach()[0]
            output.retain_grad()
            outputs[name] = output

        return hook

    handles = [modules[layer.name].register_forward_hook(remember(layer.name)) for layer in layers]
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    counts = supervised[1:]
    loss = nn.functional.cross_entropy(logits[counts], ids[1:][counts], reduction="sum") / counts.sum() ** 0.5
    loss.backward()
    for handle in handles:
        handle.remove()
    found = {}
    for layer in layers:
        act, grad = inputs[layer.name], outputs[layer.name].grad[0].detach()
        if layer.has_bias:
            act = torch.cat([act, torch.ones(len(act), 1, dtype=act.dtype)], dim=1)
        found[layer.name] = act.double(), grad.double()
    model.zero_grad()
    return found


def brute_force(task: Task, strategy: str, damping: float) -> np.ndarray:
    """``g_i (F + δ)^{-1} g_j`` with F built layer by layer as a dense matrix, from the rows' own labels."""
    model, layers = task.loaded.model, task.layers()
    _, pool, target = loop_gradients_of(task, model, layers)
    batch = batch_of(task.pool, np.flatnonzero(task.pool.usable).tolist())
    rows = [
        tokens_of(model, layers, ids[: int(mask.sum())], supervised[: int(mask.sum())])
        for ids, mask, supervised in zip(batch.input_ids, batch.attention_mask, batch.supervised, strict=True)
    ]
    total = torch.zeros(len(pool), len(target), dtype=torch.float64)
    start = 0
    for layer in layers:
        a, s, count = 0, 0, 0
        for row in rows:
            for act, grad in zip(*row[layer.name], strict=True):
                a, s, count = a + torch.outer(act, act), s + torch.outer(grad, grad), count + 1
        a, s = a / count, s / len(rows)
        fisher = torch.kron(s, a)
        if strategy == "ekfac":
            turn = torch.kron(torch.linalg.eigh(s)[1], torch.linalg.eigh(a)[1])
            whole = torch.stack([(row[layer.name][1].T @ row[layer.name][0]).flatten() for row in rows])
            values = (whole @ turn).square().mean(0)
            fisher = turn @ torch.diag(values) @ turn.T
        fisher = fisher + damping * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=torch.float64)
        part = slice(start, start + layer.numel)
        total += pool[:, part] @ torch.linalg.solve(fisher, target[:, part].T)
        start += layer.numel
    return total.numpy()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
def test_scores_are_those_of_dense_matrices_built_token_by_token(tmp_path: Path, family: str, strategy: str) -> None:
    model = save_tiny(tmp_path / "model", family, hidden=8)
    task = make_task(tmp_path, model, dtype="float64")
    found = InfluenceFunction(**OWN_LABELS, strategy=strategy, factor_rows=None).score(task)
    wanted = brute_force(task, strategy, 0.1)
    # Factors are stored in float32, and norms of these models compute in it.
    np.testing.assert_allclose(found.values, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())
    assert np.isfinite(found.extra["loss"]).all() and (found.extra["grad_norm"] > 0).all()


def test_of_an_adapter_the_factors_alone_count(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    training = warmup_training(epochs=1, update_rows=3, learning_rate=1e-2)
    (point,) = warmup_points(task, task.pool, task.rows, training, method="test", lora_rank=2, lora_alpha=4.0)
    adapted = make_task(tmp_path / "adapted", point.folder)
    found = InfluenceFunction(**OWN_LABELS, strategy="kfac", factor_rows=None).score(adapted)
    assert all("lora" in layer.name for layer in adapted.layers())
    wanted = brute_force(adapted, "kfac", 0.1)
    np.testing.assert_allclose(found.values, wanted, rtol=0, atol=1e-2 * np.abs(wanted).max())  # all in float32


@pytest.mark.parametrize("aggregate", ["mean", "round-robin"])
def test_cosines_are_products_over_lengths(tmp_path: Path, llama: Path, aggregate: str) -> None:
    task = make_task(tmp_path, llama, aggregate=aggregate, groups=[0, 0, 1])
    settings = InfluenceFunction(labels="empirical", strategy="kfac", factor_rows=4)
    scores = settings.score(task)
    assert np.abs(scores.values).max() <= 1 + 1e-6
    model, layers = task.loaded.model, task.layers()
    _, pool, target = loop_gradients_of(task, model, layers)
    apply = kronecker_factors.KroneckerCurvature(
        task=task, rows=settings.rows_for_factors(task), strategy="kfac", labels="empirical", damping=0.1
    ).start()
    parts = torch.split(target.float(), [layer.numel for layer in layers], dim=1)
    turned = torch.cat(
        [apply(layer.name, part.view(-1, *layer.shape)).flatten(1) for layer, part in zip(layers, parts, strict=True)],
        dim=1,
    ).double()
    cosines = (pool / pool.norm(dim=1, keepdim=True)) @ (turned / turned.norm(dim=1, keepdim=True)).T
    wanted = torch.stack([cosines[:, :2].mean(1), cosines[:, 2]], dim=1) if aggregate == "mean" else cosines
    np.testing.assert_allclose(scores.values, wanted.numpy(), rtol=0, atol=1e-4)


def test_labels_are_drawn_from_the_model_s_predictions_whatever_the_batch(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    batch = batch_of(task.pool, [3, 0, 5])
    positions = supervised_positions(batch)
    seen: list[Tensor] = []

    def keep(logits: Tensor) -> Tensor:
        seen.append(logits.detach())
        return positions.labels

    with torch.no_grad():
        per_sample_losses(task.loaded.model, batch, positions, relabel=keep)
    (logits,) = seen
    drawn = torch.stack([label_sampler(batch, positions, seed)(logits) for seed in range(400)])
    counts = torch.nn.functional.one_hot(drawn, logits.shape[1]).sum((0, 1)).double()
    expected = torch.softmax(logits.double(), dim=1).sum(0) * len(drawn)
    # Counts are sums of independent draws: none is off by more than five standard deviations.
    assert bool(((counts - expected).abs() <= 5 * expected.sqrt().clamp_min(1)).all())
    alone = batch_of(task.pool, [5])
    of_last = positions.row == 2
    again = label_sampler(alone, supervised_positions(alone), 0)(logits[of_last])
    assert torch.equal(again, drawn[0][of_last])


def test_losses_of_the_curvature_are_sums_over_the_root_of_their_number(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama)
    batch = batch_of(task.pool, [0, 1])
    positions = supervised_positions(batch)
    with torch.no_grad():
        found = curvature_losses("empirical", seed=0)(task.loaded.model, batch, positions)
        wanted = per_sample_losses(task.loaded.model, batch) * positions.counts.sqrt()
    torch.testing.assert_close(found, wanted)


def test_a_killed_estimation_ends_in_the_same_bytes(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kronecker_factors, "_PART_ROWS", 2)
    settings = InfluenceFunction(factor_rows=6)
    whole = make_task(tmp_path / "whole", llama)
    wanted = settings.score(whole).values
    real, calls = kronecker_factors.run_batch, []

    def dies(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(kronecker_factors, "run_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        settings.score(make_task(tmp_path / "cut", llama))
    assert list((tmp_path / "cut" / "store").glob("kronecker-factors-*/bases.safetensors"))
    monkeypatch.setattr(kronecker_factors, "run_batch", real)
    resumed = make_task(tmp_path / "cut", llama)
    np.testing.assert_array_equal(settings.score(resumed).values, wanted)
    assert file_bytes(tmp_path / "cut" / "store") == file_bytes(tmp_path / "whole" / "store")
    (cost,) = [cost for cost in resumed.costs() if cost.name == "kronecker-factors"]
    assert cost.rows == 12  # both passes, over 6 rows


def test_factors_are_summed_anew_in_smaller_batches_when_memory_runs_out(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = InfluenceFunction(**OWN_LABELS)
    wanted = method.score(make_task(tmp_path / "whole", llama))
    real, sizes = kronecker_factors.run_batch, []

    def short_of_memory(model: nn.Module, batch, *others, **named):
        sizes.append(batch.input_ids.numel())
        real(model, batch, *others, **named)  # the sums have seen the batch by the time memory runs out
        if sizes[-1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kronecker_factors, "run_batch", short_of_memory)
    found = method.score(make_task(tmp_path / "short", llama))
    assert max(sizes) > 64 and sizes[-1] <= 64
    np.testing.assert_allclose(found.values, wanted.values, rtol=0, atol=2e-5 * float(np.abs(wanted.values).max()))


def test_one_row_at_a_time_changes_nothing_but_rounding(tmp_path: Path, llama: Path) -> None:
    settings = InfluenceFunction()
    together = settings.score(make_task(tmp_path / "a", llama)).values
    alone = Collecting(batch_tokens=150, shard_rows=3, batch_invariant=True)
    apart = settings.score(make_task(tmp_path / "b", llama, collecting=alone)).values
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "shampoo"}, "strategy='shampoo': expected one of ekfac, kfac"),
        ({"labels": "random"}, "labels='random': expected one of sampled, empirical"),
        ({"normalize": "l2"}, "normalize='l2': expected one of cosine, dot"),
        ({"damping": 0.0}, "damping must be positive, got 0"),
        ({"damping": "much"}, "damping='much': expected a number, got str"),
        ({"memory_gb": float("inf")}, "memory_gb=inf: expected a finite number"),
        ({"factor_rows": 0}, "factor_rows must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        InfluenceFunction(**settings)


def test_the_plain_product_warns_of_its_bias(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama, pool=POOL[:3], target=TARGET[:1])
    InfluenceFunction(normalize="dot").score(task)
    assert any("short answers are preferred" in said for said in task.warnings)
    assert any("labels drawn from the model's predictions) from 3 pool rows" in said for said in task.notes)
