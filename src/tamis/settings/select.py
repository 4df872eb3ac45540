"""What a user can ask of ``tamis select``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tamis.errors import InvalidSettings
from tamis.notation import check_method, check_projection, parse_shortlist
from tamis.settings.checks import budget_text, check_at_least, check_method_settings, check_sources, check_targets
from tamis.settings.shared import LoadingSettings
from tamis.values import nearest

__all__ = ["SelectSettings"]


@dataclass(frozen=True, kw_only=True)
class SelectSettings(LoadingSettings):
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
    # "bm25:5x": that method keeps 5 times the budget, the chosen one scores only those; "sources:8": it scores 8
    # random rows of every source, whose mean is the score of all its rows
    shortlist: str | None = None
    aggregate: Literal["round-robin", "mean"] = "round-robin"
    share: Mapping[str, float] = field(default_factory=dict)  # target name -> its part of the budget; equal if empty
    projection: str | None = None  # None: the method's own
    projection_dim: int | None = None
    seed: int = 0
    duplicates: Literal["one", "keep", "near"] = "one"
    near_threshold: float = 0.8
    drop_leaks: bool = False
    drop_flagged: bool = False
    device_map: str | None = None
    batch_tokens: int | None = None  # None: chosen for the device
    batch_invariant: bool = False  # one row per forward pass: scores are bit-stable whatever the batch
    store: str | None = None  # features shared between runs; None: <out>/store
    shard_rows: int = 256
    report: bool = True
    write_messages: bool = False  # the selected rows also as chats, in selected-messages.jsonl

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", budget_text(self.budget))
        super().__post_init__()
        check_sources("pool", self.pool)
        names = check_targets(self.target, required=True)
        check_method(self.method)
        check_method_settings(self.set)
        if self.shortlist is not None:
            asked = parse_shortlist(self.shortlist)
            if asked.method == self.method:
                raise InvalidSettings(
                    f"shortlist={self.shortlist!r} uses the chosen method {self.method!r} itself; drop the shortlist, "
                    "or choose a cheaper method for it, for example bm25:5x"
                )
            if asked.per_source and self.drop_flagged:
                raise InvalidSettings(
                    f"shortlist={self.shortlist!r}: only some rows of every source are looked at, so flagged rows "
                    "cannot be left out; drop the flag, or the shortlist"
                )
            if asked.per_source and self.method == "influence-distillation":
                raise InvalidSettings(
                    f"shortlist={self.shortlist!r}: {self.method} carries scores itself, from landmarks; set their "
                    "number (landmarks), or score the sampled rows with tracin or less"
                )
        _check_shares(self.share, names)
        check_projection(self.projection)
        check_at_least(self, 0, "seed")
        check_at_least(self, 1, "projection_dim", "batch_tokens", "shard_rows")
        if not 0 < self.near_threshold <= 1:
            raise InvalidSettings(f"near_threshold={self.near_threshold}: expected a similarity above 0 and at most 1")


def _check_shares(shares: Mapping[str, float], names: list[str]) -> None:
    if not shares:
        return
    for name, share in shares.items():
        if name not in names:
            raise InvalidSettings(
                f"share: there is no target called {name!r}{nearest(name, names)} (targets: {', '.join(names)})"
            )
        if share <= 0:
            raise InvalidSettings(f"share: {name}={share}: expected a number above zero; leave the target out instead")
    missing = [name for name in names if name not in shares]
    if missing:
        raise InvalidSettings(f"share: {', '.join(missing)} has no share; give every target one, or none at all")
