"""Products of a loss's Hessian with directions in weight space, by differentiating twice; exact, no finite difference.

The Hessian is that of ``sum_b c_b l_b`` by the weights of the layers given; all other weights are constants. A
direction has the form of every other gradient here: ``{layer name: (O, I)}``, a trainable bias as one more column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.model.blocks import causal_model
from tamis.model.loss import require_finite, twice_differentiable_losses
from tamis.model.targets import embedding_matrix
from tamis.types import Batch, LayerSpec

__all__ = ["attention_for_hessians", "hessian_products"]

# Attention that is made of operations with second derivatives, once PyTorch's fused kernels are told to stand aside.
_DIFFERENTIABLE = ("sdpa", "eager")


def attention_for_hessians(model: nn.Module) -> str:
    """A sentence on the attention that Hessian products run with, which may not be the one of the other passes.

    Raises:
        Unsupported: the attention the model was loaded with has no second derivative.
    """
    config: Any = causal_model(model).config
    loaded = str(getattr(config, "_attn_implementation", "eager"))
    if loaded not in _DIFFERENTIABLE:
        raise Unsupported(
            f"attention '{loaded}' cannot be differentiated twice, which Hessian products need; load the model with "
            "--attention sdpa or --attention eager"
        )
    if loaded == "eager":
        return "Hessian products ran with the model's own attention (eager), which can be differentiated twice"
    return (
        "Hessian products ran sdpa attention by PyTorch's plain kernel (math): its fused kernels have no second "
        "derivative"
    )


def hessian_products(
    model: nn.Module,
    batches: Iterable[tuple[Batch, Float[Tensor, " B"]]],
    layers: Sequence[LayerSpec],
    directions: Mapping[str, Float[Tensor, "J O I2"]],
) -> dict[str, Float[Tensor, "J O I2"]]:
    """``H d_j`` for every direction, with H the Hessian of ``sum_b c_b l_b`` over all batches.

    One forward and one backward pass per batch whose graph is kept, and one pass through that graph per direction.
    Memory: the graph of a batch, and twice the directions. Sums over batches in float32 (float64 for float64 models).

    Args:
        model: float32 or float64; left as it was.
        batches: rows with the coefficients c of their mean losses.
        layers: whose weights θ is made of.
        directions: J directions by layer.

    Raises:
        InvalidInput: there are no batches, or a row has no supervised token.
        InvalidSettings: the model has 16-bit weights.
        NonFinite: a loss is NaN or infinite.
        Unsupported: the model's attention has no second derivative.
    """
    weight = embedding_matrix(model)
    if weight.dtype not in (torch.float32, torch.float64):
        raise InvalidSettings(
            f"Hessian products of a model in {weight.dtype} would be mostly rounding; load it with --dtype float32"
        )
    attention_for_hessians(model)
    params = _LayerParams(model, layers)
    count = len(directions[layers[0].name])
    vectors = [params.split({name: matrix[j] for name, matrix in directions.items()}) for j in range(count)]
    total: list[list[Tensor]] | None = None
    with torch.enable_grad(), _only_trainable(model, params.tensors), sdpa_kernel(SDPBackend.MATH):
        for given, coefficients in batches:
            batch = given.to(weight.device)
            losses = twice_differentiable_losses(model, batch)
            require_finite(losses.detach(), batch)
            objective = (losses * coefficients.to(losses)).sum()
            grads = torch.autograd.grad(objective, params.tensors, create_graph=True)
            found = [
                torch.autograd.grad(
                    grads, params.tensors, grad_outputs=vector, retain_graph=j + 1 < count, materialize_grads=True
                )
                for j, vector in enumerate(vectors)
            ]
            if total is None:
                total = [[part.detach().clone() for part in product] for product in found]
            else:
                for kept, product in zip(total, found, strict=True):
                    for part, more in zip(kept, product, strict=True):
                        part.add_(more)
    if total is None:
        raise InvalidInput("a Hessian needs at least one row; the target has none that can be used")
    joined = [params.joined(product) for product in total]
    return {layer.name: torch.stack([product[layer.name] for product in joined]) for layer in layers}


class _LayerParams:
    """The parameters of some layers in one order, and their matrices ``(O, I)``, the bias as the last column."""

    def __init__(self, model: nn.Module, layers: Sequence[LayerSpec]) -> None:
        modules = dict(model.named_modules())
        self._layers = layers
        self.tensors: list[Tensor] = []
        for layer in layers:
            for leaf in ("weight", "bias") if layer.has_bias else ("weight",):
                tensor = getattr(modules[layer.name], leaf)
                assert isinstance(tensor, Tensor)
                self.tensors.append(tensor)

    def split(self, matrices: Mapping[str, Tensor]) -> list[Tensor]:
        """One tensor per parameter, each in its parameter's shape, dtype and device."""
        found: list[Tensor] = []
        for layer in self._layers:
            matrix = matrices[layer.name]
            weight = matrix[:, : layer.in_features]
            found.append(weight.T if layer.kind == "conv1d" else weight)
            if layer.has_bias:
                found.append(matrix[:, layer.in_features])
        return [part.to(param) for part, param in zip(found, self.tensors, strict=True)]

    def joined(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The inverse of ``split``."""
        found, parts = {}, iter(tensors)
        for layer in self._layers:
            weight = next(parts)
            matrix = weight.T if layer.kind == "conv1d" else weight
            found[layer.name] = torch.cat([matrix, next(parts)[:, None]], dim=1) if layer.has_bias else matrix
        return found


@contextmanager
def _only_trainable(model: nn.Module, params: Sequence[Tensor]) -> Iterator[None]:
    """Gradients are asked of ``params`` alone inside, whatever the model trains; restored afterwards."""
    wanted = {id(param) for param in params}
    before = [(param, param.requires_grad) for param in model.parameters()]
    for param, _ in before:
        param.requires_grad_(id(param) in wanted)
    try:
        yield
    finally:
        for param, was in before:
            param.requires_grad_(was)
