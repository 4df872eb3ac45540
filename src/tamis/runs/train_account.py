"""What the manifest of a training run says about it: what it did, from its own log, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tamis.online.account import fallback_share, forecast_correlation, read_account
from tamis.online.cost import as_plain
from tamis.online.resume import read_log

__all__ = ["describe_cost", "describe_training"]


def describe_training(out: Path, after: Mapping[str, float], *, steps: int, stopped_early: bool) -> dict[str, Any]:
    """Of the run in the folder ``out``, with the held-out losses ``after`` it."""
    log, account = read_log(out / "log.jsonl"), read_account(out / "candidates")
    before = next(entry for entry in log if entry["step"] == 0) if after else {}
    correlation, pairs = forecast_correlation(log)
    measured = {
        name.removeprefix("eval_loss").removeprefix("/") or "all": {"before": before[name], "after": value}
        for name, value in after.items()
    }
    return {
        "steps": steps,
        "stopped_early": stopped_early,
        "candidates": account.candidates,
        "distinct_candidates": account.distinct_candidates,
        "kept": account.kept,
        "distinct_rows": account.distinct_rows,
        "fallback_share": fallback_share(log),
        "share_by_source": account.share_by_source,
        "held_out_loss": measured["all"] if measured else None,
        "held_out_loss_by_target": {name: value for name, value in measured.items() if name != "all"},
        "predicted_vs_realised_drop": {"correlation": correlation, "pairs": pairs},
    }


def describe_cost(work: Tensor, *, seconds: float) -> dict[str, Any]:
    """Of ``work`` (``tamis.online.cost.Counter.total``); measurements and forecasts are no part of it.

    ``candidate_tokens`` are pool rows' tokens through the model (or a proxy), for scores and for updates: twice for
    rows that ran for both.
    """
    parts = as_plain(work)
    return {
        "seconds": round(seconds, 3),
        "candidate_tokens": parts["candidates"]["tokens"] + parts["update"]["tokens"],
        "target_tokens": parts["target"]["tokens"],
        "tflops": {name: part["tflops"] for name, part in parts.items()},
        "total_tflops": sum(part["tflops"] for part in parts.values()),
    }
