"""States at supervised positions, and means of them."""

import pytest
import torch

from tamis.model.loss import supervised_positions
from tamis.model.states import by_row, last_hidden_states, mean_by_row, states_before_head, supervised_states
from tiny_models import DECODERS, random_batch, tiny_model


@pytest.mark.parametrize("family", DECODERS)
def test_supervised_states_are_those_before_each_label(family):
    model = tiny_model(family, dropout=0.3).train()
    batch = random_batch([5, 8])
    found = supervised_states(model, batch, supervised_positions(batch))
    states = last_hidden_states(model, batch)
    expected = [
        states[row, position - 1] for row in range(2) for position in range(1, 8) if batch.supervised[row, position]
    ]
    torch.testing.assert_close(found, torch.stack(expected))
    assert model.training


def test_parameters_can_be_replaced_for_one_pass():
    model = tiny_model("llama")
    batch = random_batch([4])
    name = "model.norm.weight"
    doubled = {name: 2 * model.get_parameter(name).detach()}
    plain = last_hidden_states(model, batch)
    with torch.no_grad():
        found = states_before_head(model, batch, take=lambda hidden: hidden, params=doubled)
    torch.testing.assert_close(found, 2 * plain)
    torch.testing.assert_close(last_hidden_states(model, batch), plain)


def test_means_by_hand():
    batch = random_batch([4, 3])
    batch.supervised[:] = torch.tensor([[True, True, False, True], [False, True, False, False]])  # position 0 is none
    positions = supervised_positions(batch)
    values = torch.tensor([[1.0, 0], [3, 4], [5, 6]])
    assert by_row(values, positions).tolist() == [[[1, 0], [3, 4]], [[5, 6], [0, 0]]]
    assert mean_by_row(values, positions).tolist() == [[2, 2], [5, 6]]


def test_half_precision_values_are_summed_in_float32():
    batch = random_batch([400], supervised_share=1.0)
    positions = supervised_positions(batch)
    values = torch.full((len(positions.labels), 1), 1.0, dtype=torch.bfloat16)
    assert mean_by_row(values, positions).item() == 1.0  # a bfloat16 sum stops at 256
