"""The engine against two oracles (a loop of plain autograd, and torch.func), and what may never change its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FalconConfig, FalconForCausalLM, MixtralConfig, MixtralForCausalLM

from oracles import functional_gradients, loop_gradients, relative_error
from tamis.errors import InvalidInput, NonFinite, Unsupported
from tamis.gradients.per_sample import (
    Alignments,
    FactorizedFeatures,
    Factors,
    MaterialisedGradients,
    WeightedGradient,
    mean_gradient,
    per_sample_features,
    run_batch,
)
from tamis.model.targets import gradient_layers
from tamis.projection import make_projector, project_gradients
from tamis.types import Batch, LayerSpec
from tiny_models import FAMILIES, one_row, padded_by, permuted, random_batch, tiny_model

LENGTHS = [5, 9, 12, 3]
MODELS = [(family, lora) for family in FAMILIES for lora in (False, True)]

# Engine and loop run the same float32 operations inside Transformers' norms, row by row and token by token, so those
# round alike and float64 agreement is only limited by float64 sums.
FLOAT64 = 1e-10
FLOAT32 = 1e-5


def materialised(model: nn.Module, batch: Batch, layers: tuple[LayerSpec, ...]) -> tuple[Tensor, Tensor]:
    consumer = MaterialisedGradients(layers)
    losses = run_batch(model, batch, layers, consumer)
    return losses, consumer.grads


def enable_checkpointing(model: nn.Module, *, use_reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "lora"), MODELS)
def test_per_sample_gradients_equal_the_loop(
    family: str, lora: bool, tied: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = tiny_model(family, lora=lora, tied=tied, dtype=dtype)
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS)
    losses, grads = materialised(model, batch, layers)
    expected_losses, expected = loop_gradients(model, batch, layers)
    assert relative_error(losses, expected_losses) < tolerance
    assert grads.dtype == dtype
    assert relative_error(grads, expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_an_included_head_equal_the_loop(
    family: str, tied: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = tiny_model(family, tied=tied, dtype=dtype)
    layers = gradient_layers(model, include_head=True)
    assert layers[-1].kind == "head"
    batch = random_batch(LENGTHS)
    _, grads = materialised(model, batch, layers)
    assert relative_error(grads, loop_gradients(model, batch, layers)[1]) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
@pytest.mark.parametrize(
    ("family", "lora", "head"), [(f, lora, head) for f, lora in MODELS for head in (False, True) if not (lora and head)]
)
def test_per_sample_gradients_equal_torch_func(
    family: str, lora: bool, head: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """torch.func takes its own loss and the eager kernel; rows of one length, since eager float64 attention of padded
    sliding windows is NaN in Transformers itself. Eager softmax is float32 there, in float64 models too, but both sides
    run the same one."""
    model = tiny_model(family, lora=lora, tied=True, dtype=dtype)
    model.set_attn_implementation("eager")
    layers = gradient_layers(model, include_head=head)
    batch = random_batch([8, 8, 8])
    _, grads = materialised(model, batch, layers)
    assert relative_error(grads, functional_gradients(model, batch, layers)) < tolerance


def test_head_part_alone_of_a_tied_matrix_is_far_off() -> None:
    """The embedding's part matters: this fails if the tap on the embedding is lost."""
    model = tiny_model("llama", tied=True)
    layers = tuple(layer for layer in gradient_layers(model, include_head=True) if layer.kind == "head")
    batch = random_batch(LENGTHS)
    _, expected = loop_gradients(model, batch, layers)
    model.config.tie_word_embeddings = False
    untied = tiny_model("llama", tied=False)
    untied.load_state_dict(model.state_dict())
    _, head_only = materialised(untied, batch, layers)
    assert relative_error(head_only, expected) > 0.1


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("family", "lora"), [("llama", False), ("llama", True), ("gpt2", False), ("gemma3", False)])
def test_gradient_checkpointing_changes_nothing(family: str, lora: bool, use_reentrant: bool) -> None:
    model = tiny_model(family, lora=lora, tied=True)
    layers = gradient_layers(model, include_head=not lora)
    batch = random_batch(LENGTHS)
    plain_losses, plain = materialised(model, batch, layers)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = dict(model.named_modules())[layers[0].name].register_forward_hook(count)
    enable_checkpointing(model, use_reentrant=use_reentrant)
    losses, grads = materialised(model, batch, layers)
    handle.remove()
    assert calls == 2  # it was really run again during backward
    torch.testing.assert_close(losses, plain_losses, rtol=0, atol=0)
    torch.testing.assert_close(grads, plain, rtol=0, atol=0)


