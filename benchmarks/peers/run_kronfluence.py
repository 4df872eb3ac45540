"""kronfluence: pairwise scores with the ``identity`` strategy (no curvature), query gradients aggregated.

float32, rows sorted by length, by default 8 a batch, each padded to its longest. Its model preparation freezes the
weights. Its one variant is ``exact-dot``: norms, and so cosines, would be another pass (self-influence), and nothing is
projected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from worker import Clock, Rows, Run, by_length, collate, examples, in_pool_order, inputs, serve, summed_losses

VARIANT, GIVEN = inputs()
assert VARIANT == "exact-dot"
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


class ResponseLoss(Task):
    """The pool's loss and the target's measurement are the same function; the first pool batch ends the target side."""

    def __init__(self, layers: int) -> None:
        self.names = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in LINEARS]
        self.clock = Clock()

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        self.clock.mark("target")
        return summed_losses(model, batch)

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return summed_losses(model, batch)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"]


def start() -> Run:
    model: Any = AutoModelForCausalLM.from_pretrained(GIVEN["model"], dtype=torch.float32).eval()
    task = ResponseLoss(model.config.num_hidden_layers)
    model = prepare_model(model, task)

    def run(pool: Rows, target: Rows, folder: Path, clock: Clock) -> list[float]:
        order = by_length(pool)
        task.clock = clock
        analyzer = Analyzer(
            analysis_name="pool", model=model, task=task, cpu=True, disable_tqdm=True, output_dir=str(folder)
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
        clock.start()
        train = examples(pool, order)
        analyzer.fit_all_factors("identity", train, factor_args=FactorArguments(strategy="identity"))
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="identity",
            query_dataset=examples(target, by_length(target)),
            train_dataset=train,
            per_device_query_batch_size=GIVEN["batch_rows"],
            per_device_train_batch_size=GIVEN["batch_rows"],
            score_args=ScoreArguments(aggregate_query_gradients=True),
        )
        clock.mark("pool")
        scores = analyzer.load_pairwise_scores("scores")["all_modules"][0] / len(target)
        return in_pool_order(scores.tolist(), order)

    return run


if __name__ == "__main__":
    serve(start, GIVEN, ("kronfluence", "torch", "transformers"))
