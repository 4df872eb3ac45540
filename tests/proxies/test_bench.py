"""What a build measures: which rows, with which targets, and what a pass over them costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn.functional import cross_entropy

import proxy_case
from tamis.model.targets import gradient_layers
from tamis.proxies.assemble import proxy_of
from tamis.proxies.bench import Bench
from tamis.proxies.build import validation_retention
from tamis.proxies.retention import block_tflops, total_tflops
from tamis.proxies.rows import Row
from tamis.types import FloatArray


def mean_losses(model: nn.Module, rows: Sequence[Row]) -> FloatArray:
    """Row by row, without a batch."""
    found = []
    for row in rows:
        ids = torch.from_numpy(row.tokens.input_ids.astype("int64"))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        wanted = torch.from_numpy(row.tokens.supervised[1:])
        found.append(float(cross_entropy(logits[wanted], ids[0, 1:][wanted])))
    return np.array(found, dtype=np.float32)


def smaller(model: nn.Module) -> nn.Module:
    """The model with random factors of rank 2 in all its layers."""
    torch.manual_seed(0)
    factors = {
        layer.name: (torch.randn(layer.out_features, 2), torch.randn(2, layer.in_features))
        for layer in gradient_layers(model)
    }
    return proxy_of(model, factors, space="product")


def test_every_measurement_is_of_the_rows_of_its_role() -> None:
    model, bench = proxy_case.model(), proxy_case.bench()
    roles = bench.roles
    for found, rows in (
        (bench.held_out(model), roles.held_out),
        (bench.validation(model), roles.validation),
        (bench.annotate(model), roles.align),
    ):
        np.testing.assert_allclose(found.losses, mean_losses(model, rows), rtol=1e-5)


def test_validation_is_the_mean_correlation_over_all_targets() -> None:
    bench = proxy_case.bench()
    model, other = proxy_case.model(), proxy_case.model(seed=1)
    scores = [bench.validation(each).scores for each in (other, model)]
    each = [spearmanr(scores[0][:, j], scores[1][:, j]).statistic for j in range(2)]
    assert abs(each[0] - each[1]) > 0.01  # one of them alone is not the mean
    retention = validation_retention(model, bench)
    assert retention(other) == pytest.approx(np.mean(each), abs=1e-9)
    assert retention(model) == pytest.approx(1)


@pytest.fixture
def timed_bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Thirty held-out rows, of which 24 are timed, and a clock that alternates between a slow and a fast model."""
    seconds = iter([3.0, 0.75, 2.0, 0.5, 4.0, 0.625])
    monkeypatch.setattr(Bench, "timed", lambda self, run: next(seconds))
    bench = proxy_case.bench()
    return replace(bench, roles=replace(bench.roles, held_out=proxy_case.rows(30, seed=1)))


def test_a_pass_over_the_pool_is_the_timed_rows_scaled_by_their_tokens(timed_bench: Bench) -> None:
    model = proxy_case.model()
    cost = timed_bench.cost(model, smaller(model), build=1.0, align=2.0)
    assert (cost.timed_rows, cost.seconds_full, cost.seconds_proxy) == (24, 2.0, 0.5)
    tokens = sum(len(row.tokens.input_ids) for row in proxy_case.rows(30, seed=1)[:24])
    assert cost.pool_pass_seconds == pytest.approx(2.0 * (9.0 * 50) / tokens)  # fifty rows of nine tokens in the mean
    assert cost.build_share == pytest.approx(3.0 / cost.pool_pass_seconds)


def test_operations_and_numbers_are_those_of_each_model(timed_bench: Bench) -> None:
    model = proxy_case.model()
    proxy, rows = smaller(model), timed_bench.roles.held_out
    cost = timed_bench.cost(model, proxy, build=0.0, align=0.0)
    assert cost.tflops_full == total_tflops(model, rows) > cost.tflops_proxy == total_tflops(proxy, rows) > 0
    assert cost.block_tflops_full == block_tflops(model, rows) > cost.block_tflops_proxy == block_tflops(proxy, rows)
    numbers = [sum(param.numel() for param in each.parameters()) for each in (model, proxy)]
    assert [cost.params_full, cost.params_proxy] == numbers and numbers[0] > numbers[1]


def test_a_sibling_is_counted_over_the_rows_in_its_own_tokens(timed_bench: Bench) -> None:
    model = proxy_case.model()
    proxy, longer = smaller(model), proxy_case.rows(40, seed=7)
    theirs = replace(timed_bench, roles=replace(timed_bench.roles, held_out=longer))
    cost = timed_bench.cost(model, proxy, build=0.0, align=0.0, theirs=theirs)
    assert cost.tflops_full == total_tflops(model, timed_bench.roles.held_out)
    assert cost.tflops_proxy == total_tflops(proxy, longer) != total_tflops(proxy, timed_bench.roles.held_out)
