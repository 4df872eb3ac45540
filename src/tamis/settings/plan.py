"""What a user can ask of ``tamis plan``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tamis.errors import InvalidSettings
from tamis.notation import check_method, check_projection, parse_shortlist
from tamis.settings.checks import budget_text, check_at_least, check_sources, check_targets
from tamis.settings.shared import LoadingSettings
from tamis.values import check_plain

__all__ = ["PlanSettings"]


@dataclass(frozen=True, kw_only=True)
class PlanSettings(LoadingSettings):
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
    aggregate: Literal["round-robin", "mean"] = "round-robin"  # some methods then pass the pool once per target
    drop_flagged: bool = False
    batch_invariant: bool = False
    assume_device: str = "h100"  # name of the device table
    utilisation: float | None = None  # part of the device's peak that is reached; None: the table's assumption
    measure: bool = False  # calibrate on a few batches on this machine instead of assuming a device
    compare: str | None = None  # folder (or manifest.json) of a finished run to check the plan against
    sample: int = 1000  # rows of each corpus that are tokenized, evenly spaced; 0: all
    device_map: str | None = None
    batch_tokens: int | None = None
    on_bad_row: Literal["fail", "skip"] = "skip"
    out: str | None = None  # folder for plan.json and plan.yaml; None: only printed

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", budget_text(self.budget))
        super().__post_init__()
        check_sources("pool", self.pool)
        check_targets(self.target, required=False)
        parse_shortlist(self.shortlist)
        check_projection(self.projection)
        for key, value in self.set.items():
            method, dot, name = key.rpartition(".")
            if not dot or not name.isidentifier():
                raise InvalidSettings(f"set: {key!r}: a plan covers every method, so write METHOD.NAME=VALUE")
            check_method(method, setting="set")
            check_plain(f"set.{key}", value)
        check_at_least(self, 0, "sample")
        check_at_least(self, 1, "projection_dim", "batch_tokens")
        if self.measure:
            for name in ("assume_device", "utilisation"):
                if getattr(self, name) != getattr(type(self), name):
                    raise InvalidSettings(f"{name}: is assumed where nothing is measured; leave it or --measure out")
        if self.utilisation is not None and not 0 < self.utilisation <= 1:
            raise InvalidSettings(f"utilisation={self.utilisation}: expected a part of the peak, above 0 and at most 1")
