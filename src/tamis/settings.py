"""What a user can ask of each verb: one frozen dataclass per verb, checked when it is made.

The command line, a YAML file and Python all end here. Nothing in this file reads a disk or imports PyTorch, so that a
misspelt setting is answered at once.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

from tamis.errors import InvalidSettings
from tamis.selection.budget import describe_budget, parse_budget

__all__ = [
    "GRADIENT_METHODS",
    "METHOD_SUMMARIES",
    "PROJECTION_NAMES",
    "DoctorSettings",
    "PlanSettings",
    "SelectSettings",
    "from_dict",
    "nearest",
    "shortlist_parts",
    "target_parts",
    "to_dict",
]

# The methods of ``tamis.score.METHODS`` in one line each. They are listed here a second time because that dict
# imports PyTorch, and help and error messages must not wait for it; a test holds the two equal.
METHOD_SUMMARIES: dict[str, str] = {
    "uniform": "a random draw: what every other method has to beat",
    "length": "rows with most supervised tokens first: shows what length alone explains",
    "bm25": "words shared with the target rows; costs next to nothing and is hard to beat",
    "loss-drop": "relative loss drop of the row after a short warm-up on the target",
    "mid-ppl": "rows of middling perplexity; ignores the target",
    "rds+": "cosine of position-weighted mean hidden states with the target rows",
    "tracin": "gradient cosine with the target rows (the default)",
    "less": "Adam update of the row against the target gradient, over checkpoints of a LoRA warm-up",
    "influence-distillation": "exact gradients of a few landmark rows, carried to all others by cheap embeddings",
}
GRADIENT_METHODS = ("tracin", "less")
PROJECTION_NAMES = ("none", "factorized", "rademacher", "hadamard", "mask")

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Format = Literal["messages", "prompt-completion", "instruction", "text"]
T = TypeVar("T")


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

    def __post_init__(self) -> None:
        _check_types(self)
        _check_sources("pool", self.pool)
        names = _check_targets(self.target, required=True)
        _check_method(self.method)
        _check_method_settings(self.set)
        if self.shortlist is not None:
            cheap, _ = shortlist_parts(self.shortlist)
            if cheap == self.method:
                raise InvalidSettings(
                    f"shortlist={self.shortlist!r} uses the chosen method {self.method!r} itself; drop the shortlist, "
                    "or choose a cheaper method for it, for example bm25:5x"
                )
        _check_shares(self.shares, names)
        _check_projection(self.projection)
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
    check_rows: int = 4  # rows used by the numeric checks
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
        _check_types(self)
        _check_sources("pool", self.pool)
        _check_targets(self.target, required=False)
        _at_least("preview", self.preview, 0)
        _at_least("sample", self.sample, 0)
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
        _check_types(self)
        _check_sources("pool", self.pool)
        _check_targets(self.target, required=False)
        shortlist_parts(self.shortlist)
        _check_projection(self.projection)
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


def shortlist_parts(text: str) -> tuple[str, float]:
    """Method and multiple of the budget: ``"bm25:5x"`` is ``("bm25", 5.0)``.

    Raises:
        InvalidSettings: the text is not of that form, the method is unknown, or the multiple is below 1.
    """
    match = re.fullmatch(r"([^:]+):(\d+(?:\.\d+)?)x?", text.strip())
    if not match:
        raise InvalidSettings(f"shortlist={text!r}: expected METHOD:MULTIPLE, for example 'bm25:5x'")
    _check_method(match[1], setting="shortlist")
    multiple = float(match[2])
    if multiple < 1:
        raise InvalidSettings(f"shortlist={text!r}: it must keep at least the budget itself (1x)")
    return match[1], multiple


def target_parts(text: str) -> tuple[str, str]:
    """Name and path of a target: ``"maths=data/gsm8k.jsonl"``, or a path whose stem is the name.

    What stands before the first ``=`` is a name if it has no slash; a file with ``=`` in its name is written
    ``./a=b.jsonl``. A glob is named by its stem without the wildcards, or else by its folder.

    Raises:
        InvalidSettings: the name or the path is empty.
    """
    before, equals, after = text.partition("=")
    if equals and not re.search(r"[/\\*?\[]", before):
        if not before.strip() or not after.strip():
            raise InvalidSettings(f"target={text!r}: expected a path or NAME=PATH")
        return before.strip(), after.strip()
    if not text.strip():
        raise InvalidSettings("target: expected a path or NAME=PATH, got an empty text")
    path = PurePosixPath(text.strip().replace("\\", "/").split("@")[0].split(":")[-1])
    stem = re.sub(r"[*?\[\]{}]", "", path.stem).strip(" ._-")
    return stem or path.parent.name or text.strip(), text.strip()


def nearest(word: str, choices: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the closest of ``choices``, or an empty text if none is close."""
    close = difflib.get_close_matches(word.lower().replace("-", "_"), {c.replace("-", "_"): c for c in choices}, n=1)
    if not close:
        return ""
    return next(f", did you mean {c!r}?" for c in choices if c.replace("-", "_") == close[0])


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain values (lists, dicts, scalars), in the order in which the fields are declared."""
    plain: dict[str, Any] = {}
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = {key: list(v) if isinstance(v, tuple) else v for key, v in value.items()}
        plain[entry.name] = value
    return plain


def from_dict(cls: type[T], values: Mapping[str, Any], *, origin: str = "settings") -> T:
    """Settings of class ``cls`` from plain values, the inverse of ``to_dict``.

    Args:
        cls: one of the settings classes of this file.
        values: field name -> value; fields left out keep their defaults.
        origin: where the values come from, named in errors (a file's path, for example).

    Raises:
        InvalidSettings: a key is unknown (the nearest known one is suggested), a required one is missing, or a value
            is refused by ``cls``.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]  # T is one of the dataclasses above
    for key in values:
        if key not in known:
            hint = nearest(str(key), known) or f"; known are {', '.join(known)}"
            raise InvalidSettings(f"{origin}: unknown setting {key!r}{hint}")
    for name, entry in known.items():
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and values.get(name) in (None, (), []):
            raise InvalidSettings(f"{name} is missing: pass --{name}, or set '{name}' in the --config file")
    return cls(**dict(values))


