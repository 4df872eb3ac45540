"""dattri-llm's ``DataSelectionCallback``: one backward pass whose last hook scores, chooses and takes the rest away.

All candidates are in one pass: the callback drops the worst of each backward pass, so that micro-batches would be
chosen from one by one. Target rows are a ``val_loader`` of one batch, all rows in it. The callback subtracts the part
of the gradient that dropped rows have; with a loss that is a sum over rows divided by the number kept, what is left is
the mean over the kept rows, and ``renormalize``, which takes apart the gradients of kept rows as well, is not needed.
Every layer with a trainable weight is hooked row by row; Llama's norms are declared to be ``nn.RMSNorm``, as its
documentation says. Rows are identified by their tokens alone.

Variants: ``ghost`` (its default, each layer by the cheaper of two ways) and ``materialized`` are its score modes;
``mean-target`` replaces ``compute_scores``, which is meant to be replaced, by one that adds the target rows' gradients
up first, layer by layer, so that the cost does not grow with pairs of rows.

What it has besides does not fit this step. ``capture_style="materialized"`` or ``"auto"`` and projections: layers
without factors are left out of the removal, silently. ``invasive_linear_io``: no weight gradient to subtract from.
``val_targets_per_pass`` above 1: targets of one row each, of older weights. ``target="fixed"``: no target of the
current weights.
"""

from __future__ import annotations

from typing import Any

from dattri_llm import REGISTER_ALL, DataSelectionCallback, HookManager, HookManagerConfig
from dattri_llm.gradient import ops
from dattri_llm.gradient.gradient import Factorized, Gradient
from dattri_llm.utils.module import rms_norm_module_kwargs
from step_worker import Stepper, mean_loss, rows_of, serve
from torch import Tensor, nn
from worker import inputs

VARIANT, GIVEN = inputs()


class MeanTarget(DataSelectionCallback):
    """Scores against the summed gradient of the target rows, formed once for each layer."""

    @staticmethod
    def compute_scores(
        gradient: Gradient, target: Gradient | None = None, *, scoring_kwargs: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        assert target is not None
        return {
            name: _scores(rows, target.data[name], gradient.layer_types[name]) for name, rows in gradient.data.items()
        }


def _scores(rows: Factorized, target: Factorized, kind: str) -> Tensor:
    """``<grad l_i, sum_j grad t_j>`` of one layer, the factors being position by position."""
    (act, grad), (target_act, target_grad) = (
        ops.preprocess_factors(each.activation, each.pre_activation_grad, kind, each.module_kwargs)
        for each in (rows, target)
    )
    if ops.is_embedding(kind):
        table = target_grad.new_zeros(rows.module_kwargs["num_embeddings"], target_grad.shape[-1])
        table.index_add_(0, target_act.flatten(), target_grad.flatten(0, 1))
        return (grad * table[act]).sum((1, 2))
    if ops.is_norm(kind):
        return (act * grad).sum(1) @ (target_act * target_grad).sum((0, 1))
    direction = target_grad.flatten(0, 1).T @ target_act.flatten(0, 1)  # (O, I)
    # Through the narrower side: (B, T, min(O, I)) is what stands between.
    if direction.shape[0] < direction.shape[1]:
        return (act @ direction.T * grad).sum((1, 2))
    return (grad @ direction * act).sum((1, 2))


class Step:
    """A backward pass over all candidates, with the callback in it."""

    def __init__(self, model: nn.Module, given: dict[str, Any]) -> None:
        self._model, self._candidates = model, rows_of(given, "candidates")
        self._target, self._keep = rows_of(given, "target"), given["keep"]
        self._callback = (MeanTarget if VARIANT == "mean-target" else DataSelectionCallback)(
            model,
            target="val_loader",
            val_loader=[self._target],
            val_loss_fn=mean_loss,
            scoring_kwargs={"score_mode": "materialized" if VARIANT == "materialized" else "ghost"},
            selection_kwargs={
                "threshold": 1 - self._keep / len(self._candidates),
                "threshold_mode": "bottom_fraction",
            },
        )
        norms = {
            name: module
            for name, module in model.named_modules()
            if type(module).__name__.endswith("RMSNorm") and module.weight.requires_grad
        }
        config = HookManagerConfig(
            linear_io=REGISTER_ALL,
            hook_types=dict.fromkeys(norms, "linear_io"),
            layer_types=dict.fromkeys(norms, "nn.RMSNorm"),
            module_kwargs={
                name: rms_norm_module_kwargs(normalized_shape=len(norm.weight), eps=norm.variance_epsilon)
                for name, norm in norms.items()
            },
        )
        self._hooks = HookManager(model, config, [self._callback], sample_hash_fields=["input_ids"])
        trained = {name.removesuffix(".weight") for name, param in model.named_parameters() if param.requires_grad}
        if missing := trained - set(self._hooks.layer_names):
            raise RuntimeError(f"trainable but not hooked row by row: {sorted(missing)[:5]}")

    def gradient(self) -> None:
        with self._hooks.collect():
            (mean_loss(self._model, self._candidates) * (len(self._candidates) / self._keep)).backward()

    def found(self) -> tuple[list[float], list[int]]:
        assert self._callback.last_scores is not None
        scores = self._callback.last_scores * self._keep  # of rows whose loss was divided by it
        kept = set(range(len(self._candidates))) - set(self._callback.last_dropped)
        return scores.tolist(), sorted(kept)


def start(model: nn.Module, given: dict[str, Any]) -> Stepper:
    return Step(model, given)


if __name__ == "__main__":
    serve(start, GIVEN, ("dattri-llm", "torch", "transformers"))
