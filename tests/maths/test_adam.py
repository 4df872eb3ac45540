import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamis.errors import InvalidInput, InvalidSettings
from tamis.maths.adam import ADAM_FORMS, AdamForm, adam_direction, preconditioner

BETA1, BETA2, EPS, LR = 0.9, 0.999, 1e-8, 0.01


def trained(optimizer_class: Any, steps: int, *, dtype: torch.dtype = torch.float64, **settings: Any):  # type: ignore[no-untyped-def]
    """A parameter and its optimizer after ``steps`` steps with random gradients."""
    generator = torch.Generator().manual_seed(steps)
    param = torch.nn.Parameter(torch.randn(4, 3, dtype=dtype, generator=generator))
    optimizer = optimizer_class([param], lr=LR, betas=(BETA1, BETA2), eps=EPS, **settings)
    for _ in range(steps):
        param.grad = torch.randn(4, 3, dtype=dtype, generator=generator)
        optimizer.step()
    return param, optimizer, torch.randn(5, 4, 3, dtype=dtype, generator=generator)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("foreach", [False, True])
def test_adam_form_is_the_step_that_torch_takes(optimizer_class: Any, steps: int, foreach: bool) -> None:
    for row in range(5):
        param, optimizer, grads = trained(optimizer_class, steps, weight_decay=0.0, foreach=foreach)
        zeros = torch.zeros_like(param)
        state = optimizer.state.get(param, {"exp_avg": zeros, "exp_avg_sq": zeros})
        m, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        direction = adam_direction(grads, m, v, step=steps, beta1=BETA1, beta2=BETA2, eps=EPS)[row]
        before = param.detach().clone()
        param.grad = grads[row]
        optimizer.step()
        torch.testing.assert_close((before - param) / LR, direction, rtol=1e-9, atol=1e-12)  # float64, lr cancels


def test_float32_moments_give_the_float32_step() -> None:
    param, optimizer, grads = trained(torch.optim.Adam, 4, dtype=torch.float32)
    state = optimizer.state[param]
    m, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    direction = adam_direction(grads.bfloat16(), m, v, step=4)
    assert direction.dtype == torch.float32
    before = param.detach().clone()
    param.grad = grads[2].bfloat16().float()
    optimizer.step()
    torch.testing.assert_close((before - param) / LR, direction[2], rtol=1e-3, atol=1e-5)  # a step is 1e-2 of a param


def written_out(g: float, m: float, v: float, step: int, form: AdamForm) -> float:
    first, second = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
    if form == "less-code":
        return first / math.sqrt(second + EPS)
    if form == "uncorrected":
        return first / (math.sqrt(second) + EPS)
    return first / (1 - BETA1 ** (step + 1)) / (math.sqrt(second / (1 - BETA2 ** (step + 1))) + EPS)


@given(
    g=st.floats(-10, 10), m=st.floats(-10, 10), v=st.floats(0, 100), step=st.integers(0, 10_000),
    form=st.sampled_from(list(ADAM_FORMS)),
)  # fmt: skip
def test_each_form_is_its_formula(g: float, m: float, v: float, step: int, form: AdamForm) -> None:
    tensors = (
        torch.tensor([[g]], dtype=torch.float64),
        torch.tensor([m], dtype=torch.float64),
        torch.tensor([v], dtype=torch.float64),
    )
    got = adam_direction(*tensors, step=step, beta1=BETA1, beta2=BETA2, eps=EPS, form=form)
    assert math.isclose(float(got), written_out(g, m, v, step, form), rel_tol=1e-9, abs_tol=1e-12)


def test_hand_computed_case_tells_the_forms_apart() -> None:
    # step 0, m = v = 0, g = 1e-4: m' = 1e-5, v' = 1e-11; √(1e-11 + 1e-8) ≈ 1.0005e-4; √v' + 1e-8 ≈ 3.17228e-6
    arguments = (torch.tensor([[1e-4]], dtype=torch.float64), torch.zeros(1).double(), torch.zeros(1).double())
    got = {form: float(adam_direction(*arguments, step=0, form=form)) for form in ADAM_FORMS}
    assert got["adam"] == pytest.approx(1 / (1 + 1e-4), rel=1e-9)  # sign descent, but for ε
    assert got["less-code"] == pytest.approx(1e-5 / 1.000499875e-4, rel=1e-6)
    assert got["uncorrected"] == pytest.approx(1e-5 / 3.172277660e-6, rel=1e-6)


