"""What a user can ask of ``tamis compare``, and what that asks of the selections and training runs inside it.

Nothing in this file reads a disk or imports PyTorch. Most values are checked by the settings of the verbs that a
comparison is made of, which are built here once for every method as soon as the comparison's own settings are made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from tamis.budget import describe_budget, parse_budget
from tamis.errors import InvalidSettings
from tamis.notation import check_method, check_online_method, parse_shortlist
from tamis.settings.checks import check_at_least, check_targets
from tamis.settings.select import SelectSettings
from tamis.settings.shared import LoadingSettings
from tamis.settings.train import STEP_SETTINGS, TrainRunSettings
from tamis.values import check_plain, nearest

__all__ = ["BASELINES", "ONLINE", "CompareSettings", "MethodText", "method_parts"]

ONLINE = "online:"
BASELINES = ("uniform", "bm25", "length", "full")  # always compared with, whatever is named
# Settings of a selection, not of a method, that --set may change for one method.
_OF_THE_SELECTION = ("aggregate", "drop_flagged")
# Settings that a check by planted rows, which trains nothing, does not read.
_OF_RUNS = (
    *("eval", "budget", "budgets", "seeds", "metric", "answer_pattern", "answer_tokens"),
    *("task_folder", "task_limit", "task_shots", "subsets", "subset_share", "steps", "epochs", "update_rows"),
    *("learning_rate", "warmup_share", "weight_decay", "clip", "tune", "lora_rank", "lora_alpha", "lora_targets"),
    *("oversample", "save_steps"),
)
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True, kw_only=True)
class MethodText:
    """One of ``--methods``, taken apart: ``[LABEL=][SHORTLIST+]METHOD`` or ``[LABEL=]online:METHOD[@CANDIDATES]``."""

    label: str
    method: str
    shortlist: str | None = None
    is_online: bool = False
    candidates: str = "exact"  # of an online method: how they are scored


def method_parts(text: str) -> MethodText:
    """The parts of ``text``.

    >>> method_parts("quick=bm25:5x+tracin")
    MethodText(label='quick', method='tracin', shortlist='bm25:5x', is_online=False, candidates='exact')

    Raises:
        InvalidSettings: it is not of that form, or names a method that there is not.
    """
    label, equals, rest = text.strip().rpartition("=")
    if equals and not _LABEL.fullmatch(label.strip()):
        raise InvalidSettings(
            f"methods: {text!r}: expected LABEL=METHOD with a label of letters, digits, '.', '_', '+' and '-'"
        )
    if rest.startswith(ONLINE):
        name, at, candidates = rest.removeprefix(ONLINE).partition("@")
        check_online_method(name)
        return MethodText(
            label=label.strip() or rest, method=name, is_online=True, candidates=candidates if at else "exact"
        )
    shortlist, plus, name = rest.partition("+")
    if not plus or rest == "rds+":
        shortlist, name = "", rest
    check_method(name, setting="methods")
    if shortlist:
        parse_shortlist(shortlist)
    return MethodText(label=label.strip() or rest, method=name, shortlist=shortlist or None)


@dataclass(frozen=True, kw_only=True)
class CompareSettings(LoadingSettings):
    """Everything that determines a comparison. ``tamis compare`` and ``tamis.compare`` share it.

    Raises:
        InvalidSettings: a value is of the wrong type, out of its range, or contradicts another one.
    """

    model: str
    pool: tuple[str, ...]
    target: tuple[str, ...]  # like SelectSettings.target
    eval: tuple[str, ...] = ()  # rows that only measure, "path" or "name=path"; empty: half of every target's rows
    methods: tuple[str, ...] = ("tracin",)
    set: Mapping[str, Any] = field(default_factory=dict)  # settings of methods, as "LABEL.NAME"
    budget: str = "5%"  # the verdict's
    budgets: tuple[str, ...] = ()  # further ones, for a curve
    seeds: int = 5
    metric: Literal["loss", "exact-match"] = "loss"
    answer_pattern: str | None = None  # regular expression whose last match is the answer; None: the whole text
    answer_tokens: int = 64  # generated at most
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness, measured beside the metric
    task_folder: str | None = None  # of tasks that are not the harness's own
    task_limit: int | None = None  # questions of each task; None: all
    task_shots: int | None = None  # examples in front of a question; None: the task's own
    subsets: int = 0  # random parts of the pool to train on, for the linear datamodelling score; 0: none
    subset_share: float = 0.5  # of the pool's rows
    planted: bool = False  # known-answer rows in the pool; nothing is trained
    relevant: tuple[str, ...] = ()  # rows to plant as relevant; empty: half of the target's rows are held back
    relevant_sources: tuple[str, ...] = ()  # sources of the pool that are of the target's kind: not background
    planted_rows: int = 40  # relevant rows planted at most
    background_rows: int = 400  # rows of the pool that the planted ones are mixed into; 0: all
    out: str = "tamis-compare"
    store: str | None = None  # features shared with other runs; None: <out>/store
    steps: int | None = None  # updates of every run; None: as many as the epochs take
    epochs: int = 2  # passes over the selected rows
    update_rows: int = 8  # rows of one update
    learning_rate: float | None = None  # None: 2e-4 with LoRA, 2e-5 without
    warmup_share: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    tune: Literal["lora", "full"] = "lora"
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()
    oversample: int = 4  # of online methods: candidates per row kept
    save_steps: int = 200  # updates that a kill can lose; shorter runs start anew
    aggregate: Literal["round-robin", "mean"] = "round-robin"
    duplicates: Literal["one", "keep", "near"] = "one"
    drop_leaks: bool = False
    seed: int = 0
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", describe_budget(parse_budget(self.budget)))
        written: Any = self.budgets  # YAML and Python also write numbers, or a single one
        if written is None:
            raise InvalidSettings("budgets: expected a list of budgets, got null; leave it out for none")
        given = [written] if isinstance(written, (str, int, float)) else list(written)
        object.__setattr__(self, "budgets", tuple(describe_budget(parse_budget(text)) for text in given))
        super().__post_init__()
        check_at_least(self, 1, "seeds", "answer_tokens", "planted_rows", "epochs", "update_rows", "save_steps")
        if self.background_rows < 0:
            raise InvalidSettings(f"background_rows={self.background_rows}: expected at least 0 (all rows)")
        if self.subsets < 0 or self.subsets in (1, 2):
            raise InvalidSettings(f"subsets={self.subsets}: expected 0, or at least 3 for a rank correlation")
        if not 0 < self.subset_share < 1:
            raise InvalidSettings(f"subset_share={self.subset_share}: expected a share above 0 and below 1")
        self._check_methods()
        self._check_measuring()
        for text in (*self.contenders, *map(method_parts, ("bm25", "length"))):
            if text.is_online:
                self.train_settings(out=self.out, steps=1, seed=self.seed, online=text)
            else:
                self.select_settings(text, budget=self.budget, out=self.out)
                if self.own_settings(text.label).get("weights", "none") != "none":
                    raise InvalidSettings(
                        f"{text.label} weights its rows, and runs of a comparison train on all rows alike; "
                        f"leave --set {text.label}.weights out"
                    )
        self.train_settings(out=self.out, steps=1 if self.steps is None else self.steps, seed=self.seed)

    @property
    def contenders(self) -> tuple[MethodText, ...]:
        """The methods named, without those that always run."""
        parts = [method_parts(text) for text in self.methods]
        return tuple(text for text in parts if text.label not in BASELINES)

    @property
    def of_runs(self) -> tuple[str, ...]:
        """Settings that were given and that only training runs read, and the measuring after them."""
        own = {entry.name: entry for entry in fields(self)}
        return tuple(name for name in _OF_RUNS if getattr(self, name) != own[name].default)

    @property
    def all_budgets(self) -> tuple[str, ...]:
        """The verdict's budget first."""
        return tuple(dict.fromkeys([self.budget, *self.budgets]))

    def own_settings(self, label: str) -> dict[str, Any]:
        """What ``set`` says of one method."""
        return {key.rpartition(".")[2]: v for key, v in self.set.items() if key.rpartition(".")[0] == label}

    def select_settings(self, text: MethodText, *, budget: str, out: str) -> SelectSettings:
        """Of the selection that a method makes."""
        own = self.own_settings(text.label)
        of_selection = {name: own.pop(name) for name in _OF_THE_SELECTION if name in own}
        return SelectSettings(
            model=self.model, pool=self.pool, target=self.target, method=text.method, set=own, budget=budget, out=out,
            shortlist=text.shortlist, duplicates=self.duplicates, drop_leaks=self.drop_leaks,
            seed=self.seed, batch_tokens=self.batch_tokens, store=self.store or f"{self.out}/store",
            **{"aggregate": self.aggregate, **of_selection, **self._shared},
        )  # fmt: skip

    def train_settings(self, *, out: str, steps: int, seed: int, online: MethodText | None = None) -> TrainRunSettings:
        """Of a training run: an online method's, or one on given rows, which takes only its model from here."""
        own = self.own_settings(online.label) if online else {}
        of_step = {name: own.pop(name) for name in STEP_SETTINGS if name in own}
        return TrainRunSettings(
            model=self.model, pool=self.pool, target=self.target, method=online.method if online else "full",
            candidates=online.candidates if online else "exact", set=own, keep=self.update_rows,
            steps=steps, out=out, held_out=0.0, tune=self.tune, lora_rank=self.lora_rank, lora_alpha=self.lora_alpha,
            lora_targets=self.lora_targets, learning_rate=self.learning_rate, warmup_share=self.warmup_share,
            weight_decay=self.weight_decay, clip=self.clip, drop_leaks=self.drop_leaks, save_steps=self.save_steps,
            forecast_every=0, seed=seed, **{"oversample": self.oversample, **of_step, **self._shared},
        )  # fmt: skip

    @property
    def _shared(self) -> dict[str, Any]:
        """How models are loaded and rows are read: alike in everything that a comparison is made of."""
        return {entry.name: getattr(self, entry.name) for entry in fields(LoadingSettings)}

    def _check_methods(self) -> None:
        if not self.methods:
            raise InvalidSettings("methods: expected at least one; pass --methods tracin, for example")
        parts = [method_parts(text) for text in self.methods]
        labels = [text.label for text in parts]
        for label in labels:
            if labels.count(label) > 1:
                raise InvalidSettings(f"methods: two are called {label!r}; name them: --methods a=tracin b=tracin")
        for text in parts:
            if text.label in BASELINES and (text.label != text.method or text.is_online):
                raise InvalidSettings(f"methods: {text.label!r} is a baseline's name; choose another label")
        known = [*labels, "bm25", "length"]
        for key, value in self.set.items():
            label, dot, name = key.rpartition(".")
            if not dot or not name.isidentifier():
                raise InvalidSettings(f"set: {key!r}: a comparison has several methods, so write LABEL.NAME=VALUE")
            if label not in known:
                raise InvalidSettings(
                    f"set: no method is called {label!r}{nearest(label, known)}; there are {', '.join(labels)}"
                )
            if name == "candidates":
                raise InvalidSettings(f"set.{key}: it is part of the method's name; write online:METHOD@{value}")
            if name == "keep":
                raise InvalidSettings(
                    f"set.{key}: every contender has the same rows in an update; write --update-rows {value}"
                )
            check_plain(f"set.{key}", value)

    def _check_measuring(self) -> None:
        for name, least in (("task_limit", 1), ("task_shots", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidSettings(f"{name}={value}: expected at least {least}")
        given = [name for name in ("task_folder", "task_limit", "task_shots") if getattr(self, name) is not None]
        if given and not self.tasks:
            raise InvalidSettings(f"{given[0]}: no task is asked for; add tasks=gsm8k, for example")
        if self.tasks and self.planted:
            raise InvalidSettings("tasks: with planted nothing is trained that could answer them; leave one out")
        if self.planted:
            if any(text.is_online for text in self.contenders):
                raise InvalidSettings(
                    "planted: nothing is trained, so online methods cannot be checked; leave them out"
                )
            by_source = [
                text.label for text in self.contenders if text.shortlist and parse_shortlist(text.shortlist).per_source
            ]
            if by_source:
                raise InvalidSettings(
                    f"planted: {by_source[0]!r} chooses sources, and planted rows are a source of their own, so it "
                    "would find them however it scores; leave it out, and name the method alone"
                )
            return
        if self.relevant or self.relevant_sources:
            raise InvalidSettings("relevant, relevant_sources: they belong to --planted; add it, or leave them out")
        check_targets(self.eval, required=False, setting="eval")
        if self.metric == "loss" and self.answer_pattern is not None:
            raise InvalidSettings("answer_pattern: it reads generated answers; add --metric exact-match")
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise InvalidSettings(f"answer_pattern={self.answer_pattern!r}: {error}") from error
