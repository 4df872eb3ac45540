import torch

from gradient_layers import layer, random_gradients
from tamis.projection.mask import MaskProjector


def test_features_are_coordinates_times_a_common_factor() -> None:
    grads = random_gradients(3, numel=100)
    projector = MaskProjector(dim=25, seed=0)
    features = projector.project(grads)
    torch.testing.assert_close(features, grads[:, projector.coordinates(100)] * 2, rtol=1e-15, atol=0)


def test_projection_commutes_with_coordinatewise_operations() -> None:
    grads = random_gradients(3, numel=100)
    projector = MaskProjector(dim=25, seed=0)
    scale = torch.rand(100, dtype=torch.float64)
    kept = projector.coordinates(100)
    torch.testing.assert_close(
        projector.project(grads * scale), projector.project(grads) * scale[kept], rtol=1e-15, atol=0
    )


def test_coordinates_are_distinct_and_as_many_as_there_are() -> None:
    projector = MaskProjector(dim=25, seed=0)
    assert len(projector.coordinates(100).unique()) == 25
    assert projector.coordinates(10).tolist() == list(range(10))
    assert projector.output_dim([layer("x", 2, 5)]) == 10
    assert projector.coordinates(100) is projector.coordinates(100)


def test_whole_gradients_come_back_when_there_is_room() -> None:
    grads = random_gradients(2, numel=10)
    assert torch.equal(MaskProjector(dim=25, seed=0).project(grads), grads)
