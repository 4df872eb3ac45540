"""Which weight matrices carry gradients, what they are called and what shape they have.

Nothing is skipped silently: :func:`coverage` accounts for every parameter of the model, covered or not, and says why.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tamis.errors import InvalidSettings, Unsupported
from tamis.model.linear import is_linear
from tamis.model.low_rank_linear import LowRankLinear
from tamis.types import LayerSpec

__all__ = [
    "Coverage",
    "CoverageRow",
    "check_adapter",
    "coverage",
    "embedding_matrix",
    "gradient_layers",
    "has_adapter",
    "has_routed_experts",
    "input_embeddings",
    "is_routed",
    "is_tied",
    "output_embeddings",
]

_ROUTED = re.compile(r"(^|\.)experts\.")


@dataclass(frozen=True, kw_only=True)
class CoverageRow:
    """One group of parameters that differ only in their block number."""

    parameters: str  # qualified name, block numbers replaced by *
    tensors: int
    numel: int
    share: float  # of the trainable numbers; 0 for frozen parameters
    covered: bool
    reason: str  # why covered, or why not


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Every parameter of a model, by whether its gradient takes part in the scores."""

    rows: tuple[CoverageRow, ...]
    trainable: int
    covered: int

    @property
    def share(self) -> float:
        """Covered part of the trainable numbers."""
        return self.covered / self.trainable if self.trainable else 0.0


def input_embeddings(model: nn.Module) -> nn.Module:
    """The module that turns token ids into vectors."""
    module = model.get_input_embeddings()  # type: ignore[operator]  # every PreTrainedModel and PeftModel has it
    return cast(nn.Module, module)


def embedding_matrix(model: nn.Module) -> Tensor:
    """The token embedding's weight, ``(vocabulary, hidden)``; batches go to its device."""
    weight = input_embeddings(model).weight
    assert isinstance(weight, Tensor)
    return weight


def output_embeddings(model: nn.Module) -> nn.Module:
    """The LM head: the module whose output are the logits.

    Raises:
        Unsupported: the model has none, so it is no causal language model.
    """
    module = model.get_output_embeddings()  # type: ignore[operator]  # every PreTrainedModel and PeftModel has it
    if module is None:
        raise Unsupported(f"{type(model).__name__} has no LM head; tamis scores causal language models only")
    return cast(nn.Module, module)


def is_tied(model: nn.Module) -> bool:
    """True if the LM head and the token embedding are one matrix."""
    return getattr(output_embeddings(model), "weight", None) is getattr(input_embeddings(model), "weight", ())


def has_adapter(model: nn.Module) -> bool:
    """True if LoRA layers have been put into the model."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def check_adapter(model: nn.Module) -> None:
    """Do nothing for a model without adapter, or with a plain LoRA adapter that is not merged.

    Raises:
        Unsupported: the adapter's factors do not act as plain linear layers.
    """
    _active_lora_factors(model)


def is_routed(name: str) -> bool:
    """True for modules inside routed experts, which see gathered tokens that no longer know their row."""
    return _ROUTED.search(name) is not None


def has_routed_experts(model: nn.Module) -> bool:
    """True if the model sends each token to a few of many experts."""
    return any(is_routed(name) for name, _ in model.named_parameters())


def gradient_layers(model: nn.Module, *, include_head: bool = False) -> tuple[LayerSpec, ...]:
    """The layers whose per-sample gradients are taken, in the order of the model's modules.

    A plain model: every trainable ``nn.Linear`` and ``Conv1D`` but the LM head. A proxy: its factored layers as one
    matrix each, their product, or as two if its folder says so. A model with a LoRA adapter: the
    factors ``lora_A`` and ``lora_B`` of the active adapter. ``include_head`` adds the LM head; when it is tied to the
    token embedding, the gradient of the shared matrix has both parts.

    Raises:
        Unsupported: no layer is left, or the adapter is of a kind whose factors do not act as plain linear layers.
        InvalidSettings: ``include_head`` but the head is frozen.
    """
    head = output_embeddings(model)
    adapter = _active_lora_factors(model)
    layers: list[LayerSpec] = []
    inside: set[str] = set()  # factors of layers that count as their product
    for name, module in model.named_modules():
        if name in inside:
            continue
        if adapter is None and isinstance(module, LowRankLinear) and module.space == "product":
            inside.update((f"{name}.A", f"{name}.B"))
        if module is head:
            if include_head:
                layers.append(_head_spec(model, name, module))
            continue
        if adapter is not None and name not in adapter:
            continue
        spec = _spec(name, module)
        if spec is not None:
            layers.append(spec)
    if not layers:
        raise Unsupported(f"{type(model).__name__} has no trainable linear layer that tamis can take gradients of")
    return tuple(layers)


def coverage(model: nn.Module, layers: Sequence[LayerSpec]) -> Coverage:
    """What part of the model's parameters ``layers`` cover, and why the rest is left out."""
    by_name = {layer.name: layer for layer in layers}
    head, embedding = output_embeddings(model), input_embeddings(model)
    modules = dict(model.named_modules())
    adapter = has_adapter(model)
    groups: dict[tuple[str, bool, bool, str], list[int]] = defaultdict(list)
    for name, param in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        module = modules[module_name]
        layer = by_name.get(module_name)
        if layer is None and isinstance(modules.get(module_name.rpartition(".")[0]), LowRankLinear):
            layer = by_name.get(module_name.rpartition(".")[0])  # a factor, covered by the product
        if layer is None and module is embedding and is_tied(model):  # named once, under the embedding
            layer = next((spec for spec in layers if spec.kind == "head"), None)
        if layer is not None and (leaf == "weight" or layer.has_bias):
            covered = True
            reason = {"conv1d": "Conv1D", "head": "LM head"}.get(layer.kind, "linear layer")
            if module_name != layer.name and layer.kind == "linear":
                reason = "factor of a low-rank layer"
            if layer.kind == "head" and is_tied(model):
                reason = "LM head and token embedding, one matrix"
            elif adapter and layer.kind == "linear":
                reason = "LoRA factor"
        else:
            covered = False
            reason = _why_not(name, param, module, is_head=module is head, is_embedding=module is embedding)
        groups[re.sub(r"\.\d+(?=\.|$)", ".*", name), covered, param.requires_grad, reason].append(param.numel())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = tuple(
        CoverageRow(
            parameters=pattern,
            tensors=len(sizes),
            numel=sum(sizes),
            share=sum(sizes) / trainable if is_trainable and trainable else 0.0,
            covered=covered,
            reason=reason,
        )
        for (pattern, covered, is_trainable, reason), sizes in groups.items()
    )
    return Coverage(rows=rows, trainable=trainable, covered=sum(row.numel for row in rows if row.covered))


