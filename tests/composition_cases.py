"""Which scorer, model, projection and selector are run together, end to end: read by a test and by the documentation.

Every method meets every selector, every model and, if it has gradients to project, every projection; every projection
meets every model. Not every triple is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tamis.errors import InvalidSettings
from tamis.notation import PROJECTION_NAMES
from tamis.runs.select import make_method
from tamis.score import METHODS
from tamis.settings import SelectSettings

MODELS = ("all weights", "LoRA adapter", "proxy", "fewer blocks")
AGGREGATES = ("round-robin", "mean")
SELECTORS = (*AGGREGATES, "token budget", "behind a shortlist", "by source", "without flagged rows")


@dataclass(frozen=True)
class Case:
    """One run. A method without gradients has no projection."""

    method: str
    model: str
    selector: str
    projection: str | None = None

    def settings(self) -> dict[str, Any]:
        """Of ``tamis select``, as far as the case says."""
        own: dict[str, Any] = {"method": self.method, "budget": "6"}
        if self.projection is not None:
            own.update(projection=self.projection, projection_dim=None if self.projection == "none" else 8)
        if self.selector in AGGREGATES:
            own["aggregate"] = self.selector
        elif self.selector == "token budget":
            own["budget"] = "500-tokens"
        elif self.selector == "behind a shortlist":
            own["shortlist"] = "length:3x" if self.method == "bm25" else "bm25:3x"
        elif self.selector == "by source":
            own["shortlist"] = "sources:4"
        else:
            own["drop_flagged"] = True
        return own


def combines(
    *, method: str = "tracin", model: str = MODELS[0], projection: str | None = None, selector: str = "mean"
) -> bool:
    """Whether the settings of the pair are accepted: what the code itself refuses, it refuses here."""
    case = Case(method=method, model=model, projection=projection, selector=selector)
    try:
        make_method(SelectSettings(model="m", pool=("p",), target=("t",), **case.settings()))
    except InvalidSettings:
        return False
    return True


def _cases() -> tuple[Case, ...]:
    found = []
    for number, method in enumerate(METHODS):
        projections = [name for name in PROJECTION_NAMES if combines(method=method, projection=name)]
        for turn, selector in enumerate(name for name in SELECTORS if combines(method=method, selector=name)):
            found.append(
                Case(
                    method=method,
                    model=MODELS[(turn + number) % len(MODELS)],
                    selector=selector,
                    projection=projections[turn % len(projections)] if projections else None,
                )
            )
    met = {(case.projection, case.model) for case in found}
    missing = [(p, model) for p in PROJECTION_NAMES for model in MODELS if (p, model) not in met]
    return (*found, *(Case(method="tracin", model=m, selector="round-robin", projection=p) for p, m in missing))


CASES = _cases()
