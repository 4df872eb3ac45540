from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from score_task import save_tiny
from tamis.errors import InvalidSettings
from tamis.model.load import ModelSettings, load_model
from tamis.seeds import child_seed, random_uniform
from tamis.train.lora import add_lora, train_adapter
from tiny_models import FAMILIES, random_batch, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_no_output_and_trains_alone(family: str) -> None:
    batch = random_batch([6, 9])
    plain = tiny_model(family, dtype=torch.float32)
    wanted = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    adapted = add_lora(plain, rank=2, alpha=4, seed=0)
    got = adapted(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(got, wanted)
    named = {name for name, param in adapted.named_parameters() if param.requires_grad}
    assert named
    assert all("lora_" in name for name in named)


def test_the_start_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = add_lora(tiny_model("llama"), rank=2, alpha=4, seed=5)
    torch.manual_seed(2)
    again = add_lora(tiny_model("llama"), rank=2, alpha=4, seed=5)
    other = add_lora(tiny_model("llama"), rank=2, alpha=4, seed=6)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    values = [dict(model.named_parameters())[name] for model in (first, again, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    expected = (random_uniform(child_seed(5, "lora start", name), 2 * 16) * 2 - 1) / 4  # ±1/√16
    np.testing.assert_allclose(values[0].detach().numpy().ravel(), expected, rtol=1e-6)


def test_a_saved_adapter_names_its_base_and_loads_again(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    loaded = load_model(ModelSettings(name=str(base), device="cpu"))
    adapted = add_lora(loaded.model, rank=2, alpha=4, seed=0, base=str(base))
    adapted.save_pretrained(tmp_path / "adapter")
    again = load_model(ModelSettings(name=str(tmp_path / "adapter"), device="cpu"))
    assert again.description["base"] == str(base)


def test_an_adapter_that_came_with_the_model_becomes_trainable_alone() -> None:
    model = tiny_model("llama", lora=True)
    for param in model.parameters():
        param.requires_grad_(False)
    train_adapter(model)
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert trained
    assert all("lora_" in name and model.get_parameter(name).dtype == torch.float32 for name in trained)


def test_a_second_adapter_or_no_rank_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="carries an adapter already"):
        add_lora(tiny_model("llama", lora=True), rank=2, alpha=4, seed=0)
    with pytest.raises(InvalidSettings, match="lora_rank must be at least 1, got 0"):
        add_lora(tiny_model("llama"), rank=0, alpha=4, seed=0)
