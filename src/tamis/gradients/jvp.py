"""Jacobian-vector products: how a model's states and losses change when its weights move along a direction.

Forward mode: one pass carries every value together with its change, so that nothing is kept for a backward pass. A
direction of states has the form of scored gradients, ``{layer name: (O, I)}``, a trainable bias as one more column; a
direction of losses that of updates, ``{parameter name: tensor}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tamis.errors import Unsupported, first_line
from tamis.model.blocks import causal_model
from tamis.model.loss import evaluation_mode, gathered_before_head, supervised_positions
from tamis.model.low_rank_linear import LowRankLinear, moved_products
from tamis.model.states import mean_by_row, states_before_head
from tamis.seeds import child_seed, random_normal
from tamis.types import Batch, LayerSpec

__all__ = ["gaussian_direction", "hidden_tangents", "loss_tangents", "mean_direction"]

_ALGORITHM = "jvp-gaussian-v1"
# Made of operations with a forward-mode rule, once PyTorch's fused kernels stand aside. A kernel from elsewhere may
# drop the tangents of its inputs without an error, and the product would be wrong.
_FORWARD_MODE = ("sdpa", "eager")


def gaussian_direction(
    layers: Sequence[LayerSpec], *, seed: int, index: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Independent normal entries for every layer, divided by ``√P`` so that the whole direction has about length 1.

    The common factor cancels in every cosine and keeps half-precision tangents in range. A layer's entries depend on
    the seed, the index of the direction, and the layer's name and shape: not on which other layers there are, but for
    the factor.
    """
    scale = sum(layer.numel for layer in layers) ** -0.5
    direction = {}
    for layer in layers:
        numbers = random_normal(child_seed(seed, _ALGORITHM, layer.name, index), layer.numel)
        numbers *= scale
        direction[layer.name] = torch.from_numpy(numbers).to(dtype).view(layer.shape)
    return direction


