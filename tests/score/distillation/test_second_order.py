"""Second-order weights: products against dense matrices, selections against SLSQP, resumed runs byte by byte."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from oracles import adam_quadratic, adam_scores
from score_task import POOL, TARGET, batch_of, file_bytes, loop_gradients_of, make_task, save_tiny, unit
from solver_oracles import enumerated_weights
from tamis.budget import Budget
from tamis.collect import Task
from tamis.embeddings import HiddenMean
from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.gradients.hessian import hessian_products
from tamis.score.distillation import curvature, landmark_gradients
from tamis.score.distillation.landmark_gradients import adam_vectors
from tamis.score.distillation.row_embeddings import RowEmbeddings
from tamis.score.influence_distillation import InfluenceDistillation
from tamis.score.tracin import TracIn
from tamis.selection.choose import choose
from tamis.selection.second_order import second_order_scores
from tamis.solve.leave_one_out import spearman
from tamis.store.reader import StageReader
from tamis.types import Curvature, LayerSpec, TargetScores

COLD = {"warmup": "none", "projection": "none", "feature_dtype": "float32", "weights": "second-order"}
WARM = {"warmup_rows": 6, "warmup_update_rows": 3, "warmup_epochs": 1, "lora_rank": 2, "warmup_learning_rate": 5e-3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


def dense_hessian_products(task: Task, model: nn.Module, layers: tuple[LayerSpec, ...], rows, coefficients, grads):
    """``H g`` for each row of ``grads``, one direction at a time."""
    batch = batch_of(task.target, rows)
    found = []
    for grad in grads:
        parts = torch.split(grad, [layer.numel for layer in layers])
        direction = {layer.name: part.view(1, *layer.shape).float() for layer, part in zip(layers, parts, strict=True)}
        product = hessian_products(model, [(batch, torch.tensor(coefficients))], layers, direction)
        found.append(torch.cat([product[layer.name].flatten() for layer in layers]))
    return torch.stack(found).double()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("aggregate", ["mean", "round-robin"])
def test_scores_and_products_are_those_of_dense_matrices(tmp_path: Path, family: str, aggregate: str) -> None:
    model = save_tiny(tmp_path / "model", family)
    task = make_task(tmp_path, model, groups=[0, 0, 1], aggregate=aggregate)
    scores = InfluenceDistillation(**COLD, eta=0.1).score(task)
    module, layers = task.loaded.model, task.layers()
    _, pool, target = loop_gradients_of(task, module, layers)
    pool, lengths = unit(pool), target.norm(dim=1)
    columns = [[0, 1], [2]] if aggregate == "mean" else [[0], [1], [2]]
    assert scores.curvature is not None and scores.curvature.products.shape[0] == len(columns)
    for c, rows in enumerate(columns):
        coefficients = [1 / (len(rows) * float(lengths[row])) for row in rows]
        p = pool @ sum(w * target[row] for w, row in zip(coefficients, rows, strict=True))
        np.testing.assert_allclose(scores.values[:, c], p.numpy(), rtol=0, atol=3e-6)  # float32 gradients
        products = dense_hessian_products(task, module, layers, rows, coefficients, pool)
        wanted = adam_quadratic(pool, torch.ones_like(pool[0]), products)
        got = scores.curvature.products[c]
        np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=2e-5 * float(wanted.abs().max()))
        ratio = 0.05 * float(wanted.sum()) / len(pool) / float(p.sum())
        assert scores.curvature.ratio[c] == pytest.approx(abs(ratio), rel=1e-3)
    np.testing.assert_array_equal(scores.curvature.coefficients, np.eye(len(POOL)))
    assert any("plain kernel (math)" in note for note in task.notes)


def test_adam_s_form_is_that_of_equations_8_and_9(tmp_path: Path, llama: Path) -> None:
    settings = InfluenceDistillation(**{**COLD, "warmup": "lora"}, **WARM, form="adam", eta=0.5)
    task = make_task(tmp_path, llama, aggregate="mean")
    scores = settings.score(task)
    *_, last = sorted(task.store.glob("influence-distillation-warm-up-*/step-*"))
    warm = make_task(tmp_path / "warm", last)
    module, layers = warm.loaded.model, warm.layers()
    _, pool, target = loop_gradients_of(warm, module, layers)
    scale, offset = (vector.double() for vector in adam_vectors(warm, last))
    lengths = (pool * scale).norm(dim=1)
    coefficients = [1 / (len(target) * float(length)) for length in target.norm(dim=1)]
    gradient = sum(w * row for w, row in zip(coefficients, target, strict=True))
    rows = [0, 1, 2]
    product = dense_hessian_products(warm, module, layers, rows, coefficients, (offset / lengths.mean())[None])[0]
    for momentum, pool_size in (("paper", len(pool)), ("whole", 1), ("none", None)):
        found = dataclasses.replace(settings, momentum=momentum).score(make_task(tmp_path, llama, aggregate="mean"))
        wanted = adam_scores(pool, scale, gradient, None if pool_size is None else product, step=0.5 / (pool_size or 1))
        np.testing.assert_allclose(found.values[:, 0], (wanted / lengths).numpy(), rtol=0, atol=1e-5)
    whole = pool * scale / lengths[:, None]
    products = dense_hessian_products(warm, module, layers, rows, coefficients, whole)
    wanted_q = adam_quadratic(pool / lengths[:, None], scale, products)
    assert scores.curvature is not None
    got = scores.curvature.products[0]
    np.testing.assert_allclose(got, wanted_q.numpy(), rtol=0, atol=1e-4 * float(wanted_q.abs().max()))


def convex(products: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(products.astype(np.float64))
    return (vectors * values.clip(min=0)) @ vectors.T


@pytest.mark.parametrize("eta", [0.01, 0.3, 3.0])
def test_the_selection_is_the_quadratic_programme_s(tmp_path: Path, llama: Path, eta: float) -> None:
    task = make_task(tmp_path, llama, aggregate="mean")
    scores = InfluenceDistillation(**COLD, eta=eta).score(task)
    choice = choose(scores, budget=Budget(kind="rows", value=3), tokens=task.pool.lengths, aggregate="mean")
    assert scores.curvature is not None
    n, p = len(POOL), scores.values[:, 0].astype(np.float64)
    _, (solution,) = second_order_scores(scores.values, scores.curvature, np.array([3]), np.ones(n, np.bool_))
    q = eta * convex(scores.curvature.products[0]) / n
    wanted = enumerated_weights(p, q + solution.lam * np.eye(n))
    assert solution.gap < 1e-7 and set(choice.order) == set(np.flatnonzero(wanted))
    # Weights of selected rows average 1, those of the programme sum to n.
    np.testing.assert_allclose(choice.example_weights, wanted * 3 / n, rtol=0, atol=1e-5)
    bending = wanted @ q @ wanted / 2
    assert solution.terms.second == pytest.approx(bending, rel=1e-4)
    assert solution.terms.first == pytest.approx(wanted @ p, rel=1e-4)


def test_target_rows_pick_in_turn_each_by_its_own_programme(tmp_path: Path, llama: Path) -> None:
    task = make_task(tmp_path, llama, groups=[0, 1, 1], target=TARGET)
    scores = InfluenceDistillation(**COLD, eta=1.0).score(task)
    budget = Budget(kind="rows", value=4)
    choice = choose(scores, budget=budget, tokens=task.pool.lengths)
    assert scores.curvature is not None
    assert np.bincount(choice.picked_for).tolist() == [2, 2]  # half of the budget is the first target's, of one row
    counts = np.array([2, 1, 1])  # the rows of the second target take turns
    marginal, solutions = second_order_scores(scores.values, scores.curvature, counts, np.ones(len(POOL), np.bool_))
    first = choice.order[choice.picked_for == 0][0]
    assert first == marginal[:, 0].argmax()
    for solution in solutions:  # v - p = -η Q w with a w that sums to n
        q = convex(scores.curvature.products[solution.column]) / len(POOL)
        r = q + solution.lam * np.eye(len(POOL))
        w = enumerated_weights(scores.values[:, solution.column].astype(np.float64), r)
        np.testing.assert_allclose(
            marginal[:, solution.column], scores.values[:, solution.column] - q @ w, rtol=0, atol=1e-5
        )


def bent(products: np.ndarray, values: np.ndarray, eta: float) -> TargetScores:
    """Scores with a curvature of our choice; every row is a landmark of its own."""
    n = len(values)
    curvature = Curvature(
        coefficients=np.eye(n, dtype=np.float32),
        products=products.astype(np.float32)[None],
        eta=eta,
        ratio=np.zeros(1, np.float32),
    )
    return TargetScores(
        rows=np.arange(n),
        values=values.astype(np.float32)[:, None],
        group=np.zeros(1, np.int64),
        target_names=("t",),
        weights="second-order",
        curvature=curvature,
    )


def test_rows_that_say_the_same_are_not_both_taken_by_hand() -> None:
    # Rows 0 and 1 bend the loss along one line, row 2 along another: the second order takes 0 and 2, the first 0 and 1.
    products = np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    values = np.array([3.0, 2.9, 2.0, 0.0])
    flat = choose(bent(products, values, 1e-9), budget=Budget(kind="rows", value=2), tokens=np.ones(4, np.int64))
    curved = choose(bent(products, values, 4.0), budget=Budget(kind="rows", value=2), tokens=np.ones(4, np.int64))
    assert sorted(flat.order) == [0, 1] and sorted(curved.order) == [0, 2]
    assert curved.example_weights.sum() == pytest.approx(2)
    assert any("first-order weights would have done" in note for note in flat.notes)
    assert not any("first-order weights would have done" in note for note in curved.notes)


def test_without_curvature_weights_are_those_of_the_first_order() -> None:
    values = np.cos(np.arange(8.0))
    second = bent(np.zeros((8, 8)), values, 0.1)
    first = dataclasses.replace(second, weights="first-order", curvature=None)
    budget, tokens = Budget(kind="rows", value=3), np.ones(8, np.int64)
    found, wanted = (choose(scores, budget=budget, tokens=tokens) for scores in (second, first))
    np.testing.assert_array_equal(found.order, wanted.order)
    np.testing.assert_allclose(found.example_weights, wanted.example_weights, rtol=0, atol=1e-6)
    # Section 5 of the specification, case 1: the same weights on the pool's scale of 8.
    reference = np.array([3.364157703435, 3.072676065173, 1.563166231393])
    np.testing.assert_allclose(found.example_weights[[0, 6, 7]] * 8 / 3, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first_of", [None, np.array([0, 1, 2, 3, 4, 4, 6, 3])])
def test_lambda_is_that_of_equation_7_in_both_orders(first_of: np.ndarray | None) -> None:
    values = np.cos(np.arange(8.0))
    values[[5, 7]] = values[[4, 3]]  # so that copies are alike
    second = bent(np.zeros((8, 8)), values, 1e-9)
    first = dataclasses.replace(second, weights="first-order", curvature=None)
    budget, tokens = Budget(kind="rows", value=3), np.ones(8, np.int64)
    said = []
    for scores in (second, first):
        (note,) = choose(scores, budget=budget, tokens=tokens, first_of=first_of).notes
        said.append(float(re.search(r"lambda ([0-9.e-]+)", note)[1]))
    n = 8 if first_of is None else 6
    ranked = np.sort(values if first_of is None else values[[0, 1, 2, 3, 4, 6]])[::-1]
    wanted = (ranked[:3] - ranked[3]).sum() / n  # L_4 / n of the specification
    assert said == pytest.approx([wanted, wanted], rel=6e-3)  # notes have three digits


def test_copies_share_one_place_in_the_programme() -> None:
    products, values = np.eye(4), np.array([3.0, 3.0, 2.0, 1.0])
    scores = bent(products, values, 1e-6)
    found = choose(
        scores,
        budget=Budget(kind="rows", value=2),
        tokens=np.ones(4, np.int64),
        first_of=np.array([0, 0, 2, 3]),
    )
    assert sorted(found.order) == [0, 2]
    np.testing.assert_allclose(
        found.example_weights[[0, 2]], [4 / 3, 2 / 3], rtol=0.06
    )  # margins 2 and 1, but for lambda


def test_rows_that_stand_in_for_rows_already_taken_weigh_something() -> None:
    # Both columns want row 0 and, far behind, row 1; the second column must make do with rows 1 and 2 or 3.
    values = np.array([[5.0, 5.0], [1.0, 1.0], [0.5, 0.4], [0.4, 0.5]], np.float32)
    one = bent(np.eye(4), values[:, 0], 1e-6)
    assert one.curvature is not None
    products = np.repeat(one.curvature.products, 2, axis=0)
    scores = dataclasses.replace(
        one,
        values=values,
        group=np.arange(2),
        target_names=("t", "u"),
        curvature=dataclasses.replace(one.curvature, products=products, ratio=np.zeros(2, np.float32)),
    )
    found = choose(scores, budget=Budget(kind="rows", value=4), tokens=np.ones(4, np.int64))
    assert sorted(found.order) == [0, 1, 2, 3] and (found.example_weights > 0).all()
    for column in (0, 1):
        mine = found.order[found.picked_for == column]
        assert found.example_weights[mine].mean() == pytest.approx(1)
        assert np.argmax(found.example_weights[mine]) == np.argmax(values[mine, column])


def test_curvature_of_other_columns_is_refused() -> None:
    scores = bent(np.eye(3), np.ones(3), 0.1)
    wide = dataclasses.replace(scores, values=np.ones((3, 2), np.float32), group=np.zeros(2, np.int64))
    with pytest.raises(InvalidInput, match="second-order term is of 1 columns, the scores are of 2"):
        choose(wide, budget=Budget(kind="rows", value=2), tokens=np.ones(3, np.int64))


CARRIED = {**COLD, "landmarks": 14, "hessian_landmarks": 6, "embedding": "hidden-mean", "kernel": "rbf", "scale": 2.0}
POOL_OF_20 = tuple((f"{prompt} {i}", answer) for i, (prompt, answer) in enumerate(POOL * 3))[:20]


def test_the_term_is_carried_to_other_rows_as_kernel_ridge_has_it(tmp_path: Path, llama: Path) -> None:
    settings = InfluenceDistillation(**CARRIED, damping=0.1, centred=False, eta=0.1)
    task = make_task(tmp_path, llama, pool=POOL_OF_20)
    scores = settings.score(task)
    assert scores.curvature is not None and scores.curvature.products.shape == (3, 6, 6)
    found = scores.curvature.coefficients
    landmarks = np.flatnonzero((found == 1).sum(1) == 1)
    assert len(landmarks) == 6 and set(landmarks) <= set(np.flatnonzero(scores.extra["is_landmark"]))
    embedded = RowEmbeddings(task, dtype="float32").of(HiddenMean(), task.pool, task.rows)(0, 20).double()
    distances = torch.cdist(unit(embedded), unit(embedded)).square()
    own = distances[landmarks][:, landmarks]
    median = torch.tensor(np.median(own.numpy()[np.triu_indices(6, 1)]))
    kernel = torch.exp(-distances[:, landmarks] / (2 * median))
    wanted = kernel @ torch.linalg.inv(kernel[landmarks] + 0.1 * torch.eye(6))
    others = np.setdiff1d(np.arange(20), landmarks)
    np.testing.assert_allclose(found[others], wanted[others].numpy(), rtol=0, atol=1e-4)  # float32 embeddings
    passing = dataclasses.replace(settings, keep_embeddings=False).score(make_task(tmp_path, llama, pool=POOL_OF_20))
    assert passing.curvature is not None
    np.testing.assert_allclose(passing.curvature.coefficients, found, rtol=0, atol=1e-6)


def test_what_to_expect_of_the_carried_term_is_found_by_leaving_out_its_landmarks(tmp_path: Path, llama: Path) -> None:
    settings = InfluenceDistillation(**CARRIED, damping=0.1, centred=False, eta=0.1)
    task = make_task(tmp_path, llama, pool=POOL_OF_20, aggregate="mean")
    scores = settings.score(task)
    assert scores.curvature is not None
    landmarks = np.flatnonzero((scores.curvature.coefficients == 1).sum(1) == 1)
    embedded = RowEmbeddings(task, dtype="float32").of(HiddenMean(), task.pool, task.rows)(0, 20).double()
    distances = torch.cdist(unit(embedded), unit(embedded)).square()[landmarks][:, landmarks]
    median = np.median(distances.numpy()[np.triu_indices(6, 1)])
    kernel = torch.exp(-distances / (2 * median)).numpy()
    _, pool, _ = loop_gradients_of(task, task.loaded.model, task.layers())
    grads, pulls = unit(pool)[landmarks].numpy(), scores.curvature.products[0].sum(1).astype(np.float64)
    cosines, rebuilt = [], []
    for out in range(6):  # a fit without the row, and its answer for it
        kept = [place for place in range(6) if place != out]
        c = kernel[out, kept] @ np.linalg.inv(kernel[np.ix_(kept, kept)] + 0.1 * np.eye(5))
        whole = c @ grads[kept]
        cosines.append(whole @ grads[out] / np.linalg.norm(whole))
        rebuilt.append(c @ pulls[kept])
    (rank,) = spearman(torch.tensor(rebuilt)[:, None], torch.from_numpy(pulls)[:, None])
    (note,) = [said for said in task.notes if said.startswith("Expected of the second-order term")]
    assert "among its 6 landmarks" in note and f"a cosine of {np.mean(cosines):.2f}, " in note
    assert note.endswith(f"rank correlation of {rank:.2f}")


def test_a_term_that_cannot_be_foretold_is_a_warning_and_one_that_can_is_a_note(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = InfluenceDistillation(**CARRIED, damping=0.1, centred=False, eta=0.1)
    first = make_task(tmp_path, llama, pool=POOL_OF_20, aggregate="mean")
    scores = settings.score(first)
    assert scores.curvature is not None
    landmarks = np.flatnonzero((scores.curvature.coefficients == 1).sum(1) == 1)
    embedded = RowEmbeddings(first, dtype="float32").of(HiddenMean(), first.pool, first.rows)(0, 20).double()
    distances = torch.cdist(unit(embedded), unit(embedded)).square()[landmarks][:, landmarks]
    kernel = torch.exp(-distances / (2 * np.median(distances.numpy()[np.triu_indices(6, 1)]))).numpy()

    without = np.zeros((6, 6))  # row by row, a fit that leaves the row out
    for out in range(6):
        kept = [place for place in range(6) if place != out]
        without[out, kept] = kernel[out, kept] @ np.linalg.inv(kernel[np.ix_(kept, kept)] + 0.1 * np.eye(5))

    def correlation(pulls: np.ndarray) -> float:
        return float(spearman(torch.from_numpy(without @ pulls)[:, None], torch.from_numpy(pulls)[:, None])[0])

    orders = [np.array(order, np.float64) for order in itertools.permutations(range(6))]
    tried = {correlation(pulls): pulls for pulls in orders}
    for wanted in (max(c for c in tried if c < 0.49), min(c for c in tried if c > 0.51)):  # nearest to .5
        products = np.diag(tried[wanted]).astype(np.float32)[None]  # whose sums are the pulls
        monkeypatch.setattr(curvature.LandmarkHessians, "products", lambda self, rows, products=products: products)
        task = make_task(tmp_path / f"{wanted:.6f}", llama, pool=POOL_OF_20, aggregate="mean")
        settings.score(task)
        told, warned = (
            [said for said in sentences if said.startswith("Expected of the second-order term")]
            for sentences in (task.notes, task.warnings)
        )
        assert (len(told), len(warned)) == ((1, 0) if wanted >= 0.5 else (0, 1))
        assert f"a mean rank correlation of {wanted:.2f}" in (*told, *warned)[0]
        if warned:
            assert warned[0].endswith(
                "That is too little to select by: set weights=first-order or none, or raise hessian_landmarks."
            )


def test_the_size_of_the_term_alone_costs_one_product_and_is_the_same(tmp_path: Path, llama: Path) -> None:
    whole = make_task(tmp_path, llama)
    InfluenceDistillation(**COLD, eta=1e-4).score(whole)
    alone = make_task(tmp_path / "alone", llama)
    plain = InfluenceDistillation(**{**COLD, "weights": "none"}, hessian_ratio=True, eta=1e-4).score(alone)
    assert plain.weights == "equal" and plain.curvature is None
    (first,), (second,) = (
        [note for note in task.notes if note.startswith("The second-order term is")] for task in (whole, alone)
    )
    assert first == second and "At 5 % or less the first order may stand alone" in first
    bold = make_task(tmp_path / "bold", llama)
    InfluenceDistillation(**{**COLD, "weights": "none"}, hessian_ratio=True, eta=100.0).score(bold)
    assert any("set weights=second-order, or lower eta" in said for said in bold.warnings)


def test_an_interrupted_run_ends_in_the_same_bytes(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = InfluenceDistillation(**CARRIED, eta=0.1, memory_gb=2e-4)
    whole = make_task(tmp_path / "whole", llama, pool=POOL_OF_20)
    wanted = settings.score(whole)
    assert wanted.curvature is not None
    real, calls = curvature.hessian_products, []

    def dies(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(curvature, "hessian_products", dies)
    with pytest.raises(KeyboardInterrupt):
        settings.score(make_task(tmp_path / "cut", llama, pool=POOL_OF_20))
    monkeypatch.setattr(curvature, "hessian_products", real)
    resumed = make_task(tmp_path / "cut", llama, pool=POOL_OF_20)
    found = settings.score(resumed)
    assert found.curvature is not None
    np.testing.assert_array_equal(found.curvature.products, wanted.curvature.products)
    assert resumed.notes == whole.notes
    cut, uncut = (file_bytes(tmp_path / name / "store") for name in ("cut", "whole"))
    assert {name for name in uncut if name.startswith("hessian-products")}
    assert cut == uncut


def test_batches_that_do_not_fit_are_cut_in_two_and_stay_so(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = InfluenceDistillation(**CARRIED, eta=0.1)
    real, tokens = curvature.hessian_products, []

    def short_of_memory(model: object, batches: object, *others: object) -> object:
        def seen():
            for batch, coefficients in batches:
                tokens.append(batch.input_ids.numel())
                if batch.input_ids.numel() > 45:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                yield batch, coefficients

        return real(model, seen(), *others)

    monkeypatch.setattr(curvature, "hessian_products", short_of_memory)
    task = make_task(tmp_path / "short", llama, pool=POOL_OF_20, aggregate="mean")
    whole = make_task(tmp_path / "mean", llama, pool=POOL_OF_20, aggregate="mean")
    found = settings.score(task).curvature
    assert max(tokens) > 45 and tokens[-1] <= 45
    monkeypatch.setattr(curvature, "hessian_products", real)
    wanted = settings.score(whole).curvature
    assert found is not None and wanted is not None
    scale = float(np.abs(wanted.products).max())
    np.testing.assert_allclose(found.products, wanted.products, rtol=0, atol=1e-5 * scale)
    limits = [path for path in (tmp_path / "short" / "store").rglob("limits-*.json") if "hessian" in str(path)]
    assert len(limits) == 1, "a resume has to cut its batches in the same way"


def test_a_single_row_whose_hessian_does_not_fit_is_an_error_that_says_what_to_lower(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never_fits(model: object, batches: object, *others: object) -> object:
        next(iter(batches))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(curvature, "hessian_products", never_fits)
    with pytest.raises(
        Unsupported,
        match=r"row \d+ \(0-based\): a Hessian product over its \d+ tokens alone .* "
        r"lower --set memory_gb=2 or --max-length",
    ):
        InfluenceDistillation(**CARRIED, eta=0.1).score(make_task(tmp_path, llama, pool=POOL_OF_20))


def test_what_adam_s_offset_is_decides_carried_scores_in_a_store_that_holds_others(tmp_path: Path, llama: Path) -> None:
    settings = InfluenceDistillation(**{**CARRIED, "warmup": "lora"}, **WARM, form="adam", damping=0.1, eta=50.0)
    none, whole, bolder = (
        dataclasses.replace(settings, momentum=momentum, eta=eta).score(make_task(tmp_path, llama, pool=POOL_OF_20))
        for momentum, eta in (("none", 50.0), ("whole", 50.0), ("whole", 100.0))
    )
    carried = ~none.extra["is_landmark"]
    assert carried.sum() == 6
    # All that is carried is linear in the landmarks' scores, whose offsets are eta times something.
    first, second = (found.values[carried] - none.values[carried] for found in (whole, bolder))
    assert np.abs(first).max() > 1e-3
    np.testing.assert_allclose(second, 2 * first, rtol=0, atol=1e-4 * np.abs(second).max())


def test_where_every_row_is_a_landmark_they_are_not_all_compared(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products between all rows of a large pool would not fit in memory."""
    real, asked = landmark_gradients._gram, []

    def counted(reader: StageReader, rows: np.ndarray) -> torch.Tensor:
        asked.append(len(rows))
        return real(reader, rows)

    monkeypatch.setattr(landmark_gradients, "_gram", counted)
    settings = {name: value for name, value in CARRIED.items() if name not in ("embedding", "kernel", "scale")}
    settings |= {"landmarks": "all", "weights": "none"}
    plain = InfluenceDistillation(**{**settings, "hessian_landmarks": 256})
    found = plain.score(make_task(tmp_path, llama, pool=POOL_OF_20))
    assert found.extra["is_landmark"].all() and asked == []
    sized = InfluenceDistillation(**settings, eta=0.1, hessian_ratio=True)
    sized.score(make_task(tmp_path, llama, pool=POOL_OF_20))
    assert asked == []  # the term's size alone is carried nowhere
    bent = InfluenceDistillation(**{**CARRIED, "landmarks": "all"}, eta=0.1)
    task = make_task(tmp_path, llama, pool=POOL_OF_20)
    scores = bent.score(task)
    assert asked and set(asked) == {6}
    np.testing.assert_array_equal(scores.values, found.values)
    assert not any(stage.name.startswith("landmark-scores") for stage in task.stages)
    said = " ".join(task.notes)
    assert "carried the second-order term, not the scores, from 6 landmarks" in said
    assert "carried the scores" not in said and "Expected on rows that are no landmarks" not in said
    assert scores.diagnosis == {"verdict": "all scores are exact up to the projection"}
    assert scores.curvature is not None and (scores.curvature.coefficients != 0).any(1).all()


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        ({"dtype": "bfloat16"}, InvalidSettings, "in bfloat16 would be mostly rounding; load the model with --dtype"),
        ({"attention": "flex_attention"}, Unsupported, "'flex_attention' does not allow; load the model with --att"),
    ],
)
@pytest.mark.parametrize("wanted", [{"weights": "second-order"}, {"hessian_ratio": True}])
def test_a_model_that_cannot_be_differentiated_twice_is_refused_before_the_warm_up(
    tmp_path: Path, llama: Path, model: dict, error: type[Exception], said: str, wanted: dict
) -> None:
    task = make_task(tmp_path, llama)
    before = set(task.store.iterdir())
    task.model_settings = dataclasses.replace(task.model_settings, **model)
    with pytest.raises(error, match=said):
        InfluenceDistillation(**wanted, **WARM).score(task)
    assert set(task.store.iterdir()) == before


def test_the_published_variant_with_true_gradients_scores_every_row_exactly(tmp_path: Path, llama: Path) -> None:
    made = InfluenceDistillation(
        preset="true-gradients", warmup="none", form="raw", projection="none", projection_dim=None
    )
    assert made.landmarks == "all" and made.weights == "none"
    task = make_task(tmp_path, llama)
    scores = made.score(task)
    assert scores.extra["is_landmark"].all()
    wanted = TracIn(projection="none").score(make_task(tmp_path / "b", llama))
    np.testing.assert_allclose(scores.values, wanted.values, rtol=0, atol=1e-3)  # stored in float16
