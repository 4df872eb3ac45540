"""Adam's moments read from the live optimizer, whichever implementation keeps them, by parameter name.

Nothing is changed. Read before the step whose gradient is being made: the moments are those of the finished steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tamis.errors import Unsupported
from tamis.maths.adam import preconditioner

__all__ = ["AdamMoments", "learning_rate", "read_adam", "unwrapped"]

# Optimizers that keep Adam's two moments and make another step of them, by what their class names contain.
_NOT_ADAM = (
    "nadam", "radam", "lamb", "yogi", "adabelief", "adabound", "adamod", "adamp", "adan", "ademamix", "adopt", "laprop",
    "schedulefree", "soap",
)  # fmt: skip
_BLOCK_SIZES = (256, 2048)  # of block-wise 8-bit states, newer and older versions


@dataclass(frozen=True, kw_only=True)
class AdamMoments:
    """One parameter's state after ``step`` finished steps, both moments raw, in the parameter's shape."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    beta1: float
    beta2: float
    eps: float
    rate: float  # learning rate of its group over the largest of all groups: 1 unless groups differ
    largest_exp_avg_sq: Tensor | None  # AMSGrad's, which then takes the second moment's place
    decay: float = 0.0
    decay_is_coupled: bool = False  # part of the gradient (Adam's), not of the step (AdamW's)

    def diagonal(self) -> Tensor:
        """``D``: what the next step multiplies a gradient by, times ``rate``; 0 where nothing was ever seen.

        Equation 9 of *Filter-then-Weight* with the counting that the optimizer itself uses.
        """
        v = self.exp_avg_sq if self.largest_exp_avg_sq is None else self.largest_exp_avg_sq
        if self.step < 1:
            return torch.zeros_like(v)
        d = preconditioner(v, step=self.step, beta1=self.beta1, beta2=self.beta2, eps=self.eps, untouched="zero")
        return d if self.rate == 1 else d * self.rate


def read_adam(optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]) -> dict[str, AdamMoments]:
    """The moments of ``params``; zeros and step 0 for a parameter that the optimizer has not stepped yet.

    Reads ``Adam`` and ``AdamW`` of PyTorch (plain, foreach, fused, capturable, AMSGrad), optimizers that keep the same
    state under the same names, and block-wise 8-bit states, which are brought back to float32. Wrappers that have the
    optimizer as ``.optimizer`` are looked through. Relatives that keep the same moments and step otherwise (NAdam,
    RAdam, LAMB and others) are refused by name.

    Raises:
        Unsupported: the optimizer is not Adam or AdamW, its state is sharded, or a parameter is not in it.
    """
    inner = unwrapped(optimizer)
    _refuse_relatives(inner)
    groups = {id(param): group for group in inner.param_groups for param in group["params"]}
    top_rate = max((float(group["lr"]) for group in inner.param_groups), default=0.0)
    found = {}
    for name, param in params.items():
        group = groups.get(id(param))
        if group is None:
            raise Unsupported(
                f"parameter '{name}' is trainable but not in the optimizer, so it would never be updated; freeze it or "
                "add it to the optimizer"
            )
        if "betas" not in group or "eps" not in group or len(group["betas"]) != 2:
            raise _not_adam(inner, "its parameter groups have no betas and eps")
        if group.get("maximize", False):
            raise Unsupported(
                "the optimizer maximizes; online selection lowers the target loss and needs maximize=False"
            )
        state = inner.state.get(param, {})
        first, second = _moments(inner, name, param, state)
        largest = state.get("max_exp_avg_sq")
        rate = float(group["lr"])
        found[name] = AdamMoments(
            exp_avg=first,
            exp_avg_sq=second,
            step=_steps(state, group),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            rate=rate / top_rate if top_rate > 0 else 1.0,
            largest_exp_avg_sq=None if largest is None else _whole(inner, name, param, largest),
            decay=float(group.get("weight_decay", 0.0)),
            decay_is_coupled=_couples_decay(inner, group),
        )
    return found


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The largest learning rate of its groups: that of the coming step, if read before it."""
    return max((float(group["lr"]) for group in unwrapped(optimizer).param_groups), default=0.0)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, which wrappers have as ``.optimizer``."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    found: torch.optim.Optimizer = optimizer
    return found


def _refuse_relatives(optimizer: torch.optim.Optimizer) -> None:
    names = [kind.__name__.lower().replace("_", "") for kind in type(optimizer).__mro__]
    if any(relative in name for name in names for relative in _NOT_ADAM):
        raise _not_adam(optimizer, "it keeps Adam's moments but makes another step of them")


def _couples_decay(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Only PyTorch's own Adam adds the decay to the gradient; newer versions can be told not to."""
    if isinstance(optimizer, torch.optim.AdamW) or not isinstance(optimizer, torch.optim.Adam):
        return False
    return not group.get("decoupled_weight_decay", False)


