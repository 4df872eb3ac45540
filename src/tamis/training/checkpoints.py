"""Checkpoints on disk: parameters in the libraries' own formats, Adam's moments, and the learning rates so far.

A checkpoint folder opens as what it is, a PEFT adapter or a Transformers model; ``optimizer.safetensors`` and
``training.json`` lie beside. The folder is filled under another name and moved into place last, so that one that
exists is complete. Trainer checkpoints (``optimizer.pt``, ``trainer_state.json``) can be read too, never pickles.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tamis.disk import disk_errors
from tamis.errors import InvalidInput, StoreCorrupted, StoreMismatch, Unsupported
from tamis.identity import file_sha256, first_difference
from tamis.model.load import no_progress_bars
from tamis.model.proxy_folder import layout_of, write_layout

__all__ = [
    "Checkpoint",
    "Moments",
    "StepRecord",
    "complete_checkpoints",
    "learning_rates_of",
    "read_moments",
    "restore_checkpoint",
    "save_checkpoint",
]

_VERSION = 1
_MANIFEST = "training.json"
_OPTIMIZER = "optimizer.safetensors"
_TRAINER_OPTIMIZER = "optimizer.pt"
_TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One update: its number from 1, the loss before it, its learning rate, and its gradient's norm before clipping."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    learning_rate: float  # mean over the updates since the checkpoint before it
    history: tuple[StepRecord, ...]  # of the whole run up to here


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Adam's state after ``step`` updates, by parameter name and in the parameter's own shape, as float32."""

    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    step: int
    beta1: float
    beta2: float
    eps: float


