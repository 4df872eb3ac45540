"""Moments against what the real optimizers do with a gradient, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tamis.errors import Unsupported
from tamis.maths.adam import adam_direction, adam_jacobian, row_column
from tamis.online.adam_state import learning_rate, read_adam

VARIANTS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"foreach": False}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.AdamW, {"capturable": False, "differentiable": False}),
]


def trained(
    kind: type[torch.optim.Optimizer], steps: int, **settings: Any
) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Two parameters in groups of their own betas, eps and decay, after ``steps`` random steps."""
    generator = torch.Generator().manual_seed(steps)
    params = {
        name: nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator))
        for name, shape in {"a": (4, 3), "b": (5,)}.items()
    }
    decay = 0.0 if kind is torch.optim.Adam else 0.1
    optimizer = kind(
        [
            # Adam's own decay is a gradient, which would change v; AdamW's is not.
            {"params": [params["a"]], "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay},
            {"params": [params["b"]], "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.0},
        ],
        lr=0.02,
        **settings,
    )
    for _ in range(steps):
        for param in params.values():
            param.grad = torch.randn(param.shape, dtype=torch.float64, generator=generator)
        optimizer.step()
    return params, optimizer


def step_of(
    kind: type[torch.optim.Optimizer], steps: int, grads: dict[str, Tensor], **settings: Any
) -> dict[str, Tensor]:
    """What one more real step takes off the parameters, per unit of learning rate."""
    params, optimizer = trained(kind, steps, **settings)
    before = {name: param.detach().clone() for name, param in params.items()}
    for name, param in params.items():
        param.grad = grads[name].clone()
    optimizer.step()
    return {name: (before[name] - param.detach()) / 0.02 for name, param in params.items()}


@pytest.mark.parametrize("steps", [1, 2, 17])
@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_diagonal_is_what_the_real_step_multiplies_a_gradient_by(
    kind: type[torch.optim.Optimizer], settings: dict[str, Any], steps: int
) -> None:
    """A gradient whose square equals v̂ leaves v̂ as it is, so the step is linear between it and its negative."""
    params, optimizer = trained(kind, steps, **settings)
    moments = read_adam(optimizer, params)
    grads = {}
    for name, state in moments.items():
        assert state.step == steps
        v = state.exp_avg_sq
        grads[name] = (v / (1 - state.beta2**steps)).sqrt()
    up = step_of(kind, steps, grads, **settings)
    down = step_of(kind, steps, {name: -grad for name, grad in grads.items()}, **settings)
    for name, state in moments.items():
        if settings.get("amsgrad"):
            continue  # its largest v is raised by the step itself; covered below
        torch.testing.assert_close((up[name] - down[name]) / 2, state.diagonal() * grads[name], rtol=1e-9, atol=1e-12)


def test_amsgrad_divides_by_the_largest_second_moment() -> None:
    params, optimizer = trained(torch.optim.AdamW, 9, amsgrad=True)
    for name, state in read_adam(optimizer, params).items():
        largest = optimizer.state[params[name]]["max_exp_avg_sq"]
        expected = (1 - state.beta1) / (1 - state.beta1**10)
        expected = expected / ((largest / (1 - state.beta2**9)).sqrt() + state.eps)
        torch.testing.assert_close(state.diagonal(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [0, 1, 5, 30])
def test_jacobian_is_the_derivative_of_the_real_step(steps: int) -> None:
    params, optimizer = trained(torch.optim.AdamW, steps)
    generator = torch.Generator().manual_seed(99)
    at = {name: torch.randn(p.shape, dtype=torch.float64, generator=generator) for name, p in params.items()}
    small = 1e-6
    up = step_of(torch.optim.AdamW, steps, {name: grad + small for name, grad in at.items()})
    down = step_of(torch.optim.AdamW, steps, {name: grad - small for name, grad in at.items()})
    for name, state in read_adam(optimizer, params).items():
        k = adam_jacobian(
            at[name], state.exp_avg, state.exp_avg_sq,
            step=state.step, beta1=state.beta1, beta2=state.beta2, eps=state.eps,
        )  # fmt: skip
        # Central differences: error of second order in 1e-6, and rounding of a step of size 1 over 2e-6.
        torch.testing.assert_close((up[name] - down[name]) / (2 * small), k, rtol=1e-5, atol=1e-8)


def test_secant_is_the_real_step_by_that_gradient_alone() -> None:
    params, optimizer = trained(torch.optim.AdamW, 6)
    grads = {name: torch.full_like(param, 0.3).detach() for name, param in params.items()}
    taken = step_of(torch.optim.AdamW, 6, grads)
    for name, state in read_adam(optimizer, params).items():
        direction = adam_direction(
            grads[name][None], state.exp_avg, state.exp_avg_sq,
            step=state.step, beta1=state.beta1, beta2=state.beta2, eps=state.eps,
        )[0]  # fmt: skip
        start = trained(torch.optim.AdamW, 6)[0][name].detach()
        decay = optimizer.param_groups[0 if name == "a" else 1]["weight_decay"]
        torch.testing.assert_close(taken[name] - decay * start, direction, rtol=1e-8, atol=1e-10)


def test_reading_changes_nothing() -> None:
    params, optimizer = trained(torch.optim.AdamW, 3)
    before = {name: optimizer.state[param]["exp_avg_sq"].clone() for name, param in params.items()}
    moments = read_adam(optimizer, params)
    for state in moments.values():
        state.diagonal()
    for name, param in params.items():
        assert torch.equal(optimizer.state[param]["exp_avg_sq"], before[name])


def test_a_prepared_optimizer_is_looked_through() -> None:
    params, optimizer = trained(torch.optim.AdamW, 2)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    assert prepared is not optimizer
    assert {state.step for state in read_adam(prepared, params).values()} == {2}
    assert learning_rate(prepared) == 0.02


def test_groups_with_other_learning_rates_count_in_proportion() -> None:
    params, optimizer = trained(torch.optim.AdamW, 2)
    plain = read_adam(optimizer, params)["b"].diagonal()
    optimizer.param_groups[1]["lr"] = 0.005
    assert torch.equal(read_adam(optimizer, params)["b"].diagonal(), plain / 4)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the first step of a warm-up
    assert torch.equal(read_adam(optimizer, params)["b"].diagonal(), plain)


def test_before_the_first_step_there_is_no_diagonal() -> None:
    params, optimizer = trained(torch.optim.AdamW, 0)
    for name, state in read_adam(optimizer, params).items():
        assert state.step == 0
        assert torch.equal(state.diagonal(), torch.zeros_like(params[name]))


def test_coordinates_that_never_had_a_gradient_count_for_nothing() -> None:
    params, optimizer = trained(torch.optim.AdamW, 4)
    optimizer.state[params["a"]]["exp_avg_sq"][0] = 0.0
    diagonal = read_adam(optimizer, params)["a"].diagonal()
    assert torch.equal(diagonal[0], torch.zeros(3, dtype=torch.float64))
    assert (diagonal[1:] > 0).all()


class _Blocks(torch.optim.Optimizer):
    """Keeps its moments as block-wise 8-bit optimizers do: codes, a code book, and the largest value of each block."""

    def __init__(self, params: list[nn.Parameter], block: int) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8})
        book = torch.linspace(0, 1, 256)
        for param in params:
            values = torch.rand(param.numel(), generator=torch.Generator().manual_seed(0)) + 0.1
            blocks = values.split(block)
            self.state[param] = {"step": 7}
            for which in ("1", "2"):
                self.state[param] |= {
                    f"state{which}": torch.cat([(part / part.max() * 255).round() for part in blocks]).to(torch.uint8),
                    f"absmax{which}": torch.stack([part.max() for part in blocks]),
                    f"qmap{which}": book,
                }
            self.values = values


@pytest.mark.parametrize("block", [256, 2048])
def test_block_wise_eight_bit_moments_are_read(block: int) -> None:
    param = nn.Parameter(torch.zeros(70, 61))
    optimizer = _Blocks([param], block)
    state = read_adam(optimizer, {"w": param})["w"]
    assert state.step == 7
    # Half a code of a 256-entry linear book, times the largest value (1.1).
    torch.testing.assert_close(state.exp_avg_sq, optimizer.values.view(70, 61), rtol=0, atol=1.1 / 255 / 2 + 1e-6)
    optimizer.state[param]["absmax2"] = optimizer.state[param]["absmax2"][:-1]
    with pytest.raises(Unsupported, match="8-bit state of 'w' is not block-wise"):
        read_adam(optimizer, {"w": param})


def test_what_is_no_adam_is_refused_with_what_to_do() -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    sgd = torch.optim.SGD([param], lr=0.1)
    with pytest.raises(Unsupported, match=r"SGD is not an Adam.*adamw_torch.*alignment='raw'"):
        read_adam(sgd, {"w": param})
    adamax = torch.optim.Adamax([param], lr=0.1)
    adamax.step()
    with pytest.raises(Unsupported, match="Adamax is not an Adam with whole moments"):
        read_adam(adamax, {"w": param})
    with pytest.raises(Unsupported, match="maximize=False"):
        read_adam(torch.optim.Adam([param], maximize=True), {"w": param})
    other = nn.Parameter(torch.zeros(2))
    with pytest.raises(Unsupported, match="'v' is trainable but not in the optimizer"):
        read_adam(torch.optim.Adam([param]), {"v": other})


def test_capturable_counts_and_float8_moments_are_read_and_bare_codes_refused() -> None:
    """``capturable`` steps on accelerators only; what it leaves are counts in tensors, as here."""
    params, optimizer = trained(torch.optim.AdamW, 5)
    plain = read_adam(optimizer, params)
    for group in optimizer.param_groups:
        group["capturable"] = True
    for param in params.values():
        optimizer.state[param]["step"] = torch.tensor(5.0)
    captured = read_adam(optimizer, params)
    for name, state in plain.items():
        assert captured[name].step == state.step == 5
        assert torch.equal(captured[name].diagonal(), state.diagonal())
    own = optimizer.state[params["a"]]
    own["exp_avg_sq"] = own["exp_avg_sq"].to(torch.float8_e4m3fn)
    read = read_adam(optimizer, params)["a"].exp_avg_sq
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, plain["a"].exp_avg_sq.float(), rtol=2**-3, atol=2**-9)  # three bits of fraction
    own["exp_avg_sq"] = torch.zeros(4, 3, dtype=torch.uint8)
    with pytest.raises(Unsupported, match=r"AdamW keeps moments of 'a' as torch.uint8 codes without the scales"):
        read_adam(optimizer, params)


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Rprop, torch.optim.RMSprop])
def test_an_optimizer_without_both_moments_is_refused_by_its_name(kind: type[torch.optim.Optimizer]) -> None:
    optimizer, param = _with_state(kind)
    with pytest.raises(
        Unsupported, match=f"{kind.__name__} is not an Adam with whole moments.*use optim='adamw_torch'"
    ):
        read_adam(optimizer, {"w": param})


