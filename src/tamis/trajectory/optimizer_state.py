"""A live optimizer as a rule and a state: which kind it is, its groups, and its moments in the flat order.

Supported are AdamW and Adam of PyTorch (plain, foreach, fused) and SGD with momentum. All others are refused by name:
a trajectory through an optimizer that makes another step would be that of another run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tamis.errors import Unsupported
from tamis.trajectory.run import Group, OptimizerKind, Rule, State

__all__ = ["LiveOptimizer", "live_optimizer"]

_ADVICE = "record a run of optim='adamw_torch', torch.optim.AdamW, Adam or SGD"


@dataclass(frozen=True, kw_only=True)
class LiveOptimizer:
    """The optimizer of a run, its parameters named and put in the order of the flat vector: group by group."""

    optimizer: torch.optim.Optimizer
    names: tuple[tuple[str, ...], ...]  # of each group
    params: Mapping[str, nn.Parameter]  # in flat order
    kind: OptimizerKind
    groups: tuple[Group, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, in flat order."""
        return {name: tuple(param.shape) for name, param in self.params.items()}

    def rule(self, clip: float | None) -> Rule:
        """As constants of the run."""
        return Rule(kind=self.kind, groups=self.groups, clip=clip)

    def rates(self) -> tuple[float, ...]:
        """Learning rates of the coming step, if read before it."""
        return tuple(float(group["lr"]) for group in self._used_groups())

    def require_constants(self) -> None:
        """Refuse settings that have changed since the run began.

        Raises:
            Unsupported: naming the setting.
        """
        now = _groups(self.kind, self._used_groups(), [group.numel for group in self.groups])
        if now != self.groups:
            raise Unsupported(
                "betas, eps or weight decay changed during the run, which the log does not follow; keep them constant"
            )

    def state(self) -> State:
        """Parameters and moments as they are, copied."""
        own = self.optimizer.state
        keys = ("exp_avg", "exp_avg_sq") if self.kind != "sgd" else ("momentum_buffer",)
        moments = []
        for key in keys:
            parts = [own.get(param, {}).get(key) for param in self.params.values()]
            whole = [torch.zeros_like(p) if m is None else m for p, m in zip(self.params.values(), parts, strict=True)]
            moments.append(_flat(whole))
        counts = {int(own[param].get("step", 0)) for param in self.params.values() if own.get(param)}
        if len(counts) > 1:
            raise Unsupported(
                f"the optimizer has taken between {min(counts)} and {max(counts)} steps with different parameters; "
                "a recorded run must update all of them in every step: freeze those that are not always used"
            )
        return State(theta=_flat(list(self.params.values())), moments=tuple(moments), count=max(counts, default=0))

    def gradient_norm(self) -> float:
        """Of the gradient as the optimizer will see it.

        Raises:
            Unsupported: a parameter has none, so this step would not update it.
        """
        for name, param in self.params.items():
            if param.grad is None:
                raise Unsupported(
                    f"'{name}' is trained and has no gradient in this step, so the optimizer leaves it out; freeze it "
                    "to record the run"
                )
        parts = torch._foreach_norm([param.grad for param in self.params.values() if param.grad is not None])
        return float(torch.linalg.vector_norm(torch.stack([part.double().cpu() for part in parts])))

    def _used_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.optimizer.param_groups if group["params"]]


def live_optimizer(optimizer: Any, model: nn.Module) -> LiveOptimizer:
    """The optimizer of ``model``, checked.

    Raises:
        Unsupported: its kind or a setting of it cannot be replayed, or what is trained is not what it updates.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    kind = _kind(optimizer)
    by_id = {id(param): name for name, param in model.named_parameters() if param.requires_grad}
    used = [group for group in optimizer.param_groups if group["params"]]
    names, params = [], {}
    for group in used:
        _check_group(optimizer, group)
        own = []
        for param in group["params"]:
            name = by_id.pop(id(param), None)
            if name is None:
                raise Unsupported("the optimizer updates a tensor that is no trainable parameter of the model; drop it")
            if param.dtype not in (torch.float32, torch.float64):
                raise Unsupported(
                    f"'{name}' is trained in {param.dtype}, whose rounding no replay repeats; train it in float32"
                )
            own.append(name)
            params[name] = param
        names.append(tuple(own))
    if by_id:
        raise Unsupported(f"'{next(iter(by_id.values()))}' is trainable but not in the optimizer; freeze it")
    sizes = [sum(params[name].numel() for name in own) for own in names]
    return LiveOptimizer(
        optimizer=optimizer, names=tuple(names), params=params, kind=kind, groups=_groups(kind, used, sizes)
    )


def _kind(optimizer: Any) -> OptimizerKind:
    exact: dict[type[torch.optim.Optimizer], OptimizerKind] = {
        torch.optim.AdamW: "adamw",
        torch.optim.Adam: "adam",
        torch.optim.SGD: "sgd",
    }
    # Subclasses make steps of their own, whatever their names; so the class must be PyTorch's.
    found = exact.get(type(optimizer))
    if found is None:
        raise Unsupported(f"{type(optimizer).__name__} cannot be replayed; {_ADVICE}")
    decoupled = found == "adam" and all(group.get("decoupled_weight_decay", False) for group in optimizer.param_groups)
    return "adamw" if decoupled else found


def _check_group(optimizer: Any, group: Mapping[str, Any]) -> None:
    name = type(optimizer).__name__
    for setting, wanted in (("amsgrad", False), ("maximize", False), ("nesterov", False), ("dampening", 0)):
        if group.get(setting, wanted) != wanted:
            raise Unsupported(f"{name} with {setting}={group[setting]} cannot be replayed; {_ADVICE} without it")


def _groups(kind: OptimizerKind, groups: list[dict[str, Any]], sizes: list[int]) -> tuple[Group, ...]:
    found = []
    for group, numel in zip(groups, sizes, strict=True):
        decay = float(group.get("weight_decay", 0.0))
        if kind == "sgd":
            found.append(Group(numel=numel, beta1=float(group.get("momentum", 0.0)), decay=decay))
        else:
            beta1, beta2 = (float(beta) for beta in group["betas"])
            found.append(Group(numel=numel, beta1=beta1, beta2=beta2, eps=float(group["eps"]), decay=decay))
    return tuple(found)


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
