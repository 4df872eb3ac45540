"""Oracle: a real Transformers Trainer, whose optimizer is asked by parameter what its numbered file means by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from fake_task import random_tokens
from tamis.errors import InvalidInput, Unsupported
from tamis.training.checkpoints import learning_rates_of, read_moments
from tamis.training.loop import TrainSettings, fine_tune
from tamis.training.lora import add_lora
from tiny_models import tiny_model

TOKENS = random_tokens([9, 5, 12, 7], seed=1)


def trained_by_trainer(model: nn.Module, folder: Path, *, optim: str = "adamw_torch") -> Trainer:
    data = [
        {
            "input_ids": torch.from_numpy(t.input_ids.astype(np.int64))[:4],
            "labels": torch.from_numpy(t.input_ids.astype(np.int64))[:4],
        }
        for t in TOKENS
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        optim=optim,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    return trainer


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [True, False])
def test_moments_of_a_trainer_checkpoint_find_their_names(tmp_path: Path, family: str, lora: bool) -> None:
    model = tiny_model(family, dtype=torch.float32)
    model = add_lora(model, rank=2, alpha=4, seed=0) if lora else model
    trainer = trained_by_trainer(model, tmp_path)
    moments = read_moments(tmp_path / "checkpoint-4", model)
    optimizer = trainer.optimizer
    state = getattr(optimizer, "optimizer", optimizer).state  # Accelerate wraps it
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert set(moments.exp_avg) == set(moments.exp_avg_sq) == set(trained)
    for name, param in trained.items():
        assert torch.equal(moments.exp_avg[name], state[param]["exp_avg"])
        assert torch.equal(moments.exp_avg_sq[name], state[param]["exp_avg_sq"])
    assert (moments.step, moments.beta1, moments.beta2, moments.eps) == (4, 0.9, 0.95, 1e-8)


def test_learning_rates_come_from_the_trainer_s_log(tmp_path: Path) -> None:
    trainer = trained_by_trainer(tiny_model("llama", dtype=torch.float32), tmp_path)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    folders = [tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"]
    assert learning_rates_of(folders) == pytest.approx([np.mean(logged[:2]), np.mean(logged[2:4])])
    assert learning_rates_of([tmp_path]) == [None]


def test_our_own_moments_come_back_by_name(tmp_path: Path) -> None:
    model = add_lora(tiny_model("llama", dtype=torch.float32), rank=2, alpha=4, seed=0)
    settings = TrainSettings(epochs=1, update_rows=4, beta1=0.8, eps=1e-6, clip=None)
    (point,) = fine_tune(model, TOKENS, np.arange(4), settings, seed=0, folder=tmp_path)
    moments = read_moments(point.folder, model)
    assert (moments.step, moments.beta1, moments.beta2, moments.eps) == (1, 0.8, 0.999, 1e-6)
    # After one update m = 0.2 g and v = 0.001 g², whatever g is.
    for name, m in moments.exp_avg.items():
        torch.testing.assert_close(moments.exp_avg_sq[name], 0.001 * (m / 0.2) ** 2)
    assert learning_rates_of([point.folder]) == [point.learning_rate]


def test_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    trained_by_trainer(add_lora(tiny_model("llama", dtype=torch.float32), rank=2, alpha=4, seed=0), tmp_path)
    other = add_lora(tiny_model("llama", dtype=torch.float32), rank=3, alpha=4, seed=0)
    with pytest.raises(InvalidInput, match="do not fit this model's trainable parameters"):
        read_moments(tmp_path / "checkpoint-4", other)
    with pytest.raises(InvalidInput, match="do not fit this model's trainable parameters"):
        read_moments(tmp_path / "checkpoint-4", tiny_model("llama"))


def test_an_optimizer_that_is_not_adam_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    trained_by_trainer(model, tmp_path, optim="sgd")
    with pytest.raises(Unsupported, match="is not the state of Adam or AdamW"):
        read_moments(tmp_path / "checkpoint-4", model)


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("must-not-exist"),))  # type: ignore[return-value]


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state": _Harmful(), "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(InvalidInput, match="not an optimizer state that opens without running code"):
        read_moments(tmp_path, tiny_model("llama"))
    assert not Path("must-not-exist").exists()


def test_a_folder_without_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"holds neither optimizer.safetensors nor optimizer.pt"):
        read_moments(tmp_path, tiny_model("llama"))
