"""What several verbs ask alike: how the model is loaded and how rows are read. The verbs' own settings extend these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tamis.settings.checks import check_at_least, check_not_blank
from tamis.values import check_types

__all__ = ["Dtype", "Format", "LoadingSettings", "SharedSettings"]

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Format = Literal["messages", "prompt-completion", "instruction", "text"]


@dataclass(frozen=True, kw_only=True)
class SharedSettings:
    """Of every verb.

    Raises:
        InvalidSettings: a value, of the verb's own settings too, is of the wrong type or an empty text, or one of those
            here is out of its range.
    """

    max_length: int = 2048
    device: str = "auto"
    revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    row_format: Format | None = None
    on_bad_row: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        check_types(self)
        check_not_blank(self)
        check_at_least(self, 2, "max_length")


@dataclass(frozen=True, kw_only=True)
class LoadingSettings(SharedSettings):
    """Of the verbs that load a model for gradients as the user says; those of recorded runs load it as recorded."""

    dtype: Dtype = "auto"
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
