import torch

from gradient_layers import LAYERS, NUMEL, random_gradients
from tamis.projection.layout import split_by_layer, total_numel


def test_layers_are_flattened_row_by_row_one_after_the_other() -> None:
    grads = random_gradients(2)
    parts = [part for _, part in split_by_layer(grads, LAYERS)]
    assert [tuple(part.shape[1:]) for part in parts] == [entry.shape for entry in LAYERS]
    assert torch.equal(torch.cat([part.flatten(1) for part in parts], dim=1), grads)
    assert total_numel(LAYERS) == NUMEL


def test_a_transposed_batch_is_split_by_value() -> None:
    grads = random_gradients(2).T.contiguous().T
    assert torch.equal(next(iter(split_by_layer(grads, LAYERS)))[1].flatten(1), grads[:, :240])
