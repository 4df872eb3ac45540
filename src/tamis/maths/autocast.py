"""Autocast switched off where gradients are put together: it would round every product to 16 bits again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["autocast_off"]


@contextmanager
def autocast_off() -> Iterator[None]:
    """Inside, products have the dtype of what is multiplied, whatever a model around them computes in.

    A sum over passes that were each rounded to bfloat16 stops growing once it is 256 times a part of it.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "xpu", "mps", "hpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
