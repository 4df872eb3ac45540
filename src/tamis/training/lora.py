"""A fresh LoRA adapter on every linear layer of a model, with a start that depends on the seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from tamis.errors import InvalidSettings, Unsupported
from tamis.model.low_rank_linear import LowRankLinear
from tamis.model.source import ModelSource
from tamis.seeds import child_seed, random_uniform

__all__ = ["add_lora", "train_adapter"]


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    seed: int,
    targets: Sequence[str] = (),
    base: str | None = None,
    revision: str | None = None,
) -> PeftModel:
    """Wrap ``model`` (changed in place) with LoRA of ``rank`` on all its linear layers but the head; only that trains.

    ``A`` is uniform in ±1/√I, PEFT's own default, drawn from ``seed`` and the factor's name in place of PyTorch's
    generator, whose stream may change between versions and devices; ``B`` is zero. No dropout, scale ``alpha/rank``.
    ``targets`` are ends of names of layers (``q_proj``), in place of all linear ones; a layer in factors has LoRA on
    both.
    ``base`` and ``revision`` are what the saved adapter names as its base model.

    Raises:
        InvalidSettings: the rank is below 1, the model carries an adapter already, has no layer of such a name, or
            one that is not linear.
    """
    if rank < 1:
        raise InvalidSettings(f"lora_rank must be at least 1, got {rank}")
    if isinstance(model, PeftModel):
        raise InvalidSettings("the model carries an adapter already; train that one, or load its base model")
    if base is not None and Path(base).exists():
        base = str(Path(base).resolve())
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=_names_for_peft(model, targets) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores W transposed
        task_type="CAUSAL_LM",
        revision=revision,
    )
    adapted = get_peft_model(model, config)
    config.base_model_name_or_path = base or config.base_model_name_or_path
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if ".lora_A." in name:
                uniform = random_uniform(child_seed(seed, "lora start", name), param.numel()) * 2 - 1
                bound = 1 / math.sqrt(param.shape[1])
                param.copy_(torch.from_numpy(uniform).float().mul_(bound).reshape(param.shape))
            elif ".lora_B." in name:
                param.zero_()
    return adapted


def train_adapter(model: nn.Module, *, base: ModelSource | None = None) -> None:
    """Make the adapter that ``model`` came with trainable, in float32 at least, and nothing else.

    ``base`` is what the adapter names as its base model when it is saved. Without it that is what its own file said,
    which may have been a path relative to that file's folder.

    Raises:
        Unsupported: the adapter trains whole modules of a 16-bit model: in float32 they do not fit their neighbours.
    """
    copies = [name for name, _ in model.named_parameters() if "modules_to_save" in name]
    frozen = [param for name, param in model.named_parameters() if not _is_adapter(name)]
    if copies and any(param.dtype.itemsize < 4 for param in frozen):
        raise Unsupported(
            f"the adapter has whole modules beside its LoRA factors (modules_to_save, first: '{copies[0]}'), which "
            "cannot be trained on a 16-bit base; load the model with dtype=float32, or give an adapter without them"
        )
    if base is not None and isinstance(model, PeftModel):
        config = model.peft_config[model.active_adapter]
        path = Path(base.name, base.gguf_file or "")
        config.base_model_name_or_path = base.name if base.kind == "hub" else str(path.resolve())
        config.revision = base.revision
    for name, param in model.named_parameters():
        param.requires_grad_(_is_adapter(name))
        if param.requires_grad and param.dtype.itemsize < 4:
            param.data = param.data.float()


def _names_for_peft(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """``targets`` themselves but for layers in factors: PEFT knows those by their factors alone."""
    names: list[str] = []
    for target in targets:
        found = {
            name: module for name, module in model.named_modules() if name == target or name.endswith(f".{target}")
        }
        leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if _takes_lora(module)}
        if not found:
            raise InvalidSettings(f"lora_targets: no layer is called {target!r} (linear layers: {_listed(leaves)})")
        for name, module in found.items():
            if not _takes_lora(module):
                raise InvalidSettings(
                    f"lora_targets: expected the name of a linear layer, got {target!r}, which is '{name}', a "
                    f"{type(module).__name__} (linear layers: {_listed(leaves)})"
                )
        if any(isinstance(module, LowRankLinear) for module in found.values()):
            names += [f"{target}.A", f"{target}.B"]
            names += [name for name, module in found.items() if not isinstance(module, LowRankLinear)]
        else:
            names.append(target)
    return names


def _takes_lora(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, LowRankLinear))


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name
