"""The target gradient that choices are made with: of fresh rows, of a few choices ago, or a running mean.

A look is one forward and backward pass over target rows. By default every choice looks and nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Look", "TargetMemory"]

_PREFIX = "target."


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one look at the target saw."""

    sums: dict[str, Tensor]  # this process's sum of target gradients, by parameter name
    mean: dict[str, Tensor]  # over the rows of all processes
    loss: float  # mean of all processes' rows
    count: int  # rows, of all processes


class TargetMemory:
    """Which gradient stands for the target between looks.

    After ``k`` looks at means ``t_1 ... t_k`` it is ``(1-β) Σ_j β^(k-j) t_j / (1-β^k)`` with ``β = ema``: the last
    look's own for ``β = 0``.

    Args:
        every: choices from one look to the next.
        ema: ``β``.
    """

    def __init__(self, *, every: int, ema: float) -> None:
        self._every, self._ema = every, ema
        self._looks, self._mean = 0, dict[str, Tensor]()
        self.age = 0  # choices made since the last look, with the gradient of that look

    @property
    def is_due(self) -> bool:
        """Whether the next choice has to look."""
        # By choices made, not by their numbers: those skip some where an epoch ends within an accumulated update.
        return not self._looks or self.age + 1 >= self._every

    def take(self, look: Look) -> dict[str, Tensor]:
        """Take a look in; the gradient to choose with."""
        self.age, self._looks = 0, self._looks + 1
        if self._ema == 0:
            self._mean = look.mean if self._every > 1 else {}
            return look.mean
        for name, new in look.mean.items():
            # float32 at least, as gradients are: a share of 0.1 of a bfloat16 number would be lost.
            before = self._mean.get(name, torch.zeros_like(new))
            self._mean[name] = before.to(new.device) * self._ema + new * (1 - self._ema)
        return self._corrected()

    def kept(self) -> dict[str, Tensor]:
        """The gradient to choose with when nothing is looked at."""
        assert self._looks, "the first choice looks at the target"
        self.age += 1
        return self._corrected() if self._ema > 0 else self._mean

    def _corrected(self) -> dict[str, Tensor]:
        part = 1 - self._ema**self._looks  # Adam's correction: the mean began at zero
        return {name: mean / part for name, mean in self._mean.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep: as many numbers as are trained, and nothing by default."""
        if not self._mean:
            return {}
        counts = torch.tensor([self._looks, self.age])
        return {f"{_PREFIX}counts": counts, **{f"{_PREFIX}mean.{name}": mean for name, mean in self._mean.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor], *, device: torch.device) -> None:
        """The inverse of ``state_dict``; other entries are not looked at."""
        if f"{_PREFIX}counts" in state:
            self._looks, self.age = (int(number) for number in state[f"{_PREFIX}counts"])
            start = f"{_PREFIX}mean."
            self._mean = {
                name.removeprefix(start): mean.to(device) for name, mean in state.items() if name.startswith(start)
            }
