"""Floating-point operations of a causal language model's passes, counted from the shapes of its weight matrices.

A multiplication and an addition are two operations. Counted: every matrix product of the blocks, attention's two
products (quadratic in the length, in full although a causal kernel may skip half), and the LM head at supervised
positions only, because only there are logits formed. Not counted: embeddings (a look-up), norms, softmax, rotary angles
and other element-wise work, and padding. Frozen weights get no gradient product, so a backward pass to the activations
costs what the forward pass costs, attention aside.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tamis.errors import InvalidSettings
from tamis.model.targets import gradient_layers, input_embeddings, output_embeddings

__all__ = [
    "FACTORIZED_SIDE",
    "FEATURE_NUMBERS",
    "HasTokens",
    "Matrix",
    "ModelShape",
    "TrainedMatrices",
    "activation_backward_flops",
    "feature_dim",
    "feature_flops",
    "forward_flops",
    "hessian_flops",
    "projected_flops",
    "stage_flops",
    "stage_tflops",
    "training_flops",
    "weight_gradient_flops",
]

FACTORIZED_SIDE = 16  # of a layer, and the numbers of a whole feature: the projections' defaults
FEATURE_NUMBERS = 8192


class HasTokens(Protocol):
    """What a stage of a run went through; ``tamis.collect.StageCost`` is one."""

    @property
    def work(self) -> str:
        """``none``, ``forward`` or ``gradient``."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        ...

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss."""
        ...

    @property
    def squared_tokens(self) -> int:
        """Sum over rows of the squared length."""
        ...


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """``count`` weight matrices of one shape; a token passes through ``active`` of each (1, or a router's share)."""

    out_features: int
    in_features: int
    count: int
    active: float = 1.0

    @property
    def per_token(self) -> float:
        """Multiplications that one token costs in all of them."""
        return self.out_features * self.in_features * self.count * self.active


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model that its cost depends on."""

    name: str
    blocks: int
    hidden: int
    vocabulary: int
    params: int  # stored numbers, tied matrices once
    matrices: tuple[Matrix, ...]  # all matrix products of the blocks, adapters included, the LM head not
    gradient_matrices: tuple[Matrix, ...]  # those whose per-sample gradients are taken; a bias is one more column
    attention_width: int  # heads times head size, summed over the attention layers

    @property
    def block_products(self) -> float:
        """Multiplications per token in the blocks' matrices."""
        return sum(matrix.per_token for matrix in self.matrices)

    @property
    def gradient_numel(self) -> int:
        """Entries of one row's gradient."""
        return sum(m.out_features * m.in_features * m.count for m in self.gradient_matrices)

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """The shape of the model that a Transformers config describes, without allocating a weight."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return cls.from_model(model)

    @classmethod
    def from_model(cls, model: nn.Module) -> ModelShape:
        """The shape of a model, on any device (``meta`` too), adapters included."""
        embedding = input_embeddings(model)
        config = _text_config(model)
        found: Counter[tuple[int, int, float]] = Counter()
        for _, matrix in _block_matrices(model):
            found[(matrix.out_features, matrix.in_features, matrix.active)] += matrix.count
        gradient: Counter[tuple[int, int]] = Counter(layer.shape for layer in gradient_layers(model))
        heads, head_size = _attention(config)
        table = embedding.weight
        assert isinstance(table, torch.Tensor)
        return cls(
            name=type(model).__name__,
            blocks=int(config.num_hidden_layers),
            hidden=int(table.shape[1]),
            vocabulary=int(table.shape[0]),
            params=sum(p.numel() for p in model.parameters()),
            matrices=tuple(
                Matrix(out_features=o, in_features=i, count=n, active=a) for (o, i, a), n in sorted(found.items())
            ),
            gradient_matrices=tuple(
                Matrix(out_features=o, in_features=i, count=n) for (o, i), n in sorted(gradient.items())
            ),
            attention_width=heads * head_size * _attention_layers(config),
        )


def _block_matrices(model: nn.Module) -> Iterator[tuple[nn.Parameter, Matrix]]:
    """Every weight matrix that tokens are multiplied by, but for the LM head."""
    head, embedding = output_embeddings(model), input_embeddings(model)
    routed = _routed_share(_text_config(model))
    for name, module in model.named_modules():
        if module is head or module is embedding:
            continue
        active = routed if ".experts" in name else 1.0
        weight = module._parameters.get("weight")
        # Routers are matrices too, in classes of their own; an Embedding is looked up, not multiplied.
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            rows, columns = weight.shape
            if isinstance(module, Conv1D):
                rows, columns = columns, rows
            yield weight, Matrix(out_features=rows, in_features=columns, count=1, active=active)
        elif name.endswith(".experts"):  # one tensor for all experts: (experts, in, out), in either order
            for param in module.parameters(recurse=False):
                if param.dim() == 3:
                    count, rows, columns = param.shape
                    yield param, Matrix(out_features=rows, in_features=columns, count=count, active=active)


@dataclass(frozen=True, kw_only=True)
class TrainedMatrices:
    """Multiplications that the gradients of what is trained cost: a product per matrix, as large as the matrix."""

    body: float  # per token
    head: float  # per supervised token: only there are logits formed

    @classmethod
    def of(cls, model: nn.Module) -> TrainedMatrices:
        """Of the parameters of ``model`` that require gradients, adapters' factors among them."""
        body = sum(matrix.per_token for weight, matrix in _block_matrices(model) if weight.requires_grad)
        head: Any = output_embeddings(model).weight
        return cls(body=body, head=float(head.numel()) if head.requires_grad else 0.0)


def training_flops(
    shape: ModelShape, trained: TrainedMatrices, tokens: float, supervised_tokens: float, sum_sq_len: float
) -> float:
    """Operations of forward, backward and the gradients of what is trained; ``shape`` has the adapters in it."""
    products = 2.0 * (trained.body * tokens + trained.head * supervised_tokens)
    return stage_flops(shape, "gradient", tokens, supervised_tokens, sum_sq_len) + products


def forward_flops(shape: ModelShape, tokens: float, supervised_tokens: float, sum_sq_len: float) -> float:
    """Operations of one forward pass over rows with ``tokens`` tokens in all.

    Args:
        shape: the model.
        tokens: tokens that pass through the blocks.
        supervised_tokens: positions at which logits are formed.
        sum_sq_len: sum over rows of the squared length.
    """
    return (
        2 * shape.block_products * tokens
        + 4 * shape.attention_width * sum_sq_len  # scores, then values: 2 T^2 width each
        + 2 * shape.hidden * shape.vocabulary * supervised_tokens
    )


def activation_backward_flops(shape: ModelShape, tokens: float, supervised_tokens: float, sum_sq_len: float) -> float:
    """Operations of the backward pass down to the embeddings' output with every weight frozen.

    One product per matrix; attention needs four (for queries, keys, values and scores) where the forward pass had two.
    """
    return forward_flops(shape, tokens, supervised_tokens, 2 * sum_sq_len)


def weight_gradient_flops(shape: ModelShape, tokens: float) -> float:
    """Operations of ``g^T a`` for every matrix that carries gradients: what an unfrozen backward pass adds."""
    return 2 * sum(matrix.per_token for matrix in shape.gradient_matrices) * tokens


def hessian_flops(
    shape: ModelShape, products: float, tokens: float, supervised_tokens: float, sum_sq_len: float
) -> float:
    """Operations of ``products`` Hessian products over the same rows, whose graph is built once.

    Per product: two products per frozen matrix and six per trained one, and four times attention's; what the first
    layers spare is not taken off, which is up to a tenth of a model of two blocks and nothing of a deep one.
    """
    graph = (
        forward_flops(shape, tokens, supervised_tokens, sum_sq_len)
        + activation_backward_flops(shape, tokens, supervised_tokens, sum_sq_len)
        + weight_gradient_flops(shape, tokens)
    )
    each = (
        2 * forward_flops(shape, tokens, supervised_tokens, 0)
        + 4 * weight_gradient_flops(shape, tokens)
        + 4 * forward_flops(shape, 0, 0, sum_sq_len)
    )
    return graph + products * each


def feature_dim(shape: ModelShape, projection: str, dim: int) -> int:
    """Numbers that one row keeps."""
    if projection == "none":
        return shape.gradient_numel
    if projection == "factorized":
        return sum(min(dim, m.out_features) * min(dim, m.in_features) * m.count for m in shape.gradient_matrices)
    return min(dim, shape.gradient_numel)


def feature_flops(shape: ModelShape, projection: str, dim: int, *, rows: float, tokens: float) -> float:
    """Operations that turn the captured inputs and output gradients of a pass into features.

    Args:
        shape: the model.
        projection: a name of ``tamis.projection.PROJECTIONS``.
        dim: side of each layer's square for ``factorized``, numbers per row for the others.
        rows: rows of the pass.
        tokens: their tokens.

    Raises:
        InvalidSettings: the projection is unknown.
    """
    if projection == "factorized":
        return sum(2 * m.count * tokens * _factorized_products(m, dim) for m in shape.gradient_matrices)
    # All others form each row's gradient first.
    formed = weight_gradient_flops(shape, tokens)
    numel = shape.gradient_numel
    if projection in ("none", "mask"):
        return formed
    if projection == "rademacher":
        return formed + 2.0 * rows * numel * dim
    if projection == "hadamard":
        padded = 1 << math.ceil(math.log2(max(2, numel)))
        return formed + rows * padded * math.log2(padded)  # additions only: log2 P for each number
    raise InvalidSettings(f"projection={projection!r}: the cost of this projection is not known")


def projected_flops(
    shape: ModelShape,
    projection: str,
    dim: int | None,
    *,
    include_head: bool,
    rows: float,
    tokens: float,
    supervised_tokens: float,
) -> float:
    """``feature_flops`` of the covered layers: of the head, if it is among them, at supervised positions only.

    Args:
        shape: the model.
        projection: a name of ``tamis.projection.PROJECTIONS``.
        dim: None for the default of ``projection``.
        include_head: whether the LM head's gradient is projected, too.
        rows: rows of the pass.
        tokens: their tokens.
        supervised_tokens: those that carry loss.
    """
    if dim is None:
        dim = FACTORIZED_SIDE if projection == "factorized" else FEATURE_NUMBERS
    flops = feature_flops(shape, projection, dim, rows=rows, tokens=tokens)
    if include_head:
        head = Matrix(out_features=shape.vocabulary, in_features=shape.hidden, count=1)
        alone = replace(shape, gradient_matrices=(head,))
        flops += feature_flops(alone, projection, dim, rows=rows, tokens=supervised_tokens)
    return flops


def stage_flops(shape: ModelShape, work: str, tokens: float, supervised_tokens: float, sum_sq_len: float) -> float:
    """Operations of rows that went through ``work``: ``none``, ``forward`` or ``gradient``.

    Training LoRA factors counts as ``gradient``: the base has no weight gradients, and those of the factors are small.

    Raises:
        InvalidSettings: the kind of work is unknown.
    """
    if work == "none":
        return 0.0
    sizes = (tokens, supervised_tokens, sum_sq_len)
    if work == "forward":
        return forward_flops(shape, *sizes)
    if work == "gradient":
        return forward_flops(shape, *sizes) + activation_backward_flops(shape, *sizes)
    raise InvalidSettings(f"work={work!r}: expected none, forward or gradient")


def stage_tflops(shape: ModelShape, cost: HasTokens) -> float:
    """Teraflops of a finished stage, from the tokens that it went through.

    For stages that wrote no count of their own: projections are left out of it.
    """
    sizes = (cost.tokens, cost.supervised_tokens, cost.squared_tokens)
    return stage_flops(shape, cost.work, *sizes) / 1e12


def _factorized_products(matrix: Matrix, side: int) -> float:
    out_features, in_features = matrix.out_features, matrix.in_features
    left = out_features * side if out_features > side else 0  # a side that is already small is left whole
    right = in_features * side if in_features > side else 0
    return left + right + min(side, out_features) * min(side, in_features)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config  # every PreTrainedModel has one
    return config.get_text_config()


def _attention(config: Any) -> tuple[int, int]:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0, 0  # no attention, as in state-space models
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(heads), int(size)


def _attention_layers(config: Any) -> int:
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return int(config.num_hidden_layers)
    return sum("attention" in kind and "linear" not in kind for kind in kinds)


def _routed_share(config: Any) -> float:
    """The share of its experts that a mixture-of-experts model sends a token to."""
    experts = max(getattr(config, name, None) or 0 for name in _EXPERT_COUNTS)
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    return float(chosen / experts) if experts and chosen else 1.0


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
