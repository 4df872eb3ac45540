"""What every projection promises, run over all of them."""

import hashlib
import subprocess
import sys
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradient_layers import LAYERS, NUMEL, layer, random_gradients
from tamis.errors import InvalidSettings, Unsupported
from tamis.projection import DEFAULT_DIMS, PROJECTIONS, AnyProjector, make_projector, project_gradients
from tamis.protocols import LayerwiseProjector, Projector, TwoSidedProjector, VectorProjector

# Sizes at which each really projects the layers above.
DIMS: dict[str, int | None] = {"none": None, "factorized": 4, "rademacher": 96, "hadamard": 96, "mask": 96}
NAMES = list(DIMS)
RANDOM = [name for name in NAMES if name != "none"]

# First 16 digits of the SHA-256 of features of fixed gradients, rounded to 1e-6. If a change breaks one of these, the
# algorithm has changed: give it a new name in its identity, or old and new features would be compared.
GOLDEN = {
    "none": "d713d4c56456cc7e",
    "factorized": "91cd30415f02d74e",
    "rademacher": "e0d22c2c24994a38",
    "hadamard": "2e17e0e3861c64c9",
    "mask": "3b31b15db72b4c79",
}


def make(name: str, *, seed: int = 0, dim: int | None = None) -> AnyProjector:
    return make_projector(name, dim=dim or DIMS[name], seed=seed)


def project(projector: Projector, grads: torch.Tensor) -> torch.Tensor:
    return project_gradients(projector, grads, LAYERS)


def test_every_projection_is_in_the_table() -> None:
    assert set(PROJECTIONS) == set(NAMES) and set(DEFAULT_DIMS) == set(RANDOM)
    for name in NAMES:
        assert isinstance(make(name), PROJECTIONS[name])


@pytest.mark.parametrize("name", NAMES)
def test_output_has_the_promised_shape_and_dtype(name: str) -> None:
    projector = make(name)
    for dtype, expected in {
        torch.float64: torch.float64,
        torch.float32: torch.float32,
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
    }.items():
        features = project(projector, random_gradients(3, dtype=dtype))
        assert features.shape == (3, projector.output_dim(LAYERS)) and features.dtype == expected
    assert project(projector, random_gradients(0)).shape == (0, projector.output_dim(LAYERS))


