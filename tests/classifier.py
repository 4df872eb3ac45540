"""Any module that maps inputs to class logits, one loss a row, as a problem: small models, benchmarks, tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tamis.gradients.functional import Layout, Predictions

__all__ = ["Classifier", "LabelledRows"]


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Rows that go through the model together."""

    inputs: Tensor  # (B, ...)
    labels: Tensor  # (B,)

    def __len__(self) -> int:
        return len(self.labels)

    def apart(self) -> None:
        """Networks as small as these are faster on all rows together."""


class Classifier:
    """Cross-entropy of ``module``, whose losses must not depend on batch mates (no batch norm, no dropout)."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.layout = Layout({name: param.shape for name, param in module.named_parameters() if param.requires_grad})

    def start(self) -> Tensor:
        """The module's parameters as one vector."""
        return self.layout.flatten(dict(self._module.named_parameters()))

    def predict(self, params: Mapping[str, Tensor], micro: LabelledRows) -> Predictions:
        """One logit row per input."""
        logits = torch.func.functional_call(self._module, dict(params), (micro.inputs,))
        count = len(micro)
        return Predictions(
            logits=logits,
            labels=micro.labels,
            row=torch.arange(count, device=logits.device),
            scale=torch.ones(count, dtype=logits.dtype, device=logits.device),
            rows=count,
        )
