"""What the plan of a method is worked out from, and one pass over rows as such a plan has it. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tamis.evaluate.inputs import CorpusSize
from tamis.model.flops import (
    FACTORIZED_SIDE,
    FEATURE_NUMBERS,
    Matrix,
    ModelShape,
    feature_dim,
    projected_flops,
    stage_flops,
)

__all__ = ["BYTES_BESIDE", "FEATURE_BYTES", "MethodQuestion", "PassPlan", "total_size"]

FEATURE_BYTES = {"float16": 2, "float32": 4}
BYTES_BESIDE = 16  # scale, loss and norm of a row, stored with its feature
# Influence Distillation (2025), section 5.2, after Kaplan et al.: a forward pass costs 2 operations a parameter, a
# backward pass 4, and a row is one token.
_PAPER_FORWARDS = {"forward": 1.0, "gradient": 3.0}


@dataclass(frozen=True, kw_only=True)
class PassPlan:
    """One pass over rows, as a stage of a run will report it."""

    name: str
    stage: str  # of the run's account, to which other passes may belong too
    work: Literal["forward", "gradient"]
    size: CorpusSize
    tflops: float  # of the model's passes
    feature_tflops: float = 0.0  # of turning them into features, or of comparing them as they pass
    counts_features: bool = False  # whether the run's account has the latter, too
    paper_forwards: float = 0.0  # what the cost column of Influence Distillation counts for a row, in forward passes
    disk_bytes: float = 0.0

    @property
    def counted_tflops(self) -> float:
        """What the manifest of a run says of this pass."""
        return self.tflops + (self.feature_tflops if self.counts_features else 0.0)


@dataclass(frozen=True, kw_only=True)
class MethodQuestion:
    """What the estimate of one method depends on."""

    shape: ModelShape
    scored: CorpusSize  # the pool rows to score
    pool: CorpusSize
    targets: tuple[CorpusSize, ...]
    values: Mapping[str, Any]  # the method's settings, defaults filled in
    with_lora: Callable[[int], ModelShape]  # the shape of the model with a LoRA adapter of a rank on all its layers
    aggregate: Literal["round-robin", "mean"] = "round-robin"
    drop_flagged: bool = False

    @property
    def target(self) -> CorpusSize:
        """The rows of all targets."""
        return total_size(self.targets)

    def columns(self) -> tuple[CorpusSize, ...]:
        """The target rows behind each column of scores where a mean target is one column: a row each, or a target."""
        if self.aggregate == "mean":
            return self.targets
        return tuple(part for one in self.targets for part in [one.times(1 / max(1, one.rows))] * one.rows)

    def model_pass(
        self,
        name: str,
        stage: str,
        work: Literal["forward", "gradient"],
        size: CorpusSize,
        *,
        shape: ModelShape | None = None,
    ) -> PassPlan:
        """A pass whose outputs are a few numbers a row."""
        flops = stage_flops(shape or self.shape, work, size.tokens, size.supervised_tokens, size.squared_tokens)
        paper = _PAPER_FORWARDS[work]
        return PassPlan(name=name, stage=stage, work=work, size=size, tflops=flops / 1e12, paper_forwards=paper)

    def feature_numbers(self, shape: ModelShape | None = None) -> int:
        """Numbers of one row's projected gradient."""
        found = shape or self.shape
        return feature_dim(self._with_head(found), str(self.values["projection"]), self._dim())

    def gradient_numbers(self) -> int:
        """Numbers of one row's whole gradient."""
        return self._with_head(self.shape).gradient_numel

    def feature_pass(
        self,
        name: str,
        stage: str,
        size: CorpusSize,
        *,
        shape: ModelShape | None = None,
        kept: bool,
        whole: bool = False,
    ) -> PassPlan:
        """A gradient pass that keeps one projected gradient a row; unprojected ones only if ``whole`` says so."""
        shape = shape or self.shape
        projection, dim = str(self.values["projection"]), self._dim()
        stored = kept and (whole or projection != "none")  # otherwise exact gradients are compared as they pass
        entry = FEATURE_BYTES[self.values["feature_dtype"]]
        row_bytes = self.feature_numbers(shape) * entry if stored else 4 * max(1, self.target.rows)
        sizes = {"rows": size.rows, "tokens": size.tokens, "supervised_tokens": size.supervised_tokens}
        flops = projected_flops(shape, projection, dim, include_head=self._has_head(), **sizes)
        return replace(
            self.model_pass(name, stage, "gradient", size, shape=shape),
            feature_tflops=flops / 1e12,
            counts_features=True,
            disk_bytes=float(size.rows) * (row_bytes + BYTES_BESIDE),
        )

    def _dim(self) -> int:
        dim = self.values["projection_dim"]
        if dim is None:
            return FACTORIZED_SIDE if self.values["projection"] == "factorized" else FEATURE_NUMBERS
        return int(dim)

    def _has_head(self) -> bool:
        return bool(self.values.get("include_head", False))

    def _with_head(self, shape: ModelShape) -> ModelShape:
        if not self._has_head():
            return shape
        return replace(shape, gradient_matrices=(*shape.gradient_matrices, _head(shape)))


def total_size(sizes: tuple[CorpusSize, ...]) -> CorpusSize:
    """Several corpora as one."""
    return CorpusSize(
        rows=sum(size.rows for size in sizes),
        tokens=sum(size.tokens for size in sizes),
        supervised_tokens=sum(size.supervised_tokens for size in sizes),
        squared_tokens=sum(size.squared_tokens for size in sizes),
    )


def _head(shape: ModelShape) -> Matrix:
    return Matrix(out_features=shape.vocabulary, in_features=shape.hidden, count=1)
