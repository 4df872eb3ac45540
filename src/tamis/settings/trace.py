"""What a user can ask of a recorded run: ``tamis attribute`` and ``tamis verify``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tamis.errors import InvalidSettings
from tamis.settings.checks import check_above_zero, check_at_least, check_targets
from tamis.settings.shared import SharedSettings
from tamis.values import nearest

__all__ = ["TRACE_METHODS", "AttributeSettings", "VerifySettings"]

TRACE_METHODS: dict[str, str] = {
    "adamw-influence": "removal carried through Adam's own moments and step sizes (the default)",
    "sgd-influence": "the same as if plain SGD had trained the model: right for SGD runs only",
    "tracin": "gradient products along the run, each step on its own",
}
Curvature = Literal["exact", "ggn", "fisher", "none"]


@dataclass(frozen=True, kw_only=True)
class _TraceSettings(SharedSettings):
    """What both verbs ask of the recorded run."""

    run: str  # folder of the record
    target: tuple[str, ...]
    model: str | None = None  # None: what the record names
    curvature: Curvature = "exact"
    removal: Literal["subtract", "renormalise"] = "subtract"
    batch_rows: int = 16  # target rows of one pass
    tolerance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self.target, required=True)
        check_at_least(self, 1, "batch_rows")
        check_at_least(self, 0, "seed")
        check_above_zero(self, "tolerance")


@dataclass(frozen=True, kw_only=True)
class AttributeSettings(_TraceSettings):
    """Everything that determines the scores of a recorded run.

    Raises:
        InvalidSettings: a value is of the wrong type, out of its range, or contradicts another one.
    """

    method: str = "adamw-influence"
    out: str = "tamis-attribution"
    form: Literal["adjoint", "matrix"] = "adjoint"
    secant: int = 0  # steps of finite removal; 0: first order
    per_row: bool = False  # a score for every target row, beside their mean
    error: Literal["none", "proxy", "exact"] = "none"
    error_samples: int = 20  # uses of samples whose exact second order is computed
    diagnose: bool | None = None  # None: where the curvature is not exact
    masks: int = 1  # of the matrix form: parts into which the coordinates are divided
    mask_share: float | None = None  # of the coordinates, drawn anew for every mask (the paper's); None: divided
    rescale: bool = False  # give back the curvature that a mask leaves out, on average
    store: str | None = None  # embeddings of the matrix form; None: <out>/store

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_method(self.method)
        check_at_least(self, 0, "secant")
        check_at_least(self, 1, "error_samples", "masks")
        if self.method != "adamw-influence":
            for name, off in (("secant", 0), ("error", "none"), ("form", "adjoint")):
                if getattr(self, name) != off:
                    raise InvalidSettings(f"{name}: is of adamw-influence; {self.method} has none, leave it out")
        if self.method == "tracin" and (self.diagnose or self.curvature != type(self).curvature):
            name = "diagnose" if self.diagnose else "curvature"
            raise InvalidSettings(f"{name}: tracin knows no curvature; leave it out")
        if self.error != "exact" and self.error_samples != type(self).error_samples:
            raise InvalidSettings("error_samples: counts what --error exact computes; pass that too, or leave it out")
        if self.form != "matrix" and self.store is not None:
            raise InvalidSettings("store: keeps embeddings of --form matrix; pass that too, or leave it out")
        if self.error != "none" and self.removal != "subtract":
            raise InvalidSettings("error: is that of --removal subtract; leave one of the two out")
        if self.form == "matrix":
            self._check_matrix()
        else:
            for name in ("masks", "mask_share", "rescale"):
                if getattr(self, name) != getattr(type(self), name):
                    raise InvalidSettings(f"{name}: the adjoint form needs no masks; they are of --form matrix")

    @property
    def diagnoses(self) -> bool:
        """Whether to compare scores without curvature and with the empirical Fisher."""
        if self.method == "tracin" or self.form == "matrix":
            return False
        return self.curvature != "exact" if self.diagnose is None else self.diagnose

    def _check_matrix(self) -> None:
        if self.mask_share is not None and not 0 < self.mask_share < 1:
            raise InvalidSettings(f"mask_share={self.mask_share}: expected a share above 0 and below 1")
        if self.rescale and self.masks == 1 and self.mask_share is None:
            raise InvalidSettings("rescale: one mask of all coordinates leaves no curvature out; add masks")
        if self.curvature != "fisher":
            raise InvalidSettings(
                f"curvature={self.curvature!r}: the matrix form is of the empirical Fisher; pass --curvature fisher"
            )
        for name, off in (("secant", 0), ("error", "none")):
            if getattr(self, name) != off:
                raise InvalidSettings(f"{name}: needs the target while it works backwards; use the adjoint form")
        if self.diagnose:
            raise InvalidSettings("diagnose: needs the target while it works backwards; use the adjoint form")


@dataclass(frozen=True, kw_only=True)
class VerifySettings(_TraceSettings):
    """What is retrained to see whether the scores of a run can be trusted.

    Raises:
        InvalidSettings: a value is of the wrong type, out of its range, or contradicts another one.
    """

    samples: int = 50  # uses of samples that are left out, one retraining each
    methods: tuple[str, ...] = ("adamw-influence", "sgd-influence", "tracin")
    out: str = "tamis-verification"
    secant: int = 0  # above 0: a further method, adamw-influence with finite removal
    per_row: bool = False  # correlate for every target row and average, in place of their mean loss
    processes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise InvalidSettings("methods: expected at least one")
        for name in self.methods:
            _check_method(name)
        check_at_least(self, 0, "secant")
        check_at_least(self, 1, "processes")
        check_at_least(self, 3, "samples")


def _check_method(name: str) -> None:
    if name not in TRACE_METHODS:
        raise InvalidSettings(
            f"method={name!r}: expected one of {', '.join(TRACE_METHODS)}{nearest(name, tuple(TRACE_METHODS))}"
        )
