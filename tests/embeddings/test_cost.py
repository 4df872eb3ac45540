"""Counted operations against a hand count and PyTorch's own counter on real passes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tamis.embeddings import (
    ErrorMean,
    ErrorOuter,
    Gradient,
    HiddenError,
    HiddenMean,
    Jvp,
    LensGradient,
    Rds,
    TailGradient,
    forward_passes,
)
from tamis.model.flops import Matrix, ModelShape
from tiny_models import random_batch, tiny_model

# Ten blocks of one 30 x 20 matrix each, no attention, a head of 20 x 50.
SHAPE = ModelShape(
    name="round",
    blocks=10,
    hidden=20,
    vocabulary=50,
    params=7000,
    matrices=(Matrix(out_features=30, in_features=20, count=10),),
    gradient_matrices=(Matrix(out_features=30, in_features=20, count=10),),
    attention_width=0,
)
SIZES = {"rows": 1.0, "tokens": 10.0, "supervised_tokens": 4.0, "sum_sq_len": 100.0}
BLOCKS, HEAD = 2 * 6000 * 10, 2 * 1000 * 4  # operations of all blocks, of one product with the head


@pytest.mark.parametrize(
    ("embedding", "expected"),
    [
        (HiddenMean(), BLOCKS),
        (HiddenMean(depth=3), 0.3 * BLOCKS),
        (Rds(), BLOCKS),
        (ErrorMean(depth=0), 2 * HEAD),
        (HiddenError(), BLOCKS + 2 * HEAD),
        (ErrorOuter(depth=0, side=5), 2 * HEAD + 2 * 4 * (2 * 20 * 5 + 25)),
        (ErrorOuter(depth=0, side=20), 2 * HEAD + 2 * 4 * 400),
        (Jvp(depth=4), 3 * 0.4 * BLOCKS + 2 * 400),
        (Jvp(depth=4, directions=2), 3 * 0.4 * BLOCKS + 2 * 400),
        (Jvp(depth=4, directions=2, combine="concat"), 2 * (3 * 0.4 * BLOCKS + 2 * 400)),
        (LensGradient(depth=4, side=5), 2 * 0.4 * BLOCKS + 2 * HEAD + 2 * 10 * 4 * (50 * 5 + 25)),
        (TailGradient(blocks=2, side=5), 1.2 * BLOCKS + 2 * HEAD + 2 * 10 * 2 * (50 * 5 + 25)),
        (Gradient(side=25), 2 * BLOCKS + 2 * HEAD + 2 * 10 * 10 * (30 * 25 + 25 * 20)),
    ],
)
def test_operations_by_hand(embedding, expected):
    assert embedding.operations(SHAPE, **SIZES) == pytest.approx(expected)
    assert forward_passes(embedding, SHAPE, **SIZES) == pytest.approx(expected / (BLOCKS + HEAD))


# Rows, tokens, the one state that the head is given because it must be given something, and what a backward pass
# leaves out because it ends there: the input gradients of the first tapped block's queries, keys and values.
PADDED = 3  # slots that rows of 10, 9, 8 and 10 labels fill up with zeros to 10
ROWS, TOKENS, PROBE, NOT_NEEDED = 4, 64, 2 * 16 * 64, 2 * 64 * (16 * 16 + 2 * 16 * 8)


@pytest.mark.parametrize(
    ("embedding", "difference"),
    [
        (HiddenMean(depth=2), PROBE),
        (ErrorMean(), PROBE),
        (ErrorOuter(depth=1, side=4), PROBE + 2 * 4 * 4 * PADDED),
        (LensGradient(depth=2, side=4), -NOT_NEEDED),
        (TailGradient(blocks=2, side=4), -NOT_NEEDED),
        (Gradient(side=4), -NOT_NEEDED),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_operations_are_those_that_pytorch_counts(embedding, difference):
    counted, expected = counted_and_expected(embedding)
    assert counted == expected + difference


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "embedding",
    [
        HiddenMean(),
        Rds(),
        ErrorMean(depth=0),
        HiddenError(depth=1),
        ErrorOuter(depth=0, side=5),
        ErrorOuter(depth=0, side=99),  # wider than the model
        Jvp(depth=1, directions=2),
        Jvp(depth=1, directions=2, combine="concat"),
        LensGradient(depth=3, side=5),
        TailGradient(blocks=1, side=99),
        Gradient(side=5),
        Gradient(side=10),  # wider than the keys' and values' outputs of the Llama
    ],
    ids=str,
)
def test_a_row_has_as_many_numbers_as_foretold(family, embedding):
    model = tiny_model(family, blocks=4, dtype=torch.float32)
    found = embedding.start(model)(random_batch([8, 6]))["embedding"]
    assert found.shape[1] == embedding.numbers(ModelShape.from_model(model))


def test_operations_of_a_jvp_are_at_most_those_promised():
    # Where nothing has changed yet (the input of the first block) no product with a change is made.
    counted, expected = counted_and_expected(Jvp(depth=3))
    assert 0.9 * expected < counted <= expected + PROBE


def counted_and_expected(embedding):
    model = tiny_model("llama", blocks=4, dtype=torch.float32)
    model.set_attn_implementation("eager")  # the counter knows plain products on every build
    batch = random_batch([16] * ROWS)
    embed = embedding.start(model)
    embed(batch)
    with FlopCounterMode(display=False) as counter:
        embed(batch)
    supervised = float(batch.supervised[:, 1:].sum())
    shape = ModelShape.from_model(model)
    expected = embedding.operations(
        shape, rows=ROWS, tokens=TOKENS, supervised_tokens=supervised, sum_sq_len=ROWS * 16**2
    )
    return counter.get_total_flops(), expected
