"""A second model whose gradients choose candidates for the first: smaller, of the same vocabulary, never trained.

Its inner products are raw. Adam's state is that of the trained model's parameters and says nothing of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tamis.errors import InvalidInput, InvalidSettings
from tamis.gradients.parameters import param_matrices
from tamis.gradients.rows import RowGradients, hold_gradients, summed_gradient, zero_gradient
from tamis.model.load import ModelSettings, load_model
from tamis.model.low_rank_linear import set_space
from tamis.model.processes import counts_of_all
from tamis.model.targets import embedding_matrix, gradient_layers
from tamis.model.trainable import trainable_layers
from tamis.notation import candidates_parts
from tamis.online.cost import Counter
from tamis.online.evidence import Measured, Measurer
from tamis.online.methods.choice import Needs, Vector
from tamis.online.settings import StepSettings
from tamis.online.together import add_up, gather_rows
from tamis.types import Batch

__all__ = ["Proxy", "check_proxy", "load_proxy"]


def check_proxy(candidates: str, model: Any) -> str | None:
    """The model that ``candidates`` names, to be loaded; None where none is needed or ``model`` is one.

    Raises:
        InvalidSettings: none is given, or two are.
    """
    kind, name = candidates_parts(candidates)
    if kind != "proxy":
        if model is not None:
            raise InvalidSettings(f"a proxy model is given but candidates={candidates!r}; set candidates='proxy'")
        return None
    if bool(name) == (model is not None):
        given = "no model is given" if model is None else "a model is given beside it"
        raise InvalidSettings(f"candidates={candidates!r}: {given}; name one as 'proxy:MODEL', or pass proxy_model=")
    return name or None


def load_proxy(name: str, device: torch.device) -> nn.Module:
    """The model ``name`` with gradients of its blocks' linear layers, or of its adapter if it is one.

    Of a folder of ``tamis proxy`` they are those of the factors, whatever space the folder asks for: a step takes
    gradients of parameters, and a product is none.

    Raises:
        InvalidInput: it cannot be read.
    """
    model = load_model(ModelSettings(name=name, device=device.type)).model
    set_space(model, "factors")
    layers = gradient_layers(model)
    for param in model.parameters():
        param.requires_grad_(False)
    for layer in layers:
        for param in model.get_submodule(layer.name).parameters(recurse=False):
            param.requires_grad_(True)
    return model


# Sizes of one family pad the same vocabulary to other multiples; a larger difference is another tokenizer's.
_PADDING = 0.01


class Proxy:
    """Scores candidates by the proxy's own gradients.

    Args:
        model: the proxy; its trainable parameters are those whose gradients count.
        trained: the model that it stands for.
        needs: of the method.
        settings: of the step.

    Raises:
        InvalidInput: the two have other vocabularies; tables that differ by padding alone are fine.
        Unsupported: a trainable parameter of the proxy has no per-sample gradient; the message names it.
    """

    def __init__(self, model: nn.Module, trained: nn.Module, needs: Needs, settings: StepSettings) -> None:
        own, other = (int(embedding_matrix(each).shape[0]) for each in (model, trained))
        if abs(own - other) > _PADDING * max(own, other):
            raise InvalidInput(
                f"the proxy knows {own} tokens and the trained model {other}; take a proxy with the same tokenizer"
            )
        self._model, self._tokens = model, own
        self._matrices = param_matrices(model, trainable_layers(model))
        self._measurer = Measurer(self._matrices, needs, settings)
        self._target_rank = settings.target_rank
        self.counter = Counter(model, self._matrices, target_rank=settings.target_rank)

    def measure(
        self, candidates: Sequence[Batch], target: Sequence[Batch], *, counts: list[int], sizes: Vector
    ) -> Measured:
        """What the method needs, of the candidates of all processes; losses are the proxy's.

        Raises:
            InvalidInput: no process has a target row, or a row has a token that the proxy does not know.
        """
        for batch in (*candidates, *target):
            if int(batch.input_ids.max()) >= self._tokens:
                raise InvalidInput(
                    f"a row has token {int(batch.input_ids.max())} and the proxy knows {self._tokens} tokens; take a "
                    "proxy with the same tokenizer"
                )
        ones = [(batch, torch.ones(len(batch.rows))) for batch in target]
        count = sum(counts_of_all(sum(len(batch.rows) for batch in target)))
        if not count:
            raise InvalidInput("a choice by proxy was given no target row with a supervised token")
        if ones:
            sums, _ = summed_gradient(self._model, self._matrices, ones)
        else:
            sums = zero_gradient(self._matrices)
        goal = {name: add_up(grad) / count for name, grad in sums.items()}
        self.counter.add("target", "gradient", target)
        rows = RowGradients(self._matrices)
        mine: list[Tensor] = [
            hold_gradients(self._model, batch, rows, target_rank=self._target_rank).double().cpu()
            for batch in candidates
        ]
        self.counter.add("candidates", self._measurer.work, candidates)
        none = torch.zeros(0, dtype=torch.float64)  # of several processes, one may have no candidate
        losses = gather_rows(torch.cat([none, *mine]))
        return self._measurer.measure(rows, losses, goal, None, counts=counts, sizes=sizes)
