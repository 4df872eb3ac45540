"""What a user can ask of each verb: one frozen dataclass per verb, checked when it is made.

The command line, a YAML file and Python all end here. Nothing in this file reads a disk or imports PyTorch, so that a
misspelt setting is answered at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tamis.budget import describe_budget, parse_budget
from tamis.errors import InvalidSettings
from tamis.notation import (
    GRADIENT_METHODS,
    METHOD_SUMMARIES,
    ONLINE_SUMMARIES,
    PROJECTION_NAMES,
    candidates_parts,
    check_method,
    check_online_method,
    check_projection,
    shortlist_parts,
    target_parts,
)
from tamis.values import check_plain, check_types, from_dict, nearest, to_dict

__all__ = [
    "GRADIENT_METHODS",
    "METHOD_SUMMARIES",
    "ONLINE_SUMMARIES",
    "PROJECTION_NAMES",
    "DoctorSettings",
    "Format",
    "PlanSettings",
    "SelectSettings",
    "TrainRunSettings",
    "check_targets",
    "from_dict",
    "nearest",
    "shortlist_parts",
    "target_parts",
    "to_dict",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Format = Literal["messages", "prompt-completion", "instruction", "text"]


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """Everything that determines a selection, as the user states it. ``tamis select`` and ``tamis.select`` share it.

    Raises:
        InvalidSettings: a value is of the wrong type, out of its range, or contradicts another one.
    """

    model: str
    pool: tuple[str, ...]
    target: tuple[str, ...]  # "path" or "name=path"; the name defaults to the file's stem
    method: str = "tracin"
    set: Mapping[str, Any] = field(default_factory=dict)  # settings of the method, by name
    budget: str = "5%"  # "500" rows, "5%" of the rows, "200k-tokens"
    out: str = "tamis-out"
    shortlist: str | None = None  # "bm25:5x": that method keeps 5 times the budget, the chosen one scores only those
    aggregate: Literal["round-robin", "mean"] = "round-robin"
    shares: Mapping[str, float] = field(default_factory=dict)  # target name -> its part of the budget; equal if empty
    projection: str | None = None  # None: the method's own
    projection_dim: int | None = None
    seed: int = 0
    max_length: int = 2048
    dtype: Dtype = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    device_map: str | None = None
    row_format: Format | None = None
    on_bad_row: Literal["fail", "skip"] = "fail"
    duplicates: Literal["one", "keep", "near"] = "one"
    near_threshold: float = 0.8
    drop_leaks: bool = False
    drop_flagged: bool = False
    batch_tokens: int | None = None  # None: chosen for the device
    batch_invariant: bool = False  # one row per forward pass: scores are bit-stable whatever the batch
    store: str | None = None  # features shared between runs; None: <out>/store
    shard_rows: int = 256
    report: bool = True
    write_messages: bool = False  # the selected rows also as chats, in selected-messages.jsonl

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", _budget_text(self.budget))
        check_types(self)
        _check_sources("pool", self.pool)
        names = check_targets(self.target, required=True)
        check_method(self.method)
        _check_method_settings(self.set)
        if self.shortlist is not None:
            cheap, _ = shortlist_parts(self.shortlist)
            if cheap == self.method:
                raise InvalidSettings(
                    f"shortlist={self.shortlist!r} uses the chosen method {self.method!r} itself; drop the shortlist, "
                    "or choose a cheaper method for it, for example bm25:5x"
                )
        _check_shares(self.shares, names)
        check_projection(self.projection)
        _at_least("projection_dim", self.projection_dim, 1)
        _at_least("seed", self.seed, 0)
        _at_least("max_length", self.max_length, 2)
        _at_least("batch_tokens", self.batch_tokens, 1)
        _at_least("shard_rows", self.shard_rows, 1)
        _check_not_empty(
            self, "model", "out", "store", "device", "attention", "revision", "chat_template", "device_map"
        )
        if not 0 < self.near_threshold <= 1:
            raise InvalidSettings(f"near_threshold={self.near_threshold}: expected a similarity above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """What ``tamis doctor`` looks at, before anyone spends money.

    Raises:
        InvalidSettings: a value is of the wrong type, out of its range, or contradicts another one.
    """

    model: str
    pool: tuple[str, ...]
    target: tuple[str, ...] = ()
    preview: int = 3  # rows of each corpus whose loss mask is shown
    sample: int = 1000  # rows of each corpus that are tokenized for the counts, evenly spaced; 0: all
    check_rows: int = 4  # rows used by each of the numeric checks; by the projection's, at each of four lengths
    projection: str = "factorized"  # whose distortion is measured; "none": of none
    projection_dim: int | None = None
    numeric: bool = True  # whether weights are loaded and the numeric checks run
    max_length: int = 2048
    dtype: Dtype = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    device_map: str | None = None
    row_format: Format | None = None
    on_bad_row: Literal["fail", "skip"] = "skip"
    out: str | None = None  # folder for doctor.json and doctor.yaml; None: only printed

    def __post_init__(self) -> None:
        check_types(self)
        _check_sources("pool", self.pool)
        check_targets(self.target, required=False)
        _at_least("preview", self.preview, 0)
        _at_least("sample", self.sample, 0)
        check_projection(self.projection)
        _at_least("projection_dim", self.projection_dim, 1)
        _at_least("check_rows", self.check_rows, 2)
        _at_least("max_length", self.max_length, 2)
        _check_not_empty(self, "model", "out", "device", "attention", "revision", "chat_template", "device_map")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What ``tamis plan`` estimates: the cost of every method at this pool, on this or on a named device.

    Raises:
        InvalidSettings: a value is of the wrong type, out of its range, or contradicts another one.
    """

    model: str
    pool: tuple[str, ...]
    target: tuple[str, ...] = ()
    budget: str = "5%"
    shortlist: str = "bm25:5x"  # the cascade shown beside every gradient method
    set: Mapping[str, Any] = field(default_factory=dict)  # method settings as "less.warmup_epochs"
    projection: str | None = None  # None: each method's own
    projection_dim: int | None = None
    assume_device: str = "h100"  # name of the device table
    utilisation: float | None = None  # part of the device's peak that is reached; None: the table's assumption
    measure: bool = False  # calibrate on a few batches on this machine instead of assuming a device
    compare: str | None = None  # folder (or manifest.json) of a finished run to check the plan against
    sample: int = 1000  # rows of each corpus that are tokenized, evenly spaced; 0: all
    max_length: int = 2048
    dtype: Dtype = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    device_map: str | None = None
    batch_tokens: int | None = None
    row_format: Format | None = None
    on_bad_row: Literal["fail", "skip"] = "skip"
    out: str | None = None  # folder for plan.json and plan.yaml; None: only printed

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", _budget_text(self.budget))
        check_types(self)
        _check_sources("pool", self.pool)
        check_targets(self.target, required=False)
        shortlist_parts(self.shortlist)
        check_projection(self.projection)
        _check_plan_settings(self.set)
        _at_least("projection_dim", self.projection_dim, 1)
        _at_least("sample", self.sample, 0)
        _at_least("max_length", self.max_length, 2)
        _at_least("batch_tokens", self.batch_tokens, 1)
        if self.utilisation is not None and not 0 < self.utilisation <= 1:
            raise InvalidSettings(f"utilisation={self.utilisation}: expected a part of the peak, above 0 and at most 1")
        _check_not_empty(
            self,
            *("model", "assume_device", "compare", "out"),
            *("device", "attention", "revision", "chat_template", "device_map"),
        )