def _steps(state: Mapping[str, Any], group: Mapping[str, Any]) -> int:
    """Some implementations count per group."""
    return int(state.get("step", group.get("step", 0) if state else 0))


def _moments(
    optimizer: torch.optim.Optimizer, name: str, param: nn.Parameter, state: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    if not state:
        zeros = torch.zeros_like(param, dtype=torch.float64 if param.dtype == torch.float64 else torch.float32)
        return zeros, zeros
    if "exp_avg" in state and "exp_avg_sq" in state:
        return tuple(_whole(optimizer, name, param, state[key]) for key in ("exp_avg", "exp_avg_sq"))  # type: ignore[return-value]
    if state.get("state2") is not None:
        return _from_blocks(optimizer, name, param, state, "1"), _from_blocks(optimizer, name, param, state, "2")
    raise _not_adam(optimizer, f"its state of '{name}' has {', '.join(map(str, state)) or 'nothing'}")


def _whole(optimizer: torch.optim.Optimizer, name: str, param: nn.Parameter, moment: Tensor) -> Tensor:
    if hasattr(moment, "full_tensor"):
        raise Unsupported(f"the optimizer's state of '{name}' is sharded over processes, which is not supported yet")
    if type(moment) not in (Tensor, nn.Parameter):  # quantized states that know how to become plain
        moment = moment.dequantize()
    if moment.shape != param.shape:
        raise Unsupported(
            f"the optimizer keeps moments of shape {tuple(moment.shape)} for '{name}' of shape {tuple(param.shape)}; "
            "sharded or flattened states are not supported"
        )
    if not moment.dtype.is_floating_point:
        raise Unsupported(
            f"{type(optimizer).__name__} keeps moments of '{name}' as {moment.dtype} codes without the scales to read "
            "them by; use a block-wise 8-bit optimizer or optim='adamw_torch'"
        )
    plain: Tensor = moment.detach()
    return plain.float() if plain.dtype.itemsize == 1 else plain  # float8: nothing is computed in it


def _from_blocks(
    optimizer: torch.optim.Optimizer, name: str, param: nn.Parameter, state: Mapping[str, Any], which: str
) -> Tensor:
    """A moment kept as 8-bit codes: ``code book[code] * largest absolute value of its block``."""
    codes: Tensor = state[f"state{which}"]
    if codes.dtype != torch.uint8:  # small parameters stay in float32
        return _whole(optimizer, name, param, codes)
    largest, book = state.get(f"absmax{which}"), state.get(f"qmap{which}")
    size = None
    if largest is not None and book is not None and codes.numel() == param.numel():
        size = next((size for size in _BLOCK_SIZES if -(-codes.numel() // size) == largest.numel()), None)
    if size is None or largest is None or book is None:
        raise Unsupported(
            f"the 8-bit state of '{name}' is not block-wise as expected; use the block-wise 8-bit optimizer or "
            "optim='adamw_torch'"
        )
    values = book.float()[codes.flatten().long()]
    per_value = largest.float().repeat_interleave(size)[: values.numel()]
    moment: Tensor = (values * per_value).view(param.shape)
    return moment


def _not_adam(optimizer: torch.optim.Optimizer, why: str) -> Unsupported:
    return Unsupported(
        f"{type(optimizer).__name__} is not an Adam with whole moments ({why}); use optim='adamw_torch', or a "
        "method that ignores the optimizer: alignment='raw' with interactions='raw'"
    )
