"""What a Trainer may not be told to do when its data is chosen online, and what it will not do although told."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from tamis.errors import InvalidInput, Unsupported

__all__ = ["dropout_of", "refuse_added_loss", "refuse_settings", "refuse_sharded", "require_candidates"]

# Configurations share these with models that classify; a causal language model has no such layer.
_OF_CLASSIFIERS = ("summary_", "classifier_")


def refuse_settings(args: Any, *, has_own_loss: bool) -> None:
    """Refuse what would make rows inseparable, or the gradient another than the one chosen.

    Args:
        args: the Trainer's.
        has_own_loss: it was given a ``compute_loss_func``.

    Raises:
        Unsupported: naming the setting and why.
    """
    refused = {
        "fp16": (args.fp16, "loss scaling is not part of a gradient made of factors; use bf16"),
        "deepspeed": (bool(args.deepspeed), "sharded parameters are not supported yet; use plain DDP"),
        "fsdp": (bool(args.fsdp), "sharded parameters are not supported yet; use plain DDP"),
        "auto_find_batch_size": (args.auto_find_batch_size, "set per_device_train_batch_size to what fits"),
        "label_smoothing_factor": (args.label_smoothing_factor != 0, "the loss is plain cross-entropy"),
        "neftune_noise_alpha": (args.neftune_noise_alpha is not None, "noise would be part of every gradient"),
        "use_liger_kernel": (args.use_liger_kernel, "its fused layers hide the factors of gradients"),
        "torch_compile": (args.torch_compile, "compiled graphs hide the factors of gradients"),
        "compute_loss_func": (has_own_loss, "the loss is plain cross-entropy"),
        "packing": (getattr(args, "packing", False), "packed rows cannot be told apart"),
        "activation_offloading": (
            getattr(args, "activation_offloading", False), "the factors of gradients are kept where they are made"
        ),
        "padding_free": (getattr(args, "padding_free", False), "joined rows cannot be told apart"),
        "loss_type": (getattr(args, "loss_type", "nll") not in ("nll", None), "the loss is plain cross-entropy"),
    }  # fmt: skip
    for name, (found, why) in refused.items():
        if found:
            raise Unsupported(f"{name} does not go with online selection: {why}")
    if args.n_gpu > 1:
        raise Unsupported("several GPUs in one process do not go with online selection; launch one process for each")


def refuse_sharded(model: nn.Module) -> None:
    """Refuse parameters that lie in parts on several processes: their gradients are made whole here.

    Raises:
        Unsupported: naming the first one.
    """
    for name, param in model.named_parameters():
        if isinstance(param, DTensor) or hasattr(param, "_fsdp_flattened"):
            raise Unsupported(
                f"parameter '{name}' is sharded over processes (FSDP, tensor parallelism), which online selection does "
                "not support yet; train with plain DDP, where every process holds the whole model, or with LoRA if "
                "that does not fit"
            )


def refuse_added_loss(model: nn.Module) -> None:
    """Refuse a loss that the model adds to the cross-entropy: it is one of a whole batch, with no part of any row.

    Raises:
        Unsupported: naming the setting that asks for it.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "output_router_logits", False) or getattr(text, "output_router_logits", False):
        raise Unsupported(
            "the model's configuration has output_router_logits=True, by which the Trainer adds a load-balancing loss "
            "of the routers; online selection trains on plain cross-entropy: set config.output_router_logits=False, "
            "or train the model with the plain Trainer"
        )


def require_candidates(count: int) -> None:
    """Refuse a choice among ``count`` rows, if that is none.

    Raises:
        InvalidInput: what to do about it.
    """
    if not count:
        raise InvalidInput(
            "no candidate of this step has a supervised token; shuffle the pool or remove rows without supervised "
            "tokens"
        )


def dropout_of(model: nn.Module) -> str | None:
    """The first rate above 0 that a causal language model uses, of a module or of the configuration, in words."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"'{name}' has a dropout rate of {module.p}"
    config = getattr(model, "config", None)
    for name, value in (config.to_dict() if config is not None else {}).items():
        if name.startswith(_OF_CLASSIFIERS):
            continue
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float) and value > 0:
            return f"the model's configuration has {name}={value}"
    return None
