"""Offline AdamW-influence: the sum over a row's uses of its sweep's scores; interrupted reference runs go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from score_task import POOL, make_task, save_tiny
from tamis.errors import InvalidSettings, Unsupported
from tamis.methods import AdamwInfluence
from tamis.trajectory import reference_run as module
from tamis.trajectory.adjoint import final_values
from tamis.trajectory.causal import CausalProblem, RecordedRun
from tamis.trajectory.leave_out import leave_out_effect
from tamis.trajectory.log import LogReader
from tamis.trajectory.reference_run import ReferenceSettings, reference_run
from tamis.trajectory.replay import train
from tamis.trajectory.token_rows import TokenRow
from tiny_models import tiny_model


def rows_of_tokens(count: int) -> list[TokenRow]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, 8, count)
    return [
        TokenRow(ids=generator.integers(3, 60, n).astype(np.int32), supervised=np.ones(n, np.bool_)).trimmed()
        for n in lengths
    ]


def token_row(one: Any) -> TokenRow:
    return TokenRow(ids=one.input_ids, supervised=one.supervised).trimmed()


def test_a_score_foretells_training_without_the_row(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    task = make_task(tmp_path, model)
    method = AdamwInfluence(update_rows=4, learning_rate=1e-3, lora_rank=2)
    scores = method.score(task).values
    [folder] = task.store.glob("adamw-influence-run-*")
    run = module.LogReader(folder / "run")
    assert run.end is not None and run.end["steps"] == -(-len(task.rows) // 4)
    opened = module.RecordedRun(run, module.CausalProblem(method._model(task), dict(run.manifest["trained"])))
    rows = {row.digest(): n for n, row in enumerate(opened.rows)}
    target = [token_row(one) for one in task.target.take(task.target_rows)]
    micros = opened.micros_of(target, most=8)
    last = opened.step(opened.num_steps - 1)
    own = task.pool.take(task.rows)
    for place in range(2):  # of the last update, where only Adam's own nonlinearity is left
        effect = leave_out_effect(opened, last.index, place, micros).numpy()
        position = next(i for i, one in enumerate(own) if rows[token_row(one).digest()] == last.rows[place])
        truth = [effect[task.target_group == group].mean() for group in range(len(task.target_names))]
        assert np.sign(scores[position]).tolist() == np.sign(truth).tolist()


def scores_and_effects(tmp_path: Path, pool: Sequence[tuple[str, str]], *, epochs: int) -> tuple[Tensor, Tensor]:
    """Scores of every pool row for two targets, and what turning down all its uses at once does, copies included."""
    model = save_tiny(tmp_path / "model", "gpt2")  # in float64 all through; Llama's norms compute in float32
    task = make_task(tmp_path, model, pool=pool, groups=[0, 1, 0], dtype="float64")
    method = AdamwInfluence(update_rows=2, epochs=epochs, learning_rate=1e-2, lora_rank=1)
    scores = torch.from_numpy(method.score(task).values).double()
    [folder] = task.store.glob("adamw-influence-run-*")
    log = LogReader(folder / "run")
    run = RecordedRun(log, CausalProblem(method._model(task), dict(log.manifest["trained"])))
    numbers = {row.digest(): number for number, row in enumerate(run.rows)}
    micros = run.micros_of([token_row(one) for one in task.target.take(task.target_rows)], most=8)
    steps = [run.step(index) for index in range(run.num_steps)]

    def losses(number: int, share: float) -> Tensor:
        turned = [
            replace(step, weights=step.weights * torch.from_numpy(1 - share * (step.rows == number))) for step in steps
        ]
        again = train(run.problem, run.rule, run.state(0).theta, turned, every=len(steps))
        found = final_values(run.problem, again.states[len(steps)].theta, micros)
        return torch.stack([(found[0] + found[2]) / 2, found[1]])

    places = [numbers[token_row(one).digest()] for one in task.pool.take(task.rows)]
    return scores, torch.stack([(losses(number, 1e-5) - losses(number, -1e-5)) / 2e-5 for number in places])


# Scores are kept as float32; central differences of size 1e-5 are wrong by 1e-10 of the third derivative.
FORETOLD: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7}


def test_a_row_of_several_epochs_scores_what_all_its_uses_did(tmp_path: Path) -> None:
    scores, effects = scores_and_effects(tmp_path, POOL[:3], epochs=2)
    torch.testing.assert_close(scores, effects, **FORETOLD)


def test_exact_copies_of_a_row_share_what_they_did_together(tmp_path: Path) -> None:
    scores, effects = scores_and_effects(tmp_path, [*POOL[:3], POOL[1], POOL[1]], epochs=1)
    copies = torch.tensor([[1.0], [3.0], [1.0], [3.0], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(scores, effects / copies, **FORETOLD)


def test_targets_share_the_run_and_nothing_else(tmp_path: Path) -> None:
    """The same target rows as one target and as two: one run, and scores of their own in either order."""
    model, method = save_tiny(tmp_path / "model"), AdamwInfluence(update_rows=4, learning_rate=1e-3, lora_rank=2)

    def scores(store: str, groups: list[int]) -> np.ndarray[Any, Any]:
        return method.score(make_task(tmp_path / store, model, groups=groups)).values

    two, one = scores("alone", [0, 1, 0]), scores("other", [0, 0, 0])
    for order in ([two, one], [one, two]):
        store = "shared" if order[0] is two else "shared the other way"
        for expected in order:
            np.testing.assert_array_equal(scores(store, [0, 1, 0] if expected is two else [0, 0, 0]), expected)
        assert len([*(tmp_path / store).rglob("adamw-influence-run-*")]) == 1
    assert two.shape[1] == 2 and one.shape[1] == 1
    np.testing.assert_allclose(one[:, 0], (2 * two[:, 0] + two[:, 1]) / 3, rtol=1e-4, atol=1e-9)


def test_the_run_is_paid_for_once(tmp_path: Path) -> None:
    model, method = save_tiny(tmp_path / "model"), AdamwInfluence(update_rows=4, lora_rank=2)
    first = make_task(tmp_path, model)
    method.score(first)
    again = make_task(tmp_path, model)
    replace(method, curvature="none").score(again)
    costs = [{cost.name: cost for cost in task.costs()} for task in (first, again)]
    run, later = (cost["adamw-influence-run"] for cost in costs)
    assert run == later and run.rows == len(first.rows) and run.elapsed_s > 0
    assert all(cost["adamw-influence"].rows > run.rows for cost in costs)  # its replay, and the way back


def test_an_interrupted_reference_run_goes_on_at_its_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, settings = rows_of_tokens(24), ReferenceSettings(update_rows=2, learning_rate=1e-2)

    def train(folder: Path) -> bytes:
        model = tiny_model("llama", dtype=torch.float32, lora=True)
        run, numbers = reference_run(model, rows, settings, seed=1, folder=folder, name="tiny")
        assert sorted(numbers) == list(range(24)) and run.num_steps == 12
        return b"".join(path.read_bytes() for path in sorted(folder.rglob("*.safetensors")))

    whole = train(tmp_path / "whole")
    play, left = module.play, [11]

    def dies(*args: object) -> object:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return play(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "play", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    monkeypatch.setattr(module, "play", play)
    assert train(tmp_path / "cut") == whole


def test_the_record_has_the_chat_template_and_dora_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings, rows = ReferenceSettings(epochs=1, update_rows=2), rows_of_tokens(4)
    model = tiny_model("llama", dtype=torch.float32, lora=True)
    run, _ = reference_run(model, rows, settings, seed=0, folder=tmp_path / "a", name="m", chat_template=template)
    assert run.reader.manifest["chat_template"] == template
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(Unsupported, match="DoRA"):
        reference_run(
            get_peft_model(tiny_model("llama", dtype=torch.float32), config), rows, settings, seed=0,
            folder=tmp_path / "b", name="m",
        )  # fmt: skip
    assert not (tmp_path / "b").exists()


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"epochs": 0}, "epochs=0: expected at least 1$"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0: expected a rate above 0$"),
        ({"clip": -1.0}, r"clip=-1\.0: expected a norm of at least 0$"),
        ({"curvature": "kfac"}, "curvature='kfac': expected one of exact, ggn, fisher, none"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
    ):
        with pytest.raises(InvalidSettings, match=message):
            AdamwInfluence(**settings)  # type: ignore[arg-type]
