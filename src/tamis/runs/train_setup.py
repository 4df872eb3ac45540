"""What a training run starts with: the model that its settings ask for, and the arguments of Transformers' Trainer."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from tamis.corpora import model_settings
from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.model.load import LoadedModel, ModelSettings, load_model, load_tokenizer, resolved_dtype
from tamis.model.processes import world_size
from tamis.model.source import resolve_source
from tamis.notation import candidates_parts
from tamis.online.methods.by_name import make_online_method
from tamis.online.methods.choice import Method
from tamis.online.settings import StepSettings, check_combination
from tamis.settings import TrainRunSettings
from tamis.training.lora import add_lora, train_adapter

__all__ = [
    "LEARNING_RATES",
    "LORA_RANK",
    "check_device",
    "check_proxy_vocabulary",
    "check_reports",
    "check_tuning",
    "compute_dtype",
    "method_and_step",
    "open_model",
    "training_arguments",
]

LORA_RANK = 16
LEARNING_RATES = {"lora": 2e-4, "full": 2e-5}


def compute_dtype(settings: TrainRunSettings) -> str:
    """In what the model computes: as stated, or bfloat16 on an accelerator that has it and float32 elsewhere.

    Raises:
        InvalidSettings: the device is not available.
    """
    found = resolved_dtype(model_settings(settings))
    return "float32" if found == "float16" else found  # auto on an old accelerator


def check_device(settings: TrainRunSettings) -> None:
    """Refuse one process that sees several accelerators: the Trainer would spread every batch over them.

    Raises:
        InvalidSettings: that is so.
    """
    count = torch.cuda.device_count()
    if world_size() == 1 and count > 1 and settings.device in ("auto", "cuda"):
        raise InvalidSettings(
            f"one process sees {count} GPUs; start one for each: accelerate launch --num_processes {count} -m tamis "
            "..., or use one of them: CUDA_VISIBLE_DEVICES=0"
        )


def method_and_step(settings: TrainRunSettings, method: Method | None = None) -> tuple[Method, StepSettings]:
    """The method, or the one given in its stead, and how its steps measure.

    Raises:
        InvalidSettings: a setting of the method is refused, or the two do not go together.
    """
    method = method or make_online_method(
        settings.method, settings.set, keep=settings.keep, oversample=settings.oversample
    )
    step_settings = StepSettings(
        reduction=settings.reduction,
        candidates=settings.candidates,
        source_rows=settings.source_rows,
        source_temperature=settings.source_temperature,
        source_memory=settings.source_memory,
        target_rank=settings.target_rank,
        target_every=settings.target_every,
        target_ema=settings.target_ema,
    )
    check_combination(method, step_settings)
    return method, step_settings


def check_proxy_vocabulary(settings: TrainRunSettings) -> None:
    """Refuse a proxy that would read the token ids of the trained model as other tokens: its scores would be noise.

    Tables of the same height do not tell: models of other families have them, too.

    Raises:
        InvalidInput: naming a token that the two disagree on.
    """
    kind, name = candidates_parts(settings.candidates)
    if kind != "proxy":
        return
    own, other = (load_tokenizer(each).get_vocab() for each in (model_settings(settings), ModelSettings(name=name)))
    strange = sorted((place, token) for token, place in own.items() if other.get(token) != place)
    if strange:
        place, token = strange[0]
        raise InvalidInput(
            f"candidates={settings.candidates!r}: token {place} of '{settings.model}' is {token!r} and the proxy has "
            f"{'no such token' if token not in other else f'it as {other[token]}'} ({len(strange)} of {len(own)} "
            "tokens differ); take a proxy with the same tokenizer"
        )


def check_reports(settings: TrainRunSettings) -> None:
    """Refuse to report to what is not installed.

    Raises:
        Unsupported: naming the package.
    """
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
    for name in settings.report_to:
        if not any(find_spec(package) for package in packages[name]):
            raise Unsupported(
                f"report_to={name!r} needs the package {name}, which is not installed: pip install {name}"
            )


def check_tuning(settings: TrainRunSettings) -> None:
    """Refuse settings of an adapter that the model has already.

    Raises:
        InvalidSettings: naming the setting.
        InvalidInput: there is no such model.
    """
    if not resolve_source(settings.model, settings.revision).is_adapter:
        return
    if settings.tune == "full":
        raise InvalidSettings(
            f"tune='full': '{settings.model}' is an adapter, whose base model stays as it is; leave --tune out to "
            "train the adapter on, or merge it into its base model first"
        )
    for name in ("lora_rank", "lora_alpha", "lora_targets"):
        if getattr(settings, name) not in (None, ()):
            raise InvalidSettings(f"{name}: '{settings.model}' is an adapter and is trained as it is; leave it out")


def open_model(settings: TrainRunSettings, *, dtype: str) -> LoadedModel:
    """The model with what is trained of it in float32 at least; with LoRA, the rest is in ``dtype``.

    Raises:
        InvalidInput: the model cannot be read.
        InvalidSettings: there is no layer for the adapter.
    """
    # Updates are too small for bfloat16's digits, so what is trained keeps float32 and only computes in less.
    stored = "float32" if settings.tune == "full" and dtype == "bfloat16" else dtype
    loaded = load_model(replace(model_settings(settings), dtype=stored))
    source = resolve_source(settings.model, settings.revision)
    if source.is_adapter:
        train_adapter(loaded.model, base=source.base)
    elif settings.tune == "lora":
        rank = settings.lora_rank or LORA_RANK
        alpha = 2.0 * rank if settings.lora_alpha is None else settings.lora_alpha
        loaded.model = add_lora(
            loaded.model,
            rank=rank,
            alpha=alpha,
            seed=settings.seed,
            targets=settings.lora_targets,
            base=str(Path(source.name, source.gguf_file or "")) if source.kind != "hub" else source.name,
            revision=source.revision,
        )
    loaded.description["trainable_parameters"] = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    loaded.description["computes_in"] = dtype
    return loaded


def training_arguments(settings: TrainRunSettings, *, total: int, dtype: str, out: Path) -> TrainingArguments:
    """Of a run of ``total`` updates in the folder ``out``."""
    warmup = math.ceil(settings.warmup_share * total)
    scheduler = "constant_with_warmup" if settings.scheduler == "constant" and warmup else settings.scheduler
    values: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "max_steps": total,
        "per_device_train_batch_size": settings.batch_rows,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate or LEARNING_RATES[settings.tune],
        "lr_scheduler_type": scheduler,
        "warmup_steps": warmup,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.beta1,
        "adam_beta2": settings.beta2,
        "max_grad_norm": settings.clip,
        "bf16": dtype == "bfloat16",
        "seed": settings.seed,
        "logging_steps": settings.log_steps,
        "save_strategy": "steps",
        "save_steps": settings.save_steps or (settings.eval_steps if settings.patience is not None else 100),
        "save_total_limit": 3,
        "eval_strategy": "no" if settings.eval_steps is None else "steps",
        "eval_steps": settings.eval_steps,
        "report_to": list(settings.report_to) or "none",
        "run_name": out.name,
        "disable_tqdm": True,
        "use_cpu": not _on_accelerator(settings),
        "dataloader_pin_memory": torch.cuda.is_available() and _on_accelerator(settings),
    }
    if settings.patience is not None:
        values |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    if "tensorboard" in settings.report_to:
        # Transformers 5 reads the place from the environment, earlier releases from an argument.
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(out / "tensorboard"))
        if "logging_dir" in {field.name for field in dataclasses.fields(TrainingArguments)}:
            values["logging_dir"] = os.environ["TENSORBOARD_LOGGING_DIR"]
    # A launcher's own wish, which the Trainer would follow where the arguments ask for nothing; ours is the setting.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if dtype == "bfloat16" else "no"
    return TrainingArguments(**values)


def _on_accelerator(settings: TrainRunSettings) -> bool:
    if settings.device != "auto":
        return settings.device != "cpu"
    return torch.cuda.is_available() or torch.backends.mps.is_available()