@pytest.mark.parametrize(("family", "lora"), [("llama", True), ("gpt2", False)])
def test_dropout_is_off_inside_the_pass_and_restored(family: str, lora: bool) -> None:
    model = tiny_model(family, lora=lora, dropout=0.5).train()
    enable_checkpointing(model, use_reentrant=False)
    modes = {name: module.training for name, module in model.named_modules()}
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS)
    _, first = materialised(model, batch, layers)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert relative_error(first, loop_gradients(model.eval(), batch, layers)[1]) < FLOAT64


# --- what may not change a number -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_batch_mates_or_padding(family: str) -> None:
    model = tiny_model(family)
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS)
    losses, together = materialised(model, batch, layers)
    for row in range(len(LENGTHS)):
        loss, alone = materialised(model, one_row(batch, row), layers)
        assert relative_error(alone, together[row : row + 1]) < FLOAT64
        torch.testing.assert_close(loss[0], losses[row], rtol=FLOAT64, atol=0)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 14), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    extra=st.integers(0, 6),
    data=st.data(),
)
def test_padding_permutation_and_duplication_have_no_effect(
    lengths: list[int], seed: int, extra: int, data: st.DataObject
) -> None:
    model = tiny_model("qwen2")
    layers = gradient_layers(model)
    batch = random_batch(lengths, seed=seed)
    order = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    losses, grads = materialised(model, batch, layers)
    other_losses, other = materialised(model, padded_by(permuted(batch, order), extra), layers)
    torch.testing.assert_close(other_losses, losses[order], rtol=FLOAT64, atol=0)
    assert relative_error(other, grads[order]) < FLOAT64


@settings(max_examples=10, deadline=None)
@given(exponents=st.lists(st.integers(-3, 3), min_size=4, max_size=4), seed=st.integers(0, 1000))
def test_weighted_gradient_is_linear_in_the_weights(exponents: list[int], seed: int) -> None:
    model = tiny_model("llama")
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS, seed=seed)
    example_weights = torch.tensor([2.0**e for e in exponents], dtype=torch.float64)
    weighted, doubled = WeightedGradient(example_weights), WeightedGradient(2 * example_weights)
    run_batch(model, batch, layers, weighted)
    run_batch(model, batch, layers, doubled)
    for layer in layers:
        torch.testing.assert_close(doubled.grads[layer.name], 2 * weighted.grads[layer.name], rtol=0, atol=0)


# --- the consumers against the materialised gradients ----------------------------------------------------------------


