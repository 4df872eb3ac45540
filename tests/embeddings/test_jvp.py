"""JVP embeddings: cosines of logit tangents, one direction or several."""

import pytest
import torch

from tamis.embeddings import Jvp
from tamis.errors import InvalidSettings
from tamis.gradients.jvp import gaussian_direction, hidden_tangents
from tamis.model.blocks import first_blocks
from tamis.model.head import head_of
from tamis.model.targets import gradient_layers
from tiny_models import DECODERS, random_batch, tiny_model

TOLERANCE = 2e-6


def logit_tangents(model, batch, depth, positions, index, seed=0):
    """``(B, V)``: the changes themselves, which the embedding never forms."""
    shallow = first_blocks(model, depth)
    layers = gradient_layers(shallow)
    direction = gaussian_direction(layers, seed=seed, index=index, dtype=torch.float64)
    return hidden_tangents(shallow, batch, layers, direction, positions=positions) @ head_of(model).weight.T


@pytest.mark.parametrize("positions", ["mean", "last"])
@pytest.mark.parametrize("family", DECODERS)
def test_cosines_are_those_of_logit_tangents(family, positions):
    model, batch = tiny_model(family, blocks=3), random_batch([6, 9, 3])
    one, two = (logit_tangents(model, batch, 2, positions, index) for index in (0, 1))
    for combine, full in {"mean": (one + two) / 2, "concat": torch.cat([one, two], dim=1)}.items():
        found = Jvp(depth=2, directions=2, positions=positions, combine=combine).start(model)(batch)
        unit = full / full.norm(dim=1, keepdim=True)
        embedding = found["embedding"]
        assert embedding.shape == (3, 16 if combine == "mean" else 32)
        torch.testing.assert_close(embedding @ embedding.T, (unit @ unit.T).float(), rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(found["norm"], full.norm(dim=1).float(), rtol=1e-5, atol=0)


def test_first_direction_does_not_depend_on_how_many_there_are():
    model, batch = tiny_model("llama"), random_batch([6, 9, 3])
    alone = Jvp(depth=1).start(model)(batch)["embedding"]
    both = Jvp(depth=1, directions=2, combine="concat").start(model)(batch)["embedding"][:, :16]
    torch.testing.assert_close(both / both.norm(dim=1, keepdim=True), alone, rtol=0, atol=TOLERANCE)


def test_mean_of_directions_takes_one_pass_and_concatenation_one_for_each():
    model, batch = tiny_model("llama"), random_batch([6])
    passes = []
    model.model.layers[0].register_forward_hook(lambda *args: passes.append(1))
    for combine, expected in (("mean", 1), ("concat", 3)):
        embed = Jvp(depth=1, directions=3, combine=combine).start(model)
        passes.clear()
        embed(batch)
        assert len(passes) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 0}, "depth must be a number of blocks, at least 1, got 0"),
        ({"directions": 0}, "directions must be at least 1, got 0"),
        ({"positions": "first"}, "positions must be 'mean' or 'last', got 'first'"),
        ({"combine": "sum"}, "combine must be 'mean' or 'concat', got 'sum'"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(InvalidSettings, match=message):
        Jvp(**fields)
