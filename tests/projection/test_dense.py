import pytest
import torch

from gradient_layers import LAYERS, layer, random_gradients
from tamis.projection import dense
from tamis.projection.dense import RademacherProjector
from tamis.projection.whole import project_gradients


def dense_matrix(projector: RademacherProjector, entry) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The projection of every unit vector: the matrix that is never held whole."""
    return projector.project_layer(entry, torch.eye(entry.numel, dtype=torch.float64).view(-1, *entry.shape)).T


def test_entries_are_signs_over_the_root_of_dim() -> None:
    matrix = dense_matrix(RademacherProjector(dim=16, seed=0), layer("x", 40, 30))
    assert matrix.shape == (16, 1200) and set(matrix.unique().tolist()) == {-0.25, 0.25}
    assert abs(float(matrix.mean()) * 4) < 4.5 / (16 * 1200) ** 0.5
    correlations = matrix @ matrix.T / (1200 / 16)
    assert float((correlations - torch.eye(16)).abs().max()) < 4.5 / 1200**0.5  # 120 pairs


def test_projecting_equals_the_dense_matrix_across_block_borders() -> None:
    entry = layer("x", 50, 50)  # 2,500 entries: two whole blocks and a part
    projector = RademacherProjector(dim=8, seed=0)
    grads = random_gradients(3, numel=2500).view(3, 50, 50)
    expected = grads.flatten(1) @ dense_matrix(projector, entry).T
    torch.testing.assert_close(projector.project_layer(entry, grads), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cache_bytes", [0, 20_000, 1 << 20])
def test_the_cache_changes_no_number(cache_bytes: int) -> None:
    grads = random_gradients(2)
    projector = RademacherProjector(dim=32, seed=0, cache_bytes=cache_bytes)
    expected = project_gradients(RademacherProjector(dim=32, seed=0), grads, LAYERS)
    for _ in range(2):
        assert torch.equal(project_gradients(projector, grads, LAYERS), expected)
    assert sum(signs.nbytes for signs in projector._cache.values()) <= cache_bytes


def test_layers_may_be_added_in_any_order() -> None:
    grads = random_gradients(2)
    projector = RademacherProjector(dim=32, seed=0)
    parts, start = [], 0
    for entry in LAYERS:
        parts.append((entry, grads[:, start : start + entry.numel].view(2, *entry.shape)))
        start += entry.numel
    backwards = sum(projector.project_layer(entry, part) for entry, part in reversed(parts))
    torch.testing.assert_close(backwards, project_gradients(projector, grads, LAYERS), rtol=1e-12, atol=1e-12)


def test_no_more_than_one_block_of_signs_is_ever_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes = dense.random_signs, []

    def recording(seed: int, count: int):  # type: ignore[no-untyped-def]
        sizes.append(count)
        return real(seed, count)

    monkeypatch.setattr(dense, "random_signs", recording)
    RademacherProjector(dim=16, seed=0, cache_bytes=0).project_layer(layer("x", 300, 300), torch.ones(1, 300, 300))
    assert max(sizes) == 16 * 1024 and sum(sizes) == 16 * 90_000
