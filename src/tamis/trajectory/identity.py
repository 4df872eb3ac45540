"""Which model a run was recorded from: what opens it, and what tells it from another that has the same shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn

from tamis.errors import StoreMismatch, Unsupported
from tamis.identity import text_sha256

__all__ = ["base_dtype", "check_model", "describe_model", "frozen_digest", "has_dropout", "refuse_dora"]

_ENTRIES = 4096  # looked at of every frozen tensor
# Of a configuration, what says where it lies or how it is run, not what it computes.
_INCIDENTAL = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "use_cache", "auto_map",
    "_attn_implementation_autoset", "architectures", "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip


def describe_model(model: nn.Module, name: str | None) -> dict[str, Any]:
    """``name`` (what opens it), its class, a digest of its configuration, and its adapter's settings if it has one."""
    config = getattr(model, "config", None)
    values: dict[str, Any] = {} if config is None else config.to_dict()
    adapter = None
    if hasattr(model, "peft_config"):
        peft: Any = model
        found = peft.peft_config[peft.active_adapter].to_dict()
        adapter = json.loads(json.dumps(found, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
        adapter = {key: value for key, value in adapter.items() if key not in ("base_model_name_or_path", "revision")}
        if isinstance(adapter.get("target_modules"), list):
            adapter["target_modules"] = sorted(adapter["target_modules"])  # sets come in any order
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    plain = {key: value for key, value in values.items() if key not in _INCIDENTAL}
    return {
        "name": name or getattr(config, "_name_or_path", "") or None,
        "class": type(base).__name__,
        "config": text_sha256(json.dumps(plain, sort_keys=True, default=str)),
        "adapter": adapter,
    }


def refuse_dora(adapter: Mapping[str, Any] | None) -> None:
    """Refuse an adapter whose gradients are not the derivatives of its loss.

    Raises:
        Unsupported: it is DoRA, whose backward pass holds the norm of the weights fixed.
    """
    if adapter is not None and adapter.get("use_dora"):
        raise Unsupported(
            "DoRA's gradients hold the norm of the adapted weights fixed, so they are not the derivatives of the loss, "
            "and no score that is built on derivatives is right; train LoRA"
        )


def frozen_digest(model: nn.Module) -> str:
    """Of the parameters and buffers that the run does not train: a few thousand entries of each, as float32."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.requires_grad:
            continue
        flat = tensor.detach().reshape(-1)
        stride = max(1, len(flat) // _ENTRIES)
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(flat[::stride].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_model(model: nn.Module, manifest: Mapping[str, Any], *, where: str) -> None:
    """Refuse a model that the run was not recorded from.

    Raises:
        StoreMismatch: saying what differs.
    """
    found = describe_model(model, None)
    for key in ("class", "config"):
        if found[key] != manifest["model"][key]:
            classes = f" ({manifest['model']['class']} there, {found['class']} here)" if key == "class" else ""
            raise StoreMismatch(
                f"{where} was recorded from another model: its {key} differs{classes}; give the model that training "
                "started from, as --model"
            )
    params = dict(model.named_parameters())
    for name, shape in manifest["trained"]:
        if name not in params or list(params[name].shape) != list(shape):
            got = list(params[name].shape) if name in params else "nothing"
            raise StoreMismatch(f"{where} trained '{name}' of shape {list(shape)} and this model has {got} there")
    wanted = {name for name, _ in manifest["trained"]}
    for name, param in params.items():
        param.requires_grad_(name in wanted)
    if frozen_digest(model) != manifest["frozen"]:
        raise StoreMismatch(
            f"{where} was recorded from a model with other frozen weights; give the very model that training started "
            "from, in the same dtype, as --model"
        )


def base_dtype(model: nn.Module) -> str:
    """What the weights are stored in; of an adapted model, those of the base."""
    params = list(model.parameters())
    frozen = [param for param in params if not param.requires_grad and param.is_floating_point()]
    return str((frozen or params)[0].dtype).removeprefix("torch.")


def has_dropout(model: nn.Module) -> bool:
    """Whether training draws random numbers in the forward pass."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    config = getattr(model, "config", None)
    values: Mapping[str, Any] = config.to_dict() if config is not None else {}
    return any(
        isinstance(value, float) and value > 0
        for name, value in values.items()
        if "dropout" in name or name.endswith("_pdrop")
    )
