"""dattri-llm: its TracIn / GradCos attributor over live gradient streams, nothing written but the scores.

All weights frozen and the embedding's output differentiable, so that no weight gradient is computed (its
``include_frozen`` probe); rows sorted by length, by default 8 a batch (its own default), each batch padded to its
longest through the streamer's ``collate_fn``. It scores pairs of rows; against one mean target it is cheaper to
override its hook ``transform_test_rep``, which its documentation offers for such reductions. The exact variants do.

Variants: ``exact-dot``, ``exact-cosine`` (``normalized_grad``), ``projected-cosine`` (``"logra"`` capture at 16 per
side and layer, every pair, then the mean over target rows).
"""

from __future__ import annotations

from pathlib import Path

import torch
from dattri_llm import AttributionArguments, AttributionTask, HookManagerConfig, TracInAttributor
from dattri_llm.gradient import ops
from dattri_llm.gradient.gradient import Gradient
from dattri_llm.gradient.streaming import GradientStreamer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from worker import Clock, Rows, Run, by_length, collate, examples, in_pool_order, inputs, serve, summed_losses

VARIANT, GIVEN = inputs()
COSINE = VARIANT.endswith("cosine")
BLOCK_LINEARS = [r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj$"]
PROJECTION = {"__default__": {"style": "logra", "proj_dim": 16, "proj_max_batch_size": 8, "proj_type": "rademacher"}}


class MeanTarget(TracInAttributor):
    """One direction for all target rows: the mean of their gradients, or of their gradients scaled to length 1."""

    def transform_test_rep(self, test_rep: Gradient) -> Gradient:
        scale = torch.ones(test_rep.batch_size)
        if self._metric == "cosine":
            scale = 1 / self._norm(test_rep, list(test_rep.data), None)
        mean = test_rep.map_layers(
            lambda _, value, kind: torch.einsum("b...,b->...", ops.materialize(value, kind), scale)[None] / len(scale)
        )
        # The cosine divides by this norm again; the scores are multiplied by it in the end.
        self.mean_norm = float(self._norm(mean, list(mean.data), None)) if self._metric == "cosine" else 1.0
        return mean


def start() -> Run:
    model = AutoModelForCausalLM.from_pretrained(GIVEN["model"], dtype=torch.float32)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    hooks = HookManagerConfig(
        linear_io=BLOCK_LINEARS,
        include_frozen=True,
        capture_style="auto" if VARIANT.startswith("projected") else "factorized",
        projection_kwargs=PROJECTION if VARIANT.startswith("projected") else None,
    )

    def run(pool: Rows, target: Rows, folder: Path, clock: Clock) -> list[float]:
        def pool_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            clock.mark("target")
            return summed_losses(model, batch)

        order = by_length(pool)
        mean_target = VARIANT.startswith("exact")
        arguments = AttributionArguments(
            output_dir=str(folder),
            per_device_train_batch_size=GIVEN["batch_rows"],
            per_device_eval_batch_size=len(target) if mean_target else GIVEN["batch_rows"],
            max_grad_norm=None,
            use_cpu=True,
        )
        task = AttributionTask(pool_losses, model, target_func=summed_losses)
        attributor = (MeanTarget if mean_target else TracInAttributor)(arguments, task=task)
        attributor._set_metric(COSINE)
        clock.start()
        train = GradientStreamer(
            model,
            examples(pool, order),
            arguments,
            batch_size=GIVEN["batch_rows"],
            loss_fn=pool_losses,
            config=hooks,
            collate_fn=collate,
        )
        test = GradientStreamer(
            model,
            examples(target, by_length(target)),
            arguments,
            batch_size=arguments.per_device_eval_batch_size,
            loss_fn=summed_losses,
            hook_manager=train.hook_manager,
            collate_fn=collate,
        )
        with train, test:
            scores = attributor.score_sources(train, test)[0]
        clock.mark("pool")
        values = scores.mean(dim=1) * (attributor.mean_norm if mean_target else 1)
        return in_pool_order(values.tolist(), order)

    return run


if __name__ == "__main__":
    serve(start, GIVEN, ("dattri-llm", "torch", "transformers"))
