"""Gradient embeddings against plain autograd on trainable weights, projected afterwards."""

import pytest
import torch

from oracles import reference_gradients
from tamis.embeddings import Gradient, LensGradient, TailGradient
from tamis.errors import InvalidSettings
from tamis.model.blocks import Decoder, first_blocks
from tamis.model.targets import gradient_layers
from tamis.projection import FactorizedProjector
from tiny_models import DECODERS, random_batch, tiny_model

TOLERANCE = 2e-6  # unit rows in float32, from models parts of which compute in float32
CASES = [(family, lora) for family in DECODERS for lora in (False, True)]


def projected(model, batch, layers, *, side, seed):
    _, grads = reference_gradients(model, batch, layers)
    projector = FactorizedProjector(dim=side, seed=seed)
    rows = torch.stack(
        [torch.cat([projector.project_gradient(layer, row[layer.name][None])[0] for layer in layers]) for row in grads]
    )
    return (rows / rows.norm(dim=1, keepdim=True)).float()


@pytest.mark.parametrize(("family", "lora"), CASES)
def test_gradient_is_the_sketch_of_autograds(family, lora):
    model, batch = tiny_model(family, lora=lora), random_batch([6, 9, 3])
    expected = projected(model, batch, gradient_layers(model), side=4, seed=2)
    found = Gradient(side=4, seed=2).start(model)(batch)["embedding"]
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "lora"), CASES)
def test_tail_gradient_is_that_of_the_last_blocks(family, lora):
    model, batch = tiny_model(family, lora=lora, blocks=3), random_batch([6, 9, 3])
    layers = gradient_layers(model)
    expected = projected(model, batch, layers[len(layers) // 3 :], side=4, seed=2)
    found = TailGradient(blocks=2, side=4, seed=2).start(model)(batch)["embedding"]
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "lora"), CASES)
def test_lens_gradient_is_that_of_a_model_of_the_first_blocks(family, lora):
    model, batch = tiny_model(family, lora=lora, blocks=3), random_batch([6, 9, 3])
    shallow = first_blocks(model, 2)
    expected = projected(shallow, batch, gradient_layers(shallow), side=4, seed=2)
    found = LensGradient(depth=2, side=4, seed=2).start(model)(batch)["embedding"]
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_before_the_tail_run_without_a_graph(checkpointing):
    model, batch = tiny_model("llama", blocks=3), random_batch([6, 9])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tracked = []
    for block in Decoder.of(model).blocks:
        block.register_forward_hook(lambda module, args, output: tracked.append(output.requires_grad))
    TailGradient(blocks=1, side=4).start(model)(batch)
    assert tracked == [False, False, True]


def test_impossible_settings_are_refused():
    with pytest.raises(InvalidSettings, match="blocks must be at least 1, got 0"):
        TailGradient(blocks=0)
    with pytest.raises(InvalidSettings, match="depth must be a number of blocks, at least 1, got 0"):
        LensGradient(depth=0)
    for embedding in (Gradient, LensGradient, TailGradient):
        with pytest.raises(InvalidSettings, match="side must be at least 1, got 0"):
            embedding(side=0)
