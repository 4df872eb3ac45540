"""What a model can be given: how many positions it knows and how many token ids, read from its config alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tamis.errors import InvalidInput, first_line
from tamis.model.load import ModelSettings
from tamis.model.proxy_folder import proxy_class
from tamis.model.source import resolve_source
from tamis.model.targets import embedding_matrix, output_embeddings

__all__ = ["ModelLimits", "model_limits", "skeleton"]

_OFFSET = 2  # rows that OPT and its relatives put before the first position
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """How long rows may be, and which ids they may hold."""

    model: str  # as the user named it
    positions: int | None  # of the config; None if it names no number
    fixed: bool  # positions are looked up in a table, which has no row for later ones
    ids: int  # rows of the token embedding


def model_limits(settings: ModelSettings) -> ModelLimits:
    """The limits of the model that ``settings`` name. Loads no weights.

    Raises:
        InvalidInput: the model's config cannot be read, or describes no causal language model.
    """
    model = skeleton(settings)
    config: Any = model.config
    text = config.get_text_config()
    found = next((n for name in _CONTEXT_NAMES if isinstance(n := getattr(text, name, None), int) and n > 0), None)
    return ModelLimits(
        model=settings.name,
        positions=None if found is None else max(found, _stretched(text)),
        fixed=found is not None and _has_position_table(model, found),
        ids=embedding_matrix(model).shape[0],
    )


def _stretched(config: Any) -> int:
    """Positions after the scaling of rotary angles, whose configs often keep the number from before it."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return 0
    before, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return int(before * factor) if isinstance(before, int) and isinstance(factor, int | float) else 0


def _has_position_table(model: nn.Module, positions: int) -> bool:
    """Whether a row of some table is looked up for each position: learned (GPT-2, OPT) or computed once (GPT-J)."""
    sizes = range(positions, positions + _OFFSET + 1)
    words = {id(embedding_matrix(model)), id(getattr(output_embeddings(model), "weight", None))}
    learned = (m.weight for m in model.modules() if isinstance(m, nn.Embedding))
    computed = (b for b in model.buffers() if b.dim() == 2)
    return any(table.shape[0] in sizes for table in (*learned, *computed) if id(table) not in words)


def skeleton(settings: ModelSettings, *, lora_rank: int | None = None) -> nn.Module:
    """The model with its adapter on PyTorch's ``meta`` device: every name and shape, no number, no download of weights.

    ``lora_rank`` puts a fresh adapter on all its linear layers, unless the model is an adapter already.

    Raises:
        InvalidInput: the model's config cannot be read, or describes no causal language model.
    """
    source = resolve_source(settings.name, settings.revision)
    base = source.base or source
    try:
        config = AutoConfig.from_pretrained(
            base.name,
            revision=base.revision,
            trust_remote_code=settings.trust_remote_code,
            **({"gguf_file": base.gguf_file} if base.gguf_file else {}),
        )
        adapter = None
        if source.base is not None:
            adapter = PeftConfig.from_pretrained(source.name, revision=source.revision)
            adapter.inference_mode = False
        elif lora_rank is not None:
            adapter = LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        layout = base.proxy_layout()
        with torch.device("meta"):
            if layout is None:
                made = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
            else:
                made = proxy_class(config, layout, settings.name)._from_config(config)
            model = cast(nn.Module, made)
        if adapter is None:
            return model
        with torch.device("meta"), warnings.catch_warnings():
            # PEFT remarks on patterns that it has itself made for fused experts, which take no part here.
            warnings.simplefilter("ignore", RuntimeWarning)
            adapted: nn.Module = get_peft_model(cast(Any, model), adapter)
            return adapted
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"model '{settings.name}': its config cannot be used ({first_line(error)})") from error