@pytest.mark.parametrize(("family", "lora"), MODELS)
def test_alignments_equal_products_of_the_gradients(family: str, lora: bool) -> None:
    model = tiny_model(family, lora=lora)
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS)
    _, grads = materialised(model, batch, layers)
    torch.manual_seed(1)
    several = {layer.name: torch.randn(3, *layer.shape, dtype=torch.float64) for layer in layers}
    flat = torch.cat([several[layer.name].flatten(1) for layer in layers], dim=1)  # (J, P)
    many = Alignments(several)
    run_batch(model, batch, layers, many)
    torch.testing.assert_close(many.dot, grads @ flat.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(many.norm, grads.norm(dim=1), rtol=1e-10, atol=0)
    single = Alignments({name: matrices[1] for name, matrices in several.items()}, norms=False)
    run_batch(model, batch, layers, single)
    torch.testing.assert_close(single.dot, grads @ flat[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [False, True])
def test_weighted_gradient_equals_autograd_on_the_weighted_loss(family: str, head: bool) -> None:
    """To the last float64 digits for powers of two, which commute with the rounding of the float32 norms inside."""
    model = tiny_model(family, tied=True)
    layers = gradient_layers(model, include_head=head)
    batch = random_batch(LENGTHS)
    example_weights = torch.tensor([0.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    consumer = WeightedGradient(example_weights)
    run_batch(model, batch, layers, consumer)
    _, rows = loop_gradients(model, batch, layers)
    expected = example_weights @ rows
    got = torch.cat([consumer.grads[layer.name].flatten() for layer in layers])
    assert relative_error(got[None], expected[None]) < 1e-12


@pytest.mark.parametrize(("family", "lora"), MODELS)
def test_factorized_features_equal_the_projected_gradients(family: str, lora: bool) -> None:
    model = tiny_model(family, lora=lora, tied=True)
    layers = gradient_layers(model, include_head=not lora)
    batch = random_batch(LENGTHS)
    _, grads = materialised(model, batch, layers)
    projector = make_projector("factorized", dim=6, seed=3)
    consumer = FactorizedFeatures(projector, layers)
    run_batch(model, batch, layers, consumer)
    assert consumer.features.shape == (len(LENGTHS), projector.output_dim(layers))
    assert relative_error(consumer.features, project_gradients(projector, grads, layers)) < FLOAT64


@pytest.mark.parametrize("name", ["none", "factorized", "rademacher", "hadamard", "mask"])
def test_every_projector_gives_the_features_of_the_whole_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS)
    _, grads = materialised(model, batch, layers)
    projector = make_projector(name, dim=None if name == "none" else 8, seed=5)
    # Two rows at a time, so that the batch is really split for whole-vector projections.
    monkeypatch.setattr("tamis.gradients.per_sample._MAX_ENTRIES", 2 * sum(layer.numel for layer in layers))
    losses, features, norms = per_sample_features(model, batch, layers, projector)
    assert losses.shape == (4,)
    assert relative_error(features, project_gradients(projector, grads, layers)) < FLOAT64
    if name != "factorized":
        assert norms is not None
        torch.testing.assert_close(norms, grads.norm(dim=1), rtol=FLOAT64, atol=0)


def test_unknown_projectors_are_refused() -> None:
    class Odd:
        identity: ClassVar[dict[str, object]] = {}

        def output_dim(self, layers: object) -> int:
            return 1

    model = tiny_model("llama")
    with pytest.raises(Unsupported, match="projector Odd has none of sides, project_layer and project"):
        per_sample_features(model, random_batch([4]), gradient_layers(model), Odd())


def test_factors_multiply_to_the_gradient() -> None:
    model = tiny_model("llama")
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS)
    _, grads = materialised(model, batch, layers)
    consumer = Factors()
    run_batch(model, batch, layers, consumer)
    made = [torch.einsum("bto,bti->boi", g, a).flatten(1) for a, g in (consumer.factors[x.name] for x in layers)]
    assert relative_error(torch.cat(made, dim=1), grads) < FLOAT64


@pytest.mark.parametrize("unit", [False, True])
def test_mean_gradient_is_the_mean_over_all_rows(unit: bool) -> None:
    model = tiny_model("qwen2")
    layers = gradient_layers(model)
    batches = [random_batch(LENGTHS, seed=1), random_batch([7], seed=2)]
    rows = torch.cat([materialised(model, batch, layers)[1] for batch in batches])
    expected = (rows / rows.norm(dim=1, keepdim=True) if unit else rows).mean(dim=0)
    got = mean_gradient(model, batches, layers, unit=unit)
    assert relative_error(torch.cat([got[x.name].flatten() for x in layers])[None], expected[None]) < FLOAT64


def test_mean_gradient_of_nothing_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidInput, match="needs at least one row"):
        mean_gradient(model, [], gradient_layers(model), unit=True)


def test_zero_gradient_has_no_direction_and_adds_nothing() -> None:
    """The adapter's B is zero at the start, so A has no gradient; with B frozen out nothing is left."""
    model = tiny_model("llama", lora=True)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.zero_()
    layers = tuple(layer for layer in gradient_layers(model) if "lora_A" in layer.name)
    found = mean_gradient(model, [random_batch([5])], layers, unit=True)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in found.values())


# --- a layer used twice, and half precision --------------------------------------------------------------------------


def test_layer_used_twice_in_a_forward_gets_the_sum_of_both_uses() -> None:
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    layers = gradient_layers(model)
    assert len(layers) == 7
    batch = random_batch(LENGTHS)
    _, expected = loop_gradients(model, batch, layers)
    _, grads = materialised(model, batch, layers)
    assert relative_error(grads, expected) < FLOAT64
    consumer = Alignments(None)
    run_batch(model, batch, layers, consumer)
    torch.testing.assert_close(consumer.norm, expected.norm(dim=1), rtol=1e-9, atol=0)
    enable_checkpointing(model, use_reentrant=False)
    assert relative_error(materialised(model, batch, layers)[1], expected) < FLOAT64


def test_bfloat16_model_gives_float32_results_near_those_of_float32() -> None:
    """bf16 keeps 8 bits: 2^-8 relative a rounding, some dozens of them in sequence through two blocks."""
    model = tiny_model("llama", dtype=torch.float32)
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS)
    losses, expected = materialised(model, batch, layers)
    low = tiny_model("llama", dtype=torch.bfloat16)
    low_losses, grads = materialised(low, batch, layers)
    assert grads.dtype == low_losses.dtype == torch.float32
    torch.testing.assert_close(low_losses, losses, rtol=0.02, atol=0)
    assert relative_error(grads, expected) < 0.1
    projector = make_projector("factorized", dim=4, seed=0)
    assert per_sample_features(low, batch, layers, projector)[1].dtype == torch.float32


