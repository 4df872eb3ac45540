"""The closed forms of the LM head against autograd through the model itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

from tamis.errors import Unsupported
from tamis.model import head as head_module
from tamis.model.head import Head, head_of, prediction_errors, read_out
from tamis.model.loss import supervised_positions
from tamis.model.states import supervised_states
from tamis.model.targets import output_embeddings
from tiny_models import DECODERS, random_batch, tiny_model


def scaled_model(family):
    """Two families that multiply their logits by a constant."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "granite":
        model = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0))
    else:
        model = CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.25))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.3)
    return model.double().eval()


def autograd_errors(model, batch):
    """Gradient of the summed token losses by the head's input, from the model's own full logits."""
    caught = []

    def catch(module, args):
        caught.append(args[0].detach().requires_grad_())
        return (caught[0], *args[1:])

    handle = output_embeddings(model).register_forward_pre_hook(catch)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.double()
    handle.remove()
    at = supervised_positions(batch)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1)[at.flat], at.labels, reduction="sum")
    (grad,) = torch.autograd.grad(loss, caught)
    return grad.flatten(0, 1)[at.flat]


@pytest.mark.parametrize("family", [*DECODERS, "granite", "cohere"])
def test_errors_are_the_gradient_of_the_loss_by_the_state(family):
    model = scaled_model(family) if family in ("granite", "cohere") else tiny_model(family)
    batch = random_batch([6, 9, 2])
    at = supervised_positions(batch)
    found = prediction_errors(head_of(model), supervised_states(model, batch, at), at.labels)
    expected = autograd_errors(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    if family in ("granite", "cohere", "gemma3"):  # the constant or cap is really there
        head = head_of(model)
        assert (head.scale, head.cap) != (1.0, None)


def test_errors_by_hand():
    # Two words, one number: logits 0 and ln 3 give probabilities 1/4 and 3/4.
    head = Head(weight=torch.tensor([[0.0], [1.0]], dtype=torch.float64), bias=None)
    hidden = torch.tensor([[3.0], [3.0]], dtype=torch.float64).log()
    errors = prediction_errors(head, hidden, torch.tensor([0, 1]))
    torch.testing.assert_close(errors, torch.tensor([[0.75], [-0.25]], dtype=torch.float64))


def test_logits_that_span_hundreds_lose_no_digit():
    torch.manual_seed(0)
    weight, hidden = torch.randn(200, 4).double(), 100 * torch.randn(7, 4).double()
    labels = torch.randint(0, 200, (7,))
    exact = torch.softmax(hidden @ weight.T, dim=1) - nn.functional.one_hot(labels, 200)
    assert float((hidden @ weight.T).amax() - (hidden @ weight.T).amin()) > 300
    found = prediction_errors(Head(weight=weight, bias=None), hidden, labels)
    torch.testing.assert_close(found, exact @ weight, rtol=0, atol=1e-13)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 200), st.sampled_from([None, 2.0]))
def test_how_many_logits_exist_at_a_time_changes_nothing(tokens, chunk, cap):
    torch.manual_seed(tokens)
    head = Head(weight=torch.randn(11, 3).double(), bias=torch.randn(11).double(), scale=0.7, cap=cap)
    hidden, labels = torch.randn(tokens, 3).double(), torch.randint(0, 11, (tokens,))
    whole = prediction_errors(head, hidden, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "_CPU_CHUNK", chunk)
        torch.testing.assert_close(prediction_errors(head, hidden, labels), whole)


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 6), st.floats(0.1, 3))
def test_read_out_keeps_the_inner_products_of_the_outputs(vocabulary, hidden, scale):
    # Vocabularies smaller than the width make W^T W singular, which has no Cholesky factor.
    torch.manual_seed(vocabulary * 7 + hidden)
    head = Head(weight=torch.randn(vocabulary, hidden).double(), bias=None, scale=scale)
    x = torch.randn(4, hidden).double()
    outputs, short = x @ head.weight.T * scale, x @ read_out(head)
    torch.testing.assert_close(short @ short.T, outputs @ outputs.T, rtol=0, atol=1e-12 * float(outputs.norm() ** 2))


def test_read_out_in_blocks_is_the_same(monkeypatch):
    head = Head(weight=torch.randn(50, 4), bias=None)
    whole = read_out(head)
    monkeypatch.setattr(head_module, "_CPU_CHUNK", 9)
    torch.testing.assert_close(read_out(head), whole)


def test_half_precision_errors_are_float32():
    model = tiny_model("llama", dtype=torch.bfloat16)
    batch = random_batch([6, 3])
    at = supervised_positions(batch)
    found = prediction_errors(head_of(model), supervised_states(model, batch, at), at.labels)
    exact = autograd_errors(tiny_model("llama"), batch)
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) < 0.05  # eight bits of mantissa through two blocks


def test_head_that_does_more_than_a_factor_and_a_cap_is_refused():
    model = tiny_model("llama")
    forward = type(model).forward

    class Shifted(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = output.logits - output.logits.square()
            return output

    model.__class__ = Shifted
    with pytest.raises(Unsupported, match="turns its head's output into logits in a way that tamis does not know"):
        head_of(model)


def test_cap_that_the_config_does_not_name_is_noticed():
    model = tiny_model("gemma3")
    forward = type(model).forward

    class Hidden(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = 40 * torch.tanh(output.logits / 40)  # nearly nothing for small logits
            return output

    model.config.final_logit_softcapping = None
    head_of(model)
    model.__class__ = Hidden
    with pytest.raises(Unsupported, match="neither a factor nor a soft cap of its config"):
        head_of(model)


def test_head_with_an_adapter_is_refused():
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(Unsupported, match="the LM head is a Sequential, not a plain linear layer"):
        head_of(model)