def _check_types(settings: Any) -> None:
    """Check every field against its annotation; lists become tuples, and mappings become plain dicts of their own."""
    hints = typing.get_type_hints(type(settings))
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if entry.name == "budget":
            value = _budget_text(value)
        object.__setattr__(settings, entry.name, _checked(entry.name, value, hints[entry.name]))


def _checked(name: str, value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` wants it, or an error that names the setting."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _checked(name, value, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        if value not in arguments:
            listed = ", ".join(map(str, arguments))
            raise InvalidSettings(f"{name}={value!r}: expected one of {listed}{nearest(str(value), arguments)}")
        return value
    if origin is tuple:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise InvalidSettings(f"{name}={value!r}: expected a text or a list of texts")
        return tuple(items)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise InvalidSettings(f"{name}={value!r}: expected NAME=VALUE pairs (in YAML: a mapping)")
        item_hint = arguments[1]
        return {key: v if item_hint is Any else _checked(f"{name}.{key}", v, item_hint) for key, v in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise InvalidSettings(f"{name}={value!r}: expected a finite number")
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        expected = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[hint]
        raise InvalidSettings(f"{name}={value!r}: expected {expected}, got {type(value).__name__}")
    return value


def _budget_text(value: Any) -> str:
    """Numbers, as YAML and Python write them, become the text of the same budget: 500 rows, 0.05 is 5%."""
    budget = parse_budget(value)
    return value if isinstance(value, str) else describe_budget(budget)


def _check_sources(name: str, paths: tuple[str, ...]) -> None:
    if not paths or not all(path.strip() for path in paths):
        raise InvalidSettings(f"{name}: expected at least one file, glob or hub id, got {list(paths)!r}; pass --{name}")


def _check_targets(texts: tuple[str, ...], *, required: bool) -> list[str]:
    if required:
        _check_sources("target", texts)
    names: list[str] = []
    for text in texts:
        name, _ = target_parts(text)
        if name in names:
            raise InvalidSettings(f"two targets are called {name!r}; name them: --target NAME=PATH ({text!r} is one)")
        names.append(name)
    return names


def _check_method(name: str, *, setting: str = "method") -> None:
    if name not in METHOD_SUMMARIES:
        listed = ", ".join(METHOD_SUMMARIES)
        raise InvalidSettings(
            f"{setting}: unknown method {name!r}{nearest(name, METHOD_SUMMARIES)} (methods: {listed})"
        )


def _check_method_settings(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not key.isidentifier():
            raise InvalidSettings(f"set: {key!r} is not the name of a method setting; expected --set name=value")
        _check_plain(f"set.{key}", value)


def _check_plan_settings(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        method, dot, name = key.rpartition(".")
        if not dot or not name.isidentifier():
            raise InvalidSettings(f"set: {key!r}: a plan covers every method, so write METHOD.NAME=VALUE")
        _check_method(method, setting="set")
        _check_plain(f"set.{key}", value)


def _check_plain(name: str, value: Any) -> None:
    """Method settings end up in YAML and JSON, so they are scalars or flat lists of scalars."""
    if isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, (list, tuple)):
                raise InvalidSettings(f"{name}={value!r}: expected a flat list")
            _check_plain(name, item)
        return
    if value is not None and not isinstance(value, (str, int, float, bool)):
        raise InvalidSettings(f"{name}={value!r}: expected a text, a number, true, false, null or a list of these")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidSettings(f"{name}={value!r}: expected a finite number")


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


def _check_projection(name: str | None) -> None:
    if name is not None and name not in PROJECTION_NAMES:
        raise InvalidSettings(
            f"projection={name!r}: expected one of {', '.join(PROJECTION_NAMES)}{nearest(name, PROJECTION_NAMES)}"
        )


def _at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise InvalidSettings(f"{name}={value}: expected at least {minimum}")


def _check_not_empty(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value.strip():
            raise InvalidSettings(f"{name}={value!r}: expected a text that is not empty")
