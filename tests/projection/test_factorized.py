import pytest
import torch

from gradient_layers import LAYERS, layer, low_rank_gradient
from tamis.projection.factorized import FactorizedProjector


@pytest.mark.parametrize("entry", LAYERS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_projecting_the_factors_equals_projecting_the_gradient(entry, tokens: int) -> None:  # type: ignore[no-untyped-def]
    projector = FactorizedProjector(dim=4, seed=0)
    grad, grad_out, act = low_rank_gradient(entry, tokens, seed=tokens)
    p_out, p_in = projector.sides(entry, "cpu", torch.float64)
    left = grad_out if p_out is None else grad_out @ p_out
    right = act if p_in is None else act @ p_in
    feature = (left.T @ right).flatten()
    assert feature.shape == (projector.layer_shape(entry)[0] * projector.layer_shape(entry)[1],)
    torch.testing.assert_close(projector.project_gradient(entry, grad[None])[0], feature, rtol=1e-10, atol=1e-10)


def test_sides_hold_signs_over_the_root_of_dim_and_the_bias_has_its_own_row() -> None:
    entry = layer("x", 40, 30, bias=True)
    p_out, p_in = FactorizedProjector(dim=16, seed=0).sides(entry, "cpu", torch.float32)
    assert p_out is not None and p_in is not None
    assert p_out.shape == (40, 16) and p_in.shape == (31, 16)
    assert set(p_out.unique().tolist()) == {-0.25, 0.25} == set(p_in.unique().tolist())


@pytest.mark.parametrize("rows", [15, 16, 17])
def test_a_side_of_at_most_dim_features_is_left_whole(rows: int) -> None:
    entry = layer("x", rows, 100)
    projector = FactorizedProjector(dim=16, seed=0)
    p_out, p_in = projector.sides(entry, "cpu", torch.float32)
    assert (p_out is None) == (rows <= 16) and p_in is not None
    assert projector.layer_shape(entry) == (min(rows, 16), 16)


@pytest.mark.parametrize("rank", [8, 16, 64, 65])
def test_adapter_factors_keep_their_rank_side_whole(rank: int) -> None:
    projector = FactorizedProjector(dim=16, seed=0)
    kept = rank if rank <= 64 else 16
    a, b = layer("q.lora_A.default", rank, 576), layer("q.lora_B.default", 576, rank)
    assert projector.layer_shape(a) == (kept, 16) and projector.layer_shape(b) == (16, kept)
    a_out, a_in = projector.sides(a, "cpu", torch.float32)
    b_out, b_in = projector.sides(b, "cpu", torch.float32)
    assert (a_out is None) == (b_in is None) == (rank <= 64)
    assert a_in is not None and b_out is not None
    assert projector.layer_shape(layer("q.base", rank, 576)) == (min(rank, 16), 16)


def test_a_layers_matrices_do_not_depend_on_the_other_layers() -> None:
    entry = layer("x", 40, 30)
    alone, among = FactorizedProjector(dim=8, seed=0), FactorizedProjector(dim=8, seed=0)
    among.sides(layer("y", 40, 30), "cpu", torch.float32)
    expected, got = alone.sides(entry, "cpu", torch.float32), among.sides(entry, "cpu", torch.float32)
    for one, other in zip(expected, got, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_layers_and_sides_have_different_matrices() -> None:
    projector = FactorizedProjector(dim=8, seed=0)
    matrices = [*projector.sides(layer("x", 40, 40), "cpu", torch.float32)]
    matrices += projector.sides(layer("y", 40, 40), "cpu", torch.float32)
    for i, one in enumerate(matrices):
        for other in matrices[i + 1 :]:
            assert one is not None and other is not None and not torch.equal(one, other)


def test_matrices_are_made_once_per_dtype() -> None:
    projector = FactorizedProjector(dim=8, seed=0)
    entry = layer("x", 40, 40)
    first = projector.sides(entry, "cpu", torch.float32)
    assert projector.sides(entry, torch.device("cpu"), torch.float32)[0] is first[0]
    double = projector.sides(entry, "cpu", torch.float64)
    assert double[0] is not None and first[0] is not None and double[0].dtype == torch.float64
    torch.testing.assert_close(double[0].float(), first[0], rtol=1e-6, atol=0)


def test_half_precision_sides_have_the_same_signs() -> None:
    projector = FactorizedProjector(dim=8, seed=0)
    half, single = (projector.sides(layer("x", 40, 40), "cpu", d)[0] for d in (torch.bfloat16, torch.float32))
    assert half is not None and single is not None and torch.equal(half.sign().float(), single.sign())
