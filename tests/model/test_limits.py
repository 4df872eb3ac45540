"""How many positions and ids a model takes is read from its config, whatever the family calls it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from tamis.model.limits import model_limits, skeleton
from tamis.model.load import ModelSettings

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
VISION = SiglipVisionConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}

CONFIGS: dict[str, tuple[PreTrainedConfig, int, bool]] = {
    "learned, n_positions": (GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=24, vocab_size=40), 24, True),
    "learned, with an offset": (
        OPTConfig(
            hidden_size=8,
            ffn_dim=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=40,
            max_position_embeddings=24,
            word_embed_proj_dim=8,
        ),
        24,
        True,
    ),
    "a table that is computed": (
        GPTJConfig(n_embd=8, n_layer=1, n_head=2, rotary_dim=4, n_positions=24, vocab_size=40),
        24,
        True,
    ),
    "rotary": (LlamaConfig(**SMALL, max_position_embeddings=64), 64, False),
    # No layer of that size may be taken for a table of positions.
    "rotary, as wide as long": (LlamaConfig(**SMALL, max_position_embeddings=8), 8, False),
    "rotary, as many ids as positions": (LlamaConfig(**SMALL, max_position_embeddings=40), 40, False),
    "rotary, stretched": (LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=YARN), 256, False),
    "nested": (
        Gemma3Config(
            text_config=Gemma3TextConfig(**SMALL, max_position_embeddings=64, num_key_value_heads=1, head_dim=4),
            vision_config=VISION,
        ),
        64,
        False,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_positions_and_ids_are_read_from_the_config(name: str, tmp_path: Path) -> None:
    config, positions, fixed = CONFIGS[name]
    config.save_pretrained(tmp_path)
    found = model_limits(ModelSettings(name=str(tmp_path)))
    assert (found.positions, found.fixed, found.ids) == (positions, fixed, 40)


def test_an_adapter_on_fused_experts_is_drawn_without_remarks(tmp_path: Path) -> None:
    MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = skeleton(ModelSettings(name=str(tmp_path)), lora_rank=2)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert [w for w in caught if issubclass(w.category, RuntimeWarning)] == []
