"""What the runners of one online step share: the model, the rows, plain training, and the loop that answers requests.

A runner is a process of its own, in the tool's own environment. It answers one line of JSON per request:
``{"do": "step"}`` makes an update of a selection, ``{"do": "plain"}`` one of all candidates, by a second model without
the tool; both answer with seconds and the process's peak memory so far. ``{"do": "check", "gradients": FILE}`` is a
step that answers with scores and kept rows, too, and writes the gradient left for the optimizer.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from worker import described, peak_mb

RATE = 1e-4


class Stepper(Protocol):
    """A tool that makes one update at a time."""

    def gradient(self) -> None:
        """Choose, and leave the gradient of the chosen in ``param.grad``."""

    def found(self) -> tuple[list[float], list[int]]:
        """Scores of the last choice, ``<grad l_i, grad of the mean target loss>``, and the rows kept."""


def load_model(given: dict[str, Any]) -> nn.Module:
    """The model that the benchmark saved, with its adapter if it has one; dropout off, as it has none."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    if given["adapter"]:
        from peft import PeftModel  # not needed for anything else

        model = PeftModel.from_pretrained(model, given["adapter"], is_trainable=True)
    return model.eval()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=RATE)


def rows_of(given: dict[str, Any], side: str) -> Tensor:
    return torch.tensor(given[side])


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean over rows of each row's mean token loss: the mean over all tokens, as rows have the same length."""
    loss: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    return loss


def plain_update(given: dict[str, Any]) -> Callable[[], None]:
    """An update of all candidates, what a Trainer does with them: in micro-batches whose gradients add up."""
    model, ids = load_model(given), rows_of(given, "candidates")
    optimizer = adamw(model)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        for part in ids.split(given["rows_a_pass"]):
            (mean_loss(model, part) * (len(part) / len(ids))).backward()
        optimizer.step()

    return update


def serve(
    start: Callable[[nn.Module, dict[str, Any]], Stepper], given: dict[str, Any], packages: tuple[str, ...]
) -> None:
    """Answer requests until there are no more. An exception is an answer, too."""
    answers = os.fdopen(int(sys.argv[3]), "w", encoding="utf-8")  # not stdout: libraries print there

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    answer({"versions": {name: metadata.version(name) for name in packages}})
    try:
        runs = _Runs(start, given)
        for line in sys.stdin:
            request = json.loads(line)
            answer(runs.answer(request))
    except Exception as error:
        answer({"error": described(error)})


class _Runs:
    """Both kinds of update, each with a model of its own that is loaded when first asked for."""

    def __init__(self, start: Callable[[nn.Module, dict[str, Any]], Stepper], given: dict[str, Any]) -> None:
        self._start, self._given = start, given
        self._plain: Callable[[], None] | None = None
        self._stepper: Stepper | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "plain":
            self._plain = self._plain or plain_update(self._given)
            return self._timed(self._plain)
        if self._stepper is None:
            self._model = load_model(self._given)
            self._optimizer = adamw(self._model)
            self._stepper = self._start(self._model, self._given)
        found = self._timed(self._step)
        if request["do"] == "check":
            params = {name: param for name, param in self._model.named_parameters() if param.grad is not None}
            np.savez(request["gradients"], **{name: param.grad.numpy() for name, param in params.items()})
            found["scores"], found["kept"] = self._stepper.found()
        return found

    def _step(self) -> None:
        assert self._stepper is not None
        self._optimizer.zero_grad(set_to_none=True)
        self._stepper.gradient()
        self._optimizer.step()

    @staticmethod
    def _timed(run: Callable[[], None]) -> dict[str, Any]:
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        return {**seconds, "peak_mb": peak_mb()}
