"""Offline AdamW-influence: the sum over a row's uses of its sweep's scores; interrupted reference runs go on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from score_task import make_task, save_tiny
from tamis.errors import InvalidSettings
from tamis.methods import AdamwInfluence
from tamis.trajectory import reference_run as module
from tamis.trajectory.leave_out import leave_out_effect
from tamis.trajectory.reference_run import ReferenceSettings, reference_run
from tamis.trajectory.token_rows import TokenRow
from tiny_models import tiny_model


def rows_of_tokens(count: int) -> list[TokenRow]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, 8, count)
    return [
        TokenRow(ids=generator.integers(3, 60, n).astype(np.int32), supervised=np.ones(n, np.bool_)).trimmed()
        for n in lengths
    ]


def test_a_score_foretells_training_without_the_row(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    task = make_task(tmp_path, model)
    method = AdamwInfluence(update_rows=4, learning_rate=1e-3, lora_rank=2)
    scores = method.score(task).values
    [folder] = task.store.glob("adamw-influence-*")
    run = module.LogReader(folder / "run")
    assert run.end is not None and run.end["steps"] == -(-len(task.rows) // 4)
    opened = module.RecordedRun(run, module.CausalProblem(method._model(task), dict(run.manifest["trained"])))
    rows = {row.digest(): n for n, row in enumerate(opened.rows)}
    target = [TokenRow(ids=t.input_ids, supervised=t.supervised).trimmed() for t in task.target.take(task.target_rows)]
    micros = opened.micros_of(target, most=8)
    last = opened.step(opened.num_steps - 1)
    own = task.pool.take(task.rows)
    for place in range(2):  # of the last update, where only Adam's own nonlinearity is left
        effect = leave_out_effect(opened, last.index, place, micros).numpy()
        position = next(
            i for i, t in enumerate(own)
            if rows[TokenRow(ids=t.input_ids, supervised=t.supervised).trimmed().digest()] == last.rows[place]
        )  # fmt: skip
        truth = [effect[task.target_group == group].mean() for group in range(len(task.target_names))]
        assert np.sign(scores[position]).tolist() == np.sign(truth).tolist()


def test_an_interrupted_reference_run_goes_on_at_its_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, settings = rows_of_tokens(24), ReferenceSettings(batch_rows=2, learning_rate=1e-2)

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


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"epochs": 0}, "epochs=0"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0"),
        ({"curvature": "kfac"}, "curvature='kfac': expected one of exact, ggn, fisher, none"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
    ):
        with pytest.raises(InvalidSettings, match=message):
            AdamwInfluence(**settings)  # type: ignore[arg-type]
