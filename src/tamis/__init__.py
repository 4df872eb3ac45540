"""Choose and weight fine-tuning data by gradients. The public face is what ``__all__`` lists.

Names are imported when first used, so that ``import tamis`` and ``tamis --help`` do not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "CompareResult",
    "CompareSettings",
    "DoctorSettings",
    "OnlineSFTTrainer",
    "OnlineTrainer",
    "PlanSettings",
    "PlantedResult",
    "SelectSettings",
    "Selection",
    "TamisError",
    "TrainResult",
    "TrainRunSettings",
    "__version__",
    "compare",
    "doctor",
    "methods",
    "online",
    "plan",
    "select",
    "train",
]

if TYPE_CHECKING:
    from tamis import methods, online
    from tamis.api import CompareResult, PlantedResult, Selection, TrainResult, compare, doctor, plan, select, train
    from tamis.compare_settings import CompareSettings
    from tamis.errors import TamisError
    from tamis.online.sft import OnlineSFTTrainer
    from tamis.online.trainer import OnlineTrainer
    from tamis.settings import DoctorSettings, PlanSettings, SelectSettings, TrainRunSettings

_HOMES = {
    "CompareResult": "tamis.api",
    "CompareSettings": "tamis.compare_settings",
    "DoctorSettings": "tamis.settings",
    "OnlineSFTTrainer": "tamis.online.sft",
    "OnlineTrainer": "tamis.online.trainer",
    "PlanSettings": "tamis.settings",
    "PlantedResult": "tamis.api",
    "SelectSettings": "tamis.settings",
    "Selection": "tamis.api",
    "TamisError": "tamis.errors",
    "TrainResult": "tamis.api",
    "TrainRunSettings": "tamis.settings",
    "compare": "tamis.api",
    "doctor": "tamis.api",
    "plan": "tamis.api",
    "select": "tamis.api",
    "train": "tamis.api",
}


def __getattr__(name: str) -> Any:
    if name in ("methods", "online"):
        return importlib.import_module(f"tamis.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tamis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
