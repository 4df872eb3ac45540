"""What a proxy keeps of its target, as plain dataclasses: the report of every build, and the advice that follows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn

from tamis.model.flops import ModelShape, stage_flops
from tamis.proxies.align import Aligned, CurvePoint
from tamis.proxies.compressible import LeftOut
from tamis.proxies.influence import Interval, Measured, ModelAgreement, model_agreement
from tamis.proxies.rows import Row

__all__ = [
    "BEFORE",
    "CONTROL",
    "Advice",
    "Cost",
    "Kept",
    "Retention",
    "SweepPoint",
    "advise",
    "block_tflops",
    "kept",
    "total_tflops",
]

_SOME_AGREEMENT = 0.5  # rank correlation below which two selections of a few percent share little
BEFORE, CONTROL = "before alignment", "control: outputs alone, three times the steps"  # names of measurements


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One way to score with the proxy, against the full model on held-out rows."""

    name: str
    loss: float | None  # mean over the rows; None where the scores do not come from a language model's loss
    agreement: ModelAgreement


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """A sparsity that was only measured, before alignment."""

    sparsity: float  # asked for
    achieved: float
    kept: Kept


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What scoring costs with both models, and what the proxy cost to make."""

    params_full: int
    params_proxy: int
    tflops_full: float  # of the gradient pass over the held-out rows
    tflops_proxy: float
    block_tflops_full: float  # without the LM head
    block_tflops_proxy: float
    timed_rows: int  # of the held-out ones
    seconds_full: float  # of a pass over those, the best of three
    seconds_proxy: float
    build_seconds: float  # probes and factors
    align_seconds: float  # steps, without measurements
    pool_pass_seconds: float  # the full model's gradient pass over the whole pool, extrapolated

    @property
    def flops_ratio(self) -> float:
        """Proxy over full, of the transformer blocks."""
        return self.block_tflops_proxy / self.block_tflops_full

    @property
    def seconds_ratio(self) -> float:
        """Proxy over full, measured."""
        return self.seconds_proxy / self.seconds_full

    @property
    def build_share(self) -> float:
        """Building and aligning over the full model's pass over the pool."""
        return (self.build_seconds + self.align_seconds) / self.pool_pass_seconds


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The sparsity up to which the wanted part of the ranking was kept, None if nothing measured kept it."""

    keep: float
    sparsity: float | None
    sentences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Everything that the report says."""

    model: str
    preset: str
    objective: str
    space: str
    sparsity: float | None  # asked for; None for another model, which has the size that it has
    achieved: float  # share of the numbers removed from the layers in factors
    achieved_whole: float  # of the whole model, embeddings included
    compressed_layers: int
    ranks: tuple[int, int] | None  # smallest and largest
    left_out: tuple[LeftOut, ...]
    rows: dict[str, int]  # role -> rows
    targets: dict[str, int]  # target -> rows
    loss_full: float
    final: Kept  # the proxy as it is saved, in the space in which it is scored
    others: tuple[Kept, ...]  # before alignment, other spaces, the control
    sweep: tuple[SweepPoint, ...]
    aligned: Aligned | None
    control: Aligned | None
    cost: Cost
    advice: Advice
    notes: tuple[str, ...]

    @property
    def loss_ratio(self) -> float | None:
        """Full over proxy: 1 is a proxy as good as its target."""
        return self.loss_full / self.final.loss if self.final.loss else None

    def advised(self, keep: float, final: Kept | None = None) -> Advice:
        """The advice for another wanted part of the ranking, or for other measurements of the proxy itself."""
        before, control = (
            next((kept for kept in self.others if kept.name == name), None) for name in (BEFORE, CONTROL)
        )
        return advise(
            keep=keep,
            sparsity=self.sparsity,
            before=before,
            final=final or self.final,
            sweep=self.sweep,
            control=control,
            seconds_ratio=self.cost.seconds_ratio,
            is_low_rank=bool(self.ranks or self.sweep),
        )

    def to_json(self) -> dict[str, Any]:
        """What stands in ``retention.json``: the fields, and the ratios that follow from them."""
        return {
            **json.loads(json.dumps(asdict(self))),
            "loss_ratio": self.loss_ratio,
            "flops_ratio": self.cost.flops_ratio,
            "seconds_ratio": self.cost.seconds_ratio,
            "build_share": self.cost.build_share,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Retention:
        """The inverse of ``to_json``."""
        plain = {entry.name: found[entry.name] for entry in fields(cls)}
        plain["ranks"] = tuple(found["ranks"]) if found["ranks"] else None
        plain["left_out"] = tuple(LeftOut(**entry) for entry in found["left_out"])
        plain["final"] = _kept_from(found["final"])
        plain["others"] = tuple(_kept_from(entry) for entry in found["others"])
        plain["sweep"] = tuple(SweepPoint(**{**entry, "kept": _kept_from(entry["kept"])}) for entry in found["sweep"])
        for name in ("aligned", "control"):
            plain[name] = found[name] and Aligned(
                **{**found[name], "curve": tuple(CurvePoint(**point) for point in found[name]["curve"])}
            )
        plain["cost"] = Cost(**found["cost"])
        plain["advice"] = Advice(**{**found["advice"], "sentences": tuple(found["advice"]["sentences"])})
        plain["notes"] = tuple(found["notes"])
        return cls(**plain)


def _kept_from(found: Mapping[str, Any]) -> Kept:
    said = found["agreement"]
    intervals = {name: Interval(**said[name]) for name in ("spearman", "top_overlap")}
    agreement = ModelAgreement(**intervals, by_target=dict(said["by_target"]))
    return Kept(name=found["name"], loss=found["loss"], agreement=agreement)


def kept(name: str, ours: Measured, full: Measured, targets: Sequence[str], *, seed: int) -> Kept:
    """How a measured proxy agrees with the measured full model."""
    found = model_agreement(ours.scores, full.scores, targets, seed=seed)
    return Kept(name=name, loss=float(ours.losses.mean()), agreement=found)


def advise(
    *,
    keep: float,
    sparsity: float | None,
    before: Kept | None,
    final: Kept,
    sweep: Sequence[SweepPoint],
    control: Kept | None,
    seconds_ratio: float,
    is_low_rank: bool = True,
) -> Advice:
    """What to do, from what was measured and nothing else; correlations are of the middle of their intervals.

    Args:
        keep: part of the ranking that is wanted.
        sparsity: None for another model, which has none.
        before: the proxy before alignment, None without one.
        final: the proxy.
        sweep: other sparsities.
        control: the one aligned by outputs alone, None without one.
        seconds_ratio: of a scoring pass, proxy over full.
        is_low_rank: baselines are not, and have no alignment to lengthen.
    """
    found = final.agreement.spearman.value
    points = [(point.sparsity, point.kept.agreement.spearman.value) for point in sweep]
    if sparsity is not None:
        points.append((sparsity, found))
    good = [rho for rho, value in points if value >= keep]
    best = max(good, default=None)
    sentences = []
    if found >= keep:
        sentences.append(f"This proxy keeps {found:.2f} of the ranking; {keep:g} was wanted. Score with it.")
        larger = [rho for rho in good if sparsity is not None and rho > sparsity]
        if larger:
            sentences.append(f"A sparsity of {max(larger):g} kept that much before alignment: try it, it is cheaper.")
    else:
        sentences.append(f"This proxy keeps {found:.2f} of the ranking, less than the {keep:g} that was wanted.")
        if best is not None and best == sparsity:
            sentences.append("The same sparsity kept it before alignment: build with --objective none.")
        elif best is not None:
            sentences.append(f"A sparsity of {best:g} kept it before alignment: build with --sparsity {best:g}.")
        else:
            last = "take another --sibling" if sparsity is None else "take a lower --sparsity"
            last = "accept the loss of agreement" if found >= _SOME_AGREEMENT else last
            if is_low_rank:
                sentences.append(
                    "No sparsity that was measured kept it. Score with the full model after a --shortlist, align for "
                    f"more --steps, or {last}."
                )
            else:
                sentences.append(
                    f"Score with the full model after a --shortlist, build a proxy by the preset default, or {last}."
                )
        if found < _SOME_AGREEMENT:
            sentences.append("With so little agreement a selection by it is not the model's: do not select with it.")
    if before is not None and found < before.agreement.spearman.value:
        sentences.append("Alignment did not raise the agreement on held-out rows; more rows or a lower rate may.")
    if control is not None and control.agreement.spearman.value > found:
        sentences.append(
            f"The control, aligned by outputs alone for as long, keeps more ({control.agreement.spearman.value:.2f}): "
            "build with --objective kl."
        )
    if seconds_ratio >= 1:
        sentences.append(
            f"A pass of it took {seconds_ratio:.2f} times as long as one of the full model: it saves no time on this "
            "machine."
        )
    low, high = final.agreement.spearman.low, final.agreement.spearman.high
    if low is None or high is None:
        sentences.append("The scores vary too little for an interval: raise --held-out-rows before you decide.")
    elif high - low > 0.2:
        sentences.append(f"The interval is wide ({low:.2f} to {high:.2f}): raise --held-out-rows before you decide.")
    return Advice(keep=keep, sparsity=best, sentences=tuple(sentences))


def total_tflops(model: nn.Module, rows: Sequence[Row]) -> float:
    """Of a gradient pass over ``rows``."""
    return _tflops(ModelShape.from_model(model), rows)


def block_tflops(model: nn.Module, rows: Sequence[Row], *, work: str = "gradient") -> float:
    """The same without the LM head, which no proxy makes smaller; ``work`` may be "forward" alone."""
    return _tflops(replace(ModelShape.from_model(model), vocabulary=0), rows, work)


def _tflops(shape: ModelShape, rows: Sequence[Row], work: str = "gradient") -> float:
    lengths = [len(row.tokens.input_ids) for row in rows]
    supervised = sum(row.tokens.num_supervised for row in rows)
    return stage_flops(shape, work, sum(lengths), supervised, sum(n * n for n in lengths)) / 1e12