def mean_direction(directions: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean: its tangent is the mean of the directions' tangents, for the price of one (a JVP is linear)."""
    return {name: torch.stack([each[name] for each in directions]).mean(dim=0) for name in directions[0]}


def hidden_tangents(
    model: nn.Module,
    batch: Batch,
    layers: Sequence[LayerSpec],
    direction: Mapping[str, Tensor],
    *,
    positions: Literal["last", "mean"],
) -> Float[Tensor, "B hidden"]:
    """``d h / d theta . v``: the change of the state that the head reads, per row.

    Args:
        model: a causal language model, often one of only the first blocks.
        batch: right-padded rows.
        layers: the layers of ``direction``.
        direction: ``v``, by layer name.
        positions: "last", at each row's last token, as published; "mean", averaged over the positions that predict
            supervised tokens. After an end-of-text token nothing is predicted, so the last state says little.

    Raises:
        InvalidInput: with "mean", a row has no supervised token.
        Unsupported: the model computes something that has no forward-mode rule.
    """
    otherwise = "choose another embedding than jvp"
    _require_forward_mode(model, otherwise)
    supervised = supervised_positions(batch) if positions == "mean" else None

    def take(hidden: Tensor) -> Tensor:
        found: Tensor | None = forward_ad.unpack_dual(hidden).tangent  # type: ignore[no-untyped-call]
        tangent = torch.zeros_like(hidden) if found is None else found  # (B, T, hidden)
        if supervised is None:
            last = batch.attention_mask.sum(dim=1).to(tangent.device) - 1
            return tangent[torch.arange(len(tangent), device=tangent.device), last]
        picked = tangent.flatten(0, 1).index_select(0, supervised.flat.to(tangent.device))
        return mean_by_row(picked, supervised)

    # The fused attention kernels have no forward-mode rule; the plain one has, and every "sdpa" model can use it.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        plain, moves = _split(model, layers, direction)
        params = _dual_params(model, plain, direction)
        try:
            with moved_products(model, moves):
                return states_before_head(model, batch, take=take, params=params)
        except NotImplementedError as error:
            raise _without_rule(model, first_line(error), otherwise) from error


def loss_tangents(
    model: nn.Module, batch: Batch, direction: Mapping[str, Tensor]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Losses, and ``<grad l_b, v>``: how fast each row's loss grows when the parameters move along ``v``.

    One forward pass that carries tangents; no backward pass, and nothing is kept for one. ``l_b`` is the mean
    cross-entropy of the row's supervised tokens, without dropout. Both in float32 at least, finite or not.

    Args:
        model: a causal language model.
        batch: right-padded rows.
        direction: ``v`` by parameter name, in the parameters' shapes; other parameters stay where they are.

    Raises:
        InvalidInput: a row has no supervised token.
        Unsupported: the model computes something that has no forward-mode rule.
    """
    otherwise = "score candidates otherwise than by candidates='jvp'"
    _require_forward_mode(model, otherwise)
    positions, values = supervised_positions(batch), dict(model.named_parameters())
    call = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        evaluation_mode(model, checkpointing=False),
        gathered_before_head(model, positions, tuple(batch.input_ids.shape)),
        forward_ad.dual_level(),
    ):
        moved = {name: _dual(values[name], v.to(values[name])) for name, v in direction.items()}
        try:
            logits = functional_call(model, moved, (), call).logits
        except NotImplementedError as error:
            raise _without_rule(model, first_line(error), otherwise) from error
        found = forward_ad.unpack_dual(logits)  # type: ignore[no-untyped-call]
        primal = found.primal.flatten(0, 1)  # (n, V)
        tangent = torch.zeros_like(primal) if found.tangent is None else found.tangent.flatten(0, 1)
        dtype = torch.float64 if primal.dtype == torch.float64 else torch.float32
        labels = positions.labels.to(primal.device)[:, None]
        log_probs = torch.log_softmax(primal.to(dtype), dim=1)
        # d(-log p_y) = <p, dz> - dz_y
        slopes = (log_probs.exp() * tangent).sum(dim=1) - tangent.gather(1, labels)[:, 0].to(dtype)
        pair = torch.stack([-log_probs.gather(1, labels)[:, 0], slopes], dim=1)  # (n, 2)
        means = mean_by_row(pair, positions)
    return means[:, 0], means[:, 1]


def _split(
    model: nn.Module, layers: Sequence[LayerSpec], direction: Mapping[str, Tensor]
) -> tuple[list[LayerSpec], dict[str, Tensor]]:
    """Layers whose weight is a parameter, and for those in factors a zero matrix with the direction as its tangent."""
    plain, moves = list[LayerSpec](), {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        if isinstance(module, LowRankLinear):
            tangent = direction[layer.name].to(module.A.weight)
            moves[layer.name] = _dual(torch.zeros_like(tangent), tangent)
        else:
            plain.append(layer)
    return plain, moves


def _dual_params(model: nn.Module, layers: Sequence[LayerSpec], direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers' parameters, each with its part of the direction as tangent; only inside a dual level."""
    params: dict[str, Tensor] = {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        matrix = direction[layer.name].to(weight.device, weight.dtype)
        tangent = matrix[:, : layer.in_features]
        params[f"{layer.name}.weight"] = _dual(weight, tangent.T if layer.kind == "conv1d" else tangent)
        if layer.has_bias:
            assert isinstance(bias, Tensor)
            params[f"{layer.name}.bias"] = _dual(bias, matrix[:, -1])
    return params


def _dual(param: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(param.detach(), tangent.contiguous())  # type: ignore[no-untyped-call]
    return dual


def _require_forward_mode(model: nn.Module, otherwise: str) -> None:
    loaded = str(getattr(causal_model(model).config, "_attn_implementation", "eager"))
    if loaded not in _FORWARD_MODE:
        raise _without_rule(model, f"attention '{loaded}'", otherwise)


def _without_rule(model: nn.Module, why: str, otherwise: str) -> Unsupported:
    return Unsupported(
        f"{type(model).__name__} cannot be run in forward mode ({why}); load it with attention 'sdpa' or 'eager', or "
        f"{otherwise}"
    )
