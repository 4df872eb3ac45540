"""What embeddings cost, in operations and in forward passes of the whole model over the same rows.

A forward pass counts the head at supervised positions only, as everywhere. A tangent triples every product of two
things that both change, and every ``x W`` becomes ``x W``, ``x' W`` and ``x W'``.
"""

from __future__ import annotations

from tamis.embeddings.kinds import ModelEmbedding
from tamis.model.flops import Matrix, ModelShape, forward_flops

__all__ = [
    "backward_flops",
    "block_flops",
    "forward_passes",
    "gradient_flops",
    "head_flops",
    "sketch_flops",
    "sketch_numbers",
]


def forward_passes(
    embedding: ModelEmbedding,
    shape: ModelShape,
    *,
    rows: float,
    tokens: float,
    supervised_tokens: float,
    sum_sq_len: float,
) -> float:
    """The embedding's operations over those of a forward pass through the whole model with the same rows."""
    own = embedding.operations(
        shape, rows=rows, tokens=tokens, supervised_tokens=supervised_tokens, sum_sq_len=sum_sq_len
    )
    return own / forward_flops(shape, tokens, supervised_tokens, sum_sq_len)


def block_flops(shape: ModelShape, blocks: int | None, tokens: float, sum_sq_len: float) -> float:
    """A forward pass through ``blocks`` of the blocks (None: all), the head left out; blocks count as equal."""
    return forward_flops(shape, tokens, 0, sum_sq_len) * _share(shape, blocks)


def backward_flops(shape: ModelShape, blocks: int | None, tokens: float, sum_sq_len: float) -> float:
    """A backward pass to the activations of ``blocks`` blocks: attention has four products where forward had two."""
    return forward_flops(shape, tokens, 0, 2 * sum_sq_len) * _share(shape, blocks)


def head_flops(shape: ModelShape, supervised_tokens: float) -> float:
    """One product with the head's matrix at every supervised position."""
    return 2 * shape.hidden * shape.vocabulary * supervised_tokens


def gradient_flops(
    shape: ModelShape,
    *,
    forward: int | None,
    backward: int | None,
    tokens: float,
    supervised_tokens: float,
    sum_sq_len: float,
) -> float:
    """Forward through some blocks and the head, back through the head and some blocks; no weight gradient is formed."""
    return (
        block_flops(shape, forward, tokens, sum_sq_len)
        + backward_flops(shape, backward, tokens, sum_sq_len)
        + 2 * head_flops(shape, supervised_tokens)
    )


def sketch_flops(shape: ModelShape, blocks: int | None, side: int, tokens: float) -> float:
    """Both sides of every captured layer projected to ``side`` numbers, and their product."""
    return 2 * tokens * _share(shape, blocks) * sum(m.count * _sketch(m, side) for m in shape.gradient_matrices)


def sketch_numbers(shape: ModelShape, blocks: int | None, side: int) -> int:
    """What is kept of them for a row; blocks count as equal."""
    whole = sum(m.count * min(side, m.out_features) * min(side, m.in_features) for m in shape.gradient_matrices)
    return round(_share(shape, blocks) * whole)


def _sketch(matrix: Matrix, side: int) -> float:
    sides = sum(size * side for size in (matrix.out_features, matrix.in_features) if size > side)
    return sides + min(side, matrix.out_features) * min(side, matrix.in_features)


def _share(shape: ModelShape, blocks: int | None) -> float:
    return 1.0 if blocks is None else blocks / shape.blocks
