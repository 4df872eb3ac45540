"""Hidden-state embeddings against a loop over rows and Transformers' own hidden states."""

import pytest
import torch

from tamis.embeddings import HiddenMean, Rds
from tamis.errors import InvalidSettings
from tamis.model.blocks import causal_model
from tiny_models import DECODERS, one_row, random_batch, tiny_model

TOLERANCE = 1e-6  # unit rows in float32, from models parts of which compute in float32


def normed_states(model, alone, depth):
    """States behind ``depth`` blocks (None: all) of one unpadded row, after the final norm."""
    with torch.no_grad():
        states = model(input_ids=alone.input_ids, output_hidden_states=True).hidden_states
        if depth is None:
            return states[-1][0]  # the last of them went through the norm already
        stack = causal_model(model).base_model
        return (stack.ln_f if hasattr(stack, "ln_f") else stack.norm)(states[depth])[0]


def unit(rows):
    rows = torch.stack(rows)
    return (rows / rows.norm(dim=1, keepdim=True)).float()


@pytest.mark.parametrize("depth", [None, 0, 2])
@pytest.mark.parametrize("family", DECODERS)
def test_hidden_mean_is_the_mean_of_states_before_labels(family, depth):
    model, batch = tiny_model(family, blocks=3), random_batch([6, 9, 2])
    expected = []
    for row in range(3):
        alone = one_row(batch, row)
        states = normed_states(model, alone, depth)
        before = [states[t - 1] for t in range(1, len(states)) if alone.supervised[0, t]]
        expected.append(sum(before) / len(before))
    found = HiddenMean(depth=depth).start(model)(batch)
    torch.testing.assert_close(found["embedding"], unit(expected), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found["norm"], torch.stack(expected).norm(dim=1).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("positions", ["all", "supervised"])
def test_rds_weighs_the_ith_token_by_i(positions):
    model, batch = tiny_model("llama"), random_batch([6, 4])
    expected = []
    for row in range(2):
        alone = one_row(batch, row)
        states = normed_states(model, alone, None)
        counted = [i for i in range(len(states)) if positions == "all" or alone.supervised[0, i]]
        expected.append(sum((i + 1) * states[i] for i in counted) / sum(i + 1 for i in counted))
    found = Rds(positions=positions).start(model)(batch)["embedding"]
    torch.testing.assert_close(found, unit(expected), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("depth", [-1, 1.5, True])
def test_depths_that_no_model_has_are_refused(depth):
    with pytest.raises(InvalidSettings, match="depth must be a number of blocks, at least 0, got"):
        HiddenMean(depth=depth)


def test_unknown_positions_are_refused():
    with pytest.raises(InvalidSettings, match="positions must be 'all' or 'supervised', got 'last'"):
        Rds(positions="last")
