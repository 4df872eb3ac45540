"""Gradient checkpointing: the one place that knows what Transformers calls it.

It marks the blocks that are to be recomputed with an attribute, and recomputes one only while it is in training mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

ATTRIBUTE = "gradient_checkpointing"


def is_checkpointed(module: nn.Module) -> bool:
    """Whether the module's own forward pass is run again in the backward pass (while it is in training mode)."""
    return bool(getattr(module, ATTRIBUTE, False))


def checkpoint(model: nn.Module) -> None:
    """Switch it on for every block, in the form that does not need a gradient at the block's input."""
    whole: Any = model
    # Transformers renamed the method in 5.x and keeps the old name until 6.
    new = getattr(model, "activation_checkpointing_enable", None)
    if new is not None:
        new(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is recomputed; the blocks that were to be are marked again on exit, also after an error."""
    marked = [module for module in model.modules() if is_checkpointed(module)]
    for module in marked:
        setattr(module, ATTRIBUTE, False)
    try:
        yield
    finally:
        for module in marked:
            setattr(module, ATTRIBUTE, True)
