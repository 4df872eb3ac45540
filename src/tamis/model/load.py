"""Base model, tokenizer and adapter from what the user typed; dtype and device are decided here, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from tamis.errors import InvalidInput, InvalidSettings, TamisError, Unsupported, first_line
from tamis.identity import text_sha256
from tamis.model.checkpointing import checkpoint
from tamis.model.processes import local_rank
from tamis.model.proxy_folder import proxy_class
from tamis.model.source import ModelSource, fingerprint_of, resolve_source
from tamis.model.targets import embedding_matrix

__all__ = [
    "LoadedModel",
    "ModelSettings",
    "check_loads",
    "load_model",
    "load_tokenizer",
    "model_fingerprint",
    "no_progress_bars",
    "pad_token_id",
    "resolved_device",
    "resolved_dtype",
    "template_sha256",
    "template_text",
]

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and how it runs. ``auto`` is resolved by :func:`load_model`, whose description says to what."""

    name: str  # hub id, local folder, PEFT adapter folder, or .gguf file
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    chat_template: str | None = None  # a Jinja template or a file that holds one; replaces the tokenizer's
    gradient_checkpointing: bool = False
    device_map: str | None = None  # Accelerate's, for models that do not fit one device

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidSettings("model is empty; give a hub id, a folder, an adapter folder or a .gguf file")
        if self.dtype != "auto" and self.dtype not in _DTYPES:
            raise InvalidSettings(f"dtype '{self.dtype}' is unknown; choose auto or one of {', '.join(_DTYPES)}")
        if self.device_map is not None and self.device != "auto":
            raise InvalidSettings(
                f"device '{self.device}' and device_map '{self.device_map}' exclude each other; give one"
            )


@dataclass(kw_only=True)
class LoadedModel:
    """A model ready for the gradient engine, and what it is."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    description: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return embedding_matrix(self.model).device

    @property
    def pad_id(self) -> int:
        """The id that fills padded positions."""
        found = pad_token_id(self.tokenizer)
        # Tokenizers may know more ids than the model; whatever fills the padding must have an embedding.
        return found if found < embedding_matrix(self.model).shape[0] else 0


def load_model(settings: ModelSettings) -> LoadedModel:
    """Load weights and tokenizer. All weights of a plain model are trainable; of an adapter, its factors only.

    Raises:
        InvalidInput: the files are missing, incomplete, or an adapter does not fit its base.
        InvalidSettings: the device or dtype is not available.
        Unsupported: Transformers does not know the architecture, or the file needs a package that is missing.
    """
    source = resolve_source(settings.name, settings.revision)
    device = _device(settings)
    dtype = _dtype(settings, device)
    model = _load_weights(source.base or source, settings, dtype)
    if settings.device_map is None:
        model = model.to(device)
    if source.is_adapter:
        model = _attach_adapter(model, source, settings)
    model.eval()
    if settings.gradient_checkpointing:
        checkpoint(model)
    loaded = LoadedModel(
        model=model,
        tokenizer=load_tokenizer(settings),
        fingerprint=fingerprint_of(source),
        description={},
    )
    loaded.description.update(_describe(settings, source, loaded, dtype))
    return loaded


def check_loads(folder: Path) -> None:
    """Refuse a folder whose weights are not those of its model, by their names and shapes; none is read.

    Raises:
        InvalidInput: some are missing or have another shape, or a file cannot be read.
    """
    # Weights have the same names whatever computes attention, and every family has this one.
    settings = ModelSettings(name=str(folder), device_map="meta", attention="eager")
    _load_weights(resolve_source(settings.name), settings, torch.float32)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer alone, with the chat template of the settings if they have one. Loads no weights.

    Raises:
        InvalidInput: there is none, or the chat template file cannot be read.
    """
    source = resolve_source(settings.name, settings.revision)
    place = source if source.base is None or source.has_tokenizer() else source.base
    with _as_tamis_errors(settings.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            place.name,
            revision=place.revision,
            trust_remote_code=settings.trust_remote_code,
            **({"gguf_file": place.gguf_file} if place.gguf_file else {}),
        )
    if settings.chat_template is not None:
        tokenizer.chat_template = template_text(settings.chat_template)
    return cast(PreTrainedTokenizerBase, tokenizer)


def template_text(given: str) -> str:
    """The chat template itself, whether ``given`` is one or names a file that holds one.

    Raises:
        InvalidInput: it is neither.
    """
    if "{%" in given or "{{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"chat_template {given}: neither a template (it has no '{{%' or '{{{{') nor a readable file "
            f"({first_line(error)})"
        ) from error


def template_sha256(given: str | None) -> str | None:
    """By which runs know the chat template that they were given: a file may move, but not change.

    Raises:
        InvalidInput: it is neither a template nor a readable file.
    """
    return None if given is None else text_sha256(template_text(given))


def model_fingerprint(settings: ModelSettings) -> str:
    """What :func:`load_model` would give as fingerprint, without loading the weights to memory."""
    return fingerprint_of(resolve_source(settings.name, settings.revision))


