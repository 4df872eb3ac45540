from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from score_task import save_tiny
from tamis.errors import InvalidSettings, Unsupported
from tamis.model.load import ModelSettings, load_model
from tamis.model.source import ModelSource
from tamis.seeds import child_seed, random_uniform
from tamis.training.lora import add_lora, train_adapter
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
    assert all("lora_" in name for name in trained)


def test_an_adapter_keeps_float64_and_is_lifted_from_half_precision() -> None:
    for dtype, wanted in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        model = tiny_model("llama", lora=True).to(dtype)
        train_adapter(model)
        assert {param.dtype for param in model.parameters() if param.requires_grad} == {wanted}


def test_a_trained_adapter_names_the_base_that_was_found(tmp_path: Path) -> None:
    model = tiny_model("llama", lora=True)
    train_adapter(model, base=ModelSource(kind="folder", name=str(tmp_path / "adapter" / ".." / "base")))
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    train_adapter(model, base=ModelSource(kind="gguf", name=str(tmp_path), gguf_file="base.gguf"))
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base.gguf")
    train_adapter(model, base=ModelSource(kind="hub", name="org/base", revision="abc"))
    assert model.peft_config["default"].base_model_name_or_path == "org/base"
    assert model.peft_config["default"].revision == "abc"


def test_whole_modules_beside_the_factors_are_trained_in_float32_only() -> None:
    def adapted(dtype: torch.dtype) -> PeftModel:
        config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        return get_peft_model(tiny_model("llama", dtype=dtype), config)

    model = adapted(torch.float32)
    train_adapter(model)
    assert any("modules_to_save" in name for name, param in model.named_parameters() if param.requires_grad)
    with pytest.raises(Unsupported, match=r"modules_to_save, first: '.*lm_head.*'.*cannot be trained on a 16-bit base"):
        train_adapter(adapted(torch.bfloat16))


def test_a_second_adapter_or_no_rank_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="carries an adapter already"):
        add_lora(tiny_model("llama", lora=True), rank=2, alpha=4, seed=0)
    with pytest.raises(InvalidSettings, match="lora_rank must be at least 1, got 0"):
        add_lora(tiny_model("llama"), rank=0, alpha=4, seed=0)