def test_correction_scales_all_coordinates_alike_so_cosines_agree() -> None:
    _, optimizer, grads = trained(torch.optim.Adam, 3)
    state = next(iter(optimizer.state.values()))
    flat = grads.flatten(1)
    m, v = state["exp_avg"].flatten(), state["exp_avg_sq"].flatten()
    with_it, without = (adam_direction(flat, m, v, step=3, form=form) for form in ("adam", "uncorrected"))
    torch.testing.assert_close(torch.cosine_similarity(with_it, without), torch.ones(5).double(), rtol=1e-6, atol=0)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    _, optimizer, grads = trained(torch.optim.Adam, 3)
    state = next(iter(optimizer.state.values()))
    whole = adam_direction(grads, state["exp_avg"], state["exp_avg_sq"], step=3)
    for row in range(5):
        one = adam_direction(grads[row : row + 1], state["exp_avg"], state["exp_avg_sq"], step=3)
        torch.testing.assert_close(one[0], whole[row], rtol=0, atol=0)


def test_arguments_are_not_changed() -> None:
    _, optimizer, grads = trained(torch.optim.Adam, 3)
    state = next(iter(optimizer.state.values()))
    m, v = state["exp_avg"], state["exp_avg_sq"]
    copies = [t.clone() for t in (grads, m, v)]
    for form in ADAM_FORMS:
        adam_direction(grads, m, v, step=3, form=form)
    preconditioner(v, step=3)
    for tensor, copy in zip((grads, m, v), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_preconditioner_is_the_derivative_of_adams_step_with_the_change_of_v_left_out() -> None:
    step, v = 6, torch.tensor([1e-4, 2e-3, 0.5], dtype=torch.float64)
    d = preconditioner(v, step=step, beta1=BETA1, beta2=BETA2, eps=EPS, untouched="keep")
    # With g = 0 the moments' next values are β m and v̂ at `step`, as the equation reads it.
    root = (v / (1 - BETA2**step)).sqrt() + EPS

    def update(g: torch.Tensor) -> torch.Tensor:
        return (1 - BETA1) * g / (1 - BETA1 ** (step + 1)) / root

    jacobian = torch.autograd.functional.jacobian(update, torch.zeros(3).double())
    torch.testing.assert_close(d, torch.diagonal(jacobian), rtol=1e-12, atol=0)


def test_preconditioner_by_hand() -> None:
    # t = 1: v / (1 - β2) = 4 for v = 0.004, so D = 0.1 / ((1 - 0.81) (2 + ε))
    d = preconditioner(torch.tensor([0.004], dtype=torch.float64), step=1, eps=1e-12)
    assert float(d) == pytest.approx(0.1 / 0.19 / 2, rel=1e-9)


@pytest.mark.parametrize(("untouched", "expected"), [("zero", 0.0), ("median", None)])
def test_coordinates_without_history_do_not_outweigh_the_others(untouched: Any, expected: float | None) -> None:
    v = torch.tensor([0.0, 1e-3, 2e-3, 4e-3, 1e-20], dtype=torch.float64)
    d = preconditioner(v, step=1, untouched=untouched)
    bare = preconditioner(v, step=1, untouched="keep")
    assert torch.equal(d[1:4], bare[1:4]) and float(bare[0]) > 1e6
    wanted = float(bare[2]) if expected is None else expected
    assert d[0] == d[4] == wanted


@pytest.mark.parametrize("untouched", ["zero", "median"])
def test_a_layer_without_any_history_gets_no_update(untouched: Any) -> None:
    assert preconditioner(torch.zeros(2, 3), step=1, untouched=untouched).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"step": -1}, InvalidInput, "cannot be negative, got -1"),
        ({"v": torch.tensor([-1.0])}, InvalidInput, "must not be negative"),
        ({"form": "rmsprop"}, InvalidSettings, "'rmsprop' is unknown; choose one of adam, less-code, uncorrected"),
        ({"beta1": 1.0}, InvalidSettings, "beta1=1.0"),
        ({"eps": 0.0}, InvalidSettings, "eps=0.0"),
    ],
)
def test_senseless_arguments_are_refused(changes: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = {"grad": torch.ones(1, 1), "m": torch.zeros(1), "v": torch.zeros(1), "step": 0, **changes}
    with pytest.raises(error, match=sentence):
        inspect.unwrap(adam_direction)(**arguments)  # where tests check types, these would refuse some of them first


def test_preconditioner_before_the_first_step_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one finished optimizer step"):
        preconditioner(torch.zeros(1), step=0)
    with pytest.raises(InvalidSettings, match="untouched='one' is unknown"):
        inspect.unwrap(preconditioner)(torch.zeros(1), step=1, untouched="one")