def resolved_device(settings: ModelSettings) -> str:
    """The device that ``auto`` means on this machine, or the one given.

    Raises:
        InvalidSettings: it is not available.
    """
    return str(_device(settings))


def resolved_dtype(settings: ModelSettings) -> str:
    """The element type that ``auto`` means on this machine, or the one given; loads no weights.

    Raises:
        InvalidSettings: the device is not available.
    """
    return str(_dtype(settings, _device(settings))).removeprefix("torch.")


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padded positions: the tokenizer's, else its end of sequence, else 0. It never carries loss."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _load_weights(source: ModelSource, settings: ModelSettings, dtype: torch.dtype) -> nn.Module:
    options: dict[str, Any] = {
        "revision": source.revision or "main",
        "dtype": dtype,
        "attn_implementation": settings.attention,
        "trust_remote_code": settings.trust_remote_code,
        "output_loading_info": True,
    }
    if settings.device_map is not None:
        options["device_map"] = settings.device_map
    if source.gguf_file is not None:
        options.update(gguf_file=source.gguf_file, **_gguf_options(settings.name))
    layout = source.proxy_layout()
    with _as_tamis_errors(settings.name, "model"), no_progress_bars():
        loads_as: Any = AutoModelForCausalLM
        if layout is not None:
            # Nobody needs code of the folder to load a proxy, so none runs, whatever was allowed.
            config = AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=False)
            loads_as = proxy_class(config, layout, settings.name)
            options.update(trust_remote_code=False, config=config)
        model, info = loads_as.from_pretrained(source.name, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise InvalidInput(
            f"model '{settings.name}' lacks {len(missing)} of its weights (first: {missing[0]}); they would be random "
            "numbers. Is it a causal language model, saved whole?"
        )
    return cast(nn.Module, model)


def _gguf_options(name: str) -> dict[str, Any]:
    if find_spec("gguf") is None:
        raise Unsupported(f"model '{name}' is a GGUF file, which needs the gguf package: pip install 'tamis[gguf]'")
    try:
        from transformers import GgufConfig  # Transformers 5; before, GGUF files were always dequantised
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _attach_adapter(model: nn.Module, source: ModelSource, settings: ModelSettings) -> nn.Module:
    what = f"adapter '{settings.name}'"
    base = cast(ModelSource, source.base).name
    try:
        adapted = PeftModel.from_pretrained(model, source.name, revision=source.revision, is_trainable=True)
        saved = load_peft_weights(source.name, device="cpu", revision=source.revision)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InvalidInput(f"{what} does not fit its base '{base}': {first_line(error)}") from error
    except OSError as error:
        raise InvalidInput(f"{what} cannot be read: {first_line(error)}") from error
    expected = get_peft_model_state_dict(adapted)
    different = sorted(set(expected) ^ set(saved))
    if different:
        raise InvalidInput(
            f"{what} does not fit its base '{base}': {len(different)} weights are on one side only (first: "
            f"{different[0]}); was it trained on another model?"
        )
    return cast(nn.Module, adapted)


def _device(settings: ModelSettings) -> torch.device:
    if settings.device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(settings.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidSettings(
            f"device '{settings.device}' is not available here ({first_line(error)}); try auto"
        ) from error
    return torch.device("cuda", local_rank()) if settings.device == "cuda" else device


def _dtype(settings: ModelSettings, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        return _DTYPES[settings.dtype]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _describe(settings: ModelSettings, source: ModelSource, loaded: LoadedModel, dtype: torch.dtype) -> dict[str, Any]:
    model = loaded.model
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    is_proxy = (source.base or source).proxy_layout() is not None
    return {
        "name": settings.name,
        "kind": "adapter" if source.is_adapter else source.kind,
        "base": source.base.name if source.base else None,
        "class": type(whole).__name__ + ("Proxy" if is_proxy else ""),
        "tokenizer": type(loaded.tokenizer).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(loaded.device) if settings.device_map is None else f"device_map {settings.device_map}",
        "attention": settings.attention,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "fingerprint": loaded.fingerprint,
    }


@contextmanager
def _as_tamis_errors(name: str, what: str) -> Iterator[None]:
    """Transformers' many exceptions as the one line a user needs."""
    try:
        yield
    except TamisError:
        raise
    except ImportError as error:
        raise Unsupported(f"{what} '{name}' needs a package that is missing: {first_line(error)}") from error
    except OSError as error:
        raise InvalidInput(f"{what} '{name}' cannot be read: {first_line(error)}") from error
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{what} '{name}' cannot be loaded: {first_line(error)}") from error
    except Exception as error:  # safetensors and tokenizers raise classes of their own, derived from Exception alone
        raise InvalidInput(f"{what} '{name}' cannot be loaded: {first_line(error)}") from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Transformers reads and writes weights in silence: progress bars belong to the command line.

    The GGUF reader's own ignores Transformers' switch (seen in 5.23).
    """
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    bar = getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    if bar is not None:
        modeling_gguf_pytorch_utils.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        if bar is not None:
            modeling_gguf_pytorch_utils.tqdm = bar
        if shown:
            transformers_logging.enable_progress_bar()