@dataclass(frozen=True, kw_only=True)
class TrainRunSettings:
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
    target_rows: int | None = None  # target rows looked at per choice; None: half as many as candidates
    eval_target: tuple[str, ...] = ()  # rows that only measure; like target
    held_out: float | None = None  # share of every target's rows that only measure; None: 0.2, or 0 with eval_target
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
    candidates: str = "exact"  # how they are scored: "exact", "reuse:K", "jvp", "proxy:MODEL"
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
    max_length: int = 2048
    dtype: Dtype = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    row_format: Format | None = None
    on_bad_row: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        check_types(self)
        _check_sources("pool", self.pool)
        check_targets(self.target, required=True)
        check_targets(self.eval_target, required=False)
        check_online_method(self.method)
        _check_method_settings(self.set)
        for name in ("keep", "oversample"):
            if name in self.set:
                raise InvalidSettings(f"set.{name}: {name} belongs to every method; write --{name} {self.set[name]}")
        for name in ("keep", "oversample", "steps", "target_rows", "eval_steps", "patience", "lora_rank"):
            _at_least(name, getattr(self, name), 1)
        for name in ("batch_rows", "accumulation", "save_steps", "log_steps"):
            _at_least(name, getattr(self, name), 1)
        _at_least("forecast_every", self.forecast_every, 0)
        _at_least("record_every", self.record_every, 1)
        if self.record_every is not None and self.record is None:
            raise InvalidSettings("record_every: nothing is recorded; pass --record too")
        if self.record is not None and self.method == "target-only":
            raise InvalidSettings("record: target-only trains on target rows, which are no samples to attribute to")
        _at_least("seed", self.seed, 0)
        _at_least("max_length", self.max_length, 2)
        self._check_candidates()
        self._check_length()
        self._check_measuring()
        self._check_optimizer()
        self._check_place()
        _check_not_empty(self, "model", "out", "device", "attention", "revision", "chat_template", "record")

    @property
    def held_out_share(self) -> float:
        """Of every target's rows."""
        if self.held_out is not None:
            return self.held_out
        return 0.0 if self.eval_target else 0.2

    def _check_candidates(self) -> None:
        if candidates_parts(self.candidates) == ("proxy", ""):
            raise InvalidSettings("candidates='proxy': name the model, as in proxy:HuggingFaceTB/SmolLM2-135M-Instruct")
        _at_least("target_every", self.target_every, 1)
        if not 0 <= self.target_ema < 1:
            raise InvalidSettings(f"target_ema={self.target_ema}: expected at least 0 and below 1")

    def _check_length(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else "both"
            raise InvalidSettings(f"steps, epochs: expected one of them, got {given}; pass --steps or --epochs")
        if self.epochs is not None and self.epochs <= 0:
            raise InvalidSettings(f"epochs={self.epochs}: expected a number above zero")

    def _check_measuring(self) -> None:
        if self.held_out is not None and not 0 <= self.held_out < 1:
            raise InvalidSettings(f"held_out={self.held_out}: expected a share of the target rows, at least 0, below 1")
        if self.eval_target and self.held_out:
            raise InvalidSettings("held_out, eval_target: rows that measure come from one of them; give one")
        measured = bool(self.eval_target) or self.held_out_share > 0
        if self.eval_steps is not None and not measured:
            raise InvalidSettings("eval_steps: no row measures; pass --eval-target, or --held-out above 0")
        if self.patience is not None and self.eval_steps is None:
            raise InvalidSettings("patience: counts measurements, and none is made on the way; pass --eval-steps")
        if self.patience is not None and self.save_steps not in (None, self.eval_steps):
            raise InvalidSettings(
                f"patience: the weights of every measurement must be on disk, but save_steps={self.save_steps} and "
                f"eval_steps={self.eval_steps}; leave --save-steps out"
            )

    def _check_optimizer(self) -> None:
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise InvalidSettings(f"learning_rate={self.learning_rate}: expected a number above zero")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise InvalidSettings(f"lora_alpha={self.lora_alpha}: expected a number above zero")
        for name in ("weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise InvalidSettings(f"{name}={getattr(self, name)}: expected at least 0")
        for name in ("warmup_share", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidSettings(f"{name}={getattr(self, name)}: expected at least 0 and below 1")
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


def _budget_text(value: Any) -> str:
    """Numbers, as YAML and Python write them, become the text of the same budget: 500 rows, 0.05 is 5%."""
    budget = parse_budget(value)
    return value if isinstance(value, str) else describe_budget(budget)


def _check_sources(name: str, paths: tuple[str, ...]) -> None:
    if not paths or not all(path.strip() for path in paths):
        raise InvalidSettings(f"{name}: expected at least one file, glob or hub id, got {list(paths)!r}; pass --{name}")


def check_targets(texts: tuple[str, ...], *, required: bool) -> list[str]:
    """The targets' names; refuses two of one name, and none where one is required."""
    if required:
        _check_sources("target", texts)
    names: list[str] = []
    for text in texts:
        name, _ = target_parts(text)
        if name in names:
            raise InvalidSettings(f"two targets are called {name!r}; name them: --target NAME=PATH ({text!r} is one)")
        names.append(name)
    return names


def _check_method_settings(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not key.isidentifier():
            raise InvalidSettings(f"set: {key!r} is not the name of a method setting; expected --set name=value")
        check_plain(f"set.{key}", value)


def _check_plan_settings(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        method, dot, name = key.rpartition(".")
        if not dot or not name.isidentifier():
            raise InvalidSettings(f"set: {key!r}: a plan covers every method, so write METHOD.NAME=VALUE")
        check_method(method, setting="set")
        check_plain(f"set.{key}", value)


def _check_shares(shares: Mapping[str, float], names: list[str]) -> None:
    if not shares:
        return
    for name, share in shares.items():
        if name not in names:
            raise InvalidSettings(
                f"shares: there is no target called {name!r}{nearest(name, names)} (targets: {', '.join(names)})"
            )
        if share <= 0:
            raise InvalidSettings(f"shares: {name}={share}: expected a number above zero; leave the target out instead")
    missing = [name for name in names if name not in shares]
    if missing:
        raise InvalidSettings(f"shares: {', '.join(missing)} has no share; give every target one, or none at all")


def _at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise InvalidSettings(f"{name}={value}: expected at least {minimum}")


def _check_not_empty(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value.strip():
            raise InvalidSettings(f"{name}={value!r}: expected a text that is not empty")
