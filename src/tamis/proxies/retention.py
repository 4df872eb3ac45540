"""What a proxy keeps of its target, as plain dataclasses: the report of every build, and the advice that follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from tamis.model.flops import ModelShape, stage_flops
from tamis.proxies.align import Aligned
from tamis.proxies.compressible import LeftOut
from tamis.proxies.influence import Agreement, Measured, agreement
from tamis.proxies.rows import Row

__all__ = ["Advice", "Cost", "Kept", "Retention", "SweepPoint", "advise", "block_tflops", "kept", "total_tflops"]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One way to score with the proxy, against the full model on held-out rows."""

    name: str
    loss: float | None  # mean over the rows; None where the scores do not come from a language model's loss
    agreement: Agreement


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
    sparsity: float  # asked for
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


def kept(name: str, ours: Measured, full: Measured, targets: Sequence[str], *, seed: int) -> Kept:
    """How a measured proxy agrees with the measured full model."""
    return Kept(
        name=name, loss=float(ours.losses.mean()), agreement=agreement(ours.scores, full.scores, targets, seed=seed)
    )


def advise(
    *, keep: float, sparsity: float, before: Kept | None, final: Kept, sweep: Sequence[SweepPoint], control: Kept | None
) -> Advice:
    """What to do, from what was measured and nothing else; correlations are of the middle of their intervals."""
    found = final.agreement.spearman.value
    points = [(point.sparsity, point.kept.agreement.spearman.value) for point in sweep]
    good = [rho for rho, value in [*points, (sparsity, found)] if value >= keep]
    best = max(good, default=None)
    sentences = []
    if found >= keep:
        sentences.append(f"This proxy keeps {found:.2f} of the ranking; {keep:g} was wanted. Score with it.")
        larger = [rho for rho in good if rho > sparsity]
        if larger:
            sentences.append(f"A sparsity of {max(larger):g} kept that much before alignment: try it, it is cheaper.")
    else:
        sentences.append(f"This proxy keeps {found:.2f} of the ranking, less than the {keep:g} that was wanted.")
        if best is not None:
            sentences.append(f"A sparsity of {best:g} kept it before alignment: build with --sparsity {best:g}.")
        else:
            sentences.append(
                "No sparsity that was measured kept it. Score with the full model after a --shortlist, align for more "
                "--steps, or accept the loss of agreement."
            )
    if before is not None and found < before.agreement.spearman.value:
        sentences.append("Alignment did not raise the agreement on held-out rows; more rows or a lower rate may.")
    if control is not None and control.agreement.spearman.value > found:
        sentences.append(
            f"The control, aligned by outputs alone for as long, keeps more ({control.agreement.spearman.value:.2f}): "
            "build with --objective kl."
        )
    low, high = final.agreement.spearman.low, final.agreement.spearman.high
    if high - low > 0.2:
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