def _with_state(kind: type[torch.optim.Optimizer]) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    param = nn.Parameter(torch.ones(3))
    optimizer = kind([param], lr=0.1)
    param.grad = torch.ones(3)
    optimizer.step()
    return optimizer, param


class FusedLAMB(torch.optim.Adam):
    """Known by its name alone: its state and groups are Adam's."""


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam, FusedLAMB])
def test_relatives_that_make_another_step_of_the_same_moments_are_refused(kind: type[torch.optim.Optimizer]) -> None:
    optimizer, param = _with_state(kind)
    assert {"exp_avg", "exp_avg_sq"} <= optimizer.state[param].keys()
    with pytest.raises(Unsupported, match=f"{kind.__name__} is not an Adam.*another step of them.*adamw_torch"):
        read_adam(optimizer, {"w": param})


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_decay_is_read_with_where_it_enters(kind: type[torch.optim.Optimizer]) -> None:
    param = nn.Parameter(torch.ones(3))
    state = read_adam(kind([param], lr=0.1, weight_decay=0.2), {"w": param})["w"]  # type: ignore[call-arg]
    assert (state.decay, state.decay_is_coupled) == (0.2, kind is torch.optim.Adam)


def test_row_and_column_scales_come_back_exactly_and_zeros_stay() -> None:
    generator = torch.Generator().manual_seed(1)
    r, q = (torch.rand(n, dtype=torch.float64, generator=generator) + 0.1 for n in (5, 7))
    d = torch.outer(r, q)
    torch.testing.assert_close(torch.outer(*row_column(d)), d, rtol=1e-12, atol=0)
    d[2], d[:, 3] = 0.0, 0.0
    again = torch.outer(*row_column(d))
    assert (again[2] == 0).all() and (again[:, 3] == 0).all()