def _spec(name: str, module: nn.Module) -> LayerSpec | None:
    """The layer a module is, or None if it is no trainable linear layer."""
    if is_routed(name):
        return None
    if isinstance(module, LowRankLinear):
        weight, bias = module.A.weight, module.A.bias
        if module.space == "factors" or not (weight.requires_grad and module.B.weight.requires_grad):
            return None
        return LayerSpec(
            name=name,
            out_features=module.out_features,
            in_features=module.in_features,
            has_bias=bias is not None and bias.requires_grad,
            kind="linear",
        )
    if not isinstance(module, (nn.Linear, Conv1D)) or not module.weight.requires_grad or not is_linear(module):
        return None
    out_features, in_features = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
    return LayerSpec(
        name=name,
        out_features=out_features,
        in_features=in_features,
        has_bias=module.bias is not None and module.bias.requires_grad,
        kind="linear" if isinstance(module, nn.Linear) else "conv1d",
    )


def _head_spec(model: nn.Module, name: str, head: nn.Module) -> LayerSpec:
    if not isinstance(head, nn.Linear) or not is_linear(head):
        raise Unsupported(f"LM head '{name}' is a {type(head).__name__}, not a linear layer; leave the head out")
    if not head.weight.requires_grad:
        raise InvalidSettings(f"the LM head '{name}' is frozen (by the adapter), so it has no gradient to include")
    has_bias = head.bias is not None and head.bias.requires_grad
    if has_bias and is_tied(model):
        raise Unsupported(f"LM head '{name}' has a bias and shares its matrix with the embedding; leave the head out")
    out_features, in_features = head.weight.shape
    return LayerSpec(name=name, out_features=out_features, in_features=in_features, has_bias=has_bias, kind="head")


def _active_lora_factors(model: nn.Module) -> set[str] | None:
    """Names of the active adapter's factor modules; None for a model without LoRA."""
    if not has_adapter(model):
        if hasattr(model, "peft_config"):
            configs = cast(Any, model).peft_config.values()
            if all(
                getattr(config.peft_type, "value", config.peft_type) == "LORA" for config in configs
            ):  # the model is a part of one, and the adapter stands on others
                raise Unsupported(f"no layer of this part of {type(model).__name__} carries the adapter")
            raise Unsupported(f"adapter of {type(model).__name__} is not LoRA; only LoRA factors are linear layers")
        return None
    names: set[str] = set()
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        if getattr(module, "merged", False):
            raise Unsupported(f"the adapter is merged into '{name}'; unmerge it, or load it as a plain model")
        for active in cast(Any, module).active_adapters:
            if getattr(module, "use_dora", {}).get(active):
                raise Unsupported(f"'{name}' uses DoRA, whose factors are not plain linear layers; use LoRA")
            names.update((f"{name}.lora_A.{active}", f"{name}.lora_B.{active}"))
    return names


def _why_not(name: str, param: nn.Parameter, module: nn.Module, *, is_head: bool, is_embedding: bool) -> str:
    if not param.requires_grad:
        return "frozen: not trained"
    if is_head:
        return "LM head: left out unless asked for"
    if is_embedding:
        return "token embedding"
    if "experts" in name.split("."):
        fused = " stored as one tensor" if param.dim() == 3 else ""
        return f"routed experts{fused}: per-sample gradients are not supported"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if param.dim() < 2:
        return (
            "bias of an uncovered module"
            if name.endswith("bias") and param.dim() == 0
            else "norm, bias or scale vector"
        )
    return f"{type(module).__name__} is not a linear layer"
