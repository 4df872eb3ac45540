"""A model with factors in the place of layers, in memory and as a folder.

The copy shares every tensor it does not replace with its target, so both together cost the target and the factors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tamis.disk import disk_errors
from tamis.errors import TamisError, Unsupported, first_line
from tamis.model.load import check_loads, no_progress_bars
from tamis.model.low_rank_linear import LowRankLinear, Space
from tamis.model.proxy_folder import ProxyLayout, write_layout

__all__ = ["copy_with", "proxy_of", "write_folder"]


def proxy_of(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], *, space: Space) -> nn.Module:
    """A copy of ``model`` with ``A (O, R)`` and ``B (R, I)`` in the layers of these names; biases are shared."""
    replaced: dict[int, Any] = {}
    for name, (left, right) in factors.items():
        old = model.get_submodule(name)
        assert isinstance(old, (nn.Linear, Conv1D))
        new = LowRankLinear(
            right.shape[1],
            left.shape[0],
            left.shape[1],
            bias=old.bias is not None,
            space=space,
            device="meta",
        )
        like = old.weight
        new.A.weight = nn.Parameter(left.to(like.device, like.dtype, copy=True))
        new.B.weight = nn.Parameter(right.to(like.device, like.dtype, copy=True))
        if old.bias is not None:
            new.A.bias = old.bias
        new.train(old.training)
        replaced[id(old)] = new
    return copy_with(model, replaced)


def copy_with(model: nn.Module, replaced: Mapping[int, Any]) -> nn.Module:
    """New modules around the same tensors; objects whose ``id`` is in ``replaced`` are replaced.

    Raises:
        Unsupported: a module holds something that cannot be copied.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                # A state of the last pass (RecurrentGemma). PyTorch copies no tensor that has a graph behind it.
                shared[id(value)] = value.detach()
    try:
        return copy.deepcopy(model, {**shared, **replaced})
    except RuntimeError as error:
        raise Unsupported(
            f"{type(model).__name__} cannot be copied, and a proxy is made as a copy ({first_line(error)}); give a "
            "model of another family"
        ) from error


def write_folder(model: nn.Module, tokenizer: Any, layout: ProxyLayout, folder: Path) -> None:
    """Weights, config and tokenizer as Transformers writes them, and ``proxy.json``; then try whether they load.

    Raises:
        InvalidInput: the disk is full or may not be written.
        Unsupported: what was written does not load.
    """
    saved: Any = model
    with disk_errors(folder), no_progress_bars():
        folder.mkdir(parents=True, exist_ok=True)
        saved.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_layout(layout, folder)  # last: without it the folder does not load
    try:
        check_loads(folder)
    except TamisError as error:
        raise Unsupported(
            f"the proxy of {type(model).__name__} is written, but the installed Transformers cannot load it again "
            f"({error}); delete {folder}, and give a model of another family or another preset"
        ) from error
