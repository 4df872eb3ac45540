"""What makes a model folder a proxy's: ``proxy.json``, which says which layers are in factors, and how it loads.

No code of the folder runs. The model is of Transformers' own class for its config, whose layers are replaced before
the weights are read, so sharded files, tied weights, device maps and element types work as for any other model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from tamis.errors import InvalidInput, Unsupported
from tamis.model.low_rank_linear import Space, low_rank_layers, put_low_rank_layers

__all__ = [
    "PROXY_FILE",
    "ProxyLayout",
    "has_own_class",
    "layout_of",
    "proxy_class",
    "read_layout",
    "write_layout",
]

PROXY_FILE = "proxy.json"
_FORMAT = "tamis-proxy-1"


@dataclass(frozen=True, kw_only=True)
class ProxyLayout:
    """Which layers are in factors of which rank, and what per-sample gradients are taken of."""

    ranks: Mapping[str, int]
    space: Space = "product"
    made_by: Mapping[str, Any] = field(default_factory=dict)  # how it was built; only to be shown

    def to_json(self) -> dict[str, Any]:
        """What stands in the file."""
        return {"format": _FORMAT, "space": self.space, "ranks": dict(self.ranks), **self.made_by}


def read_layout(path: Path) -> ProxyLayout:
    """The layout in a ``proxy.json``.

    Raises:
        InvalidInput: the file is not one that this version has written.
    """
    todo = "build the proxy again with tamis proxy"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} is not readable JSON ({error}); {todo}") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        said = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise InvalidInput(f"{path}: expected format '{_FORMAT}', found {said!r}; {todo}")
    ranks, space = found.get("ranks"), found.get("space")
    numbers = ranks.values() if isinstance(ranks, dict) else [None]
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 for rank in numbers):
        raise InvalidInput(f"{path}: 'ranks' must give every layer a whole number above zero; {todo}")
    if space not in ("product", "factors"):
        raise InvalidInput(f"{path}: 'space' must be product or factors, found {space!r}; {todo}")
    return ProxyLayout(ranks=cast(dict[str, int], ranks), space=space)


def layout_of(model: nn.Module) -> ProxyLayout | None:
    """The layout of a model with factored layers, which its folder needs to be loaded; None for a model without."""
    layers = low_rank_layers(model)
    if not layers:
        return None
    return ProxyLayout(
        ranks={name: layer.rank for name, layer in layers.items()}, space=next(iter(layers.values())).space
    )


def write_layout(layout: ProxyLayout, folder: Path) -> None:
    """Write ``proxy.json`` into a folder that holds the weights already."""
    text = json.dumps(layout.to_json(), indent=2, ensure_ascii=False) + "\n"
    (folder / PROXY_FILE).write_text(text, encoding="utf-8")


def has_own_class(model: nn.Module) -> bool:
    """Whether Transformers itself has the model's class, so that a folder needs no code to be loaded."""
    config = getattr(model, "config", None)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(model) is MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def proxy_class(config: Any, layout: ProxyLayout, name: str) -> type[Any]:
    """The class of causal language models for ``config`` in which the layers of ``layout`` are in factors.

    Raises:
        Unsupported: Transformers has no class of its own for this config.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Unsupported(
            f"proxy '{name}': Transformers has no causal language model of its own for {type(config).__name__}; a "
            "proxy of a model with code of its own cannot be loaded"
        )
    base = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    class _Proxy(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            try:
                put_low_rank_layers(self, layout.ranks, space=layout.space)
            except KeyError as error:
                raise InvalidInput(
                    f"proxy '{name}': {PROXY_FILE} has factors of a layer {error} that {base.__name__} does not have; "
                    "the files do not belong together"
                ) from error

        def initialize_weights(self) -> None:
            # Some families start a layer from the module around it (GPT-2's MLP its ``c_proj.weight``), which factors
            # do not have. A module whose own numbers were all read, or that has none, needs no start.
            for module in self.modules():
                own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
                if all(getattr(tensor, "_is_hf_initialized", False) for tensor in own):
                    module._is_hf_initialized = True
            super().initialize_weights()

    # Transformers renames weights between file and model by the class's name, and never for a module outside its own
    # package: a class of ours would not find again what the model itself has written (GPT-NeoX's head).
    _Proxy.__name__, _Proxy.__qualname__, _Proxy.__module__ = base.__name__, base.__qualname__, base.__module__
    return _Proxy
