"""Choose and weight fine-tuning data by gradients. The public face is what ``__all__`` lists.

Names are imported when first used, so that ``import tamis`` and ``tamis --help`` do not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AttributeSettings",
    "Attribution",
    "CompareResult",
    "CompareSettings",
    "DoctorResult",
    "DoctorSettings",
    "OnlineSFTTrainer",
    "OnlineTrainer",
    "PlanResult",
    "PlanSettings",
    "PlantedResult",
    "ProxyResult",
    "ProxySettings",
    "SelectSettings",
    "Selection",
    "TamisError",
    "TrainResult",
    "TrainRunSettings",
    "TrajectoryRecorder",
    "Verification",
    "VerifySettings",
    "__version__",
    "attribute",
    "compare",
    "doctor",
    "embeddings",
    "errors",
    "methods",
    "online",
    "plan",
    "proxy",
    "select",
    "train",
    "verify",
]

if TYPE_CHECKING:
    from tamis import embeddings, errors, methods, online
    from tamis.api import (
        Attribution,
        CompareResult,
        DoctorResult,
        PlanResult,
        PlantedResult,
        ProxyResult,
        Selection,
        TrainResult,
        Verification,
        attribute,
        compare,
        doctor,
        plan,
        proxy,
        select,
        train,
        verify,
    )
    from tamis.errors import TamisError
    from tamis.online.sft import OnlineSFTTrainer
    from tamis.online.trainer import OnlineTrainer
    from tamis.settings import (
        AttributeSettings,
        CompareSettings,
        DoctorSettings,
        PlanSettings,
        ProxySettings,
        SelectSettings,
        TrainRunSettings,
        VerifySettings,
    )
    from tamis.trajectory.recorder import TrajectoryRecorder

_HOMES = {
    "AttributeSettings": "tamis.settings",
    "Attribution": "tamis.api",
    "CompareResult": "tamis.api",
    "CompareSettings": "tamis.settings",
    "DoctorResult": "tamis.api",
    "DoctorSettings": "tamis.settings",
    "OnlineSFTTrainer": "tamis.online.sft",
    "OnlineTrainer": "tamis.online.trainer",
    "PlanResult": "tamis.api",
    "PlanSettings": "tamis.settings",
    "ProxyResult": "tamis.api",
    "ProxySettings": "tamis.settings",
    "PlantedResult": "tamis.api",
    "SelectSettings": "tamis.settings",
    "Selection": "tamis.api",
    "TamisError": "tamis.errors",
    "TrainResult": "tamis.api",
    "TrainRunSettings": "tamis.settings",
    "TrajectoryRecorder": "tamis.trajectory.recorder",
    "Verification": "tamis.api",
    "VerifySettings": "tamis.settings",
    "attribute": "tamis.api",
    "compare": "tamis.api",
    "doctor": "tamis.api",
    "plan": "tamis.api",
    "proxy": "tamis.api",
    "select": "tamis.api",
    "train": "tamis.api",
    "verify": "tamis.api",
}


def __getattr__(name: str) -> Any:
    if name in ("embeddings", "errors", "methods", "online"):
        return importlib.import_module(f"tamis.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tamis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
