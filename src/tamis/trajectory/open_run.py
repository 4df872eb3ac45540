"""From a folder with a recorded run to a trajectory that can be walked: the model it started from, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_config, get_peft_model
from torch import nn

from tamis.errors import InvalidInput, Unsupported
from tamis.model.load import LoadedModel, ModelSettings, load_model
from tamis.trajectory.causal import CausalProblem, RecordedRun
from tamis.trajectory.identity import check_model, refuse_dora
from tamis.trajectory.log import LogReader

__all__ = ["model_of_run", "open_run", "run_model_settings"]


def run_model_settings(folder: Path, settings: ModelSettings | None) -> ModelSettings:
    """How to load the model of a run: what the run says, with ``settings`` in place of it where given.

    Raises:
        InvalidInput: the run does not say what opens its model, and nothing was given.
    """
    manifest = LogReader(folder).manifest
    name = settings.name if settings is not None and settings.name else manifest["model"]["name"]
    if not name:
        raise InvalidInput(f"{folder} does not say what opens the model that training started from; pass --model")
    base = ModelSettings(name=name) if settings is None else replace(settings, name=name)
    return replace(base, dtype=manifest["base_dtype"])


def model_of_run(folder: Path, settings: ModelSettings) -> LoadedModel:
    """The model that training started from, with a fresh adapter of the recorded kind if the run trained one."""
    loaded = load_model(settings)
    adapter = LogReader(folder).manifest["model"]["adapter"]
    if adapter is not None and not isinstance(loaded.model, PeftModel):
        loaded.model = _with_adapter(loaded.model, adapter)
    return loaded


def open_run(folder: Path, model: nn.Module) -> RecordedRun:
    """The run in ``folder``, complete, as a trajectory of ``model``.

    The model's own parameters keep their values; those that the run trained require gradients from here on, the others
    do not.

    Raises:
        InvalidInput: there is no run, or it did not come to its end.
        StoreMismatch: it was recorded from another model.
        Unsupported: it trained an adapter whose gradients are not derivatives.
    """
    reader = LogReader(folder)
    reader.require_complete()
    refuse_dora(reader.manifest["model"]["adapter"])
    check_model(model, reader.manifest, where=str(folder))
    autocast = reader.manifest["autocast"]
    dtype = None if autocast is None else getattr(torch, autocast)
    return RecordedRun(reader, CausalProblem(model, dict(reader.manifest["trained"]), autocast=dtype))


def _with_adapter(model: nn.Module, values: Mapping[str, Any]) -> nn.Module:
    kind = type(get_peft_config({"peft_type": values["peft_type"]}))
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    config = get_peft_config({key: value for key, value in values.items() if key in known})
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise Unsupported(f"the run's adapter does not fit this model: {error}; give the right one, --model") from error
    return adapted
