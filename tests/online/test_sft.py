"""The same seam on TRL's SFTTrainer: chats and prompts rendered by TRL, LoRA made by TRL, choices made by us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import tamis
from chat_tokenizers import tiny_tokenizer
from tamis.online import FilterThenWeight, Full, StepSettings
from tamis.online.checks import refuse_settings
from tamis.online.fate import read_candidates

trl = pytest.importorskip("trl", reason="trl, one of the dev dependencies, is not installed")

ROWS = [{"prompt": f"What is {i} + 1? ", "completion": f"{i + 1} of course", "source": "sums"} for i in range(10)] + [
    {"prompt": f"Name number {i}: ", "completion": f"the number {i}", "source": "names"} for i in range(10)
]
TARGET = [{"prompt": f"What is {i} + 2? ", "completion": f"{i + 2} of course"} for i in range(5)]


def model_for(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def arguments(folder: Path, **changes: Any) -> Any:
    settings = {
        "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "report_to": "none", "max_length": 40, "disable_tqdm": True, "gradient_checkpointing": False, "seed": 1,
        "dataloader_pin_memory": False, "bf16": False,
    }  # fmt: skip
    return trl.SFTConfig(output_dir=str(folder), **{**settings, **changes})


def test_prompt_completion_rows_train_with_lora_and_are_logged(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    trainer = tamis.OnlineSFTTrainer(
        model=model_for(tokenizer), args=arguments(tmp_path, per_device_train_batch_size=4),
        train_dataset=Dataset.from_list(ROWS), target_dataset=Dataset.from_list(TARGET), processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        selection=FilterThenWeight(keep=2, oversample=3, cold_start=1),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    rows = read_candidates(tmp_path / "candidates").to_pylist()
    assert {row["source"] for row in rows} == {"sums", "names"}
    # Only the completion is trained on, as TRL rendered it.
    for row in rows:
        assert row["tokens"] == sum(label != -100 for label in trainer.train_dataset[row["row"]]["labels"])


def test_keeping_all_is_what_sft_trainer_does(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    ours, theirs = model_for(tokenizer), model_for(tokenizer)
    tamis.OnlineSFTTrainer(
        model=ours, args=arguments(tmp_path / "a", per_device_train_batch_size=3),
        train_dataset=Dataset.from_list(ROWS), target_dataset=Dataset.from_list(TARGET), processing_class=tokenizer,
        selection=Full(keep=4, oversample=2), step_settings=StepSettings(reduction="tokens"),
    ).train()  # fmt: skip
    trl.SFTTrainer(
        model=theirs, args=arguments(tmp_path / "b", per_device_train_batch_size=8),
        train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer,
    ).train()  # fmt: skip
    for (name, x), (_, y) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        # Both in float32: Adam turns a gradient's last digits into a part of a step where the gradient is small.
        torch.testing.assert_close(x, y, rtol=0, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")
    apart = sum(float((x - y).square().sum()) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))
    moved = sum(
        float((x - y).square().sum())
        for x, y in zip(theirs.parameters(), model_for(tokenizer).parameters(), strict=True)
    )
    assert apart < 1e-6 * moved


def test_packing_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(tamis.TamisError, match="padding_free does not go with online selection"):
        tamis.OnlineSFTTrainer(
            model=model_for(tokenizer), args=arguments(tmp_path, padding_free=True, max_length=None),
            train_dataset=Dataset.from_list(ROWS), target_dataset=Dataset.from_list(TARGET),
            processing_class=tokenizer, selection=Full(),
        )  # fmt: skip


def test_offloading_of_what_gradients_are_made_of_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.activation_offloading = True  # TRL itself refuses to set it up without a GPU
    with pytest.raises(tamis.TamisError, match="activation_offloading does not go with online selection"):
        refuse_settings(args, has_own_loss=False)
    refuse_settings(arguments(tmp_path), has_own_loss=False)


def test_without_trl_the_error_says_how_to_get_it() -> None:
    script = "import sys; sys.modules['trl'] = None; import tamis; made = tamis.OnlineSFTTrainer"
    script += "(target_dataset=[1], selection=None)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "OnlineSFTTrainer needs TRL, which is not installed: pip install 'tamis[trl]'" in done.stderr
