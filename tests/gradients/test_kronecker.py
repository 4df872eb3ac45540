"""What K-FAC factors are summed from: against a loop over tokens, padding and a layer called twice included.

Scores made of them are compared with dense matrices in tests/score/test_influence_function.py.
"""

from __future__ import annotations

import torch

from tamis.gradients.kronecker import SecondMoments
from tamis.gradients.per_sample import run_batch
from tamis.model.targets import gradient_layers
from tiny_models import padded_by, random_batch, tiny_model


def test_inputs_of_both_uses_of_a_shared_layer_are_summed_and_counted() -> None:
    model = tiny_model("gpt2")
    model.transformer.h[1] = model.transformer.h[0]
    layers = gradient_layers(model)
    batch = padded_by(random_batch([5, 8]), 3)
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    modules = dict(model.named_modules())
    handles = [
        modules[layer.name].register_forward_hook(lambda _, args, __, name=layer.name: seen[name].append(args[0]))
        for layer in layers
    ]
    sums = SecondMoments()
    sums.see(batch)
    run_batch(model, batch, layers, sums)
    for handle in handles:
        handle.remove()
    for layer in layers:
        assert len(seen[layer.name]) == 2 and layer.has_bias
        assert sums.tokens[layer.name].item() == 2 * (5 + 8)
        wanted = sum(
            torch.outer(a, a)
            for use in seen[layer.name]
            for row, length in zip(use.detach(), (5, 8), strict=True)
            for a in torch.cat([row[:length], torch.ones(length, 1, dtype=row.dtype)], dim=1)
        )
        torch.testing.assert_close(sums.inputs[layer.name], wanted, rtol=1e-9, atol=1e-9)