# --- the model is left as it was, and nothing wrong goes by unseen ----------------------------------------------------


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    def state() -> list[object]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
        return [hooks, [p.requires_grad for p in model.parameters()], [p.grad is None for p in model.parameters()]]

    before = state()
    yield
    assert state() == before


class Failing:
    """A consumer that stops on its way back."""

    def keep(self, layer: LayerSpec, act: Tensor) -> tuple[Tensor, ...]:
        return ()

    def consume(self, layer: LayerSpec, kept: tuple[Tensor, ...], grad_out: Tensor) -> None:
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("lora", [False, True])
def test_hooks_and_flags_are_restored_also_after_errors(lora: bool) -> None:
    model = tiny_model("llama", lora=lora).train()
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS)
    with unchanged(model):
        run_batch(model, batch, layers, MaterialisedGradients(layers))
    with unchanged(model), pytest.raises(RuntimeError, match="on purpose"):
        run_batch(model, batch, layers, Failing())


class MatmulShapes(TorchDispatchMode):
    """Records the shape of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.shapes.append(tuple(result.shape))
        return result


def test_model_is_called_once_per_batch_and_no_weight_gradient_is_computed() -> None:
    model = tiny_model("llama")
    layers = gradient_layers(model)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    weights = {layer.shape for layer in layers} | {layer.shape[::-1] for layer in layers}
    with MatmulShapes() as matmuls:
        run_batch(model, random_batch(LENGTHS), layers, FactorizedFeatures(make_projector("factorized", dim=4), layers))
    handle.remove()
    assert calls == [1]
    assert all(param.grad is None for param in model.parameters())
    assert matmuls.shapes
    assert not [shape for shape in matmuls.shapes if shape[-2:] in weights]
    with MatmulShapes() as matmuls:  # the same look does see them where they are computed
        run_batch(model, random_batch(LENGTHS), layers, MaterialisedGradients(layers))
    assert [shape for shape in matmuls.shapes if shape[-2:] in weights]


def test_non_finite_loss_names_the_rows() -> None:
    model = tiny_model("llama")
    batch = random_batch(LENGTHS)
    batch = Batch(
        rows=torch.tensor([10, 11, 12, 13]),
        input_ids=batch.input_ids.clone(),
        attention_mask=batch.attention_mask,
        supervised=batch.supervised,
    )
    batch.input_ids[2, 0] = 1
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = float("nan")
    layers = gradient_layers(model)
    with unchanged(model), pytest.raises(NonFinite, match="loss of rows 12 is NaN or infinite") as error:
        run_batch(model, batch, layers, MaterialisedGradients(layers))
    assert error.value.rows == (12,)


def test_layer_that_never_runs_is_reported_by_name() -> None:
    model = tiny_model("llama")
    model.unused = nn.Linear(4, 4).double()
    layers = gradient_layers(model)
    with unchanged(model), pytest.raises(Unsupported, match="layer 'unused' was never called as a module"):
        run_batch(model, random_batch([4]), layers, MaterialisedGradients(layers))


def test_layer_that_cannot_tell_rows_apart_is_reported_by_name() -> None:
    class Gathering(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            return torch.cat([self.inner(flat[:1]), self.inner(flat[1:])]).view(*x.shape[:2], -1)

    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Gathering(mlp.up_proj)
    layers = gradient_layers(model)
    with unchanged(model), pytest.raises(Unsupported, match=r"up_proj\.inner' works on a tensor of shape \(1, 16\)"):
        run_batch(model, random_batch([4, 6]), layers, MaterialisedGradients(layers))


def test_layers_whose_output_is_changed_in_place_keep_their_gradients() -> None:
    """Falcon adds the attention's output to the MLP's in place."""
    config = FalconConfig(vocab_size=64, hidden_size=16, ffn_hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = FalconForCausalLM(config).double().eval()
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS)
    _, grads = materialised(model, batch, layers)
    assert relative_error(grads, loop_gradients(model, batch, layers)[1]) < FLOAT64


def test_attention_of_a_model_with_routed_experts_equals_the_loop() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS)
    _, grads = materialised(model, batch, layers)
    assert relative_error(grads, loop_gradients(model, batch, layers)[1]) < FLOAT32  # experts have no float64 kernel


def test_layers_that_flatten_their_tokens_are_told_apart() -> None:
    class Flattening(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(0, 1)).view(*x.shape[:2], -1)

    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Flattening(mlp.up_proj)
    layers = gradient_layers(model)
    batch = random_batch(LENGTHS)
    _, grads = materialised(model, batch, layers)
    assert relative_error(grads, loop_gradients(model, batch, layers)[1]) < FLOAT64
