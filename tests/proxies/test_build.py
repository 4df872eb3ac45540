"""A build from a model in memory to a folder, over families: Conv1D, biases, tied embeddings, scaled ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import GPT2Config, GPT2LMHeadModel

import proxy_case
from tamis.model.load import LoadedModel, ModelSettings, load_model
from tamis.model.low_rank_linear import low_rank_layers, set_space
from tamis.progress import NoProgress
from tamis.proxies.build import align_settings, build_low_rank
from tamis.proxies.compressible import find_compressible
from tamis.proxies.retention import Retention
from tamis.report.document import render_document
from tamis.report.retention import retention_document
from tamis.runs.proxy import _loading
from tamis.settings import ProxySettings
from tamis.settings.proxy import recipe_of
from tiny_models import random_batch
from tiny_run import byte_tokenizer

SETTINGS = ProxySettings(model="in memory", pool=("-",), **proxy_case.SETTINGS)


def built(family: str, folder: Path, *, tied: bool = True, **changes: object) -> tuple[LoadedModel, Retention]:
    loaded = LoadedModel(
        model=proxy_case.model(family, tied=tied), tokenizer=byte_tokenizer(), fingerprint="none", description={}
    )
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    found = build_low_rank(
        loaded, settings, proxy_case.bench(), work=folder / "work", out=folder / "proxy", progress=NoProgress()
    )
    return loaded, found


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", True), ("qwen2", False), ("gemma3", True), ("gpt2", True), ("gpt_neox", False)],
)
def test_every_family_is_built_saved_and_loaded(family: str, tied: bool, tmp_path: Path) -> None:
    loaded, found = built(family, tmp_path, tied=tied)
    again = load_model(ModelSettings(name=str(tmp_path / "proxy"), device="cpu")).model
    expected = find_compressible(loaded.model, random_batch([5]))
    assert set(low_rank_layers(again)) == {layer.name for layer in expected.layers} and not found.left_out
    whole = sum(p.numel() for p in loaded.model.parameters())
    assert sum(p.numel() for p in again.parameters()) == found.cost.params_proxy < whole
    # What was measured in memory is what the folder computes.
    losses = proxy_case.bench().held_out(again).losses
    assert float(losses.mean()) == pytest.approx(found.final.loss, rel=1e-6)
    own = dict(loaded.model.named_parameters())
    for name, param in again.named_parameters():
        if name in own:  # embeddings, norms and head; biases have moved into A
            assert torch.equal(param, own[name]), name
    for name, layer in low_rank_layers(again).items():
        if layer.A.bias is not None:
            assert torch.equal(layer.A.bias, own[f"{name}.bias"])


def test_half_precision_is_aligned_in_float32_and_saved_in_its_own_type(tmp_path: Path) -> None:
    loaded = LoadedModel(
        model=proxy_case.model().to(torch.bfloat16), tokenizer=byte_tokenizer(), fingerprint="none", description={}
    )
    build_low_rank(
        loaded, SETTINGS, proxy_case.bench(), work=tmp_path / "work", out=tmp_path / "proxy", progress=NoProgress()
    )
    again = load_model(ModelSettings(name=str(tmp_path / "proxy"), device="cpu", dtype="bfloat16")).model
    assert {param.dtype for param in again.parameters()} == {torch.bfloat16}


def test_layers_that_would_not_get_smaller_stay_and_are_named(tmp_path: Path) -> None:
    _, found = built("llama", tmp_path, sparsity=0.02)  # ranks round up to what saves nothing
    assert any("stays whole" in note for note in found.notes)
    assert found.compressed_layers < 14


def test_a_proxy_scored_by_its_factors_is_also_compared_by_its_products(tmp_path: Path) -> None:
    """Its products alone lie in the target's space, so rows by them are compared with targets by the full model."""
    loaded, found = built("llama", tmp_path, space="factors", steps=1)
    proxy = load_model(ModelSettings(name=str(tmp_path / "proxy"), device="cpu")).model
    assert {layer.space for layer in low_rank_layers(proxy).values()} == {"factors"}
    bench = proxy_case.bench()
    full, by_factors = bench.held_out(loaded.model), bench.held_out(proxy)
    set_space(proxy, "product")
    by_products = bench.held_out(proxy)
    cosines = by_products.units @ full.target_units.T
    mixed = torch.stack([cosines[:, :3].mean(dim=1), cosines[:, 3:].mean(dim=1)], dim=1).numpy()
    expected = {
        "this proxy, factors": by_factors.scores,
        "this proxy, product": by_products.scores,
        "rows by the proxy, targets by the full model": mixed,
    }
    measured = {entry.name: entry.agreement.spearman.value for entry in (found.final, *found.others)}
    assert set(measured) == {*expected, "before alignment"}
    for name, scores in expected.items():
        each = [spearmanr(scores[:, j], full.scores[:, j]).statistic for j in range(2)]
        assert measured[name] == pytest.approx(np.mean(each), abs=1e-6), name
    assert len({round(measured[name], 6) for name in expected}) == 3


@pytest.mark.parametrize(("hidden", "rate"), [(256, 1e-3), (257, 1e-4)])
def test_small_models_are_aligned_at_a_larger_rate(hidden: int, rate: float) -> None:
    config = GPT2Config(vocab_size=8, n_embd=hidden, n_layer=1, n_head=1, n_positions=8, n_inner=8)
    model = GPT2LMHeadModel(config)
    settings = ProxySettings(model="in memory", pool=("-",))
    assert align_settings(settings, recipe_of(settings), model).learning_rate == rate
    told = replace(settings, learning_rate=0.02)
    assert align_settings(told, recipe_of(told), model).learning_rate == 0.02


def test_a_proxy_is_built_in_float32_unless_a_type_is_given() -> None:
    """On a GPU, too, where everything else that is not told runs in sixteen bits."""
    settings = replace(SETTINGS, device="auto")
    assert settings.dtype == "auto" and _loading(settings).dtype == "float32"
    assert _loading(replace(settings, dtype="bfloat16")).dtype == "bfloat16"


@pytest.fixture(scope="module")
def whole_report(tmp_path_factory: pytest.TempPathFactory) -> Retention:
    """With a sweep and a control."""
    return built("llama", tmp_path_factory.mktemp("whole"), objective="align+kl", sweep=True, steps=1)[1]


def test_a_report_is_read_back_as_it_was_written(whole_report: Retention) -> None:
    found = whole_report
    again = Retention.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found and found.control is not None and found.sweep
    other = again.advised(-1.0)
    assert other.sparsity == 0.9 and "Score with it" in other.sentences[0]
    assert again.advised(found.advice.keep) == found.advice


def test_the_page_holds_the_numbers_of_the_report(whole_report: Retention) -> None:
    found = whole_report
    page = render_document(
        retention_document(found, {"command": "tamis proxy --config <x>", "warnings": ["a <b> warning"]})
    )
    assert f"{found.final.agreement.spearman.value:.2f}".replace("-", "−") in page
    assert "tamis proxy --config &lt;x&gt;" in page and "a &lt;b&gt; warning" in page
    for sentence in found.advice.sentences:
        assert sentence in page
    assert page.count("data-figure=") == 2  # over sparsities, and of alignment with its control
