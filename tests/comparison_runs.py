"""Finished runs made by hand, for tests of what is concluded from them."""

from __future__ import annotations

from typing import Any

from tamis.comparison.contenders import Contender
from tamis.comparison.records import Run


def made_run(name: str, seed: int, row_losses: list[float], **changes: Any) -> Run:
    """A run of 10 updates of 4 rows, whose loss is the mean of its rows'."""
    values: dict[str, Any] = {
        "key": f"{name}-{seed}",
        "contender": name,
        "budget": "5%",
        "seed": seed,
        "steps": 10,
        "rows": 40,
        "seen_rows": 40,
        "tokens": 400,
        "supervised_tokens": 200,
        "tflops": 1.0,
        "train_seconds": 2.0,
        "measure_seconds": 1.0,
        "loss": sum(row_losses) / len(row_losses),
        "exact_match": None,
        "row_losses": tuple(row_losses),
        "row_matches": (),
        "answers": (),
        "warnings": (),
        "spec": {},
    }
    return Run(**{**values, **changes})


def contender(name: str, kind: Any, **more: Any) -> Contender:
    baseline = kind in ("uniform", "full", "equal-cost", "same-sources", "untouched") or name in ("bm25", "length")
    return Contender(name=name, kind=kind, is_baseline=baseline, **more)
