"""Factors from a model's own tokens: the probes are what autograd sees, every recipe is best by its own measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import proxy_case
from tamis.errors import InvalidSettings
from tamis.gradients.per_sample import Factors, run_batch
from tamis.model.low_rank_linear import low_rank_layers
from tamis.model.targets import gradient_layers
from tamis.proxies.assemble import proxy_of
from tamis.proxies.compressible import find_compressible
from tamis.proxies.decompose import Decomposed, decompose, factor_layer
from tamis.proxies.probes import LayerProbes, collect_probes, count_probes, passes_within
from tamis.proxies.rows import batches_of
from tamis.seeds import child_seed, random_subset
from tamis.settings.proxy import Recipe
from tamis.types import LayerSpec
from tiny_models import FAMILIES

NOTHING = lambda done: None  # noqa: E731  # progress that nobody watches


def decomposed(model: nn.Module, folder: Path, recipe: Recipe, **changes: Any) -> Decomposed:
    batches = batches_of(proxy_case.roles().probe, batch_tokens=64, pad_id=0)
    layers = find_compressible(model, batches[0]).layers
    options = {"lowest_sparsity": 0.3, "tokens_per_row": 16, "probe_gb": 4.0, "seed": 0, "advance": NOTHING, **changes}
    return decompose(model, layers, batches, recipe=recipe, folder=folder, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_are_inputs_and_gradients_of_real_tokens(family: str) -> None:
    model = proxy_case.model(family, dtype=torch.float64)
    layers = gradient_layers(model)
    batches = batches_of(proxy_case.roles().probe, batch_tokens=40, pad_id=0)
    found = collect_probes(model, layers, batches, tokens_per_row=99, seed=0, advance=NOTHING)
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {layer.name: [] for layer in layers}
    for batch in batches:
        consumer = Factors()
        run_batch(model, batch, layers, consumer)
        real = batch.attention_mask.bool()
        for name, (act, grad) in consumer.factors.items():
            parts[name].append((act[real], grad[real]))
    for name, all_of in parts.items():
        torch.testing.assert_close(found[name].inputs, torch.cat([a for a, _ in all_of]), rtol=0, atol=0)
        torch.testing.assert_close(found[name].grads, torch.cat([g for _, g in all_of]), rtol=0, atol=0)
    prompt = batches[0].supervised[:, 1]  # the second token of a row is never supervised here
    assert not prompt.any() and all(bool(probes.grads.any()) for probes in found.values())


def test_rows_give_the_same_number_of_tokens_and_short_ones_all() -> None:
    batches = batches_of(proxy_case.roles().probe, batch_tokens=64, pad_id=0)
    model = proxy_case.model()
    layers = gradient_layers(model)[:1]
    found = collect_probes(model, layers, batches, tokens_per_row=7, seed=0, advance=NOTHING)
    lengths = [len(row.tokens.input_ids) for row in proxy_case.roles().probe]
    assert len(found[layers[0].name].inputs) == sum(min(7, n) for n in lengths) == count_probes(batches, 7)


def test_the_tokens_of_a_row_are_drawn_by_the_seed_and_the_rows_position() -> None:
    model, rows = proxy_case.model(dtype=torch.float64), proxy_case.roles().probe
    layer = gradient_layers(model)[0]
    batches = batches_of(rows, batch_tokens=64, pad_id=0)
    found, other = (
        collect_probes(model, [layer], batches, tokens_per_row=3, seed=seed, advance=NOTHING)[layer.name]
        for seed in (5, 6)
    )
    drawn, inputs, grads = [], [], []
    for batch in batches:
        consumer = Factors()
        run_batch(model, batch, [layer], consumer)
        act, grad = consumer.factors[layer.name]
        for place, row in enumerate(batch.rows.tolist()):
            length = len(rows[row].tokens.input_ids)
            positions = random_subset(child_seed(5, "probe tokens", row), length, 3).tolist()
            drawn.append((length, tuple(positions)))
            inputs.append(act[place, positions])
            grads.append(grad[place, positions])
    torch.testing.assert_close(found.inputs, torch.cat(inputs), rtol=0, atol=0)
    torch.testing.assert_close(found.grads, torch.cat(grads), rtol=0, atol=0)
    assert not torch.equal(found.inputs, other.inputs)
    assert len(set(drawn)) > len({length for length, _ in drawn})  # rows of one length give tokens of other places


def test_passes_hold_what_fits_and_never_split_a_layer() -> None:
    layers = [
        LayerSpec(name=str(i), out_features=512, in_features=512, has_bias=False, kind="linear") for i in range(5)
    ]
    one = 4 * 1000 * 1024 / 2**30
    assert [len(group) for group in passes_within(layers, 1000, gigabytes=2.5 * one)] == [2, 2, 1]
    assert [len(group) for group in passes_within(layers, 1000, gigabytes=0.1 * one)] == [1] * 5


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_probe_forms_give_one_proxy(family: str, tmp_path: Path) -> None:
    model = proxy_case.model(family, dtype=torch.float64)
    products = []
    for form in ("probe", "dense"):
        done = decomposed(model, tmp_path / form, Recipe(form=form), tokens_per_row=1)  # fewer tokens than features
        factors = done.factors(done.ranks(0.5))
        products.append({name: left @ right for name, (left, right) in factors.items()})
    for name, product in products[0].items():
        torch.testing.assert_close(product, products[1][name], rtol=1e-5, atol=1e-6)  # they are stored in float32


@pytest.mark.parametrize(
    ("preset", "weighs"), [(Recipe(), True), (Recipe(weigh_input=False, weigh_output=False), False)]
)
def test_the_stored_values_say_the_weighted_norm_of_what_is_left_out(
    preset: Recipe, weighs: bool, tmp_path: Path
) -> None:
    model = proxy_case.model(dtype=torch.float64)
    done = decomposed(model, tmp_path, preset)
    ranks = done.ranks(0.5)
    factors = done.factors(ranks)
    batches = batches_of(proxy_case.roles().probe, batch_tokens=64, pad_id=0)
    probes = collect_probes(model, done.layers, batches, tokens_per_row=16, seed=0, advance=NOTHING)
    for index, layer in enumerate(done.layers[:3]):
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        roots = []
        for tokens, damping in ((probes[layer.name].grads, 1.0), (probes[layer.name].inputs, 0.01)):
            moment = tokens.T @ tokens / len(tokens)
            size = len(moment)
            if not weighs:
                moment, damping = torch.eye(size, dtype=torch.float64), 0.0
            elif len(tokens) < 4 * size and damping < 1:
                damping = 0.1
            values, basis = torch.linalg.eigh(moment + damping * moment.trace() / size * torch.eye(size))
            roots.append(basis @ torch.diag(values.sqrt()) @ basis.T)
        left, right = (factor.double() for factor in factors[layer.name])
        whole = (roots[0] @ weight @ roots[1]).norm()
        with safe_open(tmp_path / f"{index:05d}.safetensors", framework="pt") as file:
            kept = file.get_tensor("values")[: ranks[layer.name]].norm()
        found = (roots[0] @ (weight - left @ right) @ roots[1]).norm() / whole
        assert float(found) == pytest.approx(float((1 - (kept / whole) ** 2) ** 0.5), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gauge_is_the_one_that_was_asked_for(family: str, tmp_path: Path) -> None:
    """Balanced: ``A^T A = B B^T``. As equation 14 leaves them: ``A^T C_d A = s = B C_h B^T``."""
    model = proxy_case.model(family, dtype=torch.float64)
    assert Recipe().gauge == "balanced"
    balanced, weighted = (
        decomposed(model, tmp_path / recipe.gauge, recipe)
        for recipe in (Recipe(damping_input=0.1), Recipe(damping_input=0.1, gauge="weighted"))
    )
    ranks = balanced.ranks(0.5)
    even, uneven = (done.factors(ranks) for done in (balanced, weighted))
    batches = batches_of(proxy_case.roles().probe, batch_tokens=64, pad_id=0)
    probes = collect_probes(model, weighted.layers, batches, tokens_per_row=16, seed=0, advance=NOTHING)
    for index, layer in enumerate(weighted.layers):
        left, right = (factor.double() for factor in even[layer.name])
        grams = left.T @ left, right @ right.T
        torch.testing.assert_close(*grams, rtol=0, atol=1e-5 * float(grams[0].norm()))  # they are stored in float32
        a, b = (factor.double() for factor in uneven[layer.name])
        assert float((a @ b - left @ right).norm()) < 1e-5 * float((a @ b).norm())
        with safe_open(weighted.folder / f"{index:05d}.safetensors", framework="pt") as file:
            values = file.get_tensor("values")[: ranks[layer.name]]
        for factor, tokens, damping in (
            (a, probes[layer.name].grads, 1.0),
            (b.T, probes[layer.name].inputs, 0.1),
        ):
            moment = tokens.T @ tokens / len(tokens)
            damped = moment + damping * moment.trace() / len(moment) * torch.eye(len(moment))
            torch.testing.assert_close(
                factor.T @ damped @ factor, torch.diag(values), rtol=0, atol=1e-5 * float(values[0])
            )


def test_the_inverse_weighting_is_another_proxy_of_the_same_ranks(tmp_path: Path) -> None:
    model = proxy_case.model()
    found = [decomposed(model, tmp_path / w, Recipe(weighting=w, damping_input=0.1)) for w in ("influence", "inverse")]  # type: ignore[arg-type]
    assert found[0].ranks(0.5) == found[1].ranks(0.5)
    ones, others = (done.factors(done.ranks(0.5)) for done in found)
    for name, (left, right) in ones.items():
        product, other = left @ right, others[name][0] @ others[name][1]
        assert other.isfinite().all() and float((product - other).norm() / product.norm()) > 0.05


def test_a_build_that_lost_layers_ends_in_the_same_bytes(tmp_path: Path) -> None:
    model = proxy_case.model()
    whole = decomposed(model, tmp_path / "whole", Recipe())
    decomposed(model, tmp_path / "killed", Recipe(), probe_gb=1e-6)
    files = sorted((tmp_path / "killed").glob("*.safetensors"))
    assert len(files) == len(whole.layers)
    for lost in files[1::2]:
        lost.unlink()
    files[0].write_bytes(files[0].read_bytes()[:-9])  # cut short by a disk, not by us
    (tmp_path / "killed" / f".{files[1].name}.0-1.tmp").write_bytes(b"half")
    again = decomposed(model, tmp_path / "killed", Recipe(), probe_gb=1e-6)
    for file in files:
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    assert not list((tmp_path / "killed").glob(".*")) and again.seconds > 0


def test_ranks_by_share_are_of_the_same_size(tmp_path: Path) -> None:
    model = proxy_case.model()
    done = decomposed(model, tmp_path, Recipe(allocation="share"))
    sizes = {layer.name: layer.out_features + layer.in_features for layer in done.layers}
    uniform = decomposed(model, tmp_path / "uniform", Recipe()).ranks(0.5)
    shared = done.ranks(0.5)
    spent, allowed = (sum(ranks.get(n, 0) * size for n, size in sizes.items()) for ranks in (shared, uniform))
    assert spent <= allowed and len(set(shared.values())) > 1
    factors = done.factors(shared)
    assert {name: left.shape[1] for name, (left, _) in factors.items()} == shared


def test_the_core_form_refuses_fewer_probes_than_directions(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"form='core': layer '.*' of rank 6 has 3 probe tokens.*form=probe"):
        layer = LayerSpec(name="l", out_features=16, in_features=16, has_bias=False, kind="linear")
        probes = LayerProbes(inputs=torch.randn(3, 16), grads=torch.randn(3, 16))
        factor_layer(layer, torch.randn(16, 16), probes, recipe=Recipe(form="core"), rank=6, seed=0)


def test_a_side_without_signal_is_said_and_not_weighted() -> None:
    layer = LayerSpec(name="dead", out_features=4, in_features=6, has_bias=False, kind="linear")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator)
    probes = LayerProbes(inputs=torch.randn(30, 6, generator=generator), grads=torch.zeros(30, 4))
    factors, notes = factor_layer(layer, weight, probes, recipe=Recipe(), rank=2, seed=0)
    assert notes == ["'dead': all its output probes are zero, so its output side is not weighted"]
    alone, _ = factor_layer(layer, weight, probes, recipe=Recipe(weigh_output=False), rank=2, seed=0)
    torch.testing.assert_close(factors.left @ factors.right, alone.left @ alone.right)


def test_the_copy_shares_all_but_the_factors(tmp_path: Path) -> None:
    model = proxy_case.model("qwen2", tied=True)
    done = decomposed(model, tmp_path, Recipe())
    proxy = proxy_of(model, done.factors(done.ranks(0.5)), space="product")
    assert len(low_rank_layers(proxy)) == len(done.layers) and not low_rank_layers(model)
    own = {id(p) for p in model.parameters()}
    new = {name for name, param in proxy.named_parameters() if id(param) not in own}
    assert new == {f"{name}.{leaf}.weight" for name in low_rank_layers(proxy) for leaf in "AB"}


def test_metadata_is_json_beside_the_tensors(tmp_path: Path) -> None:
    done = decomposed(proxy_case.model(), tmp_path, Recipe())
    with safe_open(tmp_path / "00000.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["A", "B", "values"] and "energy" in file.metadata()["record"]
    assert done.probes == count_probes(batches_of(proxy_case.roles().probe, batch_tokens=64, pad_id=0), 16)
