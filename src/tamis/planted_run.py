"""placeholder"""

from __future__ import annotations

from typing import Any


class PlantedResult: ...


def planted_from_settings(settings: Any, **more: Any) -> PlantedResult:
    raise NotImplementedError