def save_checkpoint(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainable: Mapping[str, nn.Parameter],
    history: Sequence[StepRecord],
    earlier: Sequence[Checkpoint],
    *,
    identity: Mapping[str, Any],
) -> Checkpoint:
    """Write the state after the last update of ``history`` to ``root/step-<n>``; it appears whole or not at all.

    Raises:
        InvalidInput: the folder cannot be written.
    """
    step = history[-1].step
    since = earlier[-1].step if earlier else 0
    rates = [record.learning_rate for record in history if record.step > since]
    folder = root / f"step-{step:06d}"
    partial = root / f"step-{step:06d}.partial"
    with disk_errors(folder, doing="write checkpoint"):
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        partial.mkdir(parents=True)
        _save_params(model, partial)
        save_file(_optimizer_tensors(optimizer, trainable), partial / _OPTIMIZER)
        group = optimizer.param_groups[0]
        manifest = {
            "version": _VERSION,
            "step": step,
            "learning_rate": sum(rates) / len(rates),
            "adam": {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"]},
            "earlier": [checkpoint.step for checkpoint in earlier],
            "identity": dict(identity),
            "history": [asdict(record) for record in history],
            "files": {path.name: file_sha256(path) for path in sorted(partial.iterdir())},
        }
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        for path in partial.iterdir():
            _sync(path)
        partial.rename(folder)
        _sync(root)
    return _checkpoint(folder, manifest)


def complete_checkpoints(root: Path, *, identity: Mapping[str, Any]) -> list[Checkpoint]:
    """The checkpoints under ``root`` in the order of training, checked to be this run's; an empty list if none.

    Raises:
        StoreMismatch: they come from other settings, data or seed; the message names the first field that differs.
        StoreCorrupted: one of them is missing or unreadable.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
    for folder in sorted(root.glob("step-*")):
        if folder.suffix == ".partial":
            continue
        manifest = _read_manifest(folder)
        if difference := first_difference(manifest["identity"], dict(identity)):
            field, was, now = difference
            raise StoreMismatch(
                f"{folder} was trained with {field}={was!r}, this run has {now!r}; "
                f"delete {folder.parent} to train again, or choose another folder"
            )
        found.append((folder, manifest))
    steps = [manifest["step"] for _, manifest in found]
    if found and found[-1][1]["earlier"] != steps[:-1]:
        raise StoreCorrupted(
            f"{root} has checkpoints of updates {steps} but the last one followed {found[-1][1]['earlier']}; "
            "delete the folder and run again to train it anew"
        )
    return [_checkpoint(folder, manifest) for folder, manifest in found]


def restore_checkpoint(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainable: Mapping[str, nn.Parameter],
) -> None:
    """Put parameters and Adam's state of ``checkpoint`` into ``model`` and ``optimizer``, bit for bit.

    Raises:
        StoreCorrupted: a file's bytes are not what was written.
    """
    verify_checkpoint(checkpoint.folder)
    _load_params(model, checkpoint.folder)
    tensors = load_file(checkpoint.folder / _OPTIMIZER)
    for name, param in trainable.items():
        if f"step/{name}" not in tensors:
            continue  # never had a gradient, so AdamW has no state for it
        optimizer.state[param] = {
            "step": tensors[f"step/{name}"],  # AdamW keeps it on the CPU
            "exp_avg": tensors[f"exp_avg/{name}"].to(param.device),
            "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(param.device),
        }


def verify_checkpoint(folder: Path) -> None:
    """Compare every file of a checkpoint with the checksum in its manifest.

    Raises:
        StoreCorrupted: one differs or is missing.
    """
    for name, digest in _read_manifest(folder)["files"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise StoreCorrupted(f"{folder / name} is not what was written; delete {folder.parent} and run again")


def read_moments(folder: Path, model: nn.Module) -> Moments:
    """Adam's moments from one of our checkpoints or from a Trainer checkpoint of ``model``.

    A Trainer's ``optimizer.pt`` knows parameters by number only. It is opened without running code, and the numbers
    are matched with names in the Trainer's own order (parameters with weight decay first), checked by every shape.

    Raises:
        InvalidInput: ``folder`` holds no optimizer state, or not that of this model.
        Unsupported: the optimizer is not Adam or AdamW with whole moments.
        StoreCorrupted: our own checkpoint was changed on disk.
    """
    if (folder / _MANIFEST).is_file():
        verify_checkpoint(folder)
        manifest = _read_manifest(folder)
        tensors = load_file(folder / _OPTIMIZER)
        return Moments(
            exp_avg={k.removeprefix("exp_avg/"): t.float() for k, t in tensors.items() if k.startswith("exp_avg/")},
            exp_avg_sq={
                k.removeprefix("exp_avg_sq/"): t.float() for k, t in tensors.items() if k.startswith("exp_avg_sq/")
            },
            step=manifest["step"],
            **manifest["adam"],
        )
    if (folder / _TRAINER_OPTIMIZER).is_file():
        return _read_trainer_moments(folder / _TRAINER_OPTIMIZER, model)
    raise InvalidInput(
        f"{folder} holds neither {_OPTIMIZER} nor {_TRAINER_OPTIMIZER}; "
        "give a checkpoint folder that was saved together with its optimizer"
    )


def learning_rates_of(folders: Sequence[Path]) -> list[float | None]:
    """Mean learning rate of the updates that led to each checkpoint since the one listed before it; None if unknown."""
    rates: list[float | None] = []
    since = 0
    for folder in folders:
        if (folder / _MANIFEST).is_file():
            rates.append(float(_read_manifest(folder)["learning_rate"]))
        elif (folder / _TRAINER_STATE).is_file():
            state = json.loads((folder / _TRAINER_STATE).read_text(encoding="utf-8"))
            step = int(state.get("global_step", 0))
            start = since if since < step else 0
            logged = [
                float(entry["learning_rate"])
                for entry in state.get("log_history", [])
                if "learning_rate" in entry and start < int(entry.get("step", 0)) <= step
            ]
            rates.append(sum(logged) / len(logged) if logged else None)
            since = step
        else:
            rates.append(None)
    return rates


def _save_params(model: nn.Module, folder: Path) -> None:
    if not isinstance(model, PeftModel):
        with no_progress_bars():
            model.save_pretrained(folder)  # type: ignore[operator]  # a Transformers model, typed as a plain module
        layout = layout_of(model)
        if layout is not None:  # a proxy that is trained whole is a proxy still
            write_layout(layout, folder)
        return
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # PEFT's own writer lists sets in hash order, which differs from process to process.
    config = model.peft_config[model.active_adapter].to_dict() | {"inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=lambda value: sorted(value))
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _load_params(model: nn.Module, folder: Path) -> None:
    if isinstance(model, PeftModel):
        state = load_file(folder / "adapter_model.safetensors")
        outcome = set_peft_model_state_dict(model, state, adapter_name=model.active_adapter)
        if outcome.unexpected_keys:
            raise StoreMismatch(
                f"{folder} holds '{outcome.unexpected_keys[0]}', which the model lacks; delete the folder"
            )
        return
    saved = type(model).from_pretrained(folder, dtype="auto")  # type: ignore[attr-defined]
    model.load_state_dict(saved.state_dict())


def _optimizer_tensors(optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, param in trainable.items():
        state = optimizer.state.get(param)
        if not state:
            continue
        tensors[f"step/{name}"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu()
        tensors[f"exp_avg/{name}"] = state["exp_avg"].detach().cpu().contiguous()
        tensors[f"exp_avg_sq/{name}"] = state["exp_avg_sq"].detach().cpu().contiguous()
    return tensors


def _read_trainer_moments(path: Path, model: nn.Module) -> Moments:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        groups, states = saved["param_groups"], saved["state"]
    except Exception as error:  # torch raises a dozen unrelated types for files it cannot or will not open
        raise InvalidInput(f"{path} is not an optimizer state that opens without running code: {error}") from error
    numbers = [number for group in groups for number in group["params"]]
    sizes = [len(group["params"]) for group in groups]
    first = groups[0]
    if "betas" not in first or "eps" not in first or any("exp_avg" not in state for state in states.values()):
        raise Unsupported(
            f"{path} is not the state of Adam or AdamW with whole moments (8-bit and factored optimizers keep less); "
            "train the checkpoint with optim='adamw_torch'"
        )
    params = dict(model.named_parameters())
    for names in _trainer_orders(model, sizes):
        pairs = list(zip(numbers, names, strict=True))
        if all(states[number]["exp_avg"].shape == params[name].shape for number, name in pairs if number in states):
            break
    else:
        raise InvalidInput(
            f"{path} has moments of {len(numbers)} parameters in groups of {sizes}, which do not fit this model's "
            "trainable parameters; give the checkpoint that was saved while training this very model or adapter"
        )
    known = [(number, name) for number, name in pairs if number in states]
    return Moments(
        exp_avg={name: states[number]["exp_avg"].float() for number, name in known},
        exp_avg_sq={name: states[number]["exp_avg_sq"].float() for number, name in known},
        step=max((int(states[number]["step"]) for number, _ in known), default=0),
        beta1=float(first["betas"][0]),
        beta2=float(first["betas"][1]),
        eps=float(first["eps"]),
    )


def _trainer_orders(model: nn.Module, sizes: Sequence[int]) -> list[list[str]]:
    """Orders in which a Trainer may have listed this model's parameters: those with weight decay, then the others.

    What counts as a norm changed between Transformers versions, so several rules are tried; group sizes must fit.
    """
    adapter = isinstance(model, PeftModel)
    names = [name for name, _ in model.named_parameters() if not adapter or _is_adapter(name)]
    norms = {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    by_name = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
    rules: list[Callable[[str], bool]] = [
        lambda name: by_name.search(name.lower()) is None and name not in norms,
        lambda name: "bias" not in name and name not in norms,
        lambda name: "bias" not in name,
        lambda name: True,
    ]
    orders = []
    for decays in rules:
        first = [name for name in names if decays(name)]
        second = [name for name in names if not decays(name)]
        wanted = [len(group) for group in (first, second) if group]
        if wanted == [size for size in sizes if size] and first + second not in orders:
            orders.append(first + second)
    return orders


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def _checkpoint(folder: Path, manifest: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        folder=folder,
        step=manifest["step"],
        learning_rate=manifest["learning_rate"],
        history=tuple(StepRecord(**record) for record in manifest["history"]),
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreCorrupted(
            f"{folder / _MANIFEST} cannot be read ({error}); delete {folder.parent} and run again to train it anew"
        ) from error
    if manifest.get("version") != _VERSION:
        raise StoreMismatch(
            f"{folder} has checkpoint version {manifest.get('version')}, this program writes {_VERSION}; "
            f"delete {folder.parent} and run again"
        )
    return manifest


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
