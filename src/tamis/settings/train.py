"""What a user can ask of ``tamis train``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tamis.errors import InvalidSettings
from tamis.notation import candidates_parts, check_online_method
from tamis.settings.checks import (
    check_above_zero,
    check_at_least,
    check_below_one,
    check_method_settings,
    check_sources,
    check_targets,
)
from tamis.settings.shared import LoadingSettings
from tamis.values import nearest

__all__ = ["STEP_SETTINGS", "TrainRunSettings"]

# Settings of a choice that are no field of a method; a comparison can have them differ between its methods.
STEP_SETTINGS = (
    *("oversample", "reduction", "source_rows", "source_temperature", "source_memory"),
    *("target_rows", "target_rank", "target_every", "target_ema"),
)
_OF_EVERY_METHOD = ("keep", "candidates", *STEP_SETTINGS)


@dataclass(frozen=True, kw_only=True)
class TrainRunSettings(LoadingSettings):
    """Everything that determines a training run that chooses its data. ``tamis train`` and ``tamis.train`` share it.

    Raises:
        InvalidSettings: a value is of the wrong type, out of its range, or contradicts another one.
    """

    model: str
    pool: tuple[str, ...]
    target: tuple[str, ...]  # "path" or "name=path"; several are one target, in which every row counts alike
    method: str = "filter-then-weight"
    set: Mapping[str, Any] = field(default_factory=dict)  # settings of the method, by name; preset: "paper"
    keep: int = 8  # candidates of a hard choice
    oversample: int = 4  # candidates looked at per candidate kept
    steps: int | None = None  # updates; give these or epochs
    epochs: float | None = None  # passes over the pool's rows as candidates
    out: str = "tamis-train"
    target_rows: int | None = None  # target rows per look; None: half as many as candidates are scored
    eval: tuple[str, ...] = ()  # rows that only measure; like target
    held_out: float | None = None  # share of every target's rows that only measure; None: 0.2, or 0 with eval
    eval_steps: int | None = None  # updates between measurements; None: only before and after
    patience: int | None = None  # stop after that many measurements without a better one, and keep the best weights
    tune: Literal["lora", "full"] = "lora"
    lora_rank: int | None = None  # None: 16; for a model that is an adapter: its own
    lora_alpha: float | None = None  # None: twice the rank
    lora_targets: tuple[str, ...] = ()  # names of linear layers; empty: all but the head
    learning_rate: float | None = None  # None: 2e-4 with LoRA, 2e-5 without
    scheduler: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    warmup_share: float = 0.03  # of the updates
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0  # largest norm of an update's gradient; 0: none
    batch_rows: int = 8  # rows of one forward pass
    accumulation: int = 1  # choices per update
    reduction: Literal["rows", "tokens"] = "rows"  # what counts alike in an update
    candidates: str = "exact"  # how they are scored: "exact", "reuse:K", "sources:K", "jvp", "proxy:MODEL"
    source_rows: int = 2  # of each source, scored at one choice in K of candidates="sources:K"
    source_temperature: float = 0.5  # 0: the best sources; the larger, the more evenly candidates are drawn
    source_memory: float = 0.5  # weight of a score in its source's mean, relative to one of the next scoring
    target_rank: int | None = None  # of every matrix of the target's direction; None: whole
    target_every: int = 1  # choices that a target gradient is used for
    target_ema: float = 0.0  # share of the earlier target gradients in their running mean
    drop_leaks: bool = False
    save_steps: int | None = None  # updates between checkpoints; None: 100, or eval_steps with patience
    log_steps: int = 10
    forecast_every: int = 10  # updates between comparisons of predicted and realised drop; 0: never
    report_to: tuple[str, ...] = ()
    record: str | None = None  # folder for what tamis attribute needs of the run
    record_every: int | None = None  # updates between two recorded states; None: the root of all, at least 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sources("pool", self.pool)
        check_targets(self.target, required=True)
        check_targets(self.eval, required=False, setting="eval")
        check_online_method(self.method)
        check_method_settings(self.set)
        for name in self.set:
            if name in _OF_EVERY_METHOD:
                flag = name.replace("_", "-")
                raise InvalidSettings(f"set.{name}: {name} belongs to every method; write --{flag} {self.set[name]}")
        check_at_least(self, 0, "forecast_every", "seed")
        check_at_least(self, 1, "keep", "oversample", "steps", "target_rows", "eval_steps", "patience", "lora_rank")
        check_at_least(self, 1, "batch_rows", "accumulation", "save_steps", "log_steps", "record_every")
        check_at_least(self, 1, "target_every", "target_rank")
        if self.record_every is not None and self.record is None:
            raise InvalidSettings("record_every: nothing is recorded; pass --record too")
        if self.record is not None:
            folder, out = Path(self.record).resolve(), Path(self.out).resolve()
            # What lies in model/ is replaced by the trained model when the run ends, a record included.
            if folder == out or out / "model" in (folder, *folder.parents):
                raise InvalidSettings(
                    "record: a record needs a folder of its own, beside --out or in it (not in model)"
                )
        if self.record is not None and self.method == "target-only":
            raise InvalidSettings("record: target-only trains on target rows, which are no samples to attribute to")
        self._check_candidates()
        self._check_length()
        self._check_measuring()
        self._check_optimizer()
        self._check_place()

    @property
    def held_out_share(self) -> float:
        """Of every target's rows."""
        if self.held_out is not None:
            return self.held_out
        return 0.0 if self.eval else 0.2

    def _check_candidates(self) -> None:
        if candidates_parts(self.candidates) == ("proxy", ""):
            raise InvalidSettings("candidates='proxy': name the model, as in proxy:HuggingFaceTB/SmolLM2-135M-Instruct")
        check_below_one(self, "target_ema")
        for name in ("source_rows", "source_temperature", "source_memory"):
            if candidates_parts(self.candidates)[0] != "sources" and getattr(self, name) != getattr(type(self), name):
                raise InvalidSettings(
                    f"{name}: candidates={self.candidates!r} are not scored by source; only --candidates sources:K (in "
                    "a comparison online:METHOD@sources:K) reads it"
                )

    def _check_length(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else "both"
            raise InvalidSettings(f"steps, epochs: expected one of them, got {given}; pass --steps or --epochs")
        check_above_zero(self, "epochs")

    def _check_measuring(self) -> None:
        if self.held_out is not None and not 0 <= self.held_out < 1:
            raise InvalidSettings(f"held_out={self.held_out}: expected a share of the target rows, at least 0, below 1")
        if self.eval and self.held_out:
            raise InvalidSettings("held_out, eval: rows that measure come from one of them; give one")
        measured = bool(self.eval) or self.held_out_share > 0
        if self.eval_steps is not None and not measured:
            raise InvalidSettings("eval_steps: no row measures; pass --eval, or --held-out above 0")
        if self.patience is not None and self.eval_steps is None:
            raise InvalidSettings("patience: counts measurements, and none is made on the way; pass --eval-steps")
        if self.patience is not None and self.save_steps not in (None, self.eval_steps):
            raise InvalidSettings(
                f"patience: the weights of every measurement must be on disk, but save_steps={self.save_steps} and "
                f"eval_steps={self.eval_steps}; leave --save-steps out"
            )

    def _check_optimizer(self) -> None:
        check_above_zero(self, "learning_rate", "lora_alpha")
        check_at_least(self, 0, "weight_decay", "clip")
        check_below_one(self, "warmup_share", "beta1", "beta2")
        adapter = (self.lora_rank, self.lora_alpha) != (None, None) or bool(self.lora_targets)
        if self.tune == "full" and adapter:
            raise InvalidSettings("tune='full' trains no adapter; leave lora_rank, lora_alpha and lora_targets out")

    def _check_place(self) -> None:
        for name in self.report_to:
            if name not in ("tensorboard", "wandb"):
                raise InvalidSettings(
                    f"report_to={name!r}: expected tensorboard or wandb{nearest(name, ('tensorboard', 'wandb'))}"
                )
        if self.dtype == "float16":
            raise InvalidSettings("dtype='float16': online selection does not scale losses; choose bfloat16 or float32")
        if self.device.startswith("cuda:"):
            raise InvalidSettings(
                f"device={self.device!r}: training takes the first device it sees; pass --device cuda and set "
                f"CUDA_VISIBLE_DEVICES={self.device.removeprefix('cuda:')}"
            )
