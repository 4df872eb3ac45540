"""What a user can ask of a recorded run: ``tamis attribute`` and ``tamis verify``. No disk, no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tamis.errors import InvalidSettings
from tamis.settings import Format, check_targets
from tamis.values import check_types, nearest

__all__ = ["TRACE_METHODS", "AttributeSettings", "VerifySettings"]

TRACE_METHODS: dict[str, str] = {
    "adamw-influence": "removal carried through Adam's own moments and step sizes (the default)",
    "sgd-influence": "the same as if plain SGD had trained the model: right for SGD runs only",
    "tracin": "gradient products along the run, each step on its own",
}
Curvature = Literal["exact", "ggn", "fisher", "none"]


@dataclass(frozen=True, kw_only=True)
class AttributeSettings:
    """Everything that determines the scores of a recorded run.

    Raises:
        InvalidSettings: a value is of the wrong type, out of its range, or contradicts another one.
    """

    run: str  # folder of the record
    target: tuple[str, ...]
    method: str = "adamw-influence"
    out: str = "tamis-attribution"
    model: str | None = None  # None: what the record names
    form: Literal["adjoint", "matrix"] = "adjoint"
    curvature: Curvature = "exact"
    secant: int = 0  # steps of finite removal; 0: first order
    removal: Literal["subtract", "renormalise"] = "subtract"
    per_row: bool = False  # a score for every target row, beside their mean
    error: Literal["none", "proxy", "exact"] = "none"
    error_samples: int = 20  # uses of samples whose exact second order is computed
    diagnose: bool | None = None  # None: where the curvature is not exact
    masks: int = 1  # of the matrix form: parts into which the coordinates are divided
    store: str | None = None  # embeddings of the matrix form; None: <out>/store
    batch_rows: int = 16  # target rows of one pass
    tolerance: float | None = None
    seed: int = 0
    max_length: int = 2048
    device: str = "auto"
    revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    row_format: Format | None = None
    on_bad_row: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        check_types(self)
        check_targets(self.target, required=True)
        _check_method(self.method)
        for name, least in (("secant", 0), ("error_samples", 1), ("masks", 1), ("batch_rows", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InvalidSettings(f"{name}={getattr(self, name)}: expected at least {least}")
        if self.max_length < 2:
            raise InvalidSettings(f"max_length={self.max_length}: expected at least 2")
        if self.tolerance is not None and not self.tolerance > 0:
            raise InvalidSettings(f"tolerance={self.tolerance}: expected a number above zero")
        if self.method != "adamw-influence":
            for name, off in (("secant", 0), ("error", "none"), ("form", "adjoint")):
                if getattr(self, name) != off:
                    raise InvalidSettings(f"{name}: is of adamw-influence; {self.method} has none, leave it out")
        if self.error != "none" and self.removal != "subtract":
            raise InvalidSettings("error: is that of --removal subtract; leave one of the two out")
        if self.form == "matrix":
            self._check_matrix()
        elif self.masks != 1:
            raise InvalidSettings("masks: the adjoint form needs none; they are of --form matrix")

    @property
    def diagnoses(self) -> bool:
        """Whether to compare scores without curvature and with the empirical Fisher."""
        if self.method == "tracin" or self.form == "matrix":
            return False
        return self.curvature != "exact" if self.diagnose is None else self.diagnose

    def _check_matrix(self) -> None:
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
class VerifySettings:
    """What is retrained to see whether the scores of a run can be trusted.

    Raises:
        InvalidSettings: a value is of the wrong type, out of its range, or contradicts another one.
    """

    run: str
    target: tuple[str, ...]
    samples: int = 50  # uses of samples that are left out, one retraining each
    methods: tuple[str, ...] = ("adamw-influence", "sgd-influence", "tracin")
    out: str = "tamis-verification"
    model: str | None = None
    curvature: Curvature = "exact"
    secant: int = 0  # above 0: a further method, adamw-influence with finite removal
    removal: Literal["subtract", "renormalise"] = "subtract"
    per_row: bool = False  # correlate for every target row and average, in place of their mean loss
    processes: int = 1
    batch_rows: int = 16
    tolerance: float | None = None
    seed: int = 0
    max_length: int = 2048
    device: str = "auto"
    revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    row_format: Format | None = None
    on_bad_row: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        check_types(self)
        check_targets(self.target, required=True)
        if not self.methods:
            raise InvalidSettings("methods: expected at least one")
        for name in self.methods:
            _check_method(name)
        for name, least in (("samples", 3), ("processes", 1), ("batch_rows", 1), ("secant", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InvalidSettings(f"{name}={getattr(self, name)}: expected at least {least}")


def _check_method(name: str) -> None:
    if name not in TRACE_METHODS:
        raise InvalidSettings(
            f"method={name!r}: expected one of {', '.join(TRACE_METHODS)}{nearest(name, tuple(TRACE_METHODS))}"
        )
