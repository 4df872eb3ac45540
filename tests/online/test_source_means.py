"""Candidates that have the mean score of their source, against plain sums over materialised gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from online_runs import arguments, collate, rows_of
from online_steps import CANDIDATES, TARGET, autograd_rows, calls_of, optimizer_of, split
from tamis.errors import InvalidInput, InvalidSettings
from tamis.gradients.parameters import param_matrices
from tamis.gradients.rows import RowGradients
from tamis.model.trainable import trainable_layers
from tamis.online import FilterThenWeight, Greats, Less, StepSettings, Tilt, TracIn
from tamis.online.adam_state import AdamMoments, read_adam
from tamis.online.evidence import Measured
from tamis.online.fate import read_candidates
from tamis.online.measure import measure_alignments
from tamis.online.source_means import SourceMeans, drawn_by, source_numbers
from tamis.online.step import OnlineStep
from tamis.online.trainer import OnlineTrainer
from tamis.seeds import child_seed
from tamis.types import IntArray
from tiny_models import random_batch, tiny_model

TOP = FilterThenWeight(keep=2, oversample=3, filter="top", weights="none")
SOURCES = np.array([0, 1, 0, 2, 1, 0])  # of the rows of CANDIDATES, which are 0 to 5 in the data


def found_in(rows: list[int], alignments: list[float], good: list[bool] | None = None) -> tuple[Tensor, Measured]:
    values = torch.tensor(alignments, dtype=torch.float64)
    known = torch.ones(len(rows), dtype=torch.bool) if good is None else torch.tensor(good)
    return torch.tensor(rows), Measured(losses=values, alignments=values, good=known)


def sample_of(*, rows: int) -> IntArray:
    """Which of the candidates a step with seed 0 scores."""
    means = SourceMeans(SOURCES, every=2, rows=rows, memory=0.5)
    return means.sample(torch.arange(6), seed=child_seed(0, "sample of sources"))


def alignments_of(model: nn.Module, optimizer: torch.optim.Optimizer, rows: list[int], *, adam: bool) -> Tensor:
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    params = dict(model.named_parameters())
    goal = {name: grads.mean(dim=0) for name, grads in autograd_rows(model, TARGET, names).items()}
    if adam:
        moments = read_adam(optimizer, {name: params[name] for name in names})
        goal = {name: moments[name].diagonal() * grad for name, grad in goal.items()}
    grads = autograd_rows(model, CANDIDATES, names)
    return sum((grads[name].flatten(1)[rows] @ goal[name].flatten() for name in names), torch.zeros(len(rows)).double())


@pytest.mark.parametrize("method", [TOP, TracIn(keep=2, oversample=3)], ids=["adam", "raw"])
@pytest.mark.parametrize(("family", "lora"), [("gpt2", True), ("gpt2", False), ("llama", True)])
def test_every_candidate_has_the_mean_of_the_scored_rows_of_its_source(method: Any, family: str, lora: bool) -> None:
    """Two rows of each source are scored: of the first, which has three, two at random."""
    model = tiny_model(family, lora=lora)
    optimizer = optimizer_of(model)
    scored = sample_of(rows=2)
    assert len(scored) == 5
    b = alignments_of(model, optimizer, scored.tolist(), adam=method is TOP).numpy()
    mean = np.array([b[SOURCES[scored] == source].mean() for source in range(3)])
    step = OnlineStep(
        model, method, StepSettings(candidates="sources:2", source_rows=2, source_temperature=0), sources=SOURCES
    )
    assert step.looks([CANDIDATES], cold=False)
    with calls_of(model) as calls:
        found = step.propose([CANDIDATES], [TARGET], optimizer)
    assert calls == [3, 5, 2]  # target, the scored, the chosen
    np.testing.assert_allclose(found.alignments, mean[SOURCES], rtol=1e-9 if family == "gpt2" else 1e-4)
    # The first two rows of the best source, and of the next where it has but one.
    best = [row for source in np.argsort(-mean) for row in np.flatnonzero(source == SOURCES)][:2]
    assert found.choice.rows.tolist() == best
    names = list(step.params)
    own = autograd_rows(model, CANDIDATES, names)
    for name, grad in found.gradient.items():
        torch.testing.assert_close(grad, own[name][best].sum(dim=0), rtol=1e-5, atol=1e-8)
    assert np.isfinite(found.losses).nonzero()[0].tolist() == sorted(best)
    assert not len(found.dropped)
    # The next choice neither looks nor scores.
    assert not step.looks([CANDIDATES], cold=False)
    with calls_of(model) as calls:
        again = step.propose([CANDIDATES], [], optimizer)
    assert calls == [2]
    assert (again.score_age, again.target_age, again.target_loss) == (1, 1, None)
    assert again.choice.rows.tolist() == best
    assert step.looks([CANDIDATES], cold=False)


def test_who_is_scored_and_who_is_drawn_follow_the_seed() -> None:
    """One row of each source is scored, which the source's mean gives away by autograd, and two rows are drawn evenly.

    Another choice of the same rows by the same weights differs by its seed alone: in time all rows are scored, and
    drawn, where sources were scored and where they were not.
    """
    model = tiny_model("gpt2", lora=True, blocks=1)
    optimizer, count = optimizer_of(model), 24
    b = alignments_of(model, optimizer, list(range(6)), adam=False).numpy()
    settings = StepSettings(candidates="sources:2", source_rows=1, source_memory=0, source_temperature=1e9)

    def proposed(count: int) -> tuple[list[list[int]], list[list[int]]]:
        """The row that every candidate has the score of, at every other choice, and the rows drawn at each."""
        step = OnlineStep(model, TracIn(keep=2, oversample=3), settings, sources=SOURCES)
        scored, drawn = [], []
        for seed in range(2 * count):
            found = step.propose([CANDIDATES], [TARGET], optimizer, seed=seed)
            assert found.alignments is not None
            same = np.isclose(found.alignments[:, None], b, rtol=1e-9, atol=0)
            assert (same.sum(axis=1) == 1).all()
            scored.append(same.argmax(axis=1).tolist())
            drawn.append(found.choice.rows.tolist())
        assert scored[0::2] == scored[1::2]  # a choice that scores nobody goes by the scores of the last
        return scored[0::2], drawn

    scored, drawn = proposed(count)
    assert proposed(3) == (scored[:3], drawn[:6])
    for candidate, source in enumerate(SOURCES):
        # By chance one in 10,000 misses one of three rows.
        assert {rows[candidate] for rows in scored} == set(np.flatnonzero(source == SOURCES))
    for part in (drawn[0::2], drawn[1::2]):
        assert {row for rows in part for row in rows} == set(range(6))
        assert len({tuple(sorted(rows)) for rows in part}) > 7  # of 15


def test_scores_in_tokens_are_of_the_tokens_that_an_update_counts() -> None:
    model = tiny_model("gpt2", lora=True)
    optimizer = optimizer_of(model)
    tokens = CANDIDATES.supervised[:, 1:].sum(dim=1).double()
    scored = sample_of(rows=1)
    b = (alignments_of(model, optimizer, scored.tolist(), adam=False) * (tokens / tokens.mean())[scored]).numpy()
    mean = np.array([b[SOURCES[scored] == source].mean() for source in range(3)])
    settings = StepSettings(candidates="sources:1", source_rows=1, reduction="tokens")
    found = OnlineStep(model, TracIn(keep=2, oversample=3), settings, sources=SOURCES).propose(
        [CANDIDATES], [TARGET], optimizer
    )
    np.testing.assert_allclose(found.alignments, mean[SOURCES], rtol=1e-9)
    assert found.divisor == float(tokens[found.choice.rows].sum())


def test_micro_batches_and_a_checkpoint_change_nothing() -> None:
    model = tiny_model("gpt2", lora=True)
    optimizer = optimizer_of(model)
    settings = StepSettings(candidates="sources:3", source_rows=1)
    step, again = (OnlineStep(model, Less(keep=2, oversample=3), settings, sources=SOURCES) for _ in range(2))
    whole = step.propose([CANDIDATES], [TARGET], optimizer)
    again.load_state_dict({name: value.clone() for name, value in step.state_dict().items()})
    other = OnlineStep(model, Less(keep=2, oversample=3), settings, sources=SOURCES)
    parts = other.propose(split(CANDIDATES, 2), split(TARGET, 1), optimizer)
    assert parts.choice.rows.tolist() == whole.choice.rows.tolist()
    np.testing.assert_allclose(parts.alignments, whole.alignments, rtol=1e-9)
    one, resumed = (each.propose([CANDIDATES], [], optimizer) for each in (step, again))
    assert resumed.choice.rows.tolist() == one.choice.rows.tolist()
    assert resumed.score_age == one.score_age == 1
    assert torch.equal(again.work(), step.work())


def test_later_scores_count_more_and_sources_out_of_sight_keep_theirs() -> None:
    source = np.array([0, 0, 0, 1, 1, 2])
    means = SourceMeans(source, every=4, rows=2, memory=0.5)
    means.take(*found_in([0, 1, 3], [1.0, 3.0, 5.0]))
    means.take(*found_in([2, 5], [8.0, 4.0]))
    found, good = means.next(torch.arange(6))
    expected = [(0.5 * (1 + 3) + 8) / (0.5 * 2 + 1), 5.0, 4.0]
    np.testing.assert_allclose(found, np.array(expected)[source])
    assert good.all()


def test_rows_that_are_not_finite_enter_no_mean_and_are_not_chosen_now() -> None:
    means = SourceMeans(np.array([0, 0, 1, 2]), every=2, rows=2, memory=0.5)
    means.take(*found_in([0, 1, 2], [1.0, np.nan, 5.0], [True, False, True]))
    found, good = means.next(torch.arange(4))
    np.testing.assert_allclose(found, [1.0, 1.0, 5.0, np.nan])  # nothing was seen of the last source
    assert good.tolist() == [True, False, True, True]


def test_scores_are_due_at_one_choice_in_so_many() -> None:
    means = SourceMeans(np.array([0, 0, 1]), every=3, rows=1, memory=0.5)
    due = []
    for _ in range(7):
        due.append(means.is_due)
        if means.is_due:
            means.take(*found_in([0, 2], [1.0, 2.0]))
        means.next(torch.arange(3))
    assert due == [True, False, False, True, False, False, True]
    assert means.scorings == 3


def test_the_sample_is_of_every_source_as_many_as_there_are_and_at_random() -> None:
    source = np.array([2, 0, 1, 0, 0, 2])
    means = SourceMeans(source, every=2, rows=2, memory=0.5)
    places = torch.tensor([5, 4, 3, 2, 1, 0])  # sources 2, 0, 0, 1, 0, 2
    drawn = [means.sample(places, seed=seed) for seed in range(600)]
    for rows in drawn:
        assert (np.diff(rows) > 0).all()
        assert np.bincount(source[places.numpy()][rows]).tolist() == [2, 1, 2]
    times = np.bincount(np.concatenate(drawn), minlength=6)[[1, 2, 4]]  # of the three of source 0, two at a time
    np.testing.assert_allclose(times / 600, 2 / 3, atol=0.08)


def test_a_checkpoint_of_other_sources_is_refused() -> None:
    state = SourceMeans(np.array([0, 1, 1]), every=2, rows=1, memory=0.5).state_dict()
    for other in ([0, 0, 1], [0, 1, 2]):
        with pytest.raises(InvalidInput, match=r"of a pool with 2 sources.*resume with the same train_dataset"):
            SourceMeans(np.array(other), every=2, rows=1, memory=0.5).load_state_dict(state)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_draws_are_in_proportion_to_exponentials_of_the_standardised_means(temperature: float) -> None:
    """The probability of the first place, and of a pair of first places by drawing twice without replacement."""
    values = torch.tensor([3.0, 1.0, 2.0, 2.0, np.nan], dtype=torch.float64)
    z = (values[:4] - 2.0) / np.sqrt(0.5)
    p = torch.softmax(torch.cat([z, torch.zeros(1)]) / temperature, dim=0).numpy()  # the last has no mean: average
    count = 20_000
    drawn = np.array(
        [
            drawn_by(values, temperature=temperature, seed=seed).argsort(descending=True)[:2].tolist()
            for seed in range(count)
        ]
    )
    first = np.bincount(drawn[:, 0], minlength=5) / count
    np.testing.assert_allclose(first, p, atol=4 * np.sqrt(0.25 / count))
    pair = ((drawn[:, 0] == 0) & (drawn[:, 1] == 2)).mean()
    assert pair == pytest.approx(p[0] * p[2] / (1 - p[0]), abs=4 * np.sqrt(0.25 / count))


def test_equal_means_are_drawn_evenly_and_temperature_zero_keeps_the_order() -> None:
    values = torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)
    places = [int(drawn_by(values, temperature=0.5, seed=seed).argmax()) for seed in range(3000)]
    np.testing.assert_allclose(np.bincount(places) / 3000, 1 / 3, atol=0.04)
    assert drawn_by(values, temperature=0.0, seed=0).tolist() == [0.0, 0.0, 0.0]
    assert drawn_by(torch.tensor([1.0, 3.0]), temperature=0.0, seed=5).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("form", ["raw", "adam", "secant", "jacobian"])
def test_a_process_without_a_scored_row_takes_part_in_all_forms(form: Any) -> None:
    """Its sums are zeros in the type that others send, float32 at least."""
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    matrices = param_matrices(model, trainable_layers(model))
    params = {name: param for matrix in matrices for name, param in matrix.params}
    rows, goal = RowGradients(matrices), {name: torch.ones_like(param).float() for name, param in params.items()}
    moments = {
        name: AdamMoments(
            exp_avg=torch.zeros_like(param).float(), exp_avg_sq=torch.ones_like(param).float(), step=1, beta1=0.9,
            beta2=0.99, eps=1e-8, rate=1.0, largest_exp_avg_sq=None,
        )
        for name, param in params.items()
    }  # fmt: skip
    total = rows.weighted(torch.zeros(0, dtype=torch.float64))
    assert {name: grad.shape for name, grad in total.items()} == {name: p.shape for name, p in params.items()}
    assert all(grad.dtype == torch.float32 and not grad.any() for grad in total.values())
    assert measure_alignments(form, rows, goal, moments, mean=total).shape == (0,)


def test_names_become_numbers_and_a_single_source_is_refused() -> None:
    assert source_numbers(["b", None, "a", "b"]).tolist() == [0, 1, 2, 0]
    for names, said in ((["a", "a"], r"all 2 rows of the pool are of one source \('a'\)"), ([None], "one source, so")):
        with pytest.raises(InvalidInput, match=said):
            source_numbers(names)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Tilt(), "keeps all candidates"),
        (Greats(), "compares candidates with each other.*tracin, less and filter-then-weight"),
        (FilterThenWeight(), "compares candidates with each other"),
        (FilterThenWeight.paper(), "published form"),
    ],
)
def test_methods_that_need_every_candidate_are_refused(method: Any, said: str) -> None:
    with pytest.raises(InvalidSettings, match=rf"candidates='sources:4': method '{method.name}' .*{said}"):
        OnlineStep(tiny_model("gpt2", lora=True), method, StepSettings(candidates="sources:4"), sources=SOURCES)


def test_settings_without_meaning_are_refused() -> None:
    for text in ("sources", "sources:0", "sources:x"):
        with pytest.raises(InvalidSettings, match="'sources:K'"):
            _ = StepSettings(candidates=text).candidates_kind
    wrong: list[dict[str, Any]] = [{"source_rows": 0}, {"source_rows": 1.5}, {"source_memory": -0.1}]
    wrong += [{"source_memory": 1.5}, {"source_temperature": -1}, {"source_temperature": np.inf}]
    for values in wrong:
        with pytest.raises(InvalidSettings, match=next(iter(values))):
            StepSettings(**values)
    with pytest.raises(InvalidSettings, match="target_every=2 with candidates='sources:4'"):
        StepSettings(candidates="sources:4", target_every=2)


def trainer_of(folder: Path, model: nn.Module, temperature: float, **changes: Any) -> OnlineTrainer:
    return OnlineTrainer(
        model=model, args=arguments(folder, max_steps=9, **changes), train_dataset=rows_of(40, seed=1, sources=True),
        target_dataset=rows_of(7, seed=2), data_collator=collate, selection=Less(keep=2, oversample=4),
        step_settings=StepSettings(candidates="sources:3", source_rows=1, source_temperature=temperature),
        target_rows=3, forecast_every=4,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_run_scores_one_choice_in_three_and_resumes_bit_for_bit(tmp_path: Path, temperature: float) -> None:
    whole, halves = tiny_model("gpt2", lora=True), [tiny_model("gpt2", lora=True) for _ in range(2)]
    trainer = trainer_of(tmp_path / "a", whole, temperature)
    with calls_of(whole) as calls:
        trainer.train()
    # Target, one row of each source, the chosen; then the chosen twice. Forecasts of updates 4 and 8 look at target
    # rows after them, and before the second of them, which looked at none itself.
    assert calls == [3, 2, 2, 2, 2, 3, 2, 2, 3, 2, 2, 3, 2, 2, 2, 3, 3, 2]
    logged = [entry for entry in trainer.state.log_history if "selection/scored" in entry]
    assert [entry["selection/scored"] for entry in logged] == [2, 0, 0] * 3
    assert not any("selection/overlap_with_top" in entry for entry in logged)  # rows of a source are all alike
    seen = read_candidates(tmp_path / "a" / "candidates").to_pandas()
    assert (seen.groupby(["step", "source"])["alignment"].nunique() == 1).all()
    for _, part in seen.groupby("step") if temperature == 0 else ():
        best = part.loc[part["alignment"].idxmax(), "source"]
        assert (part[part["kept"]]["source"] == best).sum() == min(2, (part["source"] == best).sum())
    halved = {"save_strategy": "steps", "save_steps": 5}
    trainer_of(tmp_path / "b", halves[0], temperature, **halved).train()
    second = trainer_of(tmp_path / "b", halves[1], temperature, **halved)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    for (name, a), b in zip(whole.named_parameters(), halves[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(second.work(), trainer.work())
    assert read_candidates(tmp_path / "b" / "candidates").to_pandas().equals(seen)


def test_many_sources_are_warned_of_and_target_rows_are_half_of_those_scored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(40, seed=1).add_column("source", [f"s{i % 5}" for i in range(40)])
    trainer = OnlineTrainer(
        model=tiny_model("gpt2", lora=True), args=arguments(tmp_path, max_steps=3, logging_steps=3), train_dataset=rows,
        target_dataset=rows_of(7, seed=2), data_collator=collate, selection=Less(keep=2, oversample=4),
        step_settings=StepSettings(candidates="sources:2", source_rows=1), forecast_every=0,
    )  # fmt: skip
    assert "5 sources and 8 candidates to a choice: most sources are seldom scored" in caplog.text
    trainer.train()
    seen = [e["selection/target_rows_seen"] for e in trainer.state.log_history if "selection/target_rows_seen" in e]
    assert seen == [4.0]  # two looks at two rows each, of five rows scored


def test_a_pool_of_one_source_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="all 40 rows of the pool are of one source, so there is nothing"):
        OnlineTrainer(
            model=tiny_model("gpt2", lora=True), args=arguments(tmp_path), train_dataset=rows_of(40, seed=1),
            target_dataset=rows_of(7, seed=2), data_collator=collate, selection=Less(keep=2, oversample=4),
            step_settings=StepSettings(candidates="sources:3"),
        )  # fmt: skip


def test_a_candidate_without_a_finite_score_is_dropped_for_this_choice() -> None:
    model = tiny_model("gpt2", lora=True)
    batch = random_batch((9, 4, 7, 6, 8, 5), seed=3)
    poison = int(batch.input_ids[2, 2])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "wte" in n)[poison] = float("nan")
    has_it = np.array([poison in row.tolist() for row in batch.input_ids])
    step = OnlineStep(
        model, TracIn(keep=2, oversample=3), StepSettings(candidates="sources:2", source_rows=9), sources=SOURCES
    )
    target = random_batch((6, 8), seed=4)
    if any(poison in row.tolist() for row in target.input_ids):
        pytest.fail("the target must be finite for this case; choose another seed")
    found = step.propose([batch], [target], optimizer_of(tiny_model("gpt2", lora=True)))
    assert found.dropped.tolist() == np.flatnonzero(has_it).tolist()
    assert not has_it[found.choice.rows].any()
    assert all(torch.isfinite(grad).all() for grad in found.gradient.values())
