"""What a causal language model does from its last hidden state to its loss, in closed form: no graph, no backward pass.

Shapes: ``W: (V, d)`` the head's matrix, ``h: (n, d)`` states as the head reads them, ``z = W h + b`` its output, and
``phi(z)`` the logits, where ``phi`` is a constant factor and a soft cap, both of which most models do not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tamis.errors import Unsupported
from tamis.model.blocks import causal_model
from tamis.model.targets import embedding_matrix, output_embeddings
from tamis.seeds import child_seed, random_normal

__all__ = ["Head", "head_of", "prediction_errors", "read_out"]

# Logits formed at once: 64 MB of float32, enough rows that reading the head's matrix does not dominate.
_CPU_CHUNK, _GPU_CHUNK = 1 << 24, 1 << 26
_FLOOR = 60.0
_PROBE = 30.0  # the largest output that a probe gives the head: where a soft cap would show


@dataclass(frozen=True, kw_only=True)
class Head:
    """``logits = cap tanh(scale (W h + b) / cap)``; without a cap ``scale (W h + b)``."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n V"]:
        """The model's logits of states that its head reads."""
        output = nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            output = output * self.scale
        return output if self.cap is None else torch.tanh(output / self.cap) * self.cap


def head_of(model: nn.Module) -> Head:
    """The head of ``model``, checked against the model's own logits of one token.

    Raises:
        Unsupported: the head is no plain linear layer, or the model does more to its output than a factor and a cap.
    """
    module = output_embeddings(model)
    if not isinstance(module, nn.Linear):
        raise Unsupported(
            f"the LM head is a {type(module).__name__}, not a plain linear layer; merge the adapter into the model, or "
            "choose an embedding made of gradients or hidden states"
        )
    config: Any = causal_model(model).config
    text = config.get_text_config()
    divisor = getattr(text, "logits_scaling", None)  # Granite divides
    factor = getattr(text, "logit_scale", None)  # Cohere multiplies
    head = Head(
        weight=module.weight.detach(),
        bias=None if module.bias is None else module.bias.detach(),
        scale=float(factor or 1.0) / float(divisor or 1.0),
        cap=getattr(text, "final_logit_softcapping", None),
    )
    _require_own_logits(model, module, head)
    return head


def prediction_errors(head: Head, hidden: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """``delta_t = W^T phi'(z_t) (softmax(phi(z_t)) - onehot(y_t))``: each token's loss gradient by its hidden state.

    Not divided by the row's number of tokens. Logits exist for some positions at a time only, so memory is bounded
    whatever the vocabulary. In float32 (float64 for float64 models); the two products are in the model's dtype.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden, labels = hidden.to(head.weight.device, head.weight.dtype), labels.to(head.weight.device)
    rows = max(1, (_CPU_CHUNK if hidden.device.type == "cpu" else _GPU_CHUNK) // len(head.weight))
    errors = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    with torch.no_grad():
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            logits = head.logits(hidden[part]).to(dtype)  # (c, V)
            # Read at an early depth, logits span hundreds: without a floor most probabilities would be denormal
            # numbers, whose products made this 15 times slower on a CPU. No digit sees e^-60 of the likeliest word.
            error = torch.softmax(logits.clamp_min(logits.amax(dim=1, keepdim=True) - _FLOOR), dim=1)
            error.scatter_add_(1, labels[part, None], error.new_full((len(error), 1), -1.0))
            if head.cap is not None:  # d(cap tanh(x / cap)) / dx = 1 - tanh^2
                error.mul_(1 - (logits / head.cap).square_())
            errors[part] = (error.to(head.weight.dtype) @ head.weight).to(dtype)
    return errors.mul_(head.scale)


def read_out(head: Head) -> Float[Tensor, "d d"]:
    """``R`` with ``R R^T = scale^2 W^T W``: inner products of ``x R`` are those of the head's outputs ``scale W x``.

    So a change of the hidden state need not be turned into one of all logits: d numbers say as much as V. A bias
    changes with nothing; a soft cap is left out, as it is no linear map.
    """
    device = head.weight.device if head.weight.device.type != "mps" else torch.device("cpu")  # no float64 on mps
    hidden = head.weight.shape[1]
    gram = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
    for block in torch.split(head.weight, max(1, _CPU_CHUNK // hidden)):
        exact = block.to(device, torch.float64)
        gram.addmm_(exact.T, exact)
    root, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):  # a head of lower rank than its width: any other root has the same inner products
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp_min(0).sqrt()
    scaled: Tensor = root * abs(head.scale)
    return scaled.to(head.weight.device, _at_least_float32(head.weight.dtype))


def _require_own_logits(model: nn.Module, module: nn.Module, head: Head) -> None:
    """Feed the model's head a large random state and compare what comes out of the model with ``head``."""
    weight = head.weight
    state = torch.from_numpy(random_normal(child_seed(0, "head probe"), weight.shape[1])).to(weight.device)
    state = state.to(_at_least_float32(weight.dtype))
    output = nn.functional.linear(state, weight.to(state.dtype))
    state = (state * (_PROBE / output.abs().max().clamp_min(1e-30))).to(weight.dtype)[None, None]

    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (state, *args[1:])

    handle = module.register_forward_pre_hook(replace)
    try:
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.int64, device=embedding_matrix(model).device)
            output = model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits
    finally:
        handle.remove()
    expected = head.logits(state[0])[0].float()
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(output.flatten().float(), expected, rtol=0, atol=tolerance * _PROBE):
        raise Unsupported(
            f"{type(causal_model(model)).__name__} turns its head's output into logits in a way that tamis does not "
            "know (neither a factor nor a soft cap of its config); choose an embedding made of gradients"
        )


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
