"""dattri-llm: trains a small network with its streamer and gives its AdamW-influence of every row, for trace_agreement.

    python run_dattri_trajectory.py GIVEN.npz FOUND.npz

``GIVEN`` holds the weights of linear layers without bias (``layer0``, ``layer1``: between them tanh), rows, and
settings. ``FOUND`` gets the rows of every update in their order, the scores (updates, batch, targets) and the weights
after training.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import metadata

import numpy as np
import torch
from dattri_llm import AttributionArguments, AttributionTask
from dattri_llm.attribution.algorithm.adamw_influence import AdamWInfluenceAttributor
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def main() -> None:
    given = np.load(sys.argv[1])
    first, last = (torch.from_numpy(given[name]) for name in ("layer0", "layer1"))
    model = nn.Sequential(
        nn.Linear(first.shape[1], first.shape[0], bias=False),
        nn.Tanh(),
        nn.Linear(last.shape[1], last.shape[0], bias=False),
    )
    with torch.no_grad():
        model[0].weight.copy_(first)
        model[2].weight.copy_(last)
    seen = list[list[int]]()

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        rows, inputs, labels = batch
        if model.training and len(seen) < int(given["steps"]):
            seen.append(rows.tolist())
        return nn.functional.cross_entropy(model(inputs), labels)

    def target_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[1]), batch[2], reduction="sum")

    def rows_of(name: str) -> TensorDataset:
        inputs, labels = (torch.from_numpy(given[f"{part}_{name}"]) for part in ("x", "y"))
        return TensorDataset(torch.arange(len(labels)), inputs, labels)

    with tempfile.TemporaryDirectory() as folder:
        arguments = AttributionArguments(
            output_dir=folder,
            per_device_train_batch_size=int(given["batch"]),
            per_device_eval_batch_size=len(given["y_target"]),
            learning_rate=float(given["rate"]),
            weight_decay=float(given["decay"]),
            lr_scheduler_type="constant",
            max_grad_norm=None,
            use_cpu=True,
        )
        task = AttributionTask(loss, model, target_func=target_loss)
        attributor = AdamWInfluenceAttributor(arguments, task=task)
        train_dir, test_dir = attributor.cache(rows_of("train"), rows_of("target"))[0]
        trained = {f"layer{i}": model[2 * i].weight.detach().numpy().copy() for i in range(2)}
        score = attributor.attribute_from_cache(train_dir, test_dir, propagation="test")
    steps = np.array(score.row_steps)
    scores = np.stack([score.scores.numpy()[steps == step] for step in sorted(set(score.row_steps))])
    version = metadata.version("dattri-llm")
    np.savez(sys.argv[2], rows=np.array(seen), scores=scores, version=np.array(version), **trained)


if __name__ == "__main__":
    main()
