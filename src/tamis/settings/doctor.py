"""What a user can ask of ``tamis doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tamis.notation import check_projection
from tamis.settings.checks import check_at_least, check_sources, check_targets
from tamis.settings.shared import LoadingSettings

__all__ = ["DoctorSettings"]


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(LoadingSettings):
    """What ``tamis doctor`` looks at, before anyone spends money.

    Raises:
        InvalidSettings: a value is of the wrong type, out of its range, or contradicts another one.
    """

    model: str
    pool: tuple[str, ...]
    target: tuple[str, ...] = ()
    preview: int = 3  # rows of each corpus whose loss mask is shown
    sample: int = 1000  # rows of each corpus that are tokenized for the counts, evenly spaced; 0: all
    check_rows: int = 4  # rows used by each of the numeric checks; by the projection's, at each of four lengths
    projection: str = "factorized"  # whose distortion is measured; "none": of none
    projection_dim: int | None = None
    numeric: bool = True  # whether weights are loaded and the numeric checks run
    device_map: str | None = None
    on_bad_row: Literal["fail", "skip"] = "skip"
    out: str | None = None  # folder for doctor.json and doctor.yaml; None: only printed

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sources("pool", self.pool)
        check_targets(self.target, required=False)
        check_projection(self.projection)
        check_at_least(self, 0, "preview", "sample")
        check_at_least(self, 1, "projection_dim")
        check_at_least(self, 2, "check_rows")