@pytest.mark.parametrize("name", NAMES)
def test_every_projection_can_be_used_by_the_engine(name: str) -> None:
    projector = make(name)
    assert sum(isinstance(projector, p) for p in (TwoSidedProjector, LayerwiseProjector, VectorProjector)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_identity_names_the_algorithm_its_version_and_everything_that_was_chosen(name: str) -> None:
    identity = make(name, seed=5).identity
    assert identity["algorithm"] == f"{name}-v1"
    if name != "none":
        assert identity["seed"] == 5 and identity["dim"] == DIMS[name]
        assert identity != make(name, seed=6).identity != make(name, seed=5, dim=7).identity


@pytest.mark.parametrize("name", NAMES)
def test_the_space_is_the_one_of_the_first_release(name: str) -> None:
    grads = torch.sin(torch.arange(2 * NUMEL, dtype=torch.float64)).view(2, NUMEL)
    rounded = (project(make(name), grads) * 1e6).round().to(torch.int64).numpy().astype("<i8")
    assert hashlib.sha256(np.ascontiguousarray(rounded).tobytes()).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", NAMES)
def test_another_instance_makes_the_same_features_and_another_seed_does_not(name: str) -> None:
    grads = random_gradients(2)
    first = project(make(name), grads)
    assert torch.equal(first, project(make(name), grads))
    if name != "none":
        assert not torch.allclose(first, project(make(name, seed=1), grads))


def test_another_process_makes_the_same_features() -> None:
    code = (
        "import torch; from gradient_layers import *; from tamis.projection import *\n"
        f"for name, dim in {DIMS!r}.items():\n"
        "    f = project_gradients(make_projector(name, dim=dim, seed=3), random_gradients(1), LAYERS)\n"
        "    print(*(x.hex() for x in f[0, :5].tolist()))\n"
    )
    environment: dict[str, Any] = {"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": "", "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    for name, line in zip(NAMES, run.stdout.splitlines(), strict=True):
        mine = project(make(name, seed=3), random_gradients(1))[0, :5].tolist()
        assert [float.fromhex(x) for x in line.split()] == pytest.approx(mine, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**31), factor=st.floats(-100, 100))
@settings(max_examples=15)
def test_projection_is_linear(name: str, seed: int, factor: float) -> None:
    x, y = random_gradients(1, seed=seed), random_gradients(1, seed=seed + 1)
    projector = make(name)
    expected = project(projector, x) + factor * project(projector, y)
    torch.testing.assert_close(project(projector, x + factor * y), expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_their_neighbours_or_their_order(name: str) -> None:
    grads, projector = random_gradients(7), make(name)
    whole = project(projector, grads)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(project(projector, grads[order]), whole[order], rtol=1e-12, atol=1e-12)
    for row in range(7):
        torch.testing.assert_close(project(projector, grads[row : row + 1])[0], whole[row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_have_zero_features(name: str) -> None:
    assert not project(make(name), torch.zeros(2, NUMEL)).any()


@pytest.mark.parametrize("name", NAMES)
def test_inner_products_are_unbiased(name: str) -> None:
    grads = random_gradients(3)
    grads[1] = 0.6 * grads[0] + 0.8 * grads[1]  # a pair that is not orthogonal
    exact = grads @ grads.T
    trials = 150
    estimates = torch.stack([(f := project(make(name, seed=s), grads)) @ f.T for s in range(trials)])
    error = (estimates.mean(0) - exact).abs()
    standard_error = estimates.std(0) / trials**0.5
    # 5 distinct entries for each projection, 5 standard errors: a false alarm has probability below 1e-5.
    assert bool((error <= 5 * standard_error + 1e-9 * exact.abs().max()).all())


@pytest.mark.parametrize("name", [name for name in RANDOM if name != "rademacher"])  # it stays noisy at every size
def test_large_enough_a_size_loses_nothing(name: str) -> None:
    grads = random_gradients(4)
    features = project(make(name, dim=4096), grads)
    torch.testing.assert_close(features @ features.T, grads @ grads.T, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_input_gradients_are_not_changed(name: str) -> None:
    grads = random_gradients(2)
    copy = grads.clone()
    project(make(name), grads)
    assert torch.equal(grads, copy)


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(name: str) -> None:
    grads = random_gradients(3)
    exact, single = project(make(name), grads), project(make(name), grads.float())
    # A sum of up to 1,100 terms of size 1 in float32.
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_device_makes_the_same_features(name: str) -> None:
    grads = random_gradients(3)
    features = project(make(name), grads.cuda())
    assert features.is_cuda
    torch.testing.assert_close(features.cpu(), project(make(name), grads), rtol=1e-10, atol=1e-10)
    single = project(make(name), grads.float().cuda()).cpu().double()
    torch.testing.assert_close(single, project(make(name), grads), rtol=1e-4, atol=1e-4)  # float32, TF32 off


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_other_layers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"the layers have {NUMEL} entries, the gradients {NUMEL - 1}"):
        project(make(name), random_gradients(1, numel=NUMEL - 1))


@pytest.mark.parametrize(
    ("name", "dim", "sentence"),
    [
        ("gaussian", 8, "projection 'gaussian' is unknown; choose one of none, factorized, rademacher, hadamard, mask"),
        ("mask", 0, "projection_dim must be at least 1, got 0"),
        ("none", 8, "projection_dim=8 has no meaning with projection 'none'"),
    ],
)
def test_senseless_settings_are_refused_with_the_name_that_was_typed(name: str, dim: int, sentence: str) -> None:
    with pytest.raises(InvalidSettings, match=sentence):
        make_projector(name, dim=dim)


def test_without_a_dim_the_default_is_taken() -> None:
    for name, dim in DEFAULT_DIMS.items():
        assert make_projector(name).identity["dim"] == dim


def test_a_projector_of_no_known_kind_is_refused() -> None:
    class Strange:
        identity: ClassVar[dict[str, Any]] = {}

        def output_dim(self, layers: object) -> int:
            return 1

    with pytest.raises(Unsupported, match="projector Strange cannot project"):
        project_gradients(Strange(), torch.zeros(1, 6), [layer("a", 3, 2)])
